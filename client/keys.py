"""Single keys from the terminal, without Enter and without echo. Must not know what a key means."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from . import console


class Keyboard:
    """While entered, read() returns keys as they are pressed. Where nobody types (a pipe, NUL), it only waits."""

    def __init__(self) -> None:
        self.works = console.is_terminal(sys.stdin)
        self._typed = ""  # and not yet read: keys pressed faster than they are asked for

    if sys.platform == "win32":

        def __enter__(self) -> Keyboard:
            return self

        def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
            pass

        def read(self, timeout_seconds: float) -> str | None:
            """The next key in lower case, None when none came in time."""
            import msvcrt

            deadline = time.monotonic() + timeout_seconds
            while True:
                if self.works and msvcrt.kbhit():
                    key = msvcrt.getwch()
                    if key in ("\0", "\xe0"):  # an arrow or function key: two characters, neither ours
                        msvcrt.getwch()
                        continue
                    if key == "\x03":
                        raise KeyboardInterrupt
                    return key.lower()
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                time.sleep(min(left, 0.1))

    else:

        def __enter__(self) -> Keyboard:
            if self.works:
                import termios
                import tty

                self._before = termios.tcgetattr(sys.stdin.fileno())
                tty.setcbreak(sys.stdin.fileno())
                # Ctrl-C comes as a key: as a signal it may land where Python drops exceptions (a finaliser), and be lost.
                mode = termios.tcgetattr(sys.stdin.fileno())
                mode[6][termios.VINTR] = b"\0"
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, mode)
            return self

        def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
            if self.works:
                import termios

                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)

        def read(self, timeout_seconds: float) -> str | None:
            """The next key in lower case, None when none came in time."""
            import os
            import select

            if not self.works:
                time.sleep(timeout_seconds)
                return None
            if not self._typed:
                ready, _, _ = select.select([sys.stdin], [], [], timeout_seconds)
                if not ready:
                    return None
                typed = os.read(sys.stdin.fileno(), 64)
                if not typed:
                    self.works = False  # the terminal is gone
                    return None
                if b"\x03" in typed:
                    raise KeyboardInterrupt
                if typed.startswith(b"\x1b"):
                    return None  # an arrow key sends several bytes at once: they are one key, not ours
                self._typed = typed.decode("utf-8", "replace").lower()
            key, self._typed = self._typed[0], self._typed[1:]
            return key
