"""Memory that a container or a service leaves: known everywhere RAM is asked for; and what follows when the system ends a trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cgroups import Group, memory_group
from tests.person import DOOR, Person
from tests.supervised import journal, starts, supervise_here
from tests.toy import Script, Toy, config, run
from trainerd.contract import runs, wire
from trainerd.contract.paths import Home
from trainerd.engine.fitting import _ram_left
from trainerd.machine import memory
from trainerd.machine.memory import Kills

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's cgroups")
MB, GB = 1_000_000, 1_000_000_000


class Tree:
    """A /proc and a tree of groups as the kernel writes them, in a folder: `limit` and `used` of any level."""

    def __init__(self, root: Path, version: int, own: str, mounted: str = "/") -> None:
        self.proc, self.mount, self.version = root / "proc", root / "with space" / "cgroup", version
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir(parents=True)
        kind = "cgroup2 cgroup2 rw,nsdelegate" if version == 2 else "cgroup cgroup rw,memory"
        lines = [
            "20 1 0:5 / /proc rw - proc proc rw",
            "21 1 0:6 / /sys/fs/cgroup/cpu rw shared:3 - cgroup cgroup rw,cpu",
            f"35 31 0:32 {mounted} {str(self.mount).replace(' ', chr(92) + '040')} rw,relatime shared:9 - {kind}",
        ]
        (self.proc / "self" / "mountinfo").write_text("\n".join(lines) + "\n", "utf-8")
        self.enter("self", own)

    def enter(self, pid: str, own: str) -> None:
        (self.proc / pid).mkdir(exist_ok=True)
        text = f"0::{own}\n" if self.version == 2 else f"7:cpu:/elsewhere\n4:memory:{own}\n0::/init.scope\n"
        (self.proc / pid / "cgroup").write_text(text, "utf-8")

    def group(self, below: str, limit: int | None, used: int, cached: int = 0, kills: int | None = None) -> None:
        folder = self.mount / below
        folder.mkdir(parents=True, exist_ok=True)
        if self.version == 2:
            names, none, stat = ("memory.max", "memory.current", "memory.events"), "max", f"anon 5\ninactive_file {cached}\nactive_file 0\n"
        else:
            names, none = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"), "9223372036854771712"
            stat = f"inactive_file 1\ntotal_inactive_file 0\ntotal_active_file {cached}\n"
        (folder / names[0]).write_text(none if limit is None else str(limit), "ascii")
        (folder / names[1]).write_text(str(used), "ascii")
        (folder / "memory.stat").write_text(stat, "ascii")
        if kills is not None:
            (folder / names[2]).write_text(f"low 0\noom 9\noom_kill {kills}\n", "ascii")


@linux
@pytest.mark.parametrize("version", [1, 2])
def test_every_group_on_the_way_up_counts(version: int, tmp_path: Path) -> None:
    """The tightest limit and the least room of all, caches of files left out; what is unlimited says nothing."""
    from trainerd.machine import _cgroups_linux as cgroups

    tree = Tree(tmp_path, version, "/outer/middle/own")
    tree.group("outer/middle/own", None, 5 * GB)
    tree.group("outer/middle", 4 * GB, 3 * GB, cached=GB)
    tree.group("outer", 8 * GB, 7 * GB)
    tree.group("", None, 9 * GB)
    assert cgroups.limits(proc=tree.proc) == [cgroups.Limit(4 * GB, 2 * GB), cgroups.Limit(8 * GB, 7 * GB)]
    assert not cgroups.is_limited(proc=tree.proc), "its own group has none to leave behind"
    tree.enter("77", "/outer")
    assert cgroups.limits(77, tree.proc) == [cgroups.Limit(8 * GB, 7 * GB)] and cgroups.is_limited(77, tree.proc)
    assert cgroups.limits(99, tree.proc) == cgroups.limits(proc=tree.proc), "one that has ended was where we are"


@linux
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("own", "mounted"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../other", "/")])
def test_a_container_sees_its_own_part_of_the_tree(version: int, own: str, mounted: str, tmp_path: Path) -> None:
    """The mounted folder is its own group, however its path is written."""
    from trainerd.machine import _cgroups_linux as cgroups

    tree = Tree(tmp_path, version, own, mounted)
    tree.group("", 2 * GB, GB, kills=3)
    assert cgroups.limits(proc=tree.proc) == [cgroups.Limit(2 * GB, GB)] and cgroups.kills(tree.proc) == 3


@linux
def test_a_limit_that_slows_down_is_a_limit(tmp_path: Path) -> None:
    """memory.high of version 2: nothing is ended there, but nobody can train beyond it."""
    from trainerd.machine import _cgroups_linux as cgroups

    tree = Tree(tmp_path, 2, "/own")
    tree.group("own", 4 * GB, GB)
    (tree.mount / "own" / "memory.high").write_text(str(3 * GB), "ascii")
    assert cgroups.limits(proc=tree.proc) == [cgroups.Limit(3 * GB, GB)]


@linux
def test_what_is_asked_of_the_machine_is_what_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Total and room are the least of machine and groups; a limit above what there is limits nothing."""
    from trainerd.machine._cgroups_linux import Limit

    machine = psutil.virtual_memory()
    monkeypatch.setattr(memory._cgroups, "limits", lambda pid=None: [Limit(machine.total + 1, machine.total)])
    assert memory.ram().machine_bytes is None and memory.ram().total_bytes == machine.total and memory.ram().limited == ""
    monkeypatch.setattr(memory._cgroups, "limits", lambda pid=None: [Limit(4 * GB, GB), Limit(5 * GB, 3 * GB + GB // 2)])
    facts = memory.ram()
    assert (facts.total_bytes, facts.used_bytes, facts.machine_bytes) == (4 * GB, 4 * GB - GB - GB // 2, machine.total)
    ours = psutil.Process().memory_info().rss
    assert abs(_ram_left(config()) - (3.5 * GB - max(0, facts.used_bytes - ours))) < 0.3 * GB, "the estimate's budget"


@linux
def test_asking_costs_next_to_nothing() -> None:
    """A tenth of a second is what a whole `status` may take; this is looked at once a second."""
    memory.ram()
    began = time.perf_counter()
    for _ in range(50):
        memory.ram()
    assert (time.perf_counter() - began) / 50 < 0.02


_ASK = """
import json
from trainerd.machine.memory import ram
facts = ram()
print(json.dumps([facts.used_bytes, facts.total_bytes, facts.limited]))
"""


@linux
def test_a_real_limit_is_known(tmp_path: Path) -> None:
    """In a group of 700 MB there are 700 MB, `memory profile` says so, and a plan's budget is 87.5 % of it."""
    with memory_group() as group:
        group.limit(700 * MB)
        done = subprocess.run(group.command(sys.executable, "-c", _ASK), capture_output=True, text=True, check=True)
        used, total, words = json.loads(done.stdout)
        assert abs(total - 700 * MB) < 8192 and 0 < used < 100 * MB
        assert words.startswith("limited by a container to 0.7 GB of the machine's ")
        home = tmp_path / "home"
        asked = group.command(sys.executable, str(DOOR), "--home", str(home), "memory", "profile")
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
        assert "limited by a container to 0.7 GB" in shown
        asked = group.command(sys.executable, str(DOOR), "--home", str(home), "plan", "--json")
        plan = json.loads(subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout)
        assert 0 < plan["budget_bytes"] <= 0.875 * 700 * MB


def test_our_own_groups_count_is_believed_before_the_machines() -> None:
    """Another container's victim is not ours; without a count of our own the machine's has to do."""
    assert Kills(5, 1).since(Kills(4, 0)) and not Kills(5, 1).since(Kills(4, 1))
    assert Kills(5).since(Kills(4)) and not Kills(5).since(Kills(5)) and not Kills().since(Kills(1, 1))


@linux
def test_a_trainer_is_not_moved_out_of_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scope of systemd's would be outside of the service whose memory somebody has limited."""
    from trainerd.machine import _linux

    monkeypatch.setattr(_linux, "_user_systemd_answers", lambda: True)
    monkeypatch.setattr(_linux._cgroups_linux, "is_limited", lambda: False)
    assert _linux.wrap(["python"], "idle", "x")[0] == "systemd-run"
    monkeypatch.setattr(_linux._cgroups_linux, "is_limited", lambda: True)
    assert _linux.wrap(["python"], "idle", "x") == ["python"]


# --- the system ends a trainer for want of RAM


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every SIGKILL is the out-of-memory killer's."""
    counted = iter(range(1, 10**6))
    monkeypatch.setattr(memory, "kills", lambda in_our_group=True: Kills(next(counted)))


def _dies(micro_batch: int, at: int) -> dict[str, Any]:
    return {"steps": 12, "at": at, "do": f"signal:{int(signal.SIGKILL)}", "plan": {"micro_batch": micro_batch}}


@linux
@pytest.mark.usefixtures("killer")
def test_after_the_killer_the_next_trainer_takes_half(tmp_path: Path) -> None:
    """As often as there is something to halve, without counting a death: seven times in a row, and the run goes on."""
    home = Home(tmp_path / "home")
    scripts = [_dies(size, at=2) for size in (64, 32, 16, 8, 4, 2)]
    supervisor = supervise_here(home, *scripts, {"steps": 12})
    assert supervisor.result == "completed" and len(starts(home)) == 7
    halved = [event for event in journal(home) if event["kind"] == "smaller"]
    assert [event["micro_batch"] for event in halved] == [32, 16, 8, 4, 2, 1] and "out-of-memory killer" in halved[0]["why"]
    assert runs.read(home, "fake-1").too_large_micro_batch == 2 and "death" not in [event["kind"] for event in journal(home)]


@linux
@pytest.mark.usefixtures("killer")
@pytest.mark.parametrize(("sizes", "words"), [((1,) * 5, "is one sample already"), ((4,) * 6, "of 4 cannot be halved")])
def test_where_nothing_can_be_halved_it_is_a_death_like_any_other(sizes: tuple[int, ...], words: str, tmp_path: Path) -> None:
    """Said, and after five without a checkpoint the run has failed."""
    home = Home(tmp_path / "home")
    supervisor = supervise_here(home, *(_dies(size, at=2) for size in sizes))
    assert supervisor.result == "failed" and any(words in text for text in supervisor.report.status.warnings)
    assert len([event for event in journal(home) if event["kind"] == "death"]) == 5


def _halved(home: Path, micro_batch: int, too_large: int, task: Toy) -> tuple[list[int], Script]:
    link = Script()
    run(home, config({"max_steps": 3, "micro_batch": micro_batch}), link, task, too_large_micro_batch=too_large)
    return [event["micro_batch"] for event in link.of(wire.NOTE) if event["kind"] == "halved"], link


def test_a_trainer_halves_what_the_system_has_ended_it_with(tmp_path: Path) -> None:
    """The plan, since when it is not exact, and an event; a task that cannot be split, a smaller plan and one sample stay."""
    halved, link = _halved(tmp_path / "a", 4, 4, Toy())
    plan, exact = link.of("plan")[-1], link.of("exact")[-1]
    assert halved == [2] and (plan["micro_batch"], plan["grad_accum"], plan["effective_batch"]) == (2, 4, 8)
    assert plan["record"]["micro_batch"] == 2 and exact["since_step"] == 1 and "RAM was full" in exact["because"]

    class Whole(Toy):
        splittable = False

    for number, (task, micro_batch, too_large) in enumerate(((Toy(), 2, 4), (Whole(), 8, 8), (Toy(), 1, 1))):
        halved, link = _halved(tmp_path / str(number), micro_batch, too_large, task)
        assert halved == [] and link.of("exact")[-1]["now"] and link.of("plan")[-1]["micro_batch"] == micro_batch


_HUNGRY = '''
"""Each sample of a micro-batch takes 60 MB more, from step 8 on."""
import torch
from torch import nn
from trainerd.engine.task import Task

class Hungry(Task):

    def model(self):
        return nn.Linear(4, 1)

    def dataset(self, split):
        x = torch.arange(320, dtype=torch.float32).reshape(80, 4) / 320
        return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)) if split == "train" else None

    def counts(self, batch):
        return {"loss": len(batch[1])}

    def loss(self, model, batch, ctx):
        x, y = batch
        if ctx.step >= 8:
            eaten = bytearray(60_000_000 * len(x))
            eaten[::4096] = b"x" * len(eaten[::4096])
        return {"loss": (nn.functional.mse_loss(model(x), y, reduction="sum"), 1.0)}, {}
'''


def _enter(group: Group, person: Person, *words: str) -> subprocess.CompletedProcess[str]:
    command = group.command(sys.executable, str(DOOR), "--home", str(person.home.root), *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=person.environment, check=False)


@linux
def test_a_real_kill_for_want_of_memory_is_survived(tmp_path: Path) -> None:
    """A kernel's limit, a real trainer that outgrows it in one micro-batch: killed, started again with half, and finished, each sample
    once per epoch."""
    source = tmp_path / "hungry.py"
    source.write_text(_HUNGRY, "utf-8")
    person = Person(tmp_path / "home")
    settings = {"train.batch_size": 8, "train.micro_batch": 8, "train.precision": "fp32", "train.threads": 1}
    settings |= {"polite.priority": "normal", "memory.ram_limit": "100%", "checkpoint.every_steps": 5, "checkpoint.exact": "true"}
    asked = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with memory_group() as group:
        group.limit(_bare_trainer_bytes() + 350 * MB)  # eight samples take 480
        done = _enter(group, person, "start", "--task", f"{source}:Hungry", "--epochs", "2", *asked)
        assert done.returncode == 0, done.stdout + done.stderr + person.log()
        person.waits_for_state("completed", "failed", seconds=120)
    assert person.sees().state == "completed", f"{person.sees().reason}\n{person.events()}"
    halved = [event for event in person.events() if event["kind"] == "smaller"]
    assert halved and halved[0]["before"] == 8 and "out-of-memory killer" in halved[0]["why"] and halved[0]["exit_code"] == -signal.SIGKILL
    shown = person.sees().status
    assert shown is not None and shown.plan.micro_batch == 8 // 2 ** len(halved) and shown.plan.effective_batch == 8
    assert shown.exact.now is False and "RAM was full" in str(shown.exact.because)
    assert [step for step, _ in person.steps()] == list(range(1, 21))
    person.waits_until_gone()


def _bare_trainer_bytes() -> int:
    """What a process with torch and the engine holds before it trains."""
    ask = "import torch, psutil; import trainerd.engine.training; torch.nn.Linear(4, 1)(torch.zeros(8, 4)).sum().backward(); "
    ask += "info = psutil.Process().memory_full_info(); print(info.uss)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return int(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=environment).stdout)
