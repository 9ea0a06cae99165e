"""What follows a death, why it happened, and what the trainer's words do to the status: the supervisor's pure parts."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from trainerd.contract import status, wire
from trainerd.contract.status import Phase, Status
from trainerd.machine import memory
from trainerd.memory.limits import resolve_limit
from trainerd.supervisor import death, events, opening, report
from trainerd.supervisor.restart import MAX_DEATHS, Restart, RestartPolicy
from trainerd.supervisor.trainer import decode_newest, parse_command


def test_after_progress_a_dead_trainer_is_restarted_at_once() -> None:
    """However often it dies, a trainer that saves something new each time is never given up and never waited for."""
    policy = RestartPolicy()
    for step in range(10, 1000, 10):
        policy.started(step - 10)
        policy.acknowledged(step)
        assert policy.died([step]) == Restart(0.0)


def test_deaths_without_progress_back_off_then_fall_back_once_then_end() -> None:
    """0, 1, 2, 4 s; then the checkpoint before the newest, once; then the run has failed."""
    policy, committed = RestartPolicy(), [50, 100]
    policy.started(100)
    delays = [policy.died(committed) for _ in range(MAX_DEATHS - 1)]
    assert delays == [Restart(0.0), Restart(1.0), Restart(2.0), Restart(4.0)]
    assert policy.died(committed) == Restart(8.0, before_step=100)
    policy.started(50)
    assert policy.died(committed) is None


def test_without_an_earlier_checkpoint_there_is_nothing_to_fall_back_to() -> None:
    """A trainer that never gets anywhere fails after five deaths; it never starts over silently."""
    for committed in ([], [100]):
        policy = RestartPolicy()
        policy.started(committed[-1] if committed else None)
        assert [policy.died(committed) is None for _ in range(MAX_DEATHS)] == [False] * 4 + [True]


def test_a_fallback_is_spent_until_the_run_gets_beyond_where_it_fell_back_from() -> None:
    """A poisoned stretch of training ends the run instead of being gone through for ever."""
    policy = RestartPolicy()
    policy.started(100)
    for _ in range(MAX_DEATHS):
        last = policy.died([50, 100])
    assert last == Restart(8.0, before_step=100)
    policy.started(50)
    policy.acknowledged(100)  # as far as before, no further
    assert policy.died([50, 100]) is None
    policy.acknowledged(150)
    assert [policy.died([100, 150]) for _ in range(MAX_DEATHS)] == [*map(Restart, (0.0, 1.0, 2.0, 4.0)), Restart(8.0, before_step=150)]


def test_the_delay_is_never_more_than_five_minutes() -> None:
    """The back-off has a ceiling, whatever it begins with."""
    policy = RestartPolicy(backoff_seconds=200.0)
    assert [policy.died([]) for _ in range(4)] == [Restart(0.0), Restart(200.0), Restart(300.0), Restart(300.0)]


@pytest.mark.parametrize("again", [5, 50])
def test_saving_the_same_step_again_is_no_progress(again: int) -> None:
    """A checkpoint at or before where the trainer began does not reset the count."""
    policy = RestartPolicy()
    policy.started(50)
    policy.died([50])
    policy.acknowledged(again)
    assert policy.deaths == 1


TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n'


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("code", "log", "words"),
    [
        (-signal.SIGSEGV.value, "", "segmentation fault"),
        (-signal.SIGKILL.value, "", "killed it (SIGKILL)"),
        (128 + signal.SIGBUS.value, "", "bus error"),
        (-signal.SIGABRT.value, "Fatal Python error: Aborted\n", "an abort in native code: Fatal Python error: Aborted"),
        (-signal.SIGABRT.value, "terminate called after …\n  what():  CUDA error: unknown error\n", "nvidia_uvm"),
        (1, TRACEBACK + "ValueError: the labels are strings\n", "ValueError: the labels are strings"),
        (1, TRACEBACK + "my.pkg.BadThing: x\nmy.pkg.OtherError: y\n some noise\n", "my.pkg.OtherError: y"),
        (1, TRACEBACK + "RuntimeError: CUDA error: device-side assert triggered\nCompile with …\n", "label or token outside"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n", "the GPU's memory was full"),
        (1, "nothing to see\n", "failed without a word"),
        (0, "", "ended without having finished"),
        (wire.EXIT_LEFT, "", "asked it to leave"),
    ],
)
def test_a_death_is_explained_in_words(code: int, log: str, words: str) -> None:
    """Signal, CUDA error, exception: what ends up in `reason` tells a person what happened."""
    assert words in death.explain(code, None, log).words


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_out_of_memory_killer_is_named(tmp_path: Path) -> None:
    """SIGKILL with a new entry in the kernel's count is the out-of-memory killer, and the remedy is named."""
    found = death.explain(-signal.SIGKILL, None, "", out_of_memory_killed=True)
    assert "out-of-memory killer" in found.words and found.no_memory
    assert not death.explain(-signal.SIGSEGV, None, "", out_of_memory_killed=True).no_memory, "somebody else was killed"
    (tmp_path / "vmstat").write_text("pgfault 1\noom_kill 7\n", encoding="ascii")
    assert memory.kills(vmstat=tmp_path / "vmstat").machine == 7
    assert memory.kills(vmstat=tmp_path / "none").machine is None


