"""Pieces that compose with methods, and why some do not: an unsupported combination is refused before the run."""

from __future__ import annotations

from lorica.config import ExperimentConfig
from lorica.errors import UserError
from lorica.methods.base import Method

PIECES = {
    "client_ranks": ("lora.client_ranks", "ranks that differ between clients"),
    "fedprox": ("local.fedprox", "a pull towards the round's start"),
    "scaffold": ("local.scaffold", "control variates"),
    "scaled_gd": ("local.scaled_gd", "preconditioning by the other factor"),
    "flat_lora": ("local.flat_lora", "noise on the frozen weights"),
    "robust": ("server.aggregate", "a robust aggregate in place of the weighted mean"),
    "secure_sum": ("federation.secure_sum", "sums in place of single replies"),
    "server_optimizer": ("server.optimizer", "momentum or Adam on the mean update"),
    "server_lr": ("server.lr", "a server learning rate"),
    "shrinkage": ("server.denoise", "singular-value shrinkage of the mean update"),
    "kalman": ("server.denoise", "a Kalman filter on the mean update"),
    "average": ("server.average", "averaging of the model over rounds"),
}
"""Piece -> its key in the configuration, and what it is."""

_ONE_RANK = "its aggregation needs factors of one rank"
_SHAPED_NOISE = "its local steps shape the noise, so the variance in an update is not the known one"
_OWN_AGGREGATION = "it aggregates the clients' factors, not a mean update"
_NEW_BASIS = "its basis changes from round to round, so what was remembered of the last one means nothing in the next"
_MERGES = "the model moves by merging into the frozen weights, and factors are no average of those"

SAME_RANKS: dict[str, str] = {"client_ranks": _ONE_RANK}
SCORED: dict[str, str] = SAME_RANKS | {
    "scaffold": "its scores need noise that is independent between clients and rounds, and control variates share it",
    "scaled_gd": "its scores need noise of one known variance in all coordinates, and preconditioning shapes it",
    "fedprox": "its scores read the mean gradient from the update, and the pull is in it too",
    "robust": "its scores are statistics of a weighted mean with a known noise",
}
SHAPED: dict[str, str] = SAME_RANKS | dict.fromkeys(("shrinkage", "kalman"), _SHAPED_NOISE)
SINGLE_REPLIES: dict[str, str] = {"secure_sum": "it combines single clients' factors, and the server sees sums only"}
OWN_AGGREGATION: dict[str, str] = dict.fromkeys(
    ("robust", "server_optimizer", "server_lr", "shrinkage", "kalman", "scaffold"), _OWN_AGGREGATION
)
NEW_BASIS: dict[str, str] = dict.fromkeys(("server_optimizer", "kalman", "scaffold", "average"), _NEW_BASIS)
MERGES: dict[str, str] = {"average": _MERGES}


