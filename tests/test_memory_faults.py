"""An out-of-memory wherever it strikes: no step is lost, no bit differs from a run that had that micro-batch from there on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory_oracle import FailsAt
from tests.toy import Script, Toy, config, lines, run, same, weights
from trainerd.config.model import RunConfig
from trainerd.contract import wire
from trainerd.contract.errors import Refused, TrainerdError
from trainerd.contract.paths import Home
from trainerd.engine import entry, guard
from trainerd.engine.state import States
from trainerd.engine.step import Stepper

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def asked(precision: str = "fp32") -> RunConfig:
    """Five steps of two micro-batches, evaluations and checkpoints on the way."""
    train = {"max_steps": 5, "micro_batch": 4, "eval_every_steps": 3, "precision": precision}
    return config(train, checkpoint={"every_steps": 2, "exact": True})


class Runs:
    """Runs that had another micro-batch from a step on, without any out-of-memory; each is made once."""

    def __init__(self, folder: Path, configuration: RunConfig) -> None:
        self._folder, self._configuration = folder, configuration
        self._numbers = itertools.count()
        self._made: dict[tuple[int, int] | None, Path] = {}

    def home(self) -> Path:
        return self._folder / str(next(self._numbers))

    def calm(self, since: tuple[int, int] | None, patch: pytest.MonkeyPatch) -> Path:
        """The run with (step, micro-batch) from that step on; None: with the first one to the end."""
        if since not in self._made:
            home = self._made[since] = self.home()
            original = Stepper.take

            def take(self: Stepper, *arguments: Any) -> Any:
                if since is not None and self._loader.step == since[0] - 1:
                    self.split(since[1])
                return original(self, *arguments)

            with patch.context() as inner:
                inner.setattr(Stepper, "take", take)
                run(home, self._configuration)
        return self._made[since]


@pytest.fixture
def runs(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runs]:
    yield Runs(tmp_path, asked(getattr(request, "param", "fp32")))


def strike(number: int, runs: Runs, configuration: RunConfig, patch: pytest.MonkeyPatch) -> bool:
    """Fail the n-th allocation of a run, and look at everything that was promised. False: it has fewer."""
    home, link = runs.home(), Script()
    fault = FailsAt(number)
    try:
        with fault:
            run(home, configuration, link)
    except TrainerdError as error:
        assert "too little memory to build" in str(error) and not link.of("progress"), fault.operation
        run(home, configuration)  # as the supervisor would
        assert same(home, runs.calm(None, patch))
        return True
    if not fault.operation:
        return False
    where = f"allocation {number}, {fault.operation}"
    events = [event for event in link.of("note") if event["kind"] == "out_of_memory"]
    assert len(events) == 1 and link.of("memory")[-1]["oom_recoveries"] == 1, where
    plan = link.of("plan")[-1]
    split = None if plan["micro_batch"] == 4 else (events[0]["step"], plan["micro_batch"])
    if split:
        assert split[1] == 2 and link.of("exact")[-1]["since_step"] == split[0], where
    reference = runs.calm(split, patch)
    if "in an evaluation" in events[0]["text"]:  # in smaller parts an evaluation has other last digits; the training has not
        assert _training(home) == _training(reference) and _weights_bytes(home) == _weights_bytes(reference), where
    else:
        assert same(home, reference), where
    return True


def _training(home: Path) -> list[dict[str, Any]]:
    return [line for line in lines(home) if "loss" in line]


def _weights_bytes(home: Path) -> bytes:
    return (Home(home).run("toy").model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("runs", ["fp32", "fp16"], indirect=True)
def test_an_out_of_memory_at_any_allocation_loses_no_step(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 74th allocation of a whole run, from the model to the result: in collate, forward, backward, clipping, evaluation, metrics,
    the checkpoint's copy, the result. One event for each; the same bits as a run with that micro-batch from that step on."""
    number = 1
    while strike(number, runs, runs._configuration, monkeypatch):
        number += 74
    assert number > 400, "the run is shorter than it was: fewer places are looked at"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("runs", ["fp32", "fp16"], indirect=True)
