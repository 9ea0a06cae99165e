"""Keeps the machine from going to sleep by itself. Must not decide when: it holds and lets go. The lid and the person always win.

wakepy knows the ways: SetThreadExecutionState on Windows, the session's power manager on Linux; logind's idle lock is the last.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from trainerd.machine import standby

_WORDS = 400  # of a failure; the rest repeats itself


class KeepAwake:
    """`tell(words)` is called, from another thread, once for each way that was found, or once when none was."""

    def __init__(self, tell: Callable[[str, bool], None]) -> None:
        self._tell = tell
        self._let_go: threading.Event | None = None
        self._failed = False

    @property
    def held(self) -> bool:
        return self._let_go is not None

    def hold(self) -> None:
        """Keep it awake until release(). What holds it belongs to a thread, which lives exactly as long."""
        if self._let_go is None:
            self._let_go = threading.Event()
            threading.Thread(target=self._hold, args=(self._let_go,), name="awake", daemon=True).start()

    def release(self) -> None:
        """Let it sleep again when it wants to."""
        if self._let_go is not None:
            self._let_go.set()
            self._let_go = None

    def _hold(self, let_go: threading.Event) -> None:
        try:
            way, why = self._through_wakepy(let_go)
        except Exception as error:  # a library's surprise in a side matter must not become the training's
            way, why = "", f"{type(error).__name__}: {error}"
        if way or let_go.is_set():
            return
        with standby.stay_up() as held:
            if held:
                self._tell("logind", True)
                let_go.wait()
            elif why and not self._failed:
                self._failed = True
                self._tell(why, False)

    def _through_wakepy(self, let_go: threading.Event) -> tuple[str, str]:
        """The way it was held, else why it was not. No session to ask is no failure: nothing puts such a machine to sleep through it."""
        if sys.platform != "win32" and not os.environ.get("DBUS_SESSION_BUS_ADDRESS"):
            return "", ""
        from wakepy import keep

        with keep.running(on_fail="pass") as mode:
            if not mode.active:
                return "", " ".join(mode.result.get_failure_text().split())[:_WORDS] or "no way was found"
            way = mode.method.name if mode.method else "wakepy"
            self._tell(way, True)
            let_go.wait()
        return way, ""
