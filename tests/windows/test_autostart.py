"""The shortcut in the Startup folder: what it runs, what the Task Manager's switch means. In a folder of its own, not the person's."""

from __future__ import annotations

import json
import os
import sys
import winreg
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.windows.person import comes
from trainerd.machine import _autostart_windows, autostart
from trainerd.machine.login import Entry

NAME = "trainerd-test-of-autostart"
AWKWARD = "ein höme (1) %TEMP% 100% & ^ ' `x` =; $HOME !"


@pytest.fixture(autouse=True)
def startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Startup folder of our own."""
    folder = tmp_path / "Startup ü"
    monkeypatch.setattr(_autostart_windows, "_path", lambda entry: folder / f"{entry.name}.lnk")
    return folder


@pytest.fixture
def switch() -> Iterator[winreg.HKEYType]:
    """Where the Task Manager keeps its switches; ours is removed again."""
    with winreg.CreateKeyEx(winreg.HKEY_CURRENT_USER, _autostart_windows._APPROVED, 0, winreg.KEY_ALL_ACCESS) as key:
        yield key
        try:
            winreg.DeleteValue(key, f"{NAME}.lnk")
        except OSError:
            pass


def entry(folder: Path, *words: str) -> Entry:
    """A script that writes its words and its console down."""
    script, told = folder / AWKWARD / "script.py", folder / "told.json"
    script.parent.mkdir(exist_ok=True)
    lines = f"import ctypes, json, sys\nwords = [*sys.argv[1:], ctypes.windll.kernel32.GetConsoleWindow()]\nopen({str(told)!r}, 'w').write("
    script.write_text(f"# coding: utf-8\n{lines}json.dumps(words) + '\\n')\n", "utf-8")
    return Entry(NAME, f"trainerd: {AWKWARD}", (sys.executable, str(script), *words), script)


def test_the_shortcut_runs_the_exact_words_without_a_window(tmp_path: Path, startup: Path) -> None:
    """Opened as Explorer opens it at log-in, by pythonw: every word arrives as it was, and no console appears."""
    words = ("--home", f"C:\\{AWKWARD}\\", 'with "quotes"', "", "login")
    found = autostart.enable(entry(tmp_path, *words))
    assert (found.state, found.path) == (autostart.ON, startup / f"{NAME}.lnk")
    os.startfile(found.path)
    told = tmp_path / "told.json"
    comes(lambda: told.exists() and told.read_text("utf-8").endswith("\n"), "the command to run")
    *arrived, console = json.loads(told.read_text("utf-8"))
    assert tuple(arrived) == words and not console
    assert autostart.disable(entry(tmp_path, *words)) and not found.path.exists()
    assert autostart.look(entry(tmp_path)).state == autostart.OFF and not autostart.disable(entry(tmp_path))


def test_the_task_managers_switch_is_seen(tmp_path: Path, switch: winreg.HKEYType) -> None:
    """Switched off there, it counts as off; `enable` switches it on again; another Python or home makes it outdated."""
    autostart.enable(entry(tmp_path, "a"))
    for value, state in ((b"\x03" + bytes(11), autostart.SWITCHED_OFF), (b"\x02" + bytes(11), autostart.ON), (b"\x06", autostart.ON)):
        winreg.SetValueEx(switch, f"{NAME}.lnk", 0, winreg.REG_BINARY, value)
        assert autostart.look(entry(tmp_path, "a")).state == state, value
    winreg.SetValueEx(switch, f"{NAME}.lnk", 0, winreg.REG_BINARY, b"\x03" + bytes(11))
    assert autostart.enable(entry(tmp_path, "a")).state == autostart.ON
    assert autostart.look(entry(tmp_path, "b")).state == autostart.OUTDATED


def test_what_no_shortcut_can_carry_is_said(tmp_path: Path, startup: Path) -> None:
    """Too long, or with a line break: an error in words, and nothing is written."""
    for bad in ("x" * 1100, "line\nbreak"):
        with pytest.raises(OSError, match=r"shortcut"):
            autostart.enable(entry(tmp_path, bad))
    assert not startup.exists()


def test_the_persons_startup_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder Windows itself names, which may be redirected."""
    monkeypatch.undo()
    assert _autostart_windows._path(Entry(NAME, "", ("x",), Path("x"))).parent.name.lower() == "startup"
