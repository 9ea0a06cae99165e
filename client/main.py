"""The program's entry: finds the home, takes the short way for `status`, and turns every error into words and an exit code.

Must not import click before it is needed: `status` has a tenth of a second for everything.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainerd.contract.errors import EXIT_DONE, OutputLost, TrainerdError, UsageError, remedy

from . import console, home

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None, checkout: Path | None = None) -> int:
    """Run one command; returns the exit code. `checkout` is the folder of the script that was started, if it was one."""
    console.prepare()
    os.umask(0o077)  # a home holds a person's data; what it holds already keeps its mode
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        return _run(words, checkout)
    except TrainerdError as error:
        return _explain(error, as_json)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        console.give_up_output()  # the reader (head, less) has enough
        return EXIT_DONE
    except Exception as error:  # the last door: a person gets words, we get the traceback
        return _explain(_known(error) or _unexpected(error), as_json)


def _run(words: list[str], checkout: Path | None) -> int:
    given, words = _take_home(words)
    where = home.find(given, checkout)
    if words in (["status"], ["status", "--json"]):
        from . import glance

        return glance.show(where, as_json=len(words) == 2)
    from . import cli

    return cli.run(words, where)


def _take_home(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """--home DIR may stand before or after the verb: it is taken out here, for all commands alike."""
    given: str | None = None
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            return given, [*rest, word, *remaining]
        if word == "--home":
            given = next(remaining, None)
            if given is None:
                raise UsageError("--home needs a folder.", "Write it like --home DIR.")
        elif word.startswith("--home="):
            given = word.removeprefix("--home=")
        else:
            rest.append(word)
    return given, rest


def _explain(error: TrainerdError, as_json: bool) -> int:
    if as_json and not isinstance(error, OutputLost):
        import json

        document = {"schema": 1, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        console.say(json.dumps(document, indent=1))
    else:
        console.complain(f"Error: {error.message}")
        if error.hint:
            console.complain(error.hint)
    return error.exit_code


def _known(error: Exception) -> TrainerdError | None:
    """Errors that can come from anywhere and are nobody's fault here: the output, the current folder or a file of the home is not to be
    had."""
    if isinstance(error, OSError) and console.is_of_output(error):
        console.give_up_output()
        return console.output_lost(error)
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:
            return UsageError("The current folder does not exist any more.", "Go to another one (cd), and try again.")
    if isinstance(error, PermissionError) and error.filename is not None:
        return TrainerdError(f"{error.filename} cannot be used: {error.strerror or error}.", remedy(error))
    return None


def _unexpected(error: Exception) -> TrainerdError:
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    path = Path(tempfile.gettempdir()) / f"trainerd-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError:
        return TrainerdError(f"An error in trainerd itself: {type(error).__name__}: {error}", text)
    return TrainerdError(f"An error in trainerd itself: {type(error).__name__}: {error}", f"Its traceback is in {path}.")
