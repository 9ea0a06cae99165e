"""A person's ds_config.json: "auto" is ours, a contradiction is refused with both values, what cannot run with the remedy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from client import able, packages
from tests.person import Person
from trainerd.config import deepspeed
from trainerd.config.load import resolve
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError
from trainerd.contract.paths import Home

# As transformers' documentation shows one; the scheduler's section, which says nothing of its own, as "auto".
AUTO = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": "auto",
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def asked(train: dict[str, Any] | None = None, **memory: Any) -> RunConfig:
    return RunConfig.model_validate({"train": {"batch_size": 8, **(train or {})}, "memory": {"offload": "zero2", **memory}})


def test_one_of_autos_becomes_ours() -> None:
    """Batch, pieces, clipping and buffers; what is a matter of speed stays as it was written."""
    config = asked({"max_grad_norm": 0.5})
    assert deepspeed.problems(config, AUTO) == []
    whole = deepspeed.whole(config, 4, AUTO, on_gpu=False)
    assert (whole["train_batch_size"], whole["train_micro_batch_size_per_gpu"], whole["gradient_accumulation_steps"]) == (8, 4, 2)
    assert whole["gradient_clipping"] == 0.5 and "optimizer" not in whole and "auto" not in json.dumps(whole)
    zero = whole["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]) == (2, {"device": "cpu", "pin_memory": True})
    assert zero["overlap_comm"] is True and zero["reduce_bucket_size"] == 5_000_000


def test_without_one_every_value_is_written_down() -> None:
    """Clipping too, for DeepSpeed's own default is to clip; and uneven pieces are left out, for it knows none."""
    whole = deepspeed.whole(asked({"max_grad_norm": None}), 3, None, on_gpu=True)
    assert whole["gradient_clipping"] == 0.0 and whole["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert whole["train_batch_size"] == 8 and "train_micro_batch_size_per_gpu" not in whole


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": 16}, "train_batch_size = 16, and train.batch_size = 8"),
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4, and train.micro_batch = auto"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2, and train.batch_size / train.micro_batch = auto"),
    ({"gradient_clipping": 0.3}, "gradient_clipping = 0.3, and train.max_grad_norm = 1.0"),
    ({"fp16": {"enabled": True}}, "fp16.enabled = true, and it is false here"),
    ({"bf16": {"enabled": True}}, "weights stay in float32"),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3, and memory.offload (zero2) = 2"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 'device = "nvme", and memory.offload (zero2) = cpu'),
    ({"zero_optimization": {"offload_param": {}}}, "zero_optimization.offload_param"),
    ({"optimizer": {"type": "Lamb"}}, 'optimizer.type = "Lamb", and train.optimizer = AdamW'),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, "optimizer.params.lr = 0.5, and train.lr = 0.001"),
    ({"optimizer": {"type": "AdamW", "params": {"eps": 0.5}}}, "optimizer.params.eps = 0.5, and it is 1e-08 here"),
    ({"scheduler": {"type": "WarmupLR"}}, "the learning rate is train.scheduler = cosine"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer = true, and it is false here"),
    ({"zero_optimisation": {}}, "(did you mean zero_optimization?)"),
    ({"wall_clock_breakdown": True}, "wall_clock_breakdown: is not supported here"),
]


@pytest.mark.parametrize(("document", "said"), CONTRADICTIONS)
def test_what_contradicts_is_refused_with_both_values(document: dict[str, Any], said: str) -> None:
    """One line for each, naming the key as it stands in the file."""
    found = deepspeed.problems(asked(), document)
    assert len(found) == 1 and said in found[0] and found[0].startswith("memory.deepspeed_config: "), found


def test_the_same_value_is_no_contradiction() -> None:
    """Both may say it."""
    document = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1}
    assert deepspeed.problems(asked({"micro_batch": 4}), document) == []


def test_what_does_not_go_together_is_refused_with_the_rest(tmp_path: Path) -> None:
    """An optimizer that cannot be laid into one line, a compiled model, a file for another offload: all problems at once."""
    sets = ["memory.offload=zero2", "train.optimizer=adafactor", "train.compile=true", f"memory.deepspeed_config={tmp_path / 'none.json'}"]
    with pytest.raises(ConfigError) as refused:
        resolve(sets=[*sets[:3], "train.micro_batch=999999"])
    assert all(key in str(refused.value) for key in ("adafactor", "train.compile", "train.micro_batch"))
    with pytest.raises(ConfigError, match="there is no such file"):
        resolve(sets=[sets[0], sets[3]])
    with pytest.raises(ConfigError, match=r"is read with memory\.offload=zero2 only, and memory\.offload is auto"):
        resolve(sets=[sets[3]])


@pytest.mark.parametrize("content", ["{", "[]", '{"zero_optimization": 2}', "nonsense", "\x00"])
def test_a_file_that_is_none_is_a_problem_in_words(content: str, tmp_path: Path) -> None:
    """Broken JSON, no object, a section that is no section."""
    path = tmp_path / "ds_config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"memory\.deepspeed_config"):
        resolve(sets=["memory.offload=zero2", f"memory.deepspeed_config={path}"])


@pytest.mark.parametrize(
    ("system", "installed", "said"),
    [
        ("linux", "0.19.8", None),
        ("linux", "0.19.9+cu130", None),
        ("linux", None, "pip install 'trainerd[deepspeed]'"),
        ("linux", "0.18.2", "knows DeepSpeed >=0.19.8,<0.20, and 0.18.2 is installed"),
        ("linux", "0.20.0", "and 0.20.0 is installed"),
        ("win32", "0.19.8", "runs on Linux only"),
    ],
)
def test_it_is_refused_where_it_cannot_run(system: str, installed: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started: without the package, with a version that is not known, on another system."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(packages, "version", lambda name: installed)
    if said is None:
        able.refuse_impossible(asked())
        return
    with pytest.raises(ConfigError) as refused:
        able.refuse_impossible(asked())
    assert refused.value.exit_code == 2 and said in str(refused.value) and "memory.offload=optimizer" in str(refused.value)


def test_a_start_with_a_contradiction_ends_with_exit_2_and_writes_nothing(home: Home, tmp_path: Path) -> None:
    """Both values in the line a person reads."""
    own = tmp_path / "ds_config.json"
    own.write_text(json.dumps({"train_batch_size": 7}), encoding="utf-8")
    person = Person(home.root, tmp_path / "state")
    done = person.types("start", "--set", "memory.offload=zero2", "--set", f"memory.deepspeed_config={own}")
    assert done.returncode == 2 and "train_batch_size = 7, and train.batch_size = " in done.stderr, done.stderr
    assert not list(home.root.iterdir())
