"""A shell completes our commands: the installed one, and the launcher of a checkout, asked as the shell asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.person import ROOT, Person
from trainerd.contract import runs
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shells of POSIX")
LAUNCHER = str(ROOT / "start_training.sh")


def asked(person: Person, line: str, shell: str = "bash", **more: str) -> list[str]:
    """What the launcher answers when a shell asks how a line goes on; its last word is the one being typed."""
    typed = line.split(" ")
    environment = {
        **person.environment, "TRAINERD_PYTHON": sys.executable, "TRAINERD_HOME": str(person.home.root),
        "_TRAINERD_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(typed) - 1), **more,
    }  # fmt: skip
    done = subprocess.run([LAUNCHER], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_how_we_are_called(home: Home, tmp_path: Path, shell: str) -> None:
    """The launcher by its whole path, else the installed command; the line that keeps it is in it."""
    person = Person(home.root, tmp_path / "state")
    checkout = person.types("completion", shell)
    assert checkout.returncode == 0 and f"_TRAINERD_COMPLETE={shell}_complete" in checkout.stdout
    assert "start_training.sh" in checkout.stdout and f"{LAUNCHER} completion {shell}" in checkout.stdout.splitlines()[-1]
    code = "import sys; sys.argv[0] = '/usr/bin/trainerd'; from client.main import main; sys.exit(main(['completion', sys.argv[1]]))"
    installed = subprocess.run([sys.executable, "-c", code, shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "trainerd completion" in installed.stdout.splitlines()[-1] and "start_training" not in installed.stdout


def test_what_may_stand_at_each_place(home: Home, tmp_path: Path) -> None:
    """Commands and the launcher's presets, their options, presets, tasks, runs of this home, files."""
    person = Person(home.root, tmp_path / "state")
    for name in ("first", "second"):
        runs.write(home, RunRecord(name, "cadence", 1.0, {"task": "cadence"}, {}))
    assert {"plain,start", "plain,status", "plain,stop", "plain,standard"} == set(asked(person, "./start_training.sh st"))
    assert "plain,--preset" in asked(person, "./start_training.sh start --pre") and "plain,quick" in asked(person, "x start --preset q")
    assert asked(person, "x quick --epo") == ["plain,--epochs"]
    assert asked(person, "x resume fi") == ["plain,first"] and set(asked(person, "x runs show ")) == {"plain,first", "plain,second"}
    assert asked(person, "x start --task ca") == ["plain,cadence"] and asked(person, "x start --data da") == ["file,da"]


def test_nothing_is_installed_because_a_shell_asks(tmp_path: Path) -> None:
    """A checkout whose environment is missing answers nothing, at once."""
    (tmp_path / "launcher").mkdir()
    script = tmp_path / "start_training.sh"
    script.write_bytes((ROOT / "start_training.sh").read_bytes())
    script.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "_TRAINERD_COMPLETE": "bash_complete"}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tab_in_a_real_bash(home: Home, tmp_path: Path) -> None:
    """`./start_training.sh sta<TAB>` goes on by itself where only one word does."""
    pexpect = pytest.importorskip("pexpect")
    environment = {
        "PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(tmp_path), "PS1": "$ ",
        "TRAINERD_PYTHON": sys.executable, "TRAINERD_HOME": str(home.root), "INPUTRC": "/dev/null",
    }  # fmt: skip
    bash = pexpect.spawn("bash", ["--norc", "--noprofile"], env=environment, cwd=str(ROOT), encoding="utf-8", timeout=30)
    try:
        bash.sendline('eval "$(./start_training.sh completion bash)"; echo re""ady')
        bash.expect("ready")
        bash.send("./start_training.sh doct\t")
        bash.expect("./start_training.sh doctor ")
        bash.send("\x03")
        bash.send("./start_training.sh start --preset ext\t")
        bash.expect("--preset extended ")
    finally:
        bash.close(force=True)
