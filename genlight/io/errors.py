"""The two failures of files that a user meets: a file that is not whole, and a full disk."""

from genlight.errors import UserError


class CorruptFileError(UserError):
    """A file is truncated, altered or of a form that genlight does not write; the message names the file."""


class DiskFullError(UserError):
    """There was no room for a file; what the path held before is untouched."""
