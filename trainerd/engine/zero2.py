"""DeepSpeed's ZeRO-2 with the optimizer on the CPU: its engine owns the way back and the step, ours everything around them.

A state has the form it has without: each weight's own part of DeepSpeed's flat partitions; the masters are the weights, to the bit.
Must not save: state.py does. What DeepSpeed has begun of a step can be taken out of it again, by the names of one version's parts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainerd.config import deepspeed as configuration
from trainerd.contract.errors import ConfigError, TrainerdError, UsageError
from trainerd.engine import optimizers
from trainerd.engine.precision import Precision
from trainerd.engine.task import Task
from trainerd.engine.updates import Updates, version

More = TypeVar("More")
_NO_STEP = -1  # what DeepSpeed's micro_step_id is between two steps
_SHOWN = 8


@dataclass(frozen=True)
class _Place:
    """Where a weight lies in the flat partition of its group."""

    weight: nn.Parameter
    begin: int
    end: int


class _Whole(nn.Module):
    """What DeepSpeed takes for the model: the weights that learn, and a forward that computes whatever it is given."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class Zero2(Updates):
    """One DeepSpeed engine over the trainable weights of a model. `close()` leaves the weights to themselves."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        document: dict[str, Any],
        leaves_out: bool = False,
    ) -> None:
        """`optimizer`: torch's own over the weights; it is made one over DeepSpeed's partitions. `document`: the ds_config.json.
        Raises ConfigError where DeepSpeed cannot keep what is promised, and TrainerdError when it does not do what it was asked."""
        self._weights = [p for group in optimizer.param_groups for p in group["params"]]
        _refuse(model, task, self._weights)
        self._engine = _initialised(self._weights, optimizer, document)
        self._zero = self._engine.optimizer
        _refuse_inactive(self._engine, optimizer, document)
        super().__init__(model, task, optimizer, precision, document["gradient_clipping"], leaves_out)
        self._places = [_places(self._zero, group) for group in self._zero.bit16_groups]
        _allocate_state(optimizer)
        optimizer.register_state_dict_post_hook(self._spread)
        optimizer.register_load_state_dict_pre_hook(self._gathered)
        optimizer.register_load_state_dict_post_hook(self._loaded)
        optimizer.register_step_post_hook(self._stepped)
        self._has_stepped = False
        self._groups = optimizer.param_groups
        self._arrived: set[int] = set()
        self._hooks = [w.register_post_accumulate_grad_hook(self._arrive) for w in self._weights]
        self._seen = self._weights_versions()

    def forward(self, compute: Callable[[], tuple[Tensor, More]]) -> tuple[Tensor, More]:
        beside: list[More] = []

        def loss() -> Tensor:
            total, more = compute()
            beside.append(more)
            return total

        return self._engine(loss), beside[0]

    def backward(self, total: Tensor, last: bool) -> None:
        scaler = self._precision.scaler
        if scaler is not None:
            self._zero.override_loss_scale(scaler.get_scale())
        self._engine.set_gradient_accumulation_boundary(last)
        self._arrived.clear()
        self._engine.backward(total, scale_wrt_gas=False)  # the loss is a part of the whole window's already
        self._refuse_missing()

    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, bool]:
        """DeepSpeed's own: unscale, norm, clip, step. It leaves a step out by itself whose gradient is no finite number."""
        if self._leaves_out and self._precision.scaler is None and not bool(torch.isfinite(loss)):
            self.forget()
            return torch.tensor(float("nan")), False
        if self._weights_versions() != self._seen:
            self._zero.refresh_fp32_params()  # somebody else has changed weights: a checkpoint put back, a task that clips its own
        optimizers.set_lr(self._optimizer, lr)
        self._has_stepped = False
        self._versions = version(self._trainable, self._optimizer)
        self._engine.step()
        self._seen = self._weights_versions()
        overflow = bool(self._zero.overflow)
        self._scale(overflow)
        left_out = overflow and self._leaves_out and self._precision.scaler is None
        norm = torch.tensor(float(self._engine.get_global_grad_norm()))
        self._versions = None  # only now: what fails until here must not be tried again
        return norm, not left_out

    def forget(self) -> None:
        """Whatever DeepSpeed has begun: gradients on their way and half added up, its counters, its place in a backward pass."""
        zero = self._zero
        zero.zero_grad()
        for bucket in zero.ipg_buckets.values():
            bucket.clear()
        zero.extra_large_param_to_reduce.clear()
        zero._release_ipg_buffers()
        zero.params_already_reduced[:] = [False] * len(zero.params_already_reduced)
        zero.micro_step_id = _NO_STEP
        zero._offload_accumulated_param_ids.clear()
        zero.reset_cpu_buffers()
        zero._backward_active_depth = 0
        zero._remaining_grad_acc_hooks = 0
        zero.clear_backward_seen_flag()
        zero.overflow = False
        self._engine._running_engine_step = False
        self._optimizer.param_groups = self._groups  # it steps one group at a time, and does not put the others back after an error
        self._versions = None

    def is_half_done(self) -> bool:
        """A group at a time is stepped, and its weights copied back: from the first one on only a checkpoint helps."""
        return self._versions is not None and (self._has_stepped or super().is_half_done())

    def close(self) -> None:
        """Nothing of DeepSpeed is called any more when the weights are used."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()

    def _stepped(self, *_: Any) -> None:
        self._has_stepped = True

    def _arrive(self, weight: Tensor) -> None:
        self._arrived.add(id(weight))

    def _refuse_missing(self) -> None:
        """DeepSpeed steps with an old gradient where none comes in the last micro-batch, and loses one that came before."""
        if len(self._arrived) == len(self._weights):
            return
        names = {id(p): name for name, p in self._model.named_parameters()}
        missing = [names.get(id(p), "a weight that is not in the model") for p in self._weights if id(p) not in self._arrived]
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise UsageError(
            f"After a backward pass {len(missing)} of {len(self._weights)} trainable weights have no gradient: {shown}.",
            "With memory.offload=zero2 each needs one in every micro-batch: DeepSpeed steps with an old one otherwise. Let loss() use "
            "them, freeze them with requires_grad_(False), or set memory.offload=optimizer.",
        )

    def _scale(self, overflow: bool) -> None:
        """fp16's scale after a step, as torch's scaler makes it: halved after an overflow, doubled after many steps without."""
        scaler = self._precision.scaler
        if scaler is None:
            return
        state = scaler.state_dict()
        tracker = 0 if overflow else state["_growth_tracker"] + 1
        if overflow:
            state["scale"] *= state["backoff_factor"]
        elif tracker == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            tracker = 0
        scaler.load_state_dict({**state, "_growth_tracker": tracker})

    def _weights_versions(self) -> int:
        return sum(int(w._version) for w in self._weights)

    def _spread(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """DeepSpeed's flat state, a part for each weight: as torch's optimizer has it without."""
        spread: dict[int, dict[str, Any]] = {}
        groups = []
        for places, group in zip(self._places, state["param_groups"], strict=True):
            flat = state["state"].get(group["params"][0], {})
            first = len(spread)
            for place in places:
                spread[len(spread)] = {name: _part(value, place) for name, value in flat.items()}
            groups.append({**group, "params": list(range(first, len(spread)))})
        return {**state, "state": spread, "param_groups": groups}

    def _gathered(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The other way: the weights' states one behind the other. Raises TrainerdError when they cannot be one."""
        groups = state["param_groups"]
        if [len(group["params"]) for group in groups] != [len(places) for places in self._places]:
            raise TrainerdError("The checkpoint's optimizer has other groups of weights.", "Begin a new run with --no-resume.")
        gathered: dict[int, dict[str, Any]] = {}
        for number, (places, group) in enumerate(zip(self._places, groups, strict=True)):
            parts = [state["state"].get(index, {}) for index in group["params"]]
            master = self._groups[number]["params"][0]
            gathered[number] = {name: _whole(name, [part[name] for part in parts], places, master) for name in parts[0]}
        return {**state, "state": gathered, "param_groups": [{**group, "params": [number]} for number, group in enumerate(groups)]}

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = optimizer.param_groups
        self._zero.refresh_fp32_params()
        self._seen = self._weights_versions()


