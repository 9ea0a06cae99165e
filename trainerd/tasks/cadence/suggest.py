"""`trainerd suggest`: completions of a prefix from an exported model, once or line by line. Must not train or need the home.

Everything it needs lies in the model's folder: model.safetensors, config.json, tokenizer.json, categories.json.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainerd.config.problems import in_words
from trainerd.contract.errors import TrainerdError, Unreadable, UsageError
from trainerd.tasks.cadence.model import QueryModel, build
from trainerd.tasks.cadence.search import Prompt, complete, likely_categories, typed
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.text import visible
from trainerd.tasks.cadence.vocabulary import RARE, UNKNOWN, Vocabulary

CALLED = "TRAINERD_CALLED"
"""How the client that runs this is called, for its help and hints."""
_TASK = "cadence"
_CATEGORIES_TRIED = 3
_NEAREST = 3
_INTERRUPTED = 130
_IS_IT = "Is it the folder of a CADENCE model? Name another with --model models/RUN."


@dataclass(frozen=True)
class Suggestion:
    """A query somebody may be typing."""

    text: str
    category: str
    score: float
    """Log-probability of what was added."""


class Suggester:
    """A model ready to answer."""

    def __init__(self, model: QueryModel, vocabulary: Vocabulary, settings: CadenceSettings) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.settings = settings

    @classmethod
    def load(cls, folder: Path) -> Suggester:
        """The model in an exported folder. Raises UsageError or Unreadable, with what to do."""
        if not (folder / "model.safetensors").is_file():
            hint = "Name the folder of a finished run: --model models/RUN. A run that has not finished has none yet."
            raise UsageError(f"There is no trained model in {folder}.", hint)
        try:
            document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if document.get("task", _TASK) != _TASK:
                raise UsageError(f"The model in {folder} is of the task {document['task']!r}.", "This command asks CADENCE models.")
            settings = CadenceSettings.model_validate(document["settings"])
            vocabulary = Vocabulary.load(folder)
            model = build(settings, vocabulary.num_tokens, vocabulary.num_outputs, vocabulary.num_marks)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except ValidationError as error:
            wrong = " ".join(in_words(error, CadenceSettings, "settings.", {}))
            raise Unreadable(f"{folder / 'config.json'} is not of a CADENCE model of this trainerd: {wrong}", _IS_IT) from None
        except KeyError as error:
            raise Unreadable(f"The model in {folder} cannot be read: {error.args[0]!r} is missing in config.json.", _IS_IT) from None
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise Unreadable(f"The model in {folder} cannot be read: {str(error).splitlines()[0]}", _IS_IT) from None
        return cls(model, vocabulary, settings)

    def suggest(self, prefix: str, category: str | None = None, n: int = 10, method: str | None = None) -> list[Suggestion]:
        """Up to `n` completions, the most probable first; without a category over those in which the prefix is most probable.

        Raises UsageError for a category the model does not know.
        """
        search = self.settings.search.model_copy(update={"method": method} if method else {})
        before, context, rest = typed(self.vocabulary, prefix)
        if category is None:
            chosen = likely_categories(self.model, self.vocabulary, context, rest, _CATEGORIES_TRIED)
        else:
            chosen = [(self._category(category), 0.0)]
        prompts = [Prompt(number, context, rest) for number, _ in chosen]
        found: dict[str, Suggestion] = {}
        for (number, already), completions in zip(chosen, complete(self.model, self.vocabulary, prompts, n, search), strict=True):
            for completion in completions:
                text = (before + completion.text).strip()
                suggestion = Suggestion(text, self.vocabulary.categories[number], already + completion.score)
                if text not in found or found[text].score < suggestion.score:
                    found[text] = suggestion
        return sorted(found.values(), key=lambda suggestion: -suggestion.score)[:n]

    def unknown(self, prefix: str) -> list[str]:
        """The complete words of a prefix that the model was not taught: each counts as any rare word."""
        before = typed(self.vocabulary, prefix)[0]  # without the word that is being typed, when some known one begins so
        return [word for word in dict.fromkeys(before.split()) if {UNKNOWN, RARE} & set(self.vocabulary.encode_word(word))]

    def _category(self, name: str) -> int:
        number = self.vocabulary.category(visible(name))
        if number is not None:
            return number
        names = self.vocabulary.categories
        folded = {other.casefold(): other for other in names}
        within = [other for key, other in folded.items() if name.strip() and name.strip().casefold() in key]
        close = [folded[key] for key in difflib.get_close_matches(name.casefold(), folded, _NEAREST, 0.5)]
        near = list(dict.fromkeys([*within, *close]))[:_NEAREST]
        known = f"It knows: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
        hint = f"Did you mean {' or '.join(map(repr, near))}? {known}" if near else known
        raise UsageError(f"The model knows no category {name!r}.", hint)


@dataclass(frozen=True)
class Asking:
    """How to answer: in which category (None: the most probable), how many, by which search, and whether as JSON."""

    category: str | None
    n: int
    method: str | None
    as_json: bool


def serve(suggester: Suggester, lines: Iterable[str], out: TextIO, asking: Asking) -> None:
    """Answers every line, a prefix or "category<TAB>prefix", with a block of lines that ends in an empty one (JSON: one line)."""
    for line in lines:
        line = line.rstrip("\r\n")
        name, tab, prefix = line.partition("\t")
        this = replace(asking, category=name.strip() or None) if tab else asking
        try:
            answer = answered(suggester, prefix if tab else line, this)
        except UsageError as error:
            answer = json.dumps({"error": error.message, "hint": error.hint}) if asking.as_json else f"Error: {error}"
        print(answer if asking.as_json else f"{answer}\n", file=out, flush=True)


def answered(suggester: Suggester, prefix: str, asking: Asking) -> str:
    """The completions as text, or as one JSON object. Raises UsageError."""
    found = suggester.suggest(prefix, asking.category, asking.n, asking.method)
    if asking.as_json:
        rows: list[dict[str, Any]] = [{"text": one.text, "category": one.category, "score": round(one.score, 4)} for one in found]
        document = {"schema": 1, "prefix": prefix, "suggestions": rows, "unknown": suggester.unknown(prefix)}
        return json.dumps(document, ensure_ascii=False)
    if asking.category is not None or not found:
        return "\n".join(one.text for one in found)
    width = max(len(one.text) for one in found)
    return "\n".join(f"{one.text:<{width}}  {one.category}" for one in found)


def introduced(folder: Path) -> str:
    """Which model answers, and since when it is there."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        when = time.strftime("%d %b %Y %H:%M", time.localtime(float(record["finished_at"])))
        return f"{record['run']}, trained {when}"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return str(folder)  # copied without its record


