"""Synthetic run folders: the files as a run would leave them, written here by hand."""

import json
import math
import random

import pytest
import yaml


def write_run(
    folder,
    *,
    name="digits-as-lora",
    method="as-lora",
    seed=42,
    rounds=20,
    planned=None,
    clients=6,
    layers=4,
    factors=None,
    accuracies=None,
    start=0.73,
    top=0.92,
    evaluate_every=1,
    noise="secure",
    epsilon=3.0,
    bytes_up=49_152,
    bytes_down=98_304,
    ratios=None,
):
    """Write a run folder and return it. `factors(round, layer, site)` is the choice, `accuracies` the curve.

    `ratios(round, layer)` is the choice's signal-to-noise ratio; None where nothing is recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{method} {seed}")
    private = noise != "none"
    privacy_section = {"unit": "record", "epsilon": epsilon, "delta": 1e-5, "clip_norm": 2.0, "noise": noise}
    config = {
        "name": name,
        "seed": seed,
        "model": {"base": "lorica:glyph-vit", "head": "train"},
        "lora": {"r": 8, "lora_alpha": 8, "target_modules": ["query", "value"]},
        "task": {"type": "image-classification", "train": "lorica:digits/train", "test": "lorica:digits/test"},
        "federation": {"clients": clients, "rounds": planned or rounds, "local_steps": 3, "batch_size": 64},
        "method": {"name": method},
        "privacy": privacy_section | ({} if private else {"epsilon": None}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    environment = {
        "lorica": "0.1.0",
        "python": "3.11.2",
        "torch": "2.13.0+cpu",
        "transformers": "5.1.0",
        "peft": "0.21.2",
        "platform": "Linux-6.1-x86_64",
        "git": "aa28dc1",
        "threads": 2,
        "device": "cpu",
        "started": "2026-11-21T04:08:00+00:00",
    }
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")

    metrics = [{"round": 0, "accuracy": accuracies[0] if accuracies else start, "loss": 0.9}]
    decisions = []
    for number in range(1, rounds + 1):
        row = {"round": number}
        if number % evaluate_every == 0:
            curve = top - (top - start) * math.exp(-5 * number / rounds) + draw.gauss(0, 0.006)
            row["accuracy"] = accuracies[number] if accuracies else round(curve, 4)
            row["loss"] = round(1.2 * (1 - row["accuracy"]) + 0.2, 4)
        if private:
            row["epsilon"] = round(epsilon * (0.3 + 0.69 * math.sqrt(number / rounds)), 4)
        row |= {"seconds": 4.2, "server_seconds": 0.2, "participants": list(range(clients))}
        row["bytes_up"] = {str(client): bytes_up for client in range(clients)}
        row["bytes_down"] = {str(client): bytes_down for client in range(clients)}
        metrics.append(row)
        chosen = {}
        for layer in range(layers):
            choice = "B" if number == 1 else draw.choice("AB")
            for site in ("q_proj", "v_proj"):
                key = f"vit.layers.{layer}.attention.{site}"
                chosen[key] = factors(number, layer, site) if factors else choice
        decisions.append({"round": number, "factors": chosen})
        if ratios:
            found = {f"vit.layers.{layer}": ratios(number, layer) for layer in range(layers)}
            decisions[-1]["signal_to_noise"] = {key: value for key, value in found.items() if value is not None}
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "decisions.jsonl", decisions)

    privacy = {"private_release": noise == "secure", "noise": noise}
    if private:
        sizes = [round(240 * (1 + 0.9 * math.sin(1.7 * client))) + 60 for client in range(clients)]
        privacy |= {
            "unit": "record",
            "relation": "zero-out: one record contributes zero to every batch; the number of records is public",
            "sampler": "Poisson",
            "clipping": "flat over all trained tensors, per record",
            "delta": 1e-5,
            "target_epsilon": epsilon,
            "accountant": "dp-accounting 0.6.0 PLD (connect-the-dots, 1e-4)",
            "clients": [
                {
                    "client": client,
                    "records": size,
                    "sampling_rate": min(1.0, 64 / size),
                    "noise_multiplier": 0.6 + 90 / size,
                    "clip_norm": 2.0,
                    "steps": 3 * rounds,
                    "releases": rounds,
                    "epsilon": epsilon * (0.99 - 0.001 * client),
                    "epsilon_rdp": epsilon * 1.11,
                    "delta": 1e-5,
                    "lifetime_epsilon": epsilon * (0.99 - 0.001 * client),
                }
                for client, size in enumerate(sizes)
            ],
            "assumptions": [
                "The number of records of each client is public.",
                "Clients hold disjoint sets of records.",
                "The operating system's random numbers are not predictable.",
            ],
            "not_covered": [
                "Accuracy on the public test set, which holds no private record.",
                "The choice of hyper-parameters, if earlier runs on the same data informed it.",
            ],
        }
    (folder / "privacy.json").write_text(json.dumps(privacy), encoding="utf-8")
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run folder below tmp_path; see `write_run` for what can be varied."""

    def make(folder="run", **changes):
        return write_run(tmp_path / folder, **changes)

    return make


def metrics_of(accuracies, epsilon=None, seconds=2.0):
    """Metrics lines of two clients with these accuracies; the first is the starting model's."""
    rows = [{"round": 0, "accuracy": accuracies[0], "loss": 1.0}]
    for number, accuracy in enumerate(accuracies[1:], start=1):
        row = {"round": number, "accuracy": accuracy, "loss": 1 - accuracy, "seconds": seconds, "participants": [0, 1]}
        row |= {"bytes_up": {"0": 1000, "1": 500}, "bytes_down": {"0": 2000, "1": 1000}}
        if epsilon is not None:
            row["epsilon"] = epsilon * number / (len(accuracies) - 1)
        rows.append(row)
    return rows


@pytest.fixture
def make_metrics():
    return metrics_of
