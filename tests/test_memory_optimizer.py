"""`memory_optimizer.py` as a person meets it: what the machine is, a configuration for it, what can be freed, and a watch over memory."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import diagnosis, freeing, machine_facts, machine_view, packages, recommendation, samples
from tests.person import ROOT, Person
from tests.supervised import RUN, Daemon
from tests.trainers import TASK
from trainerd.config import catalogue
from trainerd.config.load import resolve
from trainerd.contract import status
from trainerd.contract.paths import Home
from trainerd.machine import drive, gpu, page_cache, programs

DOOR = ROOT / "memory_optimizer.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@pytest.fixture
def person(tmp_path: Path) -> Any:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


def command(person: Person, *words: str) -> list[str]:
    return [sys.executable, str(DOOR), "--home", str(person.home.root), *words]


def types(person: Person, *words: str, code: int = 0) -> str:
    done = subprocess.run(command(person, *words), capture_output=True, text=True, timeout=120, env=person.environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def document(person: Person, *words: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(types(person, *words, "--json", code=code))
    return found


def test_the_door_is_a_door() -> None:
    """Under 15 lines, like the other scripts of the checkout."""
    assert len(DOOR.read_text("utf-8").splitlines()) < 15


def test_profile_says_what_the_machine_is_and_what_fits(person: Person) -> None:
    """Processor, RAM, swap, disk, GPU, torch; a verdict for each preset of each built-in task; nothing is written."""
    shown = types(person, "profile")
    for word in ("processor", "cores", "NUMA", "RAM", "swap", "disk", "GPU", "torch", "measured", *catalogue.STATED, *catalogue.BUILTIN):
        assert word in shown, word
    known = document(person, "profile")
    assert known["cpu"]["logical_cores"] >= known["cpu"]["physical_cores"] >= 1
    assert known["ram"]["total_bytes"] > known["ram"]["used_bytes"] > 0 and known["disk"]["total_bytes"] >= known["disk"]["free_bytes"]
    assert {(fit["task"], fit["preset"]) for fit in known["fits"]} == {(t, p) for t in catalogue.BUILTIN for p in catalogue.STATED}
    assert all(fit["verdict"] == "fits" and fit["needed"]["upper"] >= fit["needed"]["point"] for fit in known["fits"])
    assert not list(person.home.root.iterdir())


def test_config_is_accepted_by_start_as_it_is(person: Person) -> None:
    """optimal_config.json holds what was asked for and what the planner chose; `start --config` trains exactly that."""
    words = ("--preset", "quick", "--set", "train.max_steps=2", "--set", "settings.eval_prefixes=0", "--set", "data.size=300")
    shown = types(person, "config", *words)
    assert "the whole batch at once" in shown and "start --config" in shown
    written = json.loads(person.home.optimal_config.read_text("utf-8"))
    assert written["train"] == {"epochs": 3, "max_steps": 2, "micro_batch": 32, "precision": written["train"]["precision"]}
    person.starts("--config", str(person.home.optimal_config), "--set", "polite.priority=normal", "--wait")
    record = json.loads((person.home.run(person.run()).folder / "run.json").read_text("utf-8"))
    assert record["config"]["train"]["micro_batch"] == 32 and record["config"]["data"]["size"] == 300
    assert person.sees().state == status.COMPLETED


def test_config_keeps_what_a_person_wrote_there(person: Person) -> None:
    """Another optimal_config.json is kept beside the new one, under a name that is said; the same one is left as it is."""
    person.home.optimal_config.write_text('{"task": "cadence", "train": {"epochs": 77}}', encoding="utf-8")
    first = document(person, "config")
    kept = Path(first["kept"])
    assert json.loads(kept.read_text("utf-8"))["train"]["epochs"] == 77 and kept.parent == person.home.root
    assert document(person, "config")["kept"] is None
    assert kept.name in types(person, "config", "--epochs", "2") or (person.home.root / "optimal_config.before-2.json").exists()
    assert json.loads(kept.read_text("utf-8"))["train"]["epochs"] == 77


def test_config_chooses_and_says_why_and_refuses_what_never_fits(person: Person) -> None:
    """A batch that does not fit whole is cut, its sum unchanged; what cannot be cut is refused with exit 5, and nothing is written."""
    large = ("--set", "train.batch_size=65536", "--set", "train.precision=fp32", "--set", "memory.ram_limit=12GB")
    made = document(person, "config", *large)
    micro_batch = made["config"]["train"]["micro_batch"]
    assert micro_batch < 65536 and made["config"]["train"]["batch_size"] == 65536
    assert any(reason["key"] == "train.micro_batch" and "pieces" in reason["why"] for reason in made["reasons"])
    person.home.optimal_config.unlink()
    refused = types(person, "config", *large, "--set", "train.micro_batch=65536", code=5)
    assert "does not fit" in refused and "It would fit with" in refused and not person.home.optimal_config.exists()


def test_config_of_ones_own_task_leaves_open_what_is_not_known(person: Person, tmp_path: Path) -> None:
    """Before its first training the micro-batch stays with the trainer, and that is said."""
    (tmp_path / "tiny.py").write_text(TASK, encoding="utf-8")
    shown = types(person, "config", "--task", f"{tmp_path / 'tiny.py'}:Tiny", "--epochs", "4")
    assert "has not been trained in this home yet" in shown and "left to the trainer" in shown
    written = json.loads(person.home.optimal_config.read_text("utf-8"))
    assert written == {"task": f"{tmp_path / 'tiny.py'}:Tiny", "train": {"epochs": 4}}


def test_every_technique_the_plan_takes_up_is_written_as_a_setting() -> None:
    """What the plan would do by itself stands in the file, so that `start` does it, too."""
    from client.outlook import Outlook
    from trainerd.memory import forecast, planner
    from trainerd.memory.techniques import TECHNIQUES

    asked = resolve("cadence", None)
    table = catalogue.find_task("cadence").blocks_module.table(catalogue.find_task("cadence").settings_model(), asked.config.data)
    place = forecast.Place("cpu", 10**12, "fp32")
    answer = forecast.answer(asked.config, place, table)
    used = [t for t in TECHNIQUES if t.automatic and t.key not in ("train.micro_batch", "train.precision")]
    taken = planner.Answer(answer.estimate, planner.FITS, 10**12, tuple(t.name for t in used))
    made = recommendation.recommend(asked, Outlook(taken, place, "here", "enough"))
    assert {key for key, _, _ in made.reasons} >= {t.key for t in used}


def test_optimize_lets_go_of_what_is_ours_and_touches_nobody(person: Person) -> None:
    """Before and after in MB, who holds most, the cache only when that is asked for; other processes stay."""
    prepared = person.home.cache / "cadence-0123"
    prepared.mkdir(parents=True)
    (prepared / "rows.bin").write_bytes(os.urandom(3_000_000))
    (person.home.cache / "profiles").mkdir()
    (person.home.cache / "profiles" / "cpu.json").write_text("{}", encoding="utf-8")
    bystander = subprocess.Popen([sys.executable, "-c", "import sys; x = b'1' * 50_000_000; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        found = document(person, "optimize")
        assert found["in_cache_bytes"] == 3_000_000 and (prepared / "rows.bin").exists() and found["programs"]
        assert "before" in types(person, "optimize")
        assert "Prepared data and traces deleted: 3 MB of disk" in types(person, "optimize", "--cache")
        assert not prepared.exists() and (person.home.cache / "profiles" / "cpu.json").exists()
        assert bystander.poll() is None
    finally:
        bystander.communicate()


@linux
def test_a_training_of_another_home_is_no_program_to_close(person: Person, tmp_path: Path) -> None:
    """It is named with its home and the command that pauses it, which gives all back and loses nothing."""
    stand_in = tmp_path / "checkout" / "trainerd" / "engine"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in.parent / "__init__.py").touch()
    (stand_in / "__main__.py").write_text("import sys; x = b'1' * 700_000_000; print('up', flush=True); sys.stdin.read()", encoding="utf-8")
    other = tmp_path / "another home"
    words = [sys.executable, "-P", "-m", "trainerd.engine", "--home", str(other), "--run", "x"]
    environment = {**os.environ, "PYTHONPATH": str(stand_in.parents[1])}
    trainer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert trainer.stdout is not None and trainer.stdout.readline()
        shown = types(person, "optimize")
        assert f"A training of another home, {other}, holds 7" in shown, shown
        assert f"--home '{other}' pause  gives it back, and loses nothing." in shown
        could_close = next((line for line in shown.splitlines() if line.startswith("You could close")), "")
        assert "trainerd.engine" not in could_close
        found = document(person, "optimize")
        assert [one["home"] for one in found["elsewhere"]].count(str(other)) == 1
        assert not any("trainerd.engine" in name for name in found["could_close"])
    finally:
        trainer.communicate()


def without_rights(person: Person, *words: str) -> subprocess.CompletedProcess[str]:
    """Typed by a person whom permissions hold; root's hold only without its capabilities."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv")
    before = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return subprocess.run([*before, *words], capture_output=True, text=True, timeout=120, env=person.environment, check=False)


