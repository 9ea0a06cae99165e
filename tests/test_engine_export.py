"""The result of a run, its metrics, its events, and the Trainer as a library."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.toy import LEAVE, Script, Toy, config, lines, run
from trainerd.config.model import RunConfig
from trainerd.contract.errors import Refused, RunFailed, UsageError
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.engine import plan as plans
from trainerd.engine.determinism import deterministic
from trainerd.engine.metrics import MetricsLog, Rate, StepRecord
from trainerd.engine.trainer import Trainer


def test_the_weights_are_the_same_bytes_in_every_process(tmp_path):
    """Neither time, path nor process is in model.safetensors: two processes write the same file."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.toy import config, run
run(Path(sys.argv[1]), config({{"epochs": 1}}))
"""
    digests = set()
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True, timeout=120)
        digests.add(hashlib.sha256((Home(tmp_path / name).run("toy").model / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_tied_weights_are_stored_once_and_named(tmp_path):
    """The embedding that is the output layer too is in the file once; config.json says so."""
    run(tmp_path, config({"epochs": 1}))
    folder = Home(tmp_path).run("toy").model
    described = json.loads((folder / "config.json").read_text("utf-8"))
    assert described["tied"] == {"out.weight": "embed.weight"}
    header = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert sorted(k for k in header if k != "__metadata__") == ["embed.weight", "mix.bias", "mix.weight", "seen"]
    assert len(header["__metadata__"]) == 1


def test_the_finished_record_is_last_and_names_every_file(tmp_path):
    """result.json has the sha256 of all files of the result, the task's own and the user's task file among them."""

    class Exporting(Toy):
        def export(self, model, folder):
            assert not (folder / "result.json").exists()
            (folder / "words.txt").write_text("one\n", encoding="utf-8")

    task_file = Home(tmp_path).run("toy").task / "my_task.py"
    task_file.parent.mkdir(parents=True)
    task_file.write_text("# mine\n", encoding="utf-8")
    run(tmp_path, config({"epochs": 1}), task=Exporting())
    folder = Home(tmp_path).run("toy").model
    record = json.loads((folder / "result.json").read_text("utf-8"))
    assert record["outcome"] == "completed" and record["step"] == 7 and record["exact"]["now"] is True
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "result.json"}
    assert record["files"] == found
    assert {"words.txt", "my_task.py", "model.safetensors", "config.json", "metrics.json"} <= set(found)


def test_every_step_is_in_the_metrics_once_and_small(tmp_path):
    """Full precision, at most 200 bytes a step, and the loss that was trained on."""
    run(tmp_path, config({"warmup_steps": 0}))
    text = Home(tmp_path).run("toy").metrics.read_text("utf-8").splitlines()
    steps = [json.loads(line) for line in text if '"loss":' in line and "eval" not in line]
    assert [line["step"] for line in steps] == list(range(1, 22))
    assert max(map(len, text)) <= 200
    assert sum(line["samples"] for line in steps[:7]) == 50 and {line["epoch"] for line in steps[:7]} == {1}
    assert len(repr(steps[0]["loss"])) > 10 and steps[0]["lr"] == 0.01


def test_a_value_that_is_not_a_number_is_null_and_told(tmp_path):
    """With faults.nan: ignore, a diverged run says so once and goes on, and its files stay valid JSON."""

    class Diverges(Toy):
        def loss(self, model, batch, ctx):
            losses, more = super().loss(model, batch, ctx)
            return {name: (value * float("nan"), weight) for name, (value, weight) in losses.items()}, more

    link = Script()
    run(tmp_path, config(faults={"nan": "ignore"}), link, Diverges())
    assert all(line["loss"] is None for line in lines(tmp_path) if "loss" in line)
    assert len([e for e in link.of("warning") if "not a finite number" in e["text"]]) == 1


def test_metrics_are_cut_back_to_where_the_checkpoint_was(tmp_path):
    """Lines after it are written again; lines that are missing are counted."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.add(StepRecord(1, 1, torch.tensor(0.5), 0.1, torch.tensor(2.0), 8))
    log.close()
    size = log.bytes
    with open(path, "ab") as file:
        file.write(b'{"step":2,"torn')
    again = MetricsLog(path, size)
    again.add(StepRecord(2, 1, 0.25, 0.1, 1.0, 8, {"x": torch.tensor(3.0)}))
    again.close()
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(f["step"], f["loss"], f.get("metrics")) for f in found] == [(1, 0.5, None), (2, 0.25, {"x": 3.0})]
    short = MetricsLog(path, 10_000)
    short.close()
    assert short.missing_bytes == 10_000 - path.stat().st_size


