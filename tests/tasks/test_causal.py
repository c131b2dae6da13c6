"""From prompts, conversations and texts to tokenised records with the tokens that are learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from lorica.errors import UserError
from lorica.tasks.causal.records import IGNORED
from lorica.tasks.causal.tokenising import tokenise_causal
from tests.causal import ASSISTANT, BEGIN, CHAT, END, MARKED, PAD, PAIRS, RESTLESS, USER, pairs, source, tokenizer

TALK = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "a fine film"},
    {"role": "user", "content": " no secret "},
    {"role": "assistant", "content": " it is \n"},
]


def learned(records, index: int) -> str:
    """The text of the tokens that the loss counts."""
    labels = records.batch(np.array([index])).labels[0]
    return tokenizer().decode(labels[labels != IGNORED])


def whole(records, index: int) -> str:
    batch = records.batch(np.array([index]))
    return tokenizer().decode(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()])


def talks(conversations, template: str | None = CHAT, max_length: int = 64, **options):
    words = tokenizer(chat_template=template, **options)
    return tokenise_causal(source({"messages": conversations}), ["messages"], words, max_length)


def test_completion_and_end_of_text_are_learned_and_the_prompt_is_not():
    records = pairs()
    for index, (prompt, completion) in enumerate(zip(PAIRS["prompt"], PAIRS["completion"], strict=True)):
        assert whole(records, index) == prompt + completion + END
        assert learned(records, index) == completion + END
    assert records.labels.tolist() == [0] * 4


def test_prompt_is_tokenised_as_it_is_when_an_answer_is_asked_for():
    """Together, the blank would belong to the completion's first token."""
    records = pairs({"prompt": ["it is "], "completion": ["fine"]})
    prompt, answer = records.question(0)
    words = tokenizer()
    assert prompt.tolist() == words("it is ")["input_ids"]
    assert answer.tolist() == [*words("fine")["input_ids"], words.eos_token_id]
    assert [*prompt, *answer[:-1]] != words("it is fine")["input_ids"]


def test_beginning_of_text_where_the_tokenizer_puts_one():
    records = pairs(bos_token=BEGIN)
    assert whole(records, 1) == f"{BEGIN}what is it{END}"
    assert learned(records, 1) == f" is it{END}"
    alone = tokenise_causal(source({"text": ["what is it"]}), ["text"], tokenizer(bos_token=BEGIN), 64)
    assert (whole(alone, 0), learned(alone, 0)) == (f"{BEGIN}what is it{END}", f"what is it{END}")


def test_end_of_text_is_neither_doubled_nor_made_up():
    assert whole(pairs({"prompt": ["what"], "completion": [f" is{END}"]}), 0) == f"what is{END}"
    assert whole(pairs({"prompt": ["what"], "completion": [" is"]}, eos_token=None), 0) == "what is"


def test_texts_are_learned_but_for_the_token_that_nothing_predicts():
    words = tokenizer()
    records = tokenise_causal(source({"text": ["what is it", "a"]}), ["text"], words, 64)
    for index, text in enumerate(["what is it", "a"]):
        ids = [*words(text)["input_ids"], words.eos_token_id]
        assert records.batch(np.array([index])).inputs["input_ids"][0].tolist() == ids
        assert records.batch(np.array([index])).labels[0].tolist() == [IGNORED, *ids[1:]]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "markers"])
def test_assistant_turns_are_learned(template):
    """Also turns that begin and end with a blank."""
    records = talks([TALK, TALK[:2]], template)
    text = f"{USER}what is it{ASSISTANT}a fine film{END}\n{USER} no secret {ASSISTANT} it is \n{END}\n"
    assert whole(records, 0) == text
    assert learned(records, 0) == f"a fine film{END}\n it is \n{END}\n"
    assert learned(records, 1) == f"a fine film{END}\n"
    words = tokenizer()
    assert records.question(0)[1].tolist() == words(f" it is \n{END}\n")["input_ids"]
    assert records.batch(np.array([0])).inputs["input_ids"][0].tolist() == words(text)["input_ids"]


def test_turns_between_markers_that_begin_or_end_with_a_blank():
    """The characters between the markers count: transformers' own mask is empty here."""
    template = MARKED.replace("m.content + '<|end|>\n'", "' ' + m.content.strip() + ' '")
    records = talks([TALK], template)
    rendered, _ = render_jinja_template([TALK], chat_template=template)
    assert whole(records, 0) == rendered[0]
    assert learned(records, 0) == " a fine film  it is "


def test_token_across_the_beginning_of_a_turn_counts_and_one_across_its_end_does_not():
    template = "{% for m in messages %}{{ 'at a' }}{% generation %}{{ m.content }}{% endgeneration %}ll{% endfor %}"
    words = tokenizer(chat_template=template)
    records = talks([[{"role": "assistant", "content": "ll is a"}]], template)
    assert words.tokenize("at all is all") == ["at", "Ġall", "Ġis", "Ġall"]
    assert learned(records, 0) == " all is"


