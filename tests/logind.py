"""A logind of the tests' own on a message bus of their own: it hands out inhibitor locks and announces sleep and shutdown."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, MessageType, new_error, new_method_return, new_signal
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import Proxy, open_dbus_connection

from tests.supervised import wait_for

_MANAGER = DBusAddress("/org/freedesktop/login1", "org.freedesktop.login1", "org.freedesktop.login1.Manager")
_MEMBER = 3


def missing() -> str:
    """Why there can be no bus here; empty when there can."""
    return "" if shutil.which("dbus-daemon") else "no dbus-daemon"


class Bus:
    """A dbus-daemon; `address` is what DBUS_…_BUS_ADDRESS is set to."""

    def __init__(self, folder: Path) -> None:
        place = folder / "bus"
        self.address = f"unix:path={place}"
        command = ["dbus-daemon", "--session", "--nofork", "--nosyslog", f"--address={self.address}"]
        self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.services: list[threading.Thread] = []
        wait_for(lambda: _listens(place), 10, "the bus")

    def close(self) -> None:
        self._daemon.kill()
        self._daemon.wait(60)
        for service in self.services:
            service.join(5)


def _listens(place: Path) -> bool:
    """The file is there a moment before somebody answers on it."""
    with socket.socket(socket.AF_UNIX) as door:
        return door.connect_ex(str(place)) == 0


class Lock:
    """One inhibitor lock that was given out; held until its holder has closed its end."""

    def __init__(self, what: str, mode: str) -> None:
        self.what, self.mode = what, mode
        self._ours, self.theirs = os.pipe()

    @property
    def held(self) -> bool:
        return not select.select([self._ours], [], [], 0)[0]


class Logind:
    """Answers on the bus from a thread; `refuses` makes it refuse locks, as a strict policy would."""

    def __init__(self, bus: Bus, delay_seconds: float = 5.0, refuses: bool = False) -> None:
        self.locks: list[Lock] = []
        self._delay, self._refuses = int(delay_seconds * 1e6), refuses
        self._connection: Any = open_dbus_connection(bus.address, enable_fds=True)
        Proxy(message_bus, self._connection).RequestName(_MANAGER.bus_name)
        bus.services.append(threading.Thread(target=self._serve, daemon=True))
        bus.services[-1].start()

    def held(self, what: str) -> list[Lock]:
        return [lock for lock in self.locks if lock.what == what and lock.held]

    def announces(self, signal: str, begins: bool) -> None:
        """PrepareForSleep or PrepareForShutdown."""
        self._connection.send(new_signal(_MANAGER, signal, "b", (begins,)))

    def _serve(self) -> None:
        try:
            while True:
                self._answer(self._connection.receive())
        except (OSError, ValueError, RuntimeError):
            self._connection.close()  # the bus is gone with the test

    def _answer(self, message: Any) -> None:
        if message.header.message_type is not MessageType.method_call:
            return
        member = message.header.fields[_MEMBER]
        if member == "Get":
            self._connection.send(new_method_return(message, "v", (("t", self._delay),)))
        elif member == "Inhibit" and not self._refuses:
            what, _, _, mode = message.body
            lock = Lock(what, mode)
            self._connection.send(new_method_return(message, "h", (lock.theirs,)))
            os.close(lock.theirs)
            self.locks.append(lock)
        else:
            self._connection.send(new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "s", ("no",)))
