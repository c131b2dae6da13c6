"""An owner's node in a real federation: it agrees to a run and answers the server's messages."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lorica.adapters.adapted import AdaptedModel
from lorica.adapters.base_files import EMBEDDED, base_identity, resolve_base
from lorica.adapters.export import Export, export_adapter
from lorica.adapters.loading import check_isolated, load_model
from lorica.adapters.loading_section import HEADING, loading_section
from lorica.adapters.names import flat_pairs, pairs_under, under
from lorica.config import ExperimentConfig, load
from lorica.errors import UserError
from lorica.files import private_folder, replaced_folder, write_atomically
from lorica.markdown import code
from lorica.messages import OWNER, Delivery, Invitation, Projection, Request, encode_account, encode_plan
from lorica.owner.identity import read_identity
from lorica.owner.refusals import ERROR, because_of
from lorica.owner.request_checks import check_request
from lorica.owner.settings import NodeSettings
from lorica.owner.setup import by_privacy_unit, divide, hold_out, ledger_path, make_client
from lorica.privacy.ledger import Ledger, Release
from lorica.privacy.plan import ClientPlan, Refused, plan_run, planned_steps
from lorica.privacy.policy import Policy, load_policy
from lorica.privacy.statement import Account
from lorica.secure_sum.agreement import Agreement
from lorica.secure_sum.identity import Identity, Member
from lorica.secure_sum.requirements import Requirements
from lorica.secure_sum.setup import SummationError
from lorica.secure_sum.stages import Input, Part, run_client_stage
from lorica.tasks.labels import without_label
from lorica.tasks.loading import load_training
from lorica.tasks.records import Records, Task
from lorica.tensors import decode, encode

logger = logging.getLogger(__name__)


class Node:
    """An owner that has agreed to a run.

    Attributes:
        plan: the agreed terms.

    Raises:
        Refused: the owner does not take part in this run. The message contains public information only.
        UserError: the node's own settings, data or model cannot be used. The message is for the owner only.
    """

    def __init__(self, settings: NodeSettings, invitation: Invitation) -> None:
        self._settings, self._invitation = settings, invitation
        self._config = _own_config(settings, invitation)
        base = resolve_base(self._config.model.base)
        self._base = base_identity(base)
        if self._base != invitation.base:
            raise Refused(f"the server's base model is {invitation.base}, but this node's is {self._base}")
        policy = self._policy()
        if policy is not None:
            policy.review_task(self._config, self._base)
        tested = self._config.federation.private_test > 0
        task = load_training(self._config.task, base, self._config.privacy.group, tested=tested)
        self._label_names = task.label_names
        ignored = without_label(task.train.labels) if task.label_names else 0
        if ignored:
            logger.warning(
                "%d of %d records have a label that is not in task.labels; they contribute zero",
                ignored,
                len(task.train),
            )
        records, private_test = _own_records(self._config, settings, task)
        declared = policy.records if policy is not None and policy.records is not None else len(records)
        if policy is not None:
            policy.review_proposal(self._config, declared, planned_steps(self._config, settings.client))
        self.plan = _plan(self._config, settings.client, declared)
        dataset = task.train.fingerprint()
        ledger = Ledger(_ledger(self._config, settings, dataset))
        # Hashed, because the server chose the name of the run: it must not lead out of the node's folder.
        self._folder = settings.place / f"run-{hashlib.sha256(invitation.run.encode()).hexdigest()[:16]}"
        _make_private(settings.place, self._folder)
        self._identity = _identity(settings, self._config, policy)
        self._client = make_client(self._config, self.plan, records, private_test, ledger, dataset)
        self._check_pinned()
        datasets = ledger.datasets(invitation.run).get(settings.client, set())
        self._client.check_records(invitation.run, datasets)
        self._review()
        self._warn_of_sums(policy)
        write_atomically(self._invitation_path, invitation.encode().encode(), mode=0o600)
        self._model = load_model(self._config, task)
        self._shapes = {name: tuple(value.shape) for name, value in self._model.read().items()}
        # Not on the owner's records: a refusal would tell the server about them without being charged.
        _check_model(self._config, self._model, task.test)
        self._restore()

    def handle_request(self, content: bytes) -> bytes:
        """Handle an encoded request and return the encoded reply (`Client.reply_to`).

        Raises:
            Refused: the request does not belong to the agreed run, exceeds the plan or the policy, or asks for a single
                reply although the run was agreed to use secure sums.
        """
        request = self._checked_request(content)
        if self._config.federation.secure_sum and not isinstance(request.work, Delivery):
            raise Refused("this run was agreed to use secure sums: no single replies (federation.secure_sum)")
        return self._reply_to(request)

    def handle_sum_stage(self, content: bytes | None, question: str) -> bytes:
        """Handle one stage of a secure sum over the replies to a request.

        Args:
            content: the encoded request; None in the stages that do not need it.

        Raises:
            Refused: as `handle_request`.
            SummationError: an honest server would not ask this question.
        """

        def given(agreement: Agreement) -> Input:
            if content is None:
                raise Refused("the server asks for a masked input without a request")
            request = self._checked_request(content)
            if (request.round, request.exchange) != (agreement.round, agreement.exchange):
                raise Refused("the server asks for a masked input of a different round or exchange than announced")
            return Input(decode(self._reply_to(request, agreement)), derived=isinstance(request.work, Projection))

        kept, reply = run_client_stage(self._part(), self._requirements(), question, given)
        write_atomically(self._part_path, kept.to_bytes(), mode=0o600)
        return reply

    @property
    def _part_path(self) -> Path:
        return self._folder / "sum.json"

    def _part(self) -> Part:
        """What is stored of this run's sums.

        Raises:
            UserError: it is damaged, or another version of Lorica wrote it. It cannot be done without: it remembers
                which inputs became part of a sum, so that no second sum of them reveals one.
        """
        path = self._part_path
        if not path.is_file():
            return Part()
        try:
            return Part.from_bytes(path.read_bytes())
        except SummationError as error:
            # An older copy would not know the latest sums.
            remedy = "leave this run to the other nodes, and take part in a new one"
            raise UserError(path.name, str(path), str(error), remedy) from None

    def _requirements(self) -> Requirements:
        """The current policy's requirements on a sum."""
        run, own, policy = self._invitation.run, self._client.number, self._policy()
        required = Requirements(run, own, identity=self._identity)
        if policy is not None:
            members = {client: Member.of(line) for client, line in (policy.members or {}).items()}
            required = replace(
                required,
                min_clients=policy.min_clients_in_sum,
                max_share=policy.max_share_in_sum,
                members=members,
            )
        if self.plan.shared is not None:
            required = replace(required, min_clients=max(required.min_clients, self.plan.shared.min_clients))
        return required

    def _checked_request(self, content: bytes) -> Request:
        try:
            request = Request.decode(content)
        except ValueError as error:
            raise Refused(str(error)) from None
        if (request.run, request.client) != (self._invitation.run, self._client.number):
            raise Refused(
                f"the request is for client {request.client} of run {request.run!r:.100}, not for this client and run"
            )
        if request.round > self._config.federation.rounds:
            raise Refused(
                f"round {request.round} is beyond the last round of this run ({self._config.federation.rounds})"
            )
        wrong = check_request(request, self._shapes)
        if wrong is not None:
            raise Refused(f"the request cannot be carried out: {wrong}")
        if not isinstance(request.work, Delivery):
            # The owner may have changed the policy since the last message.
            self._review()
        return request

    def _reply_to(self, request: Request, agreement: Agreement | None = None) -> bytes:
        if isinstance(request.work, Delivery):
            self._accept_delivery(request, request.work)
            return encode({})
        reply = self._client.reply_to(self._model, request, agreement)
        self._save()
        spent = self.account
        logger.info(
            "round %d: released %d tensors, %d bytes; spent ε = %.3f of the %.3f planned for this run",
            request.round,
            len(decode(reply)),
            len(reply),
            self.plan.epsilon(spent.steps),
            self.plan.epsilon(),
        )
        return reply

    @property
    def account(self) -> Account:
        """The cost of this run so far. The cost of other runs is not shared."""
        client = self._client
        steps, releases = client.ledger.charged(self._invitation.run).get(client.number, (0, 0))
        return Account(steps, releases)

    def _policy(self) -> Policy | None:
        if self._settings.policy is not None:
            return load_policy(Path(self._settings.policy).expanduser())
        if self._settings.data is not None:
            raise UserError("node-config.policy", None, "required with data", "add policy=PATH to --node-config")
        return None

    def _review(self) -> None:
        """Check the run and all its remaining steps against the owner's policy."""
        client, policy = self._client, self._policy()
        client.policy = policy
        if policy is not None:
            policy.review(self._config, self.plan, self._base)

        def allow(reserved: list[Release]) -> None:
            if policy is not None:
                left = self.plan.max_steps - client.ledger.steps(self._invitation.run, client.number)
                elsewhere = client.ledger.elsewhere(client.records.fingerprint(), reserved=True)
                releases = [*client.ledger.costs(), *elsewhere]
                policy.review_release(releases, client.unit, self.plan, left, reserved)

        client.reserve(self._invitation.run, allow)

    @property
    def _invitation_path(self) -> Path:
        return self._folder / "invitation.json"

    def _check_pinned(self) -> None:
        """Refuse a different experiment under the id of an agreed run."""
        path = self._invitation_path
        if path.is_file() and path.read_bytes() != self._invitation.encode().encode():
            raise Refused(f"run {self._invitation.run} was agreed with another experiment")

    def _warn_of_sums(self, policy: Policy | None) -> None:
        """Warn, once per run, if sums are used without `members` in the policy."""
        unlisted = policy is not None and policy.members is None
        if unlisted and self._config.federation.secure_sum and not self._invitation_path.is_file():
            logger.warning(
                "run %s uses secure sums, but the policy lists no members: a server that invents clients or replaces "
                "their keys can still read single replies. List the owners' keys (lorica flower keys) under `members`",
                self._invitation.run,
            )

    def _restore(self) -> None:
        path = self._folder / "adapter.safetensors"
        if path.is_file():
            try:
                tensors = decode(path.read_bytes())
                self._client.sequence = int(tensors.pop("sequence"))
                self._client.held = under("held:", tensors)
                self._client.merged = pairs_under("merged.B:", "merged.A:", tensors)
            except (ValueError, LookupError, RuntimeError) as error:
                remedy = "delete it; the server then sends the whole adapter again"
                raise UserError("node", str(path), f"the file is damaged ({error})", remedy) from error

    def _save(self) -> None:
        """Save the state that the next request builds on: this process may exit after one message."""
        assert self._client.sequence is not None
        tensors = {f"held:{name}": value for name, value in self._client.held.items()}
        tensors |= flat_pairs(self._client.merged, "merged.B:", "merged.A:")
        tensors["sequence"] = torch.tensor(self._client.sequence)
        write_atomically(self._folder / "adapter.safetensors", encode(tensors), mode=0o600)

    def _accept_delivery(self, request: Request, work: Delivery) -> None:
        """Evaluate the model on the owner's test records and keep the final adapter. The server gets no reply."""
        policy = self._policy()
        if policy is not None:
            policy.review_task(self._config, self._base)
        try:
            self._client.reply_to(self._model, request)
        except Exception:
            # A failure may depend on private records, and a test is not charged: the server must not see it.
            logger.exception("the private test failed")
        if work.final:
            self._keep_result(request.run, work)

    def _keep_result(self, run: str, work: Delivery) -> None:
        own = self._client.personal(run, self._config.federation.rounds) if work.personal else {}
        self._model.write(dict(work.model) | own)
        export = Export(self._config.model, self._config.task, self._label_names, self._config.seed)
        kind, method = "Personal" if own else "Global", self._config.method.name
        card = f"# {self._config.name}\n\n{kind} LoRA adapter of run {run} (`{code(method)}`).\n"
        if self._config.lora.start is not None:
            card += f"\nStarted from the adapter `{code(self._config.lora.start)}`.\n"
        card += f"\n## {HEADING}\n\n{loading_section(export, 'adapter')}\n"
        with replaced_folder(self._folder / "adapter") as target:
            export_adapter(self._model, work.merged, target, export, card)
        logger.info("the run has finished; its adapter is in %s", self._folder / "adapter")


