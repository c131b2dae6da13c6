import json
import os
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from lorica.errors import UserError
from lorica.reporting import html
from lorica.reporting.card import model_card
from lorica.reporting.clients import client_rows
from lorica.reporting.comparison import ComparedRun
from lorica.reporting.html import write_comparison, write_report
from lorica.reporting.partition import partition_figure
from lorica.reporting.plots import clients_figure
from lorica.reporting.run_folder import read_run

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; every element has to be closed in its turn."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def drawings():
    return {}


@pytest.fixture
def drawn_once(drawings, monkeypatch):
    """The figures of one run, for tests of runs whose figures do not matter."""
    draw = html._drawings

    def once(figures):
        if not drawings:
            drawings.update(draw(figures))
        return drawings

    monkeypatch.setattr(html, "_drawings", once)
    for name in ("accuracy", "factors", "clients") if drawings else ():
        monkeypatch.setattr(html, f"{name}_figure", lambda run: None)
    monkeypatch.setattr(html, "_png", lambda figure: b"")


def check_self_contained(page):
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith("#"), (name, value)
        assert name == "xmlns" or name.startswith("xmlns:") or "://" not in (value or ""), (name, value)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value[1:] for name, value in page.attributes if name == "xlink:href"]
    assert set(used) <= set(ids)


def test_a_report_is_one_self_contained_file(make_run):
    folder = make_run()
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path)
    check_self_contained(page)
    assert page.tags.count("svg") == 3
    assert "url(" not in path.read_text().replace("url(#", "")
    assert "@import" not in path.read_text()
    for name in ("accuracy.png", "factors.png"):
        assert Image.open(folder / name).width > 1000
    assert not list(folder.glob(".*"))


def test_a_report_says_what_was_reached_and_what_it_cost(make_run):
    text = " ".join(Page(write_report(make_run(rounds=3, accuracies=[0.5, 0.6, 0.953, 0.7]))).text.split())
    assert "50.0 % → 70.0 % +20.0 points, after round 3" in text
    assert "95.3" not in text
    assert "ε = 2.97 at δ = 1e-5" in text
    assert "zero-out: one record contributes zero" in text
    assert "dp-accounting 0.6.0 PLD" in text
    assert "Clients hold disjoint sets of records." in text
    assert "The choice of hyper-parameters" in text
    assert "local_steps: 3" in text
    assert "transformers" in text


@pytest.mark.parametrize(("noise", "private"), [("secure", True), ("reproducible", False), ("none", False)])
@pytest.mark.usefixtures("drawn_once")
def test_the_banner_appears_exactly_when_the_run_is_not_private(make_run, noise, private):
    page = Page(write_report(make_run(noise=noise)))
    assert (("class", "banner") in page.attributes) is not private
    assert ("Not a private release" in page.text) is not private
    assert ("not a guarantee" in page.text) is (noise == "reproducible")


def test_a_run_without_privacy_file_is_reported_with_the_banner(make_run):
    folder = make_run(noise="none")
    (folder / "privacy.json").unlink()
    (folder / "environment.json").unlink()
    (folder / "decisions.jsonl").unlink()
    page = Page(write_report(folder))
    assert "has no privacy.json" in page.text
    assert "no differential privacy" not in page.text
    assert page.tags.count("svg") == 1
    assert not (folder / "factors.png").exists()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("high", "said"), [(1, "below 1 in 4 of 5 rounds"), (2, "below 1 in 3 of 5 rounds"), (3, None)]
)
def test_a_report_says_when_scores_were_mostly_noise(make_run, high, said):
    """In so many of five rounds the ratio is 2; in the other ones it is 0.3."""
    folder = make_run(rounds=7, ratios=lambda number, layer: None if number <= 2 else 2.0 if number > 7 - high else 0.3)
    page = Page(write_report(folder))
    text = " ".join(page.text.split())
    assert page.tags.count("svg") == 4
    assert Image.open(folder / "choices.png").width > 1000
    assert "Certainty of the choices" in text
    assert ("mostly noise" in text) == (said is not None)
    assert said is None or said in text


