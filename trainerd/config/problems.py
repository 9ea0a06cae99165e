"""What is wrong with a configuration, in words: one line per key, with its value, where it came from, and what is right.

Must not decide what is wrong: pydantic did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from trainerd.config.nearest import nearest

_WORDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "{expected}",
}


def in_words(error: ValidationError, model: type[BaseModel], prefix: str, origins: Mapping[str, str]) -> list[str]:
    """Every problem of `error` as a line; the ways a value could have been right are joined into one line."""
    lines: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for problem in error.errors(include_url=False):
        where = _keys(problem["loc"], model)
        key = (prefix + ".".join(where)).rstrip(".")
        if problem["type"] == "extra_forbidden":
            lines.setdefault(key, []).append(_unknown(where, model, prefix))
            continue
        values.setdefault(key, problem["input"])
        lines.setdefault(key, []).append(_says(problem))
    return [_line(key, said, values, origins) for key, said in lines.items()]


def no_section(key: str, value: Any, origins: Mapping[str, str]) -> str:
    """That a value stands where a section of keys belongs."""
    return _line(key, [f"must be {_WORDS['dict_type']}"], {key: value}, origins)


def _line(key: str, said: list[str], values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    origin = f" (from {origins[key]})" if key in origins else ""
    if key not in values:
        return f"{key}{origin}: {said[0]}"
    wishes = [s.removeprefix("must be ") for s in said if s.startswith("must be ")]
    others = [s for s in said if not s.startswith("must be ")]
    text = "; ".join([*others, *([f"must be {' or '.join(dict.fromkeys(wishes))}"] if wishes else [])])
    return f"{key} = {_short(values[key])}{origin}: {text}."


def _says(problem: Any) -> str:
    context = problem.get("ctx") or {}
    if problem["type"] == "value_error":
        return str(context.get("error", problem["msg"])).rstrip(".")
    if problem["type"] == "missing":
        return "is missing"
    words = _WORDS.get(problem["type"])
    if words is None:
        return str(problem["msg"]).rstrip(".")
    return "must be " + words.format(**context)


def _keys(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The part of pydantic's location that a person wrote: without the names of the branches of a union."""
    keys: list[str] = []
    at: Any = model
    for part in loc:
        fields = at.model_fields if isinstance(at, type) and issubclass(at, BaseModel) else None
        if fields is None:
            break
        keys.append(str(part))
        at = fields[part].annotation if part in fields else None
    return keys


def _unknown(where: list[str], model: type[BaseModel], prefix: str) -> str:
    """That a key is unknown, with the nearest key of its section, else of all."""
    at: Any = model
    for part in where[:-1]:
        at = at.model_fields[part].annotation
    close = nearest(where[-1], at.model_fields)
    if close is not None:
        return f"there is no such key; did you mean {prefix}{'.'.join([*where[:-1], close])}?"
    everywhere = {key.rpartition(".")[2]: key for key in reversed(_all_keys(model))}
    close = nearest(where[-1], everywhere)
    if close is not None:
        return f"there is no such key; did you mean {prefix}{everywhere[close]}?"
    return f"there is no such key; there is {', '.join(at.model_fields)}."


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value and "\n" not in value else "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
