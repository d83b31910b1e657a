"""Errors that are a sentence for the person at the keyboard: what is wrong, where, what to do."""


class UserError(Exception):
    """Something that the user can put right. The commands print it as one sentence, without a traceback, and end with code 1."""


class SharedError(UserError):
    """A UserError that all ranks of a job raise alike: the first says it for all."""
