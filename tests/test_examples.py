"""Every example is valid, affords its privacy, and runs: here on tiny random models and made-up records."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from PIL import Image
from pyarrow import parquet

import lorica
from lorica.config import DEFAULT_CONFIG, ExperimentConfig, PrivacyConfig, load
from lorica.methods.base import registry
from lorica.privacy import accounting
from lorica.privacy.accounting import Steps, epsilon, epsilon_rdp
from lorica.privacy.plan import plan_client
from lorica.schedule import participation_schedule
from lorica.streams import stream_seed
from lorica.tasks.partition import partition
from lorica.testing.models import TEXT
from tests.tasks.conftest import WORDS, write_tokenizer
from tests.tiers import integration

pytestmark = pytest.mark.usefixtures("checked_once")
EXAMPLES = Path(__file__).parent.parent / "examples"
PATHS = sorted(EXAMPLES.glob("*.yaml"))
each_example = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
Row = dict[str, Any]


# What the examples train on, as the data sets are: their columns, how many records, how many labels.


def _text(index: int, draws: np.random.Generator) -> str:
    return " ".join(draws.choice(WORDS, draws.integers(2, 8)))


def _sentence(labels: int, *columns: str) -> Callable[[int, np.random.Generator], Row]:
    def row(index: int, draws: np.random.Generator) -> Row:
        return {column: _text(index, draws) for column in columns} | {"label": index % labels, "idx": index}

    return row


def _image(image: str, label: str) -> Callable[[int, np.random.Generator], Row]:
    def row(index: int, draws: np.random.Generator) -> Row:
        encoded = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(encoded, format="PNG")
        return {image: {"bytes": encoded.getvalue(), "path": None}, label: index % 3}

    return row


def _question(unanswered: bool) -> Callable[[int, np.random.Generator], Row]:
    def row(index: int, draws: np.random.Generator) -> Row:
        words = list(draws.choice(WORDS, 12))
        start = len(" ".join(words[:4])) + 1
        known = not (unanswered and index % 3 == 0)
        answers = {"text": [words[4]] if known else [], "answer_start": [start] if known else []}
        return {"id": str(index), "question": words[4], "context": " ".join(words), "answers": answers}

    return row


def _instruction(index: int, draws: np.random.Generator) -> Row:
    return {"instruction": _text(index, draws), "context": "", "response": _text(index, draws)}


@dataclass(frozen=True)
class DataSet:
    """Training records and labels of the real data set, and a maker of rows with its columns."""

    records: int
    labels: int
    row: Callable[[int, np.random.Generator], Row]


INFERENCE = _sentence(3, "premise", "hypothesis")
CIFAR = _image("img", "fine_label")
DATA = {
    "nyu-mll/glue:sst2[train]": DataSet(67_349, 2, _sentence(2, "sentence")),
    "nyu-mll/glue:qnli[train]": DataSet(104_743, 2, _sentence(2, "question", "sentence")),
    "nyu-mll/glue:qqp[train]": DataSet(363_846, 2, _sentence(2, "question1", "question2")),
    "nyu-mll/glue:mnli[train]": DataSet(392_702, 3, INFERENCE),
    "snli_train.parquet": DataSet(549_367, 3, INFERENCE),
    "rajpurkar/squad[train]": DataSet(87_599, 0, _question(False)),
    "rajpurkar/squad_v2[train]": DataSet(130_319, 0, _question(True)),
    # About as many as the commands in the example leave.
    "dolly_train.parquet": DataSet(14_000, 0, _instruction),
    "uoft-cs/cifar100[train]": DataSet(50_000, 100, CIFAR),
    "uoft-cs/cifar100[train[:7000]]": DataSet(7_000, 100, CIFAR),
    "zh-plus/tiny-imagenet[train]": DataSet(100_000, 200, _image("image", "label")),
    "lorica:digits/train": DataSet(1_437, 10, _image("image", "label")),
}


def data_of(config: ExperimentConfig) -> DataSet:
    assert isinstance(config.task.train, str)
    return DATA[config.task.train]


@each_example
def test_valid(path: Path) -> None:
    assert load(path).name == path.stem
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"lorica run examples/{path.name}" in text
    assert max(map(len, text.splitlines())) <= 120
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*PATHS, EXAMPLES / "README.md"], ids=lambda path: path.stem)
def test_the_commands_in_comments_are_valid(path: Path) -> None:
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()]
    commands = re.findall(r"^lorica run (.*)$", "\n".join(lines).replace("\\\n", " "), flags=re.M)
    assert commands
    for command in commands:
        example, *overrides = shlex.split(command)
        config = load(EXAMPLES.parent / example, overrides)
        registry()[config.method.name].Options(**config.method.options)


def test_the_digits_are_those_of_the_default() -> None:
    default = load(DEFAULT_CONFIG)
    assert load(EXAMPLES / "digits-vit.yaml") == default.model_copy(update={"name": "digits-vit"})


# Privacy.


@dataclass(frozen=True)
class Owner:
    """A client of average size: its records, and the steps that the schedule gives it.

    With client-level DP, all clients together: the records are clients, the batches and steps are rounds.
    """

    records: int
    batch_size: int
    steps: int

    @classmethod
    def of(cls, config: ExperimentConfig) -> Owner:
        federation = config.federation
        if config.privacy.unit == "client":
            return cls(federation.clients, federation.participants, federation.rounds)
        schedule = participation_schedule(federation.clients, federation.rounds, federation.participants, config.seed)
        rounds = max(sum(client in participants for participants in schedule) for client in range(federation.clients))
        records = data_of(config).records // federation.clients
        return cls(records, federation.batch_size, federation.local_steps * rounds)


@pytest.mark.parametrize("path", [PATHS[0], *integration(*PATHS[1:])], ids=lambda path: path.stem)
def test_the_budget_suffices_with_sane_noise(path: Path) -> None:
    """Less ε than the budget with much noise and more with little: what is planned lies between."""
    config = load(path)
    owner = Owner.of(config)
    if not config.privacy.private:
        return
    rate = owner.batch_size / owner.records
    assert config.privacy.epsilon is not None
    little, much = ([Steps(rate, sigma, owner.steps)] for sigma in (0.3, 20))
    # The bounds of ε take milliseconds, and ε with little noise a second.
    assert epsilon_rdp(much, config.privacy.delta) < config.privacy.epsilon
    if accounting._least_epsilon(tuple(little)) <= config.privacy.epsilon:
        assert config.privacy.epsilon < epsilon(little, config.privacy.delta)


@cache
def planned(
    records: int, batch_size: int, steps: int, privacy: PrivacyConfig, members: int | None
) -> tuple[float, float]:
    """Noise multiplier and ε of a client: a second or two, so examples with the same numbers share them."""
    plan = plan_client(0, records, batch_size, steps, privacy, members)
    return plan.terms.noise_multiplier, epsilon([plan.steps(steps)], privacy.delta)


@each_example
@pytest.mark.slow
def test_the_noise_that_is_planned_spends_the_budget(path: Path) -> None:
    config = load(path)
    owner = Owner.of(config)
    if not config.privacy.private:
        plan = plan_client(0, owner.records, owner.batch_size, owner.steps, config.privacy)
        assert plan.epsilon() == float("inf")
        return
    members = config.federation.min_clients
    noise_multiplier, spent = planned(owner.records, owner.batch_size, owner.steps, config.privacy, members)
    assert 0.3 < noise_multiplier < 20
    assert config.privacy.epsilon is not None
    assert 0.9 * config.privacy.epsilon < spent <= config.privacy.epsilon


@each_example
def test_every_client_has_records_for_a_batch_and_for_its_delta(path: Path) -> None:
    """Under the example's own division, were all labels equally frequent."""
    config = load(path)
    data = data_of(config)
    labels = np.arange(data.records) % max(data.labels, 1)
    parts = partition(labels, config.federation, stream_seed(config.seed, "partition"))
    if config.privacy.unit == "client":
        # Their own batches protect nobody; a client with fewer records uses all of them.
        assert min(map(len, parts)) >= 1
        return
    assert min(map(len, parts)) >= config.federation.batch_size
    if config.privacy.noise == "secure":
        assert config.privacy.delta < 1 / max(map(len, parts))


