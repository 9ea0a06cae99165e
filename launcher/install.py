"""Makes the environment trainerd runs in: a .venv in the checkout, the right torch first, then what pyproject.toml asks for.

    python launcher/install.py            install, or repair, or return at once when there is nothing to do
    python launcher/install.py --fresh    begin again from an empty environment

Standard library only; a mark inside the environment says that an installation is under way, a stamp that it is whole. Must not
know anything about training. trainerd itself is not installed: the checkout's scripts run from the checkout.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path[:1] = [str(ROOT)]  # run as a script, from any folder

from launcher import progress, stamp, torch_build  # noqa: E402
from launcher.problems import explain  # noqa: E402
from trainerd.contract.errors import Refused, TrainerdError  # noqa: E402
from trainerd.contract.lock import FileLock, is_held  # noqa: E402

_PIP_TELLS_PROGRESS = (24, 1)
_MARK, _LOG = "trainerd-installing", "trainerd-install.log"
_UPDATE_NEEDS_BYTES = 1 << 29


def python_of(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if sys.platform == "win32" else venv / "bin" / "python"


def install(venv: Path, extras: list[str], fresh: bool) -> None:
    """Bring the environment to what this checkout wants. Raises TrainerdError with the remedy."""
    if fresh and is_held(ROOT / "supervisor.lock"):
        raise Refused("A training of this folder is running; its environment cannot be replaced.", "Stop it first: start_training stop")
    lock = FileLock(venv.with_name(f"{venv.name}-install.lock"))
    try:
        if not lock.acquire(timeout_seconds=0.1):
            say("Another installation into this folder is running; waiting for it.")
            while not lock.acquire(timeout_seconds=1.0):
                pass
    except OSError as error:
        remedy = "Put trainerd in a folder of yours, or correct its permissions."
        raise TrainerdError(f"{venv.parent} cannot be written: {error.strerror}.", remedy) from None
    try:
        if fresh or not stamp.ready(venv, extras):
            _install_locked(venv, extras, fresh)
    finally:
        lock.release()


def _install_locked(venv: Path, extras: list[str], fresh: bool) -> None:
    build, index = _choose_torch()
    try:
        _make_room(venv, fresh, build.needs_bytes)
        (venv / stamp.NAME).unlink(missing_ok=True)
        (venv / _MARK).write_text("An installation is under way here, or was cut off; the next start then begins it again.\n", "utf-8")
    except OSError as error:
        remedy = "Close what uses it (start_training stop), check its permissions, start again."
        raise TrainerdError(f"{venv} cannot be written: {error.strerror}.", remedy) from None
    say(f"All that is said meanwhile: {venv / _LOG}")
    steps = _Steps(venv, f"{build.needs_bytes >> 30} GB")
    if not python_of(venv).exists():
        steps.run("Making the environment", [sys.executable, "-m", "venv", str(venv)])
    steps.pip("Installing PyTorch", [torch_build.TORCH, *(["--index-url", index] if index else [])])
    steps.pip("Installing trainerd's requirements", requirements(venv, extras))
    found = steps.verify()
    stamp.write(venv, extras, found)
    (venv / _MARK).unlink()
    say(f"Installed: {found}.")


def _choose_torch() -> tuple[torch_build.Build, str | None]:
    """The build of torch and the address of its index (None: PyPI), said aloud with the reason."""
    driver = torch_build.nvidia_driver()
    build = torch_build.choose(driver, os.environ.get("TRAINERD_TORCH", ""))
    say(f"PyTorch: the {build.name} build ({build.why}).")
    warning = torch_build.driver_warning(driver, build) if driver else None
    if warning:
        say(warning)
    index = torch_build.index_url(build)
    reason = torch_build.unreachable(index) if index else None
    if reason is None:
        return build, index
    build, loss = torch_build.from_pypi(build)
    say(f"PyTorch's own index {index} cannot be reached ({reason}): taking PyPI's build instead. {loss}".rstrip())
    return build, None


def _make_room(venv: Path, fresh: bool, needs_bytes: int) -> None:
    """An empty folder, or one worth building on; an installation that was cut off is begun again. Raises OSError, TrainerdError."""
    if venv.exists():
        foreign = not (venv / _MARK).exists() and not (venv / stamp.NAME).exists()
        cut_off = (venv / _MARK).exists()
        stale = not foreign and not _runs_this_python(venv)
        if foreign and python_of(venv).exists() and not _runs_this_python(venv):
            raise TrainerdError(f"{venv} was made by something else, with another Python.", "Move it away or delete it, then start again.")
        if cut_off:
            say("The last installation did not come to its end: beginning it again (downloads are kept).")
        if fresh or cut_off or stale:
            shutil.rmtree(venv)
    if not venv.exists():
        venv.mkdir(parents=True)
    else:
        needs_bytes = _UPDATE_NEEDS_BYTES
    free = shutil.disk_usage(venv).free
    if free < needs_bytes:
        if not any(venv.iterdir()):
            venv.rmdir()
        raise TrainerdError(
            f"The installation needs about {needs_bytes / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free in {venv.parent}.",
            "Free some space, or move this folder to a larger disk, then start again.",
        )


def _runs_this_python(venv: Path) -> bool:
    """Whether the environment's Python still works and is of the version that runs this."""
    asking = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    try:
        return subprocess.run([python_of(venv), "-I", "-c", asking], stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def requirements(venv: Path, extras: list[str]) -> list[str]:
    """The dependencies in pyproject.toml, and those of the extras."""
    reading = "import json, sys\ntry:\n import tomllib\nexcept ImportError:\n from pip._vendor import tomli as tomllib\n"
    reading += "print(json.dumps(tomllib.load(open(sys.argv[1], 'rb'))['project']))"  # Python 3.10 has no tomllib, its pip has
    answer = subprocess.run([python_of(venv), "-I", "-c", reading, ROOT / "pyproject.toml"], stdout=subprocess.PIPE, check=True)
    project = json.loads(answer.stdout)
    return [*project["dependencies"], *(entry for extra in extras for entry in project["optional-dependencies"][extra])]


class _Steps:
    """Runs the steps of an installation in front of the person; what they say goes to the log, and explains a failure."""

    def __init__(self, venv: Path, needed: str) -> None:
        self.venv, self.needed = venv, needed
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX")}
        # A person's pip settings (index, proxy, certificate) hold; "install for the user" cannot, inside an environment.
        self.environment.update(PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PYTHONUTF8="1")

    def pip(self, doing: str, arguments: list[str]) -> None:
        command = [str(python_of(self.venv)), "-m", "pip", "install", "--log", str(self.venv / _LOG), "--prefer-binary"]
        self.run(doing, [*command, *self._progress, *arguments])

    @functools.cached_property
    def _progress(self) -> list[str]:
        """pip tells how far a download is where it can do so in plain lines."""
        command = [str(python_of(self.venv)), "-m", "pip", "--version"]
        answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=self.environment, check=False)
        found = re.match(r"pip (\d+)\.(\d+)", answer.stdout)
        return ["--progress-bar", "raw"] if found and (int(found[1]), int(found[2])) >= _PIP_TELLS_PROGRESS else []

    def run(self, doing: str, command: list[str]) -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self.environment) as process:
            said = progress.shown(doing, process, sys.stdout)
        if process.returncode != 0:
            if not (self.venv / _LOG).exists():  # pip keeps its own, longer one
                (self.venv / _LOG).write_text(said, "utf-8")
            raise self._explained(doing, said)

    def verify(self) -> str:
        """Import what matters once: torch's version and what it computes on. Also compiles it, so that the first start is quick."""
        asking = (
            "import torch, accelerate, tokenizers, pydantic, rich, psutil\n"
            "gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None\n"
            "print(f'torch {torch.__version__}, computing on ' + (gpu or 'the CPU'))"
        )
        command = [str(python_of(self.venv)), "-I", "-c", asking]
        answer = subprocess.run(command, capture_output=True, env=self.environment, check=False)
        if answer.returncode != 0:
            raise self._explained("Trying the installation", answer.stderr.decode("utf-8", "replace"))
        return answer.stdout.decode("utf-8", "replace").strip()

    def _explained(self, doing: str, said: str) -> TrainerdError:
        log = self.venv / _LOG
        if log.exists():  # pip tells only its log why it could not read an index, once its retries are used up
            said = "".join(line for line in log.read_text("utf-8", "replace").splitlines(True) if "Could not fetch URL" in line) + said
        return explain(said, doing=doing, folder=self.venv.parent, needed=self.needed, log=log)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the environment trainerd runs in.")
    parser.add_argument("--fresh", action="store_true", help="begin again from an empty environment")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is made (default: .venv in the checkout)")
    parser.add_argument("--extra", action="append", default=[], help="also install this extra of pyproject.toml")
    options = parser.parse_args()
    if Path(sys.prefix) == options.venv:  # an activated .venv: it cannot replace the Python that runs it
        return subprocess.call([sys._base_executable, *sys.argv])  # type: ignore[attr-defined]
    if not stamp.ready(options.venv, options.extra):
        say("Installing trainerd's environment (once; some minutes).")
    try:
        install(options.venv, options.extra, options.fresh)
    except TrainerdError as error:
        print(f"\nNot installed: {error.message}\nWhat to do: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted. The next start begins the installation again; what was downloaded is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
