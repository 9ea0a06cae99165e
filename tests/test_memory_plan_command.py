"""`plan` and `start` as a person meets them: what it will need, in words and as JSON; a refusal that says what would help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from client import fitting, forecast_view, machine_facts, machine_view, outlook, packages, recommendation
from tests.person import DOOR, SMALL, Person
from tests.trainers import TASK
from trainerd.config import catalogue
from trainerd.config.load import resolve
from trainerd.contract import status
from trainerd.contract.errors import Refused
from trainerd.engine import fitting as engine_fitting
from trainerd.engine import precision as engine_precision
from trainerd.machine import cpu, gpu
from trainerd.machine.memory import RamFacts, ram
from trainerd.memory.receipts import FILE

_NOISE_BYTES = 50_000_000
"""So much of the RAM in use comes and goes on a machine where nothing happens."""


@pytest.fixture
def person(tmp_path: Path) -> Any:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


def planned(person: Person, *words: str, code: int = 0) -> dict[str, Any]:
    done = person.types("plan", "--json", *words)
    assert done.returncode == code, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_plan_says_what_a_training_needs(person: Person) -> None:
    """A table with likely and most, a bar, what it is made of, what was assumed and what is left out; nothing is written."""
    began = time.monotonic()
    done = person.types("plan")
    assert done.returncode == 0 and time.monotonic() - began < 10
    for words in ("cadence gru", "likely", "at most", "RAM", "fits", "optimizer", "Assumed", "Not in the estimate", "measured here yet"):
        assert words in done.stdout, words
    assert not person.home.runs.exists()


@pytest.mark.parametrize("words", [(), ("--budget", "3.5GB"), ("--budget", "1GB", "--set", "settings.model=gru-mn")])
def test_the_whole_answer_fits_80_columns_and_is_plain_in_a_pipe(person: Person, words: tuple[str, ...]) -> None:
    """Likely and at most for every number, a bar, the parts in bytes; no colours, no line wider than a terminal."""
    shown = person.types("plan", *words).stdout
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 80, shown
    numbers = ["RAM", "  of it pinned", "Disk"] + (["GPU, driver", "  reserved by torch", "  allocated"] if words else [])
    for name in numbers:
        row = next(line for line in shown.splitlines() if line.startswith(name))
        assert len(re.findall(r"[\d.]+ [kMG]?B", row)) == 2, row
    assert "Time per step" in shown and "n/a" in shown
    parts = ["optimizer", "weights", "gradients", "activations", "logits"]
    for part in [*parts, *(["CUDA overhead"] if words else ["checkpoint's copy", "python and torch"])]:
        assert re.search(rf"[\d.]+ [kMG]?B  {part}", shown), part


def test_a_preset_says_what_it_stays_below(person: Person) -> None:
    """In the plan itself; not when its model was changed, for then it does not say so."""
    assert "below 3.0 GB of GPU memory and 6.0 GB of RAM" in person.types("plan", "--preset", "standard").stdout
    assert "The preset says" not in person.types("plan", "--preset", "standard", "--set", "settings.model=gru-mn").stdout


def test_gradients_and_logits_are_in_the_answer_for_programs(person: Person) -> None:
    """--json holds every part of the breakdown as bytes, whatever is too small to be shown."""
    found = planned(person, "--budget", "3.5GB")["estimate"]
    assert {"weights", "optimizer", "gradients", "activations", "logits", "cuda context and workspace"} <= set(found["breakdown"])
    for name in ("allocated", "reserved", "driver", "ram", "pinned", "disk"):
        assert 0 <= found[name]["point"] <= found[name]["upper"] and isinstance(found[name]["upper"], int), name
    assert found["allocated"]["point"] < found["reserved"]["point"] < found["driver"]["point"]


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of its own needs pexpect's pty")
@pytest.mark.parametrize(("budget", "colour", "code"), [("3.5GB", "32", 0), ("620MB", "33", 0), ("300MB", "31", 5)])
def test_the_bar_is_green_amber_or_red(person: Person, budget: str, colour: str, code: int) -> None:
    """By whether the upper bound, only the likely value, or neither fits; NO_COLOR takes the colour away and nothing else."""
    import pexpect

    words = [str(DOOR), "--home", str(person.home.root), "plan", "--budget", budget, "--set", "train.micro_batch=32"]
    for extra in ({}, {"NO_COLOR": "1"}):
        environment = {**person.environment, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **extra}
        if not extra:
            environment.pop("NO_COLOR", None)
        child = pexpect.spawn(sys.executable, words, dimensions=(40, 80), env=environment, timeout=60)
        shown = child.read().decode()
        child.close()
        assert child.exitstatus == code and "[█" in shown
        assert (f"\x1b[{colour}m[█" in shown) is (not extra) and ("\x1b" not in shown) is bool(extra)


def test_a_gpu_that_torch_cannot_use_is_named_in_the_plan_itself(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU, that this torch is for the CPU, that training runs there, and what to type; before anything else is said."""
    one = gpu.GpuFacts(0, "GPU-a", "NVIDIA GeForce RTX 3050", 4 * 10**9, 3 * 10**8, 50.0, None, 3.0)
    monkeypatch.setattr(gpu, "devices", lambda: [one])
    monkeypatch.setattr(packages, "torch_facts", lambda: packages.TorchFacts("2.13.0+cpu", None))
    found = outlook.look(person.home, resolve("cadence"))
    assert isinstance(found, outlook.Outlook) and found.place.device == "cpu"
    shown = " ".join("\n".join(forecast_view.lines(found, True, lambda text, colour: text)).split())
    assert "RTX 3050" in shown and "Training runs on the CPU." in shown and "start_training reinstall" in shown
    assert fitting.warnings(person.home, resolve("cadence")) == list(found.notes)
    monkeypatch.setattr(packages, "torch_facts", lambda: packages.TorchFacts("2.13.0+cu130", "13.0"))
    assert outlook.unused_gpu() == ()
    monkeypatch.setattr(gpu, "driver_cuda", lambda: 12)  # an old driver: within one major version all would be well
    assert "the driver runs CUDA up to 12" in outlook.unused_gpu()[0] and "Update the NVIDIA driver" in outlook.unused_gpu()[0]
    old = outlook.look(person.home, resolve("cadence"))
    assert isinstance(old, outlook.Outlook) and old.place.device == "cpu"


