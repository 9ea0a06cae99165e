"""How long a step takes, to compare setups of one training with one another. Must not be shown: for a person it is too rough.

Products; for each piece of the batch passing over the weights and their gradients, and starting operations, which is what small
pieces pay for; and what goes over the bus when the optimizer is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainerd.memory.timeline import Setup, Timeline

# Where nothing was measured: a laptop's processor, and a small GPU.
_GIGAFLOPS = {"cpu": {"fp32": 60.0, "bf16": 90.0, "fp16": 5.0}, "cuda": {"fp32": 4e3, "bf16": 1.6e4, "fp16": 1.6e4}}
_EFFICIENCY = 0.4
_BYTES_PER_SECOND = {"cpu": 1e10, "cuda": 1.8e11}
_OPERATION_SECONDS = {"cpu": 2.5e-5, "cuda": 1.2e-5}
_WATCHED = 2  # under selective checkpointing Python looks at each operation, which costs as much as a small one (docs/log.md)
_WEIGHT_PASSES = 4  # read on both ways; its gradient is read and written
_BUS_BYTES_PER_SECOND = 6e9
_AWAY_BYTES = 24  # a weight's gradient there, itself back, and the optimizer's step on the CPU
_THERE_AND_BACK = 2  # a streamed block comes for the way there, and once more for the way back


def seconds(timeline: Timeline, setup: Setup, measured_gigaflops: Mapping[str, float]) -> float:
    """Of one step."""
    speed = measured_gigaflops.get(setup.precision) or _GIGAFLOPS[setup.device][setup.precision]
    products = timeline.flops / (speed * 1e9 * _EFFICIENCY)
    passing = timeline.num_trainable * 4 * _WEIGHT_PASSES / _BYTES_PER_SECOND[setup.device]
    starting = timeline.operations * _OPERATION_SECONDS[setup.device] * (_WATCHED if setup.checkpointing == "selective" else 1)
    moved = timeline.num_trainable * _AWAY_BYTES if setup.offload == "optimizer" else _THERE_AND_BACK * timeline.streamed_bytes
    away = moved / _BUS_BYTES_PER_SECOND
    return products + setup.accumulation * (passing + starting + away)