@linux
def test_folders_that_may_not_be_read_are_told_in_words(person: Person, tmp_path: Path) -> None:
    """A cache without rights: --cache is refused with the folder's name, and without it the rest is shown. Runs without rights: `plan`
    does not say that a task was never trained."""
    (person.home.cache / "cadence-1").mkdir(parents=True)
    person.home.runs.mkdir()
    (tmp_path / "tiny.py").write_text(TASK, encoding="utf-8")
    plan = [sys.executable, str(ROOT / "run_optimized_training.py"), "--home", str(person.home.root), "plan"]
    try:
        for folder in (person.home.cache, person.home.runs):
            folder.chmod(0)
        refused = without_rights(person, *command(person, "optimize", "--cache"))
        assert refused.returncode == 5 and f"{person.home.cache} cannot be read: Permission denied." in refused.stderr, refused.stderr
        shown = without_rights(person, *command(person, "optimize"))
        assert shown.returncode == 0 and "RAM in use" in shown.stdout, shown.stderr
        planned = " ".join(without_rights(person, *plan, "--task", f"{tmp_path / 'tiny.py'}:Tiny").stdout.split())
        assert "The runs of this home cannot be read (Permission denied)" in planned and "has not been trained" not in planned, planned
    finally:
        for folder in (person.home.cache, person.home.runs):
            folder.chmod(0o700)


