"""`UserError`: bad input that the user can correct."""

LONGEST_VALUE = 300


class UserError(Exception):
    """Bad input: names the key, its value, the problem and the remedy.

    Raised before any privacy budget is spent and before any file is overwritten. It never contains private data: a
    problem with a record names only the index and the column.

    Args:
        key: configuration key, command-line option or file.
        value: the value given.
        problem: what is wrong with it, without a full stop.
        remedy: what to do, as an instruction ("set X to Y").
    """

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        # All arguments, so that the error can be pickled: it travels between the processes of a benchmark.
        super().__init__(key, value, problem, remedy)
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy

    def __str__(self) -> str:
        ending = "" if self.remedy.endswith("?") else "."
        return f"{self.key} = {_shown(self.value)}: {self.problem}. {self.remedy[:1].upper()}{self.remedy[1:]}{ending}"


def _shown(value: object) -> str:
    """`repr`, shortened if it is long: a value may be a whole file's content."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not print an integer of more than 4,300 digits.
        return "(a number of thousands of digits)"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
