"""What can be combined with methods. Unsupported combinations are refused before the run, with the reason."""

from __future__ import annotations

from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.methods.base import Method
from lorica.privacy.shared_noise import check_shared, shares_noise

COMPONENTS = {
    "frozen_head": ("model.head", "a frozen head"),
    "client_ranks": ("lora.client_ranks", "ranks that differ between clients"),
    "fedprox": ("local.fedprox", "the proximal term of FedProx"),
    "scaffold": ("local.scaffold", "control variates"),
    "scaled_gd": ("local.scaled_gd", "preconditioning by the other factor"),
    "flat_lora": ("local.flat_lora", "noise on the frozen weights"),
    "robust": ("server.aggregate", "a robust aggregate instead of the weighted mean"),
    "secure_sum": ("federation.secure_sum", "secure sums instead of single replies"),
    "shared_noise": ("privacy.noise_against", "noise that the members of a secure sum share"),
    "server_optimizer": ("server.optimizer", "momentum or Adam on the mean update"),
    "server_lr": ("server.lr", "a server learning rate"),
    "shrinkage": ("server.denoise", "singular-value shrinkage of the mean update"),
    "kalman": ("server.denoise", "a Kalman filter on the mean update"),
    "average": ("server.average", "averaging of the model over rounds"),
}
"""Component -> its configuration key and description."""

_ONE_RANK = "its aggregation requires the same rank for all clients"
_SHAPED_NOISE = "its local steps change the noise, so the noise variance of an update is not known"
_OWN_AGGREGATION = "it aggregates the clients' factors, not a mean update"
_NEW_BASIS = "its basis changes between rounds, so state from earlier rounds is not valid in the new basis"
_MERGES = "it merges updates into the frozen weights, which an average of the factors would miss"

SAME_RANKS: dict[str, str] = {"client_ranks": _ONE_RANK}
SCORED: dict[str, str] = SAME_RANKS | {
    "scaffold": "its scores need noise that is independent across clients and rounds; control variates share noise",
    "scaled_gd": "its scores need the same known noise variance in all coordinates; preconditioning changes it",
    "fedprox": "its scores estimate the mean gradient from the update, which would include the proximal term",
    "robust": "its scores need a weighted mean with known noise",
}
SHAPED: dict[str, str] = SAME_RANKS | dict.fromkeys(("shrinkage", "kalman"), _SHAPED_NOISE)
_SEVERAL_STEPS = "each client needs at least two local steps, and shared noise protects only one"
SEVERAL_STEPS: dict[str, str] = {"shared_noise": _SEVERAL_STEPS}
SINGLE_REPLIES: dict[str, str] = {"secure_sum": "it needs the factors of single clients, but the server sees only sums"}
OWN_AGGREGATION: dict[str, str] = dict.fromkeys(
    ("robust", "server_optimizer", "server_lr", "shrinkage", "kalman", "scaffold"), _OWN_AGGREGATION
)
NEW_BASIS: dict[str, str] = dict.fromkeys(("server_optimizer", "kalman", "scaffold", "average"), _NEW_BASIS)
MERGES: dict[str, str] = {"average": _MERGES}


