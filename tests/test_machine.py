"""Facts about the machine, with fake sensors where the real ones are missing, and priorities on real processes."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.supervised import alive, wait_for
from trainerd.contract import interpreter
from trainerd.contract.status import Status
from trainerd.engine import locks
from trainerd.machine import cpu, filesystem, gpu, memory, power, priority, shared_vram
from trainerd.machine.process_group import ProcessGroup
from trainerd.supervisor.sensors import Sensors

linux = pytest.mark.skipif(sys.platform == "win32", reason="Linux's own files")
GB = 1 << 30


class FakeNvml:
    """Stands in for pynvml: a list of GPUs, a count of how often the driver was opened, and refusals on demand."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *uuids: str, refuse: tuple[str, ...] = ()) -> None:
        self.uuids, self.refuse, self.inits, self.open = list(uuids), refuse, 0, False

    def nvmlInit(self) -> None:
        if "init" in self.refuse:
            raise self.NVMLError("Driver Not Loaded")
        self.inits, self.open = self.inits + 1, True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        if "count" in self.refuse:
            raise self.NVMLError("GPU is lost")
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.uuids[handle]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:
        if "capability" in self.refuse:
            raise self.NVMLError("Not Supported")
        return [7, 5 + handle]

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return f"GPU number {handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=4 * GB, used=GB * (handle + 1))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 60 + handle

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if "power" in self.refuse:
            raise self.NVMLError("Not Supported")
        return 35_500

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=91)


def test_without_a_driver_there_is_no_gpu() -> None:
    """No driver, no library, a driver that goes away: an empty list, never an error."""
    assert gpu.devices(FakeNvml(refuse=("init",))) == []
    assert gpu.devices(FakeNvml("GPU-a", refuse=("count",))) == []
    assert gpu.driver_version(FakeNvml(refuse=("init",))) is None
    assert gpu.driver_version(FakeNvml()) == "580.1"


def test_a_gpu_is_described_and_what_it_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laptops that hide their power draw show n/a, not 0."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = gpu.devices(FakeNvml("GPU-a", "GPU-b", refuse=("power",)))
    assert [(f.index, f.uuid, f.name, f.power_w) for f in found] == [(0, "GPU-a", "GPU number 0", None), (1, "GPU-b", "GPU number 1", None)]
    assert (found[1].total_bytes, found[1].used_bytes, found[1].temperature_c, found[1].utilization_percent) == (4 * GB, 2 * GB, 61.0, 91.0)


@pytest.mark.parametrize(
    ("variable", "chosen"),
    [(None, [0, 1, 2]), ("", []), ("-1", []), ("2,0", [2, 0]), ("GPU-b", [1]), ("1,9,0", [1]), ("GPU-c,GPU-a", [2, 0])],
)
def test_cuda_visible_devices_is_respected(variable: str | None, chosen: list[int]) -> None:
    """Numbers, UUIDs, order, nothing at all, and CUDA's rule that an unknown name ends the list."""
    assert gpu.visible(["GPU-a", "GPU-b", "GPU-c"], variable) == chosen


def test_the_driver_is_asked_only_while_the_trainer_uses_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU training and a paused run leave the GPU asleep; one start of the driver serves many samples."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("trainerd.supervisor.sensors._SECOND", 0.0)
    nvml, shown = FakeNvml("GPU-a", "GPU-b"), Status()
    sensors = Sensors({"vram_limit": "50%", "ram_limit": "1GB"}, gpu.GpuReader(nvml))

    def sample() -> None:
        """A look, and one more with the answer to what it asked."""
        sensors.sample(shown)
        wait_for(lambda: not sensors._driver.is_open, 5, "the driver's answer")
        sensors.sample(shown)
        wait_for(lambda: not sensors._driver.is_open, 5, "the driver's answer")

    sensors.sample(shown)
    shown.trainer.pid, shown.plan.device = os.getpid(), "cpu"
    sample()
    assert nvml.inits == 0 and shown.gpu.name is None
    assert shown.memory.ram.limit_bytes == 10**9
    shown.plan.device = "cuda:1"
    for _ in range(5):
        sample()
    assert (nvml.inits, nvml.open, shown.gpu.name, shown.gpu.temperature_c) == (1, True, "GPU number 1", 61.0)
    assert (shown.memory.vram.used_bytes, shown.memory.vram.limit_bytes, shown.gpu.power_w) == (2 * GB, 2 * GB, 35.5)
    nvml.refuse = ("count",)  # it falls off the bus: unknown, not what it was; and it is found again when it is back
    sample()
    assert (nvml.open, shown.gpu.temperature_c, shown.gpu.power_w, shown.memory.vram.used_bytes) == (False, None, None, None)
    nvml.refuse = ()
    sample()
    assert (nvml.open, shown.gpu.temperature_c) == (True, 61.0)
    shown.trainer.pid = None
    sample()
    assert (nvml.open, shown.gpu.temperature_c) == (False, None)


