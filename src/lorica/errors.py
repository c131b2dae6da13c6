"""`UserError`: bad input that the user can correct."""


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
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        ending = "" if remedy.endswith("?") else "."
        super().__init__(f"{key} = {value!r}: {problem}. {remedy[:1].upper()}{remedy[1:]}{ending}")