def _own_config(settings: NodeSettings, invitation: Invitation) -> ExperimentConfig:
    """The experiment, with this owner's paths instead of the server's."""
    try:
        content = json.loads(invitation.experiment)
    except (ValueError, RecursionError):
        content = None
    # `load` would take a string for the name of a file and read it.
    if not isinstance(content, dict):
        raise Refused("the experiment is not a JSON object")
    try:
        config = load(content)
    except UserError as error:
        raise Refused(f"the experiment is not valid: {error}") from None
    if not 0 <= settings.client < config.federation.clients:
        raise Refused(f"the experiment has {config.federation.clients} clients, but this is client {settings.client}")
    if settings.data is not None and config.task.train != OWNER:
        raise Refused(f"task.train = {config.task.train!r}: only the owner may name the data, not the server")
    if settings.data is None and config.task.train == OWNER:
        problem = "the experiment does not name the training data"
        raise UserError("node-config.data", None, problem, "add data=PATH to --node-config")
    if settings.data is not None and not Path(settings.data).expanduser().exists():
        # A hub id or a pattern is refused too: there is no folder for its ledger.
        raise UserError("node-config.data", settings.data, "no such file or folder", "set data to an existing path")
    if settings.base is None and settings.data is not None and not config.model.base.startswith(EMBEDDED):
        raise Refused(f"model.base = {config.model.base!r}: the owner has not set base=FOLDER for this node")
    task = {} if settings.data is None else {"train": settings.data}
    model = {} if settings.base is None else {"base": settings.base}
    model |= {} if settings.device is None else {"device": settings.device}
    # Never write to a path that a server proposes, except in a simulation on one machine.
    privacy = {} if settings.data is None else {"ledger": None}
    changes: dict[str, Any] = {
        "task": config.task.model_copy(update=task),
        "model": config.model.model_copy(update=model),
        "privacy": config.privacy.model_copy(update=privacy),
    }
    return config.model_copy(update=changes)


