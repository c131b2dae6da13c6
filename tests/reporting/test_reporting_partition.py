"""The map of clients by labels: what is in a cell, and that every size can be drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from lorica.errors import UserError
from lorica.reporting.html import write_report
from lorica.reporting.partition import SHADES, partition_figure, shade_bounds
from lorica.reporting.run_folder import read_run
from tests.tiers import integration, slow


def with_counts(folder, counts, names=None):
    labels = [f"label {place}" for place in range(len(counts[0]))]
    clients = [{"client": number, "counts": [int(c) for c in row]} for number, row in enumerate(counts)]
    for client, name in zip(clients, names or [], strict=False):
        client["name"] = name
    (folder / "partition.json").write_text(json.dumps({"labels": labels, "clients": clients}))
    return folder


def test_counts_totals_and_names_are_written(make_run):
    run = read_run(with_counts(make_run(), [[1, 0, 2500], [30, 4, 0]], ["north.csv", "south.csv"]))
    panel = partition_figure(run).axes[0]
    texts = [text.get_text() for text in panel.texts]
    assert sorted(texts) == sorted(["1", "2,500", "30", "4", "2,501", "34", "records"])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["client 0: north.csv", "client 1: south.csv"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["label 0", "label 1", "label 2"]


@pytest.mark.parametrize(("clients", "labels"), [(1, 2), (2, 100), (12, 61), (40, 9)])
def test_every_cell_has_the_shade_of_its_count(make_run, clients, labels):
    counts = np.random.default_rng(0).integers(0, 500, (clients, labels)) * (np.arange(labels) % 3 > 0)
    panel = partition_figure(read_run(with_counts(make_run(), counts))).axes[0]
    bounds = shade_bounds(int(counts.max()))
    paths = {int(patch.get_label()): patch.get_path() for patch in panel.patches}
    for row, column in np.ndindex(counts.shape):
        inside = {level for level, path in paths.items() if path.contains_point((column, row))}
        level = np.searchsorted(bounds, counts[row, column], side="right") - 1
        assert inside == ({int(level)} if counts[row, column] else set())


@pytest.mark.parametrize(
    ("clients", "labels"),
    [
        (1, 2),
        *integration((100, 1000)),
        *slow((100, 2), (2, 1000), (6, 40), (100, 41)),
    ],
)
def test_every_size_is_drawn_in_a_page_of_bounded_size(make_run, clients, labels):
    counts = np.random.default_rng(0).integers(0, 50, (clients, labels))
    folder = with_counts(make_run(), counts)
    page = write_report(folder)
    assert page.stat().st_size < 4_000_000
    assert "a real federation does not show them" in page.read_text()
    image = Image.open(folder / "partition.png")
    assert image.width > 1000
    assert image.height < 2000


@pytest.mark.integration
def test_without_counts_there_is_no_figure(make_run):
    folder = make_run()
    with pytest.raises(UserError, match=r"partition\.json is missing"):
        partition_figure(read_run(folder))
    assert "Records per client and label" not in write_report(folder).read_text()
    assert not (folder / "partition.png").exists()


@pytest.mark.parametrize("most", [1, 2, 9, 10, 117, 500_000, 10**9])
def test_there_is_a_shade_for_every_count(most):
    bounds = shade_bounds(most)
    assert bounds[0] == 1
    assert bounds[-1] <= most
    assert len(bounds) <= len(SHADES)
