"""Errors that a user can act on; the command line prints them in one line, without a traceback."""


class UserError(Exception):
    """Something in the input is wrong: the message says what, where, and what would be right."""