def _own_records(config: ExperimentConfig, settings: NodeSettings, task: Task) -> tuple[Records, Records | None]:
    task = by_privacy_unit(config, task)
    records = divide(config, task)[settings.client] if settings.data is None else task.train
    return hold_out(config, records)


def _make_private(*folders: Path) -> None:
    for folder in folders:
        try:
            private_folder(folder)
        except OSError as error:
            problem = f"cannot be created ({error.strerror})"
            raise UserError("node-config.folder", str(folder), problem, "set folder=PATH to another folder") from error


def _identity(settings: NodeSettings, config: ExperimentConfig, policy: Policy | None) -> Identity | None:
    """The node's identity key, if the run uses secure sums and the node has one.

    Raises:
        UserError: the key is missing but the policy lists `members`, cannot be read, or is not the listed one.
    """
    if not config.federation.secure_sum:
        return None
    members = {} if policy is None else policy.members or {}
    if settings.identity is None:
        if members:
            problem, remedy = (
                "required because the policy lists members",
                "create a key with `lorica flower keys` and add identity=PATH to --node-config",
            )
            raise UserError("node-config.identity", None, problem, remedy)
        return None
    identity = read_identity(Path(settings.identity).expanduser())
    line = members.get(settings.client)
    if members and (line is None or Member.of(line).key != identity.public().key):
        problem = f"it is not the key listed in the policy for this node (client {settings.client})"
        raise UserError("node-config.identity", settings.identity, problem, f"list {identity.public()} under members")
    return identity


