"""YAML that means one thing: the one reader of configurations, policies and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorica.errors import UserError
from lorica.paths import user_path

LARGEST = 2**20
"""Maximum number of characters; the parser is slow, and no configuration is that long."""
DEEPEST = 20
BOOLEANS = "YAML reads yes, no, on and off as true and false; put the word in quotes"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what makes a file ambiguous or endless.

    Refuses duplicate keys, aliases, merge keys, tags and deep nesting. Dates stay text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, f"the alias *{event.anchor} is not supported", "write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refused(event, f"the tag {event.tag} is not supported", "write a plain value")
        if self._depth == DEEPEST:
            raise _refused(event, f"it is nested more than {DEEPEST} deep", "remove brackets or indentation")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int) or isinstance(key, bool):
                remedy = BOOLEANS if isinstance(key, bool) else "write the key as plain text"
                raise _refused(key_node, f"{_short(key)} is not a key", remedy)
            if key in seen:
                raise _refused(key_node, f"the key {_short(key)} is also in line {seen[key]}", "remove one of them")
            seen[key] = line
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


class _Refused(yaml.MarkedYAMLError):
    """YAML that is valid, but not accepted here."""

    def __init__(self, problem: str, remedy: str, mark: yaml.Mark | None) -> None:
        super().__init__(problem=problem, problem_mark=mark)
        self.remedy = remedy


def read_yaml(text: str, key: str, value: object, remedy: str) -> Any:
    """The content of a YAML text.

    Booleans are those of YAML 1.1 (`yes`, `no`, `on`, `off` too), as other readers of the file see them.

    Args:
        key, value: what the text is, for the error.
        remedy: what to do if there is no better advice.

    Raises:
        UserError: not YAML, a key that is given twice, an alias, a tag, or nesting that is too deep; names the line.
    """
    try:
        if len(text) > LARGEST:
            raise _Refused(f"it has {len(text):,} characters, but at most {LARGEST:,} are read", "shorten it", None)
        # A subclass of SafeLoader: nothing in the text is executed.
        return yaml.load(text, Loader=_Loader)
    except _Refused as error:
        raise UserError(key, value, _with_line(str(error.problem), error), error.remedy) from None
    except yaml.MarkedYAMLError as error:
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise UserError(key, value, f"not valid YAML ({_with_line(problem, error)})", remedy) from None
    except yaml.YAMLError as error:
        raise UserError(key, value, f"not valid YAML ({' '.join(str(error).split())})", remedy) from None
    except RecursionError:
        raise UserError(key, value, "it is nested too deeply", remedy) from None
    except ValueError as error:
        # A number of thousands of digits, for example.
        raise UserError(key, value, f"it contains a value that cannot be read ({error})", remedy) from None


def read_yaml_file(path: Path, key: str) -> dict[str, Any]:
    """A YAML file with a mapping of keys to values.

    Args:
        key: what the file is, for the error.

    Raises:
        UserError: as `read_yaml`; no such file, not readable, not UTF-8, or no mapping.
    """
    path = user_path(key, path)
    if not path.is_file():
        raise UserError(key, str(path), "no such file", "give the path of a YAML file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise UserError(key, str(path), problem, "save the file as UTF-8") from None
    except OSError as error:
        raise UserError(key, str(path), f"cannot be read ({error.strerror})", "make it readable") from None
    content = read_yaml(text, key, str(path), "correct the file")
    if not isinstance(content, dict):
        raise UserError(key, str(path), "not a mapping of keys to values", "start from an example in the documentation")
    return content


def _refused(place: Any, problem: str, remedy: str) -> _Refused:
    return _Refused(problem, remedy, place.start_mark)


def _with_line(problem: str, error: yaml.MarkedYAMLError) -> str:
    return problem if error.problem_mark is None else f"line {error.problem_mark.line + 1}: {problem}"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"
