"""YAML that says two things, or never ends, is refused with its line. Nothing ends in anything but a `UserError`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorica.config import DEFAULT_CONFIG, ExperimentConfig, load
from lorica.errors import UserError
from lorica.privacy.policy import load_policy
from lorica.strict_yaml import read_yaml, read_yaml_file
from tests.fuzzing import draws_of

POLICY = "max_epsilon: 1.0\ndelta: 1.0e-5\nbase_models: null\ntasks: [{type: text-classification}]\n"


def read(text: str) -> Any:
    return read_yaml(text, "config", "x.yaml", "correct the file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is also in line 1.*Remove one"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: the key 'b' is also in line 2"),
        ("[{a: 1, a: 2}]", "line 1: the key 'a' is also"),
        ("a: &x [1]\nb: *x\n", r"line 2: the alias \*x is not supported"),
        ("&a {b: *a}", r"the alias \*a is not supported"),
        ("a: !!python/object/apply:os.system [true]", "the tag .*os.system is not supported"),
        ("a: !!set {b}", "the tag .* is not supported"),
        ("a: !new 1", "the tag !new is not supported"),
        ("? [a, b]\n: 1\n", "line 1"),
        ("yes: 1\n", "put the word in quotes"),
        ("1.5: 1\n", "is not a key"),
        ("a: [" * 30, "line 1: it is nested more than 20 deep"),
        ("{a: " * 5000, "nested"),
        ("a: " + "9" * 6000, "cannot be read"),
        ("a: 'x\n", "line 2: .*quoted scalar"),
        ("a: b: c\n", "line 1"),
        ("\ta: 1\n", "line 1"),
        ("a: \x07\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("#" * 2**20 + "#", "at most 1,048,576"),
    ],
)
def test_what_is_ambiguous_or_endless_is_refused_with_its_line(text: str, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(UserError, match=message):
        read(text)
    assert time.perf_counter() - started < 5


def test_an_alias_bomb_ends_at_its_first_alias() -> None:
    levels = [f"l{number}: &l{number} [{', '.join([f'*l{number - 1}'] * 9)}]" for number in range(1, 12)]
    with pytest.raises(UserError, match=r"line 2: the alias \*l0"):
        read("\n".join(["l0: &l0 x", *levels]))


def test_plain_yaml_is_what_pyyaml_reads() -> None:
    for path in (DEFAULT_CONFIG, *Path(__file__).parent.parent.glob("examples/**/*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert read(text) == yaml.safe_load(text), path
    written = load().to_yaml()
    assert read(written) == yaml.safe_load(written)


def test_dates_stay_text_and_a_merge_key_is_a_key() -> None:
    assert read("a: 2026-13-45\nb: 2026-11-25") == {"a": "2026-13-45", "b": "2026-11-25"}
    assert read("<<: {a: 1}") == {"<<": {"a": 1}}


def test_a_section_that_stands_twice_is_refused_wherever_yaml_is_read(tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text(load().to_yaml() + "privacy: none\n")
    with pytest.raises(UserError, match=r"config = .*twice\.yaml.*'privacy' is also"):
        load(twice)
    twice.write_text(POLICY + "max_epsilon: 100.0\n")
    with pytest.raises(UserError, match=r"policy = .*line 5: the key 'max_epsilon' is also in line 1"):
        load_policy(twice)
    with pytest.raises(UserError, match=r"privacy = .*is also"):
        load(overrides=["privacy={epsilon: 1, epsilon: 2}"])


def test_booleans_of_yaml_are_explained() -> None:
    with pytest.raises(UserError, match=r"task\.labels = False.*[Pp]ut the word in quotes"):
        load(overrides=["task.labels=[no, yes]"])
    assert load(overrides=["task.labels=['no', 'yes']"]).task.labels == ["no", "yes"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes("name: ü\n".encode(encoding))
    with pytest.raises(UserError, match=r"not UTF-8.*Save the file as UTF-8"):
        read_yaml_file(path, "config")
    path.write_bytes("name: ü\n".encode("utf-8-sig"))
    assert read_yaml_file(path, "config") == {"name": "ü"}


NUMBERS = [
    "1e12",
    "1e300",
    "1e-300",
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "1e1000",
    "9" * 30,
    "9" * 5000,
    "0x1f",
    "1:30",
]
ODD = [
    *NUMBERS,
    *(
        "null",
        "~",
        "''",
        "yes",
        "no",
        "[]",
        "{}",
        "[[]]",
        "{a: b}",
        "*x",
        "&x 1",
        "!!binary aGk=",
        "!!int x",
        "[1, {2: 3}]",
    ),
    *(
        "2026-13-45",
        "{1: 2}",
        "{yes: no}",
        "'\\ud800'",
        '"\\ud800"',
        "'\\0'",
        "'x' y",
        "- a",
        "|",
        ">-",
        "%",
        "@",
        "`",
        "\t",
    ),
]


def keys_of(config: ExperimentConfig) -> list[str]:
    content = config.model_dump()
    found = []
    for section, value in content.items():
        found.append(section)
        found += [f"{section}.{key}" for key in value] if isinstance(value, dict) else []
    return found


def mutated(text: str, draw: random.Random) -> str:
    """One to three mutations of lines or characters."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        changes: list[Callable[[], str]] = [
            lambda at=at, lines=lines: "\n".join(lines[:at] + lines[at + 1 :]),  # type: ignore[misc]
            lambda at=at, lines=lines, other=other: "\n".join([*lines[:at], lines[other], *lines[at:]]),  # type: ignore[misc]
            lambda at=at, lines=lines: "\n".join([*lines[:at], "  " + lines[at], *lines[at + 1 :]]),  # type: ignore[misc]
            lambda at=at, lines=lines: "\n".join(  # type: ignore[misc]
                [*lines[:at], f"{lines[at].split(':')[0]}: {draw.choice(ODD)}", *lines[at + 1 :]]
            ),
            lambda text=text: _with_a_character(text, draw),  # type: ignore[misc]
        ]
        text = draw.choice(changes)()
    return text