def _ledger(config: ExperimentConfig, settings: NodeSettings, dataset: str) -> Path:
    return Path(settings.ledger).expanduser() if settings.ledger is not None else ledger_path(config, dataset)


def _plan(config: ExperimentConfig, client: int, records: int) -> ClientPlan:
    try:
        return plan_run(config, client, records)
    except UserError as error:
        # The message compares public numbers only.
        raise Refused(str(error)) from None


def _check_model(config: ExperimentConfig, model: AdaptedModel, records: Records) -> None:
    try:
        check_isolated(config, model, records)
    except UserError:
        logger.exception("the model mixes examples")
        raise Refused("the base model mixes the examples of a batch, so they cannot be clipped separately") from None


@lru_cache(maxsize=8)
def agreed(settings: NodeSettings, invitation: Invitation) -> Node:
    """The node of a run, loaded once per process."""
    return Node(settings, invitation)


def respond(
    settings: NodeSettings, invitation: str, request: bytes | None, question: str | None = None
) -> dict[str, str | bytes]:
    """Answer one message of the server: with `plan`, with `reply` and `account`, or with `refused`.

    Only the text of a refusal is sent. Other errors may quote private data, so they are logged at the node.

    Args:
        invitation: encoded.
        request: encoded; None for an invitation, and in stages of a secure sum that do not need it.
        question: question of a stage of a secure sum over the replies to the request.
    """
    try:
        node = agreed(settings, Invitation.decode(invitation))
        if question is not None:
            reply = node.handle_sum_stage(request, question)
        elif request is not None:
            reply = node.handle_request(request)
        else:
            return {"plan": encode_plan(node.plan)}
        return {"reply": reply, "account": encode_account(node.account)}
    except (Refused, SummationError) as refusal:
        logger.warning("refused: %s", refusal)
        return {"refused": str(refusal)}
    except UserError as error:
        logger.error("%s", error)
        return {"refused": because_of(error)}
    except Exception:
        logger.exception("failed")
        return {"refused": ERROR}
