"""Time and memory of one training step: plain LoRA, Lorica's DP step, and Opacus, on the same batch.

    python benchmarks/dp_step.py --threads 1 --clock cpu

Everything but the trained factors is frozen in all of them, attention is `eager`, and dropout is off except in one row.
Before anything is timed, Lorica's and Opacus' clipped sums are compared.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import transformers
import typer
from measuring import Clock, interleaved, machine, memory, ratio, verdict
from opacus import PrivacyEngine
from rich.console import Console
from rich.table import Table
from texts import draw_lengths
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import BaseModel
from lorica.config import LoraSection, ModelConfig, OptimizerConfig
from lorica.local.optimizers import make_optimizer
from lorica.privacy.clipping import clipped_sum
from lorica.privacy.gradients import TrainedTensor, per_example_gradients
from lorica.privacy.mechanism import Terms, noisy_gradient
from lorica.privacy.randomness import SecureRandomness
from lorica.tasks.images import ImageRecords
from lorica.tasks.records import Batch, Records
from lorica.tasks.text import TextRecords

RATE = 1e-3
NOISE_MULTIPLIER = 1.0
FACTORS = ("A", "B", "AB")
VOCABULARY = 30522
# What a run uses by default on a CPU, and more than any batch here has.
SORTED_TOKENS, ONE_PASS = 1024, 2**40
TOLERANCE = 1e-4
PLAIN_BAR, OPACUS_BAR = 1.10, 1.0
FORWARD, SORTED, HOOKS, GHOST = "forward only", "Lorica, sorted passes", "Opacus hooks", "Opacus ghost"
# As most text models ask for; `model.dropout=false` leaves it out.
DROPPING, DROPOUT = "Lorica, with dropout", 0.1

Step = Callable[[], None]
# Opacus' engine warns of insecure noise, and its hooks of inputs that need no gradient, in every process.
warnings.simplefilter("ignore")


class Model(StrEnum):
    """Which model to measure on."""

    bert = "bert"
    vit = "vit"


@dataclass(frozen=True)
class Workload:
    """A model and the size of its batch; `length` fixes the number of tokens of every text."""

    model: Model
    batch: int
    length: int | None
    layers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.model.name}, batch {self.batch}"


class Bench:
    """An adapted model, and one batch that every step uses.

    Args:
        clip_norm: by default the median norm of the examples' gradients, so that half of them are clipped.
    """

    def __init__(self, workload: Workload, clip_norm: float | None = None) -> None:
        self.workload = workload
        torch.set_num_threads(workload.threads)
        torch.manual_seed(0)
        network = _bert(workload.layers) if workload.model is Model.bert else _vit(workload.layers)
        base = BaseModel(
            model=network.eval().requires_grad_(False), head="classifier", head_is_new=False, new_modules=[]
        )
        settings = ModelConfig(base="random weights", head="freeze")
        self.model: AdaptedModel = adapt(base, LoraSection(), settings, 0, torch.device("cpu"))
        # At B = 0 the gradient of A would be zero.
        self.model.write({name: 0.05 * torch.randn(value.shape) for name, value in self.model.read().items()})
        self.model.peft_model.train()
        self.records = _texts(workload) if workload.model is Model.bert else _images(workload)
        self.batch: Batch = self.records.batch(np.arange(len(self.records)))
        if clip_norm is None:
            gradients = [gradient.flatten(1) for gradient in self.gradients("AB").values()]
            clip_norm = float(torch.cat(gradients, dim=1).norm(dim=1).median())
        self.clip_norm = clip_norm

    def trained(self, factors: str) -> dict[str, TrainedTensor]:
        return {name: place for name, place in self.model.tensors.items() if name.rsplit(".", 1)[-1] in factors}

    def gradients(self, factors: str) -> dict[str, Tensor]:
        """Lorica's per-example gradients."""
        return per_example_gradients(
            lambda: self.model.losses(self.model.peft_model, self.batch), self.trained(factors), len(self.batch)
        )

    def steps(self) -> dict[str, Step]:
        """Every step by the name of its row."""
        return {name: self.step(name) for name in rows_of(self.workload.model)}

    def step(self, name: str) -> Step:
        """One step by the name of its row."""
        if name == FORWARD:
            return self._forward
        if name in (HOOKS, GHOST):
            return self._opacus(name)
        if name == DROPPING:
            return self._dropping()
        kind, factors = name.rsplit(" ", 1) if name != SORTED else (SORTED, "AB")
        if kind == "plain":
            return self._plain(factors)
        return self._lorica(factors, SORTED_TOKENS if name == SORTED else ONE_PASS)

    def check(self) -> None:
        """Compare Lorica's clipped sum with those of both Opacus modes.

        Raises:
            RuntimeError: they differ, so that a comparison of their speed would mean nothing.
        """
        expected = clipped_sum(self.gradients("AB"), self.clip_norm)
        for mode in (HOOKS, GHOST):
            opacus = self.opacus(mode)
            opacus.losses(self.batch).backward()
            if mode == HOOKS:
                opacus.optimizer.clip_and_accumulate()
            # Ghost mode leaves the clipped sum where plain training leaves its gradient.
            found = [parameter.summed_grad if mode == HOOKS else parameter.grad for parameter in opacus.parameters]
            theirs = torch.cat([value.flatten() for value in found])
            ours = torch.cat([expected[name].flatten() for name in self.trained("AB")])
            difference, size = (ours - theirs).norm(), ours.norm()
            if not difference <= TOLERANCE * size:
                raise RuntimeError(f"{mode}: clipped sums differ by {float(difference / size):.1e} of their norm")

    def opacus(self, mode: str) -> Opacus:
        """A copy of the model under Opacus, both factors trained."""
        model = copy.deepcopy(self.model.peft_model)
        paths = {module: path for path, module in self.model.peft_model.named_modules()}
        parameters = [
            getattr(model.get_submodule(paths[module]), kind) for module, kind, _ in self.trained("AB").values()
        ]
        for parameter in parameters:
            parameter.requires_grad_(True)
        made = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(parameters, lr=RATE),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(self.batch.labels), batch_size=len(self.batch)),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=self.clip_norm,
            poisson_sampling=False,
            grad_sample_mode="hooks" if mode == HOOKS else "ghost",
        )
        # Ghost mode clips only what goes through the criterion that it returns.
        return Opacus(made[0], parameters, made[1], nn.CrossEntropyLoss() if mode == HOOKS else made[2])

    def _forward(self) -> None:
        with torch.no_grad():
            self.model.losses(self.model.peft_model, self.batch)

    def _plain(self, factors: str) -> Step:
        parameters = [getattr(module, kind) for module, kind, _ in self.trained(factors).values()]
        optimizer = torch.optim.SGD(parameters, lr=RATE)

        def step() -> None:
            # The other steps on this model need it frozen.
            for parameter in parameters:
                parameter.requires_grad_(True)
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model.peft_model(**self.batch.inputs).logits, self.batch.labels).backward()
            optimizer.step()
            for parameter in parameters:
                parameter.requires_grad_(False)

        return step

    def _lorica(self, factors: str, micro_batch_tokens: int) -> Step:
        trained = self.trained(factors)
        optimizer = make_optimizer(OptimizerConfig(), dict.fromkeys(trained, RATE))
        # At a sampling rate of 1, every batch is the whole of the records.
        terms = Terms(1.0, len(self.records), self.clip_norm, NOISE_MULTIPLIER)
        randomness = SecureRandomness()

        def step() -> None:
            gradients = noisy_gradient(
                self.model.peft_model,
                self.model.losses,
                trained,
                self.records,
                terms,
                randomness,
                micro_batch_tokens,
            )
            values = {name: getattr(module, kind).detach() for name, (module, kind, _) in trained.items()}
            increments = optimizer.step(gradients, values)
            self.model.write({name: value + increments[name].tensor for name, value in values.items()})

        return step

    def _dropping(self) -> Step:
        one_pass = self._lorica("AB", ONE_PASS)
        dropouts = [module for module in self.model.peft_model.modules() if isinstance(module, nn.Dropout)]

        def step() -> None:
            for module in dropouts:
                module.p = DROPOUT
            one_pass()
            # The other steps on this model have none.
            for module in dropouts:
                module.p = 0.0

        return step

    def _opacus(self, mode: str) -> Step:
        opacus = self.opacus(mode)

        def step() -> None:
            opacus.optimizer.zero_grad()
            opacus.losses(self.batch).backward()
            opacus.optimizer.step()

        return step


