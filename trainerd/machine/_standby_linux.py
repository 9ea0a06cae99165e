"""Sleep and shutdown on Linux, from logind over the system's D-Bus. Must not raise: without logind there is nothing to hear.

A delay lock is held from the start: logind then waits after its signal until the lock's descriptor is closed, but no longer
than InhibitDelayMaxSec (5 s unless the administrator changed it). No lock can be taken once the machine is on its way down.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

assert sys.platform != "win32"

_LOGIND, _PATH, _MANAGER = "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"
_SIGNALS = {"PrepareForSleep": "sleep", "PrepareForShutdown": "shutdown"}
_ANSWER_SECONDS = 5.0
_AGAIN_SECONDS = 60.0
_USUAL_DELAY_SECONDS = 5.0


class Watch:
    """Calls `tell(event, seconds)` for each event, `seconds` being how long the machine waits for ready()."""

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self._tell = tell
        self._closed = threading.Event()
        self._guard = threading.Lock()
        self._lock: Any = None
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ready(self) -> None:
        """What had to be done is done: let the machine go on."""
        with self._guard:
            lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def close(self) -> None:
        """Hear no more, and hold nothing up."""
        self._closed.set()
        with self._guard, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.ready()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except Exception:
                # No system bus, no logind, a bus that went away: D-Bus errors come in many kinds, and none of them matters here.
                self.ready()
            self._closed.wait(_AGAIN_SECONDS)

    def _listen(self) -> None:
        from jeepney import MatchRule
        from jeepney.bus_messages import message_bus
        from jeepney.io.blocking import Proxy

        with _connected() as connection:
            with self._guard:
                self._socket = connection.sock
            heard: deque[Any] = deque()
            for member in _SIGNALS:
                rule = {"type": "signal", "interface": _MANAGER, "path": _PATH, "member": member}
                Proxy(message_bus, connection, timeout=_ANSWER_SECONDS).AddMatch(MatchRule(sender=_LOGIND, **rule))
                connection.filter(MatchRule(**rule), queue=heard)  # not by sender: it arrives as the bus's own name for logind
            seconds = _delay_seconds(connection)
            self._take(connection)
            while not self._closed.is_set():
                message = connection.recv_until_filtered(heard)
                event = _SIGNALS[message.header.fields[3]]  # 3: the member
                if message.body[0]:
                    self._tell(event, seconds)
                else:  # awake again, or the shutdown was called off
                    self._take(connection)
                    self._tell("woke", 0.0)

    def _take(self, connection: Any) -> None:
        self.ready()
        lock = _inhibit(connection, "sleep:shutdown", "Saving the progress of a training", "delay")
        with self._guard:
            self._lock = lock


@contextlib.contextmanager
def stay_up() -> Iterator[bool]:
    """Keep the idle machine from sleeping, through logind, while the context lasts; False where that cannot be had."""
    with contextlib.ExitStack() as held:
        try:
            connection = held.enter_context(_connected())
            held.enter_context(_inhibit(connection, "idle", "A training is running", "block"))
        except Exception:  # as above: without logind nobody puts the machine to sleep through it
            held.close()
            yield False
            return
        yield True


def _connected() -> Any:
    from jeepney.io.blocking import open_dbus_connection

    return open_dbus_connection("SYSTEM", enable_fds=True)


def _inhibit(connection: Any, what: str, why: str, mode: str) -> Any:
    """A lock of logind's: an open descriptor. Raises whatever D-Bus raises."""
    return _call(connection, _MANAGER, "Inhibit", "ssss", (what, "trainerd", why, mode))


def _delay_seconds(connection: Any) -> float:
    """How long logind waits for delay locks."""
    try:
        found = _call(connection, "org.freedesktop.DBus.Properties", "Get", "ss", (_MANAGER, "InhibitDelayMaxUSec"))
        return float(found[1]) / 1e6
    except Exception:  # elogind and old versions do not tell
        return _USUAL_DELAY_SECONDS


def _call(connection: Any, interface: str, method: str, signature: str, arguments: tuple[str, ...]) -> Any:
    from jeepney import DBusAddress, new_method_call
    from jeepney.wrappers import unwrap_msg

    address = DBusAddress(_PATH, _LOGIND, interface)
    reply = connection.send_and_get_reply(new_method_call(address, method, signature, arguments), timeout=_ANSWER_SECONDS)
    return unwrap_msg(reply)[0]
