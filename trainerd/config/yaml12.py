"""YAML by the rules of 1.2: `1e-4` is a number, `off` a word; JSON is YAML too. Must not know what the document means."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent

from trainerd.contract.errors import ConfigError

_MOST_LEVELS = 32
_HINT = "Correct it there: it is read as YAML 1.2, or as JSON."


class _Composer(Composer):
    """Builds no more than is written: an alias can make gigabytes of a few lines, and deep nesting ends the interpreter."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if self.parser.check_event(AliasEvent):
            raise ComposerError(None, None, f"*{event.anchor} repeats a part written elsewhere: write it out", event.start_mark)
        if self._level >= _MOST_LEVELS:
            raise ComposerError(None, None, f"nested more than {_MOST_LEVELS} levels deep", event.start_mark)
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


def parse(content: bytes | str, what: str) -> Any:
    """The document in `content`, None when it is empty. Raises ConfigError that names `what` and the line."""
    try:
        # pure: the C parser of the same library reads YAML 1.1, where `off` is false and 1e-4 is text.
        yaml = YAML(typ="safe", pure=True)
        yaml.Composer = _Composer
        return yaml.load(content)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None and what[:2] != "--" else ""
        raise ConfigError([f"{what}{where}: {_in_words(error)}."], _HINT) from None
    except (YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError([f"{what} is not YAML or JSON: {first_line}."], _HINT) from None


def dump(document: dict[str, Any]) -> str:
    """The document as YAML text that parse() reads back the same."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()


def _in_words(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "it is not YAML").strip()
    if "'\\t'" in problem:
        return "a tab; YAML is indented with spaces"
    # A duplicate key quotes both values; the first line says it.
    return problem.splitlines()[0].rstrip(".")