def test_text_is_escaped(make_run, make_metrics, tmp_path):
    folder = make_run(name=EVIL, method=EVIL)
    privacy = json.loads((folder / "privacy.json").read_text())
    privacy["assumptions"] = [EVIL]
    (folder / "privacy.json").write_text(json.dumps(privacy))
    site = f"h.0.{EVIL}"
    (folder / "decisions.jsonl").write_text(json.dumps({"round": 1, "factors": {site: "A", "h.0.v": "B"}}))
    (folder / "environment.json").write_text(json.dumps({"platform": EVIL}))
    page = Page(write_report(folder))
    check_self_contained(page)
    assert page.text.count(EVIL) >= 6
    results = [ComparedRun(EVIL, seed, make_metrics([0.5, 0.6])) for seed in (1, 2)]
    page = Page(write_comparison(tmp_path / "comparison", results))
    check_self_contained(page)
    assert EVIL in page.text


@pytest.mark.usefixtures("drawn_once")
def test_an_unfinished_run_says_so(make_run):
    page = Page(write_report(make_run(rounds=3, planned=9)))
    assert "stopped after 3 of 9 rounds" in page.text


@pytest.mark.usefixtures("drawn_once")
def test_a_long_life_of_the_data_is_shown(make_run):
    folder = make_run()
    privacy = json.loads((folder / "privacy.json").read_text())
    privacy["clients"][0]["lifetime_epsilon"] = 7.123
    (folder / "privacy.json").write_text(json.dumps(privacy))
    assert "ε = 7.13 over the lifetime of the data" in " ".join(Page(write_report(folder)).text.split())


def test_a_run_that_evaluated_nothing_is_reported(make_run):
    folder = make_run(rounds=2)
    (folder / "metrics.jsonl").write_text(json.dumps({"round": 0}) + "\n" + json.dumps({"round": 1, "loss": 1.0}))
    assert "No round was evaluated" in Page(write_report(folder)).text


def test_many_clients_are_folded_away(make_run):
    assert "40 clients" in Page(write_report(make_run(clients=40))).text


@pytest.mark.integration
def test_a_large_run_stays_a_small_file(make_run):
    path = write_report(make_run(rounds=100, layers=24))
    assert path.stat().st_size < 500_000


def test_the_same_run_gives_the_same_page(make_run):
    folder = make_run()
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


@pytest.mark.parametrize("broken", ["_render", "_png", "replace"])
def test_a_failure_leaves_the_old_report(make_run, monkeypatch, broken):
    folder = make_run()
    (folder / "report.html").write_text("old")
    (folder / "accuracy.png").write_text("old")

    def fail(*_arguments, **_named):
        raise OSError("no space left")

    if broken == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(html, broken, fail)
    with pytest.raises((OSError, UserError)):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert (folder / "accuracy.png").read_text() == "old"
    assert not list(folder.glob(".*"))


def test_a_report_of_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_a_comparison_writes_page_plots_and_tables(make_metrics, tmp_path):
    curves = np.random.default_rng(1).uniform(0.5, 0.9, (5, 4))
    names = ["as-lora", "as-lora", "as-lora", "ffa-lora", "ffa-lora"]
    results = [
        ComparedRun(name, seed, make_metrics(list(curve), epsilon=3.0), private_release=True)
        for seed, (name, curve) in enumerate(zip(names, curves, strict=True))
    ]
    folder = tmp_path / "new" / "comparison"
    page = Page(write_comparison(folder, results))
    check_self_contained(page)
    assert page.tags.count("svg") == 2
    assert "Not a private release" not in page.text
    names = {"comparison.html", "comparison.png", "final.png", "comparison.md", "comparison.json"}
    assert {path.name for path in folder.iterdir()} == names
    content = json.loads((folder / "comparison.json").read_text())
    methods = {method["method"]: method for method in content["methods"]}
    assert methods["as-lora"]["mean"] == pytest.approx(curves[:3, -1].mean())
    assert methods["as-lora"]["std"] == pytest.approx(curves[:3, -1].std(ddof=1))
    assert methods["ffa-lora"]["finals"] == pytest.approx(list(curves[3:, -1]))
    assert (folder / "comparison.md").read_text().count("\n") == 4


