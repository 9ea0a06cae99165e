"""The commands by name, each imported only when it is typed. Must not do what a command does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from trainerd.contract.errors import EXIT_USAGE, UsageError
from trainerd.contract.paths import Home
from trainerd.contract.requests import MOST_SECONDS

from . import console
from .seconds import Seconds

# Verb -> one line of help; the file is commands/<verb>.py. Kept here so that --help imports nothing else.
COMMANDS = {
    "start": "Begin a training in the background, or go on with an unfinished one.",
    "plan": "What a training would need, and whether it fits.",
    "status": "What is happening now, or how it ended.",
    "monitor": "Watch it live.",
    "stop": "Save a checkpoint and end.",
    "pause": "Save a checkpoint and free RAM and GPU.",
    "resume": "Go on after a pause, a stop or a reboot.",
    "save": "Write a checkpoint now.",
    "logs": "Show what the trainer printed.",
    "runs": "List, show or delete runs.",
    "doctor": "Check this machine, and say what to mend.",
    "autostart": "Whether a training goes on by itself after a reboot.",
    "selftest": "Prove on this machine that kills and damage lose nothing.",
    "suggest": "Ask a trained CADENCE model for completions.",
    "completion": "Print the script that completes commands in your shell.",
}
_HIDDEN = ("menu", "foreground", "login", "memory")
_PRESETS = ("quick", "standard", "extended")  # which the launcher takes in the place of a command
ASKING = "_TRAINERD_COMPLETE"
"""In the environment when a shell asks how a line may go on: the same name however we are called."""
pass_home = click.make_pass_decorator(Home)


timeout = click.option(
    "--timeout", type=Seconds(0.1, MOST_SECONDS), default=60.0, metavar="S", show_default=True, help="Wait at most S seconds."
)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS and name not in _HIDDEN:
            return None
        command: click.Command = import_module(f".commands.{name}", __package__).command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands and their options; behind the launcher the presets too."""
        found = [CompletionItem(verb, help=text) for verb, text in COMMANDS.items()]
        found += [CompletionItem(name, help=f"Start with the preset {name}.") for name in _PRESETS if _by_launcher()]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(item for item in found if str(item.value).startswith(incomplete)), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list without importing a single command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """A mistyped command names the nearest one."""
        name = args[0]
        if ctx.resilient_parsing and _by_launcher() and name in _PRESETS:
            return "start", self.get_command(ctx, "start"), args[1:]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from trainerd.config.nearest import nearest

            close = nearest(name, COMMANDS)
            instead = f" Did you mean {close!r}?" if close else ""
            ctx.fail(f"There is no command {name!r}.{instead}")
        return super().resolve_command(ctx, args)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--home", metavar="DIR", expose_value=False, help="The folder that holds everything; before or after the command.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=lambda c, _, v: _version(c, v))
def group() -> None:
    """A background trainer for an ordinary laptop. Start it once, and it finishes."""


def _by_launcher() -> bool:
    return Path(sys.argv[0]).stem == "start_training"


def _version(context: click.Context, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    from importlib import metadata

    try:
        console.say(f"trainerd {metadata.version('trainerd')}")
    except metadata.PackageNotFoundError:
        console.say("trainerd, from a checkout that is not installed")
    context.exit()


def _door(words: Sequence[str]) -> tuple[click.Command, str, Sequence[str]]:
    """What is called, under which name, with which words: memory_optimizer.py has commands of its own."""
    if console.by_memory_door() and words[:1] == ["memory"]:
        memory: click.Command = import_module(".commands.memory", __package__).command
        return memory, console.memory_program(), words[1:]
    return group, console.program(), words


def run(words: Sequence[str], home: Home) -> int:
    """Run one command line; returns the exit code. Commands return theirs, None meaning 0."""
    called, name, words = _door(words)
    try:
        result: Any = called.main(list(words), prog_name=name, complete_var=ASKING, standalone_mode=False, obj=home)
        return int(result or 0)
    except click.exceptions.Exit as left:
        return left.exit_code
    except SystemExit:
        return 0  # click's own end when the reader of a pipe has enough, and after answering a completion
    except click.Abort:
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        asked = f"{context.command_path} --help" if context else f"{console.program()} --help"
        raise UsageError(error.format_message(), f"See: {asked}") from None
