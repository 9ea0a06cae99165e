"""Every operation on files that must survive a crash, in one small module. Must not know what the files mean.

Replace, never overwrite: a reader sees the old file or the new one, whole. `durable=True` adds the fsyncs that make the
new one survive a power cut (file before the rename, folder after it). The operations themselves go through `disk`, so
that a test can count, cut, fail or record every single one.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trainerd.contract.errors import Unreadable, UsageError

if TYPE_CHECKING:
    import hashlib

SCHEMA = 1
_WINDOWS = sys.platform == "win32"
# Access denied, sharing violation, lock violation: a scanner, an indexer or a plain reader holds the file for a moment.
_BUSY_ON_WINDOWS = (5, 32, 33)
_BUSY_SECONDS = 2.5
_CHUNK_BYTES = 1 << 20
_TAGS_OF_LINKS = (0xA000000C, 0xA0000003)  # symbolic links and junctions on Windows


class Disk:
    """The operations, one method each. A test puts another Disk into `files.disk`."""

    def create(self, path: Path) -> BinaryIO:
        return open(path, "wb", opener=_no_link)

    def open_to_append(self, path: Path) -> BinaryIO:
        """Unbuffered: what is written is known to be written, or not."""
        return open(path, "a+b", buffering=0, opener=_no_link)

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while len(view):  # an unbuffered file may take a part, and say why not the rest only the next time
            view = view[file.write(view) :]

    def truncate(self, file: BinaryIO, size: int) -> None:
        file.truncate(size)

    def sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path, mode: int = 0o777) -> None:
        os.mkdir(path, mode)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _no_link(path: str, flags: int) -> int:
    """Opens the file itself: a link in its place would lead a write out of the home, a pipe would hold it for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", path)
    return descriptor


disk = Disk()
_serial = itertools.count()


