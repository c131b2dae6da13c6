"""From text files to tokenised records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyarrow import parquet

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.label_counts import public_counts
from lorica.tasks.loading import load_task
from tests.tasks.conftest import WORDS, write_tokenizer

CONTENT = "text,other,label\na fine film,dull,1\nnot fine at all,and long,0\ngood,bad plot,1\n"
CLS, SEP = 2, 3


def ids(text: str) -> list[int]:
    return [4 + WORDS.index(word) for word in text.split()]


@pytest.fixture
def make_task(write_csv, text_base):
    def make(content=CONTENT, base=text_base, **keys):
        path = write_csv("data.csv", content)
        return load_task(TaskConfig(**{"type": "text-classification", "train": path, "test": path} | keys), base)

    return make


def rows(records) -> list[list[int]]:
    """The tokens of each record, without padding, by way of a batch."""
    batch = records.batch(np.arange(len(records)))
    pairs = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    return [tokens[mask.bool()].tolist() for tokens, mask in pairs]


def test_tokens_come_back_as_the_tokenizer_makes_them(make_task):
    task = make_task()
    texts = ["a fine film", "not fine at all", "good"]
    assert rows(task.train) == rows(task.test) == [[CLS, *ids(text), SEP] for text in texts]
    assert task.train.lengths.tolist() == [5, 6, 3]
    assert task.train.labels.tolist() == [1, 0, 1]
    assert task.train.labels.dtype == np.int64
    assert task.label_names == ["0", "1"]


def test_pairs_are_told_apart_by_token_types(make_task):
    train = make_task(text=["text", "other"]).train
    assert rows(train)[1] == [CLS, *ids("not fine at all"), SEP, *ids("and long"), SEP]
    batch = train.batch(np.array([2, 1]))
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 3 + [1] * 3 + [0] * 3, [0] * 6 + [1] * 3]


def test_records_are_cut_at_max_length(make_task):
    assert rows(make_task(max_length=4).train)[1] == [CLS, *ids("not fine"), SEP]
    pair = rows(make_task(text=["text", "other"], max_length=7).train)[1]
    assert pair == [CLS, *ids("not fine"), SEP, *ids("and long"), SEP]


def test_records_are_cut_at_what_the_model_takes(make_task, tmp_path):
    base = write_tokenizer(tmp_path / "short", model_max_length=4)
    assert make_task(base=base).train.lengths.tolist() == [4, 4, 3]


def test_tokens_are_stored_flat_without_padding(make_task):
    train = make_task().train
    assert train.tokens.dtype == np.int32
    assert train.tokens.shape == (5 + 6 + 3,)
    assert train.subset(np.array([0])).tokens is train.tokens


def test_a_tokenizer_without_padding_token_pads_with_its_end_of_text(make_task, tmp_path):
    base = write_tokenizer(tmp_path / "no-pad", pad_token=None, eos_token="[SEP]", model_input_names=["input_ids"])
    batch = make_task(base=base).train.batch(np.array([2, 0]))
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.inputs["input_ids"][0].tolist() == [CLS, *ids("good"), SEP, SEP, SEP]
    assert batch.inputs["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "other",
    [
        CONTENT.replace("fine film", "fine plot"),
        CONTENT.replace("good,bad plot,1", "good,bad plot,0"),
        CONTENT.replace("good,", "good ,"),
        CONTENT.replace("bad plot", "bad bad"),
        CONTENT + "a,b,1\n",
        "text,other,label\nnot fine at all,and long,0\na fine film,dull,1\ngood,bad plot,1\n",
    ],
    ids=["text", "label", "blank", "second text", "another record", "order"],
)
def test_fingerprint_changes_with_any_content(make_task, other):
    pair = ["text", "other"]
    assert make_task(other, text=pair).train.fingerprint() != make_task(text=pair).train.fingerprint()


def test_fingerprint_belongs_to_the_data_and_not_to_the_model(make_task, tmp_path):
    other = write_tokenizer(tmp_path / "other", frame=False)
    prints = {make_task(max_length=length, base=base).train.fingerprint() for length, base in [(4, other), (9, other)]}
    assert prints == {make_task().train.fingerprint()}


def test_change_beyond_max_length_changes_the_fingerprint(make_task):
    other = CONTENT.replace("not fine at all", "not fine at film")
    first, second = make_task(max_length=4).train, make_task(other, max_length=4).train
    assert rows(first) == rows(second)
    assert first.fingerprint() != second.fingerprint()


def test_record_without_tokens_is_named_by_its_index(make_task, tmp_path):
    base = write_tokenizer(tmp_path / "bare", frame=False)
    with pytest.raises(UserError, match=r"record 1 \(counted from 0\) has no tokens in column 'text'") as error:
        make_task('text,label\nsecret,1\n"",0\n', base)
    assert "secret" not in str(error.value)


def test_column_of_numbers_is_no_text(tmp_path, text_base):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": 7531, "label": 1}\n{"text": 2, "label": 0}\n')
    with pytest.raises(UserError, match="holds int64, not text") as error:
        load_task(TaskConfig(type="text-classification", train=str(path), test=str(path)), text_base)
    assert error.value.key == "task.text"
    assert "7531" not in str(error.value)


def test_label_that_only_the_test_data_has(write_csv, text_base):
    train, test = write_csv("train.csv", CONTENT), write_csv("test.csv", "text,label\nsecret,2\n")
    with pytest.raises(UserError, match="'2' is not a label of the task") as error:
        load_task(TaskConfig(type="text-classification", train=train, test=test), text_base)
    assert error.value.key == "task.test"
    assert "secret" not in str(error.value)


def test_folder_without_tokenizer_is_an_error(make_task, tmp_path):
    from transformers import BertConfig

    with pytest.raises(UserError, match="tokenizer") as error:
        make_task(base=str(tmp_path / "nowhere"))
    assert error.value.key == "model.base"
    BertConfig().save_pretrained(tmp_path / "weights-only")
    with pytest.raises(UserError, match="no vocabulary"):
        make_task(base=str(tmp_path / "weights-only"))


def test_batches_of_sst2_equal_the_tokenizers_own_padding(shared_data, minilm):
    from transformers import AutoTokenizer

    path = str(shared_data / "sst2_validation.parquet")
    config = TaskConfig(type="text-classification", train=path, test=path, text="sentence")
    records = load_task(config, minilm).train
    texts = parquet.read_table(path)["sentence"].to_pylist()
    assert len(records) == len(texts) == 872
    rows = np.arange(0, len(records), 7)
    tokenizer = AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    expected = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
    batch = records.batch(rows)
    assert set(batch.inputs) == set(expected)
    assert all(torch.equal(batch.inputs[name], expected[name]) for name in expected)


def test_a_run_says_its_labels_and_the_counts_of_its_test_sets(make_task, write_csv):
    content = "text,label\na,[b]\nb,x\nc,x\n"
    assert public_counts(make_task(content)) == ["Labels: [b], x", "Test set: 3 records: [b] 1, x 2"]
    numbers = make_task("text,label\na,-0.5\nb,2\n", type="text-regression")
    assert public_counts(numbers) == ["Test set: 2 records, numbers from -0.5 to 2"]
    many = "text,label\n" + "".join(f"a,{label}\n" for label in range(15)) + "a,odd \n"
    first, second = public_counts(make_task(many))
    assert first.endswith("and 4 more")
    assert second.startswith("Test set: 16 records: 0 1, 1 1, 10 1,")
