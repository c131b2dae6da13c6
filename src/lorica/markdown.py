"""Escape untrusted text for Markdown."""

from __future__ import annotations

import re


def inline(text: object) -> str:
    r"""Text on one line, escaped for Markdown.

    >>> print(inline("*a* <b> [c](d)"))
    \*a\* \<b\> \[c\](d)
    """
    return re.sub(r"([\\`*_<>\[\]~&])", r"\\\1", _line(str(text)))


def code(text: str) -> str:
    """Text to put between backticks."""
    return _line(text.replace("`", "'"))


def fenced(python: str) -> str:
    """A block of Python code, in a fence longer than any fence inside."""
    longest = max((len(ticks) for ticks in re.findall("`+", python)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{python.strip()}\n{fence}"


def _line(text: str) -> str:
    """The text on one line, without control characters, including those that change the writing direction."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
