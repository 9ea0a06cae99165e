"""`python -m trainerd.supervisor`: one supervisor for one home, from the lock to the exit code. Must not watch a trainer itself.

The client spawns it detached; with --foreground it stays attached to a terminal, where Ctrl-C stops the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from trainerd.contract import errors, files, ground, requests, status
from trainerd.contract.errors import AlreadyRunning, TrainerdError
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.machine.filesystem import network_filesystem, synced_folder
from trainerd.machine.memory import ram
from trainerd.memory.limits import ADVICE, used_already
from trainerd.supervisor import opening, report, stopping
from trainerd.supervisor.loop import Supervisor
from trainerd.supervisor.trainer import parse_command
from trainerd.supervisor.wake import watching


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a supervisor; returns its exit code."""
    options = _parser().parse_args(arguments)
    home = Home(Path(os.path.abspath(options.home)))
    try:
        command = parse_command(options.trainer_command) if options.trainer_command else None
        _settle_in(home, detached=not options.foreground)
        return _supervise(home, options.instance, options.request, command, foreground=options.foreground)
    except TrainerdError as error:
        print(f"trainerd: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"trainerd: cannot start in {home.root}: {error}", file=sys.stderr)
        return errors.EXIT_FAILED
    except ValueError as error:
        print(f"trainerd: {error}", file=sys.stderr)
        return errors.EXIT_USAGE


def _supervise(home: Home, instance: str, request_id: str, command: list[str] | None, *, foreground: bool) -> int:
    warnings = _about_home(home)
    lock = FileLock(home.supervisor_lock)
    if not lock.acquire():
        requests.withdraw(home.control / f"{request_id}.json")
        raise AlreadyRunning(f"A supervisor is already running in {home.root}.", "See `status`; end it with `stop`.")
    aside = report.keep_damaged_aside(home)
    request = opening.read_request(home, instance, request_id)
    if request.verb == "stop":
        stopping.record_stop(home, instance, request.id, request.arguments)
        return errors.EXIT_DONE
    start = opening.open_run(home, request.arguments)
    start.warnings += [*warnings, *_about_memory(start.record.config.get("memory") or {})]
    if aside is not None:
        start.warnings.append(f"The status file was damaged; it is kept as {aside.name}.")
    supervisor = Supervisor(home, instance, start, command=command, lock=lock)
    supervisor.report.answer(request.id, request.verb, "done")
    _obey_signals(supervisor, foreground)
    with watching(home.control, lambda: supervisor.inbox.put(None)):
        result = supervisor.run()
    return errors.EXIT_FAILED if result == status.FAILED else errors.EXIT_DONE


def _settle_in(home: Home, *, detached: bool) -> None:
    """Hold on to nothing of whoever called: no folder, no terminal, no hang-up. Raises OSError."""
    if sys.platform != "win32":
        os.umask(0o077)  # the home holds a person's data
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by whoever called, deaths could not be waited for
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    files.make_folder(home.root)
    os.chdir(home.root)
    if not detached:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if _belongs_to_caller(descriptor):
            os.dup2(null, descriptor)
    if null > 2:
        os.close(null)


def _belongs_to_caller(descriptor: int) -> bool:
    """Whether a standard handle is closed or a terminal: a file or a pipe was given for good, by somebody who reads it."""
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return os.isatty(descriptor)


def _about_home(home: Home) -> list[str]:
    warnings = ground.check(home)
    network, synced = network_filesystem(home.root), synced_folder(home.root)
    if network is not None:
        warnings.append(f"The home is on a network file system ({network}): its locks and writes cannot be relied on. Use a local --home.")
    if synced is not None:
        warnings.append(f"The home is inside {synced}, which locks and uploads every checkpoint. Use a --home outside it.")
    return warnings


def _about_memory(limits: dict[str, Any]) -> list[str]:
    """A limit that was passed before the training began (the GPU's is looked at by the client: asking wakes it)."""
    facts = ram()
    warning = used_already("memory.ram_limit", str(limits.get("ram_limit", "auto")), facts.used_bytes, facts.total_bytes)
    return [f"{warning} {ADVICE}"] if warning else []


def _obey_signals(supervisor: Supervisor, foreground: bool) -> None:
    """A signal ends the processes, with a commit; in a terminal, Ctrl-C is the person's own stop."""

    def ended(number: int, frame: FrameType | None) -> None:
        # Only what is safe inside a signal handler: SimpleQueue.put may interrupt itself.
        if foreground and number == signal.SIGINT:
            supervisor.stop_wanted = True
        supervisor.signals += 1
        supervisor.inbox.put(None)

    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, ended)
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, ended)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m trainerd.supervisor", description="Keeps one trainer alive; started by `trainerd start`.")
    parser.add_argument("--home", required=True, help="the folder that holds everything")
    parser.add_argument("--instance", required=True, help="the name requests call this supervisor by")
    parser.add_argument("--request", required=True, help="id of the start request in control/")
    parser.add_argument("--foreground", action="store_true", help="stay attached to this terminal")
    parser.add_argument("--trainer-command", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