def test_windows_codes_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """NTSTATUS numbers come as signed or unsigned; both are put in words."""
    monkeypatch.setattr(death.sys, "platform", "win32")
    assert "access violation" in death.explain(0xC0000005, None, "").words
    assert "console was closed" in death.explain(0xC000013A - 2**32, None, "").words
    assert "ValueError: x" in death.explain(1, None, "ValueError: x\n").words
    assert "taskkill" in death.explain(1, None, "").words
    assert death.explain(0xC0000017, None, "").no_memory and not death.explain(0xC0000005, None, "").no_memory


def test_the_trainers_own_words_count_most_and_decide_what_is_permanent() -> None:
    """An EXCEPTION event is the reason; `permanent`, or the exit codes for it, mean that no restart can help."""
    told = death.explain(-9, {"type": "KeyError", "text": "'loss'", "permanent": False}, "ValueError: other\n")
    assert told == death.Death("KeyError: 'loss'")
    assert death.explain(1, {"type": "ConfigError", "text": "bad", "permanent": True}, "").permanent
    assert death.explain(wire.EXIT_PERMANENT, None, "ConfigError: bad\n") == death.Death("ConfigError: bad", permanent=True)
    assert death.explain(wire.EXIT_NO_CHECKPOINT, {"type": "NoGoodCheckpoint", "text": "none is good"}, "").permanent
    assert len(death.explain(1, {"type": "E", "text": "x" * 5000}, "").words) <= 300


def test_a_number_json_cannot_say_is_unknown() -> None:
    """A loss that is not a number must not make the whole status unwritable."""
    shown = Status()
    message = {"event": "progress", "step": 3, "loss": float("nan"), "eval": {"a": float("inf"), "b": 1.0}, "epoch": "two", "lr": 1}
    events.apply(shown, message)
    got = shown.progress
    assert (got.step, got.loss, got.eval, got.epoch, got.lr) == (3, None, {"b": 1.0}, None, 1)
    json.dumps(shown.to_dict(), allow_nan=False)


def test_events_fill_their_part_of_the_status() -> None:
    """Phase, data, plan, memory and checkpoint events arrive where readers look for them, and a reader accepts the result."""
    shown = Status()
    told: list[dict[str, Any]] = [
        {"event": "phase", "at": 5.0, "name": "preparing", "done": 1, "total": 10, "unit": "rows"},
        {"event": "phase", "at": 6.0, "name": "preparing", "done": 2},
        {"event": "data", "rows": 10, "used": 8, "dropped": {"blank": 2}},
        {"event": "plan", "device": "cpu", "threads": 1, "record": {"x": 1}},
        {"event": "memory", "vram_allocated_bytes": 7, "cleanups": 2, "oom_recoveries": None},
        {"event": "exact", "now": False, "since_step": 9, "because": "a thread less"},
        {"event": "checkpoint", "path": "checkpoints/r/c.pt", "epoch": 1, "step": 9, "at": 7.0, "bytes": 3, "seconds": 0.1},
        {"event": "unheard-of", "state": "completed"},
        {"no": "event"},
    ]
    for message in told:
        events.apply(shown, message)
    again = status.from_dict(json.loads(json.dumps(shown.to_dict())))
    assert again.phase is not None and again.checkpoint is not None
    assert (again.phase.done, again.phase.total, again.phase.started_at) == (2, 10, 5.0)
    assert (again.data.dropped, again.plan.threads, again.memory.vram.allocated_bytes) == ({"blank": 2}, 1, 7)
    assert (again.memory.cleanups, again.memory.oom_recoveries, again.exact.since_step, again.checkpoint.step) == (2, 0, 9, 9)
    assert again.state == status.STARTING