def replace(source: Path, target: Path, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Rename `source` onto `target`; on Windows wait for short-lived readers of either.

    Raises OSError when it cannot be done, PermissionError when somebody held the file all along.
    """
    _once_free(lambda: disk.rename(source, target), busy_seconds)


def _once_free(action: Callable[[], None], busy_seconds: float) -> None:
    """Do something with a file that somebody else may be holding for a moment (Windows). Raises OSError."""
    deadline = time.monotonic() + busy_seconds
    pause = 0.005
    while True:
        try:
            action()
            return
        except OSError as error:
            busy = _WINDOWS and getattr(error, "winerror", None) in _BUSY_ON_WINDOWS
            if not busy or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.25)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows has no such call and journals them itself."""
    if _WINDOWS:
        return
    try:
        disk.sync_folder(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such operation
            raise


def _sync_rename(target: Path) -> None:
    """Make a rename onto `target` durable. NTFS writes its journal when a file is flushed, so there it is the file's turn again."""
    if _WINDOWS:
        _once_free(lambda: sync_file(target), _BUSY_SECONDS)
    else:
        sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Make what was written to `path`, through whatever handle, durable. Raises OSError."""
    with open(path, "r+b") as file:  # Windows flushes only a handle that may write
        disk.sync(file)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it, so that they survive a power cut. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent, mode)
    try:
        disk.make_folder(path, mode)
    except FileExistsError:
        pass  # somebody else made it just now, and may not have come to the sync
    try:
        sync_folder(path.parent)
    except PermissionError:
        pass  # one may make folders in it but not read it: nothing of ours lies there but this


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other attempt uses: after a failed fsync a file must not be tried again, but written anew."""
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether `path` is named like the temporary files of this module: a leftover, when its writer is gone."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def tidy(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed have left half written in `folder`: of the file `name`, or of all.

    Only for whoever alone writes there: another's write that is going on would be lost.
    """
    try:
        left = [path for path in folder.iterdir() if is_temporary(path) and (name is None or path.name.startswith(f".{name}."))]
    except FileNotFoundError:
        return
    for path in left:
        remove(path)


def is_link(path: Path) -> bool:
    """Whether `path` itself leads elsewhere: a symbolic link, or a junction on Windows."""
    try:
        seen = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISLNK(seen.st_mode) or getattr(seen, "st_reparse_tag", 0) in _TAGS_OF_LINKS


def refuse_links(root: Path, path: Path) -> None:
    """Raise UsageError when `path`, or a folder between `root` and it, is a link: nothing is written through one out of the home."""
    for place in (path, *path.parents):
        if place == root or not place.is_relative_to(root):
            return
        if is_link(place):
            raise UsageError(f"{place} is a link, and what is written there would leave {root}.", "Put a real folder or file in its place.")


def write_atomic(path: Path, content: bytes, *, durable: bool = False, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Put `content` at `path` so that no reader and no crash ever sees half of it. Raises OSError."""
    temporary = _temporary(path)
    try:
        with disk.create(temporary) as file:
            disk.write(file, content)
            if durable:
                disk.sync(file)
        replace(temporary, path, busy_seconds)
    except OSError:
        _discard(temporary)
        raise
    if durable:
        _sync_rename(path)


class Sink:
    """A file being written, hashed on the way. It keeps the first OSError and goes on as if nothing had happened:
    serialisers written in C++ lose the errno of an exception raised inside write(), or do not survive it."""

    def __init__(self, file: BinaryIO) -> None:
        import hashlib  # OpenSSL costs `status` 4 ms, which hashes nothing

        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None
        self.bytes = 0

    def write(self, content: bytes | memoryview) -> int:
        size = len(content)
        if self.error is None:
            try:
                disk.write(self._file, content)
            except OSError as error:
                self.error = error
            self._hash.update(content)
            self.bytes += size
        return size

    def flush(self) -> None:
        """Nothing: write_stream flushes and syncs once, at the end."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_stream(path: Path, produce: Callable[[Sink], object]) -> tuple[int, str]:
    """Put what `produce` writes at `path`, durably and at once; returns its size and sha256. Raises OSError."""
    temporary = _temporary(path)
    try:
        with disk.create(temporary) as file:
            sink = Sink(file)
            produce(sink)
            if sink.error is not None:
                raise sink.error
            disk.sync(file)
        replace(temporary, path)
    except BaseException:
        _discard(temporary)
        raise
    _sync_rename(path)
    return sink.bytes, sink.sha256


class Growing:
    """A file that only grows, a whole piece at a time: of a piece that cannot be written nothing stays."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        """Cuts the file back to its first `keep_bytes`, if it is longer. Raises OSError, also for a link or a pipe."""
        self._path = path
        self._file = disk.open_to_append(path)
        try:
            if os.fstat(self._file.fileno()).st_size > keep_bytes:
                disk.truncate(self._file, keep_bytes)
            self.bytes = os.fstat(self._file.fileno()).st_size
        except OSError:
            self._file.close()
            raise

    def append(self, content: bytes) -> None:
        """Add one piece. Raises OSError; then the file is as it was, or will be cut back by the next append."""
        if os.fstat(self._file.fileno()).st_nlink == 0:
            self._make_again()
        if os.fstat(self._file.fileno()).st_size != self.bytes:
            disk.truncate(self._file, self.bytes)
        try:
            disk.write(self._file, content)
        except OSError:
            try:
                disk.truncate(self._file, self.bytes)
            except OSError:
                pass  # the next append, or the next start, cuts it back
            raise
        self.bytes += len(content)

    def _make_again(self) -> None:
        """Somebody removed the file under us: what it held is still in our hands, and every later checkpoint counts on it."""
        make_folder(self._path.parent)
        again = disk.open_to_append(self._path)
        try:
            disk.truncate(again, 0)
            self._file.seek(0)
            while content := self._file.read(_CHUNK_BYTES):
                disk.write(again, content)
        except OSError:
            again.close()
            raise
        self._file.close()
        self._file = again

    def close(self) -> None:
        self._file.close()


def _discard(temporary: Path) -> None:
    """Remove our own unfinished file; what made it unfinishable may forbid that too, and is the error to report."""
    try:
        remove(temporary)
    except OSError:
        pass


def write_json(path: Path, document: dict[str, Any], *, durable: bool = False, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Put a JSON document at `path` by replacement. Raises OSError."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode("utf-8", "replace") + b"\n", durable=durable, busy_seconds=busy_seconds)


def read_json(path: Path, what: str, max_bytes: int = 16 << 20, remedy: str = "Move it away.") -> dict[str, Any]:
    """The JSON document at `path`.

    `what` names it in messages ("the status"), `remedy` says what to do about damage. Raises FileNotFoundError when there
    is none, Unreadable when it is not a JSON object, is larger than `max_bytes`, or carries a schema newer than ours.
    """
    # A pipe in place of the file would hold its reader for ever: opened without waiting, and refused.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Unreadable(f"{what} at {path} is not a file.", remedy)
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise Unreadable(f"{what} at {path} is larger than {max_bytes:,} bytes: trainerd did not write it.", remedy)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise Unreadable(f"{what} at {path} is damaged: it is not JSON.", remedy) from None
    if not isinstance(document, dict):
        raise Unreadable(f"{what} at {path} is damaged: it holds no JSON object.", remedy)
    schema = document.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        message = f"{what} at {path} has schema {schema}; this trainerd reads up to {SCHEMA}."
        raise Unreadable(message, "Use the newer trainerd that wrote it.")
    return document


def hash_of(path: Path) -> hashlib._Hash:
    """The sha256 of a file's content, to go on from. Raises OSError."""
    import hashlib

    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content. Raises OSError."""
    return hash_of(path).hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append one whole line; a line torn by an earlier crash is closed first, so that it spoils no other."""
    with disk.open_to_append(path) as file:
        content = line.encode("utf-8", "replace") + b"\n"
        size = os.fstat(file.fileno()).st_size
        if size > 0:
            file.seek(size - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        disk.write(file, content)


def remove(path: Path) -> None:
    """Remove a file if it is there; a file somebody holds open on Windows is left for later."""
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return
    except PermissionError:
        if not _WINDOWS:
            raise
