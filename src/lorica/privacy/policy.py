"""The owner's policy: limits that hold whatever a server proposes, checked before a run and before each release."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationInfo, field_validator

from lorica.config import ExperimentConfig, Strict, TaskConfig, validate
from lorica.errors import UserError
from lorica.privacy.accounting import Steps, epsilon_above, epsilon_rdp
from lorica.privacy.ledger import Release
from lorica.privacy.lifetime import lifetime_above, lifetime_epsilon
from lorica.privacy.plan import ClientPlan, Refused
from lorica.privacy.shared_noise import shares_noise
from lorica.privacy.unit import PrivacyUnit
from lorica.strict_yaml import read_yaml_file
from lorica.tasks.kind import kind_of, kinds


@dataclass(frozen=True)
class _Limit:
    """A limit on ε against one adversary.

    Attributes:
        key: of the policy.
        step: one step of the plan, as the adversary sees it.
        own_noise: whether the adversary gets this owner's own replies, which only its own noise protects.
    """

    key: str
    epsilon: float
    step: Steps
    own_noise: bool


class Policy(Strict):
    """Limits on what leaves an owner's data over its whole life. A server cannot change them."""

    max_epsilon: float = Field(gt=0, allow_inf_nan=False)
    """Maximum ε at `delta` of everything ever released from the data: all runs in its ledger together, those that are
    still running, and runs in other ledgers of this account that used any of the records."""
    delta: float = Field(ge=1e-12, lt=0.5)
    """The owner's δ, used whatever δ the server proposes. It must be below 1/records."""
    base_models: list[str] | None
    """Base models that may be trained on the data, as `lorica hash FOLDER` prints them. `null` allows any model, which
    is a risk: a model that nobody at the owner has reviewed, with whatever its author hid in it, then runs on private
    records."""
    tasks: list[dict[str, Any]] = Field(min_length=1)
    """What may be learned. Each entry lists keys of the section `task` whose values must equal the server's. Columns
    (`text`, `image`, `label`, `question`, `context`, `answers`) that an entry does not list must equal their
    defaults."""
    unit: Literal["record", "group"] = "record"
    """What a run must protect; a different unit is refused, since it would not add up with the releases in the
    ledger."""
    group: str | None = None
    """For `unit: group`: the column with the group of each record."""
    max_group_records: int = Field(8, ge=1)
    """For `unit: group`: maximum number of records of a group that may be used."""
    min_noise_multiplier: float = Field(0.5, gt=0)
    """Minimum noise multiplier σ of a step."""
    max_clip_norm: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Maximum norm C to which one record's gradient is clipped in a run with noise; without noise, a clip protects
    nothing."""
    max_sampling_rate: float = Field(0.5, gt=0, le=1)
    """Maximum probability that a record is in a batch."""
    max_steps: int = Field(100_000, ge=1)
    """Maximum number of noisy steps in one run."""
    noise: list[Literal["secure", "reproducible", "none"]] = Field(["secure"], min_length=1)
    """Kinds of noise that a run may use. `reproducible` and `none` protect nothing: after such a release no ε holds for
    the data, so nothing more is released from it unless these kinds are listed here. `max_epsilon` then bounds only
    what was released with secure noise."""
    sums_only: bool = False
    """Take part only in runs whose server sees only sums over clients (`federation.secure_sum`)."""
    min_clients_in_sum: int = Field(3, ge=2)
    """Minimum number of clients in a secure sum, before and after dropouts."""
    max_share_in_sum: float = Field(0.5, gt=0, le=1)
    """Maximum share of one client in the weight of a secure sum, before and after dropouts. A sum in which one client
    has almost all of the weight reveals that client's reply."""
    members: dict[int, str] | None = None
    """The clients of secure sums, this one included: number and identity key, as `lorica flower keys` prints it. Sums
    with other clients are refused, and so are keys that the listed client did not sign. By default, a server can invent
    clients or replace their keys, and so read single replies."""
    noise_against: Literal["replies", "sums"] = "replies"
    """`replies`: this owner's own noise must give the whole guarantee. `sums`: the members of a secure sum may share
    the noise (`privacy.noise_against`), which then protects against a server that sees only their sums; requires
    `members`."""
    min_colluding: int = Field(1, ge=0)
    """For `noise_against: sums`: smallest number of colluding members that a run must protect against."""
    max_epsilon_own_noise: float | None = Field(None, gt=0)
    """For `noise_against: sums`: maximum ε at `delta` of everything ever released from the data, against a server that
    gets this owner's own replies. By default there is no such limit."""
    metrics: list[str] = Field([])
    """Metrics, including `loss`, that a test on the owner's own held-out records (`federation.private_test`) may
    compute, such as `[loss, accuracy]`. The results stay with the owner. By default there is no such test."""
    records: int | None = Field(None, ge=1)
    """Number of records to declare to the server, which determines the sampling rate; by default the true number."""

    @field_validator("base_models")
    @classmethod
    def _hashes(cls, value: list[str] | None) -> list[str] | None:
        if not all(re.fullmatch("sha256:[0-9a-f]{64}", name) for name in value or []):
            raise ValueError("each entry must be a hash as printed by `lorica hash FOLDER`, sha256:…")
        return value

    @field_validator("tasks")
    @classmethod
    def _as_the_task_section_reads_them(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        columns = _column_keys()
        entries = []
        for entry in value:
            task = validate(TaskConfig, {"train": "", "test": ""} | entry, prefix="policy.tasks")
            entries.append({key: getattr(task, key) for key in ("type", *columns, *entry)})
        return entries

    @field_validator("members")
    @classmethod
    def _each_has_a_key_of_its_own(cls, value: dict[int, str] | None) -> dict[int, str] | None:
        lines = list((value or {}).values())
        if not all(re.fullmatch(r"ed25519:[0-9a-f]{64}( [A-Za-z0-9_.@-]{1,100})?", line) for line in lines):
            raise ValueError("each entry must be a public key as printed by `lorica flower keys`, ed25519:… NAME")
        if len({line.split()[0] for line in lines}) < len(lines):
            raise ValueError("two clients have the same key")
        if value is not None and not value:
            raise ValueError("it is empty; list all clients, or remove members")
        return value

    @field_validator("noise_against")
    @classmethod
    def _members_know_each_other(cls, value: str, info: ValidationInfo) -> str:
        if value == "sums" and info.data.get("members") is None:
            raise ValueError(
                "a server that invents members of a sum removes the others' noise; list all owners' keys under members"
            )
        return value

    @field_validator("group")
    @classmethod
    def _a_group_has_a_column(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("unit") == "group") != (value is not None):
            raise ValueError("set unit: group and group: COLUMN together")
        return value

    def review(self, config: ExperimentConfig, plan: ClientPlan, base: str) -> None:
        """Refuse a run that the owner does not allow, before any of its work is done.

        ε is recomputed from the proposed terms, for all planned steps, at the owner's δ. Of the section `model`, only
        the base matters: the other keys change what is computed from clipped gradients, but not what they reveal.

        Args:
            config: the server's proposal.
            plan: this owner's plan under it.
            base: `hash_of_base` of the model that would be loaded.

        Raises:
            Refused: names the policy's key, the proposed value and the limit. Contains public information only.
        """
        self.review_task(config, base)
        self._review_terms(config, plan.noise, plan.terms.sampling_rate, plan.max_steps)
        if plan.noise == "none":
            return
        self._review_bounds(plan.noise_multiplier, plan.terms.clip_norm)
        for limit in self._limits(plan):
            cost = epsilon_above(limit.epsilon, [replace(limit.step, count=plan.max_steps)], self.delta)
            if cost is not None:
                steps = f"{plan.max_steps} steps that cost ε = {cost:.4g} at δ = {self.delta:g}"
                _refuse(limit.key, steps, f"the limit is {limit.epsilon:g}")

    def review_proposal(self, config: ExperimentConfig, records: int, steps: int) -> None:
        """Refuse a proposal by its public numbers, before noise is calibrated to it.

        A calibration takes seconds, this check milliseconds.

        Args:
            records: number of records that this owner declares.
            steps: number of steps that the schedule assigns to it.

        Raises:
            Refused: as `review`.
            UserError: the policy's own δ is not below 1/records.
        """
        privacy, rate = config.privacy, config.federation.batch_size / records
        self._review_terms(config, privacy.noise, rate, steps)
        if not privacy.private:
            return
        self._review_bounds(privacy.noise_multiplier, privacy.largest_norm)
        if privacy.noise == "secure" and self.delta >= 1 / records:
            problem = (
                f"not below 1/{records}, one over the number of records: publishing one random record would satisfy it"
            )
            raise UserError("policy.delta", self.delta, problem, f"choose at most {0.1 / records:.0e}")
        if privacy.epsilon is None:
            return
        target = f"ε = {privacy.epsilon:g} at δ = {privacy.delta:g}"
        # Noise calibrated at one δ costs at least as much at a smaller δ.
        if privacy.epsilon > self.max_epsilon and privacy.delta >= self.delta:
            _refuse("max_epsilon", target, f"the limit is {self.max_epsilon:g} at δ = {self.delta:g}")
        least = Steps(rate, self.min_noise_multiplier, steps)
        if epsilon_rdp([least], privacy.delta) < privacy.epsilon:
            limit = f"the minimum is {self.min_noise_multiplier:g}"
            _refuse("min_noise_multiplier", f"{target}, for which a smaller noise multiplier suffices", limit)

    def review_task(self, config: ExperimentConfig, base: str) -> None:
        """Refuse tasks, base models and units that the owner does not allow.

        Called before the data is read: an error from reading would tell the server about columns it must not see.

        Raises:
            Refused: as `review`.
        """
        self._review_learned(config, base)
        self._review_unit(config)

    def review_release(
        self,
        releases: Iterable[Release],
        unit: PrivacyUnit,
        plan: ClientPlan,
        steps: int,
        reserved: Iterable[Release] = (),
    ) -> None:
        """Refuse steps that would bring the total cost of all releases above the owner's limit.

        Called before a run with all its remaining steps, and before each release with its own steps. All releases in
        the ledger compose, whichever run, client or records they name, because a server chooses these names and the
        columns that the fingerprint of the records depends on.

        Args:
            releases: all of the ledger, `Ledger.releases()`.
            unit: unit of privacy of the steps.
            plan: plan with the terms of the steps.
            steps: number of steps.
            reserved: unused reservations of other runs.

        Raises:
            Refused: names the policy's key, the resulting cost and the limit.
        """
        self._review_noise(plan.noise)
        reserved = list(reserved)
        releases = [*releases, *reserved]
        kinds = self._unlisted_noise(releases)
        if kinds:
            raise Refused(
                f"policy.noise: the ledger holds releases with noise = {', '.join(sorted(kinds))}, so no ε can be "
                f"guaranteed for this data; allowed are {', '.join(self.noise)}"
            )
        if plan.noise != "secure":
            return
        others = _units(releases) - {unit}
        if others:
            found = min(map(str, others))
            raise Refused(
                f"policy.unit: the ledger holds releases with unit = '{found}', which do not compose with '{unit}'"
            )
        for limit in self._limits(plan):
            seen = [release.by_own_noise() for release in releases] if limit.own_noise else releases
            planned = replace(limit.step, count=steps)
            life = lifetime_above(limit.epsilon, seen, None, self.delta, planned, unit)
            if life is not None:
                total = f"ε = {life:.4g} at δ = {self.delta:g}"
                proposed = f"{steps} steps that would bring the total cost of all releases from this data to {total}"
                limits = f"the limit is {limit.epsilon:g}"
                if reserved:
                    holders = ", ".join(sorted({f"{one.run:.8}" for one in reserved}))
                    limits += f", and part of it is reserved for run {holders}"
                _refuse(limit.key, proposed, limits)

    def spent(self, releases: Iterable[Release]) -> float:
        """ε at the owner's δ of all releases in a ledger.

        Infinite if a release has a kind of noise that the policy does not list, or if units differ.
        """
        releases = list(releases)
        if self._unlisted_noise(releases) or len(_units(releases)) > 1:
            return float("inf")
        return lifetime_epsilon(releases, None, self.delta)

    def _limits(self, plan: ClientPlan) -> list[_Limit]:
        limits = [_Limit("max_epsilon", self.max_epsilon, plan.steps(1), own_noise=False)]
        if self.max_epsilon_own_noise is not None:
            key = "max_epsilon_own_noise"
            limits.append(_Limit(key, self.max_epsilon_own_noise, plan.own_steps(1), own_noise=True))
        return limits

    def _unlisted_noise(self, releases: list[Release]) -> set[str]:
        """Kinds of noise in the ledger that the policy does not list; they void every ε."""
        return {release.noise for release in releases} - {"secure", *self.noise}

    def _review_learned(self, config: ExperimentConfig, base: str) -> None:
        if self.base_models is not None and base not in self.base_models:
            _refuse("base_models", f"the base model {base}", f"allowed are {', '.join(self.base_models) or 'none'}")
        differences = [
            {key: value for key, value in entry.items() if getattr(config.task, key) != value} for entry in self.tasks
        ]
        nearest = min(differences, key=lambda keys: ("type" in keys, len(keys)))
        if nearest:
            key, allowed = next(iter(nearest.items()))
            _refuse("tasks", f"task.{key} = {getattr(config.task, key)!r}", f"the nearest entry has {allowed!r}")
        computed = [name for name in ("loss", *kind_of(config.task).metrics) if name not in self.metrics]
        if config.federation.private_test and computed:
            proposed = f"federation.private_test = {config.federation.private_test:g}, which computes {computed}"
            _refuse("metrics", proposed, f"allowed are {self.metrics}")

    def _review_unit(self, config: ExperimentConfig) -> None:
        privacy = config.privacy
        if not privacy.private and privacy.group is None:
            return
        if (privacy.unit, privacy.group) != (self.unit, self.group):
            proposed = f"privacy.unit = {privacy.unit!r} with privacy.group = {privacy.group!r}"
            _refuse("unit", proposed, f"the policy has {self.unit!r} with {self.group!r}")
        if self.unit == "group" and privacy.group_records > self.max_group_records:
            proposed = f"privacy.group_records = {privacy.group_records}"
            _refuse("max_group_records", proposed, f"the limit is {self.max_group_records}")

    def _review_sums(self, config: ExperimentConfig) -> None:
        """Check secure sums before the first one; `lorica.secure_sum.requirements` then checks each sum."""
        federation, privacy = config.federation, config.privacy
        if shares_noise(config):
            if self.noise_against != "sums":
                _refuse("noise_against", "privacy.noise_against = 'sums'", "only 'replies' is allowed")
            if privacy.colluding < self.min_colluding:
                minimum = f"the minimum is {self.min_colluding}"
                _refuse("min_colluding", f"privacy.colluding = {privacy.colluding}", minimum)
        if not federation.secure_sum:
            if self.sums_only:
                _refuse("sums_only", "federation.secure_sum = False", "only sums are allowed")
            return
        if federation.participants < self.min_clients_in_sum:
            minimum = f"the minimum is {self.min_clients_in_sum}"
            _refuse("min_clients_in_sum", f"sums over {federation.participants} clients", minimum)
        unknown = set(range(federation.clients)) - set(self.members or range(federation.clients))
        if unknown:
            listed = ", ".join(map(str, sorted(self.members or {})))
            _refuse("members", f"federation.clients = {federation.clients}", f"the clients listed are {listed}")

    def _review_terms(self, config: ExperimentConfig, noise: str, rate: float, steps: int) -> None:
        self._review_sums(config)
        self._review_noise(noise)
        if not rate <= self.max_sampling_rate:
            _refuse("max_sampling_rate", f"a sampling rate of {rate:g}", f"the limit is {self.max_sampling_rate:g}")
        if steps > self.max_steps:
            _refuse("max_steps", f"{steps} steps", f"the limit is {self.max_steps}")

    def _review_bounds(self, sigma: float | None, clip: float) -> None:
        """`sigma` is None before it is calibrated."""
        if sigma is not None and not sigma >= self.min_noise_multiplier:
            minimum = f"the minimum is {self.min_noise_multiplier:g}"
            _refuse("min_noise_multiplier", f"a noise multiplier of {sigma:g}", minimum)
        if not clip <= self.max_clip_norm:
            _refuse("max_clip_norm", f"a clip norm of {clip:g}", f"the limit is {self.max_clip_norm:g}")

    def _review_noise(self, noise: str) -> None:
        if noise not in self.noise:
            _refuse("noise", f"noise = {noise}", f"allowed are {', '.join(self.noise)}")


def load_policy(path: Path) -> Policy:
    """Read an owner's policy.

    Raises:
        UserError: no such file, invalid YAML, an unknown key, or an invalid value; names `policy.KEY`.
    """
    return validate(Policy, read_yaml_file(path, "policy"), prefix="policy")


def _units(releases: list[Release]) -> set[PrivacyUnit]:
    return {release.unit for release in releases if release.noise == "secure"}


def _column_keys() -> list[str]:
    """Keys of the section `task` that select columns, of all kinds of task.

    An entry of `tasks` without one of them means its default.
    """
    used = {key for kind in kinds() for key in kind.columns}
    return [key for key in TaskConfig.model_fields if key in used]


def _refuse(key: str, proposed: str, limit: str) -> NoReturn:
    raise Refused(f"policy.{key}: the server proposes {proposed}; {limit}")