def remarks(suggester: Suggester, prefix: str, answer: str) -> list[str]:
    """What a person should know about an answer."""
    unknown = suggester.unknown(prefix)
    found = [f"Not known to this model, and read as any rare word: {', '.join(unknown)}."] if unknown else []
    return found if answer else [*found, "It knows no completion of this."]


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong as every command does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.", f"See: {self.prog} --help")


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    called = os.environ.get(CALLED, "trainerd")
    parser = _Parser(prog=f"{called} suggest", description="Completions of a prefix from a trained CADENCE model.")
    needed = CALLED not in os.environ  # the client looks for the newest one by itself
    parser.add_argument("--model", type=Path, required=needed, metavar="DIR", help="folder of a finished run, models/RUN; else the newest")
    parser.add_argument("--category", help="complete in this category; without it, in the most probable ones")
    parser.add_argument(
        "--beam", choices=["dynamic", "plain"], help="dynamic: the paper's search, more diverse (default); plain: beam search"
    )
    parser.add_argument("-n", type=int, default=10, metavar="N", help="completions to print (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON: one document, or with --serve one line per prefix")
    parser.add_argument("--serve", action="store_true", help="read prefixes from standard input, or category<TAB>prefix, and answer each")
    parser.add_argument("prefix", nargs="*", help="what was typed so far; the last word may be incomplete")
    asked = parser.parse_args(words)
    if not 1 <= asked.n <= 100:
        parser.error(f"-n {asked.n}: it must be between 1 and 100")
    if asked.serve and asked.prefix:
        parser.error("--serve reads prefixes from standard input; leave the prefix out")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = sys.argv[1:] if words is None else words
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        _answer(_arguments(words))
    except TrainerdError as error:
        return _explain(error, "--json" in words)
    except BrokenPipeError:
        # Who read our answers has gone (`| head`): there is nobody to tell, and Python must not flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _answer(asked: argparse.Namespace) -> None:
    suggester = Suggester.load(asked.model)
    asking = Asking(asked.category, asked.n, asked.beam, asked.json)
    if asked.serve:
        if sys.stdin.isatty():
            print(f"{introduced(asked.model)}. Type a prefix, then Enter; Ctrl-C ends.", file=sys.stderr, flush=True)
        serve(suggester, sys.stdin, sys.stdout, asking)
        return
    prefix = " ".join(asked.prefix)
    answer = answered(suggester, prefix, asking)
    if not asked.json:
        for line in (introduced(asked.model), *remarks(suggester, prefix, answer)):
            print(line, file=sys.stderr, flush=True)  # beside the answer, which another program may read
    if answer:
        print(answer)


def _explain(error: TrainerdError, as_json: bool) -> int:
    """An error in the form that every command gives it."""
    if as_json:
        print(json.dumps({"schema": 1, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}, indent=1))
    else:
        print(f"Error: {error.message}" + (f"\n{error.hint}" if error.hint else ""), file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