@pytest.mark.parametrize(
    ("plan", "uuids", "expected"),
    [
        (None, ("GPU-a", "GPU-b"), "GPU-a"),
        (None, (), "cpu"),
        ({"device": "cpu"}, ("GPU-a",), "cpu"),
        ({"device": "cuda:1"}, ("GPU-a", "GPU-b"), "GPU-b"),
        ({"device": "cuda"}, ("GPU-a",), "GPU-a"),
        ({"device": "cuda:0"}, (), "cuda:0"),
        ({"device": "cuda:1"}, ("GPU-a",), "cuda:1"),
    ],
    ids=str,
)
def test_the_device_that_is_locked_is_the_one_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, plan: dict[str, str] | None, uuids: tuple[str, ...], expected: str
) -> None:
    """A training on the CPU keeps nobody from the GPU, and one whose GPU is lost waits in nobody else's queue."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert locks.device_name(plan, FakeNvml(*uuids)) == expected


def test_ram_is_what_programs_cannot_get_and_a_tree_counts_shared_pages_once() -> None:
    """Used plus available is the total; a process tree's RAM is positive and below it; one that is gone is unknown."""
    facts = memory.ram()
    assert 0 < facts.used_bytes < facts.total_bytes
    own = memory.process_tree_bytes(os.getpid())
    assert own is not None and 1_000_000 < own < facts.total_bytes
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert memory.process_tree_bytes(ended.pid) is None


def test_gpu_memory_in_ram_is_a_number_or_unknown() -> None:
    """Windows' counter where there is one; elsewhere, and for a process that is gone, nothing is made up."""
    for pid in (os.getpid(), 0x7FFFFFF0):
        found = shared_vram.shared_bytes(pid)
        assert found is None or (sys.platform == "win32" and found >= 0)