def test_the_speed_is_that_of_the_last_half_minute_of_training(monkeypatch):
    """Pauses for evaluations do not count, and old speed is forgotten."""
    now = [0.0]
    monkeypatch.setattr("trainerd.engine.metrics.time.monotonic", lambda: now[0])
    rate = Rate()
    assert rate.per_second() == (None, None)
    for speed, seconds in ((100, 60), (10, 40)):
        for _ in range(seconds):
            now[0] += 1
            rate.samples += speed
            rate.tokens += 3 * speed
            rate.mark()
    now[0] += 500
    rate.idle(500)
    rate.mark()
    assert rate.per_second() == pytest.approx((10, 30), rel=0.05)


def test_the_supervisor_is_told_what_it_shows(tmp_path):
    """Plan, exactness, phases, progress with speed and ETA; and not more than about four times a second."""
    link = Script()
    run(tmp_path, config({"micro_batch": 4}), link)
    plan = link.of("plan")[0]
    assert (plan["device"], plan["precision"], plan["micro_batch"], plan["grad_accum"]) == ("cpu", "fp32", 4, 2)
    assert plan["optimizer"] == "adamw" and plan["record"]["threads"] == 1
    assert link.of("exact")[0]["now"] is True
    assert [e["name"] for e in link.of("phase")][-1] == "exporting"
    last = link.of("progress")[-1]
    assert (last["step"], last["total_steps"], last["epoch"], last["epochs"], last["samples"]) == (21, 21, 3, 3, 150)
    assert last["samples_per_second"] > 0 and last["tokens_per_second"] > last["samples_per_second"] and last["eta_seconds"] == 0
    assert len(link.of("progress")) < 12


def test_tensorboard_gets_the_same_numbers(tmp_path):
    """As an option; each step's loss is there."""
    pytest.importorskip("tensorboard")
    run(tmp_path, config({"epochs": 1}, log={"tensorboard": True}), Script())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Home(tmp_path).run("toy").folder / "tensorboard"))
    events.Reload()
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in steps])
    assert len(events.Scalars("eval/loss")) == 1


def test_without_tensorboard_the_run_goes_on(tmp_path, monkeypatch):
    """A package that is not installed is a warning with the remedy."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    link = Script()
    assert run(tmp_path, config({"epochs": 1}, log={"tensorboard": True}), link).outcome == "finished"
    assert "pip install tensorboard" in link.of("warning")[0]["text"]


# As a library


class Lines(Toy):
    """The few lines a library user writes, all in one class."""

    def model(self):
        return nn.Linear(4, 1)

    def dataset(self, split):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(int(split == "eval")))
        return torch.utils.data.TensorDataset(x, x.sum(-1, keepdim=True))

    def collate(self, samples):
        return torch.utils.data.default_collate(samples)

    def counts(self, batch):
        return {"loss": len(batch[1])}

    def loss(self, model, batch, ctx):
        return {"loss": (nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), 1.0)}, {}


def test_a_few_lines_train_a_model(tmp_path, monkeypatch, capsys):
    """Trainer(MyTask(), RunConfig()).train() in a folder: it learns, prints a line per epoch, and leaves a result."""
    monkeypatch.chdir(tmp_path)
    result = Trainer(Lines(), RunConfig(task="mine", train={"epochs": 4, "batch_size": 4, "lr": 0.1, "precision": "fp32"})).train()
    assert result.outcome == "finished" and result.metrics["eval"]["loss"] < 1
    assert capsys.readouterr().out.count("epoch ") == 4
    (run_folder,) = (tmp_path / "models").iterdir()
    assert run_folder.name.startswith("lines-") and not (tmp_path / "training_status.json").exists()


def test_prepare_is_run_once_and_its_data_found_again(tmp_path):
    """A library user's prepare() runs in this process, and not again for the same content."""
    calls = []

    class Prepared(Lines):
        def prepare(self, ctx):
            calls.append(ctx.cache_dir)
            (ctx.cache_dir / "x").write_bytes(b"1")

        def model(self):
            assert (self.ctx.cache_dir / "x").is_file()
            return super().model()

    for _ in range(2):
        run(tmp_path, config({"epochs": 1}), task=Prepared())
    assert len(calls) == 1


