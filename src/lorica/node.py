"""One owner's machine in a real federation: its settings, the run it agreed to, and its answers to the server."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lorica.adapters.base_model import hash_of_base, resolve_base
from lorica.adapters.export import Export, export_adapter
from lorica.client import Client
from lorica.config import ExperimentConfig, Strict, load, validate
from lorica.errors import UserError
from lorica.experiment import check_isolated, load_model
from lorica.files import home_folder, replaced_folder, write_atomically
from lorica.messages import Delivery, Request, decode, encode
from lorica.owners import by_privacy_unit, divide, hold_out, ledger_path, planned, privacy_unit
from lorica.privacy.ledger import Ledger
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.policy import Policy, load_policy
from lorica.privacy.statement import Account, account
from lorica.tasks import load_training
from lorica.tasks.records import Records, Task

OWNER = "owner"
"""Stands for `task.train` in what a server sends: the data are with the owner."""
logger = logging.getLogger(__name__)


class NodeSettings(Strict):
    """What an owner configures at its own machine; the server has no say in it."""

    client: int
    """Number of this client, from 0, as agreed between the organisations."""
    data: str | None = None
    """The training data: a file, an image folder, or a folder of files. Only a simulation does without: its clients share
    out the server's `task.train`."""
    base: str | None = None
    """Folder of the base model; by default `model.base` of the experiment if that is embedded or a hub id."""
    policy: str | None = None
    """The owner's policy file; needed with `data`."""
    ledger: str | None = None
    """SQLite file that records every release; by default beside the data."""
    folder: str | None = None
    """Where the node keeps the adapter between messages and puts the final one; by default beside the data."""
    device: str | None = None
    """Instead of `model.device` of the experiment."""
    worker: bool = True
    """Keep a process alive between messages that holds the base model and the data."""
    worker_idle: float = 900.0
    """Seconds without a message after which that process ends."""

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> NodeSettings:
        """From Flower's node configuration; `partition-id` stands for `client`, as in a simulation.

        Raises:
            UserError: a key is unknown or has a wrong value.
        """
        given = {key: value for key, value in node_config.items() if key not in ("partition-id", "num-partitions")}
        if "partition-id" in node_config:
            # Simulated clients live in processes that stay anyway.
            given = {"client": node_config["partition-id"], "worker": "data" in given} | given
        return validate(cls, given, prefix="node-config")


