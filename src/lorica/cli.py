"""The `lorica` command: parsing and printing."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import lorica
from lorica.errors import UserError

if TYPE_CHECKING:
    from lorica.benchmark.suite import Suite
    from lorica.config import ExperimentConfig
    from lorica.reporting.benchmark import BenchmarkRun
    from lorica.run.setup import Prepared
    from lorica.server.federation import Federation

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
flower = typer.Typer(no_args_is_help=True, help="Federations across machines, over Flower.")
app.add_typer(flower, name="flower")
console = Console()
# A console that is not UTF-8 shows a question mark for ε and σ; without this, it ends the command.
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="replace")

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides section.key=value, such as privacy.epsilon=1.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorica {lorica.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Federated LoRA fine-tuning under differential privacy."""


@app.command()
def run(
    config: Annotated[
        str | None, typer.Argument(help="Experiment (YAML file). Default: the embedded digits experiment.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train a LoRA adapter in a federation, or resume an interrupted run."""
    with _errors():
        experiment_config = _load(config, overrides)
        # After the configuration is known to be sound: these bring PyTorch and take seconds.
        from lorica.experiment import Experiment
        from lorica.reporting.run_folder import read_run
        from lorica.reporting.tables import run_table

        with _Rounds() as rounds:
            result = Experiment(experiment_config).run(rounds.start, rounds.round)
        if not rounds.started and experiment_config.engine == "local":
            again = f"name={_next_name(result.folder)}"
            console.print(
                f"This run has already finished; these are its results. To start a new run: lorica run … {again}"
            )
        console.print(run_table(read_run(result.folder)))


@app.command()
def compare(
    config: Annotated[
        str | None, typer.Argument(help="Experiment (YAML file). Default: the embedded digits experiment.")
    ] = None,
    overrides: Overrides = None,
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated, with options after a colon: as-lora:score=energy+server.denoise=kalman."),
    ] = "as-lora,ffa-lora,ro-lora,fed-avg",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
) -> None:
    """Run several methods with several seeds and compare them. Interrupted runs are resumed."""
    with _errors():
        experiment_config = _load(config, overrides)
        every_seed = _seeds(seeds)
        from lorica.run.variants import parse_variant

        variants = [parse_variant(label.strip(), experiment_config) for label in re.split(r",(?![^\[]*\])", methods)]
        # After every argument is known to be sound: these bring transformers and PEFT, and take seconds.
        from lorica.compare import compare as compare_methods
        from lorica.reporting.tables import comparison_table

        with _Rounds() as rounds:
            page, results = compare_methods(
                experiment_config,
                variants,
                every_seed,
                lambda label, seed, index, count: console.rule(f"{label}, seed {seed} ({index} of {count})"),
                rounds.start,
                rounds.round,
            )
        console.print(comparison_table(results))
        console.print(f"Comparison: {page}")


@app.command()
def benchmark(
    suite: Annotated[Path, typer.Argument(help="Suite (YAML file): settings, methods, learning rates, seeds.")],
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at once, each in a process of its own.")] = 1,
    settings: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Run only settings whose name contains TEXT.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write table, plots and page from what is finished.")
    ] = False,
) -> None:
    """Tune methods alike and compare them over settings and seeds. Run it again to resume it."""
    with _errors("Finished runs are kept; the same command continues."):
        from lorica.benchmark.results import read_results
        from lorica.benchmark.suite import load_suite

        whole = load_suite(suite, overrides)
        chosen = whole if settings is None else whole.only(settings)
        if not report_only:
            from lorica.benchmark.runner import run_suite, worker_processes

            with _Runs(chosen) as runs, worker_processes(jobs) as executor:
                run_suite(chosen, executor, jobs, runs.show)
        from lorica.reporting.html import write_benchmark

        results = read_results(whole.folder)
        page = write_benchmark(whole.folder, whole.with_results(results))
        console.print(f"Benchmark: {page}", soft_wrap=True)


@app.command()
def methods() -> None:
    """List the methods: what each trains and sends, whether its aggregation is exact, its DP status, its paper."""
    with _errors():
        from lorica.reporting.methods import methods_table

        console.print(methods_table())


@app.command("new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by dashes, such as my-lora.")],
    folder: Annotated[Path, typer.Option(help="Folder in which the package lorica-NAME is created.")] = Path(),
) -> None:
    """Create a working package for your own method, with its class, entry point and tests."""
    with _errors():
        from lorica.templates.new_method import write_package

        package = write_package(name, folder)
        console.print(f"Created {package}. Next: pip install -e {package}, then see its README.md", soft_wrap=True)


