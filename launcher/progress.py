"""A step of an installation in front of a person: one calm line that says what is fetched, how much, and for how long.

Must not hide anything for good: who calls keeps what the step said. Plain ASCII, for any console of any system.
"""

from __future__ import annotations

import queue
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import TextIO
from urllib.parse import unquote

_DOWNLOAD = re.compile(r"\s+Downloading (\S+) \(([\d.]+ [kMG]?B)\)")
_FILE = re.compile(r"(?P<name>.+?)-(?P<version>\d[^-]*)(-[^-]+)*\.whl$|(?P<source>.+)-(?P<of>\d[^-]*?)\.(tar\.gz|zip)$")
_RAW = re.compile(r"Progress (\d+) of (\d+)")
_UNPACKING = re.compile(r"Installing collected packages: (.+)")
_UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
_LARGE = re.compile(r"\d\d+(\.\d+)? MB|GB")  # worth a line of its own where a line cannot be written again
_LOOK_SECONDS = 0.5
_MUCH_BYTES = 10e6


class Pip:
    """What pip is at, from the lines it prints."""

    def __init__(self) -> None:
        self.doing = ""
        self._share = ""
        self._fetched_bytes = 0.0

    def take(self, line: str) -> str:
        """One line of pip's; returns what began with it, if that is large."""
        raw, unpacking, download = _RAW.match(line), _UNPACKING.match(line), _DOWNLOAD.match(line)
        if raw:
            self._share = f"{100 * int(raw[1]) // max(int(raw[2]), 1)} % of "
        elif unpacking:
            self.doing, self._share = f"unpacking {_number_of(unpacking[1].count(',') + 1)}", ""
            return self.doing
        elif download and not download[1].endswith(".metadata"):
            self.doing, self._share = f"{_package(download[1])}, {{}}{download[2]}", ""
            if self._fetched_bytes >= _MUCH_BYTES:
                self.doing += f" (after {self._fetched_bytes / 1e6:,.0f} MB)"
            amount, _, unit = download[2].partition(" ")
            self._fetched_bytes += float(amount) * _UNITS[unit]
            return self.now if _LARGE.search(download[2]) else ""
        return ""

    @property
    def now(self) -> str:
        return self.doing.format(self._share)


def _package(file: str) -> str:
    """Name and version in the address of a file."""
    base = unquote(file.rsplit("/", 1)[-1])
    found = _FILE.match(base)
    name = f"{found['name'] or found['source']} {found['version'] or found['of']}" if found else base
    return name.replace("{", "").replace("}", "")  # it becomes part of a format


def _number_of(packages: int) -> str:
    return f"{packages} package{'' if packages == 1 else 's'}"


def shown(doing: str, process: subprocess.Popen[bytes], out: TextIO) -> str:
    """Show a step until its process has ended; returns all it said. In a terminal one line is written again and again."""
    begun, said, pip = time.monotonic(), [], Pip()
    rewrites = out.isatty()
    out.write(f"{doing} ...{'' if rewrites else chr(10)}")
    out.flush()
    for line in _lines(process):
        if line is not None:
            said.append(line)
            large = pip.take(line)
            if large and not rewrites:
                out.write(f"  {large}\n")
        if rewrites:
            _rewrite(out, f"{doing}: {pip.now}, {_span(time.monotonic() - begun)}" if pip.now else f"{doing} ...")
        out.flush()
    process.wait()
    result = f"{_span(time.monotonic() - begun)}{'' if process.returncode == 0 else ', failed'}"
    if rewrites:
        _rewrite(out, f"{doing}: {result}")
    out.write("\n" if rewrites else f"  {result}\n")
    out.flush()
    return "".join(said)


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """What the process prints, line by line as it comes, and None now and then, so that the time goes on."""
    arrived: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            arrived.put(raw)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            raw = arrived.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            yield None
            continue
        if raw is None:
            return
        yield raw.decode("utf-8", "replace").replace("\r\n", "\n")


def _rewrite(out: TextIO, text: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    out.write(f"\r{text[:width]:<{width}}")


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