# Whole runs on stand-ins.


def _roberta(folder: Path) -> None:
    write_tokenizer(folder, model_input_names=["input_ids", "attention_mask"])
    settings = TEXT | {"max_position_embeddings": 514, "type_vocab_size": 1}
    del settings["num_labels"]
    # A language model's checkpoint, as the real one: the heads of tasks are new.
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(**settings)).save_pretrained(folder)


def _bert(folder: Path) -> None:
    write_tokenizer(folder)
    settings = {key: value for key, value in TEXT.items() if key != "num_labels"}
    transformers.BertModel(transformers.BertConfig(**settings | {"max_position_embeddings": 512})).save_pretrained(
        folder
    )


def _llama(folder: Path) -> None:
    write_tokenizer(folder, frame=False, eos_token="[SEP]")
    config = transformers.LlamaConfig(
        vocab_size=TEXT["vocab_size"],
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _processor(folder: Path) -> None:
    size = {"height": 16, "width": 16}
    settings = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.5] * 3}))


def _vit_without_a_head(folder: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**VISION, intermediate_size=32)).save_pretrained(folder)
    _processor(folder)


def _vit_with_a_head(folder: Path) -> None:
    config = transformers.ViTConfig(**VISION, intermediate_size=32, num_labels=7)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    _processor(folder)