def test_two_trainings_never_share_a_home(tmp_path):
    """The trainer's lock is taken; a second one is refused with what to do."""
    lock = FileLock(Home(tmp_path).trainer_lock)
    assert lock.acquire()
    with pytest.raises(Refused, match="Another training holds"):
        run(tmp_path, config())
    lock.release()
    assert run(tmp_path, config({"epochs": 1})).outcome == "finished"


def test_a_task_without_samples_is_a_usage_error(tmp_path):
    """Said before anything is trained."""

    class Empty(Toy):
        def dataset(self, split):
            return []

    with pytest.raises(UsageError, match="no sample to train on"):
        run(tmp_path, config(), task=Empty())


def test_what_torch_was_set_to_is_set_again(tmp_path):
    """Threads and deterministic kernels are the training's own; a library user's process is as before."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    seen = []

    class Looks(Toy):
        def loss(self, model, batch, ctx):
            seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
            return super().loss(model, batch, ctx)

    run(tmp_path, config({"epochs": 1, "threads": 2}), task=Looks())
    assert set(seen) == {(2, True)}
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize("loaded", ["before", "meanwhile"])
def test_what_torch_compiles_meanwhile_is_deterministic_too(monkeypatch, loaded):
    """The compiler is not loaded for it; loaded by somebody else, it is deterministic for as long as the training is."""
    compiler = types.SimpleNamespace(deterministic=False)
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    if loaded == "before":
        monkeypatch.setitem(sys.modules, "torch._inductor.config", compiler)
    with deterministic("auto", print):
        assert torch.get_deterministic_debug_mode() == 1
        if loaded == "meanwhile":  # as its file does
            compiler.deterministic = os.environ.get("TORCHINDUCTOR_DETERMINISTIC") == "1"
            monkeypatch.setitem(sys.modules, "torch._inductor.config", compiler)
        assert compiler.deterministic is True
    assert compiler.deterministic is False and "TORCHINDUCTOR_DETERMINISTIC" not in os.environ
    assert torch.get_deterministic_debug_mode() == 0


# Exactness


def _put_without_order():
    """An operation without a deterministic kernel on the CPU."""
    target = torch.zeros(3)
    target.put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


class Disorderly(Toy):
    def loss(self, model, batch, ctx):
        if ctx.training and ctx.step == 3:
            _put_without_order()
        return super().loss(model, batch, ctx)


def test_an_operation_without_a_deterministic_kernel_is_named_or_an_error(tmp_path):
    """auto: exact.now is false since that step, and the status says which operation; true: an error; false: no promise."""
    link = Script()
    run(tmp_path / "auto", config(), link, Disorderly())
    assert [(e["now"], e["since_step"]) for e in link.of("exact")] == [(True, None), (False, 4)]
    assert "put_" in link.of("exact")[-1]["because"]
    with pytest.raises(RuntimeError, match="does not have a deterministic"):
        run(tmp_path / "true", config({"deterministic": True}), task=Disorderly())
    link = Script()
    run(tmp_path / "false", config({"deterministic": False}), link, Disorderly())
    assert link.of("exact")[0]["because"] == "deterministic is off"


def test_other_warnings_pass(recwarn):
    """Only torch's word about determinism is caught."""
    import warnings

    named = []
    with deterministic("auto", named.append):
        warnings.simplefilter("always")
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.filterwarnings("always", message=".*does not have a deterministic implementation")
        _put_without_order()
        _put_without_order()
    assert len(named) == 1
    assert [str(w.message) for w in recwarn] == ["something else"]


def test_a_resume_on_another_torch_is_no_longer_exact(tmp_path, monkeypatch):
    """The run goes on, and says since when and why its last bits are not promised."""
    run(tmp_path, config(), Script({5: LEAVE}))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    link = Script()
    run(tmp_path, config(), link)
    assert link.of("exact")[-1]["since_step"] == 5
    assert "torch" in link.of("exact")[-1]["because"] and "9.9.9" in link.of("exact")[-1]["because"]


def test_a_gpu_that_is_gone_is_waited_for_not_replaced():
    """The device is part of the plan: without it the trainer fails with a reason, and the supervisor tries again."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RunFailed, match="planned for cuda:0"):
        plans.device_of({"device": "cuda:0"})