def test_superseded_progress_is_skipped_and_order_is_kept() -> None:
    """Of many progress lines only the newest is decoded; everything else arrives, in order."""
    sent: list[dict[str, Any]] = [{"event": "progress", "step": n} for n in range(100)]
    sent += [{"event": "phase", "name": "training"}, {"event": "progress", "step": 7}]
    lines = [wire.encode(m).rstrip(b"\n") for m in sent] + [b"a stray print", b"[1]"]
    assert decode_newest(lines) == sent[-2:]


def test_the_reason_says_what_is_done_and_what_is_at_stake(monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` can say how much would be computed again if everything were killed now."""
    monkeypatch.setattr(report.clock, "wall", lambda: 1000.0)
    shown = Status()
    assert report.doing(shown) == "Starting the trainer."
    events.apply(shown, {"event": "phase", "name": "preparing", "done": 1200, "total": 5000, "unit": "rows"})
    assert report.doing(shown) == "Preparing the data: 1,200 of 5,000 rows."
    shown.trainer.started_at = 700.0
    events.apply(shown, {"event": "phase", "name": "training"})
    events.apply(shown, {"event": "progress", "step": 40, "epoch": 2, "epochs": 3})
    assert report.doing(shown) == "Training epoch 2 of 3. 40 steps (5 min) since the last checkpoint."
    events.apply(shown, {"event": "checkpoint", "path": "c", "epoch": 2, "step": 40, "at": 990.0})
    assert report.doing(shown) == "Training epoch 2 of 3."


def test_limits() -> None:
    """auto leaves an eighth for the person; no limit is more than there is."""
    assert resolve_limit("auto", 16_000_000_000) == 14_000_000_000
    assert resolve_limit(" 80 %", 1000) == 800
    assert resolve_limit("3.5GB", 4 << 30) == 3_500_000_000
    assert resolve_limit("14GB", 8_000_000_000) == 8_000_000_000
    for bad in ("0%", "101%", "much", "-1GB"):
        with pytest.raises(ValueError, match=r"%|size"):
            resolve_limit(bad, 1000)


def test_config_yml_reads_back_as_it_was() -> None:
    """config.yml is for people, and is the same configuration."""
    from trainerd.config import yaml12

    train = {"lr": 1e-05, "off": True, "name": "no", "list": [1, "x"]}
    config = {"task": "a:B", "null": None, "train": train, "settings": {}, "1 odd: key": "#"}
    assert yaml12.parse(opening.to_yaml(config), "test") == config


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '"python"'])
def test_a_trainer_command_is_a_list_of_words(text: str) -> None:
    """The tests' own option is checked too."""
    with pytest.raises(ValueError, match=r"."):
        parse_command(text)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("CUDA error: unknown error", True),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", True),
        ("CUDA error: the launch timed out and was terminated", True),
        ("CUDA error: no CUDA-capable device is detected", True),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", True),
        ("No CUDA GPUs are available", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", False),
        ("unknown error in the labels", False),
    ],
)
def test_a_lost_device_is_told_from_a_mistake_on_it(text: str, lost: bool) -> None:
    """Only what comes back by itself, or by the person's hand, is waited for; an index out of range never is."""
    told = {"type": "AcceleratorError", "text": text, "permanent": False}
    assert death.explain(1, told, "").device_lost == lost
    if "CUDA" in text:  # without an event: aborted by a library, the log's last words
        assert death.explain(1, None, f"{TRACEBACK}RuntimeError: {text}\n").device_lost == lost
    assert death.explain(1, {"type": "DeviceLost", "text": "no such device answers now", "permanent": False}, "").device_lost
    assert not death.explain(1, {**told, "permanent": True}, "").device_lost


def test_a_state_and_its_sentence_do_not_contradict_each_other() -> None:
    """Starting says that it starts the trainer; running, before the first phase, that the model is built."""
    found = Status(phase=Phase("starting"))
    assert report.doing(found) == "Starting the trainer."
    found.state = status.RUNNING
    assert report.doing(found) == "Building the model."
    found.phase = Phase("preparing", 10, 20, "rows")
    assert report.doing(found) == "Preparing the data: 10 of 20 rows."
