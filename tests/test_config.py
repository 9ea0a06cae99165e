"""The configuration: layers, YAML's words and numbers, presets, and every problem said at once, before torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainerd.config import catalogue, schema, yaml12
from trainerd.config.load import load, resolve
from trainerd.config.model import RunConfig
from trainerd.config.nearest import nearest
from trainerd.contract.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parents[1]


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(**words: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**words)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_later_layers_win(tmp_path: Path) -> None:
    """task defaults < preset < file < --set and flags."""
    defaults = load()
    assert defaults.train.lr == 3e-3 and defaults.train.warmup_steps == 50  # CADENCE's own
    quick = load(preset="quick")
    assert (quick.train.epochs, quick.data.size, quick.preset) == (3, 5000, "quick")
    file = written(tmp_path, "preset: standard\ntrain: {epochs: 6, lr: 1e-4}\n")
    assert (load(config_file=file).train.epochs, load(config_file=file).data.size) == (6, 10_000)
    flags = {"train.epochs": 7, "data.size": None}
    config = load(config_file=file, preset="extended", sets=["train.lr=2e-4", "train.lr=5e-4"], overrides=flags)
    assert (config.train.epochs, config.train.lr, config.data.size, config.preset) == (7, 5e-4, 20_000, "extended")


def test_the_presets_promised_are_there() -> None:
    """quick: 3 epochs, 5,000 samples; standard: 5, 10,000; extended: 8, 20,000."""
    found = {name: (load(preset=name).train.epochs, load(preset=name).data.size) for name in catalogue.preset_names()}
    assert found == {"quick": (3, 5_000), "standard": (5, 10_000), "extended": (8, 20_000)}


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.compile=true", "train.activation_checkpointing=full"], "torch compiles no block that is computed again"),
        (["train.compile=true", "train.activation_checkpointing=selective"], "torch compiles no block that is computed again"),
        (["memory.offload=base", "train.compile=true"], "train.compile is on, and without computing blocks again"),
        (["memory.offload=base", "train.activation_checkpointing=none"], "is none, and without computing blocks again"),
        (["memory.offload=optimizer", "train.optimizer=adamw8bit"], "the small state of train.optimizer = adamw8bit"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused_before_anything_is_started(sets: list[str], said: str) -> None:
    """Keys that contradict each other whatever the task: `plan`, `config` and `start` read them here, and end with 2."""
    assert any(said in problem for problem in problems(sets=sets))
    assert load(sets=["train.compile=true"]).train.compile and load(sets=["memory.offload=base"]).memory.offload == "base"


def test_yaml_is_read_by_the_rules_of_1_2() -> None:
    """1e-4 is a number, off is a word, and a document comes back as it was written."""
    assert yaml12.parse("{a: 1e-4, b: off, c: yes, d: 012, e: null}", "x") == {"a": 1e-4, "b": "off", "c": "yes", "d": 12, "e": None}
    document = {"b": 1e-4, "a": {"c": "off", "d": None, "é": [1, "yes", "1e-4", "null", True]}}
    assert yaml12.parse(yaml12.dump(document), "x") == document
    assert load(sets=["train.lr=1e-4"]).train.lr == 1e-4
    assert load(sets=["name=off"]).name == "off"
    assert load(sets=["train.max_grad_norm=null"]).train.max_grad_norm is None
    assert load(sets=["settings={vocabulary: 500}"]).settings["vocabulary"] == 500


def test_json_is_accepted(tmp_path: Path) -> None:
    """A JSON file is a configuration file."""
    assert load(config_file=written(tmp_path, json.dumps({"train": {"lr": 1e-05}}))).train.lr == 1e-5


def test_a_whole_configuration_can_be_given_back(tmp_path: Path) -> None:
    """The config.yml of a run starts the same run."""
    config = load(preset="quick", sets=["settings.model=gru-mn", "memory.vram_limit=3.5GB"])
    text = yaml12.dump(config.model_dump(mode="json"))
    assert load(config_file=written(tmp_path, text)) == config


def test_an_empty_section_is_no_problem(tmp_path: Path) -> None:
    """`train:` with nothing below it says nothing; so does an empty file."""
    assert load(config_file=written(tmp_path, "train:\ndata:\n")) == load()
    assert load(config_file=written(tmp_path, "\n# nothing\n")) == load()


def test_all_problems_are_reported_together_with_value_origin_and_remedy(tmp_path: Path) -> None:
    """Every key that is wrong is named, with its value, where it came from, and what is right; unknown keys with the nearest."""
    file = written(
        tmp_path,
        "train: {epoch: 5, lr: fast, micro_batch: big, batch_size: 0}\nepochs: 4\npolite: idle\n"
        "checkpoint: {keep_best: off, max_write_per_day: lots}\nsettings: {vocabulry: 5, gru: {hidden: -1}}\n",
    )
    found = "\n".join(problems(config_file=file, preset="quik", sets=["seed=-1", "bogus", "train.lr=[", "train.weight_decay=.inf"]))
    for words in (
        "train.epoch (from", "did you mean train.epochs?", "train.micro_batch = big", "a whole number or 'auto'", "train.batch_size = 0",
        "at least 1", "epochs (from", "polite = idle", "a section of keys", "checkpoint.keep_best = off", "true or false",
        "'lots' is not a size",
        "settings.vocabulry", "did you mean settings.vocabulary?", "settings.gru.hidden = -1", "'quik'; did you mean 'quick'?",
        "seed = -1 (from --set)", "--set bogus: write it like", "--set train.lr=[", "train.weight_decay = inf", f"{file}",
    ):  # fmt: skip
        assert words in found, f"{words!r} is missing in\n{found}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n\tepochs: 3\n", "line 2: a tab"),
        ("train: {epochs: 3\n", "line 2"),
        ("a: 1\na: 2\n", "line 2: found duplicate key"),
        ("- 1\n- 2\n", "holds no sections"),
        ("just words", "holds no sections"),
        ("\x00", "not YAML"),
        ("[" * 3000, "nested more than 32 levels"),
    ],
)
def test_a_file_that_is_no_configuration_is_said_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    """Mistakes of YAML are told in words, with the line."""
    found = problems(config_file=written(tmp_path, text))
    assert len(found) == 1 and says in found[0] and "my.yml" in found[0]


def test_files_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    """A missing file, a folder, a giant, bytes that are no text."""
    assert "cannot be read" in problems(config_file=tmp_path / "none.yml")[0]
    assert "cannot be read" in problems(config_file=tmp_path)[0]
    giant = tmp_path / "giant.yml"
    giant.write_bytes(b" " * (5 << 20))
    assert "larger than" in problems(config_file=giant)[0]
    noise = tmp_path / "noise.yml"
    noise.write_bytes(b"\xff\xfa\x81abc")
    assert "not YAML" in problems(config_file=noise)[0]


def test_a_file_from_notepad_is_read(tmp_path: Path) -> None:
    """UTF-8 with a byte order mark, UTF-16, CRLF: what Windows' editors write."""
    text = "train:\r\n  epochs: 4\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        file = tmp_path / f"{encoding}.yml"
        file.write_bytes(text.encode(encoding))
        assert load(config_file=file).train.epochs == 4