@linux
@pytest.mark.parametrize("kilobytes", [0, 1])
def test_a_table_that_the_disk_does_not_take_is_said_and_summed_up(person: Person, tmp_path: Path, kilobytes: int) -> None:
    """Already the heading, or a line: what could not be written and why, exit 4, no fault of ours; what was seen is summed up."""
    table = tmp_path / "memory.csv"
    words = command(person, "monitor", "--duration", "6" if kilobytes else "0.5", "--interval", "0.2", "--csv", str(table))
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *words]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, env=person.environment, check=False)
    assert done.returncode == 4 and f"{table} could not be written: File too large." in done.stderr, done.stdout + done.stderr
    assert "trainerd itself" not in done.stderr and ("mean" in done.stdout) is bool(kilobytes), done.stdout


@linux
def test_a_file_is_let_go_from_the_systems_cache(tmp_path: Path) -> None:
    """What was read is kept by the system, and is not afterwards; it is told in bytes."""
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(1 << 20))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    assert page_cache.kept_bytes(path) == 1 << 20
    page_cache.let_go(path)
    assert (page_cache.kept_bytes(path) or 0) < 1 << 19
    (tmp_path / "empty").touch()
    assert page_cache.kept_bytes(tmp_path / "empty") == 0 and page_cache.kept_bytes(tmp_path / "missing") is None


