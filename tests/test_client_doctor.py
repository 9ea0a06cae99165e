"""doctor: each thing it finds, with its remedy. Sensors and drivers are stand-ins; files and folders are real."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from client import diagnosis, limits, packages
from tests.person import Person
from trainerd.contract import files, runs
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.machine import adapters, autostart
from trainerd.machine.autostart import Found
from trainerd.machine.gpu import GpuFacts
from trainerd.machine.memory import RamFacts

GB = 10**9
RTX = GpuFacts(0, "GPU-1", "NVIDIA GeForce RTX 3050", 4 * GB, 0, 40.0, 10.0, 0.0)
CPU_TORCH, CUDA_TORCH = packages.TorchFacts("2.13.0+cpu", None), packages.TorchFacts("2.13.0+cu130", "13.0")


@pytest.mark.parametrize(("finding", "level", "says"), [
    (diagnosis.python((3, 9)), "problem", "3.10 to 3.14"),
    (diagnosis.python((3, 15)), "warning", "newer"),
    (diagnosis.python((3, 12)), "ok", "3.12"),
    (diagnosis.torch(None, [], False), "problem", "start_training"),
    (diagnosis.torch(CPU_TORCH, [RTX], True), "problem", "CPU only, and there is NVIDIA GeForce RTX 3050"),
    (diagnosis.torch(CPU_TORCH, [], True), "problem", "download.pytorch.org"),
    (diagnosis.torch(CPU_TORCH, [], False), "ok", "built for the CPU"),
    (diagnosis.torch(CUDA_TORCH, [RTX], True), "ok", "CUDA 13.0"),
    (diagnosis.driver([RTX], "580.1", True)[0], "ok", "4.0 GB"),
    (diagnosis.driver([], None, True)[0], "problem", "no driver answers"),
    (diagnosis.driver([], "580.1", True)[0], "note", "Training runs on the CPU"),
    (diagnosis.driver([], None, False)[0], "note", "no NVIDIA GPU"),
    (diagnosis.bitsandbytes(None, CUDA_TORCH), "warning", "pip install bitsandbytes"),
    (diagnosis.bitsandbytes({"128"}, CUDA_TORCH), "warning", "no library for CUDA 13.0"),
    (diagnosis.bitsandbytes({"128", "130"}, CUDA_TORCH), "ok", "13.0"),
    (diagnosis.bitsandbytes(set(), CPU_TORCH), "note", "on the CPU only"),
    (diagnosis.memory(4 * GB), "warning", "--dataset-size"),
    (diagnosis.memory(16 * GB), "ok", "16.0 GB"),
    (diagnosis.disk(GB // 2), "problem", "500 MB"),
    (diagnosis.disk(2 * GB), "warning", "2.0 GB"),
    (diagnosis.disk(50 * GB), "ok", "50.0 GB"),
    (diagnosis.disk(None), "note", "not known"),
    (diagnosis.place(Home(Path("/x")), "OneDrive", None)[0], "problem", "inside OneDrive"),
    (diagnosis.place(Home(Path("/x")), None, "nfs4")[0], "problem", "on nfs4"),
    (diagnosis.battery(None), "note", "No battery sensor"),
    (diagnosis.battery(False), "ok", "on battery"),
    (diagnosis.login(Found(autostart.ON, "a systemd user unit"), "auto"), "ok", "systemd user unit"),
    (diagnosis.login(Found(autostart.OFF), "auto"), "note", "`start` does it"),
    (diagnosis.login(Found(autostart.OFF), "off"), "note", "autostart enable"),
    (diagnosis.login(Found(autostart.SWITCHED_OFF, "x", Path("/x")), "auto"), "note", "Switched off in the system"),
    (diagnosis.login(Found(autostart.OUTDATED, "a shortcut", Path("/x")), "auto"), "warning", "another place or Python"),
], ids=lambda value: getattr(value, "name", None))  # fmt: skip
def test_each_thing_is_told_with_its_remedy(finding: diagnosis.Finding, level: str, says: str) -> None:
    """What is found has a level, words and, where something is to be done, what."""
    assert finding.level == level and says in f"{finding.text} {finding.remedy}"
    assert bool(finding.remedy) == (level in ("warning", "problem"))


def test_doctor_prints_what_it_found_and_ends_by_it(tmp_path: Path) -> None:
    """Exit 0 without a problem, 4 with one; --json is one document; torch is never imported."""
    person = Person(tmp_path / "home")
    done = person.types("doctor")
    told = person.types("doctor", "--json")
    document = json.loads(told.stdout)
    assert done.returncode == told.returncode == (4 if document["problems"] else 0)
    assert {"python", "torch", "GPU", "RAM", "disk", "home", "battery"} <= {finding["name"] for finding in document["findings"]}
    synced = Person(tmp_path / "Dropbox" / "home").types("doctor")
    assert synced.returncode == 4 and "PROBLEM  home" in synced.stdout and "-> Use a local folder" in synced.stdout


def test_one_broken_check_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An odd driver is a warning of its own."""

    def broken() -> None:
        raise RuntimeError("odd sensor")

    monkeypatch.setattr(diagnosis, "power", broken)
    found = diagnosis.examine(Home(tmp_path))
    assert any("odd sensor" in finding.text for finding in found) and any(finding.name == "RAM" for finding in found)


