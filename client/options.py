"""The options that say what to train, shared by `start` and training in the foreground. Must not read what they name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from trainerd.config.load import Resolved, resolve

from . import able, choose, offers

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
