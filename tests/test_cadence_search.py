"""CADENCE's searches and `suggest`: the prefix holds, the first words differ, an exported folder is enough, answers are quick."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainerd.config.model import DataConfig
from trainerd.contract import interpreter
from trainerd.contract.errors import Unreadable, UsageError
from trainerd.engine.task import TaskContext
from trainerd.tasks.cadence import measures, suggest
from trainerd.tasks.cadence.model import QueryModel, State
from trainerd.tasks.cadence.prepare import prepare
from trainerd.tasks.cadence.search import Completion, Prompt, complete, likely_categories, typed
from trainerd.tasks.cadence.settings import CadenceSettings, SearchSettings
from trainerd.tasks.cadence.suggest import Suggester
from trainerd.tasks.cadence.task import CadenceTask
from trainerd.tasks.cadence.vocabulary import RARE, UNKNOWN, Vocabulary, piece_tokenizer, word_tokenizer

WORDS = ["apple", "apricot", "banana", "juice", "tree", "pie", "red", "green"]


class Table(QueryModel):
    """A model that is a table: which word follows which, in which category. Unknown words and foreign ends are tempting."""

    def __init__(self, vocabulary: Vocabulary, after: dict[tuple[int, str], dict[str, float]]) -> None:
        super().__init__(vocabulary.num_tokens, vocabulary.num_outputs, 1, 1)
        marks = {"<end>": -1, **{word: vocabulary.encode_word(word)[0] for word in WORDS}}
        self.table = torch.full((vocabulary.num_marks, vocabulary.num_tokens, vocabulary.num_outputs), -12.0)
        self.table[:, :, [UNKNOWN, RARE]] = math.log(0.6)
        for (category, word), following in after.items():
            row = self.table[category, vocabulary.begin(category) if word == "<begin>" else marks[word]]
            row[vocabulary.num_words :] = math.log(0.04)  # the other categories' ends
            row[vocabulary.end(category)] = -12.0
            for other, chance in following.items():
                row[vocabulary.end(category) if other == "<end>" else marks[other]] = math.log(chance)

    def run(self, inputs: torch.Tensor, categories: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        hidden = torch.stack([categories.unsqueeze(1).expand_as(inputs), inputs], -1)
        return hidden, [inputs[:, -1]]

    def next_words(self, inputs: torch.Tensor, categories: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        hidden, state = self.run(inputs, categories, state)
        return torch.log_softmax(self.table[hidden[:, -1, 0], hidden[:, -1, 1]], -1), state


AFTER = {
    (0, "<begin>"): {"apple": 0.5, "banana": 0.3, "apricot": 0.05},
    (0, "apple"): {"juice": 0.4, "pie": 0.3, "<end>": 0.2},
    (0, "banana"): {"<end>": 0.5, "tree": 0.3},
    (0, "apricot"): {"pie": 0.8},
    (0, "juice"): {"<end>": 0.6, "red": 0.2, "green": 0.1},
    (0, "red"): {"<end>": 0.9},
    (0, "green"): {"<end>": 0.9},
    (0, "pie"): {"<end>": 0.7, "green": 0.1},
    (0, "tree"): {"<end>": 0.9},
    (1, "<begin>"): {"tree": 0.9},
    (1, "tree"): {"<end>": 0.6, "apple": 0.3},
    (1, "apple"): {"<end>": 0.9},
}


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(word_tokenizer(WORDS), ["Food", "Garden"], [80, 20])


@pytest.fixture
def model(vocabulary: Vocabulary) -> QueryModel:
    return Table(vocabulary, AFTER).eval()


def texts(found: list[Completion]) -> list[str]:
    return [completion.text for completion in found]


def one(model: QueryModel, vocabulary: Vocabulary, prompt: Prompt, n: int = 5, **search: object) -> list[Completion]:
    return complete(model, vocabulary, [prompt], n, SearchSettings.model_validate(search))[0]


@pytest.mark.parametrize("method", ["plain", "dynamic"])
def test_completions_are_real_continuations_in_order(method: str, model: QueryModel, vocabulary: Vocabulary) -> None:
    """Each completion ends with its own category's end, holds known words only, and carries its exact log-probability."""
    found = one(model, vocabulary, Prompt(0), method=method)
    assert texts(found)[0] == " banana"
    assert all(set(text.split()) <= set(WORDS) and text.startswith(" ") for text in texts(found))
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True) and len(set(texts(found))) == 5
    assert [c.score for c in found] == pytest.approx([chance(model, vocabulary, c.text) for c in found], abs=1e-5)


