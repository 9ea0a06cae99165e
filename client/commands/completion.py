"""`completion`: prints the script with which a shell completes our commands. Must not change any of the person's files.

The installed command and the checkout's launcher are completed alike; `python some_script.py` is not, for to a shell its command
is `python`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from .. import console
from ..cli import ASKING

_FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}
_LAUNCHER = "start_training.sh"

# click's own scripts ask for the command by its bare name, which has to be on the PATH: the launcher of a checkout is not.
_ZSH = """\
#compdef {name}
_trainerd_completion() {{
    local -a plain described lines
    lines=("${{(@f)$(env COMP_WORDS="${{words[*]}}" COMP_CWORD=$((CURRENT-1)) {asking}=zsh_complete {program})}}")
    for kind key description in ${{lines}}; do
        if [[ $kind == plain ]]; then
            if [[ $description == _ ]]; then plain+=("$key"); else described+=("$key:$description"); fi
        elif [[ $kind == dir ]]; then _path_files -/
        elif [[ $kind == file ]]; then _path_files -f
        fi
    done
    [[ -z $described ]] || _describe -V unsorted described -U
    [[ -z $plain ]] || compadd -U -V unsorted -a plain
}}
compdef _trainerd_completion {name}
"""
_FISH = """\
function _trainerd_completion
    set -l response (env {asking}=fish_complete COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) {program})
    for line in $response
        set -l parts (string split "," $line)
        if test $parts[1] = dir
            __fish_complete_directories $parts[2]
        else if test $parts[1] = file
            __fish_complete_path $parts[2]
        else if test $parts[1] = plain
            echo $parts[2]
        end
    end
end
complete --no-files --command {name} --arguments "(_trainerd_completion)"
"""


@click.command("completion")
@click.argument("shell", type=click.Choice(list(_FILES)))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that completes commands in bash, zsh or fish, and how to keep it."""
    name, program = _called()
    if shell == "bash":
        kind = get_completion_class(shell)
        assert kind is not None
        script = kind(context.find_root().command, {}, name, ASKING).source().replace("complete -o nosort", "complete -o nosort -o default")
        script = script.replace(f"{ASKING}=bash_complete $1", f"{ASKING}=bash_complete {program}")
    else:
        script = {"zsh": _ZSH, "fish": _FISH}[shell].format(name=name, program=program, asking=ASKING)
    console.say(f"{script}\n# {kept(shell, name, program)}")
    if console.is_terminal(sys.stdout):
        console.complain(f"\nThis is the script itself. {kept(shell, name, program)}")


def kept(shell: str, name: str, program: str) -> str:
    """How it is had in every new shell."""
    line = f"{program} completion fish | source" if shell == "fish" else f'eval "$({program} completion {shell})"'
    return f"To complete `{name}` in every new {shell}, put this line into {_FILES[shell]}:  {line}"


def _called() -> tuple[str, str]:
    """The name a shell is to complete, and how it asks: the checkout's launcher by its whole path, else the installed command."""
    script = Path(sys.argv[0])
    launcher = script.with_name(_LAUNCHER)
    if script.suffix in (".sh", ".py", ".bat") and script.name != "__main__.py" and launcher.exists():
        return _LAUNCHER, shlex.quote(str(launcher.absolute()))
    return "trainerd", "trainerd"
