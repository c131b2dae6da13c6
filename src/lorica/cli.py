"""The `lorica` command: parsing and printing."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
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
from lorica.files import to_json

if TYPE_CHECKING:
    from lorica.benchmark.suite import Suite
    from lorica.config import ExperimentConfig
    from lorica.reporting.benchmark import BenchmarkRun
    from lorica.run.setup import Prepared
    from lorica.server.federation import Federation

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
flower = typer.Typer(no_args_is_help=True, help="Federations across machines, over Flower.")
audit = typer.Typer(no_args_is_help=True, help="Attacks on what leaves an owner: is the claimed guarantee refuted?")
app.add_typer(flower, name="flower")
app.add_typer(audit, name="audit")
console = Console()
# A console that is not UTF-8 shows a question mark for ε and σ; without this, it ends the command.
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="replace")

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides section.key=value, such as privacy.epsilon=1.")]


Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder, such as runs/NAME/adapter.")]
Base = Annotated[
    str | None, typer.Option(help="Folder or hub id of the base model, if it is not where it was in training.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto uses a GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and everything else on stderr.")]


class Unit(StrEnum):
    """Units of privacy that `account` has words for."""

    record = "record"
    client = "client"


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
    with _errors():
        try:
            os.getcwd()
        except FileNotFoundError:
            # PyTorch's libraries end the process without it.
            raise UserError("current folder", ".", "it was deleted", "change to a folder that exists") from None


@app.command()
def run(
    config: Annotated[
        str | None, typer.Argument(help="Experiment (YAML file). Default: the embedded digits experiment.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the run will cost and release. Nothing is charged or written.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter in a federation, or resume an interrupted run."""
    with _errors(stdout_is_for_programs=as_json):
        experiment_config = _load(config, overrides)
        if dry_run:
            _rehearse(experiment_config, as_json)
            return
        # After the configuration is known to be sound: these bring PyTorch and take seconds.
        from lorica.experiment import Experiment
        from lorica.reporting.run_folder import read_run, run_content
        from lorica.reporting.tables import run_table

        with _Rounds() as rounds:
            result = Experiment(experiment_config).run(rounds.start, rounds.round)
        if not rounds.started and experiment_config.engine == "local":
            again = f"name={_next_name(result.folder)}"
            console.print(
                f"This run has already finished; these are its results. To start a new run: lorica run … {again}"
            )
        if as_json:
            _print_json(run_content(read_run(result.folder)))
        else:
            console.print(run_table(read_run(result.folder)))


def _rehearse(config: ExperimentConfig, as_json: bool) -> None:
    from lorica.rehearsal import rehearse
    from lorica.reporting.rehearsal import rehearsal_table

    with console.status("") as status:
        found = rehearse(config, lambda stage: status.update(f"{stage} …"))
    if as_json:
        _print_json(found)
    else:
        console.print(rehearsal_table(found))


def _print_json(content: Any) -> None:
    """Print one JSON document on stdout; infinity and NaN, which JSON does not have, are null."""
    typer.echo(to_json(content, indent=2, ensure_ascii=False))


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
    as_json: AsJson = False,
) -> None:
    """Run several methods with several seeds and compare them. Interrupted runs are resumed."""
    with _errors(stdout_is_for_programs=as_json):
        experiment_config = _load(config, overrides)
        every_seed = _whole_numbers("--seeds", seeds)
        from lorica.run.variants import parse_variant

        variants = [parse_variant(label.strip(), experiment_config) for label in re.split(r",(?![^\[]*\])", methods)]
        # After every argument is known to be sound: these bring transformers and PEFT, and take seconds.
        from lorica.compare import compare as compare_methods
        from lorica.reporting.comparison import comparison_content
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
        if as_json:
            _print_json(comparison_content(results) | {"page": str(page)})
        else:
            console.print(comparison_table(results))
            console.print(f"Comparison: {escape(str(page))}", soft_wrap=True)


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
    with _errors(kept="Finished runs are kept; the same command continues."):
        from lorica.benchmark.results import read_results
        from lorica.benchmark.suite import load_suite

        whole = load_suite(suite, overrides)
        chosen = whole if settings is None else whole.only(settings)
        if not report_only:
            from lorica.benchmark.runner import run_suite
            from lorica.run.workers import worker_processes

            with _Runs(chosen) as runs, worker_processes(jobs) as executor:
                run_suite(chosen, executor, jobs, runs.show)
        from lorica.reporting.html import write_benchmark

        results = read_results(whole.folder)
        page = write_benchmark(whole.folder, whole.with_results(results))
        console.print(f"Benchmark: {escape(str(page))}", soft_wrap=True)