def test_a_precision_that_is_slow_here_is_named_before_anything_is_started(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the plan and at the start, in the trainer's words; not of another machine, nor of what "auto" chooses, nor where nobody knows."""
    for precision in ("fp16", "bf16"):
        monkeypatch.setattr(cpu, "computes", lambda name: False)
        asked = resolve("cadence", sets=[f"train.precision={precision}"])
        found = outlook.look(person.home, asked)
        assert isinstance(found, outlook.Outlook) and found.place.device == "cpu"
        said = " ".join("\n".join(forecast_view.lines(found, True, lambda text, colour: text)).split())
        with monkeypatch.context() as torchs:
            torchs.setattr(torch.cpu, "get_capabilities", lambda: {name: False for name in ("amx_bf16", "amx_fp16", "avx512_bf16")})
            words = engine_precision.slow_here(precision, torch.device("cpu"))
        assert words and words in said and words in fitting.warnings(person.home, asked)
        elsewhere = outlook.look(person.home, asked, "8GB", "cpu")
        assert isinstance(elsewhere, outlook.Outlook) and not elsewhere.notes
        monkeypatch.setattr(cpu, "computes", lambda name: None)
        unsaid = outlook.look(person.home, asked)
        assert isinstance(unsaid, outlook.Outlook) and not unsaid.notes
    monkeypatch.setattr(cpu, "computes", lambda name: False)
    auto = outlook.look(person.home, resolve("cadence"))
    assert isinstance(auto, outlook.Outlook) and not auto.notes


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 6), "bf16"), (None, None)])
def test_bf16_is_for_gpus_that_compute_it(
    person: Person, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, precision: str | None
) -> None:
    """What "auto" means on a GPU is what the trainer will choose: fp16 before Ampere. Where the driver does not say, nothing is written."""
    one = gpu.GpuFacts(0, "GPU-a", "NVIDIA GeForce", 4 * 10**9, 3 * 10**8, 50.0, None, 3.0)
    monkeypatch.setattr(gpu, "devices", lambda: [one])
    monkeypatch.setattr(gpu, "compute_capability", lambda index: capability)
    monkeypatch.setattr(packages, "torch_facts", lambda: packages.TorchFacts("2.13.0+cu130", "13.0"))
    asked = resolve("cadence")
    found = outlook.look(person.home, asked)
    assert isinstance(found, outlook.Outlook) and found.answer.setup.precision == (precision or "bf16")
    written = recommendation.recommend(asked, found).document.get("train", {})
    assert written.get("precision") == precision and written["micro_batch"] == 32


