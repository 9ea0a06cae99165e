"""`suggest`: CADENCE's own command, run in a child with torch; its words go through unread. Must not import torch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import click

from trainerd.contract import files, interpreter, runs, status
from trainerd.contract.errors import TrainerdError, UsageError
from trainerd.contract.paths import Home

from .. import console
from ..cli import pass_home

_CALLED = "TRAINERD_CALLED"  # read by the child for its help and hints


@click.command("suggest", context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@pass_home
def command(home: Home, words: tuple[str, ...]) -> int:
    """Ask a trained CADENCE model for completions: suggest --model models/RUN --category NAME PREFIX (more with --help)."""
    child = interpreter.command("trainerd.tasks.cadence.suggest", *_with_model(home, list(words)))
    environment = {**interpreter.environment(), _CALLED: console.program()}
    with subprocess.Popen(child, env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reaches the child as well; it ends, and its exit code is the answer


def _with_model(home: Home, words: list[str]) -> list[str]:
    """The words with --model: the newest finished one when none is named; a name is looked for here, then in the home."""
    if any(word in ("-h", "--help") for word in words):
        return words
    places = [i for i, word in enumerate(words) if word == "--model" or word.startswith("--model=")]
    if not places:
        results = sorted(filter(_is_cadence, home.models.glob("*/result.json")), key=lambda path: path.stat().st_mtime)
        if not results:
            raise _no_model(home)
        return ["--model", str(results[-1].parent), *words]
    at, word = places[-1], words[places[-1]]
    if "=" in word:
        words[at : at + 1] = word.split("=", 1)
    if at + 1 < len(words):
        words[at + 1] = _found(home, words[at + 1])
    return words


def _no_model(home: Home) -> UsageError:
    """That there is none, and what brings one: the end of what is under way, of what is unfinished, or a start."""
    program, reading = console.program(), status.read(home)
    message = f"There is no finished CADENCE model in {home.models}."
    if reading.alive and reading.state != status.PAUSED:
        return UsageError(message, f"It appears when the training has ended. See how far it is: {program} status")
    if any(not _finished(home, name) for name in runs.names(home)):
        return UsageError(message, f"It appears when the training has ended. Go on with it: {program} resume")
    return UsageError(message, f"Train one: {program} start --preset quick\nOr name one from elsewhere: --model FOLDER")


def _finished(home: Home, name: str) -> bool:
    try:
        return runs.read(home, name).finished
    except (OSError, TrainerdError):
        return True  # deleted or damaged: nothing to wait for


def _is_cadence(result: Path) -> bool:
    try:
        return files.read_json(result, "The record of a model").get("task") == "cadence"
    except (OSError, TrainerdError):
        return False


def _found(home: Home, model: str) -> str:
    candidates = (Path(model), home.root / model, home.models / model)
    return str(next((path for path in candidates if path.is_dir()), model))
