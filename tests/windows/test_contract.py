"""The contract under Windows' own rules: locks that keep the file readable, renames onto files somebody holds open."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.windows.person import Other, comes
from trainerd.contract import files, lock, requests, status
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home

HOLD_LOCK = (
    "from pathlib import Path\nfrom trainerd.contract.lock import FileLock\nlock = FileLock(Path(sys.argv[1]))\n"
    "print(lock.acquire(), flush=True)\nsys.stdin.readline()\n"
)
HOLD_OPEN = "file = open(sys.argv[1], 'rb')\nprint('open', flush=True)\nsys.stdin.readline()\n"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder = tmp_path / "a home (1) ü"
    folder.mkdir()
    return Home(folder)


def test_a_lock_is_seen_by_others_and_dies_with_its_holder(home: Home) -> None:
    """Held by another process it is seen held and cannot be got; TerminateProcess on the holder frees it; the file stays."""
    assert not lock.is_held(home.supervisor_lock)
    with Other(HOLD_LOCK, home.supervisor_lock) as holder:
        assert holder.hears() == "True"
        assert lock.is_held(home.supervisor_lock)
        assert not lock.FileLock(home.supervisor_lock).acquire(0.1)
        subprocess.run(["taskkill", "/F", "/PID", str(holder.process.pid)], check=True, capture_output=True)
        comes(lambda: not lock.is_held(home.supervisor_lock), "the end of the lock")
    mine = lock.FileLock(home.supervisor_lock)
    assert mine.acquire() and home.supervisor_lock.exists()
    mine.release()
    assert not lock.is_held(home.supervisor_lock)


def test_a_locked_file_stays_readable(home: Home) -> None:
    """The locked byte lies beyond any content: the holder's number in it can be read, for whoever has to end it by hand."""
    home.supervisor_lock.write_text("of an earlier holder", "utf-8")
    with Other(HOLD_LOCK, home.supervisor_lock) as holder:
        assert holder.hears() == "True"
        assert lock.holder(home.supervisor_lock) == holder.process.pid


def test_probes_never_cost_a_start_its_lock(home: Home) -> None:
    """While three readers ask again and again, a start gets the lock every time: it tries for half a second."""
    asking = "from pathlib import Path\nfrom trainerd.contract import lock\nprint('asking', flush=True)\n"
    asking += "while True: lock.is_held(Path(sys.argv[1]))\n"
    home.supervisor_lock.touch()
    with (
        Other(asking, home.supervisor_lock) as one,
        Other(asking, home.supervisor_lock) as two,
        Other(asking, home.supervisor_lock) as three,
    ):
        assert {reader.hears() for reader in (one, two, three)} == {"asking"}
        for _ in range(100):
            mine = lock.FileLock(home.supervisor_lock)
            assert mine.acquire(0.5)
            mine.release()


def test_a_file_somebody_reads_is_replaced_when_he_is_done(home: Home) -> None:
    """Renaming onto a file a reader holds open waits for the reader; one who never lets go is an error, and nothing is left."""
    home.status.write_text("old", "utf-8")
    with Other(HOLD_OPEN, home.status) as reader:
        assert reader.hears() == "open"
        with pytest.raises(PermissionError):
            files.write_atomic(home.status, b"new", busy_seconds=0.1)
        assert home.status.read_text("utf-8") == "old" and [p.name for p in home.root.iterdir()] == [home.status.name]
        letting_go = threading.Timer(0.3, reader.goes_on)
        letting_go.start()
        files.write_atomic(home.status, b"new")
        letting_go.join()
    assert home.status.read_text("utf-8") == "new"


def test_a_file_somebody_reads_is_removed_later_not_with_an_error(home: Home) -> None:
    """Taking back a request that a scanner holds open is left for later, without an error."""
    path = requests.send(home, requests.Request("stop", "instance"))
    with Other(HOLD_OPEN, path) as scanner:
        assert scanner.hears() == "open"
        requests.withdraw(path)
        assert path.exists()
    comes(lambda: _removed(path), "the end of the request file")