@app.command()
def account(
    records: Annotated[int, typer.Option(min=1, help="Number of records of the client.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Expected batch size.")],
    steps: Annotated[
        int, typer.Option(min=1, max=10**6, help="Total number of noisy steps: rounds times local steps.")
    ],
    delta: Annotated[float, typer.Option(help="δ, below 1/records.")] = 1e-5,
    epsilon: Annotated[float | None, typer.Option(help="Compute the noise multiplier for this ε.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Compute the ε of this noise multiplier.")] = None,
) -> None:
    """Compute the noise multiplier for an ε, or the ε for a noise multiplier, with two accountants."""
    with _errors():
        if (epsilon is None) == (noise_multiplier is None):
            problem = "exactly one of --epsilon and --noise-multiplier is required"
            raise UserError("--epsilon", epsilon, problem, "give one of them")
        from lorica.config import PrivacyConfig, validate
        from lorica.privacy.plan import plan_client

        content = {"epsilon": epsilon, "noise_multiplier": noise_multiplier, "delta": delta}
        plan = plan_client(0, records, batch_size, steps, validate(PrivacyConfig, content, prefix="account"))
        table = Table(show_header=False)
        table.add_row("sampling rate q", f"{plan.terms.sampling_rate:.6g}")
        table.add_row("steps", str(steps))
        table.add_row("noise multiplier σ", f"{plan.terms.noise_multiplier:.4f}")
        table.add_row("δ", f"{delta:g}")
        table.add_row("ε by PLD", f"{plan.epsilon():.4f}")
        table.add_row("ε by RDP (cross-check, looser)", f"{plan.epsilon_rdp():.4f}")
        console.print(table)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, such as runs/NAME.")]) -> None:
    """Recreate the HTML report and plots of a run from its files."""
    with _errors():
        from lorica.reporting.html import write_report

        console.print(f"Report: {write_report(folder)}")


@app.command("hash")
def hash_base(folder: Annotated[str, typer.Argument(help="Folder of a model, or lorica:glyph-vit.")]) -> None:
    """Print the hash of a base model, for `base_models` in an owner's policy."""
    with _errors():
        from lorica.adapters.base_files import hash_of_base

        console.print(hash_of_base(folder), soft_wrap=True, highlight=False)


