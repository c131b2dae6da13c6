"""An experiment as typed configuration: YAML in, validated models out, every mistake named with its remedy."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorica.errors import UserError
from lorica.paths import path_problem
from lorica.registry import TASK_KINDS, TRACKERS, current_method_name, registered, remedy_for_unknown
from lorica.strict_yaml import BOOLEANS, read_yaml, read_yaml_file

DEFAULT_CONFIG = Path(__file__).parent / "defaults" / "digits.yaml"
Model = TypeVar("Model", bound=BaseModel)
Paths = TypeVar("Paths", str | None, str | list[str], str | dict[str, str])


def _mistake(problem: str, remedy: str) -> PydanticCustomError:
    """What a validator raises where it knows more of a remedy than to change the key."""
    return PydanticCustomError("mistake", "{problem}", {"problem": problem, "remedy": remedy})


def check_paths(value: Paths) -> Paths:
    """Refuse a path that no file can have, in a key of one path or of several."""
    paths = [] if value is None else [value] if isinstance(value, str) else value
    for path in paths.values() if isinstance(paths, dict) else paths:
        problem = path_problem(path)
        if problem is not None:
            raise _mistake(problem, "give another path")
    return value


def one_as_list(value: Any) -> Any:
    """A single name as a list of one, in a key of one name or of several."""
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    """A configuration section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Strict):
    """The frozen base model and the head on top of it."""

    base: str
    """A folder or a Hugging Face hub id. `lorica:glyph-vit` is the embedded default. Code that comes with a model is
    never run, and of a pickle (`pytorch_model.bin`) only tensors are read."""
    head: Literal["train", "freeze"] = "train"
    """`train`: the last linear layer is trained under DP; it starts at zero unless the checkpoint contains one trained
    for these labels. `freeze`: the head stays as loaded (or as initialised from the seed)."""
    pooling: Literal["auto", "mean"] = "auto"
    """`auto`: the model's own classification head. `mean`: a linear head on the mean of the last hidden states."""
    precision: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    """Precision of the frozen base. Everything that is trained, clipped or noised stays fp32. `bf16` is faster on GPUs
    and on CPUs that have instructions for it, and much slower on other CPUs. `int8` and `nf4` (4 bits) need
    bitsandbytes; methods that add to the frozen weights cannot use them."""
    dropout: bool = True
    """Whether the base model drops activations in training, as its own configuration says. Training is faster without,
    most of all on a CPU. `lora.lora_dropout` is separate."""
    gradient_checkpointing: bool = False
    """Recompute most activations of a layer in the backward pass instead of storing them: about half the memory, about
    a third more time, the same gradients."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """`auto`: eager on CPU (faster on short sequences), sdpa elsewhere."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` uses a GPU if there is one."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of PyTorch; by default PyTorch chooses. A different number rounds sums differently."""

    _paths = field_validator("base")(check_paths)


class LoraSection(Strict):
    """Keys of `peft.LoraConfig` under the same names; only `client_ranks` and `start` are Lorica's own."""

    r: int = Field(8, ge=1, le=4096)
    """Rank of the factors."""
    lora_alpha: float = Field(8, gt=0, le=1e6)
    """Scale: `γ = lora_alpha / r`."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: list[str] | str = "auto"
    """`auto`: query and value, as in the papers of this field, or PEFT's choice for a family without them. Otherwise
    module names, one regular expression, or `all-linear`. `query`, `key`, `value` are found under each family's own
    names (`q_proj`, `q_lin`, `query_proj`, …); where one fused map computes all three (`c_attn`, `Wqkv`), they mean
    that map."""
    layers_to_transform: list[int] | None = Field(None, min_length=1)
    """Adapt only these layers, counted from 0, such as the upper half: `[3, 4, 5]` of 6. The backward pass ends at the
    lowest of them. By default every layer."""
    use_rslora: bool = False
    """Use `γ = lora_alpha / √r` instead."""
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = True
    """Initialisation of A: PEFT's default (Kaiming uniform), Gaussian, or orthogonal. Initialisations from data or from
    the base weights are not offered: they leak, or make the base differ between nodes."""
    client_ranks: list[int] | Literal["halving", "random"] | None = None
    """Ranks that differ between clients: a list with one rank per client, `halving` (r, r/2, r/4, … in turn) or
    `random` (uniform on 1 to r, from the public seed). A client holds the leading ranks of the global factors (in
    `lora-a2`, it trains so many ranks of each map on average); all clients use the `γ` of rank `r`. Methods that need
    one rank refuse this key."""
    start: str | None = None
    """Folder of a **public** PEFT adapter to continue from: trained on public data, or released before. It must adapt
    the same linear maps of the same base model with the same scale `γ` and, unless the method merges into the frozen
    weights, the same rank. Its head is taken if it has the same labels and shape. See "Continue from an adapter" in
    tasks.md."""

    _paths = field_validator("start")(check_paths)


class TaskConfig(Strict):
    """What is learned, and from which files."""

    type: str
    """What a record is, and what is predicted: `text-classification`, `text-regression`, `image-classification`,
    `question-answering`, `language-modelling`, or a kind of task from another package."""
    train: str | list[str]
    """A CSV, JSONL or Parquet file, an image folder, a Hugging Face dataset id (`ID`, `ID:CONFIG`, `ID[SPLIT]`), or
    `lorica:digits/train`. For several sources: a list, a pattern (`hospitals/*.csv`) or a folder of such files, sorted
    by name; see also `federation.partition: files`."""
    test: str | dict[str, str]
    """The public test set: the server evaluates on it after each round. Never use private data here. For several test
    sets, give them names, such as `{matched: …, mismatched: …}`; the main metric of the first is that of the run."""
    test_overlap: Literal["report", "refuse", "allow"] = "report"
    """What to do with records that are in both `train` and `test`, whose test results are published without noise.
    `report`: a warning and `privacy.json` say how many there are; the same source for both is refused. `refuse`: such
    records are refused too. `allow`: even the same source, if all of its records are public."""
    text: list[str] = ["text"]
    """Column or pair of columns with the text. For language modelling: a column of texts, `[prompt, completion]`, or a
    column of conversations (`{role, content}` messages); the loss covers completions and the assistant's turns."""
    image: str = "image"
    """Column with the image: encoded bytes, or a path relative to the file."""
    label: str = "label"
    """Column with the label: text or whole numbers; any number for regression."""
    labels: list[str] | None = Field(None, min_length=2)
    """Names of all labels, in order. By default those of the training data or, if the owners hold it, those of the
    first test set."""
    metrics: list[str] | None = None
    """Metrics reported on the test set, the main one first: any of `accuracy`, `f1`, `macro_f1`, `matthews`, by default
    `[accuracy]`; for regression any of `pearson`, `spearman`, by default both. For GLUE: `[f1, accuracy]` for MRPC and
    QQP, `[matthews]` for CoLA, the default for STS-B."""
    max_length: int = Field(128, ge=4, le=1_000_000)
    """Texts are truncated to this many tokens; nothing is padded to it. For question answering: tokens per window."""
    question: str = "question"
    """Question answering: column with the questions."""
    context: str = "context"
    """Question answering: column with the texts that contain the answers."""
    answers: str = "answers"
    """Question answering: column with the answers, `{text: […], answer_start: […]}`; empty lists if there is none."""
    stride: int = Field(128, ge=0, le=1_000_000)
    """Question answering: number of context tokens that consecutive windows share."""
    max_question: int = Field(64, ge=1, le=1_000_000)
    """Question answering: questions are truncated to this many tokens."""
    max_answer: int = Field(30, ge=1, le=1_000_000)
    """Question answering: maximum number of tokens in an answer."""
    null_threshold: float | None = None
    """Question answering: give no answer if that scores higher than the best answer by more than this; 0 for SQuAD
    v2.0. By default every question is answered, as in v1.1."""
    answer_tokens: int | None = Field(None, ge=1, le=100_000)
    """Language modelling: also decode this many tokens greedily after each test prompt, and report how often the answer
    is exactly the record's; this is then the main metric. By default it is the share of correctly predicted tokens."""
    answer_format: Literal["text", "gsm8k"] = "text"
    """Language modelling: `text` compares answers as text; `gsm8k` compares the number after `####` with the last
    number of the answer."""

    _paths = field_validator("train", "test")(check_paths)

    @field_validator("type", mode="before")
    @classmethod
    def _registered(cls, value: Any) -> Any:
        kinds = registered(TASK_KINDS)
        if value not in list(kinds):
            raise _mistake("no such kind of task", remedy_for_unknown(str(value), kinds))
        return value

    @field_validator("metrics")
    @classmethod
    def _of_this_kind(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        kind = info.data.get("type")
        if not value or kind is None:
            return value
        choices: tuple[str, ...] = registered(TASK_KINDS)[kind].load().metric_choices
        if not choices:
            raise _mistake(f"{kind} has fixed metrics", "remove task.metrics")
        for name in value:
            if name not in choices:
                raise _mistake(f"{name} is not a metric of {kind}", remedy_for_unknown(name, choices))
        return value

    _one_name_is_a_list = field_validator("text", mode="before")(one_as_list)

    @field_validator("test")
    @classmethod
    def _at_least_one(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        if isinstance(value, dict) and not (value and all(re.fullmatch(r"[A-Za-z][\w-]*", name) for name in value)):
            raise ValueError("give a source, or a mapping of names (letters, digits, - and _) to sources")
        return value

    @field_validator("text")
    @classmethod
    def _one_or_two(cls, value: list[str]) -> list[str]:
        if len(value) not in (1, 2):
            raise ValueError("give one text column, or two for a sentence pair")
        return value


class FederationConfig(Strict):
    """Who takes part, how often, and how long each client trains."""

    clients: int = Field(6, ge=1, le=100_000)
    """Number of owners."""
    partition: Literal[
        "dirichlet", "iid", "shards", "quantity", "column", "files", "as-lora-text", "as-lora-images"
    ] = "dirichlet"
    """How the training records are divided among the clients. `dirichlet`: skewed labels. `iid`: equal random parts.
    `shards`: few labels per client. `quantity`: skewed sizes, the same labels. `column`: by a column, one client for
    each value. `files`: one client for each file of `task.train`. `as-lora-text`, `as-lora-images`: skewed labels,
    drawn in the order of AS-LoRA's experiments; with `partition_seed: 42` the client sizes are the same as theirs."""
    alpha: float = Field(0.5, ge=1e-3, le=1e6)
    """Concentration of the Dirichlet distribution over the clients, for each label (`dirichlet`, `as-lora-…`) or for
    the sizes (`quantity`); a small value gives a skewed partition."""
    shards_per_client: int = Field(2, ge=1, le=1000)
    """For `shards`: approximately the number of labels that a client has."""
    by: str | None = None
    """For `column`: the column with the owner of each record, such as a hospital. Its sorted values are the clients."""
    min_records: int = Field(1, ge=1, lt=2**31)
    """Minimum number of records of a client. Random sizes are redrawn, up to 100 times, until all clients have that
    many; `batch_size` is a good choice, since no client may have fewer."""
    max_records: int | list[int] | None = None
    """Maximum number of records (or groups) that a client may declare: one number, or one for each client, such as the
    numbers that the owners registered before the run. A client that declares more is refused. Required across machines
    with `weights: records` or `noise`, where a client could otherwise declare its way to all of the weight."""
    partition_seed: int | None = Field(None, ge=0, lt=2**63)
    """Seeds the partition (NumPy's `default_rng`) with this number, to reproduce a published split or to keep the split
    while `seed` changes; by default a stream derived from `seed`."""
    rounds: int = Field(100, ge=1, le=1_000_000)
    """Number of rounds."""
    local_steps: int = Field(10, ge=1, le=1_000_000)
    """Number of noisy steps of each participating client in a round."""
    batch_size: int = Field(128, ge=1, lt=2**31)
    """Expected size of a Poisson batch: the sampling rate is batch_size / records."""
    participation: float = Field(1.0, gt=0, le=1)
    """Fraction of the clients in each round, in balanced rotation drawn from the public seed. With
    `privacy.unit: client`, the probability with which each client takes part, drawn in secret."""
    min_clients: int | None = Field(None, ge=1, le=100_000)
    """Minimum number of replies for a round to continue when clients fail, are late or send invalid replies. By default
    all participants of a round must reply; otherwise the run stops, and can be resumed at that round."""
    secure_sum: bool = False
    """Sum the clients' replies under masks, so that the server sees only their sum (`lorica.secure_sum`). Needs at
    least three clients per round and a method that needs only sums. It does not change ε."""
    private_test: float = Field(0.0, ge=0, lt=1)
    """Fraction of each client's records that it holds out for testing. Each record is held out or not by a hash of its
    own content and the seed, so the number varies a little. The results are private: they are written beside the
    ledger, for the owner, and do not appear in any report."""
    weights: Literal["uniform", "records", "noise"] = "uniform"
    """Weight of a client in the mean: `uniform`, in proportion to its `records`, or to 1/τ² of its `noise`. In a run
    without noise, `noise` means `records`."""
    evaluate_every: int = Field(1, ge=1, le=1_000_000)
    """Evaluate on the public test set every N rounds, and after the last round."""
    micro_batch_tokens: int | None = Field(None, ge=1, lt=2**31)
    """Padded tokens (text) or patches (images) in one forward pass; by default 1,024 on a CPU, where small passes over
    texts of equal length are fastest, and on a GPU as many as fit into half of the memory that the model leaves, at
    most 32,768. It is halved when a GPU runs out of memory. Bounds memory; changes results only by rounding."""

    @model_validator(mode="after")
    def _a_schedule_is_short(self) -> FederationConfig:
        if self.rounds * self.participants > 1_000_000:
            raise _mistake("more than 1,000,000 participations in total", "choose fewer rounds or participants")
        if self.rounds * self.local_steps > 1_000_000:
            raise _mistake("more than 1,000,000 steps in total", "choose fewer rounds or local steps")
        return self

    @property
    def participants(self) -> int:
        """Clients in a round."""
        return max(1, round(self.participation * self.clients))

    def most_records(self, client: int) -> int | None:
        """`max_records` of a client; None for no limit."""
        return self.max_records[client] if isinstance(self.max_records, list) else self.max_records

    @field_validator("by")
    @classmethod
    def _only_of_columns(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("partition") == "column":
            raise _mistake("federation.partition=column requires a column", "set federation.by to the name of a column")
        if value is not None and info.data.get("partition") != "column":
            raise _mistake(
                "used only with federation.partition=column", "remove federation.by, or set federation.partition=column"
            )
        return value

    @field_validator("max_records")
    @classmethod
    def _one_for_each_client(cls, value: int | list[int] | None, info: ValidationInfo) -> int | list[int] | None:
        if isinstance(value, list) and len(value) != info.data.get("clients"):
            raise _mistake(
                f"{len(value)} numbers for {info.data.get('clients')} clients", "give one number for each client"
            )
        if any(count < 1 for count in (value if isinstance(value, list) else [] if value is None else [value])):
            raise _mistake("a client has at least one record", "choose numbers of at least 1")
        return value


class OptimizerConfig(Strict):
    """The local optimiser; it sees only the noisy gradient."""

    name: Literal["sgd", "adamw"] = "sgd"
    """The optimiser starts afresh in every round; no state is carried over."""
    lr: float = Field(0.5, gt=0, le=1e6)
    """Learning rate."""
    lr_a: float | None = Field(None, gt=0, le=1e6)
    """Learning rate of the factors A, if different from `lr`."""
    lr_b: float | None = Field(None, gt=0, le=1e6)
    """Learning rate of the factors B, if different from `lr`. The head always uses `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rates over the rounds: `constant`, or falling from their full values in the first round towards zero
    after the last one, along a line or half a cosine. Late, small steps average out the noise of early ones."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(0.0, ge=0, le=1e6)
    """Coupled in SGD, decoupled in AdamW."""


class LocalConfig(Strict):
    """Additions to a client's step. They act on the noisy gradient or on public weights, so they cost no privacy."""

    fedprox: float = Field(0.0, ge=0, le=1e6)
    """FedProx: `μ` of the proximal term `μ (θ - θ_t)`, which pulls towards the start of the round."""
    scaffold: bool = False
    """SCAFFOLD: control variates, tracked by the server."""
    scaled_gd: bool = False
    """Precondition each factor's gradient by the other factor: `(BᵀB + δI)⁻¹ ∂L/∂A`, `∂L/∂B (AAᵀ + δI)⁻¹`."""
    damping: float = Field(0.1, ge=1e-9, le=1e9)
    """`δ` of `scaled_gd`; while a factor is near zero, noise is amplified by at most `1/δ`."""
    flat_lora: float = Field(0.0, ge=0, le=1000)
    """Flat-LoRA: `ρ` of the random noise added to the frozen weights in every step; the paper uses 0.05."""


class ServerConfig(Strict):
    """How the server combines a round's updates, and how it applies the result: post-processing of releases."""

    aggregate: Literal["mean", "median", "trimmed-mean", "krum"] = "mean"
    """`mean`: weighted by `federation.weights`. The others tolerate a few malicious clients and ignore weights; they
    act on what clients released. `median`, `trimmed-mean`: of each coordinate. `krum`: the one update nearest to its
    neighbours."""
    trim: float = Field(0.2, gt=0, lt=0.5)
    """For `trimmed-mean`: the fraction of the values that is cut off at each end."""
    byzantine: int = Field(1, ge=0, le=100_000)
    """For `krum`: the number `f` of malicious clients to tolerate; a round needs `2f + 3` replies."""
    optimizer: Literal["average", "fedavgm", "fedadam"] = "average"
    """`average`: add the update. `fedavgm`: add it with momentum. `fedadam`: Adam, with the known noise variance
    subtracted from its second moment."""
    lr: float = Field(1.0, gt=0, le=1e6)
    """Server learning rate. For `fedadam` it is the size of a step: start near 0.01."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of `fedavgm`; `β₁` of `fedadam`."""
    second_momentum: float = Field(0.99, ge=0, lt=1)
    """`β₂` of `fedadam`."""
    epsilon: float = Field(1e-3, ge=1e-12, le=1e6)
    """`ε` of `fedadam`."""
    denoise: Literal["none", "shrinkage", "kalman"] = "none"
    """`shrinkage`: optimal shrinkage of the update's singular values against the known noise. `kalman`: a scalar Kalman
    filter over rounds."""
    average: float = Field(0.0, ge=0, lt=1)
    """Decay `β` of the average of the model over rounds, which is then evaluated and exported; with 0, the model of the
    last round is used."""


class MethodConfig(BaseModel):
    """The method's name, and beside it the method's own options, which the method checks."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    name: Annotated[str, AfterValidator(current_method_name)] = "as-lora"
    """See `lorica methods`."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PrivacyConfig(Strict):
    """The guarantee that each owner gets."""

    unit: Literal["record", "group", "client"] = "record"
    """What is protected: one record of one client, all records of one group, such as a patient or a user, or everything
    of one client. The guarantee compares the run with one in which these contribute zero; the number of records, groups
    or clients is public. With `client`, the server is trusted: each client takes part in a round with the probability
    `federation.participation`, its whole update is clipped, and the noise is added to the sum of the updates. Only on
    one machine, and useful with some hundred clients in a round."""
    group: str | None = None
    """For `unit: group`: the column with the group of each record. A group is sampled, clipped and counted as one."""
    group_records: int = Field(8, ge=1, le=1_000_000)
    """For `unit: group`: maximum number of records of a group that are used, chosen by the public seed."""
    epsilon: float | None = Field(3.0, ge=0.01, le=100)
    """Target ε of each client over the whole run; the noise is calibrated to it. Above 10 it protects little, at 100
    nothing."""
    noise_multiplier: float | None = Field(None, ge=1e-3, le=1e6)
    """Set this and `epsilon: null` to fix the noise and compute ε from it. Below 0.2, ε is that of the looser RDP
    accountant."""
    delta: float = Field(1e-5, ge=1e-12, lt=0.5)
    """It must be below 1/records; with `noise: reproducible`, a warning says when it is not."""
    noise: Literal["secure", "reproducible", "none"] = "secure"
    """`secure`: noise from the operating system's entropy. `reproducible`: noise from the seed, for research; such a
    run is not a private release, and every report says so. `none`: no differential privacy; `epsilon`,
    `noise_multiplier`, `delta`, `noise_against` and `colluding` are ignored."""
    clip_norm: float | None = Field(2.0, ge=1e-6, le=1e9)
    """`C`: maximum norm of one record's gradient over all tensors trained in a step, or with `unit: client` of one
    client's update in a round. It holds without noise too, so that a comparison with and without noise compares nothing
    else; `null` switches it off, only with `noise: none`."""
    noise_against: Literal["replies", "sums"] = "replies"
    """What the noise protects a record in. `replies`: an owner's own noise suffices, whoever sees its replies. `sums`:
    the owners of a secure sum share the noise, so each adds less; the guarantee then holds against a server that sees
    sums over at least `federation.min_clients` owners. Needs `federation.secure_sum`, `min_clients` and one local step
    of SGD."""
    colluding: int = Field(1, ge=0, le=100_000)
    """For `noise_against: sums`: maximum number of owners that collude with the server, whose noise does not count."""
    ledger: str | None = None
    """SQLite file that records every release; by default beside the training data."""
    max_lifetime_epsilon: float | None = Field(None, gt=0)
    """The owner's limit for each record over all runs, in whichever file the record comes, with what other runs have
    reserved. A run that would exceed it is refused before it starts."""

    _paths = field_validator("ledger")(check_paths)

    @property
    def private(self) -> bool:
        """Whether clients add noise."""
        return self.noise != "none"

    @property
    def largest_norm(self) -> float:
        """`clip_norm`; infinite if nothing is clipped."""
        return math.inf if self.clip_norm is None else self.clip_norm

    @model_validator(mode="before")
    @classmethod
    def _without_noise_no_epsilon(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("noise") != "none":
            return content
        ignored = ("epsilon", "noise_multiplier", "delta", "noise_against", "colluding")
        return {key: value for key, value in content.items() if key not in ignored} | {"epsilon": None}

    @field_validator("clip_norm")
    @classmethod
    def _noise_needs_a_clip(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and info.data.get("noise") != "none":
            raise _mistake(
                "the noise is calibrated to the clip norm", "set privacy.clip_norm=2.0, or privacy.noise=none"
            )
        return value

    @model_validator(mode="after")
    def _a_group_has_a_column(self) -> PrivacyConfig:
        if (self.unit == "group") != (self.group is not None):
            raise ValueError("set unit: group and group: COLUMN together")
        return self

    @model_validator(mode="after")
    def _one_target(self) -> PrivacyConfig:
        if self.private and (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("set either epsilon or noise_multiplier, and set the other to null")
        return self


class FlowerConfig(Strict):
    """For `engine: flower`: which SuperLink, and how long the server waits."""

    superlink: str | None = None
    """Name of a SuperLink connection in Flower's `config.toml`; each client needs a SuperNode. By default Flower
    simulates the clients on this machine."""
    wait: float = Field(600.0, gt=0, le=1e7)
    """How many seconds the server waits for the clients before it starts."""
    timeout: float = Field(3600.0, gt=0, le=1e7)
    """How many seconds a client has to answer; after that the round continues without it."""


class ExperimentConfig(Strict):
    """A whole experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Names the run folder; the same name and configuration resume the run."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Public seed of client sampling, partition and initialisation. Never the source of secure noise."""
    output: str = "runs"
    """Folder in which the run folder `NAME` is created."""
    engine: Literal["local", "flower"] = "local"
    """What runs the clients: this process, or nodes that Flower connects."""
    report_to: list[str] = []
    """Trackers that get the run's public metrics, as in transformers: any of `tensorboard`, `wandb`, `trackio`,
    `mlflow`, or one from another package. Each needs its own package, such as `pip install "lorica[wandb]"`. See
    commands.md."""
    model: ModelConfig
    lora: LoraSection = LoraSection()
    task: TaskConfig
    federation: FederationConfig = FederationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    method: MethodConfig = MethodConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    """`privacy: none` is short for `privacy: {noise: none}`, a run without differential privacy that still clips. On
    the command line, `privacy=none` keeps the file's `clip_norm`."""
    flower: FlowerConfig = FlowerConfig()

    _paths = field_validator("output")(check_paths)

    _one_tracker_is_a_list = field_validator("report_to", mode="before")(one_as_list)

    @field_validator("report_to")
    @classmethod
    def _trackers_are_registered(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in registered(TRACKERS):
                raise _mistake("no such tracker", remedy_for_unknown(name, registered(TRACKERS)))
        return value

    @field_validator("privacy", mode="before")
    @classmethod
    def _none_is_short(cls, value: Any) -> Any:
        return {"noise": "none"} if value == "none" else value

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser() / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(source: str | Path | dict[str, Any] | None = None, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read, override and validate an experiment.

    Args:
        source: a YAML file, or its content as a dictionary; by default the embedded digits experiment.
        overrides: `section.key=value` strings; the value is YAML (`3`, `null`, `[query, value]`).

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown (the nearest known one is named), a value has
            the wrong type or is out of bounds.

    >>> config = load(overrides=["method.name=ffa-lora", "federation.rounds=3"])
    >>> config.method.name, config.federation.rounds
    ('ffa-lora', 3)
    """
    content = dict(source) if isinstance(source, dict) else read_yaml_file(Path(source or DEFAULT_CONFIG), "config")
    if content.get("privacy") == "none":
        content["privacy"] = {"noise": "none"}
    for override in overrides or []:
        _apply_override(content, override)
    config = validate(ExperimentConfig, content)
    _refuse_epsilon_without_noise(config, overrides or [])
    return config


def experiment_of(content: dict[str, Any]) -> dict[str, Any]:
    """The keys that must stay the same when a run is resumed: not where it runs, who is told, nor how many clients it
    waits for."""
    kept = {key: value for key, value in content.items() if key not in ("output", "engine", "report_to", "flower")}
    federation = {key: value for key, value in content.get("federation", {}).items() if key != "min_clients"}
    return kept | {"federation": federation}


def validate(model: type[Model], content: dict[str, Any], prefix: str = "") -> Model:
    """`model(**content)`, with pydantic's first complaint turned into one clear error.

    Args:
        prefix: where in the experiment `content` sits, such as `method`, for the error's key.

    Raises:
        UserError: names the key, its value and the remedy.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        path = [part for part in first["loc"] if isinstance(part, str) and part in _spelled(content)]
        key = ".".join([*([prefix] if prefix else []), *path]) or prefix or "experiment"
        if first["type"] == "extra_forbidden":
            raise UserError(key, first["input"], "unknown key", _nearest_key(model, path)) from None
        if first["type"] == "missing":
            missing = ".".join([*([prefix] if prefix else []), *(str(part) for part in first["loc"])])
            raise UserError(missing, None, "this key is required", f"add {missing} to the configuration") from None
        problem = first["msg"].removeprefix("Value error, ")
        remedy = first.get("ctx", {}).get("remedy", f"change {key}")
        if isinstance(first["input"], bool) and first["type"].startswith("string"):
            remedy = BOOLEANS
        raise UserError(key, first["input"], problem[:1].lower() + problem[1:], remedy) from None


def _spelled(content: Any) -> set[str]:
    """Every key that the user wrote; pydantic's error paths also hold names of union members, which nobody wrote."""
    if isinstance(content, list):
        return {key for value in content for key in _spelled(value)}
    if not isinstance(content, dict):
        return set()
    return set(content) | {key for value in content.values() for key in _spelled(value)}


def _nearest_key(model: type[BaseModel], path: list[str]) -> str:
    section = model
    for part in path[:-1]:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    known = list(section.model_fields)
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"choose one of: {', '.join(known)}"


def _refuse_epsilon_without_noise(config: ExperimentConfig, overrides: list[str]) -> None:
    """Where the file says that there is no noise, an override that only asks for an ε would have no effect."""
    given = dict(override.split("=", 1) for override in overrides)
    if config.privacy.private or given.keys() & {"privacy", "privacy.noise"}:
        return
    for key in ("privacy.epsilon", "privacy.noise_multiplier"):
        if given.get(key, "null") != "null":
            problem = "the experiment has no noise (privacy.noise: none)"
            raise UserError(key, given[key], problem, "add privacy.noise=secure")


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError("override", override, "not of the form section.key=value", "write it as privacy.epsilon=3")
    value = read_yaml(text, key, text, "put the value in quotes")
    if (key, value) == ("privacy", "none"):
        key = "privacy.noise"
    section = content
    *parents, last = key.split(".")
    for parent in parents:
        nested = section.get(parent)
        # A copy, so that the caller's dictionary stays as it was.
        section[parent] = dict(nested) if isinstance(nested, dict) else {}
        section = section[parent]
    section[last] = value