@dataclass(frozen=True)
class Invitation:
    """What every message of a run carries.

    Attributes:
        run: identity of the run.
        experiment: the server's configuration as JSON.
        base: hash of the server's base model.
    """

    run: str
    experiment: str
    base: str

    def encode(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """The inverse of `encode`.

        Raises:
            Refused: not an invitation.
        """
        try:
            content = json.loads(text)
            return cls(run=str(content["run"]), experiment=str(content["experiment"]), base=str(content["base"]))
        except (ValueError, KeyError, TypeError):
            raise Refused("the message holds no invitation that this version of Lorica understands") from None


class Node:
    """An owner that has agreed to a run.

    Attributes:
        plan: what it agreed to.

    Raises:
        Refused: the run is not one that this owner takes part in. The message holds public information only.
        UserError: the node's own settings, data or model cannot be used. The message is for the owner.
    """

    def __init__(self, settings: NodeSettings, invitation: Invitation) -> None:
        self._settings, self._invitation = settings, invitation
        self._config = _own_config(settings, invitation)
        policy = None if settings.policy is None else load_policy(Path(settings.policy))
        if settings.data is not None and policy is None:
            raise UserError("node-config.policy", None, "own data need a policy", "give the path of a policy file")
        base = resolve_base(self._config.model.base)
        own_base = hash_of_base(Path(base)) if Path(base).is_dir() else invitation.base
        if own_base != invitation.base:
            raise Refused(f"the server's base model is {invitation.base}, here it is {own_base}")
        task = load_training(
            self._config.task, base, _group(self._config), tested=self._config.federation.private_test > 0
        )
        self._label_names = task.label_names
        records, private_test = _own_records(self._config, settings, task)
        declared = policy.records if policy is not None and policy.records is not None else len(records)
        self.plan = _plan(self._config, settings.client, declared)
        if policy is not None:
            policy.review(self._config, self.plan, own_base)
        dataset = task.train.fingerprint()
        ledger = Ledger(Path(settings.ledger) if settings.ledger else ledger_path(self._config, dataset))
        self._folder = _folder(settings, ledger, invitation.run)
        self._pin()
        self._model = load_model(self._config, task)
        _check_model(self._config, self._model, records)
        self._client = Client(
            number=settings.client,
            records=records,
            plan=self.plan,
            ledger=ledger,
            dataset=dataset,
            unit=privacy_unit(self._config),
            seed=self._config.seed,
            micro_batch_tokens=self._config.federation.pass_tokens(self._model.device.type),
            private_test=private_test,
            policy=policy,
        )
        self._restore()

    def answer(self, content: bytes) -> bytes:
        """The encoded reply to an encoded request (`Client.answer`).

        Raises:
            Refused: the request is not one of the agreed run, or goes beyond the plan or the policy.
        """
        try:
            request = Request.decode(content)
        except ValueError as error:
            raise Refused(str(error)) from None
        if (request.run, request.client) != (self._invitation.run, self._client.number):
            raise Refused(f"the request is for client {request.client} of run {request.run}, not for this one")
        reply = self._client.answer(self._model, request)
        if isinstance(request.work, Delivery):
            if request.work.final:
                self._keep_result(request.run, request.work)
        else:
            self._save()
            spent = self.account
            logger.info(
                "round %d: released %d tensors, %d bytes; ε = %.3f of %.3f planned for this run",
                request.round,
                len(decode(reply)),
                len(reply),
                self.plan.epsilon(spent.steps),
                self.plan.epsilon(),
            )
        return reply

    @property
    def account(self) -> Account:
        """What this run has cost so far; what other runs cost stays with the owner."""
        client = self._client
        full = account(client.ledger, client.dataset, client.records.fingerprint(), self._invitation.run, self.plan, client.unit)
        return Account(full.steps, full.releases)

    def _pin(self) -> None:
        """A run is one experiment: what it costs was agreed once."""
        path = self._folder / "invitation.json"
        content = self._invitation.encode().encode()
        if path.is_file() and path.read_bytes() != content:
            raise Refused(f"run {self._invitation.run} was agreed on with another experiment")
        write_atomically(path, content)

    def _restore(self) -> None:
        path = self._folder / "adapter.safetensors"
        if path.is_file():
            tensors = safetensors.torch.load_file(path)
            self._client.sequence = int(tensors.pop("sequence"))
            self._client.held = {name[5:]: value for name, value in tensors.items() if name.startswith("held:")}
            sites = [name[9:] for name in tensors if name.startswith("merged.B:")]
            self._client.merged = {
                site: (tensors[f"merged.B:{site}"], tensors[f"merged.A:{site}"]) for site in sites
            }

    def _save(self) -> None:
        """What the next request builds on; a process may live for one message only."""
        assert self._client.sequence is not None
        tensors = {f"held:{name}": value for name, value in self._client.held.items()}
        for site, (b, a) in self._client.merged.items():
            tensors |= {f"merged.B:{site}": b, f"merged.A:{site}": a}
        write_atomically(self._folder / "adapter.safetensors", encode(tensors | {"sequence": torch.tensor(self._client.sequence)}))

    def _keep_result(self, run: str, work: Delivery) -> None:
        own = self._client.personal(run)
        self._model.write(dict(work.model) | own)
        export = Export(self._config.model, self._config.task.type, self._label_names, self._config.seed)
        whose = "this client's own" if own else "the federation's"
        card = f"# {self._config.name}\n\nA LoRA adapter, {whose}, of run {run} ({self._config.method.name}).\n"
        with replaced_folder(self._folder / "adapter") as target:
            export_adapter(self._model, work.merged, target, export, card)
        logger.info("the run has ended; its adapter is in %s", self._folder / "adapter")


def _own_config(settings: NodeSettings, invitation: Invitation) -> ExperimentConfig:
    """The experiment with this owner's paths in place of the server's."""
    try:
        content = json.loads(invitation.experiment)
        config = load(content)
    except (ValueError, UserError) as error:
        raise Refused(f"the experiment is not valid here: {error}") from None
    if not 0 <= settings.client < config.federation.clients:
        raise Refused(f"the experiment has {config.federation.clients} clients, and this one is number {settings.client}")
    if settings.data is not None and config.task.train != OWNER:
        raise Refused(f"task.train = {config.task.train!r}: the data are for the owner to name, not for the server")
    if settings.data is None and config.task.train == OWNER:
        raise UserError("node-config.data", None, "the experiment leaves the data to the owner", "give data=PATH")
    if settings.base is None and settings.data is not None and _is_path(config.model.base):
        raise Refused(f"model.base = {config.model.base!r}: a path is for the owner to name; this node needs base=FOLDER")
    task = {} if settings.data is None else {"train": settings.data}
    model = {} if settings.base is None else {"base": settings.base}
    model |= {} if settings.device is None else {"device": settings.device}
    changes: dict[str, Any] = {
        "task": config.task.model_copy(update=task),
        "model": config.model.model_copy(update=model),
    }
    if config.privacy != "none":
        # A path that the server proposes is never written to; in a simulation the server's machine is this one.
        own = {} if settings.data is None else {"ledger": None}
        changes["privacy"] = config.privacy.model_copy(update=own)
    return config.model_copy(update=changes)


def _is_path(base: str) -> bool:
    return base.startswith((".", "/", "~")) or base.count("/") > 1 or Path(base).exists()


def _group(config: ExperimentConfig) -> str | None:
    return None if config.privacy == "none" else config.privacy.group


def _own_records(config: ExperimentConfig, settings: NodeSettings, task: Task) -> tuple[Records, Records | None]:
    task = by_privacy_unit(config, task)
    records = divide(config, task)[settings.client] if settings.data is None else task.train
    return hold_out(config, settings.client, records)


def _plan(config: ExperimentConfig, client: int, records: int) -> ClientPlan:
    try:
        return planned(config, client, records)
    except UserError as error:
        # It compares public numbers only.
        raise Refused(str(error)) from None


def _check_model(config: ExperimentConfig, model: Any, records: Records) -> None:
    try:
        check_isolated(config, model, records)
    except UserError:
        logger.exception("the model mixes examples")
        raise Refused("the base model mixes the examples of a batch, so that they cannot be clipped one by one") from None


def _folder(settings: NodeSettings, ledger: Ledger, run: str) -> Path:
    """One folder a run; a name that a server chose cannot lead out of it."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    if settings.folder is not None:
        return Path(settings.folder) / name
    if settings.data is not None:
        return ledger.path.with_name(f"{Path(settings.data).name}.lorica") / name
    return home_folder() / "nodes" / f"{name}-{settings.client}"