def test_a_comparison_says_how_many_runs_are_not_private(make_metrics, tmp_path):
    metrics = make_metrics([0.5, 0.6, 0.7])
    results = [
        ComparedRun("a", 1, metrics, private_release=False),
        ComparedRun("b", 1, metrics[:2], private_release=None),
    ]
    page = Page(write_comparison(tmp_path, results))
    text = " ".join(page.text.split())
    assert "Not a private release: 1 of 2 runs" in text
    assert "(1 of 2 runs)" in text
    assert "do not all end in the same round" in text
    assert "No standard deviation with a single seed: a, b" in text


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_model_card_states_the_guarantee_per_client(make_run):
    run = read_run(make_run(clients=2))
    front, body = front_matter(model_card(run, 'model = load("adapter")'))
    assert front["library_name"] == "peft"
    assert front["tags"] == ["lora", "federated-learning", "differential-privacy", "lorica"]
    assert 'model = load("adapter")\n' in body
    for text in ("zero-out: one record", "Poisson", "flat over all trained tensors", "dp-accounting 0.6.0 PLD"):
        assert text in body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows[2] == "| 0 | 300 | 0.2133 | 0.9 | 2 | 60 | 2.97 | 1e-5 |"
    assert len(rows) == 4
    assert "Clients hold disjoint sets of records." in body
    assert "The choice of hyper-parameters" in body
    assert "Not a private release" not in body


@pytest.mark.parametrize("noise", ["reproducible", "none"])
def test_a_model_card_warns_in_bold_of_a_run_that_is_not_private(make_run, noise):
    front, body = front_matter(model_card(read_run(make_run(noise=noise)), "load()"))
    assert "> **Not a private release: " in body
    assert ("differential-privacy" in front["tags"]) is (noise == "reproducible")


@pytest.mark.parametrize(
    ("base", "in_front", "in_text"),
    [
        ("FacebookAI/roberta-large", "FacebookAI/roberta-large", "`FacebookAI/roberta-large`"),
        ("bert-base-uncased", "bert-base-uncased", "`bert-base-uncased`"),
        ("lorica:glyph-vit", None, "`lorica:glyph-vit`"),
        ("/home/someone/private/model", None, "`model`"),
    ],
)
def test_a_model_card_names_only_hub_models_in_its_front_matter(make_run, base, in_front, in_text):
    folder = make_run()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["base"] = base
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    card = model_card(read_run(folder), "load()")
    front, body = front_matter(card)
    assert front.get("base_model") == in_front
    assert in_text in body
    assert "/home" not in card


def test_a_model_card_says_what_the_hub_searches_by(make_run, tmp_path):
    """Read back by the hub's own library."""
    folder = make_run(rounds=2, accuracies=[0.5, 0.6, 0.723])
    base = tmp_path / "encoder"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["base"] = str(base)
    config["task"] |= {"type": "text-regression", "train": ["clinic/patients[train]", "/srv/patients.csv"]}
    config["task"]["test"] = {"a": "nyu-mll/glue:stsb[validation]", "b": "data/other.csv"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    data = ModelCard(model_card(read_run(folder), "load()")).data
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-classification"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.base_model is None
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.723)
    assert (result.task_type, result.dataset_type) == ("text-classification", "nyu-mll/glue")
    assert "patients" not in model_card(read_run(folder), "load()")
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert ModelCard(model_card(read_run(folder), "load()")).data.license is None


def test_a_model_card_keeps_names_from_being_markup(make_run):
    card = model_card(read_run(make_run(name=f"*a*{EVIL}", method="`m`")), "load()")
    assert "<script>" not in card.replace("\\<script\\>", "")


HOSTILE = [
    EVIL,
    "</code><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/pixel.png)",
    "<https://evil.example>",
    "`` `code` ``",
    "**bold** _em_ ~~gone~~",
    "a\n# Heading\n\n* item",
    "a\n---\nb",
    "a\n\n```python\nimport os\n```\n",
    "a | b | c",
    "&lt;script&gt; &#60;b&#62;",
    "\\",
    "\\`",
    "a\r\n> quote",
    "---\nbase_model: evil/model",
    "evil: [1, 2]\nlicense: mit",
    "\u202egnp.exe\x1b[2J\x00",
]


