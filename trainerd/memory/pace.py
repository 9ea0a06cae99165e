"""How long a step takes: products, going through memory, starting operations, the bus, the optimizer. By the machine's profile, where it
was measured.

Plans are compared by seconds(), nothing of it beside anything else; a person is shown shown(), a range, and only of a machine that was
measured. Held against real steps on a CPU (docs/log.md: python -m benchmarks.memory.pace). Must not measure.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainerd.memory import zero2
from trainerd.memory.profile import Profile
from trainerd.memory.timeline import Setup, Timeline

# Where nothing was measured: a laptop's processor, and a small GPU.
_GIGAFLOPS = {"cpu": {"fp32": 60.0, "bf16": 90.0, "fp16": 5.0}, "cuda": {"fp32": 4e3, "bf16": 1.6e4, "fp16": 1.6e4}}
_EFFICIENCY = {"cpu": 0.85, "cuda": 0.4}  # of the measured speed of large products
# How many times what is made goes through memory, by the measured speed of a large tensor that is written over. On a CPU with what comes of
# making it: fresh pages, which the system clears, and kernels that compute more than they move.
_MADE_PASSES = {"cpu": 15, "cuda": 3}
_SLOWER = {"cpu": 2.5, "cuda": 4.0}  # than likely: the bound
_RAM_BYTES_PER_SECOND = 2e10
# Nominal for an RTX 3050 of a laptop: GDDR6 of 128 bits at 12 Gbit/s each, 192 GB/s (NVIDIA); four fifths of that are usually seen.
DEVICE_BYTES_PER_SECOND = 0.8 * 192e9
_BUS_BYTES_PER_SECOND = 6e9
_OPERATION_SECONDS = {"cpu": 1.5e-5, "cuda": 1.2e-5}
_WATCHED = 2  # under selective checkpointing Python looks at each operation, which costs as much as a small one (docs/log.md)
_WEIGHT_BYTES = 4
_WEIGHT_PASSES = 4  # read on both ways; its gradient is read and written
_UPDATE_PASSES = 3  # an optimizer reads the weight and its gradient, and writes the weight
_SUM_PASSES = 3
_STATE_PASSES = 2
_BUFFER_PASSES = 4  # DeepSpeed scales the gradients where they lie, and writes the weights into a buffer first
_ON_HOST = ("optimizer", zero2.NAME)
_THERE_AND_BACK = 2  # a streamed block comes for the way there, and once more for the way back


@dataclass(frozen=True)
class Speeds:
    """Bytes per second: through the device's own memory and the computer's, and over the bus."""

    device: float
    ram: float
    there: float
    back: float


def speeds(profile: Profile, device: str) -> Speeds:
    """As measured, else assumed. Where the device is the CPU there is no bus: a copy is read and written."""
    ram = profile.ram_bytes_per_second or _RAM_BYTES_PER_SECOND
    if device == "cpu":
        return Speeds(ram, ram, ram / 2, ram / 2)
    there = profile.to_device_bytes_per_second or _BUS_BYTES_PER_SECOND
    back = profile.from_device_bytes_per_second or _BUS_BYTES_PER_SECOND
    return Speeds(profile.device_bytes_per_second or DEVICE_BYTES_PER_SECOND, ram, there, back)


def over_the_bus(timeline: Timeline, setup: Setup, speed: Speeds) -> float:
    """Seconds of one step; while something else is computed, at best: a base that is streamed, gradients on their way to the CPU."""
    weights = timeline.num_trainable * _WEIGHT_BYTES
    leaving = weights / speed.back if setup.offload in _ON_HOST else 0.0
    if setup.offload == zero2.NAME and setup.accumulation > 1:
        leaving += weights / speed.there  # sums come to the GPU, are added to there, and go again
    return setup.accumulation * (leaving + _THERE_AND_BACK * timeline.streamed_bytes / speed.there)


def updating(timeline: Timeline, setup: Setup, speed: Speeds) -> float:
    """Seconds of one step for the optimizer, in the memory its states lie in. On the CPU gradients of several pieces are added up
    first, and the weights go back afterwards: nothing computes meanwhile."""
    weights = timeline.num_trainable * _WEIGHT_BYTES
    passing = _UPDATE_PASSES * weights + _STATE_PASSES * timeline.state_bytes
    if setup.offload not in _ON_HOST:
        return passing / speed.device
    sums = (setup.accumulation - 1) * _SUM_PASSES if setup.offload != zero2.NAME else _BUFFER_PASSES
    return (passing + sums * weights) / speed.ram + weights / speed.there


def seconds(timeline: Timeline, setup: Setup, profile: Profile) -> float:
    """Of one step, nothing of it beside anything else."""
    speed = speeds(profile, setup.device)
    return computing(timeline, setup, profile, speed) + over_the_bus(timeline, setup, speed) + updating(timeline, setup, speed)


def computing(timeline: Timeline, setup: Setup, profile: Profile, speed: Speeds) -> float:
    """Seconds of one step for the model, both ways: each piece of the batch makes its results, and passes over the weights and their
    gradients."""
    gigaflops = profile.gigaflops.get(setup.precision) or _GIGAFLOPS[setup.device][setup.precision]
    products = timeline.flops / (gigaflops * 1e9 * _EFFICIENCY[setup.device])
    weights = timeline.num_trainable * _WEIGHT_BYTES
    made = max(0.0, timeline.made_bytes - weights)  # without the gradients, which are passed over with the weights
    passing = (weights * _WEIGHT_PASSES + timeline.reread_bytes + made * _MADE_PASSES[setup.device]) / speed.device
    starting = timeline.operations * _OPERATION_SECONDS[setup.device] * (_WATCHED if setup.checkpointing == "selective" else 1)
    return products + setup.accumulation * (passing + starting)


def shown(timeline: Timeline, setup: Setup, profile: Profile) -> tuple[float, float] | None:
    """Of one step, likely and at most; None where the speed of products is not known."""
    if not profile.gigaflops.get(setup.precision):
        return None
    speed = speeds(profile, setup.device)
    computed, moving = computing(timeline, setup, profile, speed), over_the_bus(timeline, setup, speed)
    # What goes over the bus does so while something else is computed, at best.
    updated = updating(timeline, setup, speed)
    return max(computed, moving) + updated, (computed + moving + updated) * _SLOWER[setup.device]
