"""Ctrl-C while a program is still importing itself ends it without a word. Must import nothing: it comes first."""

import sys


def interrupts() -> None:
    """A KeyboardInterrupt that reaches the top prints no traceback; the exit code stays that of an interrupted program."""
    shown = sys.excepthook

    def show(kind, error, trace):  # type: ignore[no-untyped-def]
        if not issubclass(kind, KeyboardInterrupt):
            shown(kind, error, trace)

    sys.excepthook = show