def test_template_that_writes_a_turn_otherwise_when_more_follow_is_refused():
    assert learned(talks([TALK[:2]], RESTLESS), 0) == f"a fine film{END}"
    with pytest.raises(UserError, match=r"record 1 \(counted from 0\).*generation %\}") as error:
        talks([TALK[:2], TALK], RESTLESS)
    assert error.value.key == "task.train"
    assert "secret" not in str(error.value)


def test_template_that_refuses_a_conversation_says_which_and_not_what():
    template = "{% for m in messages %}{{ raise_exception('not ' + m.content) }}{% endfor %}"
    for marked in (template, template + "{% generation %}{% endgeneration %}"):
        with pytest.raises(UserError, match=r"record 0 \(counted from 0; TemplateError\)") as error:
            talks([TALK], marked)
        assert "film" not in str(error.value)
    with pytest.raises(UserError, match="record 0"):
        talks([TALK[1:]])
    with pytest.raises(UserError, match="record 1"):
        talks([TALK, []])


def test_tokenizer_without_template_cannot_write_conversations_out():
    with pytest.raises(UserError, match=r"no .*chat template") as error:
        talks([TALK], None)
    assert error.value.key == "model.base"


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "user", "text": "secret"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 7531}],
        [None],
        ["secret"],
        {"role": "user", "content": "secret"},
    ],
    ids=["no content", "null", "number", "no message", "text", "one message"],
)
def test_what_is_no_conversation_is_named_by_its_index(conversation):
    with pytest.raises(UserError, match=r"record 0 \(counted from 0\)") as error:
        talks([conversation])
    assert error.value.key == "task.text"
    assert "secret" not in str(error.value)
    assert "7531" not in str(error.value)


def test_column_of_numbers_is_no_text():
    with pytest.raises(UserError, match="holds int64, not text"):
        tokenise_causal(source({"text": [7531]}), ["text"], tokenizer(), 64)


def test_records_lose_their_end():
    question = {"prompt": ["what", "Question:"], "completion": [" is", " the answer is it is a fine film"]}
    ids = tokenizer()("Question: the answer is it is a fine film")["input_ids"]
    uncut = pairs(question)
    prompt = len(uncut.question(1)[0])
    for records in (pairs(question, prompt + 2), pairs(question, model_max_length=prompt + 2)):
        assert records.lengths.tolist() == [uncut.lengths[0], prompt + 2]
        batch = records.batch(np.array([1]))
        assert batch.inputs["input_ids"][0].tolist() == ids[: prompt + 2]
        assert batch.labels[0].tolist() == [IGNORED] * prompt + ids[prompt : prompt + 2]


def test_record_with_nothing_to_learn_is_named_by_its_index():
    with pytest.raises(UserError, match=r"record 2 \(counted from 0\) has nothing to learn in its first 3 ") as error:
        pairs({"prompt": ["a", "what", "no secret at all"], "completion": ["b", "is", "secret"]}, max_length=3)
    assert error.value.key == "task.train"
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="record 0"):
        talks([TALK[:1]])
    with pytest.raises(UserError, match="record 0"):
        pairs({"prompt": [""], "completion": [""]})


def test_batches_pad_on_the_right():
    records = pairs()
    batch = records.batch(np.array([1, 0]))
    words = tokenizer()
    short = [*words("what")["input_ids"], *words(" is it")["input_ids"], words.eos_token_id]
    missing = int(records.lengths[0]) - len(short)
    assert batch.inputs["input_ids"][0].tolist() == short + [words.convert_tokens_to_ids(PAD)] * missing
    assert batch.inputs["attention_mask"][0].tolist() == [1] * len(short) + [0] * missing
    prompt = len(words("what")["input_ids"])
    assert batch.labels[0].tolist() == [IGNORED] * prompt + short[prompt:] + [IGNORED] * missing
    assert batch.labels.dtype == batch.inputs["input_ids"].dtype == torch.int64
    assert len(batch) == 2


def test_tokens_are_stored_flat_and_shared_with_subsets():
    records = pairs()
    assert (records.tokens.dtype, records.learned.dtype) == (np.int32, np.bool_)
    assert len(records.tokens) == records.lengths.sum()
    part = records.subset(np.array([3, 1]))
    assert part.tokens is records.tokens
    assert part.learned is records.learned
    assert [learned(part, index) for index in range(2)] == [learned(records, index) for index in (3, 1)]
    assert part.fingerprint() != records.fingerprint()


def test_fingerprint_belongs_to_the_data_and_not_to_the_tokenizer():
    assert pairs(max_length=20).fingerprint() == pairs(bos_token=BEGIN).fingerprint()
    moved = {"prompt": ["what is"], "completion": [" it"]}
    assert pairs(moved).fingerprint() != pairs({"prompt": ["what"], "completion": [" is it"]}).fingerprint()
    other = [*TALK[:3], {"role": "assistant", "content": "it is"}]
    assert len({talks([TALK]).fingerprint(), talks([TALK], MARKED).fingerprint(), talks([other]).fingerprint()}) == 2