def check_pieces(config: ExperimentConfig, method: Method) -> None:
    """Refuse pieces that do not fit the method, or each other.

    Raises:
        UserError: names the key, its value, the reason and the remedy.
    """
    for piece, value in chosen_pieces(config).items():
        if piece in method.refuses:
            key, what = PIECES[piece]
            raise UserError(
                key,
                value,
                f"{method.name} cannot take {what}: {method.refuses[piece]}",
                f"drop {key}, or choose another method",
            )
    if config.model.precision in ("int8", "nf4") and (method.merges or config.local.flat_lora):
        reason = "the frozen weights are added to, and quantised ones cannot be"
        raise UserError("model.precision", config.model.precision, reason, "set model.precision=bf16")
    if config.server.optimizer == "fedadam" and "shrinkage" in method.refuses:
        raise UserError("server.optimizer", "fedadam", method.refuses["shrinkage"], "use fedavgm or average")
    if config.server.aggregate != "mean":
        _check_robust(config)
    if config.federation.secure_sum:
        _check_secure_sum(config)
    sgd = config.optimizer.name == "sgd"
    known_noise = config.server.denoise != "none" or config.server.optimizer == "fedadam"
    shaping = {"local.scaled_gd": config.local.scaled_gd, "local.scaffold": config.local.scaffold}
    shaping["local.fedprox"] = bool(config.local.fedprox)
    for key, on in shaping.items():
        if known_noise and on:
            raise UserError(
                key, on, "it shapes the noise whose variance server.denoise and fedadam need", f"drop {key}"
            )
    if known_noise and (not sgd or config.optimizer.weight_decay):
        key = "optimizer.weight_decay" if sgd else "optimizer.name"
        value = config.optimizer.weight_decay if sgd else config.optimizer.name
        reason = (
            "the variance of the noise in an update is known for plain SGD only, and server.denoise and fedadam need it"
        )
        raise UserError(key, value, reason, "use sgd without weight decay")
    if config.server.denoise != "none" and config.server.optimizer == "fedadam":
        raise UserError("server.denoise", config.server.denoise, "fedadam needs the update's own noise", "choose one")
    if config.local.scaffold and (not sgd or config.optimizer.momentum or config.optimizer.weight_decay):
        raise UserError(
            "local.scaffold",
            True,
            "control variates are read from the updates of plain SGD",
            "use sgd without momentum",
        )
    if config.local.scaffold and config.lora.client_ranks is not None:
        raise UserError("local.scaffold", True, "control variates need factors of one rank", "drop lora.client_ranks")


def _check_robust(config: ExperimentConfig) -> None:
    server, unknown = config.server, "the noise in an update is known for the weighted mean only"
    clashes = [
        ("server.denoise", server.denoise, server.denoise != "none", unknown),
        ("server.optimizer", server.optimizer, server.optimizer == "fedadam", unknown),
        ("local.scaffold", True, config.local.scaffold, "control variates take every client's update in"),
        (
            "lora.client_ranks",
            config.lora.client_ranks,
            bool(config.lora.client_ranks),
            "not all clients have all ranks",
        ),
    ]
    for key, value, on, reason in clashes:
        if on:
            raise UserError(
                key, value, f"server.aggregate = {server.aggregate} cannot take it: {reason}", f"drop {key}"
            )


def _check_secure_sum(config: ExperimentConfig) -> None:
    federation, participants = config.federation, config.federation.participants
    singles = "it looks at single replies, and the server sees sums only"
    clashes = [
        ("server.aggregate", config.server.aggregate, config.server.aggregate != "mean", singles),
        ("local.scaffold", True, config.local.scaffold, singles),
        ("lora.client_ranks", config.lora.client_ranks, bool(config.lora.client_ranks), "sums need one shape"),
        ("privacy", "none", config.privacy == "none", "without a clip norm no bound on what is summed is known"),
        (
            "federation.participation",
            federation.participation,
            participants < 3,
            f"a sum over {participants} clients shows each of them what the others sent",
        ),
    ]
    for key, value, on, reason in clashes:
        if on:
            raise UserError(key, value, f"does not go with federation.secure_sum: {reason}", "change one of the two")


def chosen_pieces(config: ExperimentConfig) -> dict[str, object]:
    """Piece -> its configured value, for those that are on."""
    values: dict[str, object] = {
        "client_ranks": config.lora.client_ranks,
        "fedprox": config.local.fedprox or None,
        "scaffold": config.local.scaffold or None,
        "scaled_gd": config.local.scaled_gd or None,
        "flat_lora": config.local.flat_lora or None,
        "robust": config.server.aggregate if config.server.aggregate != "mean" else None,
        "secure_sum": config.federation.secure_sum or None,
        "server_optimizer": config.server.optimizer if config.server.optimizer != "average" else None,
        "server_lr": config.server.lr if config.server.lr != 1 else None,
        config.server.denoise: config.server.denoise,
        "average": config.server.average or None,
    }
    return {piece: value for piece, value in values.items() if piece in PIECES and value is not None}