def test_torchs_build_is_read_from_its_files(tmp_path: Path) -> None:
    """version.py as the wheels write it, with and without CUDA; none: not installed."""
    for line, cuda in (("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", None), ("", None)):
        (tmp_path / "version.py").write_text(f"__all__ = ['cuda']\n{line}\nhip: Optional[str] = None\n", encoding="utf-8")
        found = packages.torch_facts(tmp_path)
        assert found is not None and found.cuda == cuda
    assert packages.folder("no_such_package_here") is None and packages.version("no-such-package-here") is None


def test_the_cuda_libraries_of_bitsandbytes_are_seen(tmp_path: Path) -> None:
    """By the names of its files, on both systems."""
    for name in ("libbitsandbytes_cuda118.so", "libbitsandbytes_cuda130.dll", "libbitsandbytes_cpu.so"):
        (tmp_path / name).touch()
    assert packages.bitsandbytes_cuda(tmp_path) == {"118", "130"}


@pytest.mark.skipif(sys.platform == "win32", reason="the bus as Linux shows it")
def test_an_nvidia_adapter_is_seen_without_a_driver(tmp_path: Path) -> None:
    """By vendor and class on the bus; its sound device does not count."""
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n", encoding="ascii")
        (tmp_path / name / "class").write_text(kind + "\n", encoding="ascii")
    assert adapters.nvidia_present(tmp_path)
    (tmp_path / "a" / "class").write_text("0x028000", encoding="ascii")
    assert not adapters.nvidia_present(tmp_path) and not adapters.nvidia_present(tmp_path / "none")


def test_a_limit_below_what_is_in_use_is_named(home: Home) -> None:
    """RAM and VRAM with the number in use now; a limit that can be kept is not; the run this home shows decides which limits count."""
    now = RamFacts(6_100_000_000, 16_000_000_000)
    card = GpuFacts(0, "GPU-1", "Stub", 4_000_000_000, 3_900_000_000, None, None, None)
    ram, vram = limits.passed("4GB", "auto", now, [card])
    assert ram == "memory.ram_limit is 4GB, and 6.1 GB are in use now, without the training: it cannot be kept."
    assert vram.startswith("memory.vram_limit is auto (3.5 GB), and 3.9 GB are in use now")
    assert limits.passed("auto", "99%", now, [card]) == [] == limits.passed("80%", "auto", now, [])
    assert diagnosis.limits(home, now, []) == []
    config = {"task": "cadence", "memory": {"ram_limit": "4GB", "vram_limit": "auto"}}
    runs.write(home, RunRecord("r", "cadence", 1.0, config, {}))
    files.write_json(home.status, {"schema": 1, "state": "stopped", "run": "r"})
    (found,) = diagnosis.limits(home, now, [])
    assert found.level == "warning" and "6.1 GB" in found.text and "close other programs" in found.remedy
