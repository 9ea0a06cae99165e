"""Processes under Windows' own rules: job objects, detaching, the environment's launcher that is not the interpreter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.windows.person import ROOT, Other, comes
from trainerd.contract import interpreter
from trainerd.contract.paths import Home
from trainerd.machine import append, memory, power, priority
from trainerd.machine.process_group import ProcessGroup
from trainerd.supervisor import logs

SLEEPS = "import time; time.sleep(600)"
BREEDS = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); print(p.pid, flush=True); p.wait()"


def test_a_process_group_leaves_nobody_behind(tmp_path: Path) -> None:
    """Killing the group ends the trainer and what the trainer started; so does the end of the trainer alone."""
    for way in ("kill the group", "kill the trainer"):
        with open(tmp_path / "log", "ab") as log:
            group = ProcessGroup([sys.executable, "-c", BREEDS], environment=interpreter.environment(), folder=tmp_path, log=log)
        grandchild = int(group.stdout.readline())
        assert psutil.pid_exists(grandchild)
        if way == "kill the group":
            group.kill()
        else:
            psutil.Process(group.pid).kill()
        group.wait()
        group.close()
        comes(lambda pid=grandchild: not psutil.pid_exists(pid), "the grandchild's end")


def test_a_killed_supervisor_takes_its_trainer_along(tmp_path: Path) -> None:
    """The job object dies with its last handle: a trainer never outlives the supervisor that would have to watch it."""
    supervising = (
        "from pathlib import Path\nfrom trainerd.contract import interpreter\nfrom trainerd.machine.process_group import ProcessGroup\n"
        "place = {'environment': interpreter.environment(), 'folder': Path(sys.argv[1]), 'log': open(sys.argv[1] + '/log', 'ab')}\n"
        f"group = ProcessGroup([sys.executable, '-c', {SLEEPS!r}], **place)\n"
        "print(group.pid, flush=True)\ngroup.wait()\n"
    )
    with Other(supervising, tmp_path) as supervisor:
        trainer = int(supervisor.hears())
        assert psutil.pid_exists(trainer)
        supervisor.process.kill()
        comes(lambda: not psutil.pid_exists(trainer), "the trainer's end")


def test_a_detached_process_outlives_who_started_it(tmp_path: Path) -> None:
    """What `start` spawns lives on when the client is gone, says where it lives, and writes where it was told."""
    living = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    spawning = (
        "import subprocess\n"
        "flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_BREAKAWAY_FROM_JOB\n"
        f"subprocess.Popen([sys.executable, '-c', {living!r}], creationflags=flags, stdin=subprocess.DEVNULL,\n"
        "                 stdout=open(sys.argv[1], 'wb'), stderr=subprocess.STDOUT)\n"
    )
    said = tmp_path / "said"
    with Other(spawning, said) as client:
        assert client.process.wait(20) == 0
    comes(lambda: said.exists() and said.read_text("ascii").strip(), "the detached process")
    survivor = psutil.Process(int(said.read_text("ascii")))
    assert survivor.is_running()
    survivor.kill()


def test_inside_a_job_that_kills_and_keeps_the_person_is_told(tmp_path: Path) -> None:
    """In a terminal whose job lets nothing out, start goes on without breaking away, and says that it may end with the window."""
    in_job = (
        "from pathlib import Path\nfrom trainerd.contract.paths import Home\nfrom client import launch\n"
        "import ctypes\nfrom trainerd.machine import _process_group_windows as jobs\n"
        "job = jobs._new_job()\n"
        "jobs._kernel32.AssignProcessToJobObject(job, ctypes.c_void_p(-1))\n"
        "found = launch.detached(Home(Path(sys.argv[1])), 'i' * 32, 'r' * 32)\n"
        "print('told' if found.tied else 'silent', flush=True)\nfound.process.wait(20)\n"
    )
    with Other(in_job, tmp_path) as client:
        assert client.hears() == "told"
        client.process.wait(30)


def test_lowering_oneself_and_being_raised_again() -> None:
    """The trainer steps back to the idle class, and a quick stop gives it the normal class back."""
    lowering = "from trainerd.machine import priority\nprint(priority.lower_self('idle'), flush=True)\nsys.stdin.readline()\n"
    with Other(lowering) as trainer:
        assert "idle priority class" in trainer.hears()
        assert psutil.Process(trainer.process.pid).nice() == psutil.IDLE_PRIORITY_CLASS
        priority.raise_process(trainer.process.pid)
        assert psutil.Process(trainer.process.pid).nice() == psutil.NORMAL_PRIORITY_CLASS


def test_the_machine_answers_or_says_it_does_not_know() -> None:
    """Memory of the machine and of a process tree, and the battery: numbers or None, never an error."""
    facts = memory.ram()
    assert 0 < facts.used_bytes < facts.total_bytes
    assert (memory.process_tree_bytes(os.getpid()) or 0) > 1 << 20
    power.power()


def test_an_environments_interpreter_is_started_not_its_launcher(tmp_path: Path) -> None:
    """In a virtual environment the base interpreter is started, and is in the environment all the same."""
    scripts = tmp_path / "an env" / "Scripts"
    scripts.mkdir(parents=True)
    base = Path(getattr(sys, "_base_executable", sys.executable))
    for name in (base.name, *(dll.name for dll in base.parent.glob("*.dll"))):
        shutil.copy(base.parent / name, scripts / name)
    (scripts.parent / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = true\n", "utf-8")
    asking = (
        "import json, subprocess, sys\nfrom trainerd.contract import interpreter\n"
        "command = interpreter.command('tests.windows.tell')\n"
        "told = subprocess.run(command, env=interpreter.environment(), stdout=subprocess.PIPE, check=True).stdout\n"
        "print(json.dumps([sys.prefix, command[0], *json.loads(told)]))\n"
    )
    done = subprocess.run([scripts / base.name, "-c", asking], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        pytest.skip(f"no environment can be imitated here: {done.stderr.splitlines()[-1:]}")
    prefix, started, child_prefix, child_executable = json.loads(done.stdout)
    assert Path(prefix) == Path(child_prefix) == scripts.parent
    assert Path(started) == base and Path(child_executable) == scripts / base.name


def test_a_log_is_cut_while_a_child_writes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's handle appends in the kernel: after a cut its next line stands at the beginning, with no hole before it."""
    monkeypatch.setattr(logs, "LOG_BYTES", 5_000)
    home = Home(tmp_path)
    path, log = logs.open_new(home)
    source = "import sys, time\nfor n in range(3000): print(n, file=sys.stderr, flush=True); time.sleep(0.0002 if n % 50 else 0.01)"
    with log:
        child = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
    largest = 0
    while child.poll() is None:
        largest = max(largest, path.stat().st_size)
        logs.cut(path)
    content = logs.part_before(path).read_bytes() + path.read_bytes()
    numbers = [int(line) for line in content.split()]
    assert b"\0" not in content and numbers == sorted(numbers) and numbers[-1] == 2999
    assert path.stat().st_size < 15_000 and largest < 15_000 and child.returncode == 0
    with pytest.raises(FileExistsError):
        append.create(path)
