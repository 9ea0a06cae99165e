"""When silence is a hang and when it is not: the arithmetic alone, with a clock that the test moves."""

from __future__ import annotations

import math
import random

import pytest

from trainerd.contract import phases
from trainerd.supervisor.hang import Hang, HangWatch
from trainerd.supervisor.restart import MAX_DEATHS, DeviceWait, Restart, RestartPolicy

DAY = 86_400.0


def training(**faults: object) -> HangWatch:
    """A trainer that has trained for a while, with a sign of life every second."""
    watch = HangWatch(faults)
    watch.heard(phases.TRAINING)
    for _ in range(10):
        watch.tick(1.0)
        watch.heard()
    return watch


def silent_until_hang(watch: HangWatch, seconds: int = 100_000) -> Hang | None:
    return next((hang for hang in (watch.tick(1.0) for _ in range(seconds)) if hang is not None), None)


def test_silence_longer_than_the_limit_is_a_hang() -> None:
    """A minute while training, once steps have been seen; the verdict says phase, silence and limit."""
    assert silent_until_hang(training()) == Hang(phases.TRAINING, 61.0, 60.0)


def test_a_limit_is_five_times_the_slowest_gap_and_never_below_the_floor() -> None:
    """A step of 40 s is allowed 200 s from then on, in this trainer and, through the run's record, in the next."""
    watch = training()
    for _ in range(40):
        assert watch.tick(1.0) is None
    watch.heard()
    assert watch.limit_seconds(phases.TRAINING) == 200.0
    again = HangWatch({}, watch.learned())
    again.heard(phases.TRAINING)
    for _ in range(10):
        again.heard()
    assert again.limit_seconds(phases.TRAINING) == 200.0


def test_the_first_steps_and_the_first_evaluation_have_more_time() -> None:
    """What compiles, loads or was never seen whole is not judged by the floor; a batch of an evaluation says nothing of its end."""
    watch = HangWatch({})
    assert watch.limit_seconds(phases.STARTING) == 600.0
    watch.heard(phases.TRAINING)
    assert watch.limit_seconds(phases.TRAINING) == 600.0
    watch.heard(phases.EVALUATING)
    for _ in range(50):
        watch.tick(1.0)
        watch.heard()
    assert watch.limit_seconds(phases.EVALUATING) == 1800.0
    watch.heard(phases.TRAINING)
    assert watch.limit_seconds(phases.EVALUATING) == 120.0


def test_a_limit_that_was_reached_is_doubled_until_a_checkpoint() -> None:
    """A task that is only slow gets through on a later attempt; after progress the limit is what was learned."""
    watch = training()
    assert silent_until_hang(watch) is not None
    watch.started()
    watch.heard(phases.TRAINING)
    for _ in range(6):
        watch.heard()
    assert watch.limit_seconds(phases.TRAINING) == 120.0
    watch.progressed()
    assert watch.limit_seconds(phases.TRAINING) == 60.0


def test_what_nobody_watched_does_not_count() -> None:
    """A suspended machine, a stopped supervisor, a clock that jumps a day: a gap of more than two ticks counts as one."""
    watch = training()
    for late in (300.0, DAY, -DAY, math.inf, 0.0):
        assert watch.tick(late) is None
    assert watch.silent_seconds == 3.0
    assert watch.tick(1.9) is None and watch.silent_seconds == 4.9, "a tick that is only late counts whole"


def test_a_starved_trainer_is_not_hung_and_one_that_spins_is() -> None:
    """Time it stood in the queue for a processor does not count, in proportion; time it had counts whole."""
    starved, half, spinning = training(), training(), training()
    assert all(starved.tick(1.0, 1.0) is None for _ in range(36_000))
    assert [half.tick(1.0, 0.5) for _ in range(120)] == [None] * 120
    assert half.tick(1.0, 0.5) is not None
    assert silent_until_hang(spinning) is not None


def test_who_waits_for_a_device_may_wait_for_ever() -> None:
    """Another home's training on the same device may take days; afterwards the limits are back, and nothing was learned."""
    watch = HangWatch({})
    watch.heard(phases.WAITING)
    assert all(watch.tick(1.0) is None for _ in range(100_000))
    watch.heard(phases.STARTING)
    assert watch.limit_seconds(phases.STARTING) == 600.0


