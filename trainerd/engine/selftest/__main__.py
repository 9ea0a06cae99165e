"""`python -m trainerd.engine.selftest --home DIR …`: the trial in a process of its own, one JSON line per event on its stdout.

Must not print words: they are the client's. The end of its stdin means that nobody waits any more. The last line is the
verdict, or why there can be none just now. The folder is the asker's, to keep or to remove; only when he is gone it is removed here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainerd.contract import wire
from trainerd.contract.errors import EXIT_FAILED, EXIT_REFUSED, Refused

_EXIT_LEFT = 130


class Left(Exception):
    """Whoever asked for the trial is gone."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainerd.engine.selftest")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--kills", type=int, help="on the CPU; by default as many as this system does in a minute")
    parser.add_argument("--seconds", type=float, help="kill no more after that time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spawn", action="store_true", help="begin every life from nothing, even where it could be forked")
    parser.add_argument("--gpu", nargs=2, metavar=("UUID", "NAME"), help="the GPU that the driver shows")
    asked = parser.parse_args(arguments)
    environment = dict(os.environ)
    # Only spawned lives may see the GPU: a process that has touched CUDA cannot be forked, nor one with several threads.
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRAINERD_STATE=str(asked.home / "state"))
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    from trainerd.engine.selftest import devices  # torch, from here on

    try:
        watch = _watch()
        watch()
        verdict = devices.everything(asked, environment, _tell, watch)
        _tell("verdict", **verdict)
    except Refused as refused:
        _tell("refused", why=str(refused))
        return EXIT_REFUSED
    except (Left, KeyboardInterrupt, BrokenPipeError):
        shutil.rmtree(asked.home, ignore_errors=True)
        return _EXIT_LEFT
    return 0 if verdict["passed"] else EXIT_FAILED


def _tell(event: str, **fields: Any) -> None:
    """One line. Raises BrokenPipeError when nobody reads."""
    content = memoryview(wire.encode({"event": event, **fields}))
    while content:
        content = content[os.write(1, content) :]


def _watch() -> Callable[[], None]:
    """A look at stdin that raises Left once it has ended."""
    if sys.platform != "win32":
        import select

        def look() -> None:
            if select.select([0], [], [], 0)[0] and not os.read(0, 4096):
                raise Left

        return look
    ended = threading.Event()

    def wait() -> None:
        while os.read(0, 4096):
            pass
        ended.set()

    threading.Thread(target=wait, daemon=True).start()

    def ask() -> None:
        if ended.is_set():
            raise Left

    return ask


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
