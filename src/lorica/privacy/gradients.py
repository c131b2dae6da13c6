"""Per-example gradients of linear maps, in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class RowsError(RuntimeError):
    """A trained module saw a number of rows that cannot be split by example.

    Attributes:
        name: name of a trained tensor of that module.
    """

    def __init__(self, name: str, seen: int, rows: int) -> None:
        self.name = name
        super().__init__(
            f"the module of {name} saw {seen} rows for {rows} of the input; per-example gradients need the examples "
            "along the first dimension"
        )


class TrainedTensor(NamedTuple):
    """The trained part of a linear map (`nn.Linear`, weight `(d_out, d_in)`): its weight, its bias, or a part of one.

    Attributes:
        view: a public linear map `(n, *parameter shape) -> (n, *trained shape)`, such as a slice of the ranks or a
            projection. It is applied to each example's gradient before clipping. None trains the whole parameter.
    """

    module: nn.Linear
    kind: Literal["weight", "bias"]
    view: Callable[[Tensor], Tensor] | None = None

    def zeros(self, examples: int) -> Tensor:
        """`(examples, *trained shape)`, fp32."""
        parameter = getattr(self.module, self.kind)
        empty = torch.zeros((examples, *parameter.shape), device=parameter.device)
        return empty if self.view is None else self.view(empty)


def per_example_gradients(
    losses: Callable[[], Tensor],
    trained: Mapping[str, TrainedTensor],
    examples: int,
    example_of_row: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradient of each example's loss with respect to each trained tensor.

    For `y = x Wᵀ + b` with input `x (n, t, d_in)` and output gradient `g (n, t, d_out)`, example `i` has
    `∂L_i/∂W = g_iᵀ x_i` and `∂L_i/∂b = Σ_t g_it`. Goodfellow, arXiv 1510.01799, section 4. An example of several rows
    (the windows of a long text, the records of one person) has the sum of its rows' gradients: it is clipped once.

    Hooks exist for one call only, so changing the trained tensors between calls cannot leave a stale hook behind. The
    parameters do not require gradients, so autograd never forms the batch gradient.

    Args:
        losses: runs the forward pass; returns one loss per example, shape `(n,)`. Examples must not mix (no batch
            normalisation). Inside the model, what one row of the input becomes (tokens, windows of an image) must stay
            adjacent along the first dimension.
        trained: name -> tensor to differentiate.
        examples: `n`.
        example_of_row: (rows,) int64 in 0 … n-1, the example that each row of the model's input belongs to. None:
            one row an example, in order.

    Returns:
        name -> `(n, *shape)`, fp32, zero for a tensor that the loss does not reach. A module that is used several times
        in the pass sums its contributions. Non-finite values are returned as they are; clipping handles them.

    Raises:
        RowsError: the number of rows in a trained module is not a multiple of the input's.
        RuntimeError: the shape of the losses is not `(n,)`.
    """
    rows = examples if example_of_row is None else len(example_of_row)
    gradients: dict[str, Tensor] = {}
    wanted: dict[nn.Linear, dict[str, str]] = {}
    for name, (module, kind, _) in trained.items():
        wanted.setdefault(module, {})[kind] = name

    def forward_hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        names = wanted[module]
        x = _by_row(inputs[0].detach(), rows, names["weight"]) if "weight" in names else None

        def backward_hook(output_gradient: Tensor) -> None:
            g = _by_row(output_gradient, rows, next(iter(names.values())))
            if x is not None:
                weights = torch.bmm(g.transpose(1, 2).float(), x.float())
                _accumulate(gradients, names["weight"], _by_example(weights, examples, example_of_row))
            if "bias" in names:
                _accumulate(gradients, names["bias"], _by_example(g.float().sum(1), examples, example_of_row))

        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(backward_hook)  # type: ignore[no-untyped-call]

    handles: list[RemovableHandle] = [module.register_forward_hook(forward_hook) for module in wanted]
    try:
        with torch.enable_grad():
            values = losses()
            if values.shape != (examples,):
                raise RuntimeError(f"losses have shape {tuple(values.shape)}, expected ({examples},): one per example")
            if values.requires_grad:
                values.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, tensor in trained.items():
        if name not in gradients:
            found[name] = tensor.zeros(examples)
        else:
            found[name] = gradients[name] if tensor.view is None else tensor.view(gradients[name])
    return found


def _by_row(value: Tensor, rows: int, name: str) -> Tensor:
    """`(rows·k, …, d)` -> `(rows, t, d)`: group everything that belongs to one row of the input."""
    if value.shape[0] % rows:
        raise RowsError(name, value.shape[0], rows)
    return value.reshape(rows, -1, value.shape[-1])


def _by_example(gradient: Tensor, examples: int, example_of_row: Tensor | None) -> Tensor:
    """`(rows, *shape)` -> `(n, *shape)`: rows summed by example. A non-finite row spoils its own example only."""
    if example_of_row is None:
        return gradient
    return gradient.new_zeros((examples, *gradient.shape[1:])).index_add_(0, example_of_row, gradient)


def _accumulate(gradients: dict[str, Tensor], name: str, value: Tensor) -> None:
    gradients[name] = gradients[name] + value if name in gradients else value
