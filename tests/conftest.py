"""What every test gets: homes and state folders of its own, and the test data if they are there. Must not start processes."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainerd.contract.paths import Home

_LONG = ("test_windows_tier", "test_end_to_end", "test_trainer_process", "test_stops", "test_wheel", "test_selftest", "test_zero2")
_TOGETHER = (*_LONG[:3], "test_wheel", "test_provenance")
"""Each in one worker: for the first there is one Windows (others would wait for its lock), the others share a dear beginning."""
_SIBLING = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """What is started in a shell's background ignores Ctrl-C, and hands that on: the programs under test are to hear it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, and before all the Windows tier, one long chain of waits: no worker is left with it at the end."""
    place = {name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def _collects_little() -> None:
    """A trainer collects garbage at its settled moments, over a process of its own. Here it would go through all that the tests have
    imported each time, which took longer than most trainings: what is there before a test is left out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for another's device lock, and none touches the person's own home."""
    monkeypatch.setenv("TRAINERD_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("TRAINERD_HOME", raising=False)
    monkeypatch.setenv("TRAINERD_AUTOSTART", "off")  # nothing of a test is registered for the person's own log-in
    for bus in ("DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"):  # and none keeps this machine awake
        monkeypatch.setenv(bus, f"unix:path={tmp_path / 'no-bus'}")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home; its path has a space and a letter outside ASCII, as many a person's has."""
    root = tmp_path / "ein Zuhause für Läufe"
    root.mkdir()
    return Home(root)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The test data: TRAINERD_TEST_DATA, else a folder `shared/data` beside the checkout; the test is skipped without."""
    given = os.environ.get("TRAINERD_TEST_DATA")
    folder = Path(given) if given else _SIBLING / "data"
    if not folder.is_dir():
        pytest.skip("the test data are not here; set TRAINERD_TEST_DATA to their folder")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors: waiting for a second thread would take longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Some files whole, of the others each test alone. (xdist's own groups do not hold with pytest 9: it sets a name that pytest no
    longer reads.)"""
    from xdist.scheduler import LoadScopeScheduling

    class SomeTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.split("::", 1)[0]).stem
            return name if name in _TOGETHER else nodeid

    return SomeTogether(config, log)