def structure(card):
    """Kinds of all elements of a card's Markdown, in order, and the front matter."""
    front, body = front_matter(card)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)
    kinds = [inner.type for token in tokens for inner in [token, *(token.children or [])] if inner.type != "text"]
    return [kind for kind in kinds if kind != "text_special"], front


def hostile_card(make_run, words):
    """A card of a run in which whatever others name is named by these words."""
    folder = make_run(name=words, method=words)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["base"] = words
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.loads(line) | {"metric": words} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    privacy = json.loads((folder / "privacy.json").read_text())
    privacy |= {"unit": words, "assumptions": [words], "not_covered": [words]}
    (folder / "privacy.json").write_text(json.dumps(privacy))
    started_from(folder, words)
    return model_card(read_run(folder), "load()")


def started_from(folder, name):
    environment = json.loads((folder / "environment.json").read_text())
    environment["start"] = {"name": name, "sha256": "0" * 64}
    (folder / "environment.json").write_text(json.dumps(environment))


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_names_change_nothing_in_a_card_but_its_text(make_run, words):
    """Read by another Markdown parser, the card has the elements of a card with harmless names."""
    harmless = structure(hostile_card(make_run, "some name"))
    assert "html_inline" not in harmless[0]
    card = hostile_card(make_run, words)
    assert structure(card) == harmless
    assert all(letter.isprintable() for letter in card if letter != "\n")


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.usefixtures("drawn_once")
def test_hostile_names_of_models_stay_text_in_a_report(make_run, words):
    folder = make_run()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["base"] = config["task"]["train"] = words
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    started_from(folder, words)
    page, other = Page(write_report(folder)), Page(write_report(make_run()))
    assert page.tags == other.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_page(make_run, tmp_path):
    picture = tmp_path / "page.png"
    options = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    options += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"]
    options += [f"screenshot={picture}", "window-size=1100,1500"]
    page = write_report(make_run(noise="reproducible"))
    command = ["chromium", *(f"--{option}" for option in options), page.as_uri()]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    # The banner's wash and the method's line: style sheet and figure were both applied.
    assert (np.abs(pixels - (0xFD, 0xF0, 0xED)).sum(axis=2) == 0).sum() > 10_000
    assert (np.abs(pixels - (0x00, 0x72, 0xB2)).sum(axis=2) < 6).sum() > 500


def test_of_many_clients_a_report_and_a_card_show_those_that_spend_most(make_run):
    folder = make_run(clients=1000, rounds=3, factors=lambda *_: "B")
    statement = json.loads((folder / "privacy.json").read_text())
    for number, client in enumerate(statement["clients"]):
        client["epsilon"] = 1.0 + number / 1000
    (folder / "privacy.json").write_text(json.dumps(statement))
    page = Page(write_report(folder))
    check_self_contained(page)
    assert (folder / "report.html").stat().st_size < 300_000
    assert page.text.count("all 1,000 are in privacy.json") == 1
    run = read_run(folder)
    headings, rows = client_rows(run.clients)
    place = headings.index("Client")
    assert [row[place] for row in rows] == [str(number) for number in range(800, 1000)]
    card = model_card(run, "")
    assert "all 1,000 are in privacy.json" in card
    assert card.count("\n| ") == 200 + 1 + 1
    assert html._traffic(run)[0] == ["0", "3", "147 kB", "295 kB"]
    figure = clients_figure(run)
    assert [sum(bar.get_height() for bar in panel.patches) for panel in figure.axes] == [1000, 1000]
    partition = {"labels": ["a", "b"], "clients": [{"client": n, "counts": [n, n % 2]} for n in range(201)]}
    records, labels = partition_figure(replace(run, partition=partition)).axes
    assert sum(bar.get_height() for bar in records.patches) == sum(bar.get_height() for bar in labels.patches) == 201
    assert records.patches[-1].get_height() >= 1
    assert figure.get_size_inches()[1] < 4