def check_components(config: ExperimentConfig, method: Method) -> None:
    """Refuse components that do not fit the method, or each other.

    Raises:
        UserError: names the key, its value, the reason and the remedy.
    """
    for component, value in chosen_components(config).items():
        if component in method.refuses:
            key, what = COMPONENTS[component]
            raise UserError(
                key,
                value,
                f"{method.name} does not support {what}: {method.refuses[component]}",
                f"remove {key}, or choose another method",
            )
    if config.model.precision in ("int8", "nf4") and (method.merges or config.local.flat_lora):
        reason = "this run changes the frozen weights, which is not possible if they are quantised"
        raise UserError("model.precision", config.model.precision, reason, "set model.precision=bf16")
    if config.server.optimizer == "fedadam" and "shrinkage" in method.refuses:
        raise UserError(
            "server.optimizer", "fedadam", method.refuses["shrinkage"], "set server.optimizer to fedavgm or average"
        )
    if config.server.aggregate != "mean":
        _check_robust(config)
    if config.federation.secure_sum:
        _check_secure_sum(config)
    check_shared(config)
    sgd = config.optimizer.name == "sgd"
    known_noise = config.server.denoise != "none" or config.server.optimizer == "fedadam"
    shaping = {"local.scaled_gd": config.local.scaled_gd, "local.scaffold": config.local.scaffold}
    shaping["local.fedprox"] = bool(config.local.fedprox)
    for key, on in shaping.items():
        if known_noise and on:
            raise UserError(
                key, on, "it changes the noise variance, which server.denoise and fedadam need", f"remove {key}"
            )
    if known_noise and (not sgd or config.optimizer.weight_decay):
        key = "optimizer.weight_decay" if sgd else "optimizer.name"
        value = config.optimizer.weight_decay if sgd else config.optimizer.name
        reason = "server.denoise and fedadam need the noise variance of an update, which is known only for plain SGD"
        raise UserError(key, value, reason, "use sgd without weight decay")
    if config.server.denoise != "none" and config.server.optimizer == "fedadam":
        problem = "fedadam needs the update before denoising"
        raise UserError("server.denoise", config.server.denoise, problem, "remove server.denoise or fedadam")
    if config.local.scaffold and (not sgd or config.optimizer.momentum or config.optimizer.weight_decay):
        raise UserError(
            "local.scaffold",
            True,
            "control variates require the updates of plain SGD",
            "use sgd without momentum and weight decay",
        )
    if config.local.scaffold and config.lora.client_ranks is not None:
        raise UserError(
            "local.scaffold", True, "control variates require the same rank for all clients", "remove lora.client_ranks"
        )


def _check_robust(config: ExperimentConfig) -> None:
    server, unknown = config.server, "the noise variance is known only for the weighted mean"
    clashes = [
        ("server.denoise", server.denoise, server.denoise != "none", unknown),
        ("server.optimizer", server.optimizer, server.optimizer == "fedadam", unknown),
        ("local.scaffold", True, config.local.scaffold, "control variates use the update of every client"),
        (
            "lora.client_ranks",
            config.lora.client_ranks,
            bool(config.lora.client_ranks),
            "all clients must have the same rank",
        ),
    ]
    for key, value, on, reason in clashes:
        if on:
            raise UserError(
                key, value, f"not supported with server.aggregate = {server.aggregate}: {reason}", f"remove {key}"
            )


def _check_secure_sum(config: ExperimentConfig) -> None:
    federation, participants = config.federation, config.federation.participants
    singles = "it needs single replies, but the server sees only sums"
    clashes = [
        ("server.aggregate", config.server.aggregate, config.server.aggregate != "mean", singles),
        ("local.scaffold", True, config.local.scaffold, singles),
        (
            "lora.client_ranks",
            config.lora.client_ranks,
            bool(config.lora.client_ranks),
            "all replies must have the same shapes",
        ),
        (
            "privacy.clip_norm",
            None,
            config.privacy.clip_norm is None,
            "the bound on the summed values requires a clip norm",
        ),
        (
            "federation.participation",
            federation.participation,
            participants < 3,
            f"a sum over {participants} clients reveals to each of them what the other sent",
        ),
    ]
    for key, value, on, reason in clashes:
        if on:
            raise UserError(
                key,
                value,
                f"not supported with federation.secure_sum: {reason}",
                f"change {key}, or set federation.secure_sum to false",
            )


def chosen_components(config: ExperimentConfig) -> dict[str, object]:
    """Component -> its configured value, for the components in use."""
    values: dict[str, object] = {
        "frozen_head": "freeze" if config.model.head == "freeze" else None,
        "client_ranks": config.lora.client_ranks,
        "fedprox": config.local.fedprox or None,
        "scaffold": config.local.scaffold or None,
        "scaled_gd": config.local.scaled_gd or None,
        "flat_lora": config.local.flat_lora or None,
        "robust": config.server.aggregate if config.server.aggregate != "mean" else None,
        "secure_sum": config.federation.secure_sum or None,
        "shared_noise": "sums" if shares_noise(config) else None,
        "server_optimizer": config.server.optimizer if config.server.optimizer != "average" else None,
        "server_lr": config.server.lr if config.server.lr != 1 else None,
        config.server.denoise: config.server.denoise,
        "average": config.server.average or None,
    }
    return {component: value for component, value in values.items() if component in COMPONENTS and value is not None}
