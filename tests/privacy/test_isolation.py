"""A model that mixes examples is refused before anything is released."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.errors import UserError
from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import TrainedTensor, per_example_gradients
from lorica.privacy.isolation import check_isolation
from lorica.tasks.records import Batch
from tests.models import FAMILIES, adapted, batch


class Mixing(nn.Module):
    """Subtracts the batch's mean: harmless to look at, and each example's gradient depends on all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return hidden - hidden.mean(0)


class MixingInTraining(Mixing):
    """Only then, as batch normalisation does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.linear(x)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).requires_grad_(False)
        self.normalisation = nn.BatchNorm1d(3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalisation(self.linear(x))


class MixingInLargeBatches(nn.Module):
    """A tenth of the batch's mean, from the fourth example on; behind a bf16 body, whose rounding is of that size."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]).to(torch.bfloat16).requires_grad_(False)
        self.linear = nn.Linear(4, 3).requires_grad_(False)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(self.body(x.to(self.body[0].weight.dtype)).float())
        return hidden + self.share * hidden.mean(0) if len(x) > 3 else hidden


class BySize(MixingInLargeBatches):
    """Each example's output depends on how many there are, and on none of them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(self.body(x.to(self.body[0].weight.dtype)).float())
        return hidden * (1 + self.share / len(x))


class Experts(nn.Module):
    """Each example goes to one of two experts, which take no more than half of the batch each; the rest is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.router = nn.Linear(4, 2).requires_grad_(False)
        self.experts = nn.ModuleList(nn.Linear(4, 3).requires_grad_(False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        outputs = hidden[:, :3]
        chosen = self.router(x).argmax(1)
        for number, expert in enumerate(self.experts):
            taken = torch.nonzero(chosen == number).flatten()[: len(x) // 2]
            outputs = outputs.index_add(0, taken, expert(hidden[taken]))
        return outputs


class AttentionAcrossTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.attention = nn.MultiheadAttention(4, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return (hidden + self.attention(hidden, hidden, hidden)[0])[:, :3]


class EarlierExamples(Mixing):
    """As with a sum along the wrong dimension: the last example moves no other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).cumsum(0)


class Plain(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def contrastive(module: nn.Module, some: Batch) -> Tensor:
    """InfoNCE: every other example is a negative one."""
    hidden = nn.functional.normalize(module(**some.inputs), dim=1)
    return nn.functional.cross_entropy(hidden @ hidden.T.detach(), torch.arange(len(some)), reduction="none")


class Table(nn.Module):
    """Adds a projection of five rows that belong to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).requires_grad_(False)
        self.rows = nn.Parameter(torch.randn(5, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rows).sum(0) * x.sum(1, keepdim=True)


def losses(module: nn.Module, some: Batch) -> Tensor:
    return some.by_example(nn.functional.cross_entropy(module(**some.inputs), some.labels, reduction="none"))


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_pass(family: str) -> None:
    model = adapted(family)
    check_isolation(model.peft_model, model.losses, model.tensors, batch(family, 3), 1e-3, "tiny")


def test_rows_of_one_example_may_hang_together() -> None:
    model, rows = adapted("bert"), batch("bert", 4)
    examples = Batch(rows.inputs, rows.labels, torch.tensor([0, 0, 0, 1]), torch.tensor([0.5, 0.2, 0.3, 1.0]))
    check_isolation(model.peft_model, model.losses, model.tensors, examples, 1e-3, "tiny")


@pytest.mark.parametrize("family", ["bert", "gpt2", "swin"])
def test_dropout_is_no_mixing(family: str) -> None:
    """Of every kind: of hidden states, of attention, of whole paths and before A."""
    model = adapted(family, lora_dropout=0.3)
    for module in model.peft_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.3
    examples = batch(family, 3)
    model.peft_model.train()
    first, second = (model.losses(model.peft_model, examples) for _ in range(2))
    assert not torch.equal(first, second)
    check_isolation(model.peft_model, model.losses, model.tensors, examples, 1e-3, "tiny")


@pytest.mark.parametrize("example_of_row", [None, [0, 0, 1]], ids=["rows", "examples of several rows"])
@pytest.mark.parametrize("kind", [Mixing, MixingInTraining, Normalised])
def test_a_model_that_mixes_examples_is_refused(kind: type[Any], example_of_row: list[int] | None) -> None:
    model = kind().eval()
    trained = {"w": TrainedTensor(model.linear, "weight")}
    some = Batch(
        {"x": torch.randn(3, 4)},
        torch.tensor([0, 1, 2]),
        None if example_of_row is None else torch.tensor(example_of_row),
    )
    with pytest.raises(UserError, match="depends on the other examples") as error:
        check_isolation(model, losses, trained, some, 1e-3, "tiny")
    assert error.value.key == "model.base"


@pytest.mark.parametrize("examples", [8, 32])
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (Mixing, losses),
        (MixingInTraining, losses),
        (Normalised, losses),
        (MixingInLargeBatches, losses),
        (BySize, losses),
        (Experts, losses),
        (AttentionAcrossTheBatch, losses),
        (EarlierExamples, losses),
        (Plain, contrastive),
    ],
)
def test_what_mixes_in_a_batch_as_in_training_is_refused(
    kind: type[Any], loss: Any, scale: float, examples: int
) -> None:
    """Also where all gradients are small."""
    torch.manual_seed(0)
    model = kind().eval()
    trained = {"w": TrainedTensor(model.linear, "weight")}
    some = Batch({"x": scale * torch.randn(examples, 4)}, torch.arange(examples) % 3)
    with pytest.raises(UserError, match="depends on the other examples"):
        check_isolation(model, loss, trained, some, 1e-3, "tiny")


@pytest.mark.parametrize("examples", [2, 8, 32])
def test_a_bf16_body_that_mixes_nothing_passes_and_stays_bf16(examples: int) -> None:
    torch.manual_seed(0)
    model = MixingInLargeBatches(share=0.0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    some = Batch({"x": torch.randn(examples, 4)}, torch.arange(examples) % 3)
    check_isolation(model, losses, {"w": TrainedTensor(model.linear, "weight")}, some, 1e-3, "tiny")
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_an_outlier_moves_a_refused_model_by_many_times_c() -> None:
    """What the check is for: clipping bounds each example, and one of them moves all."""
    torch.manual_seed(0)
    model = MixingInLargeBatches().eval()
    trained = {"w": TrainedTensor(model.linear, "weight")}
    some = Batch({"x": torch.rand(32, 4)}, torch.zeros(32, dtype=torch.int64))
    other = Batch({"x": torch.cat([1e7 * some.inputs["x"][:1], some.inputs["x"][1:]])}, some.labels)
    sums = [
        clipped_sum(per_example_gradients(lambda of=of: losses(model, of), trained, 32), 0.01)["w"]
        for of in (some, other)
    ]
    assert (sums[0] - sums[1]).norm() > 5 * 0.01
    with pytest.raises(UserError, match="depends on the other examples"):
        check_isolation(model, losses, trained, some, 1e-3, "tiny")


def test_a_module_that_sees_no_rows_of_examples_is_one_clear_error() -> None:
    model = Table()
    trained = {"w": TrainedTensor(model.linear, "weight")}
    with pytest.raises(UserError, match="saw 5 rows for 3 of the input") as error:
        check_isolation(model, losses, trained, Batch({"x": torch.randn(3, 4)}, torch.tensor([0, 1, 2])), 1e-3, "tiny")
    assert (error.value.key, error.value.value) == ("model.base", "w")


def test_a_model_that_fails_on_the_data_is_named() -> None:
    model = MixingInLargeBatches(share=0.0)
    trained = {"w": TrainedTensor(model.linear, "weight")}
    wide = Batch({"x": torch.randn(5, 7)}, torch.arange(5) % 3)
    with pytest.raises(UserError, match="fails on public examples") as error:
        check_isolation(model, losses, trained, wide, 1e-3, "my-encoder")
    assert (error.value.key, error.value.value) == ("model.base", "my-encoder")


@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_numbers_are_left_as_they_were(training: bool) -> None:
    model = adapted("bert", lora_dropout=0.3)
    model.peft_model.train(training)
    state = torch.random.get_rng_state()
    check_isolation(model.peft_model, model.losses, model.tensors, batch("bert", 3), 1e-3, "tiny")
    assert {module.training for module in model.peft_model.modules()} == {training}
    assert torch.equal(torch.random.get_rng_state(), state)