def chance(model: QueryModel, vocabulary: Vocabulary, text: str) -> float:
    """The log-probability of a text and its end, word by word."""
    tokens = [vocabulary.begin(0), *vocabulary.encode(text), vocabulary.end(0)]
    category = torch.tensor([0])
    return sum(float(model.next_words(torch.tensor([[before]]), category)[0][0, after]) for before, after in pairwise(tokens))


def test_plain_beam_finds_the_most_probable(model: QueryModel, vocabulary: Vocabulary) -> None:
    """A beam wide enough finds exactly the most probable of all texts, whatever their beginnings."""
    every = [" " + " ".join(some) for length in (1, 2, 3) for some in product(WORDS, repeat=length)]
    best = sorted(every, key=lambda text: -chance(model, vocabulary, text))[:5]
    assert texts(one(model, vocabulary, Prompt(0), 5, method="plain", width=30)) == best


def test_dynamic_beam_spreads_over_first_words(model: QueryModel, vocabulary: Vocabulary) -> None:
    """Dynamic search shows more first words than plain search; the thresholds decide which."""
    search = {"method": "dynamic", "p1": 0.03, "p2": 0.1, "gamma": 1}
    dynamic = one(model, vocabulary, Prompt(0), 6, **search)
    assert {text.split()[0] for text in texts(dynamic)} == {"apple", "banana", "apricot"}
    assert " apricot pie" in texts(dynamic)
    strict = one(model, vocabulary, Prompt(0), 4, **{**search, "p1": 0.2})
    assert {text.split()[0] for text in texts(strict)} == {"apple", "banana"}


def test_where_few_words_are_probable_the_beams_are_wider(model: QueryModel, vocabulary: Vocabulary) -> None:
    """With one probable beginning the wanted number comes from wider beams, not from improbable words."""
    found = one(model, vocabulary, Prompt(0, rest=" apple"), 4, method="dynamic", p1=0.3, p2=0.35, p3=0.02, gamma=1)
    assert texts(found) == [" apple juice", " apple juice red", " apple juice green"]


@pytest.mark.parametrize("method", ["plain", "dynamic"])
def test_the_prefix_holds(method: str, model: QueryModel, vocabulary: Vocabulary) -> None:
    """The last word may be incomplete; every completion goes on with what was typed, and adds at least a word."""
    assert typed(vocabulary, "  Banana  ap") == ("banana", (vocabulary.encode("banana")[0],), " ap")
    assert typed(vocabulary, "apple ") == ("apple", (vocabulary.encode("apple")[0],), " ")
    assert typed(vocabulary, "") == ("", (), " ")
    assert typed(vocabulary, "xyz") == ("xyz", (UNKNOWN,), " ")
    for text, context, rest in (typed(vocabulary, prefix) for prefix in ("ap", "apple", "apple j", "apple ", "")):
        found = one(model, vocabulary, Prompt(0, context, rest), 5, method=method)
        assert found and all(completion.text.startswith(rest) and completion.text.strip() for completion in found), text


def test_many_prompts_are_as_one_by_one(model: QueryModel, vocabulary: Vocabulary) -> None:
    """Searching for several prompts at once, of any lengths and categories, gives what each alone gives."""
    prompts = [Prompt(0), Prompt(1), Prompt(0, tuple(vocabulary.encode("apple juice")), " "), Prompt(0, rest=" ap"), Prompt(1, (), " t")]
    for method in ("plain", "dynamic"):
        settings = SearchSettings(method=method)
        together = complete(model, vocabulary, prompts, 3, settings)
        alone = [complete(model, vocabulary, [prompt], 3, settings)[0] for prompt in prompts]
        assert [texts(some) for some in together] == [texts(some) for some in alone]
    assert texts(together[1])[:2] == [" tree", " tree apple"]


def test_what_never_ends_is_shown_unfinished(vocabulary: Vocabulary) -> None:
    """When nothing comes to an end within delta words, what there is is shown."""
    model = Table(vocabulary, {(0, "<begin>"): {"red": 0.9}, (0, "red"): {"red": 0.9}}).eval()
    for method in ("plain", "dynamic"):
        found = one(model, vocabulary, Prompt(0), 1, method=method, delta=4, width=1, gamma=1, groups=1)
        assert texts(found) == [" red red red red"]


