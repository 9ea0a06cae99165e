"""`completion`: prints the script with which a shell completes our commands. Must not change any of the person's files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from trainerd.contract.errors import UsageError

from .. import console

_WHERE = {
    "bash": 'eval "$(trainerd completion bash)"      # in ~/.bashrc',
    "zsh": 'eval "$(trainerd completion zsh)"      # in ~/.zshrc',
    "fish": "trainerd completion fish | source      # in ~/.config/fish/config.fish",
}


@click.command("completion", epilog="  ".join(_WHERE.values()))
@click.argument("shell", type=click.Choice(list(_WHERE)))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that completes commands in bash, zsh or fish."""
    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"There is no completion for {shell}.")
    root = context.find_root().command
    console.say(kind(root, {}, "trainerd", "_TRAINERD_COMPLETE").source())
