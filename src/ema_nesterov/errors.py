"""Errors that the user can mend: shown as one line, exit code 2, no traceback."""


class UserError(Exception):
    """The message says what is wrong and what to type."""


class ConfigError(UserError):
    """A value, or a combination of values, that cannot be run."""


class DataError(UserError):
    """A dataset that is missing, damaged, or does not fit the run."""