def make(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    document: dict[str, Any],
    leaves_out: bool,
) -> Zero2:
    """Zero2, where the package is there and knows how. Raises ConfigError when not."""
    problem = configuration.missing(_installed())
    if problem is not None:
        raise ConfigError([problem])
    return Zero2(model, task, optimizer, precision, document, leaves_out)


def _installed() -> str | None:
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def _refuse(model: nn.Module, task: Task, weights: list[nn.Parameter]) -> None:
    """What DeepSpeed would do wrong without a word."""
    said = "memory.offload = zero2: "
    if task.sometimes_unused:
        unused = f"the task says that some batches do not use {', '.join(task.sometimes_unused)}"
        raise ConfigError(
            [f"{said}{unused}, and DeepSpeed steps such a weight with its last gradient once more."], "Set memory.offload=optimizer."
        )
    names = {id(p): name for name, p in model.named_parameters()}
    other = [f"{names.get(id(w), 'a weight')} ({w.dtype})" for w in weights if w.dtype != torch.float32]
    if other:
        raise ConfigError([f"{said}weights that learn must be float32, and these are not: {', '.join(other[:_SHOWN])}."])


def _initialised(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, document: dict[str, Any]) -> Any:
    """DeepSpeed's engine over these weights, in a world of one process."""
    with _quiet(), _alone():
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as compiled

        # Copies between processes, of which there is one: it would be compiled for a minute before the first step.
        compiled["deepspeed_shm_comm"] = False
        if not torch.distributed.is_initialized():
            backend = "nccl" if weights[0].device.type == "cuda" else "gloo"
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        engine, *_ = deepspeed.initialize(model=_Whole(weights), optimizer=optimizer, config=document, dist_init_required=False)
    return engine