def test_an_out_of_memory_at_every_allocation(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for each of them."""
    number = 1
    while strike(number, runs, runs._configuration, monkeypatch):
        number += 1
    print(f"\n{number - 1} allocations, each failed once")


class Scarce(Toy):
    """Its collate() fails at one step, as when the host's memory is short."""

    failed = False

    def collate(self, samples: Any) -> torch.Tensor:
        if self.ctx.step == 2 and not self.failed:
            self.failed = True
            raise MemoryError
        return super().collate(samples)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_found_no_memory_are_read_again(num_workers: int, tmp_path: Path) -> None:
    """In this process or in a worker: the step is tried again, no sample is lost or doubled."""
    train = {"max_steps": 5, "num_workers": num_workers}
    link = Script()
    run(tmp_path / "tight", config(train), link, Scarce())
    run(tmp_path / "ample", config(train))
    assert [line["samples"] for line in _training(tmp_path / "tight")] == [line["samples"] for line in _training(tmp_path / "ample")]
    assert [e["micro_batch"] for e in link.of("plan")] == [8, 4]


def test_a_batch_that_cannot_be_split_is_tried_again_as_it_is(tmp_path: Path) -> None:
    """Also the short one at an epoch's end: what follows it is not cut to its size, and the run stays exact."""

    class Whole(Toy):
        splittable = False
        failed = False

        def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
            if ctx.training and len(batch) < 8 and not self.failed:
                self.failed = True
                raise OOM
            return super().loss(model, batch, ctx)

    class Calm(Toy):
        splittable = False

    task, link = Whole(), Script()
    run(tmp_path / "tight", config(), link, task)
    run(tmp_path / "ample", config(), task=Calm())
    assert task.failed and same(tmp_path / "ample", tmp_path / "tight")
    assert all(event["now"] for event in link.of("exact")) and link.of("memory")[-1]["oom_recoveries"] == 1


def test_a_checkpoint_that_finds_no_memory_for_its_copy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried twice, then said as unsaved, as on a full disk; the training goes on, and the next one is saved."""
    original, calls = States._captured, []

    def captured(self: States, facts: dict[str, Any]) -> dict[str, Any]:
        calls.append(facts["step"])
        if len(calls) <= 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(self, facts)

    monkeypatch.setattr(States, "_captured", captured)
    monkeypatch.setattr("trainerd.engine.saver._FIRST_RETRY_SECONDS", 0.0)
    link = Script()
    run(tmp_path / "tight", asked(), link)
    run(tmp_path / "ample", asked())
    assert same(tmp_path / "ample", tmp_path / "tight") and calls[:2] == [2, 2]
    told = link.of("unsaved")
    assert "could not be copied" in told[0]["error"] and told[0]["since"] and told[-1]["since"] is None
    assert link.of("checkpoint")


def test_metrics_that_found_no_memory_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them from a full GPU may fail: no line is lost."""
    from trainerd.engine import metrics

    original, calls = metrics._resolve, []

    def resolve(numbers: Any) -> Any:
        calls.append(len(numbers))
        if len(calls) == 1:
            raise OOM
        return original(numbers)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_resolve", resolve)
        run(tmp_path / "tight", asked())
    run(tmp_path / "ample", asked())
    assert calls[1] == calls[0] and same(tmp_path / "ample", tmp_path / "tight")


def test_somebody_who_asked_for_a_save_hears_that_there_was_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """His request is answered, once; it is not tried in every step from then on."""

    def never(self: States, facts: dict[str, Any]) -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setattr(States, "_captured", never)
    monkeypatch.setattr("trainerd.engine.saver._FIRST_RETRY_SECONDS", 3600.0)  # on a busy machine the run takes longer than 10 s
    link = Script({3: {"do": "save", "id": "mine"}})
    seldom = {"every_steps": 1000, "every_minutes": 60}
    assert run(tmp_path, config({"max_steps": 6}, checkpoint=seldom), link).outcome == "finished"
    asked_for = [event["request"] for event in link.of("unsaved")]
    assert asked_for[0] == "mine" and asked_for.count("mine") == 1 and len(asked_for) <= 4  # best, last, before the result
    assert weights(tmp_path)


def test_a_result_that_finds_no_memory_is_written_by_the_next_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried twice, then an error in words; everything is in the last checkpoint, and a restart writes it."""

    def never(self: Toy, model: Any, folder: Path) -> None:
        raise OOM

    run(tmp_path / "ample", asked())
    with monkeypatch.context() as patch, pytest.raises(TrainerdError, match="too little memory to write the finished model"):
        patch.setattr(Toy, "export", never)
        run(tmp_path / "tight", asked())
    link = Script()
    run(tmp_path / "tight", asked(), link)
    assert same(tmp_path / "ample", tmp_path / "tight")
    assert not [event for event in link.of("progress") if event["step"] < 5], "no step was trained again"


def test_a_model_that_finds_no_memory_ends_in_words(tmp_path: Path) -> None:
    """Before the first step nothing can be split: the error says what it was for, and what would help."""

    class Huge(Toy):
        def model(self) -> Any:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")

    with pytest.raises(TrainerdError, match=r"the model and its optimizer: 9 bytes could not be had in one piece\. Close .*`plan`") as told:
        run(tmp_path, config(), task=Huge())
    assert "DefaultCPUAllocator" not in str(told.value) and not isinstance(told.value, Refused) and len(str(told.value)) < 290


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
         "400000000000000 bytes. Error code 12 (Cannot allocate memory)", "400 TB"),
        ("Unable to allocate 364. TiB for an array with shape (10000000, 10000000) and data type float32", "400 TB"),
    ],
)  # fmt: skip
def test_what_no_room_will_ever_be_enough_for_is_refused_at_once(tmp_path: Path, text: str, size: str) -> None:
    """More in one piece than the machine has in all: refused for good, in sizes a person reads, and nothing is tried again."""

    class Impossible(Toy):
        def model(self) -> Any:
            raise MemoryError(text) if "Unable" in text else RuntimeError(text)

    with pytest.raises(Refused, match=rf"It does not fit: to build the model and its optimizer, {size} in one piece") as told:
        run(tmp_path, config(), task=Impossible())
    assert "A smaller model would fit" in str(told.value) and len(str(told.value)) < 290 and "alloc" not in str(told.value)
    assert entry.verdict(told.value, retry_helps=True)[0] == wire.EXIT_PERMANENT
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 4.00 GiB of which 3 GiB")
    with pytest.raises(Refused, match=r"9\.7 GB in one piece are asked for, and the GPU has 4\.3 GB in all"), guard.worded("build it"):
        raise on_gpu
    with pytest.raises(TrainerdError, match="too little memory to build it") as another, guard.worded("build it"):
        raise torch.OutOfMemoryError(str(on_gpu).replace("9.00", "3.50"))
    assert not isinstance(another.value, Refused)
