"""The loss, its per-example gradients and the evaluation of causal models, on tiny random ones of several families."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lorica.errors import UserError
from lorica.privacy.gradients import per_example_gradients
from lorica.privacy.isolation import check_isolation
from lorica.privacy.mechanism import Terms, add_noise, noisy_gradient, poisson_sample
from lorica.privacy.randomness import ReproducibleRandomness
from lorica.tasks.causal.answers import _last_number, exact_match
from lorica.tasks.causal.objective import evaluate, losses
from lorica.tasks.causal.records import IGNORED
from lorica.tasks.records import Batch
from tests.causal import ASSISTANT, CHAT, END, FAMILIES, PAIRS, USER, adapted, pairs, tokenizer
from tests.tasks.test_causal import TALK, talks
from tests.tiers import integration

EVERYTHING = np.arange(len(PAIRS["prompt"]))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return losses(model(**batch.inputs), batch)


def by_hand(model, batch: Batch) -> list[list[float]]:
    """Of each record by itself, without padding, the cross entropy of each learned token, one after another."""
    found = []
    for row in range(len(batch)):
        size = int(batch.inputs["attention_mask"][row].sum())
        ids = batch.inputs["input_ids"][row, :size]
        with torch.inference_mode():
            chances = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        learned = [place for place in range(1, size) if batch.labels[row, place] != IGNORED]
        found.append([-chances[place - 1, ids[place]].item() for place in learned])
    return found


def one_at_a_time(model, records) -> dict[str, torch.Tensor]:
    """Gradient of each record by plain autograd on it alone, with every learned token's term written out."""
    parameters = {name: getattr(module, kind).requires_grad_() for name, (module, kind, _) in model.tensors.items()}
    rows = []
    for index in range(len(records)):
        one = records.batch(np.array([index]))
        logits = model.peft_model(**one.inputs).logits[0]
        ids = one.inputs["input_ids"][0]
        learned = [place for place in range(1, len(ids)) if one.labels[0, place] != IGNORED]
        loss = sum(-logits[place - 1].log_softmax(-1)[ids[place]] for place in learned) / len(learned)
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_mean_over_learned_tokens_and_padding_does_not_count(tmp_path, family):
    model = adapted(tmp_path, family).peft_model
    batch = pairs().batch(EVERYTHING)
    expected = torch.tensor([sum(values) / len(values) for values in by_hand(model, batch)])
    with torch.inference_mode():
        torch.testing.assert_close(loss_of(model, batch), expected)
        other = Batch(batch.inputs | {"input_ids": batch.inputs["input_ids"].clone()}, batch.labels)
        other.inputs["input_ids"][batch.inputs["attention_mask"] == 0] = 7
        torch.testing.assert_close(loss_of(model, other), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_per_example_gradients_equal_those_of_one_record_at_a_time(tmp_path, family):
    model, records = adapted(tmp_path, family), pairs()
    batch = records.batch(EVERYTHING)
    found = per_example_gradients(lambda: loss_of(model.peft_model, batch), model.tensors, len(batch))
    expected = one_at_a_time(model, records)
    assert set(found) == set(expected) == set(model.tensors)
    assert all(value.abs().max() > 1e-4 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    check_isolation(model.peft_model, loss_of, model.tensors, batch, 1e-3, "tiny")


def test_logits_that_predict_the_prompt_or_padding_get_no_gradient():
    batch = talks([TALK, TALK[:2]]).batch(np.array([0, 1]))
    logits = torch.randn(*batch.labels.shape, 300, requires_grad=True)
    losses(SimpleNamespace(logits=logits), batch).sum().backward()
    reached = logits.grad.abs().sum(-1) > 0
    assert torch.equal(reached[:, :-1], batch.labels[:, 1:] != IGNORED)
    assert not reached[:, -1].any()
    # Every record has the same say, however much it says: the gradient of a learned token is (p - 1)/|T| at most.
    counts = (batch.labels != IGNORED).sum(1)
    assert counts[0] > counts[1]
    assert (logits.grad.abs().sum((1, 2)) <= 2).all()


def test_losses_are_fp32_for_half_precision_logits():
    batch = pairs().batch(EVERYTHING)
    half = torch.randn(*batch.labels.shape, 300).bfloat16()
    found = losses(SimpleNamespace(logits=half), batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses(SimpleNamespace(logits=half.float()), batch), rtol=0, atol=0)


def test_logits_of_the_prompt_are_not_made_fp32(monkeypatch):
    batch = pairs().batch(EVERYTHING)
    learned = int((batch.labels != IGNORED).sum())
    sizes = []
    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda value: sizes.append(len(value)) or plain(value))
    losses(SimpleNamespace(logits=torch.randn(*batch.labels.shape, 300).bfloat16()), batch)
    assert sizes == [learned]


@pytest.mark.parametrize("tokens", [1, 30, 1000])
def test_perplexity_is_over_all_learned_tokens_whatever_the_micro_batches(tmp_path, tokens):
    model, records = adapted(tmp_path, "llama").peft_model, pairs()
    values = [value for row in by_hand(model, records.batch(EVERYTHING)) for value in row]
    model.train()
    found = evaluate(model, records, tokens, "cpu")
    assert found["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)
    assert all(module.training for module in model.modules())


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    class Uniform(nn.Module):
        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 300))

    assert evaluate(Uniform(), pairs(), 100, "cpu")["perplexity"] == pytest.approx(300)


