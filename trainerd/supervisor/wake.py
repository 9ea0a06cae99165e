"""Wakes the supervisor when a request file appears. Must not read it: the scan once a second is the truth, this is only sooner."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer


class _Waker(FileSystemEventHandler):
    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def on_created(self, event: FileSystemEvent) -> None:
        self._wake()

    def on_moved(self, event: FileSystemEvent) -> None:
        self._wake()


@contextlib.contextmanager
def watching(folder: Path, wake: Callable[[], None]) -> Iterator[None]:
    """Call `wake`, from another thread, whenever a file appears in `folder`."""
    observer = Observer()
    try:
        observer.schedule(_Waker(wake), str(folder))
        observer.start()
    except (OSError, RuntimeError) as error:
        # Out of watches or of instances: requests are then found within a second.
        print(f"cannot watch {folder}: {error}", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        observer.stop()
        observer.join(1.0)
