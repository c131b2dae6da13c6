import json

import pytest

from lorica.errors import UserError
from lorica.reporting.factors import factor_rounds, factor_rows, layer_numbers
from lorica.reporting.run_folder import bytes_sent, guarantee, not_private, outcome, read_run, seconds_per_round


def test_a_run_folder_is_read_back(make_run):
    run = read_run(make_run(rounds=7, clients=3))
    assert (run.name, run.method, run.rounds, run.planned_rounds) == ("digits-as-lora", "as-lora", 7, 7)
    assert len(run.metrics) == 8
    assert len(run.decisions) == 7
    assert [client["client"] for client in run.clients] == [0, 1, 2]
    assert bytes_sent(run.metrics) == (7 * 3 * 49_152, 7 * 3 * 98_304)
    assert seconds_per_round(run.metrics) == pytest.approx(4.2)
    assert guarantee(run) == (pytest.approx(3 * 0.99), 1e-5)


def test_a_truncated_last_line_is_left_out(make_run):
    folder = make_run(rounds=5)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) - 20])
    run = read_run(folder)
    assert run.rounds == 4
    assert [row["round"] for row in run.decisions] == [1, 2, 3, 4]


def test_a_line_cut_inside_a_character_is_left_out(make_run):
    folder = make_run(rounds=2)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"round": 3, "note": "ε"}'.encode()[:-3])
    assert read_run(folder).rounds == 2


def test_a_damaged_line_that_is_not_the_last_is_an_error(make_run):
    folder = make_run(rounds=3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:10]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 3"):
        read_run(folder)


def test_decisions_of_a_round_that_did_not_finish_are_left_out(make_run):
    folder = make_run(rounds=3)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert factor_rounds(read_run(folder)) == [1, 2]


def test_of_a_round_that_ran_twice_the_later_line_counts(make_run):
    folder = make_run(rounds=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "accuracy": 0.5}) + "\n")
    run = read_run(folder)
    assert [row["round"] for row in run.metrics] == [0, 1, 2, 3]
    assert outcome(run.metrics).final == 0.5


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_an_error(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(UserError, match="not a run folder"):
        read_run(folder)


def test_no_finished_round_is_an_error(make_run):
    folder = make_run(rounds=3)
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(first + "\n")
    with pytest.raises(UserError, match="no round is finished"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no round is finished"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.yaml", "a: [1"), ("config.yaml", "just text"), ("privacy.json", "{"), ("privacy.json", "3")],
)
def test_a_damaged_file_is_an_error_that_names_it(make_run, name, content):
    folder = make_run()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        read_run(folder)


def test_the_outcome_is_the_last_evaluated_round_not_the_best(make_run):
    run = read_run(make_run(rounds=4, accuracies=[0.5, 0.6, 0.95, 0.7, 0.65]))
    assert (outcome(run.metrics).start, outcome(run.metrics).final, outcome(run.metrics).final_round) == (0.5, 0.65, 4)


def test_the_outcome_skips_rounds_without_evaluation(make_run):
    run = read_run(make_run(rounds=5, evaluate_every=2))
    assert outcome(run.metrics).final_round == 4
    assert outcome(run.metrics).final == run.metrics[4]["accuracy"]


def test_there_is_no_outcome_before_the_first_evaluation(make_run):
    run = read_run(make_run(rounds=3, evaluate_every=5))
    assert outcome(run.metrics).start == 0.73
    assert outcome(run.metrics).final is None


def test_only_secure_noise_that_is_marked_private_is_a_private_release(make_run):
    folder = make_run()
    assert not_private(read_run(folder)) is None
    for content, reason in [
        ({"private_release": False, "noise": "reproducible"}, "from a seed"),
        ({"private_release": True, "noise": "reproducible"}, "from a seed"),
        ({"private_release": False, "noise": "none"}, "without differential privacy"),
        ({"private_release": False, "noise": "secure"}, "private_release: false"),
        ({"private_release": True}, "unknown kind"),
    ]:
        (folder / "privacy.json").write_text(json.dumps(content))
        assert reason in not_private(read_run(folder))
    (folder / "privacy.json").unlink()
    assert "no privacy.json" in not_private(read_run(folder))


def test_layers_are_rows_when_their_sites_agree(make_run):
    run = read_run(make_run(rounds=3, layers=11, factors=lambda number, layer, site: "A" if number == layer else "B"))
    rows = factor_rows(run)
    assert [row.label for row in rows] == [f"layer {layer}" for layer in range(11)]
    assert rows[2].choices == ("B", "A", "B")
    assert rows[2].share("A") == pytest.approx(1 / 3)


def test_sites_are_rows_when_they_differ(make_run):
    run = read_run(make_run(rounds=2, layers=2, factors=lambda number, layer, site: "A" if site == "q_proj" else "BA"))
    rows = factor_rows(run)
    assert [row.label for row in rows] == ["layer 0 q_proj", "layer 0 v_proj", "layer 1 q_proj", "layer 1 v_proj"]
    assert rows[1].choices == ("AB", "AB")
    assert (rows[1].share("A"), rows[1].share("B"), rows[0].share("B")) == (1, 1, 0)


def test_sites_with_the_same_last_name_or_no_layer_keep_apart(make_run):
    folder = make_run(rounds=1)
    factors = {"h.0.self.query": "A", "h.0.cross.query": "B", "pooler.dense": "A"}
    (folder / "decisions.jsonl").write_text(json.dumps({"round": 1, "factors": factors}))
    labels = [row.label for row in factor_rows(read_run(folder))]
    assert labels == ["layer 0 cross.query", "layer 0 self.query", "pooler.dense"]
    assert layer_numbers("pooler.dense") == ()
    assert layer_numbers("swin.encoder.layers.0.blocks.1.attention.self.query") == (0, 1)


def test_a_site_that_a_round_does_not_mention_trained_nothing(make_run):
    folder = make_run(rounds=2)
    lines = [{"round": 1, "factors": {"h.0.q": "A"}}, {"round": 2, "factors": {}}]
    (folder / "decisions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert factor_rows(read_run(folder))[0].choices == ("A", "")
