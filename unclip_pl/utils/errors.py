"""Errors whose message is written for the user: what is wrong, where, and what to do."""


class UserError(Exception):
    """An error that the user can fix.

    The commands print its message as one sentence without a traceback and exit with code 1.
    """


class SharedError(UserError):
    """A UserError that all ranks of a job raise alike, so that only rank 0 prints it."""
