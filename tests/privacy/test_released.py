"""Only mechanisms make released tensors, and replies take nothing else."""

import ast
from pathlib import Path

import pytest
import torch

import lorica.privacy
from lorica.messages import Reply
from lorica.privacy.released import Released, _release, post_process
from lorica.tensors import decode

SOURCE = Path(lorica.privacy.__file__).parent.parent


def test_nobody_else_can_make_one() -> None:
    with pytest.raises(TypeError, match=r"only lorica\.privacy"):
        Released(torch.zeros(1), object())


def test_a_reply_refuses_plain_tensors() -> None:
    with pytest.raises(TypeError, match="loss is a Tensor"):
        Reply(0, {"b": _release(torch.zeros(1)), "loss": torch.zeros(1)})  # type: ignore[dict-item]


def test_post_processing_stays_released_and_computes() -> None:
    total = post_process(torch.add, _release(torch.tensor([1.0])), _release(torch.tensor([2.0])))
    assert isinstance(total, Released)
    assert total.tensor.item() == 3.0
    with pytest.raises(AttributeError):
        post_process(torch.neg, torch.zeros(1))  # type: ignore[arg-type]


def test_a_reply_survives_the_wire() -> None:
    reply = Reply(3, {"x.A": _release(torch.randn(2, 3)), "head.bias": _release(torch.randn(4))})
    decoded = decode(reply.encode())
    assert decoded.keys() == reply.tensors.keys()
    assert all(torch.equal(decoded[name], reply.tensors[name].tensor) for name in decoded)


def test_release_is_called_in_the_mechanism_alone() -> None:
    """Reads the source: `_release` stays in three modules, and per-example quantities stay in `privacy`."""
    users: dict[str, set[str]] = {
        name: set()
        for name in ("_release", "_KEY", "per_example_gradients", "clipped_sum", "clipped_batch", "poisson_sample")
    }
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            if name in users:
                users[name].add(str(path.relative_to(SOURCE)))
    assert users["_KEY"] == {"privacy/released.py"}
    assert users["_release"] == {"privacy/released.py", "privacy/mechanism.py", "privacy/ledger.py"}
    assert users["clipped_batch"] == {"privacy/passes.py", "privacy/mechanism.py"}
    assert users["poisson_sample"] == {"privacy/mechanism.py"}
    for name in ("per_example_gradients", "clipped_sum"):
        # An audit knows its canaries, which are public records, and nobody else's.
        assert all(user.startswith("privacy/") or user == "audit/run.py" for user in users[name]), users[name]