def _with_a_character(text: str, draw: random.Random) -> str:
    at = draw.randrange(len(text))
    return text[:at] + draw.choice("\0\t\"'{}[]:,&*!|>%@`#\x85\u2028é🦠-? ") + text[at + draw.randint(0, 1) :]


def ends_well(call: Callable[[], object], what: str) -> None:
    started = time.perf_counter()
    try:
        call()
    except UserError:
        pass
    except Exception as error:
        raise AssertionError(f"{what!r}: {type(error).__name__}: {error}") from error
    assert time.perf_counter() - started < 10, what


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_configurations_and_policies_end_in_one_error(count: int, tmp_path: Path) -> None:
    draw = draws_of("configurations", count)
    texts = [DEFAULT_CONFIG.read_text(encoding="utf-8"), load().to_yaml(), POLICY]
    path = tmp_path / "x.yaml"
    for number in range(count):
        text = mutated(texts[number % 3], draw)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        ends_well(lambda: load_policy(path) if texts[number % 3] == POLICY else load(path), text)  # noqa: B023


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_overrides_end_in_one_error(count: int) -> None:
    draw = draws_of("overrides", count)
    keys = keys_of(load())
    for _ in range(count):
        key = draw.choice([*keys, "", ".", "a..b", "privacy.epsilon.x", "federation.", "método.x"])
        override = draw.choice(
            [f"{key}={draw.choice(ODD)}", key, f"{key}==", f"{key}={draw.choice(ODD)} {draw.choice(ODD)}"]
        )
        ends_well(lambda: load(overrides=[override]), override)  # noqa: B023


@pytest.mark.parametrize(
    ("override", "bound"),
    [
        ("federation.rounds=1000000000000", "1000000"),
        ("lora.r=1000000000", "4096"),
        ("privacy.clip_norm=1e300", "1000000000"),
        ("privacy.epsilon=null privacy.noise_multiplier=1e-9", "0.001"),
        ("optimizer.lr=1e308", "1000000"),
        ("server.lr=.inf", "finite"),
        ("optimizer.lr=.nan", "finite|greater"),
    ],
)
def test_a_number_that_decides_time_memory_or_sense_has_bounds(override: str, bound: str) -> None:
    with pytest.raises(UserError, match=bound):
        load(overrides=override.split())