def _swin(folder: Path) -> None:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2, num_labels=7
    )
    transformers.SwinForImageClassification(config).save_pretrained(folder)
    _processor(folder)


BASES = {
    "FacebookAI/roberta-large": _roberta,
    "FacebookAI/roberta-base": _roberta,
    "sentence-transformers/all-MiniLM-L6-v2": _bert,
    "meta-llama/Llama-2-7b-hf": _llama,
    "google/vit-large-patch16-224-in21k": _vit_without_a_head,
    "WinKawaks/vit-tiny-patch16-224": _vit_with_a_head,
    "microsoft/swin-tiny-patch4-window7-224": _swin,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """From a hub id to the folder of a tiny model of its family, with random weights."""

    @cache
    def make(write: Callable[[Path], None]) -> str:
        folder = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        write(folder)
        return str(folder)

    return lambda name: name if name.startswith("lorica:") else make(BASES[name])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DataSet, str, int], str]:
    """From a data set to a file of made-up records with its columns."""

    @cache
    def make(data: DataSet, name: str, count: int) -> str:
        draws = np.random.default_rng(len(name))
        rows = [data.row(index, draws) for index in range(count)]
        folder = tmp_path_factory.mktemp("data")
        if any(isinstance(value, dict) and "bytes" in value for value in rows[0].values()):
            parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
            return str(folder / f"{name}.parquet")
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return str(folder / f"{name}.jsonl")

    return make


# One for each kind of task.
OFTEN = {"as-lora-sst2", "as-lora-cifar100", "as-lora-squad-v2", "fedask-dolly"}


def tier(path: Path) -> Any:
    if path.stem == "as-lora-sst2":
        return []
    return pytest.mark.integration if path.stem in OFTEN else pytest.mark.slow


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=tier(path)) for path in PATHS],
)
def test_a_round_runs_on_stand_ins(
    path: Path, base: Callable[[str], str], source: Callable[[DataSet, str, int], str], tmp_path: Path
) -> None:
    """All that the configuration names fits together; only sizes, places and what the machine must have are changed."""
    config = load(path)
    data = data_of(config)
    content = config.model_dump(mode="json")
    content["output"] = str(tmp_path / "runs")
    content["model"] |= {"base": base(config.model.base), "device": "cpu", "precision": "fp32", "threads": 1}
    content["lora"] |= {"r": 2}
    tests = config.task.test
    made = source(data, "test", 20) if isinstance(tests, str) else {name: source(data, name, 20) for name in tests}
    content["task"] |= {"train": source(data, "train", 60), "test": made}
    sizes = {"clients": 2, "rounds": 1, "local_steps": 2, "batch_size": 8, "min_records": 1}
    content["federation"] |= sizes | {"partition": "iid", "partition_seed": None}
    if config.federation.secure_sum:
        content["federation"] |= {"clients": 3, "min_clients": 3, "local_steps": config.federation.local_steps}
    content["privacy"] |= {"ledger": str(tmp_path / "ledger")}
    if config.privacy.private:
        content["privacy"] |= {"noise": "reproducible"}
    result = lorica.Experiment.load(content).run()
    assert len(result.metrics) == 2
    assert np.isfinite(result.metrics[-1]["loss"])
    if not isinstance(tests, str):
        assert {f"{name}_loss" for name in list(tests)[1:]} <= set(result.metrics[-1])
    assert not config.privacy.private or result.epsilon <= config.privacy.epsilon
    assert (result.folder / "report.html").is_file()
