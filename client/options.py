"""The options that say what to train, shared by `start` and training in the foreground. Must not read what they name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from trainerd.config.load import Resolved, resolve

from . import able, choose, console, offers

_NAMES = ("task", "preset", "config", "data", "epochs", "dataset_size", "sets", "name", "no_resume")
_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--task", metavar="NAME|FILE.py:Class", shell_complete=offers.tasks, help="What to train: a built-in task, or your own."),
    click.option("--preset", metavar="NAME", shell_complete=offers.presets, help="quick, standard or extended."),
    click.option("--config", metavar="FILE.yml", shell_complete=offers.paths, help="A configuration file, YAML or JSON."),
    click.option("--data", metavar="PATH", shell_complete=offers.paths, help="File or folder to learn from; without it built-in data."),
    click.option("--epochs", metavar="N", help="Passes over the data."),
    click.option("--dataset-size", metavar="N", help="Use only N samples."),
    click.option("--set", "sets", multiple=True, metavar="section.key=value", help="Any setting, e.g. --set train.lr=1e-4; repeatable."),
    click.option("--name", metavar="RUN", help="The run's name."),
    click.option("--no-resume", is_flag=True, help="Begin a new run, even if an unfinished one would go on."),
]


def training_options(function: _F) -> _F:
    """Add the options; the command gets them as one dict of words."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def typed() -> str:
    """These options as they were typed for the command that runs now, to stand behind another one in a hint; "" where it has none."""
    context = click.get_current_context(silent=True)
    if context is None or "sets" not in context.params:
        return ""
    words: list[str] = []
    for option in context.command.params:
        value, name = context.params.get(option.name or ""), option.opts[0]
        if option.name not in _NAMES or not value:
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [name] if value is True else [word for one in values for word in (name, str(one))]
    return "".join(f" {console.quoted(word)}" for word in words)


def configuration(words: dict[str, Any], *, elsewhere: bool = False) -> Resolved:
    """The configuration these options mean, possible on this machine unless it is meant for another. Raises ConfigError with all
    problems."""
    flags = {
        "data.path": words["data"],
        "data.size": words["dataset_size"],
        "train.epochs": words["epochs"],
        "name": words["name"],
    }
    asked = resolve(words["task"], words["preset"], words["config"], words["sets"], flags)
    if not elsewhere:
        able.refuse_impossible(asked.config)
    return asked


def refuse_missing_data(asked: Resolved) -> None:
    """Raise UsageError where `start` would: data that are not there, cannot be read, or hold nothing for this task."""
    if asked.config.data.path is not None:
        choose.look_at_data(asked)
