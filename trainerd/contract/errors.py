"""Every error a person can meet, with what to do next and the exit code it ends in. Must not print or log anything.

TrainerdError                 4
├── UsageError                2   the words or the configuration are wrong
│   ├── ConfigError           2   all problems of one configuration together
│   ├── BadTaskFile           2   a person's own task file cannot be loaded as it is
│   └── MissingModule         2   the task imports what is not there (any more)
├── NothingRunning            3   there is no supervisor to talk to
├── Unreadable                4   a file of ours cannot be read, or is of a newer schema
├── RunFailed                 4   the run ended in failure
│   ├── DeviceLost            4   the GPU a run was planned for does not answer
│   ├── NotFinite             4   a loss, gradient or weight is no number any more
│   ├── NotExported           4   all is trained and saved, and the disk does not take the result
│   └── ExportFailed          4   all is trained and saved, and the task's own export() cannot write its part
├── NoGoodCheckpoint          4   checkpoints exist and none can be loaded
├── OutputLost                4   the standard output takes nothing
└── Refused                   5   possible in principle, not now: already running, does not fit, disk too full
    └── AlreadyRunning        5   a supervisor holds this home
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_NOTHING_RUNNING = 3
EXIT_FAILED = 4
EXIT_REFUSED = 5


_NO_SPACE = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
_TOO_MUCH = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}


def remedy(error: OSError) -> str:
    """What a person can do about what the system refused."""
    if error.errno in _NO_SPACE:
        return "Free some space on that disk, and try again."
    if error.errno in _NO_RIGHT:
        return "Check its owner and permissions, and that no other program holds it."
    if error.errno in _TOO_MUCH:
        return "Close some programs, and try again."
    if error.errno == errno.ENOENT:
        return "Check that it is there, and its name."
    return "Try again; if it stays so, look at the disk and at the system's log."


class TrainerdError(Exception):
    """An error with a message for a person, a hint that says what to do, and an exit code."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(TrainerdError):
    """The words typed, or the file named, cannot be understood."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A configuration with one or more problems, reported together."""

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = f"{len(self.problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(message, hint)


class BadTaskFile(UsageError):
    """The task's own file is wrong: the same again with the run's copy of it, whatever becomes of the file itself."""


class MissingModule(UsageError):
    """The task imports a module that is not there: the same again, until it is."""


class NothingRunning(TrainerdError):
    """The command needs a live supervisor and there is none."""

    exit_code = EXIT_NOTHING_RUNNING


class Unreadable(TrainerdError):
    """A file of ours is damaged, or written by a newer version."""


class RunFailed(TrainerdError):
    """The run ended, and not well."""


class DeviceLost(RunFailed):
    """The device is gone for now: after suspend, a reset of the driver, or with its cable. It may come back."""


class NotFinite(RunFailed):
    """A loss, gradient or weight is NaN or infinite. `for_good`: nothing is to be tried again."""

    def __init__(self, message: str, hint: str = "", for_good: bool = False) -> None:
        super().__init__(message, hint)
        self.for_good = for_good


class NotExported(RunFailed):
    """All is trained and saved, and the disk does not take the result."""


class ExportFailed(RunFailed):
    """All is trained and saved, and the task's own export() raises: the same again, whenever it is called."""


class NoGoodCheckpoint(TrainerdError):
    """There are checkpoints, and none of them is whole: never start over silently."""


class OutputLost(TrainerdError):
    """What was to be printed cannot be: a full disk, a closed descriptor."""


class Refused(TrainerdError):
    """Understood, but not done, with what would have to change."""

    exit_code = EXIT_REFUSED


class AlreadyRunning(Refused):
    """Another supervisor holds this home."""


_OURS = frozenset(name for name, kind in globals().items() if isinstance(kind, type) and issubclass(kind, TrainerdError))


def is_ours(words: str) -> bool:
    """Whether "Kind: text" is of an error above, whose text was written for a person."""
    kind, colon, _ = words.partition(": ")
    return bool(colon) and kind in _OURS


def plain(words: str) -> str:
    """Without the name of our class, which says nothing to a person; that of anybody else's exception stays."""
    return words.partition(": ")[2] if is_ours(words) else words