def test_numbers_of_a_gpu_are_called_unverified_wherever_they_show(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the plan's heading, in the table of what fits, and in the refusal of `start`; of a CPU nothing of the kind."""
    plain = lambda text, colour: text  # noqa: E731 - a style that does nothing
    asked = resolve("cadence")
    for device, expected in (("gpu", True), ("cpu", False)):
        found = outlook.look(person.home, asked, "9GB", device)
        assert isinstance(found, outlook.Outlook)
        fit = machine_facts.Fit("cadence", "quick", found.where, found.answer, catalogue.STATED["quick"])
        shown = ["\n".join(forecast_view.short(found, True, plain)), "\n".join(machine_view._fits([fit], plain))]
        small = outlook.look(person.home, asked, "100MB", device)
        monkeypatch.setattr(outlook, "look", lambda *_, small=small: small)
        with pytest.raises(Refused) as error:
            fitting.warnings(person.home, asked)
        monkeypatch.undo()
        for text in (*shown, str(error.value)):
            assert ("not been compared with a GPU" in " ".join(text.split())) is expected, text


def test_plan_for_another_machine(person: Person) -> None:
    """--budget asks about a GPU that is not here: the same command says whether 4 GB would do, and chooses the micro-batch for it."""
    fits = planned(person, "--budget", "3.5GB")
    assert fits["verdict"] == "fits" and fits["device"] == "cuda" and fits["budget_bytes"] == 3_500_000_000
    large = planned(person, "--budget", "2GB", "--set", "train.batch_size=16384")
    assert large["verdict"] == "fits" and large["techniques"] == ["smaller micro-batch"]
    setup = large["estimate"]["setup"]
    assert setup["effective_batch"] == 16384 and setup["micro_batch"] < 16384
    assert large["estimate"]["driver"]["upper"] <= 2_000_000_000
    never = planned(person, "--budget", "600MB", "--set", "settings.model=gru-mn", code=5)
    assert never["verdict"] == "too large"


def test_what_is_typed_wrong_is_said_in_words(person: Person) -> None:
    """A budget that is no size, or a few bytes."""
    for given, says in (("lots", "'lots' is not a size"), ("5", "'5' is 5 bytes; write it with its unit"), ("3.5", "'3.5' is 3.5 bytes")):
        done = person.types("plan", "--budget", given)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_data_that_are_not_there_are_not_planned_with(person: Person, tmp_path: Path) -> None:
    """Neither `plan`, also for another machine, nor `memory config` answers for data that `start` refuses: exit 2, saying which."""
    own = tmp_path / "own.py"
    own.write_text(TASK, encoding="utf-8")
    nothing, folder = str(tmp_path / "nothing.csv"), str(tmp_path)
    for command, path, says in (
        (("plan",), nothing, "There is no data file"),
        (("plan", "--budget", "3.5GB"), nothing, "There is no data file"),
        (("plan",), folder, "holds no TSV, CSV"),
        (("plan", "--task", f"{own}:Tiny"), nothing, "nothing.csv"),
        (("memory", "config"), nothing, "There is no data file"),
    ):
        done = person.types(*command, "--data", path)
        assert done.returncode == 2 and says in done.stderr and path in done.stderr, (command, done.stdout, done.stderr)
    assert not person.home.optimal_config.exists()


def test_a_step_has_no_more_samples_than_the_data(person: Person) -> None:
    """A batch larger than --dataset-size is that many samples for the plan and for a start, as for the trainer; what is written stays
    the batch that was asked for."""
    words = ("--dataset-size", "200", "--set", "train.batch_size=1000000")
    small = planned(person, "--device", "cpu", *words, "--set", "train.micro_batch=1000000")
    assert small["estimate"]["setup"]["micro_batch"] == small["estimate"]["setup"]["effective_batch"] == 200
    assert small["estimate"]["ram"]["upper"] < 2_000_000_000
    done = person.types("memory", "config", "--json", *words)
    assert done.returncode == 0 and json.loads(done.stdout)["config"]["train"]["micro_batch"] == 1_000_000, done.stdout + done.stderr


def test_what_no_model_could_fit_into_is_not_blamed_on_the_model(person: Person) -> None:
    """A budget below what Python and torch, or CUDA's context, take themselves: raise it. One above asks for a smaller model."""
    on_cpu, on_gpu = (person.types("plan", *words, "--budget", "200MB") for words in (("--device", "cpu"), ()))
    for done, says in ((on_cpu, "Python and torch alone need"), (on_gpu, "CUDA's context alone needs")):
        text = " ".join(done.stdout.split())
        assert done.returncode == 5 and f"No model fits: {says}" in text and "aise the limit" in text and "smaller model" not in text, text
    large = person.types("plan", "--device", "cpu", "--budget", "420MB")
    assert large.returncode == 5 and "A smaller model would fit." in " ".join(large.stdout.split()), large.stdout


def test_a_tight_plan_without_a_way_out_says_what_would_settle_it(person: Person) -> None:
    """How much would be certain, and, where the device is here, that measuring narrows the bound."""
    fixed = ("--device", "cpu", "--set", "train.batch_size=1", "--set", "train.optimizer=adafactor", "--set", "train.precision=fp32")
    needed = planned(person, "--budget", "1TB", *fixed)["estimate"]["ram"]
    done = person.types("plan", "--budget", f"{needed['point'] + 1_000_000}B", *fixed)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and "Nothing the engine can change makes it certain. With" in text and "`plan --measure`" in text, text


def test_start_refuses_what_does_not_fit_and_the_change_it_names_helps(person: Person) -> None:
    """Exit 5 before anything is spawned; the first proposal, typed as it was printed, is then found to fit. The command for the whole
    estimate is that of what was asked for."""
    fixed = ("--set", "train.batch_size=65536", "--set", "train.micro_batch=65536", "--set", "train.precision=fp32")
    done = person.types("start", *fixed, "--set", "memory.ram_limit=12GB")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "does not fit" in done.stderr and "--set train.micro_batch=" in done.stderr and "memory.ram_limit" in done.stderr
    assert f" plan {' '.join(fixed)} --set memory.ram_limit=12GB" in " ".join(done.stderr.split()), done.stderr
    assert not person.home.runs.exists() and not person.home.status.exists()
    for _ in range(5):
        used = ram().used_bytes
        done = person.types("start", *fixed, "--set", "memory.ram_limit=12GB")
        setting = done.stderr.split("--set ", 1)[1].split()[0]
        again = planned(person, *fixed, "--set", setting, "--set", "memory.ram_limit=12GB")
        if again["verdict"] == "fits" or ram().used_bytes - used < _NOISE_BYTES:
            break  # else another program took memory between the two answers
    assert again["verdict"] == "fits"


def test_a_limit_that_others_have_passed_bounds_nothing_for_plan_and_start_either(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words are answered alike before a first training and after it, by `plan`, by `start` and by the trainer: what the machine
    has left counts. Passed or not, what does not fit that is refused."""
    used, total = 3_500_000_000, 16_000_000_000
    monkeypatch.setattr(outlook, "ram", lambda: RamFacts(used, total))
    asked = resolve("cadence", "quick", sets=["memory.ram_limit=1GB"])
    found = outlook.look(person.home, asked, device="cpu")
    assert isinstance(found, outlook.Outlook) and found.answer.verdict == "fits" and found.place.budget_bytes == total - used
    assert "12.5 GB left of the machine (memory.ram_limit 1.0 GB is passed by others already" in found.budget.beside()[1]
    monkeypatch.setattr(engine_fitting.machine_memory, "ram", lambda: RamFacts(used + engine_fitting.machine_memory.own_bytes(), total))
    assert engine_fitting._ram_left(asked.config) == pytest.approx(found.place.budget_bytes, rel=0.01)
    used = 15_900_000_000
    with pytest.raises(Refused) as refused:
        fitting.warnings(person.home, asked)
    assert "No model fits" in refused.value.hint and refused.value.hint.count("aise the limit") == 1, "what to do is said once"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU measures that")
def test_a_machine_is_measured_once_and_then_a_steps_time_is_foretold(person: Person) -> None:
    """In a process of its own: the bare trainer, memory's speed, products in each precision; what only a GPU has stays unknown. The
    next plan has it without being asked, and profile shows it."""
    measured = planned(person, "--measure")["profile"]
    assert measured["measured"] and measured["process_bytes"] > 100_000_000 and measured["torch"] == torch.__version__
    assert measured["ram_bytes_per_second"] > 1e8 and measured["gigaflops"]["fp32"] > 0.1
    assert measured["to_device_bytes_per_second"] is None and measured["device_bytes_per_second"] is None
    again = planned(person)
    seconds = again["estimate"]["seconds_per_step"]
    assert again["profile"] == measured and 0 < seconds["point"] < seconds["upper"]
    assert "known after: plan --measure" not in person.types("plan").stdout
    assert "bare trainer" in person.types("memory", "profile").stdout


def test_a_tight_plan_says_what_would_make_it_fit_for_certain(person: Person) -> None:
    """Exit 0, amber, and the changes with which the bar would be green; typed as printed, it is."""
    fixed = ("--device", "cpu", "--set", "train.batch_size=65536", "--set", "train.micro_batch=65536", "--set", "train.precision=fp32")
    roomy = planned(person, "--budget", "1TB", *fixed)["estimate"]["ram"]
    needed = planned(person, "--budget", f"{roomy['upper'] - 1}B", *fixed)["estimate"]["ram"]  # without room for holes in the heap
    tight = ("--budget", f"{(needed['point'] + needed['upper']) // 2}B", *fixed)
    assert planned(person, *tight)["verdict"] == "tight"
    shown = person.types("plan", *tight).stdout
    assert "It would fit for certain with:" in shown, shown
    setting = shown.split("--set ", 1)[1].split()[0]
    assert planned(person, *tight, "--set", setting)["verdict"] == "fits"


def test_training_in_the_terminal_refuses_what_does_not_fit_too(person: Person) -> None:
    """optimized_train.py: exit 5 with the same words, and nothing is begun."""
    words = ["--set", "train.batch_size=65536", "--set", "train.micro_batch=65536", "--set", "memory.ram_limit=12GB"]
    words += ["--set", "train.precision=fp32"]
    command = [sys.executable, str(DOOR.with_name("optimized_train.py")), "--home", str(person.home.root), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=person.environment, timeout=120, check=False)
    assert done.returncode == 5 and "It does not fit" in done.stderr and not person.home.runs.exists()


def test_a_run_leaves_a_receipt_and_the_next_plan_knows_it(person: Person) -> None:
    """Foretold and real, side by side, from the trainer itself; near each other; and `plan` says how far to trust it."""
    person.starts(*SMALL, "--set", "train.max_steps=12", "--wait")
    receipt = json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))
    assert receipt["kind"] == "cadence gru" and receipt["device"] == "cpu" and receipt["steps"] == 12
    told, real = receipt["predicted"]["ram_bytes"], receipt["real"]["ram_bytes"]
    assert 0.6 < real / told < 1.4, (told, real)
    assert receipt["real"]["seconds_per_step"] > 0 and receipt["torch"] and receipt["plan"]["micro_batch"] == 64
    assert "1 earlier run of this kind" in person.types("plan", *SMALL).stdout


def test_a_model_of_ones_own_is_traced_once_and_then_planned(person: Person, tmp_path: Path) -> None:
    """Before its first training nothing is foretold, and that is said; afterwards `plan` knows it without torch."""
    (tmp_path / "tiny.py").write_text(TASK, encoding="utf-8")
    words = ("--task", f"{tmp_path / 'tiny.py'}:Tiny", "--set", "train.precision=fp32", "--set", "train.max_steps=6")
    before = person.types("plan", *words)
    assert before.returncode == 0 and "has not been trained in this home yet" in before.stdout
    said = " ".join(before.stdout.split())
    assert "It trains on this machine's CPU, in fp32, with adamw" in said
    for part in ("traced on the CPU", "refused before the first step", "`plan` knows it"):
        assert part in said, said
    assert "loses no step" not in said, "on a CPU nothing fails at a limit"
    assert "loses no step" in " ".join(person.types("plan", *words, "--device", "gpu", "--budget", "4GB").stdout.split())
    foretold = json.loads(person.types("plan", "--json", *words).stdout)
    assert foretold["verdict"] is None and len(foretold["will"]) == 4
    person.starts(*words, "--wait")
    receipt = json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))
    assert receipt["trace"] and receipt["predicted"]["ram_bytes"] > 0
    shown = person.sees().status
    assert shown is not None and shown.memory.predicted_bytes == pytest.approx(receipt["predicted"]["ram_bytes"], rel=0.01)
    after = planned(person, *words)
    assert after["verdict"] == "fits" and after["estimate"]["num_trainable"] == 4 * 16 + 16 + 16 + 1
    larger = planned(person, *words, "--set", "train.batch_size=4096")["estimate"]
    assert larger["tensors"] > after["estimate"]["tensors"] and larger["setup"]["effective_batch"] == 96, "all there are"
    for other in ("train.precision=bf16", "train.attention=math", "memory.logits=full"):
        unknown = json.loads(person.types("plan", "--json", *words, "--set", other).stdout)
        assert unknown["verdict"] is None and "tiny.py:Tiny was last trained here in fp32" in unknown["reason"], other
        asked = unknown["reason"].partition("what its model needs")[2]
        assert other.partition("=")[2] in asked
        assert sum(word in asked for word in ("in bf16", "memory.logits", "train.attention", "micro-batches")) == 1, "what differs alone"
    assert planned(person, *words, "--set", "settings.rows=96")["verdict"] == "fits", "the default, said aloud, is no other setting"
    fewer = json.loads(person.types("plan", "--json", *words, "--set", "settings.rows=95").stdout)
    assert fewer["verdict"] is None and "settings.rows 96 -> 95" in fewer["reason"], fewer


def test_an_edited_task_is_traced_anew(person: Person, tmp_path: Path) -> None:
    """What its old code needed is not what it needs, be it in the task's file or in a module beside it that it imports: `plan` says what
    was edited, its next training foretells for the new code."""
    file, beside = tmp_path / "tiny.py", tmp_path / "tiny_wide.py"
    person.environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    source = TASK.replace("x, y = batch", "import tiny_wide; x, y = batch; held = tiny_wide.held(x)")
    file.write_text(source.replace('reduction="sum"), 1.0)', 'reduction="sum") + held, 1.0)'), "utf-8")
    words = ("--task", f"{file}:Tiny", "--set", "train.precision=fp32", "--set", "train.max_steps=2", "--set", "train.batch_size=64")
    told = []
    for width in (1, 200_000):
        beside.write_text(f"import torch\ndef held(x): return (x @ torch.ones(4, {width})).square().sum() * 0\n", "utf-8")
        said = json.loads(person.types("plan", "--json", *words).stdout)
        assert said["verdict"] is None and ("tiny_wide.py, which it imports, was edited" in said["reason"]) is bool(told), said
        person.starts(*words, "--wait")
        receipt = json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))
        told.append(receipt["predicted"]["ram_bytes"])
        assert planned(person, *words)["estimate"]["kind"]
    assert told[1] > told[0] + 40_000_000
    file.write_text(source, "utf-8")
    assert "the task file was edited" in json.loads(person.types("plan", "--json", *words).stdout)["reason"]


HUGE = """
import torch
from torch import nn
from trainerd.engine.task import Task

class Data:
    def __len__(self): return 2_000_000
    def __getitem__(self, i): return torch.tensor([float(i % 7), float(i % 5)])

class Huge(Task):
    def model(self): return nn.Sequential(nn.Linear(2, 65536), nn.ReLU(), nn.Linear(65536, 1))
    def dataset(self, split): return Data() if split == "train" else None
    def counts(self, batch): return {"loss": len(batch)}
    def loss(self, model, batch, ctx): return {"loss": (model(batch).square().sum(), 1.0)}, {}
"""


def test_ones_own_task_that_is_too_large_is_refused_at_its_first_start(person: Person, tmp_path: Path) -> None:
    """`plan` did not know it, the trainer does before its first step: who waits gets exit code 5 with the change that helps, the status
    says it to everybody else, and nothing is tried again."""
    (tmp_path / "huge.py").write_text(HUGE, encoding="utf-8")
    words = ("--task", f"{tmp_path / 'huge.py'}:Huge", "--set", "train.precision=fp32", "--set", "train.threads=1")
    large = ("--set", "train.batch_size=1000000", "--set", "train.micro_batch=1000000")
    done = person.starts(*words, *large, "--wait", expect=5)
    assert "It does not fit: it needs 7" in done.stdout + done.stderr  # the second, where it is over before anybody has waited
    reading = person.sees()
    assert reading.state == status.FAILED and "It would fit with --set train.micro_batch=" in reading.reason, reading.reason
    assert reading.status and reading.status.trainer.restarts == 0 and not person.home.run(person.run()).metrics.exists()
    assert f"start --config {person.home.run(person.run()).config} --set train.micro_batch=" in person.types("status").stdout
    planned_again = person.types("plan", "--json", *words, *large)  # what was traced is known, although nothing was trained
    assert planned_again.returncode == 5 and json.loads(planned_again.stdout)["estimate"]["num_trainable"] == 65536 * 4 + 1


def test_a_task_that_was_refused_is_known_and_the_change_it_names_works_as_typed(person: Person, tmp_path: Path) -> None:
    """After a refusal at the first start `plan` of the same words says why; `start` with the setting that was printed begins a new run,
    for the refused one has no step, and trains."""
    (tmp_path / "huge.py").write_text(HUGE, encoding="utf-8")
    limit = ram().used_bytes + 1_500_000_000
    words = ("--task", f"{tmp_path / 'huge.py'}:Huge", "--set", "train.precision=fp32", "--set", "train.threads=1")
    words += ("--dataset-size", "4096", "--epochs", "1", "--set", "train.batch_size=4096", "--set", f"memory.ram_limit={limit}B")
    whole = ("--set", "train.micro_batch=4096")
    done = person.starts(*words, *whole, "--wait", expect=5)
    said, refused = " ".join(person.sees().reason.split()), person.run()
    assert "It would fit with --set train.micro_batch=" in said, said + done.stdout
    again = planned(person, *words, *whole, code=5)
    assert again["verdict"] == "too large" and again["proposals"][0]["settings"][0].startswith("train.micro_batch="), again
    for _ in range(5):
        if "--set train.micro_batch=" in said:
            setting = said.split("--set ", 1)[1].split()[0].rstrip(".")
        done = person.types("start", *words, *whole, "--set", setting, "--wait")
        said = " ".join((done.stdout + done.stderr).split())
        if done.returncode != 5:
            break  # else another program took memory between the two answers
    assert done.returncode == 0 and "failed before its first checkpoint, and goes on only as it was (train.micro_batch" in said, said
    assert person.run() != refused and len(person.steps()) == 1
