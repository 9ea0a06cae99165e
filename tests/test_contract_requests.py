"""Request files: written whole, read with suspicion, taken back when nobody answered."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from trainerd.contract import requests, wire
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home
from trainerd.contract.requests import Request

LINUX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="links and owners of POSIX")


def test_a_request_arrives_as_it_was_sent(home: Home) -> None:
    """send() and read() are each other's inverse; the id is the file's name."""
    request = Request("stop", "instance-1", {"now": True})
    path = requests.send(home, request)
    assert path == home.control / f"{request.id}.json"
    assert requests.pending(home) == [path] and requests.read(path) == request
    requests.withdraw(path)
    requests.withdraw(path)
    assert requests.pending(home) == []


def test_requests_are_taken_in_the_order_they_came(home: Home) -> None:
    """By time, then by name; half-written files and the ballast are none."""
    paths = [requests.send(home, Request("save", "i")) for _ in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (100 + age, 100 + age))
    (home.control / ".x.json.1.tmp").touch()
    (home.control / ".ballast").touch()
    assert requests.pending(home) == paths


@pytest.mark.parametrize(
    "change",
    [{"verb": "explode"}, {"instance": 5}, {"arguments": []}, {"id": "another"}, {"at": "noon"}, {"schema": 2}],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_request_is_refused(home: Home, change: dict[str, object]) -> None:
    """A verb we know, an instance, arguments, and the id of its own name; anything else is refused in words."""
    path = requests.send(home, Request("stop", "i"))
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), encoding="utf-8")
    with pytest.raises(Unreadable):
        requests.read(path)


def test_garbage_and_giants_are_refused(home: Home) -> None:
    """Neither bytes that are no JSON nor a file of megabytes is taken in."""
    path = requests.send(home, Request("stop", "i"))
    for content in (b"\xff\x00", b"[]", b"{" + b" " * requests.MAX_BYTES + b"}"):
        path.write_bytes(content)
        with pytest.raises(Unreadable):
            requests.read(path)
    with pytest.raises(Unreadable):
        requests.read(home.control / "gone.json")


@LINUX_ONLY
def test_a_link_is_refused(home: Home, tmp_path: Path) -> None:
    """A request is a file written here, not a pointer to one elsewhere."""
    path = requests.send(home, Request("stop", "i"))
    target = tmp_path / path.name
    path.rename(target)
    path.symlink_to(target)
    with pytest.raises(Unreadable):
        requests.read(path)


def test_lines_of_the_pipes_come_back_or_are_none() -> None:
    """encode and decode are inverse; a stray print is not a message."""
    message = {"event": "progress", "text": "Läufe\n"}
    assert wire.decode(wire.encode(message)) == message and wire.encode(message).count(b"\n") == 1
    assert [wire.decode(line) for line in (b"hello", b"[1]", b"\xff", b"", b"5")] == [None] * 5


@LINUX_ONLY
def test_a_pipe_in_place_of_a_request_holds_nobody(home: Home) -> None:
    """A FIFO named like a request is refused at once: waiting for its writer would freeze the supervisor for good."""
    home.control.mkdir(parents=True)
    path = home.control / "f.json"
    os.mkfifo(path)
    with pytest.raises(Unreadable, match="not a file"):
        requests.read(path)
