"""What a text model can take, against the model itself: it runs at the limit, and fails beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorica.config import TaskConfig
from lorica.errors import UserError
from lorica.tasks.limits import fit_tokenizer, most_tokens
from lorica.tasks.loading import load_task
from lorica.tasks.text import load_tokenizer
from tests.tasks.conftest import WORDS, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}
OTHER = {"vocab_size": 30, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
CONFIGS = {
    "bert": (transformers.BertConfig(**SIZES), 20),
    "roberta": (transformers.RobertaConfig(**SIZES), 18),
    "xlm-roberta": (transformers.XLMRobertaConfig(**SIZES | {"pad_token_id": 4}), 15),
    "mpnet": (transformers.MPNetConfig(**SIZES), 18),
    "electra": (transformers.ElectraConfig(**SIZES, embedding_size=8), 20),
    "gpt2": (transformers.GPT2Config(**OTHER, n_positions=20, n_embd=8, n_layer=1, n_head=2), 20),
    "opt": (
        transformers.OPTConfig(**SIZES | OTHER, ffn_dim=8, word_embed_proj_dim=8),
        20,
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_limit_is_where_the_model_fails(family: str) -> None:
    config, limit = CONFIGS[family]
    assert most_tokens(config) == limit
    model = transformers.AutoModel.from_config(config).eval()

    def run(tokens: int) -> None:
        with torch.inference_mode():
            model(input_ids=torch.full((1, tokens), 7), attention_mask=torch.ones(1, tokens, dtype=torch.long))

    run(limit)
    with pytest.raises((IndexError, RuntimeError)):
        run(limit + 1)


def test_models_without_absolute_positions_have_no_limit() -> None:
    deberta = transformers.DebertaV2Config(**SIZES, position_biased_input=False, relative_attention=True)
    assert most_tokens(deberta) is None
    assert most_tokens(transformers.BloomConfig()) is None
    assert most_tokens(transformers.XLNetConfig()) is None


def base(folder: Path, vocabulary: int = 30, tokenizer: Any = None, **sizes: Any) -> str:
    write_tokenizer(folder, **(tokenizer or {}))
    transformers.RobertaConfig(**SIZES | {"vocab_size": vocabulary} | sizes).save_pretrained(folder)
    return str(folder)


def records(folder: Path, name: str, **keys: Any) -> Any:
    path = folder / "data.csv"
    path.write_text("text,other,label\n" + f"{' '.join(WORDS * 4)},dull,a\ngood,bad,b\n")
    config = TaskConfig(**{"type": "text-classification", "train": str(path), "test": str(path)} | keys)
    return load_task(config, name).train


def test_records_are_cut_at_the_models_positions(tmp_path: Path) -> None:
    assert records(tmp_path, base(tmp_path / "m"), max_length=512).lengths.tolist() == [18, 3]


def test_token_types_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    one = records(tmp_path, base(tmp_path / "one", type_vocab_size=1), text=["text", "other"])
    two = records(tmp_path, base(tmp_path / "two", type_vocab_size=2), text=["text", "other"])
    assert one.token_types is None
    assert two.token_types.max() == 1


def test_a_model_that_takes_no_more_than_special_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.max_length.*2 of which are special"):
        records(tmp_path, base(tmp_path / "m", max_position_embeddings=4))


@pytest.mark.parametrize("rows", [len(WORDS) + 3, 5, 3])
def test_tokens_without_an_embedding_are_refused(tmp_path: Path, rows: int) -> None:
    with pytest.raises(UserError, match=r"model\.base.*that the model has no embedding for"):
        load_tokenizer(base(tmp_path / "m", rows))


def test_special_tokens_that_no_text_gets_are_read_as_text(tmp_path: Path) -> None:
    """As in Gemma 3's models for texts alone, whose tokenizer has one token more than they have embeddings."""
    rows = len(WORDS) + 4
    name = base(tmp_path / "m", rows, {"additional_special_tokens": ["<image>"]})
    whole = transformers.AutoTokenizer.from_pretrained(name)
    assert max(whole("good <image>")["input_ids"]) == rows
    fitted = load_tokenizer(name)
    assert max(fitted("good <image>")["input_ids"]) < rows
    assert fitted("good film") == whole("good film")
    unfitted = transformers.AutoTokenizer.from_pretrained(name)
    unfitted.pad_token = "<image>"
    with pytest.raises(UserError, match="no embedding"):
        fit_tokenizer(unfitted, transformers.RobertaConfig(**SIZES | {"vocab_size": rows}), name)


def test_answers_that_the_model_has_no_room_for_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\na fine film\ngood\n")
    config = TaskConfig(type="language-modelling", train=str(path), test=str(path), answer_tokens=18)
    with pytest.raises(UserError, match=r"task\.answer_tokens.*the model takes 18 tokens"):
        load_task(config, base(tmp_path / "m"))
