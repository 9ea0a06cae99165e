"""A script of the checkout that was started with a Python without trainerd's requirements goes on in the checkout's .venv.

So `python run_optimized_training.py status` works whatever `python` is. Must parse on old Pythons, and must cost next to nothing.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_EXIT_FAILED = 4


def hand_over(script: str) -> Path:
    """Return the checkout's folder when this Python has what is needed; else go on in .venv, or say how to get one."""
    if find_spec("click") is not None and find_spec("torch") is not None:
        return Path(script).resolve().parent
    from launcher import stamp

    venv = f"{stamp.ROOT}/.venv"
    python = f"{venv}/Scripts/python.exe" if sys.platform == "win32" else f"{venv}/bin/python"
    again = os.path.normpath(sys.prefix) == os.path.normpath(venv)
    if again or not os.path.exists(f"{venv}/{stamp.NAME}") or not os.path.exists(python):
        launcher = "start_training.bat" if sys.platform == "win32" else "./start_training.sh"
        remedy = f"{launcher} reinstall" if again else f"{launcher}  (once; it installs by itself)"
        print(f"trainerd's requirements are not installed for {sys.executable}.\nWhat to do: {remedy}", file=sys.stderr)
        sys.exit(_EXIT_FAILED)
    command = [python, os.path.abspath(script), *sys.argv[1:]]
    if sys.platform == "win32":  # there exec would give the prompt back at once
        import subprocess

        with subprocess.Popen(command) as going_on:
            while True:
                try:
                    sys.exit(going_on.wait())
                except KeyboardInterrupt:  # it got the Ctrl-C too, and knows what to do about it
                    continue
    os.execv(python, command)