@app.command()
def budget(
    path: Annotated[Path, typer.Argument(help="A ledger, or the data next to it.")],
    delta: Annotated[float | None, typer.Option(help="δ for all ε. Default: the policy's, or 1e-5.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="The owner's policy (YAML file), to show the budget that is left.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    release: Annotated[
        str | None, typer.Option(metavar="RUN", help="Release the budget reserved by RUN, which will not continue.")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Accept that the ledger is lost, older or changed.")] = False,
) -> None:
    """Show what was released from an owner's data: when, in which run, at what ε. Only --release and --accept write."""
    with _errors():
        if delta is not None and not 1e-12 <= delta < 0.5:
            raise UserError("--delta", delta, "not between 1e-12 and 0.5", "choose a value below 1/records")
        if delta is not None and policy is not None:
            raise UserError("--delta", delta, "the policy has its own δ", "remove --delta or --policy")
        from lorica.privacy.ledger_file import accept_ledger, find_ledger, release_reservation
        from lorica.privacy.policy import load_policy
        from lorica.reporting.budget import budget_table, read_budget

        if accept:
            ledger = find_ledger(path, lost=True)
            accept_ledger(ledger)
            if not ledger.is_file():
                console.print(f"The next run starts a new ledger at {ledger}.", soft_wrap=True, highlight=False)
                return
        if release is not None:
            release_reservation(find_ledger(path), release)
        found = read_budget(path, delta or 1e-5, None if policy is None else load_policy(policy))
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            console.print(budget_table(found))


@flower.command("init")
def flower_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the Flower app.")],
    config: Annotated[
        str | None, typer.Argument(help="Experiment (YAML file). Default: the embedded digits experiment.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Create a Flower app that runs an experiment, with a template of a policy and the commands to run it."""
    with _errors():
        experiment_config = _load(config, overrides)
        from lorica.engines.flower.launch import with_absolute_paths, write_app

        write_app(with_absolute_paths(experiment_config), folder)
        console.print(f"Created the Flower app {escape(str(folder))}. Next:", soft_wrap=True)
        superlink = experiment_config.flower.superlink
        nodes = f'local --stream --federation-config "num-supernodes={experiment_config.federation.clients}"'
        where = nodes if superlink is None else f"{shlex.quote(superlink)} --stream"
        command = f"flwr run {shlex.quote(str(folder))} {where}"
        console.print(f"  {escape(command)}", soft_wrap=True, highlight=False)
        console.print(f"All commands are in {escape(str(folder / 'README.md'))}.", soft_wrap=True)


@flower.command("node", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def flower_node(context: typer.Context) -> None:
    """Start an owner's node: `flower-supernode` with its options, running this Lorica and no code from the server."""
    with _errors():
        from lorica.engines.flower.sealed import become_node

        become_node(context.args)


@flower.command("keys")
def flower_keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of identity.key and identity.pub.")],
    name: Annotated[str, typer.Option(help="Name of the owner, for the other owners' logs.")] = "owner",
) -> None:
    """Create an owner's identity key for secure sums, and print the line for `members` in the owners' policies."""
    with _errors():
        from lorica.owner.identity import make_identity

        typer.echo(make_identity(folder, name))


class _Rounds:
    """Shows a run: its settings, a line per round, a progress bar. Ctrl-C stops it at the latest after the round."""

    def __init__(self) -> None:
        self.started = False
        self._interrupted = False
        self._progress = Progress(
            TextColumn("rounds"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> _Rounds:
        handler = RichHandler(console=console, show_path=False, show_time=False)
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        self._handler = signal.getsignal(signal.SIGINT)
        # A background job that ignores Ctrl-C keeps ignoring it.
        if self._handler is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)
        # Otherwise Python exits immediately and leaves its child processes running.
        self._terminated = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        signal.signal(signal.SIGTERM, self._terminated)
        self._progress.stop()

    def _interrupt(self, *_: object) -> None:
        # Python drops an exception raised during the deletion of an object, so the interruption is recorded too.
        self._interrupted = True
        raise KeyboardInterrupt

    def start(self, prepared: Prepared, federation: Federation, finished: int) -> None:
        from lorica.privacy.unit import PrivacyUnit
        from lorica.reporting.style import rounded_up
        from lorica.tasks.label_counts import public_counts

        self.started = True
        self._progress.start()
        config = prepared.config
        modules = sorted({site.name.rsplit(".", 1)[-1] for site in prepared.model.sites})
        noise = [plan.noise_multiplier for plan in federation.plans.values()]
        sizes = [plan.records for plan in federation.plans.values()]
        console.print(
            f"[bold]{config.name}[/bold]: {config.method.name}, {len(sizes)} clients with {min(sizes)} to {max(sizes)} "
            f"records, {config.federation.rounds} rounds of {config.federation.local_steps} steps"
        )
        console.print(
            f"LoRA of rank {config.lora.r} on {len(prepared.model.sites)} linear maps ({', '.join(modules)}) in "
            f"{len({site.layer for site in prepared.model.sites})} layers; head: {config.model.head}"
        )
        for line in public_counts(prepared.task):
            console.print(escape(line), highlight=False)
        if prepared.start is not None:
            name, sha256 = escape(prepared.start["name"]), prepared.start["sha256"]
            console.print(f"Starts from the adapter {name} (SHA-256 {sha256[:16]}…).")
        if not config.privacy.private:
            clip = config.privacy.clip_norm
            clipping = "Gradients are not clipped." if clip is None else f"Gradients are clipped to norm C = {clip:g}."
            console.print(f"[bold red]No differential privacy.[/bold red] {clipping}")
        else:
            level = PrivacyUnit.of(config.privacy).level
            console.print(
                f"{level} DP: C = {config.privacy.largest_norm:g}, σ = {min(noise):.2f} to {max(noise):.2f}, "
                f"δ = {config.privacy.delta:g}, ledger {federation.engine.ledger}"
            )
            some = next(iter(federation.plans.values()))
            if some.shared is not None:
                plans = federation.plans.values()
                total = rounded_up(max(plan.epsilon() for plan in plans))
                alone = rounded_up(max(plan.epsilon_own_noise() for plan in plans))
                console.print(
                    f"The owners share the noise: ε = {total} against a server that sees sums of at least "
                    f"{some.shared.min_clients} owners, {some.shared.colluding} of whom may collude with it; "
                    f"ε = {alone} against a server that sees single replies",
                    highlight=False,
                )
            void = [plan.client for plan in federation.plans.values() if plan.void_delta]
            if void:
                console.print(
                    "[bold red]δ gives no protection[/bold red] to client "
                    f"{', '.join(map(str, void))}: it is not below one over the number of records. Choose a smaller "
                    "privacy.delta."
                )
        if finished:
            console.print(f"Resumed after round {finished}.")
        self._task = self._progress.add_task("rounds", total=config.federation.rounds, completed=finished)

    def round(self, metrics: dict[str, Any]) -> None:
        parts = [f"round {metrics['round']:>3}"]
        if "score" in metrics:
            parts.append(f"{metrics['metric']} {100 * metrics['score']:5.1f} %   loss {metrics['loss']:.3f}")
        if "epsilon" in metrics:
            parts.append(f"ε {metrics['epsilon']:.2f}")
        if "seconds" in metrics:
            parts.append(f"{metrics['seconds']:.1f} s")
        console.print("   ".join(parts), highlight=False)
        self._progress.update(self._task, completed=metrics["round"])
        if self._interrupted:
            raise KeyboardInterrupt


class _Runs:
    """Shows a benchmark: a line per run, and a progress bar with the best method so far in the current setting."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        # The speed is that of the last hour: a run may take minutes.
        self._progress = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            speed_estimate_period=3600,
        )

    def __enter__(self) -> _Runs:
        from lorica.benchmark.results import read_results

        found = self._suite.with_results(read_results(self._suite.folder))
        for entry in found.entries:
            if entry.refusal is not None:
                text = f"Left out: {entry.method} with {entry.setting}. {entry.refusal}"
                console.print(text, markup=False, soft_wrap=True)
        self._task = self._progress.add_task("", total=found.planned, completed=found.finished)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, run: BenchmarkRun, results: dict[str, BenchmarkRun]) -> None:
        from lorica.reporting.benchmark import leader

        score = "diverged" if run.score is None else f"{100 * run.score:.1f} %"
        where = f"{run.setting}; {run.method}, rate {run.rate:g}, seed {run.seed} ({run.purpose})"
        console.print(f"{where}: {score}, {run.seconds:.0f} s", markup=False, highlight=False, soft_wrap=True)
        found = self._suite.with_results(results)
        best = leader(found.by_setting()[run.setting])
        text = "" if best is None else f"best so far: {best.method}, {100 * (best.mean or 0):.1f} %"
        self._progress.update(self._task, completed=found.finished, description=escape(text))


@contextmanager
def _errors(kept: str = "Finished rounds are kept; the same command resumes the run.") -> Iterator[None]:
    """Print a `UserError` as one line; Ctrl-C keeps what is finished.

    Args:
        kept: what to say about that.
    """
    try:
        yield
    except UserError as error:
        # The message may quote a file or a client's reply, which may contain brackets.
        console.print(f"[bold red]error[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"Stopped. {kept}")
        raise typer.Exit(130) from None


def _load(config: str | None, overrides: list[str] | None) -> ExperimentConfig:
    # Imported here: pydantic and the schema take longer than all of `lorica --help`.
    from lorica.config import load

    # Without a file, the first argument is an override.
    if config is not None and "=" in config and not Path(config).is_file():
        return load(None, [config, *(overrides or [])])
    return load(config, overrides)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UserError("--seeds", text, "not a list of whole numbers", "write --seeds 0,1,2") from None


def _next_name(folder: Path) -> str:
    return next(name for index in range(2, 10**6) if not folder.with_name(name := f"{folder.name}-{index}").exists())


if __name__ == "__main__":
    app()