def test_the_configuration_has_the_last_word() -> None:
    """off is never; a number is the limit everywhere, at once and undoubled; a phase of its own goes before it."""
    assert silent_until_hang(training(hang="off")) is None
    watch = HangWatch({"hang": 5, "hang_limits": {"training": 9, "preparing": None}})
    assert [watch.limit_seconds(phase) for phase in (phases.PREPARING, phases.TRAINING)] == [5.0, 9.0]
    assert silent_until_hang(watch) == Hang(phases.STARTING, 6.0, 5.0)
    assert watch.limit_seconds(phases.STARTING) == 5.0
    assert HangWatch({"hang": "off", "hang_limits": {"training": 9}}).limit_seconds(phases.TRAINING) == math.inf


def test_a_save_that_never_ends_is_a_hang_although_training_goes_on() -> None:
    """It has its own limit: a minute is nothing for a disk, ten are too much for the first; one that ended is learned from."""
    watch = training()

    def save(number: int, seconds: int) -> list[Hang]:
        found = []
        for _ in range(seconds):
            watch.saving(number)
            watch.heard()
            found += [hang for hang in [watch.tick(1.0)] if hang is not None]
        return found

    assert save(1, 100) == []
    watch.saving(None)
    assert watch.limit_seconds(phases.CHECKPOINTING) == 500.0
    assert save(2, 500) == []
    assert save(2, 1) == [Hang(phases.CHECKPOINTING, 501.0, 500.0)]


def test_a_sign_that_was_overtaken_does_not_say_where_it_is() -> None:
    """Events come by two ways: an older one that arrives later is life, but the newer one's phase counts."""
    watch = HangWatch({})
    watch.heard(phases.CHECKPOINTING, at=20.0)
    watch.tick(1.0)
    watch.heard(phases.TRAINING, at=10.0)
    assert (watch.phase, watch.silent_seconds) == (phases.CHECKPOINTING, 0.0)


def test_half_of_the_limit_is_told() -> None:
    """The status says that something may be wrong before anything is done about it."""
    watch = training()
    watch.tick(1.0)
    assert watch.words() == ""
    for _ in range(30):
        watch.tick(1.0)
    assert watch.words() == "No sign of life for 31 s; after 60 s it is started again."


@pytest.mark.parametrize("seed", range(20))
def test_no_run_that_lives_is_ever_taken_for_dead(seed: int) -> None:
    """A day of steps up to four times as slow as any before, suspends, starvation and slow saves in between: no false alarm."""
    chance = random.Random(seed)
    watch = HangWatch({})
    watch.heard(phases.TRAINING)
    slowest_seconds = chance.uniform(0.01, 5.0)
    for _ in range(1000):
        seconds = slowest_seconds * chance.uniform(0.2, 1.0)
        if chance.random() < 0.005:
            seconds = slowest_seconds = min(slowest_seconds * chance.uniform(1.0, 4.0), 150.0)
        while seconds > 0:
            if chance.random() < 0.02:
                assert watch.tick(chance.choice([60.0, 3600.0, DAY])) is None
            if chance.random() < 0.02:
                assert watch.tick(1.0, 1.0) is None
            assert watch.tick(min(1.0, seconds)) is None, (slowest_seconds, watch.limit_seconds(watch.phase))
            seconds -= 1.0
        watch.heard()
        if chance.random() < 0.05:
            watch.heard(phases.CHECKPOINTING)
            assert all(watch.tick(1.0) is None for _ in range(60))
            watch.heard(phases.TRAINING)


def test_a_crash_an_hour_never_exhausts_the_budget() -> None:
    """A month with one crash an hour and a checkpoint every five minutes: always restarted, at once."""
    policy = RestartPolicy()
    step = 0
    policy.started(None)
    for _ in range(30 * 24):
        for _ in range(12):
            step += 50
            policy.acknowledged(step)
        assert policy.died([step - 50, step]) == Restart(0.0)
        policy.started(step)


def test_a_device_that_is_gone_is_looked_for_for_ever() -> None:
    """10, 20, 40 … 300 s; nothing of it counts as a death, however often; a checkpoint begins anew."""
    wait = DeviceWait()
    delays = [wait.lost(at_work=False) for _ in range(5000)]
    assert delays[:6] == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0] and set(delays[5:]) == {300.0}
    wait.acknowledged()
    assert wait.lost(at_work=True) == 10.0


def test_a_device_lost_at_work_again_and_again_counts() -> None:
    """Back each time and lost each time before anything was saved: that is what the training does to it, and the budget ends it."""
    wait, policy = DeviceWait(), RestartPolicy()
    assert wait.lost(at_work=True) == 10.0
    assert wait.lost(at_work=False) == 20.0
    ends = [policy.died([]) if wait.lost(at_work=True) is None else Restart(0.0) for _ in range(MAX_DEATHS)]
    assert ends[-1] is None and None not in ends[:-1]
    wait.acknowledged()
    assert wait.lost(at_work=True) is not None