@pytest.mark.parametrize("content", ["", " \n", "null"])
def test_an_empty_json_file_is_no_configuration(tmp_path: Path, content: str) -> None:
    """JSON has no empty document: an optimal_config.json that was broken off must not become all defaults without a word."""
    path = tmp_path / "optimal_config.json"
    path.write_text(content, encoding="utf-8")
    (found,) = problems(config_file=path)
    assert str(path) in found and "holds nothing" in found


@pytest.mark.parametrize(("sets", "says"), [
    (["train.micro_batch=64"], "larger than train.batch_size"),
    (["name=a/b"], "letters, digits"),
    (["seed=1.5"], "a whole number"),
    (["train.epochs={}"], "a whole number"),
    (["data.columns=3"], "a section of keys"),
    (["memory.ram_limit=120%"], "between 0 % and 100 %"),
    (["memory.ram_limit=5"], "'5' is 5 bytes; write it with its unit"),
    (["memory.ram_limit=5.5"], "'5.5' is 5.5 bytes; write it with its unit"),
    (["memory.ram_limit=0GB"], "'0GB' is no memory at all"),
    (["memory.vram_limit=0B"], "'0B' is no memory at all"),
    (["memory.ram_limit="], "memory.ram_limit = null (from --set): nothing is given; write it like 3.5GB, 80% or auto."),
    (["train.batch_size=1000001"], "at most 1000000"),
    (["train=5", "train.epochs=2"], "train = 5 (from --set): must be a section of keys."),
    (["settings.gru=5", "settings.gru.hidden=32"], "settings.gru = 5 (from --set): must be a section of keys."),
    (["faults.hang_limits=5", "faults.hang_limits.training=9"], "faults.hang_limits = 5 (from --set): must be a section of keys."),
    (["train.epochs=5", "train.epochs.x=1"], "train.epochs = {'x': 1} (from --set): must be a whole number."),
    (["nonsense=1"], "there is task, preset"),
    (["=3"], "write it like"),
])  # fmt: skip
def test_single_mistakes(sets: list[str], says: str) -> None:
    """Each mistake is told by what is right, and once; a value in a section's place also when the section's keys are set beside it."""
    found = problems(sets=sets)
    assert says in found[0] and len(found) == 1, found


