"""Checks for a method of one's own, and the tiny federation that they run."""

from lorica.testing.checks import check_method

__all__ = ["check_method"]
