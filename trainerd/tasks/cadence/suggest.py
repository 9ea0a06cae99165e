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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainerd.contract.errors import TrainerdError, Unreadable, UsageError
from trainerd.tasks.cadence.model import QueryModel, build
from trainerd.tasks.cadence.search import Prompt, complete, likely_categories, typed
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.text import visible
from trainerd.tasks.cadence.vocabulary import Vocabulary

_CATEGORIES_TRIED = 3


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
            settings = CadenceSettings.model_validate(document["settings"])
            vocabulary = Vocabulary.load(folder)
            model = build(settings, vocabulary.num_tokens, vocabulary.num_outputs, vocabulary.num_marks)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ValidationError, SafetensorError) as error:
            message = f"The model in {folder} cannot be read: {str(error).splitlines()[0]}"
            raise Unreadable(message, "Is it the folder of a CADENCE model?") from None
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

    def _category(self, name: str) -> int:
        number = self.vocabulary.category(visible(name))
        if number is not None:
            return number
        names = self.vocabulary.categories
        folded = {other.casefold(): other for other in names}
        near = difflib.get_close_matches(name.casefold(), folded, 1, 0.4)
        hint = f"Did you mean {folded[near[0]]!r}?" if near else f"It knows: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}."
        raise UsageError(f"The model knows no category {name!r}.", hint)


def serve(suggester: Suggester, lines: Iterable[str], out: TextIO, category: str | None, n: int, method: str | None, as_json: bool) -> None:
    """Answers every line, a prefix or "category<TAB>prefix", with a block of lines that ends in an empty one (JSON: one line)."""
    for line in lines:
        line = line.rstrip("\r\n")
        name, tab, prefix = line.partition("\t")
        wanted = (name.strip() or None) if tab else category
        try:
            answer = _shown(suggester.suggest(prefix if tab else line, wanted, n, method), prefix if tab else line, wanted, as_json)
        except UsageError as error:
            answer = json.dumps({"error": error.message, "hint": error.hint}) if as_json else f"error: {error}"
        print(answer if as_json else f"{answer}\n", file=out, flush=True)


def _shown(found: Sequence[Suggestion], prefix: str, category: str | None, as_json: bool) -> str:
    if as_json:
        rows: list[dict[str, Any]] = [{"text": one.text, "category": one.category, "score": round(one.score, 4)} for one in found]
        return json.dumps({"schema": 1, "prefix": prefix, "suggestions": rows}, ensure_ascii=False)
    if category is not None or not found:
        return "\n".join(one.text for one in found)
    width = max(len(one.text) for one in found)
    return "\n".join(f"{one.text:<{width}}  {one.category}" for one in found)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainerd suggest", description="Completions of a prefix from a trained CADENCE model.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a finished run, models/RUN")
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
        parser.error(f"-n {asked.n}: between 1 and 100")
    if asked.serve and asked.prefix:
        parser.error("--serve reads prefixes from standard input; leave the prefix out")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    asked = _arguments(words)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        suggester = Suggester.load(asked.model)
        prefix = " ".join(asked.prefix)
        if asked.serve:
            serve(suggester, sys.stdin, sys.stdout, asked.category, asked.n, asked.beam, asked.json)
        else:
            print(_shown(suggester.suggest(prefix, asked.category, asked.n, asked.beam), prefix, asked.category, asked.json))
    except TrainerdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Who read our answers has gone (`| head`): there is nobody to tell, and Python must not flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