class Opacus(NamedTuple):
    """What Opacus made of a model; `parameters` are the trained ones."""

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: Any
    criterion: Any

    def losses(self, batch: Batch) -> Any:
        return self.criterion(self.model(**batch.inputs).logits, batch.labels)


ROWS = [
    FORWARD,
    *(f"{kind} {factors}" for factors in FACTORS for kind in ("plain", "Lorica")),
    SORTED,
    HOOKS,
    GHOST,
]


def rows_of(model: Model) -> list[str]:
    """Rows of a model's table; images are usually trained without dropout."""
    return [*ROWS, DROPPING] if model is Model.bert else ROWS


def _bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return transformers.BertForSequenceClassification(config)


def _vit(layers: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        num_labels=10,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(config)


def _texts(workload: Workload) -> Records:
    draws = np.random.default_rng(0)
    n = workload.batch
    # Sorted, as `micro_batches` does it, so that all steps see the same rows in the same order.
    sizes = np.sort(draw_lengths(n, draws)) if workload.length is None else np.full(n, workload.length)
    tokens = draws.integers(1000, VOCABULARY, sizes.sum(), dtype=np.int32)
    return TextRecords(
        labels=draws.integers(0, 2, n),
        digests=np.zeros((n, 32), dtype=np.uint8),
        tokens=tokens,
        token_types=np.zeros(len(tokens), dtype=np.int8),
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        pad=0,
        pad_type=0,
    )


def _images(workload: Workload) -> Records:
    n = workload.batch
    return ImageRecords(
        labels=np.random.default_rng(0).integers(0, 10, n),
        digests=np.zeros((n, 32), dtype=np.uint8),
        pixels=torch.randn(n, 3, 32, 32).numpy(),
        rows=np.arange(n),
        patches=65,
    )


def peak_memory(workload: Workload, clip_norm: float, row: str) -> int | None:
    """Bytes that two steps hold at most beyond what the process held with model and batch in place."""
    step = Bench(workload, clip_norm).step(row)
    before = memory("VmRSS")
    for _ in range(2):
        step()
    peak = memory("VmHWM")
    return None if before is None or peak is None else peak - before


def measure(workload: Workload, repeats: int, clock: Clock) -> dict[str, dict[str, Any]]:
    """Row -> seconds of each repeat, and peak memory."""
    bench = Bench(workload)
    bench.check()
    # Each step in a process of its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        peaks = list(pool.map(partial(peak_memory, workload, bench.clip_norm), rows_of(workload.model)))
    seconds = interleaved(bench.steps(), repeats, clock)
    return {row: {"seconds": seconds[row], "peak_bytes": peak} for row, peak in zip(seconds, peaks, strict=True)}


def plain_row(row: str) -> str:
    """The plain step that trains the same factors."""
    return f"plain {row.rsplit(' ', 1)[-1]}" if row.startswith(("plain", "Lorica ")) else "plain AB"


def table(workload: Workload, rows: dict[str, dict[str, Any]]) -> Table:
    length = f", all texts {workload.length} tokens" if workload.length else ""
    result = Table("step", "seconds", "to plain", "peak memory", title=f"{workload}{length}")
    for row, found in rows.items():
        peak = found["peak_bytes"]
        result.add_row(
            row,
            f"{statistics.median(found['seconds']):.3f}",
            f"{ratio(found['seconds'], rows[plain_row(row)]['seconds']):.3f}",
            "-" if peak is None else f"{peak / 2**20:.0f} MiB",
        )
    return result


def main(
    model: Annotated[list[Model] | None, typer.Option(help="Default: both.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Default: 32 and 64.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of every text; default: lengths as in SST-2.")] = None,
    layers: int = 6,
    repeats: int = 15,
    threads: Annotated[int | None, typer.Option(help="Default: as many as PyTorch takes.")] = None,
    clock: Annotated[Clock, typer.Option(help="cpu, with one thread, on a machine that others use.")] = Clock.wall,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the measurements here.")] = None,
) -> None:
    """Measure every step, print a table for each model and batch size, and hold them against two bars."""
    console = Console()
    torch.set_num_threads(threads or torch.get_num_threads())
    console.print(machine(clock))
    results = {}
    for kind in model or list(Model):
        for size in batch or [32, 64]:
            workload = Workload(kind, size, length, layers, torch.get_num_threads())
            results[workload] = measure(workload, repeats, clock)
            console.print(table(workload, results[workload]))
    console.print(
        "Seconds: median. To plain: median ratio to the plain step with the same factors, measured in turn.\n"
        "Peak memory: most resident memory of a process that only takes this step, less what it held before the first."
    )
    plain = {
        f"{workload}, {factors}": ratio(rows[f"Lorica {factors}"]["seconds"], rows[f"plain {factors}"]["seconds"])
        for workload, rows in results.items()
        for factors in FACTORS
    }
    opacus = {
        str(workload): max(ratio(rows["Lorica AB"]["seconds"], rows[mode]["seconds"]) for mode in (HOOKS, GHOST))
        for workload, rows in results.items()
    }
    _print_bar(console, "bar 1: Lorica's DP step / plain step", plain, PLAIN_BAR)
    _print_bar(console, "bar 2: Lorica's DP step / the faster Opacus mode", opacus, OPACUS_BAR)
    if json_path is not None:
        content = {
            "machine": machine(clock),
            "results": [{"workload": asdict(workload), "rows": rows} for workload, rows in results.items()],
        }
        json_path.write_text(json.dumps(content, indent=2))


def _print_bar(console: Console, name: str, values: dict[str, float], bar: float) -> None:
    worst = max(values, key=lambda key: values[key])
    met = verdict(values[worst] <= bar)
    console.print(f"{name} <= {bar:.2f}: {values[worst]:.3f} at worst ({worst}): {met}")


if __name__ == "__main__":
    typer.run(main)