def test_optimize_leaves_the_cache_of_a_live_training_alone(tmp_path: Path) -> None:
    """Exit 5 with what to do; and the training's own memory is told, with how to have it back."""
    person = Person(tmp_path / "home")
    (person.home.cache / "fake-1").mkdir(parents=True)
    (person.home.cache / "fake-1" / "rows").write_bytes(b"x" * 1000)
    with Daemon(person.home, {"steps": 5000, "pause": 0.02}):
        person.waits_for(lambda reading: reading.state == status.RUNNING and reading.status.trainer.pid)
        refused = types(person, "optimize", "--cache", code=5)
        assert "a training is live" in refused and (person.home.cache / "fake-1" / "rows").exists()
        shown = types(person, "optimize")
        assert "The training here is running" in shown and "pause" in shown and f"run {RUN}" not in shown
        watched = document(person, "monitor", "--duration", "0.4", "--interval", "0.2")
        assert watched["summary"]["trainer_bytes"]["max"] > 1_000_000 and watched["samples"][-1]["step"] is not None


def test_monitor_tells_every_moment_and_sums_up(person: Person, tmp_path: Path) -> None:
    """Plain lines, a table file with every moment, and least, mean and most; a file that is there is never overwritten."""
    table = tmp_path / "memory.csv"
    shown = types(person, "monitor", "--duration", "1", "--interval", "0.25", "--csv", str(table)).splitlines()
    assert shown[0].split()[:3] == ["time", "RAM", "swap"] and all(len(line) <= 80 for line in shown)
    assert [line.split()[0] for line in shown[-3:]] == ["min", "mean", "max"]
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and all(int(row["ram_used_bytes"]) > 0 and row["vram_used_bytes"] == "" for row in rows)
    assert "is there already" in types(person, "monitor", "--csv", str(table), code=2)
    assert "cannot be written" in types(person, "monitor", "--csv", str(tmp_path / "no" / "x.csv"), code=2)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent as a signal here")
def test_ctrl_c_ends_the_watch_with_its_summary(person: Person) -> None:
    """Whoever has seen enough gets the summary of what was seen, and exit 0."""
    watch = subprocess.Popen(command(person, "monitor", "--duration", "600"), stdout=subprocess.PIPE, text=True, env=person.environment)
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("time") and watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    rest, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0 and "mean" in rest


def test_what_is_typed_wrong_is_said_in_words(person: Person) -> None:
    """An unknown command, a duration that is none, a wrong setting: exit 2, in the door's own name."""
    assert "memory_optimizer.py" in types(person, "profil", code=2)
    types(person, "monitor", "--duration", "soon", code=2)
    assert "train.epochs" in types(person, "config", "--set", "train.epoch=3", code=2)


class _Sampled:
    """Stands in for the driver: a GPU that gets fuller."""

    def __init__(self) -> None:
        self.used = 0

    def read(self) -> list[gpu.GpuFacts]:
        self.used += 10**9
        return [gpu.GpuFacts(0, "GPU-a", "a GPU", 4 * 10**9, self.used, 61.0, None, 88.0)]

    def close(self) -> None:
        self.used = -1


def test_a_gpu_is_in_the_lines_and_in_the_summary(tmp_path: Path) -> None:
    """VRAM, temperature and load from NVML; what is unknown is n/a, never 0."""
    driver = _Sampled()
    sampler = samples.Sampler(Home(tmp_path), driver)  # type: ignore[arg-type]
    taken = [sampler.take() for _ in range(3)]
    sampler.close()
    assert "61 °C" in samples.line(taken[0]) and "88 %" in samples.line(taken[0]) and "n/a" in samples.line(taken[0])
    assert samples.summary(taken)["vram_used_bytes"] == {"min": 1e9, "mean": 2e9, "max": 3e9}
    assert samples.summary(taken)["trainer_bytes"] is None and driver.used == -1
    assert all(len(line) <= 80 for line in [samples.heading(), *map(samples.line, taken), *samples.summary_lines(taken)])


def test_a_gpu_that_torch_cannot_use_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """profile's facts on a machine with a GPU and a torch for the CPU."""
    one = gpu.GpuFacts(0, "GPU-a", "NVIDIA GeForce RTX 3050", 4 * 10**9, 3 * 10**8, 50.0, None, 3.0)
    monkeypatch.setattr(gpu, "devices", lambda: [one])
    monkeypatch.setattr(packages, "torch_facts", lambda: packages.TorchFacts("2.13.0+cpu", None))
    facts = machine_facts.look(Home(tmp_path))
    shown = "\n".join(machine_view.lines(facts, "plan", lambda text, colour: text))
    assert "RTX 3050: 4.0 GB, 300 MB in use, 50 °C" in shown and "CPU only" in shown and "-> Install the build for CUDA" in shown
    assert facts.document()["torch"]["uses_gpu"] is False and facts.torch_finding.level == "problem"
    assert isinstance(facts.torch_finding, diagnosis.Finding)


