"""The error a person can act on: one line, without a traceback on the command line."""

from collections.abc import Callable
from typing import Any


class UserError(RuntimeError):
    """Something outside the program is wrong (a path, a file, a label, a full disk); the message says what to do.

    The command line prints the message on one line and exits with status 2. Wrong *arguments* of Python functions
    raise ``ValueError`` or ``TypeError`` instead.
    """


class SettingError(UserError, ValueError):
    """Settings that turn out not to go with the data, the loss or a checkpoint once training begins."""


class JournalError(UserError, ValueError):
    """A journal that cannot be used: damaged, of another version, or of another run.

    Args:
        message: what is wrong and what to do.
        offset: byte at which the damage begins, or None.
        key: the entry of the header that is wrong or differs, or None.
    """

    def __init__(self, message: str, *, offset: int | None = None, key: str | None = None):
        super().__init__(message)
        self.offset, self.key = offset, key


class Diverged(UserError):
    """Training got out of hand and was stopped; the trainable numbers are those before the step."""


class ToldEverywhere(UserError):
    """A failure of one rank that all ranks know of and raise; it is enough that rank 0 prints it."""


def together(ranks, work: Callable[[], Any], when: str) -> Any:
    """Return ``work()``, by ``Ranks.together`` of ``adazeta.distributed`` where there are ``ranks``."""
    return work() if ranks is None else ranks.together(work, when)
