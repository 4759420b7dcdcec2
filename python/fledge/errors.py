"""The error types of fledge and how a person reads them.

Every mistake a user can make is a `UserError` with three short parts: what was wrong, why it
matters or happened, and the fix. `cli.main` prints them without a traceback and turns the type into
an exit code. Nothing here imports anything of fledge; every layer may raise these.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_BUG = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


class FledgeError(Exception):
    """Base of all errors that fledge raises on purpose."""

    exit_code = EXIT_BUG


class UserError(FledgeError):
    """A mistake that the user can mend: `what` was wrong, `why`, and the `fix`."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


class Interrupted(FledgeError):
    """The work stopped on request (SIGTERM, SIGUSR1, Ctrl-C) after saving; it can be resumed."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return f"stopped on request in {self.where}; everything is saved"