@app.command()
def predict(
    adapter: Adapter,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="The text of a record (two for a pair, or a question and its context), image files, or a data file.",
        ),
    ],
    base: Base = None,
    device: Device = "auto",
    chat: Annotated[
        bool, typer.Option("--chat", help="Language modelling: the text is a user's turn of a conversation.")
    ] = False,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Language modelling: maximum tokens of an answer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict with an adapter: from a text, images, or each record of a file (as JSON, one line a record)."""
    with _errors(stdout_is_for_programs=True):
        from lorica.inference import predict as predict_with

        with console.status("Predicting …"):
            found = predict_with(adapter, inputs, base, device, chat, answer_tokens)
        for prediction in found:
            typer.echo(json.dumps(prediction, ensure_ascii=False) if as_json or len(found) > 1 else _read(prediction))


@app.command()
def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled data: a file, an image folder or a hub id.")],
    base: Base = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate an adapter on labelled data: the metrics that a run reports on its test set."""
    with _errors(stdout_is_for_programs=as_json):
        from lorica.inference import evaluate as evaluate_on
        from lorica.reporting.run_folder import shown_metric

        with console.status("Evaluating …"):
            found = evaluate_on(adapter, data, base, device)
        if as_json:
            _print_json(found)
            return
        table = Table(show_header=False)
        for name, value in found.items():
            table.add_row(shown_metric(name), f"{value:.4f}")
        console.print(table)


@app.command()
def export(
    adapter: Adapter,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged into its weights.")
    ] = False,
    base: Base = None,
) -> None:
    """Copy an adapter to share it (--base names its base model there), or write a merged model (--merge)."""
    with _errors():
        from lorica.adapters.share import copy_adapter, write_merged

        if merge:
            write_merged(adapter, folder, base)
        else:
            copy_adapter(adapter, folder, base)
        console.print(f"Written: {escape(str(folder))}", soft_wrap=True)


@app.command()
def push(
    adapter: Adapter,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="ACCOUNT/NAME on the Hugging Face hub.")],
    base: Annotated[str | None, typer.Option(help="Hub id of the base model, if it was a folder in training.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a new repository.")] = False,
) -> None:
    """Upload an adapter with its model card to the Hugging Face hub, with the account of `hf auth login`."""
    with _errors():
        from lorica.adapters.share import push_adapter

        with console.status("Uploading …"):
            address = push_adapter(adapter, repository, base, private=not public)
        console.print(f"Uploaded: {escape(address)}", soft_wrap=True, highlight=False)