def greedy(model, prompt: str, count: int = 5) -> str:
    """What transformers' own decoding says to one prompt, without padding."""
    words = tokenizer()
    ids = words(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    said = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return words.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("tokens", [1, 40, *integration(1000)])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_those_to_single_prompts(tmp_path, family, tokens):
    model = adapted(tmp_path, family).peft_model
    prompts = PAIRS["prompt"]
    said = [greedy(model, prompt) for prompt in prompts]
    assert len(set(said)) > 1
    model.train()
    # Blanks around an answer do not count.
    references = [f"  {said[0]} ", said[1] + "!", said[2], said[3] + "?"]
    records = pairs({"prompt": prompts, "completion": references})
    assert exact_match(model, records, tokenizer(), 5, tokens, "cpu") == 0.5
    assert all(module.training for module in model.modules())


def test_decoding_is_greedy_whatever_the_models_own_settings(tmp_path):
    model = adapted(tmp_path, "llama").peft_model
    records = pairs({"prompt": ["what"], "completion": [greedy(model, "what", 12)]})
    own = model.get_base_model().generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.no_repeat_ngram_size = True, 9.0, 3.0, 1
    assert exact_match(model, records, tokenizer(), 12, 1000, "cpu") == 1


class Parrot(nn.Module):
    """Says the same to everything; notes what it was asked."""

    def __init__(self, answer: str, own_end: int | list[int] | None = None):
        super().__init__()
        self.answer = tokenizer()(answer)["input_ids"]
        self.generation_config = SimpleNamespace(eos_token_id=own_end)
        self.asked = []

    def generate(self, input_ids, attention_mask, generation_config, use_cache):
        self.asked += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        self.stops = generation_config.eos_token_id
        return torch.cat([input_ids, torch.tensor([self.answer] * len(input_ids))], 1)


def test_the_last_turn_is_asked_for_and_ends_where_the_template_ends_it():
    words = tokenizer(chat_template=CHAT, eos_token="<|begin|>", additional_special_tokens=[USER, ASSISTANT, END])
    records = talks([TALK, TALK[:2]], CHAT)
    model = Parrot(f" it is {END}", own_end=[77])
    assert exact_match(model, records, words, 5, 1000, "cpu") == 0.5
    first = f"{USER}what is it{ASSISTANT}"
    whole = f"{first}a fine film{END}\n{USER} no secret {ASSISTANT}"
    assert [words.decode(row) for row in model.asked] == [first, whole]
    assert model.stops == sorted([words.eos_token_id, 77, words.convert_tokens_to_ids(END)])


def test_gsm8k_compares_the_reference_with_the_last_number():
    records = pairs({"prompt": ["what", "it"], "completion": ["6 * 7 = 42\n#### 1,042", "#### 42"]})
    for said, share in [("7 and 1042.", 0.5), ("#### 1,042.0", 0.5), ("is 42", 0.5), ("42 is not 43", 0), ("no", 0)]:
        assert exact_match(Parrot(said), records, tokenizer(), 5, 1000, "cpu", "gsm8k") == share


def test_gsm8k_reference_without_a_number_is_named_by_its_index():
    records = pairs({"prompt": ["what", "it"], "completion": ["#### 42", "secret 7531"]})
    with pytest.raises(UserError, match=r"record 1 \(counted from 0\)") as error:
        exact_match(Parrot("42"), records, tokenizer(), 5, 1000, "cpu", "gsm8k")
    assert "secret" not in str(error.value)
    assert "7531" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("$1,234.50", 1234.5), ("x -3", -3), ("5-3", 3), ("= -3.", -3), ("-0.5", -0.5), ("3,", 3), ("none", None)],
)
def test_last_number(text, number):
    assert _last_number(text) == number


@pytest.mark.parametrize("family", ["gpt2, tied", "llama"])
def test_private_step_is_the_clipped_sum_plus_noise_over_the_expected_batch(tmp_path, family):
    """Against the formula written out with the same random draws, over gradients of one record at a time."""
    model = adapted(tmp_path, family)
    records = pairs({name: column * 5 for name, column in PAIRS.items()})
    terms = Terms(sampling_rate=0.5, batch_size=10, clip_norm=0.3, noise_multiplier=0.8)
    found = noisy_gradient(
        model.peft_model, loss_of, model.tensors, records, terms, ReproducibleRandomness(0, 1, 1, 0), 60
    )
    randomness = ReproducibleRandomness(0, 1, 1, 0)
    chosen = poisson_sample(len(records), terms.sampling_rate, randomness)
    gradients = one_at_a_time(model, records.subset(chosen))
    norms = torch.stack([value.flatten(1).norm(dim=1) for value in gradients.values()]).norm(dim=0)
    assert (norms > terms.clip_norm).any()
    scales = (terms.clip_norm / norms).clamp(max=1)
    draws = randomness.normal([value[0].numel() for value in gradients.values()])
    for (name, value), own in zip(gradients.items(), draws, strict=True):
        total = torch.tensordot(scales, value, dims=1)
        expected = add_noise(total, terms.noise_multiplier * terms.clip_norm, own) / terms.batch_size
        torch.testing.assert_close(found[name].tensor, expected, rtol=1e-4, atol=1e-5)
