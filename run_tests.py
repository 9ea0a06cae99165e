"""The one command that runs the tests, the same words on Linux and Windows:

    python run_tests.py               everything: ruff, mypy, pytest, on Linux also the Windows tests under Wine
    python run_tests.py tests/x.py    only pytest, with these arguments

It makes its own environment, outside the checkout, with the launcher's installer; the next run uses it again. Any Python from
3.10 to 3.14 may start it; nothing else has to be installed. Must not need anything of the environment it makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
WORKERS = str(min((os.cpu_count() or 1) + 2, 8))
"""Two more than processors: many tests wait, for a process to begin or to end."""


def environment_folder() -> Path:
    """Where the tests' environment lies: one for each version of Python, in the user's cache."""
    given = os.environ.get("TRAINERD_TEST_VENV")
    if given:
        return Path(given)
    cache = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    return folder / "trainerd" / f"tests-python{sys.version_info[0]}.{sys.version_info[1]}"


def make_environment(folder: Path) -> int:
    """Install everything the tests need; the exit code. The right torch comes first, by its exact version."""
    installer = [sys.executable, str(ROOT / "launcher" / "install.py"), "--venv", str(folder), "--extra", "test"]
    return subprocess.call(installer, stdin=subprocess.DEVNULL)


def run(what: str, command: list[str]) -> bool:
    """Run one part in front of the person; whether it passed."""
    print(f"\n== {what}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # the tests' tensors are small, and threads beside threads wait for each other
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # they start hundreds of processes, and each would compile everything anew
    return subprocess.call(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL) == 0


def main() -> int:
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        print(f"The tests need Python 3.10 to 3.14; this is {sys.version.split()[0]} at {sys.executable}.")
        return 2
    only = sys.argv[1:]
    windows = None
    if not only and sys.platform == "linux":  # both installations mostly wait for the network
        windows = subprocess.Popen([sys.executable, str(ROOT / "tests" / "winpy.py")], stdin=subprocess.DEVNULL)
    folder = environment_folder()
    code = make_environment(folder)
    if code != 0:
        if windows:
            windows.wait()
        return code
    python = str(folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python")
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    if only:
        return 0 if run("pytest", [*pytest, *only]) else 1
    parts = [
        ("ruff", [python, "-m", "ruff", "check", "--no-cache", "."]),
        ("mypy", [python, "-m", "mypy", "--cache-dir", str(folder / "mypy-cache")]),
    ]
    failed = [what for what, command in parts if not run(what, command)]
    if windows:
        windows.wait()  # not before: it tries its Python out meanwhile
    if not run("pytest", [*pytest, "-n", WORKERS, "-m", "not slow"]):  # last: its closing line says how many
        failed.append("pytest")
    if failed:
        print("Failed: " + ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