def _read(prediction: dict[str, Any]) -> str:
    """One prediction for people."""
    if "label" in prediction:
        return f"{prediction['label']} ({100 * prediction['score']:.1f} %)"
    return "\n".join(str(value) for value in prediction.values())


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods: what each trains and sends, whether its aggregation is exact, its DP status, its paper."""
    with _errors(stdout_is_for_programs=as_json):
        from lorica.reporting.methods import HEADINGS, method_rows, methods_table

        if as_json:
            keys = [heading.replace(" ", "_") for heading in HEADINGS]
            _print_json([dict(zip(keys, row, strict=True)) for row in method_rows()])
        else:
            console.print(methods_table())


@app.command()
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Your data: CSV, JSONL, Parquet or an image folder.")],
    output: Annotated[Path | None, typer.Option(help="The configuration to write. Default: NAME.yaml here.")] = None,
    test: Annotated[str | None, typer.Option(help="A public test set.")] = None,
    split: Annotated[
        float | None,
        typer.Option(min=0.001, max=0.5, help="Split off this fraction for tests, which ε then does not cover."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Kind of task, if it is not the one found.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Column with the text; of two, comma-separated or each with its --text."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column to predict.")] = None,
    by: Annotated[str | None, typer.Option(help="Column that says whose record it is.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: a folder or a hub id.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Number of simulated owners. Default: 3.")] = None,
    epsilon: Annotated[float, typer.Option(min=0.01, max=100, help="ε of each record over the run.")] = 3.0,
) -> None:
    """Write a commented configuration for your own data: task, columns, base model, batch size, rounds, ε."""
    with _errors():
        from lorica.templates.experiment import Wishes, draft_experiment

        columns = [column.strip() for given in text for column in given.split(",")] if text else None
        with console.status("Reading the data, and calibrating noise …"):
            draft = draft_experiment(
                data, Wishes(test, split, task, columns, label, by, base, clients, epsilon), output
            )
        draft.write()
        for file in draft.files:
            console.print(f"Written: {escape(str(file))}", soft_wrap=True, highlight=False)
        console.print(f"Written: {escape(str(draft.path))}. Read it, then:", soft_wrap=True, highlight=False)
        for option in (" --dry-run", ""):
            command = f"lorica run {shlex.quote(str(draft.path))}{option}"
            console.print(f"  {escape(command)}", soft_wrap=True, highlight=False)


@app.command()
def plan(
    records: Annotated[int, typer.Option(min=8, help="Number of records of the client.")],
    epsilon: Annotated[float, typer.Option(min=0.01, max=100, help="ε of each record over the run.")] = 3.0,
    delta: Annotated[float, typer.Option(min=1e-12, max=0.5, help="δ, below 1/records.")] = 1e-5,
    steps: Annotated[str, typer.Option(help="Total numbers of noisy steps, comma-separated.")] = "20,60,200",
    as_json: AsJson = False,
) -> None:
    """Compare batch sizes and numbers of steps at the same ε: noise of the run, and gradients to compute."""
    with _errors(stdout_is_for_programs=as_json):
        from lorica.reporting.planning import compared_options, options_table

        with console.status("Calibrating noise …"):
            found = compared_options(records, epsilon, delta, _whole_numbers("--steps", steps))
        if as_json:
            _print_json(found)
        else:
            console.print(options_table(found))


@app.command("new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by dashes, such as my-lora.")],
    folder: Annotated[Path, typer.Option(help="Folder in which the package lorica-NAME is created.")] = Path(),
) -> None:
    """Create a working package for your own method, with its class, entry point and tests."""
    with _errors():
        from lorica.templates.new_method import write_package

        package = write_package(name, folder)
        console.print(f"Created {escape(str(package))}. Next:", soft_wrap=True)
        console.print(f"  pip install -e {escape(shlex.quote(str(package)))}", soft_wrap=True, highlight=False)
        console.print(f"Then see {escape(str(package / 'README.md'))}.", soft_wrap=True)


@app.command()
def account(
    records: Annotated[
        int, typer.Option(min=1, help="Number of records of the client. With --unit client: number of clients.")
    ],
    batch_size: Annotated[
        int, typer.Option(min=1, help="Expected batch size. With --unit client: expected clients in a round.")
    ],
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            max=10**6,
            help="Noisy steps: rounds times local steps. With --unit client: rounds, for fed-power twice.",
        ),
    ],
    unit: Annotated[
        Unit, typer.Option(help="What is protected: one record of the client, or everything of one client.")
    ] = Unit.record,
    delta: Annotated[float, typer.Option(help="δ, below 1/records; with --unit client, below 1/clients.")] = 1e-5,
    epsilon: Annotated[float | None, typer.Option(help="Compute the noise multiplier for this ε.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Compute the ε of this noise multiplier.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the noise multiplier for an ε, or the ε for a noise multiplier, with two accountants."""
    with _errors(stdout_is_for_programs=as_json):
        if (epsilon is None) == (noise_multiplier is None):
            problem = "exactly one of --epsilon and --noise-multiplier is required"
            raise UserError("--epsilon", epsilon, problem, "give one of them")
        from lorica.config import PrivacyConfig, validate
        from lorica.privacy.plan import plan_client

        of_clients = unit is Unit.client
        if of_clients and batch_size > records:
            raise UserError("--batch-size", batch_size, f"there are {records} clients", f"choose at most {records}")
        content = {"unit": unit.value, "epsilon": epsilon, "noise_multiplier": noise_multiplier, "delta": delta}
        plan = plan_client(0, records, batch_size, steps, validate(PrivacyConfig, content, prefix="account"))
        if as_json:
            _print_json(
                {
                    "unit": unit.value,
                    "records": records,
                    "batch_size": batch_size,
                    "sampling_rate": plan.terms.sampling_rate,
                    "steps": steps,
                    "noise_multiplier": plan.terms.noise_multiplier,
                    "delta": delta,
                    "epsilon": plan.epsilon(),
                    "epsilon_rdp": plan.epsilon_rdp(),
                }
            )
            return
        table = Table(show_header=False)
        protected = "everything of one client; the server is trusted" if of_clients else "one record of the client"
        sampled = "clients in a round" if of_clients else "records in a step"
        table.add_row("protected", protected)
        table.add_row("sampled in secret", f"{batch_size:,} of {records:,} {sampled}, on average")
        table.add_row("sampling rate q", f"{plan.terms.sampling_rate:.6g}")
        table.add_row("rounds" if of_clients else "steps", str(steps))
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

        console.print(f"Report: {escape(str(write_report(folder)))}", soft_wrap=True)


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
    as_json: AsJson = False,
    release: Annotated[
        str | None, typer.Option(metavar="RUN", help="Release the budget reserved by RUN, which will not continue.")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Accept that the ledger is lost, older or changed.")] = False,
) -> None:
    """Show what was released from an owner's data: when, in which run, at what ε. Only --release and --accept write."""
    with _errors(stdout_is_for_programs=as_json):
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
                text = f"The next run starts a new ledger at {escape(str(ledger))}."
                console.print(text, soft_wrap=True, highlight=False)
                return
        if release is not None:
            release_reservation(find_ledger(path), release)
        found = read_budget(path, delta or 1e-5, None if policy is None else load_policy(policy))
        if as_json:
            _print_json(found)
        else:
            console.print(budget_table(found))