def _refuse_inactive(engine: Any, optimizer: torch.optim.Optimizer, document: dict[str, Any]) -> None:
    """Raise TrainerdError when DeepSpeed does something else than it was asked."""
    zero = engine.optimizer
    found = {
        "its optimizer": type(zero).__name__,
        "ZeRO's stage": engine.zero_optimization_stage(),
        "gradients in partitions": getattr(zero, "partition_gradients", None),
        "the optimizer on the CPU": getattr(zero, "cpu_offload", None),
        "torch's optimizer inside": getattr(zero, "optimizer", None) is optimizer,
        "the masters' device and type": [(p.device.type, str(p.dtype)) for group in optimizer.param_groups for p in group["params"]],
        "clipping": engine.gradient_clipping(),
        "processes": torch.distributed.get_world_size(),
    }
    wanted = {
        "its optimizer": "DeepSpeedZeroOptimizer",
        "ZeRO's stage": document["zero_optimization"]["stage"],
        "gradients in partitions": True,
        "the optimizer on the CPU": True,
        "torch's optimizer inside": True,
        "the masters' device and type": [("cpu", "torch.float32")] * len(optimizer.param_groups),
        "clipping": document["gradient_clipping"],
        "processes": 1,
    }
    wrong = [f"{name}: {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if wrong:
        raise TrainerdError(
            f"DeepSpeed was asked for ZeRO-2 with its optimizer on the CPU, and does something else: {'; '.join(wrong)}.",
            "Set memory.offload=optimizer.",
        )


def _places(zero: Any, group: list[nn.Parameter]) -> list[_Place]:
    """Of every weight of a group, checked to be whole and in one piece."""
    places = []
    for weight in group:
        _, skipped, begin, number = zero.grad_position[zero.get_param_id(weight)]
        if skipped or number != weight.numel():
            raise TrainerdError("DeepSpeed has cut a weight in two, in a world of one process.", "Set memory.offload=optimizer.")
        places.append(_Place(weight, begin, begin + number))
    return places


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """As optimizers.py does, but over the partitions, whose gradients are DeepSpeed's own buffers and zero yet."""
    kept = [{name: group[name] for name in ("lr", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    optimizer.step()
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()


def _part(value: Any, place: _Place) -> Any:
    return value[place.begin : place.end].view(place.weight.shape) if isinstance(value, Tensor) and value.ndim == 1 else value


def _whole(name: str, values: list[Any], places: list[_Place], master: Tensor) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.shape == places[0].weight.shape and name != "step":
        flat = torch.zeros(master.shape, dtype=first.dtype)
        for value, place in zip(values, places, strict=True):
            flat[place.begin : place.end] = value.reshape(-1)
        return flat
    if any(float(value) != float(first) for value in values if value is not None):
        said = f"The checkpoint's weights have taken different numbers of steps ({name}), and DeepSpeed has one for a whole group."
        raise TrainerdError(said, "Set memory.offload=optimizer.")
    return first


@contextmanager
def _alone() -> Iterator[None]:
    """DeepSpeed asks the environment which process of how many it is; whoever asks later must not find an answer there."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"})
    try:
        yield
    finally:
        _put_back(before)


def _put_back(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Its warnings are about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