def test_a_path_beside_a_value_for_the_data_hides_nothing() -> None:
    """--set data=x is a problem although --data sets a key of that section."""
    assert problems(sets=["data=x"], overrides={"data.path": "y"}) == ["data = x (from --set): must be a section of keys."]


def test_tasks_are_found_by_name_or_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A built-in task by name; FILE.py:Class by looking, never by running it."""
    file = tmp_path / "my task.py"
    file.write_text("raise SystemExit('run!')\nclass Mine: pass\nfrom other import Theirs\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = resolve(task="my task.py:Mine")
    assert found.config.task == f"{file}:Mine" and found.task_file == file
    assert resolve(task=f"{file}:Theirs").task_file == file
    assert "did you mean 'Mine'" in problems(task="my task.py:Mime")[0]
    assert "does not exist" in problems(task="your.py:Mine")[0]
    assert "not FILE.py:Class" in problems(task="my task.py")[0]
    assert "did you mean 'cadence'" in problems(task="cadense")[0]
    file.write_text("class Mine(:\n", encoding="utf-8")
    assert "is not Python, line 1" in problems(task="my task.py:Mine")[0]
    file.write_bytes(b"\x00")
    assert "is not Python" in problems(task="my task.py:Mine")[0]


def test_a_file_task_on_windows_has_two_colons() -> None:
    """The last colon counts."""
    path, name = catalogue.split_file_task("C:\\tasks\\my.py:Mine")
    assert (str(path), name) == ("C:\\tasks\\my.py", "Mine")
    with pytest.raises(UsageError):
        catalogue.split_file_task("C:\\tasks\\my.py")


def test_what_was_set_is_known(tmp_path: Path) -> None:
    """A task's own defaults are not what a person set; flags, files and presets are."""
    found = resolve(preset="quick", sets=["train.lr=1e-4"], overrides={"data.size": 7})
    assert found.explicit == {"preset", "train.lr", "train.epochs", "data.size"}


def test_paths_are_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon works in its home: what was typed here must mean the same there."""
    monkeypatch.chdir(tmp_path)
    assert load(overrides={"data.path": "sub/../my.tsv"}).data.path == str(tmp_path / "my.tsv")


def test_no_torch_before_every_problem_is_told(tmp_path: Path) -> None:
    """A wrong configuration is told in a fresh process that never loaded torch."""
    code = (
        "import sys\nfrom trainerd.config.load import load\n"
        "try: load(sets=['train.epoch=1', 'settings.model=gpt'])\n"
        "except Exception as error: print(error)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "2 problems" in done.stdout and done.stdout.endswith("False\n")


def test_the_json_schema_that_ships_is_the_models() -> None:
    """config/schema.json is what the model says; write it anew with `python -m trainerd.config.schema`."""
    assert schema.FILE.read_text(encoding="utf-8") == schema.text()
    assert schema.schema()["properties"]["train"]


def test_every_key_has_its_meaning() -> None:
    """The docstring under each field is its help, in every section."""

    def undocumented(model: Any, prefix: str = "") -> list[str]:
        found: list[str] = []
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                found += undocumented(field.annotation, f"{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undocumented(RunConfig) == []


@pytest.mark.parametrize(("typed", "meant"), [("epoch", "epochs"), ("LR", "lr"), ("stat", "status"), ("zzz", None), ("", None)])
def test_the_nearest_name(typed: str, meant: str | None) -> None:
    """A beginning counts more than a likeness; nothing near is none."""
    assert nearest(typed, ["epochs", "lr", "start", "status"]) == meant
