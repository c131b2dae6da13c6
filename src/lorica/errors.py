"""The one error type for everything a user can mend."""


class UserError(Exception):
    """Bad input, said as: which key, which value, what is wrong, what to do.

    Raised before any privacy budget is spent and before any file is overwritten. Never carries private content: a
    problem with a record names its index and column only.
    """

    def __init__(self, key: str, value: object, problem: str, remedy: str) -> None:
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        ending = "" if remedy.endswith("?") else "."
        super().__init__(f"{key} = {value!r}: {problem}. {remedy[:1].upper()}{remedy[1:]}{ending}")
