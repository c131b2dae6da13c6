"""Names that others chose, in Markdown: they stay text."""

from __future__ import annotations

import re


def inline(text: object) -> str:
    r"""Text on one line that Markdown reads as text.

    >>> print(inline("*a* <b> [c](d)"))
    \*a\* \<b\> \[c\](d)
    """
    return re.sub(r"([\\`*_<>\[\]~&])", r"\\\1", _line(str(text)))


def code(text: str) -> str:
    """Text for between two backticks."""
    return _line(text.replace("`", "'"))


def fenced(python: str) -> str:
    """A block of Python, in a fence that is longer than any in it."""
    longest = max((len(ticks) for ticks in re.findall("`+", python)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{python.strip()}\n{fence}"


def _line(text: str) -> str:
    """One line, without control characters, those that turn the direction of writing among them."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
