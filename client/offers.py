"""What a shell may offer at a place of the command line: presets, tasks, runs, files. Must not fail, whatever the home holds."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from trainerd.contract import runs
from trainerd.contract.paths import Home


def presets(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    from trainerd.config import catalogue  # pydantic, which only this question needs

    return [name for name in catalogue.preset_names() if name.startswith(begun)]


def tasks(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """A built-in task, else a person's own file."""
    from trainerd.config import catalogue

    built_in = [CompletionItem(name) for name in catalogue.BUILTIN if name.startswith(begun)]
    return built_in or [CompletionItem(begun, type="file")]


def paths(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="file")]


def run_names(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    home = context.find_object(Home)
    return [] if home is None else [name for name in runs.names(home) if name.startswith(begun)]
