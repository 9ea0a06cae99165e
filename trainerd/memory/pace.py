"""How long a step takes, to compare setups of one training with one another. Must not be shown as it is: for a person it is too rough.

Products; for each piece of the batch passing over the weights and their gradients, and starting operations, which is what small
pieces pay for; what goes over the bus; and the optimizer's own step, where its states lie. By the machine's profile, where measured.
The estimate makes a range of the last two.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainerd.memory import zero2
from trainerd.memory.profile import Profile
from trainerd.memory.timeline import Setup, Timeline

# Where nothing was measured: a laptop's processor, and a small GPU.
_GIGAFLOPS = {"cpu": {"fp32": 60.0, "bf16": 90.0, "fp16": 5.0}, "cuda": {"fp32": 4e3, "bf16": 1.6e4, "fp16": 1.6e4}}
_EFFICIENCY = 0.4
_RAM_BYTES_PER_SECOND = 1e10
# Nominal for an RTX 3050 of a laptop: GDDR6 of 128 bits at 12 Gbit/s each, 192 GB/s (NVIDIA); four fifths of that are usually seen.
DEVICE_BYTES_PER_SECOND = 0.8 * 192e9
_BUS_BYTES_PER_SECOND = 6e9
_OPERATION_SECONDS = {"cpu": 2.5e-5, "cuda": 1.2e-5}
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
    gigaflops = profile.gigaflops.get(setup.precision) or _GIGAFLOPS[setup.device][setup.precision]
    products = timeline.flops / (gigaflops * 1e9 * _EFFICIENCY)
    passing = timeline.num_trainable * _WEIGHT_BYTES * _WEIGHT_PASSES / speed.device
    starting = timeline.operations * _OPERATION_SECONDS[setup.device] * (_WATCHED if setup.checkpointing == "selective" else 1)
    moving = over_the_bus(timeline, setup, speed) + updating(timeline, setup, speed)
    return products + setup.accumulation * (passing + starting) + moving
