"""Errors a user can act on. Each message names what, which value, where, and the fix, on one line."""

import difflib
from collections.abc import Iterable


class BenthicError(Exception):
    """Something failed while running. Exit code 1."""

    exit_code = 1


class InputError(BenthicError):
    """A flag, config key, file or prompt that the user gave cannot be used. Exit code 2."""

    exit_code = 2


class DoesNotFit(BenthicError):
    """The job needs more memory or disk than there is. Exit code 3."""

    exit_code = 3


class CheckpointError(BenthicError):
    """A checkpoint is missing, incomplete or corrupt."""


class Diverged(BenthicError):
    """Training stopped because too many updates in a row had a non-finite or exploding gradient."""


class Interrupted(BenthicError):
    """Stopped by a signal after a clean save. Exit code 128 + signal number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or the list of known names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