def _removed(path: Path) -> bool:
    requests.withdraw(path)
    return not path.exists()


def test_a_reader_never_sees_half_a_status(home: Home) -> None:
    """While the status is written all the time, another process reads it 100 times: whole and readable each time."""
    reading = (
        "import time\nfrom pathlib import Path\nfrom trainerd.contract import files\nfrom trainerd.contract.paths import Home\n"
        "path = Home(Path(sys.argv[1])).status\nprint('reading', flush=True)\nnumbers = set()\n"
        "for _ in range(100):\n"
        "    time.sleep(0.01)\n"
        "    try: numbers.add(files.read_json(path, 'The status')['trainer']['restarts'])\n"
        "    except PermissionError: pass\n"
        "print(len(numbers), flush=True)\n"
    )
    document = status.Status(run="r", reason="x" * 5000)
    status.write(home, document)
    with Other(reading, home.root) as reader:
        assert reader.hears() == "reading"
        done = threading.Event()
        counted: list[str] = []
        listening = threading.Thread(target=lambda: (counted.append(reader.hears()), done.set()))
        listening.start()
        written = refused = 0
        while not done.is_set():
            document.trainer.restarts += 1
            try:
                status.write(home, document)
                written += 1
            except PermissionError:
                refused += 1  # the supervisor's next tick writes again
        listening.join()
    assert counted and int(counted[0]) > 1 and written > 10 * refused


def test_the_status_is_true_about_who_lives(home: Home) -> None:
    """A live state without the lock reads as crashed; with it as it is; a status older than 5 s as not answering."""
    document = status.Status(run="r", state=status.RUNNING, reason="Training.")
    status.write(home, document)
    assert status.read(home).state == status.CRASHED
    with Other(HOLD_LOCK, home.supervisor_lock) as holder:
        assert holder.hears() == "True"
        assert status.read(home).state == status.RUNNING
        old = json.loads(home.status.read_text("utf-8"))
        old["updated_monotonic"] -= 60
        files.write_json(home.status, old)
        assert status.read(home).state == status.NOT_ANSWERING


def test_requests_go_from_one_process_to_another(home: Home) -> None:
    """A request written by one process is read whole by another, and means the same."""
    sending = (
        "from pathlib import Path\nfrom trainerd.contract import requests\nfrom trainerd.contract.paths import Home\n"
        "requests.send(Home(Path(sys.argv[1])), requests.Request('stop', 'the instance', {'now': False}))\n"
    )
    with Other(sending, home.root) as sender:
        assert sender.process.wait(20) == 0
    (path,) = requests.pending(home)
    request = requests.read(path)
    assert (request.verb, request.instance, request.arguments) == ("stop", "the instance", {"now": False})
    path.write_bytes(b"\xff\xfe half")
    with pytest.raises(Unreadable):
        requests.read(path)


def test_a_line_is_appended_with_one_line_end(home: Home) -> None:
    """events.jsonl has the same bytes on both systems: no CRLF, and a torn line is closed first."""
    path = home.root / "events.jsonl"
    path.write_bytes(b'{"torn": ')
    files.append_line(path, '{"whole": "ü"}')
    assert path.read_bytes() == '{"torn": \n{"whole": "ü"}\n'.encode()


def test_a_deep_folder_is_no_obstacle(home: Home) -> None:
    """Paths beyond 260 characters work where the interpreter is allowed them."""
    deep = home.root / ("x" * 120) / ("y" * 120)
    try:
        deep.mkdir(parents=True)
        (deep / "probe").touch()
    except OSError:
        pytest.skip("long paths are not enabled here")
    far = Home(deep)
    status.write(far, status.Status(run="r"))
    assert status.read(far).status is not None
    taken = lock.FileLock(far.supervisor_lock)
    assert taken.acquire()
    taken.release()
    assert len(os.fspath(far.status)) > 260
