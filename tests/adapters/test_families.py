"""Every family of base models, from a checkpoint in a folder through a round of AS-LoRA under DP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base
from lorica.adapters.shared_rows import separate_examples
from lorica.adapters.state import AdapterState
from lorica.config import LoraSection, MethodConfig, ModelConfig, OptimizerConfig, PrivacyConfig
from lorica.engines.local import LocalEngine
from lorica.errors import UserError
from lorica.local.optimizers import learning_rates
from lorica.methods.base import make_method
from lorica.methods.server import Server
from lorica.owner.client import Client
from lorica.privacy.gradients import per_example_gradients
from lorica.privacy.isolation import check_isolation
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import plan_client
from lorica.server.federation import Federation
from lorica.testing.federation import UNCLIPPED
from lorica.testing.models import LABELS
from lorica.testing.records import TinyRecords
from tests.models import FAMILIES, IMAGES, VISION, batch, one_at_a_time

NAMES = ["bad", "fair", "good"]
RECORDS, STEPS = 6, 2


def loaded(folder: Path, family: str, **settings: Any) -> AdaptedModel:
    """With factors that are all non-zero, so that both have a gradient."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    config = ModelConfig(base=str(folder), **settings)
    task = "image-classification" if family in IMAGES else "text-classification"
    model = adapt(load_base(config, task, NAMES, 0), LoraSection(r=2), config, 0, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    model.write({name: 0.3 * torch.randn(value.shape, generator=draws) for name, value in model.read().items()})
    return model


def federation(model: AdaptedModel, family: str, folder: Path, privacy: Any, clients: int, steps: int) -> Federation:
    state = AdapterState(model.sites, model.read())
    # A gauge would change the factors that rest, too.
    method = make_method(MethodConfig(name="as-lora", gauge="none"), model.sites)
    method.start(state, 0)
    plans = {number: plan_client(number, RECORDS, RECORDS, steps, privacy) for number in range(clients)}
    ledger = Ledger(folder / "ledger.sqlite")
    # Micro-batches of about two texts, or of all images.
    members = {
        number: Client(
            number, TinyRecords.of(batch(family, RECORDS, number), number), plans[number], ledger, "data", 0, 24
        )
        for number in range(clients)
    }
    optimizer = OptimizerConfig(lr=0.5)
    rates = learning_rates(optimizer, list(state.tensors))
    server = Server(
        model=state,
        rounds=1,
        terms={number: plan.terms for number, plan in plans.items()},
        optimizer=optimizer,
        local_steps=steps,
        full_rates=rates,
        seed=0,
    )
    return Federation(
        "run", method, server, LocalEngine(model, state, members), plans, [list(range(clients))], "uniform"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_private_round(tmp_path: Path, family: str) -> None:
    privacy = PrivacyConfig(epsilon=None, noise_multiplier=1.0, delta=1e-3, clip_norm=1.0, noise="reproducible")
    model = loaded(tmp_path / "base", family)
    some = federation(model, family, tmp_path, privacy, 2, STEPS)
    before = dict(some.server.model.tensors)
    some.round()
    after = some.server.model.tensors
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert all(torch.isfinite(value).all() for value in after.values())
    assert {name for name in after if name.startswith("head.")} <= moved
    for site in model.sites:
        assert len({site.a, site.b} & moved) == 1, site.name
    for number, plan in some.plans.items():
        assert Ledger(tmp_path / "ledger.sqlite").steps("run", number) == STEPS == plan.max_steps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_noise_is_gradient_descent(tmp_path: Path, family: str) -> None:
    """In training mode and in micro-batches of several lengths: `-η` times the mean of one-at-a-time gradients."""
    model = loaded(tmp_path / "base", family)
    some = federation(model, family, tmp_path, UNCLIPPED, 1, 1)
    before = dict(some.server.model.tensors)
    model.write(before)
    gradients = one_at_a_time(model, batch(family, RECORDS))
    some.round()
    for name, value in some.server.model.tensors.items():
        if not torch.equal(value, before[name]):
            assert gradients[name].abs().max() > 0
            torch.testing.assert_close(value - before[name], -0.5 * gradients[name].mean(0), rtol=1e-3, atol=1e-6)


def test_a_clip_without_noise_cuts_each_gradient_of_one_record(tmp_path: Path) -> None:
    """`-η` times the mean of one-at-a-time gradients, each cut to norm C over all tensors that the step trains."""
    model = loaded(tmp_path / "base", "bert")
    one = federation(model, "bert", tmp_path / "a", UNCLIPPED, 1, 1)
    before = dict(one.server.model.tensors)
    one.round()
    moved = [name for name, value in one.server.model.tensors.items() if not torch.equal(value, before[name])]
    model.write(before)
    gradients = one_at_a_time(model, batch("bert", RECORDS))
    norms = torch.stack([gradients[name].double().flatten(1).square().sum(1) for name in moved]).sum(0).sqrt()
    clip_norm = float(norms.sort().values[RECORDS // 2])
    factors = (clip_norm / norms).clamp(max=1)
    assert 1 < (factors < 0.999).sum() < RECORDS
    some = federation(model, "bert", tmp_path / "b", PrivacyConfig(noise="none", clip_norm=clip_norm), 1, 1)
    some.round()
    for name in moved:
        mean = torch.tensordot(factors, gradients[name].double(), 1) / RECORDS
        change = some.server.model.tensors[name] - before[name]
        torch.testing.assert_close(change.double(), -0.5 * mean, rtol=1e-3, atol=1e-6)


def test_projecting_copied_positions_is_copying_projected_ones() -> None:
    torch.manual_seed(0)
    model, examples = FAMILIES["deberta-v3"]().eval(), batch("deberta-v3", 5)
    positions = [module for module in model.modules() if hasattr(module, "query_proj")]
    seen: list[Tensor] = []
    for module in positions:
        # Larger than they are drawn, so that the positions count.
        torch.nn.init.normal_(module.query_proj.weight)
        torch.nn.init.normal_(module.key_proj.weight)
        module.query_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(**examples.inputs).logits
    assert {len(value) for value in seen} == {1, 5}
    seen.clear()
    separate_examples(model)
    # A copy of the model has to use its own maps.
    original, model = model, copy.deepcopy(model)
    for parameter in original.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(model(**examples.inputs).logits, logits)
    assert logits.shape == (5, LABELS)
    assert {len(value) for value in seen} == {5}
    seen.clear()
    with torch.inference_mode():
        torch.testing.assert_close(model(**examples.inputs).logits, logits)
    assert {len(value) for value in seen} == {1, 5}


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(("task", "names"), [("text-classification", NAMES), ("text-regression", ["score"])])
def test_padding_is_told_by_the_mask_whatever_id_the_tokenizer_pads_with(
    tmp_path: Path, family: str, task: str, names: list[str]
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.config.pad_token_id = None
    model.config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path)
    base = load_base(ModelConfig(base=str(tmp_path), head="freeze"), task, names, 0)
    examples = batch(family, 4).inputs
    padded = examples["attention_mask"] == 0
    assert padded.any()
    for padding in (0, 1, 5):
        ids = examples["input_ids"].masked_fill(padded, padding)
        logits = base.model(input_ids=ids, attention_mask=examples["attention_mask"]).logits
        for index in range(4):
            length = int(examples["attention_mask"][index].sum())
            alone = {name: value[index : index + 1, :length] for name, value in examples.items()}
            torch.testing.assert_close(base.model(**alone).logits[0], logits[index], rtol=1e-4, atol=1e-6)


def test_a_model_with_two_heads_is_refused(tmp_path: Path) -> None:
    transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no linear map named classifier or score"):
        load_base(ModelConfig(base=str(tmp_path)), "image-classification", NAMES, 0)


def test_a_family_that_cannot_recompute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing = True: AlbertFor"):
        loaded(tmp_path, "albert", gradient_checkpointing=True)


def test_recomputing_under_mean_pooling(tmp_path: Path) -> None:
    """The encoder is inside another module there."""
    FAMILIES["bert"]().base_model.save_pretrained(tmp_path)
    config = ModelConfig(base=str(tmp_path), pooling="mean", gradient_checkpointing=True)
    base = load_base(config, "text-classification", NAMES, 0)
    model = adapt(base, LoraSection(r=2), config, 0, torch.device("cpu"))
    assert model.peft_model.base_model.model.encoder.is_gradient_checkpointing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_base_has_the_gradients_of_one_example_at_a_time(tmp_path: Path, family: str) -> None:
    check_low_precision(loaded(tmp_path, family, precision="bf16"), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_base_is_checked_for_mixing_in_fp32(tmp_path: Path, family: str) -> None:
    """Its inputs, such as pixels, are then fp32 too: not every family converts them itself."""
    model = loaded(tmp_path, family, precision="bf16")
    check_isolation(model.peft_model, model.losses, model.tensors, batch(family, 4), 1e-3, "tiny")


def test_quantised_bases_need_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for precision in ("int8", "nf4"):
        with pytest.raises(
            UserError, match=rf"model\.precision = '{precision}': needs bitsandbytes.*lorica\[quantised\]"
        ):
            loaded(tmp_path, "bert", precision=precision)


@pytest.mark.parametrize("family", ["bert", "deberta-v3", "modernbert", "distilbert", "swin", "gpt2", "llama"])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_base_has_the_gradients_of_one_example_at_a_time(
    tmp_path: Path, family: str, precision: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    model = loaded(tmp_path, family, precision=precision)
    check_low_precision(model, family)
    site = model.sites[0]
    frozen = model.peft_model.base_model.model.get_submodule(site.name).get_base_layer()
    assert frozen.weight.dtype == {"int8": torch.int8, "nf4": torch.uint8}[precision]
    if precision == "int8":
        # Otherwise one example's large activations would change how the others are computed.
        assert frozen.state.threshold == 0.0
    with pytest.raises(UserError, match=r"model\.precision.*changes the frozen weights"):
        model.merge({site.name: (torch.ones(site.d_out, 1), torch.ones(1, site.d_in))})
    with pytest.raises(UserError, match=r"model\.precision"), model.perturbed(0.1, torch.Generator()):
        pass


def check_low_precision(model: AdaptedModel, family: str) -> None:
    examples = batch(family, 4)
    assert {value.dtype for value in model.read().values()} == {torch.float32}
    found = per_example_gradients(lambda: model.losses(model.peft_model, examples), model.tensors, 4)
    for name, gradient in one_at_a_time(model, examples).items():
        assert found[name].dtype == torch.float32
        assert gradient.any()
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name
