"""Errors that a user can act on; the command line prints them in one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

# exit codes of a command: one that failed, and one that was wrong and did nothing
FAILURE, USAGE_ERROR = 1, 2


class UserError(Exception):
    """Something in the input is wrong: the message says what, where, and what would be right."""


@contextmanager
def in_config(key: str) -> Iterator[None]:
    """Values below a key of the config that do not fit: a ValueError becomes a UserError that names the key."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
