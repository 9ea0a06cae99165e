"""The ends of files that grow: the trainer's log and metrics.jsonl. Must not hold them open, nor read a long file whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from trainerd.contract.paths import Home
from trainerd.contract.status import Reading

from .words import clean, known

_BLOCK_BYTES = 64 * 1024
_MOST_POINTS = 2048
_SPOTS = 400
_SPOT_BYTES = 600
_MOST_BYTES = 1 << 20
_LONGEST = 2000


def last_lines(path: Path, num_lines: int) -> list[str]:
    """The last lines of a text file; [] when it is not there. A long file is read from its end."""
    want, content, start = max(num_lines, 0), b"", 1
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            reach = 0
            while want and start > 0 and content.count(b"\n") <= want:
                reach = min(size, max(_BLOCK_BYTES, reach * 4))
                start = file.seek(size - reach)
                content = file.read(reach)
    except OSError:
        return []
    return content.decode("utf-8", "replace").splitlines()[-want:] if want else []


def newest_log(home: Home) -> Path | None:
    """The log of the newest trainer start; names sort by time."""
    return max(home.logs.glob("training_*.log"), default=None, key=lambda path: path.name)


class OwnWords:
    """What the task itself prints: the lines of the trainer's log that are not the engine's, which begin with a time."""

    _ENGINES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")

    def __init__(self, home: Home) -> None:
        self._home = home
        self._log: str | None = None
        self._offset = 0

    def read(self, reading: Reading) -> list[str]:
        """The whole lines added since the last look; a restarted trainer has a new log, which is read from its beginning."""
        log = reading.status.log if reading.status else None
        if log is None:
            return []
        if log != self._log:
            self._log, self._offset = log, 0
        try:
            with open(self._home.root / log, "rb") as file:
                file.seek(self._offset)
                content = file.read(_MOST_BYTES)
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1] or (content if len(content) == _MOST_BYTES else b"")
        self._offset += len(whole)
        lines = whole.decode("utf-8", "replace").splitlines()
        return [clean(line.expandtabs(), _LONGEST) for line in lines if line.strip() and not self._ENGINES.match(line)]


class Losses:
    """(step, loss) of a run for a curve: about two thousand points at most, however long the run is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: list[tuple[int, float]] = []
        self._offset = 0
        self._every = 1
        self._seen = 0

    def read(self) -> None:
        """Take in what was written since the last call; a file cut back by a resume is read anew."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self.__init__(self.path)  # type: ignore[misc]
                if size - self._offset > _SPOTS * _BLOCK_BYTES // 16:
                    self._jump(size, lambda at: (file.seek(at), file.read(_SPOT_BYTES))[1])
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return
        whole, newline, _ = content.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self._take(whole.split(b"\n"))

    def _jump(self, size: int, read_at: Callable[[int], bytes]) -> None:
        """A long stretch is looked at in evenly spaced spots only."""
        step = max((size - self._offset) // _SPOTS, 1)
        for at in range(self._offset, size - _SPOT_BYTES, step):
            self._take(read_at(at).split(b"\n")[1:2])
        self._offset = max(size - _SPOT_BYTES, 0)

    def _take(self, lines: list[bytes]) -> None:
        for line in lines:
            self._seen += 1
            if self._seen % self._every == 0:
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            step, loss = entry["step"], entry["loss"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # an evaluation, or a line that is being written
        if known(step) and known(loss):
            self.points.append((int(step), float(loss)))
        if len(self.points) > _MOST_POINTS:
            self.points = self.points[::2]
            self._every *= 2
