"""Errors that the user can mend: shown as one line, exit code 2, no traceback."""


class UserError(Exception):
    """The message says what is wrong and what to type."""


class ConfigError(UserError):
    """A value, or a combination of values, that cannot be run."""


class DataError(UserError):
    """A dataset that is missing, damaged, or does not fit the run."""


def one_line(error: BaseException) -> str:
    """An error in one line: what it says, behind its type where it is none of ours."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    return " ".join(text.split())[:500]