@pytest.mark.parametrize(
    ("sensor", "expected"),
    [
        (lambda: None, (None, None)),
        (lambda: SimpleNamespace(percent=41, power_plugged=False), (False, 41.0)),
        (lambda: SimpleNamespace(percent=100, power_plugged=None), (None, 100.0)),
    ],
)
def test_power(sensor: Any, expected: tuple[bool | None, float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop's battery, a desktop's none, and a sensor that does not know."""
    monkeypatch.setattr(psutil, "sensors_battery", sensor, raising=False)
    facts = power.power()
    assert (facts.plugged, facts.percent) == expected


def test_a_broken_battery_sensor_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil raises on odd boards; unknown is all that means."""

    def broken() -> None:
        raise RuntimeError("no such sensor")

    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    assert power.power() == power.PowerFacts(None, None)


def test_cores_and_features(tmp_path: Path) -> None:
    """At least one core, no more than we may use; instruction sets by the kernel's names, none where there is no such file."""
    assert 1 <= cpu.physical_cores() <= cpu.logical_cores()
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16 sse\n\nprocessor\t: 1\n", encoding="utf-8")
    if sys.platform != "win32":
        assert cpu.features(info) == {"avx2", "amx_bf16", "avx512_bf16"}
    assert cpu.features(tmp_path / "none") == frozenset()
    info.write_text("processor\t: 0\nmodel name\t: A Processor @ 2.00GHz\nflags\t: avx2\n", "utf-8")
    if sys.platform != "win32":
        assert cpu.model(info) == "A Processor @ 2.00GHz" and cpu.model(tmp_path / "none") is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows names no instructions")
def test_what_a_processor_computes_is_told_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's flags, of Intel, AMD and ARM; unknown where there is no such file, or the kernel is older than the name."""
    info = tmp_path / "cpuinfo"
    said = {"flags\t: avx2 avx512_bf16": (True, False), "flags\t: amx_fp16": (False, True), "Features\t: asimdhp bf16": (True, True)}
    monkeypatch.setattr(platform, "release", lambda: "5.11.0-41-generic")
    for line, expected in said.items():
        info.write_text(f"processor\t: 0\n{line}\n", encoding="utf-8")
        assert (cpu.computes("bf16", info), cpu.computes("fp16", info)) == expected, line
    assert cpu.computes("fp16", tmp_path / "none") is None
    info.write_text("processor\t: 0\nflags\t: avx2 avx512_bf16\n", encoding="utf-8")
    monkeypatch.setattr(platform, "release", lambda: "5.4.0")
    assert (cpu.computes("bf16", info), cpu.computes("fp16", info)) == (True, None)


@pytest.mark.parametrize(("registers", "expected"), [(0x7, False), (0xE7, None), (0x600E7, None), (0, None)])
def test_without_wide_registers_windows_processors_compute_neither(
    registers: int, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX alone: surely not; with AVX-512 or AMX, or where nothing is told: nobody knows, and nothing is said."""
    kernel = SimpleNamespace(GetEnabledXStateFeatures=_Function(registers))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert cpu.computes("fp16") is expected
    assert (cpu.slow("fp16") is None) is (expected is None)
    monkeypatch.setattr(platform, "machine", lambda: "ARM64")
    assert cpu.computes("bf16") is None


class _Function:
    """One of Windows', for a system without it."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.restype: object = None

    def __call__(self) -> int:
        return self.answer


MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/share rw - nfs4 server:/x rw
31 22 0:41 / /mnt/my\\040usb rw - vfat /dev/sdb1 rw
32 30 0:42 / /mnt/share/local rw - ext4 /dev/sdc1 rw
33 22 0:43 / /home/me/remote rw - fuse.sshfs me@there: rw
"""


@linux
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me", None),
        ("/mnt/share/home", "nfs4"),
        ("/mnt/sharewood", None),
        ("/mnt/share/local/x", None),
        ("/mnt/my usb/x", None),
        ("/home/me/remote/x", "fuse.sshfs"),
    ],
)
def test_a_network_file_system_is_named(path: str, kind: str | None, tmp_path: Path) -> None:
    """The longest mount point decides, with odd names and mounts inside mounts."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS, encoding="utf-8")
    assert filesystem.network_filesystem(Path(path), mounts) == kind
    assert filesystem.network_filesystem(Path(path), tmp_path / "none") is None


@pytest.mark.parametrize(
    ("folder", "service"),
    [
        ("OneDrive - Contoso/home", "OneDrive"),
        ("Dropbox/a/b", "Dropbox"),
        ("iCloudDrive/x", None),
        ("onedriver/x", None),
        ("projects/x", None),
        ("Google Drive/x", "Google Drive"),
    ],
)
def test_a_synced_folder_is_named(folder: str, service: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, or by what the service says of itself; a word that only begins alike is not one."""
    for variable in ("OneDrive", "OneDriveConsumer", "OneDriveCommercial"):
        monkeypatch.delenv(variable, raising=False)
    assert filesystem.synced_folder(tmp_path / folder) == service
    monkeypatch.setenv("OneDrive", str(tmp_path))
    assert filesystem.synced_folder(tmp_path / "anything") == "OneDrive"


def test_free_space_is_known_before_the_folder_exists(tmp_path: Path) -> None:
    """doctor asks about a home that is still to be made."""
    free = filesystem.free_bytes(tmp_path / "not" / "yet")
    assert free is not None and free > 0


POLITE = """
import sys
from trainerd.machine import priority
print(priority.lower_self(sys.argv[1]), flush=True)
sys.stdin.read()
"""


@linux
def test_a_polite_process_steps_back_with_all_it_starts_and_can_be_brought_forward() -> None:
    """Autogroup 19, nice 10, idle disk access, first to die when memory is short; the session's weight comes back at once."""
    with subprocess.Popen(
        [sys.executable, "-c", POLITE, "idle"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=interpreter.environment(),
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        achieved = process.stdout.readline().decode()
        seen = psutil.Process(process.pid)
        assert "nice 10" in achieved and seen.nice() == 10
        assert seen.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text(encoding="ascii").strip() == "500"
        autogroup = Path(f"/proc/{process.pid}/autogroup")
        if autogroup.exists():
            assert "autogroup 19" in achieved and autogroup.read_text(encoding="ascii").split()[-1] == "19"
        priority.raise_process(process.pid)
        if autogroup.exists():
            assert autogroup.read_text(encoding="ascii").split()[-1] == "0"
        process.stdin.close()


@linux
def test_normal_priority_changes_nothing_and_a_terminals_session_is_left_alone() -> None:
    """`polite.priority: normal` is none of it; and a process in somebody's session never slows that session."""
    words = [sys.executable, "-c", POLITE, "normal"]
    normal = subprocess.run(words, input=b"", capture_output=True, env=interpreter.environment(), check=True)
    assert normal.stdout.strip() == b"[]"
    lines = "import os; from trainerd.machine import priority; print(priority.lower_self('idle'))"
    ours = subprocess.run([sys.executable, "-c", lines], capture_output=True, env=interpreter.environment(), check=True)
    assert b"autogroup" not in ours.stdout and b"nice 10" in ours.stdout


@linux
def test_wrapping_needs_a_systemd_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one: a scope of idle weight, the same process and pipes. Without, or with one that refuses: the plain command."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    command = ["python", "-m", "x"]
    assert priority.wrap(command, "idle", "n") == command
    (tmp_path / "systemd").mkdir()
    program = tmp_path / "bin" / "systemd-run"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    for answer, wrapped in (("exit 1", False), ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', True)):
        program.write_text(f"#!/bin/sh\n{answer}\n", encoding="ascii")
        program.chmod(0o755)
        found = priority.wrap(command, "idle", "n")
        assert (found != command) is wrapped and found[-3:] == command
    assert "--unit=trainerd-n.scope" in found and "CPUWeight=idle" in found
    assert priority.wrap(command, "normal", "n") == command


GROUP = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
{}
"""


def group_of(end: str, folder: Path) -> tuple[ProcessGroup, list[int]]:
    """A group with one child, which holds the group's pipes open, and the child's PID."""
    with open(folder / "log", "wb") as log:
        group = ProcessGroup([sys.executable, "-c", GROUP.format(end)], environment=dict(os.environ), folder=folder, log=log)
    assert group.stdout.read(2) == b"up"
    return group, [child.pid for child in psutil.Process(group.pid).children()]


@linux
@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 11)", -11)])
def test_what_a_dead_leader_left_is_killed_before_its_number_is_free(end: str, code: int, tmp_path: Path) -> None:
    """wait() returns the exit code, promptly though a child holds the pipes, and the child is dead."""
    group, children = group_of(f"time.sleep(0.3); {end}", tmp_path)
    began = time.monotonic()
    assert group.wait() == code
    assert time.monotonic() - began < 20
    group.close()
    for child in children:
        wait_for(lambda child=child: not alive(child), 5, "the child to be gone")  # type: ignore[misc]
    group.kill()  # of a group that is gone: nobody else is hit


@linux
def test_a_group_that_reads_nothing_holds_nobody_up(tmp_path: Path) -> None:
    """Commands to a process that is stopped never block the supervisor; killing it works all the same."""
    group, children = group_of("time.sleep(600)", tmp_path)
    os.kill(group.pid, signal.SIGSTOP)
    sent = sum(group.stdin.write(b"x" * 1000) or 0 for _ in range(500))
    assert sent < 500_000
    group.kill()
    assert group.wait() == -signal.SIGKILL
    group.close()
    wait_for(lambda: not any(map(alive, children)), 5, "the child to be gone")


def test_what_a_gpu_can_compute_is_asked_of_the_driver() -> None:
    """By torch's number; unknown where there is none, or the driver does not say."""
    assert gpu.compute_capability(1, FakeNvml("GPU-a", "GPU-b")) == (7, 6)
    assert gpu.compute_capability(2, FakeNvml("GPU-a", "GPU-b")) is None
    assert gpu.compute_capability(0, FakeNvml("GPU-a", refuse=("capability",))) is None
    assert gpu.compute_capability(0, FakeNvml(refuse=("init",))) is None