@audit.command("mechanism")
def audit_mechanism(
    methods: Annotated[str | None, typer.Option(help="Comma-separated. Default: all registered methods.")] = None,
    epsilon: Annotated[float, typer.Option(help="The claim to attack, at δ = 1e-5.")] = 3.0,
    canaries: Annotated[int, typer.Option(help="Number of canaries; more give larger lower bounds.")] = 1024,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes at once.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Audit the installed mechanism without data, for every method. Exit code 1 if a promise is refuted."""
    with _errors(stdout_is_for_programs=as_json, kept="An audit keeps nothing; the same command starts again."):
        from lorica.audit.mechanism import audit_mechanism as audit_methods
        from lorica.reporting.audit import mechanism_table
        from lorica.run.workers import worker_processes

        names = None if methods is None else [name.strip() for name in methods.split(",")]
        with _progress("methods") as shown, worker_processes(jobs) as executor:
            found = audit_methods(names, epsilon, canaries, shown, executor)
        if as_json:
            _print_json(found)
        else:
            console.print(mechanism_table(found))
    if found["refuted"]:
        raise typer.Exit(1)


@audit.command("run")
def audit_experiment(
    config: Annotated[
        str | None, typer.Argument(help="Experiment (YAML file). Default: the embedded digits experiment.")
    ] = None,
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option(help="Number of canaries; more give larger lower bounds.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Audit an experiment with canaries from its public test set. Exit code 1 if the claim is refuted."""
    with _errors(stdout_is_for_programs=as_json, kept="An audit keeps nothing; the same command starts again."):
        experiment_config = _load(config, overrides)
        from lorica.audit.run import audit_run, write_audit
        from lorica.reporting.audit import audit_table
        from lorica.run.folder import has_experiment

        # Before minutes of training rather than after them.
        has_experiment(experiment_config.folder, experiment_config)
        with _progress("rounds") as shown:
            found = audit_run(experiment_config, canaries, shown)
        path = write_audit(experiment_config, found)
        if as_json:
            _print_json(found)
        else:
            console.print(audit_table(found))
            console.print(f"Audit: {path}", highlight=False)
    if found["refuted"]:
        raise typer.Exit(1)


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


@flower.command("service", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def flower_service(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the two files, such as /etc/lorica.")],
) -> None:
    """Write a systemd service that runs an owner's node: a unit and its environment file. Takes the node's options."""
    with _errors():
        from lorica.engines.flower.service import write_service

        unit = write_service(folder, context.args)
        console.print(f"Written: {escape(str(unit.parent))}. Read the files, then, as root:", soft_wrap=True)
        copy = f"cp {shlex.quote(str(unit))} /etc/systemd/system/"
        for command in (copy, "systemctl daemon-reload", f"systemctl enable --now {unit.stem}"):
            console.print(f"  {escape(command)}", soft_wrap=True, highlight=False)


@flower.command("status")
def flower_status(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="At a node its data; at the hub the run folder.")],
    as_json: AsJson = False,
) -> None:
    """Show whether a node, or a run at the hub, is well: processes, last round, ε left. Exit code 1 if it is not."""
    with _errors(stdout_is_for_programs=as_json):
        from lorica.engines.flower.status import hub_status, is_of_run, node_status
        from lorica.reporting.health import hub_table, node_table

        at_hub = is_of_run(path)
        found = hub_status(path) if at_hub else node_status(path)
        if as_json:
            _print_json(found)
        else:
            console.print(hub_table(found) if at_hub else node_table(found))
    if found["problems"]:
        raise typer.Exit(1)


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
        who = f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} records"
        if config.privacy.unit == "client":
            who = f"{config.federation.clients} clients, on average {config.federation.participants} in a round"
        console.print(
            f"[bold]{config.name}[/bold]: {config.method.name}, {who}, "
            f"{config.federation.rounds} rounds of {config.federation.local_steps} steps"
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
                f"δ = {config.privacy.delta:g}, ledger {escape(federation.engine.ledger)}"
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
        page = escape(str(config.folder / "report.html"))
        console.print(f"Report, from the first round on: {page}", soft_wrap=True, highlight=False)
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
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar; gives the function that moves it: what is being done, how much is done, and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda name, done, count: progress.update(task, description=name, completed=done, total=count)


@contextmanager
def _errors(
    stdout_is_for_programs: bool = False, kept: str = "Finished rounds are kept; the same command resumes the run."
) -> Iterator[None]:
    """Print a `UserError`, or what the system says about a file, as one line; Ctrl-C keeps what is finished.

    Args:
        stdout_is_for_programs: print what is for people on stderr meanwhile.
        kept: what to say after Ctrl-C about what is finished.
    """
    console.stderr = stdout_is_for_programs
    try:
        yield
    except UserError as error:
        raise _shown(error) from None
    except OSError as error:
        if error.filename is None:
            raise
        remedy = "check the path, its permissions and the free disk space"
        raise _shown(UserError("file", str(error.filename), f"cannot be used ({error.strerror})", remedy)) from None
    except KeyboardInterrupt:
        console.print(f"Stopped. {kept}")
        raise typer.Exit(130) from None
    finally:
        console.stderr = False


def _shown(error: UserError) -> typer.Exit:
    # The message may quote a file or a client's reply, which may contain brackets.
    console.print(f"[bold red]error[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def _load(config: str | None, overrides: list[str] | None) -> ExperimentConfig:
    # Imported here: pydantic and the schema take longer than all of `lorica --help`.
    from lorica.config import load

    # Without a file, the first argument is an override.
    if config is not None and "=" in config and not os.path.isfile(config):
        return load(None, [config, *(overrides or [])])
    return load(config, overrides)


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(option, text, "not a list of whole numbers", f"write {option} 0,1,2") from None


def _next_name(folder: Path) -> str:
    return next(name for index in range(2, 10**6) if not folder.with_name(name := f"{folder.name}-{index}").exists())


if __name__ == "__main__":
    app()