def test_categories_are_ranked_by_the_prefix(model: QueryModel, vocabulary: Vocabulary) -> None:
    """Without a category the most probable ones are searched: by how frequent they are, and how probable the prefix is there."""
    assert [number for number, _ in likely_categories(model, vocabulary, (), " ", 3)] == [0, 1]
    assert [number for number, _ in likely_categories(model, vocabulary, (), " tre", 3)] == [1]
    context = tuple(vocabulary.encode("tree"))
    assert likely_categories(model, vocabulary, context, " ", 1)[0][0] == 1
    plain = Vocabulary(vocabulary.tokenizer, ["Food", "Garden"], [1, 1], conditioned=False)
    assert likely_categories(model, plain, context, " ", 3) == [(0, 0.0)]
    found = Suggester(model, vocabulary, CadenceSettings()).suggest("t")
    assert (found[0].text, found[0].category) == ("tree", "Garden")
    both = {one.category for one in Suggester(model, vocabulary, CadenceSettings()).suggest("")}
    assert both == {"Food", "Garden"}


@pytest.mark.parametrize("method", ["plain", "dynamic"])
def test_pieces_spell_the_prefix(method: str) -> None:
    """With pieces of words the typed letters are spelt exactly, through whatever pieces, and the text goes on from there."""
    texts_learnt = ["samsung galaxy s9", "samsung galaxy s10", "sony xperia", "sandisk card"]
    voc = Vocabulary(piece_tokenizer(iter(texts_learnt * 20), 60), ["Phones"], [1])
    torch.manual_seed(0)
    model = CadenceTask({"gru": {"hidden": 8}}).build_model(voc).eval()
    for prefix in ("sam", "samsung gal", "s", "samsung g", "xq", "samsung "):
        before, context, rest = typed(voc, prefix)
        for completion in one(model, voc, Prompt(0, context, rest), 4, method=method, delta=6):
            assert (before + completion.text).strip().startswith(prefix.strip())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder a run leaves, of an untrained model of the real size."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("models") / "run"
    folder.mkdir()
    settings = CadenceSettings(min_frequency=1)
    prepare(settings, DataConfig(size=20_000), 0, cache, lambda *what: None)
    task = CadenceTask(settings)
    task.bind(TaskContext(torch.device("cpu"), torch.float32, 0, cache, DataConfig()))
    torch.manual_seed(0)
    model = task.model()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"settings": settings.model_dump()}), encoding="utf-8")
    task.export(model, folder)
    return folder


def run(*words: str, typed_in: str = "") -> subprocess.CompletedProcess[str]:
    """The command, as the client starts it."""
    command = interpreter.command("trainerd.tasks.cadence.suggest", *words)
    return subprocess.run(command, env=interpreter.environment(), input=typed_in, capture_output=True, encoding="utf-8", timeout=120)


def test_suggest_answers_from_the_folder_alone(exported: Path) -> None:
    """In a process of its own: completions of the prefix, as text and as one JSON document; a near category is understood."""
    plain = run("--model", str(exported), "--category", "mobile phones", "-n", "5", "apple ip")
    assert plain.returncode == 0 and plain.stderr == f"{exported}\n"
    lines = plain.stdout.splitlines()
    assert len(lines) == 5 and all(line.startswith("apple ip") for line in lines)
    document = json.loads(run("--model", str(exported), "--json", "--beam", "plain", "apple", "ip").stdout)
    assert document["prefix"] == "apple ip" and document["unknown"] == []
    assert all({"text", "category", "score"} == set(one) and one["text"].startswith("apple ip") for one in document["suggestions"])


def test_suggest_says_what_is_wrong(exported: Path, tmp_path: Path) -> None:
    """An unknown category names the nearest; a missing, foreign or damaged model is named; wrong words are exit 2."""
    wrong = run("--model", str(exported), "--category", "Mobil Phone", "x")
    assert wrong.returncode == 2 and "Did you mean 'Mobile Phones'? It knows: " in wrong.stderr and "Traceback" not in wrong.stderr
    assert wrong.stderr.startswith("Error: The model knows no category 'Mobil Phone'.\n") and wrong.stdout == ""
    told = run("--model", str(exported), "--category", "phones", "--json", "x")
    assert told.returncode == 2 and "Mobile Phones" in json.loads(told.stdout)["hint"] and told.stderr == ""
    suggester = Suggester.load(exported)
    with pytest.raises(UsageError, match="It knows: Beauty"):
        suggester.suggest("x", "zzzz")
    with pytest.raises(UsageError, match="no trained model"):
        Suggester.load(tmp_path)
    assert suggest.main(["--model", str(tmp_path), "x"]) == 2
    for name, content in (
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("model.safetensors", b"x" * 100),
        ("tokenizer.json", b"{"),
        ("categories.json", b""),
    ):
        copy = tmp_path / name.replace(".", "-")
        copy.mkdir(exist_ok=True)
        for file in exported.iterdir():
            (copy / file.name).write_bytes(content if file.name == name else file.read_bytes())
        with pytest.raises(Unreadable):
            Suggester.load(copy)
    for words in (["-n", "0"], ["-n", "x"], ["--serve", "prefix"], ["--beam", "wide"], ["--bogus"]):
        assert suggest.main(["--model", str(exported), *words]) == 2


