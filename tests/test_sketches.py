"""The task protocol carries four very different tasks through the real Trainer: they learn, resume exactly, and give a result."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.sketches.cadence import CadenceSketch
from tests.sketches.diffusion import DiffusionSketch
from tests.sketches.fusion import FusionSketch
from trainerd.config.model import RunConfig
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home
from trainerd.engine.loop import Link
from trainerd.engine.task import Task
from trainerd.engine.trainer import Trainer


def _llm() -> Task:
    pytest.importorskip("bitsandbytes")
    from tests.sketches.llm import LlmSketch

    return LlmSketch()


SKETCHES = {"cadence": CadenceSketch, "fusion": FusionSketch, "llm": _llm, "diffusion": DiffusionSketch}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning:bitsandbytes")


def _losses(home, name):
    lines = [json.loads(line) for line in Home(home).run(name).metrics.read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


class LeaveAfter(Link):
    """Asks to leave after so many looks for a command."""

    def __init__(self, looks):
        self.looks = looks

    def command(self):
        self.looks -= 1
        return {"do": "leave", "why": "pause", "save": True} if self.looks == 0 else None


def _config(sketch):
    train = {"epochs": 12, "batch_size": 16, "micro_batch": 6, "lr": 0.02, "precision": "fp32", "threads": 1}
    return RunConfig(task=sketch, name=sketch, train=train)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_a_sketch_trains_and_its_loss_falls(sketch, tmp_path):
    """Each of the four tasks learns, through the same engine and without special care."""
    result = Trainer(SKETCHES[sketch](), _config(sketch), home=tmp_path, link=Link()).train()
    losses = _losses(tmp_path, sketch)
    assert result.outcome == "finished" and len(losses) == result.step
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert result.metrics["eval"]["loss"] > 0
    assert (Home(tmp_path).run(sketch).model / "result.json").is_file()


@pytest.mark.parametrize("sketch", SKETCHES)
def test_a_sketch_resumes_to_the_last_bit(sketch, tmp_path):
    """Left in the middle and resumed, each of the four ends with the weights and losses of an uninterrupted run."""
    Trainer(SKETCHES[sketch](), _config(sketch), home=tmp_path / "whole", link=Link()).train()
    left = Trainer(SKETCHES[sketch](), _config(sketch), home=tmp_path / "parts", link=LeaveAfter(20)).train()
    assert left.outcome == "left"
    Trainer(SKETCHES[sketch](), _config(sketch), home=tmp_path / "parts", link=Link()).train()
    weights = [load_file(Home(tmp_path / part).run(sketch).model / "model.safetensors") for part in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert _losses(tmp_path / "whole", sketch) == _losses(tmp_path / "parts", sketch)


@pytest.mark.parametrize("sketch", ["llm", "diffusion"])
def test_frozen_weights_are_written_nowhere(sketch, tmp_path):
    """Of an adapter training only the adapter is stored; the base is named by its sha256."""
    Trainer(SKETCHES[sketch](), _config(sketch), home=tmp_path, link=Link()).train()
    folder = Home(tmp_path).run(sketch).model
    assert all("base" not in name and "embed" not in name for name in load_file(folder / "model.safetensors"))
    described = json.loads((folder / "config.json").read_text("utf-8"))
    assert any("base" in name for name in described["frozen_sha256"])


def test_another_base_is_refused(tmp_path):
    """The frozen weights are compared by sha256 on every resume: an adapter is worth nothing on another base."""
    sketch = _llm()
    assert Trainer(sketch, _config("llm"), home=tmp_path, link=LeaveAfter(20)).train().outcome == "left"
    path = sketch.ctx.cache_dir / "base.pt"
    weights = torch.load(path, weights_only=True)
    weights["layers"][0][0, 0] += 1
    torch.save(weights, path)
    record = json.loads((path.parent / "prepared.json").read_text("utf-8"))
    record["files"]["base.pt"] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (path.parent / "prepared.json").write_text(json.dumps(record), "utf-8")  # the cache was made anew, from another base
    with pytest.raises(TrainerdError, match=r"frozen weight layers\.0\.base\.weight"):
        Trainer(_llm(), _config("llm"), home=tmp_path, link=Link()).train()
