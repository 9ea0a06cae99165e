"""The terminal as it is: what it can show, and how to write to it without ever failing. Must not know what is shown."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import TextIO

from trainerd.contract.errors import OutputLost, remedy

MEMORY_DOOR = "memory_optimizer.py"
_WINDOWS = sys.platform == "win32"


def prepare() -> None:
    """Make printing safe: a character the output cannot carry becomes "?", instead of an error (cp1252 pipes, lone surrogates)."""
    _fill_closed_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fill_closed_descriptors() -> None:
    """A standard stream that was closed (`>&-`) would give its number to the next file opened, and prints would land in that."""
    for descriptor in (0, 1, 2) if not _WINDOWS else ():
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def say(text: str = "") -> None:
    """One message on the standard output. When its reader is gone (`| head`) it is lost, and the command goes on to its end.

    Raises OutputLost when the output cannot be written for another reason, like a full disk.
    """
    try:
        pour(text)
    except OSError as error:
        give_up_output()
        if not is_gone(error):
            raise output_lost(error) from None


def pour(text: str) -> None:
    """One of many lines on the standard output: raises OSError, so that a command that only prints ends with its reader."""
    if sys.stdout is not None:
        print(text, flush=True)


def tell(text: str) -> None:
    """Sentences on the standard output: in a terminal broken between words."""
    say(filled(text, sys.stdout))


def complain(text: str) -> None:
    """One message beside the standard output, so that --json stays one document. Where it cannot be written, nobody reads it."""
    if sys.stderr is not None:
        try:
            print(filled(text, sys.stderr), file=sys.stderr, flush=True)
        except OSError:
            _to_nowhere(2)


def filled(text: str, stream: TextIO | None, indent: str = "") -> str:
    """The text with its lines broken between words, where the terminal would break them within one; unchanged for a pipe."""
    if stream is None or not is_terminal(stream):
        return text
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return text
    if width <= len(indent) or all(len(line) <= width for line in text.split("\n")):
        return text
    from textwrap import wrap  # only where something is too long

    broken = (wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) or [""] for line in text.split("\n"))
    return "\n".join(part for parts in broken for part in parts)


def is_gone(error: OSError) -> bool:
    """Whether writing failed because the reader of the pipe has enough; Windows calls that an invalid argument."""
    return isinstance(error, BrokenPipeError) or (_WINDOWS and error.errno == errno.EINVAL)


def is_of_output(error: BaseException) -> bool:
    """Whether an error came while something was printed: tells a full disk there from one elsewhere."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, OSError) and module.partition(".")[0] in ("click", "rich")


def output_lost(error: OSError) -> OutputLost:
    """That the standard output cannot be written, as an error for a person."""
    return OutputLost(f"The output could not be written: {error.strerror or error}.", remedy(error))


def give_up_output() -> None:
    """Write no more to the standard output; Python's own flush at exit must not complain either."""
    _to_nowhere(1)


def _to_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def program() -> str:
    """How this program is called here, for hints: `trainerd`, or the checkout's script or launcher."""
    return _name() + _home_typed()


def elsewhere() -> str:
    """How it is called for another home than this one, whichever was typed."""
    return f"{_name()} --home ANOTHER_FOLDER"


def of_home(home: str) -> str:
    """How it is called for that home, whichever was typed."""
    return f"{_name()} --home {quoted(home)}"


def memory_program() -> str:
    """How the commands about memory are called here, for hints."""
    return f"python {MEMORY_DOOR}{_home_typed()}" if by_memory_door() else f"{program()} memory"


def by_memory_door() -> bool:
    """Whether this program was opened through memory_optimizer.py."""
    return Path(sys.argv[0]).name == MEMORY_DOOR


def _home_typed() -> str:
    """` --home DIR` when it was typed: a hint must lead to the same home."""
    for place, word in enumerate(sys.argv):
        option, _, given = word.partition("=")
        given = given or "".join(sys.argv[place + 1 : place + 2])
        if option != "--home":
            continue
        return f' --home "{given}"' if _WINDOWS else f" --home {shlex.quote(given)}"
    return ""


def quoted(word: str) -> str:
    """A word as it can be typed: in quotes where this system's shell would take it apart."""
    if not _WINDOWS:
        return shlex.quote(word)
    return f'"{word}"' if not word or any(c.isspace() or c in "&|<>^()" for c in word) else word


def _name() -> str:
    name = Path(sys.argv[0] or "trainerd").name
    if name in ("optimized_train.py", MEMORY_DOOR):
        name = "run_optimized_training.py"
    if name in ("__main__.py", "-c", "-m"):
        return "trainerd"
    if name == "start_training.sh":
        return f"./{name}"
    return f"python {name}" if name.endswith(".py") else name.removesuffix(".exe").removesuffix(".bat")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at (or types into) this stream. On Windows isatty() is true for NUL, so the console is asked."""
    try:
        if stream is None or not stream.isatty():
            return False
        return not _WINDOWS or _is_windows_console(stream)
    except (OSError, ValueError):
        return False


def _is_windows_console(stream: TextIO) -> bool:
    if sys.platform != "win32":
        return False
    import ctypes
    import msvcrt

    mode = ctypes.c_uint32()
    handle = msvcrt.get_osfhandle(stream.fileno())
    return bool(ctypes.windll.kernel32.GetConsoleMode(ctypes.c_void_p(handle), ctypes.byref(mode)))


def can_show(text: str) -> bool:
    """Whether the standard output can carry these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
        return True
    except (UnicodeEncodeError, LookupError):
        return False


def spelled(text: str) -> str:
    """The text in characters the standard output can carry."""
    for fine, plain in (("×", "x"), ("°", ""), ("█", "#"), ("░", "."), ("—", "-")):
        text = text if can_show(fine) else text.replace(fine, plain)
    return text


def styled(text: str, colour: str) -> str:
    """Coloured where a person looks at it and has not asked for none (NO_COLOR)."""
    if not is_terminal(sys.stdout) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    from click import style

    return style(text, fg=colour)


def has_braille() -> bool:
    """Whether braille dots will look like dots: the fonts of Windows' old console have none."""
    return can_show("⣿") and (not _WINDOWS or "WT_SESSION" in os.environ)
