"""The lock that says who is alive: across processes, after kills, and under probing readers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainerd.contract import lock
from trainerd.contract.lock import FileLock

ROOT = Path(__file__).resolve().parents[1]

_HOLD = """
import sys
from pathlib import Path
from trainerd.contract.lock import FileLock
held = FileLock(Path(sys.argv[1]))
print(held.acquire(), flush=True)
sys.stdin.read()
"""

_PROBE = """
import sys
from pathlib import Path
from trainerd.contract import lock
path = Path(sys.argv[1])
print("ready", flush=True)
while not path.with_name("enough").exists():
    lock.is_held(path)
"""


def process(code: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_one_holds_it_and_the_others_see_so(tmp_path: Path) -> None:
    """Held in one process: refused in another, visible to every reader; free again when the holder is killed."""
    path = tmp_path / "a.lock"
    assert not lock.is_held(path)
    with process(_HOLD, path) as holder:
        assert holder.stdout and holder.stdout.readline().strip() == "True"
        assert lock.is_held(path)
        assert not FileLock(path).acquire(timeout_seconds=0.1)
        holder.kill()
        holder.wait()
    assert not lock.is_held(path)
    mine = FileLock(path)
    assert mine.acquire() and mine.held and lock.is_held(path)
    mine.release()
    assert not mine.held and not lock.is_held(path) and path.exists()


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """The descriptor is closed on exec: a child that outlives its parent holds nothing."""
    path = tmp_path / "a.lock"
    mine = FileLock(path)
    assert mine.acquire()
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        mine.release()
        assert not lock.is_held(path)
        assert child.stdin
        child.stdin.close()


def test_probing_readers_never_make_a_start_fail(tmp_path: Path) -> None:
    """8 readers probe without pause while the lock is taken 1,000 times: none is wrongly refused, none is wrongly held."""
    path = tmp_path / "a.lock"
    path.touch()
    readers = [process(_PROBE, path) for _ in range(8)]
    try:
        for reader in readers:
            assert reader.stdout and reader.stdout.readline().strip() == "ready"
        for _ in range(1000):
            mine = FileLock(path)
            assert mine.acquire(timeout_seconds=0.5)
            mine.release()
    finally:
        (tmp_path / "enough").touch()
        for reader in readers:
            with reader:
                assert reader.wait(60) == 0
