"""Whether and how this home is registered for the person's log-in. Must not start a training: that is commands/login.py's.

One registration for each home. `start` and `resume` make it. What a person declines stays declined until `autostart enable`: the home's
autostart.json remembers `autostart disable`, and the runs of --no-autostart.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from trainerd.contract import files, interpreter, runs, status
from trainerd.contract.errors import TrainerdError, Unreadable, remedy
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.machine import autostart
from trainerd.machine.autostart import Entry, Found
from trainerd.memory.allocator_settings import VARIABLES

from . import console

AUTO, WANTED, UNWANTED = "auto", "on", "off"
LOG = "autostart.log"  # in training_logs: one line for each log-in
_SWITCH = "TRAINERD_AUTOSTART"
_SCRIPT = "run_optimized_training.py"
# What the shell that started the training set and a log-in does not: with another device or library it would be another run.
_KEPT_VARIABLES = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "HF_HOME", "TRAINERD_STATE", interpreter.PATH, *VARIABLES)


@dataclass
class Wish:
    """autostart.json. `wanted`: auto (while there is something to go on with), on or off. `without`: the runs of --no-autostart."""

    wanted: str = AUTO
    without: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def read(home: Home) -> Wish:
    """The person's wish; a file that is missing or damaged is none."""
    try:
        document = files.read_json(home.autostart, "The wish for autostart", 1 << 20)
    except (OSError, Unreadable):
        return Wish()
    wish = Wish(**{k: v for k, v in document.items() if k in {f.name for f in fields(Wish)}})
    wish.wanted = wish.wanted if wish.wanted in (AUTO, WANTED, UNWANTED) else AUTO
    named = wish.without if isinstance(wish.without, list) else [wish.without]  # an earlier trainerd kept one name
    wish.without = [name for name in named if isinstance(name, str)]
    environment = wish.environment if isinstance(wish.environment, dict) else {}
    wish.environment = {k: v for k, v in environment.items() if k in _KEPT_VARIABLES and isinstance(v, str)}
    return wish


def write(home: Home, wish: Wish) -> None:
    """Keep the wish. Raises OSError."""
    files.write_json(home.autostart, {"schema": files.SCHEMA, **asdict(wish)})


def entry(home: Home) -> Entry:
    """What is registered for this home: the hidden command `login`, from here and with this Python."""
    root = str(home.root)
    script = interpreter.package_parent() / _SCRIPT
    if script.is_file():
        command, needs = [sys.executable, str(script)], script
    else:
        command, needs = [sys.executable, "-m", "trainerd"], Path(sys.executable)
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:12]
    return Entry(f"trainerd-{digest}", f"trainerd: goes on with the training in {root}", (*command, "--home", root, "login"), needs)


def switched_off_here() -> bool:
    """TRAINERD_AUTOSTART=off: nothing is registered by itself (tests, containers, clusters)."""
    return os.environ.get(_SWITCH, "").lower() in ("off", "0", "no")


def decline(home: Home, run: str) -> None:
    """Remember --no-autostart, before the run is started: one that fails at once may be resumed another day. Raises TrainerdError."""
    wish = read(home)
    if run in wish.without:
        return
    wish.without = [*(name for name in wish.without if home.run(name).record.exists()), run]
    try:
        write(home, wish)
    except OSError as error:
        message = f"That {run} is not to go on after a reboot cannot be kept in {home.autostart}: {error.strerror or error}."
        raise TrainerdError(message, remedy(error)) from None


def begun(home: Home, run: str, wished: bool = True, *, new: bool = False) -> str:
    """Called when a run was started or resumed by the person: register the home, and say in one line what a reboot will do. What was
    declined of an earlier run of the name is not of a `new` one."""
    if switched_off_here():
        return ""
    wish = read(home)
    if wish.wanted == UNWANTED or not wished or (run in wish.without and not new):
        return _without(home, wish, wished)
    wish.without = [name for name in wish.without if name != run]
    wish.environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    if interpreter.PATH in wish.environment:
        wish.environment[interpreter.PATH] = interpreter.whole_path(wish.environment[interpreter.PATH])
    try:
        write(home, wish)
        found = autostart.look(entry(home))
        if found.state != autostart.SWITCHED_OFF:
            found = autostart.enable(entry(home))
    except OSError as error:
        return f"After a reboot it waits for `{console.program()} resume`: it cannot be registered for log-in ({error.strerror or error})."
    if found.state == autostart.SWITCHED_OFF:
        return f"After a reboot it waits for `{console.program()} resume`: {found.way} is there, switched off ({found.path})."
    return f"After a reboot it goes on when you log in. To turn that off: {console.program()} autostart disable"


def _without(home: Home, wish: Wish, wished: bool) -> str:
    if wish.wanted == UNWANTED:
        again = f"To turn autostart on again: {console.program()} autostart enable"
        return f"After a reboot it waits for `{console.program()} resume`. {again}" if wished else ""
    try:
        autostart.disable(entry(home))
    except OSError as error:
        return f"Its registration for log-in cannot be removed: {error.strerror or error}."
    return ""


def due(home: Home) -> RunRecord | None:
    """The run a log-in goes on with: the last one worked on, when it is unfinished, wanted, and did not fail. Else None."""
    shown = status.read(home).status
    name = shown.run if shown and shown.run else next(reversed(runs.names(home)), None)
    if name is None or name in read(home).without:
        return None
    try:
        record = runs.read(home, name)
    except (OSError, Unreadable):
        return None
    return record if record.wanted == runs.WANTED_RUNNING and record.outcome is None else None


def found(home: Home) -> Found:
    """How the registration stands. Raises OSError."""
    return autostart.look(entry(home))


def words(home: Home, seen: Found) -> list[str]:
    """How it stands, for a person, and what to do."""
    program = console.program()
    enable = f"Turn it on: {program} autostart enable"
    told = {
        autostart.ON: [f"On: {seen.way} goes on with the training when you log in.", f"It is {seen.path}"],
        autostart.OFF: ["Off: after a reboot a training waits for `resume`.", enable],
        autostart.SWITCHED_OFF: [f"Switched off: {seen.way} is there, turned off in the system.", f"It is {seen.path}", enable],
        autostart.OUTDATED: [f"Outdated: {seen.way} starts another place or another Python than this.", f"It is {seen.path}", enable],
    }[seen.state]
    if seen.state == autostart.ON:
        told += autostart.remarks(seen)
        record = due(home)
        told.append(f"At the next log-in: {record.id}." if record else "At the next log-in: nothing, no run is unfinished and wanted.")
    last = last_words(home)
    return [*told, f"Last log-in: {last}"] if last else told


def last_words(home: Home) -> str | None:
    """What the last log-in did, from its log."""
    try:
        lines = (home.logs / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return lines[-1] if lines else None