class _Nvml:
    """Two processes on the GPU; Windows would not tell the second one's bytes."""

    class NVMLError(Exception):
        pass

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse

    def nvmlInit(self) -> None:
        if self.refuse:
            raise self.NVMLError

    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-a"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=500), SimpleNamespace(pid=1, usedGpuMemory=None)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=700)]


def test_who_holds_gpu_memory_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that computes and draws is one; bytes the driver hides are unknown; no driver, nobody."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.processes(_Nvml()) == [gpu.GpuProcess(os.getpid(), 0, 700), gpu.GpuProcess(1, 0, None)]
    assert gpu.processes(_Nvml(refuse=True)) == []
    assert gpu.driver_cuda(_Nvml()) == 12 and gpu.driver_cuda(_Nvml(refuse=True)) is None


def test_programs_are_told_by_name_and_the_persons_own_from_the_systems(tmp_path: Path) -> None:
    """An interpreter is named with its script; a large program of this user's may be closed, the desktop's not; each with its PIDs."""
    from client.commands.memory import _freed

    script = tmp_path / "hungry.py"
    script.write_text("import sys\nx = bytearray(300_000_000)\nprint('ready', flush=True)\nsys.stdin.read()\n", encoding="utf-8")
    child = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    try:
        found = next(program for program in programs.heaviest(500) if child.pid in program.pids)
        assert found.name.endswith("hungry.py") and found.own_bytes > 290_000_000 and found.yours
        assert child.pid not in {pid for program in programs.heaviest(500, {child.pid}) for pid in program.pids}
        level = freeing.Level(1, None)
        shell = programs.Program("gnome-shell", (1,), 10**9, False)
        several = programs.Program("python", (7, 8, 9, 10, 11), 588_000_000, True)
        freed = freeing.Freed(level, level, programs=[shell, found, several])
        assert [p.name for p in freed.closable] == [found.name, "python"]
        *_, close = _freed(freed)
        assert f"PID {child.pid}); python (588 MB, PIDs 7, 8, 9, 10 and 1 more)." in close
    finally:
        child.communicate()
    assert programs.name_of(child.pid) is None and programs.tree([child.pid]) == set()


@linux
@pytest.mark.parametrize(
    ("name", "rotational", "kind"), [("nvme0n1", "0", "NVMe SSD"), ("sda", "0", "SSD"), ("sda", "1", "hard disk"), ("vda", "1", None)]
)
def test_the_kind_of_a_drive(tmp_path: Path, name: str, rotational: str, kind: str | None) -> None:
    """From the disk the partition lies on; a virtual disk that says it turns is not believed."""
    disk = tmp_path / "devices" / name
    (disk / "queue").mkdir(parents=True)
    (disk / "queue" / "rotational").write_text(f"{rotational}\n", encoding="ascii")
    (disk / "part1").mkdir()
    blocks = tmp_path / "block"
    blocks.mkdir()
    (blocks / "8:1").symlink_to(disk / "part1")
    assert drive._of_block(blocks / "8:1") == kind and drive._of_block(blocks / "9:9") is None
    assert drive.kind(tmp_path, tmp_path / "nothing") is None


def test_the_watch_keeps_its_pace() -> None:
    """A moment that took long puts off none of the later ones."""
    from client.commands.memory import _moments

    class Slow:
        taken = 0

        def take(self) -> Any:
            self.taken += 1
            if self.taken == 1:
                time.sleep(0.25)
            return self.taken

    began = time.monotonic()
    assert list(_moments(Slow(), 0.6, 0.2)) == [1, 2, 3, 4]  # type: ignore[arg-type]
    assert time.monotonic() - began > 0.55