def test_a_config_that_does_not_fit_is_told_in_words(exported: Path, tmp_path: Path) -> None:
    """Each wrong setting with its value and what is right; another task's model is called by its name."""
    document = json.loads((exported / "config.json").read_text("utf-8"))
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    wrong = {"settings": {**document["settings"], "vocabulary": -5, "model": "lstm"}}
    (tmp_path / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(Unreadable, match=r"settings\.model = lstm: must be 'gru' or .* settings\.vocabulary = -5: must be at least 8\."):
        Suggester.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**document, "task": "fusion"}), encoding="utf-8")
    with pytest.raises(UsageError, match="of the task 'fusion'"):
        Suggester.load(tmp_path)


def test_a_person_is_told_which_model_answers_and_what_it_does_not_know(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Beside the answer: the run and when it was trained, and a word it reads as any rare one; JSON and --serve stay bare."""
    record = exported / "result.json"
    record.write_text(json.dumps({"run": "cadence-1", "finished_at": 0.0}), encoding="utf-8")
    try:
        assert suggest.main(["--model", str(exported), "apple", "qwxyzzy", "ip"]) == 0
        told = capfd.readouterr()
        assert told.err.startswith("cadence-1, trained ") and " 19" in told.err
        assert "Not known to this model, and read as any rare word: qwxyzzy." in told.err and "qwxyzzy" in told.out
        assert suggest.main(["--model", str(exported), "--json", "apple", "qwxyzzy", "ip"]) == 0
        told = capfd.readouterr()
        assert json.loads(told.out)["unknown"] == ["qwxyzzy"] and told.err == ""
    finally:
        record.unlink()


def test_serve_answers_each_prefix_at_once(exported: Path) -> None:
    """--serve flushes every answer before it reads on; a wrong category does not end it. (How fast: docs/log.md.)"""
    command = interpreter.command("trainerd.tasks.cadence.suggest", "--model", str(exported), "--serve", "--json")
    env = {name: value for name, value in interpreter.environment().items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdin and process.stdout
        for prefix in ["warm up", "app", "Mobile Phones\tsamsung ga", "nowhere\tx", "", "laptop", "TVs?\t", *["red dre"] * 6]:
            process.stdin.write(prefix + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if "?" in prefix or "nowhere" in prefix:
                assert "knows no category" in answer["error"]
            else:
                assert answer["suggestions"]
        process.stdin.close()
        assert process.wait(60) == 0


def test_serve_in_words(exported: Path) -> None:
    """Without --json every answer is a block of lines that ends in an empty one, with the category beside where none was given."""
    done = run("--model", str(exported), "--serve", "-n", "2", typed_in="Laptops\tlenovo\nhp\r\nnone\tx\n")
    blocks = done.stdout.split("\n\n")
    assert done.returncode == 0 and len(blocks) == 4 and blocks[3] == ""
    assert all(line.startswith("lenovo") for line in blocks[0].splitlines())
    assert all("  " in line for line in blocks[1].splitlines()) and blocks[2].startswith("Error: ")


def test_measures_by_hand(vocabulary: Vocabulary) -> None:
    """success, MRR, top-1, consistency and distinct-n are what a calculation by hand gives."""
    found = [
        ("apple juice", 0, [Completion("apple juice", 0.0), Completion("apple pie", -1.0)]),
        ("tree", 1, [Completion("red tree", 0.0), Completion("tree", -1.0)]),
        ("banana", 0, [Completion("banana tree", 0.0)]),
    ]
    counts = torch.zeros(vocabulary.num_words, 2, dtype=torch.int64)
    for word, category in (("apple", 0), ("juice", 0), ("pie", 0), ("banana", 0), ("tree", 1)):
        counts[vocabulary.encode(word)[0], category] = 10
    values = measures._scored(vocabulary, measures.CategoryGuess(counts.numpy().astype("uint32")), found)
    assert (
        values["success@10"] == pytest.approx(2 / 3) and values["mrr@10"] == pytest.approx(0.5) and values["top1"] == pytest.approx(1 / 3)
    )
    assert values["distinct1"] == pytest.approx((3 / 4 + 2 / 3 + 1) / 3) and values["distinct2"] == 1.0
    assert values["category_consistency"] >= 0.8
    assert set(measures._scored(vocabulary, lambda tokens: 0, []).values()) == {0.0}


def test_suggest_needs_no_trainer() -> None:
    """Answering loads the model and the search, not the training loop."""
    program = "import sys, trainerd.tasks.cadence.suggest\nassert not {'accelerate', 'trainerd.engine.loop'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=interpreter.environment())
