"""A Windows Python for the tests: on Windows there is one; elsewhere it is built once under Wine by shared/windows/setup.sh.

    python tests/winpy.py      build it (or bring it up to date); prints where it is, or why there is none

Standard library only. WINPY_ROOT names a ready one; else it lies in the user's cache, never in the checkout. Building needs root,
Debian and some 3 GB; everything that stands in the way is a reason to skip, in words, not an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "psutil click colorama watchdog platformdirs numpy rich pygments markdown-it-py mdurl pydantic pydantic-core annotated-types "
    "typing-inspection tokenizers safetensors accelerate huggingface-hub pyyaml requests urllib3 idna certifi charset-normalizer "
    "tqdm ruamel.yaml nvidia-ml-py packaging filelock httpx httpcore h11 anyio sniffio hf-xet shellingham typer-slim "
    "pytest pluggy iniconfig pytest-timeout hypothesis sortedcontainers wakepy"
)
_VERSION = "3.11"
_BUILD_SECONDS = 480
_PROBE_SECONDS = 60
_FREE_BYTES = 5 << 30


def root() -> Path:
    """Where the prefix is, or would be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("WINPY_ROOT") or cache / "trainerd" / "winpy")


def missing(where: Path) -> str | None:
    """Why the prefix cannot be used as it is, or None."""
    if sys.platform != "linux":
        return "Windows under Wine is built on Linux only"
    if os.environ.get("TRAINERD_TEST_WINDOWS") == "":
        return "TRAINERD_TEST_WINDOWS is set to nothing"
    stamps = [where / "stamps" / name for name in ("trixie", "prefix", f"python-{_VERSION}", f"packages-{_VERSION}")]
    absent = [stamp.name for stamp in stamps if not stamp.exists()]
    if absent:
        return f"{where} is not built ({', '.join(absent)} missing); `python tests/winpy.py` builds it"
    if os.geteuid() != 0:
        return "it needs root (a mount namespace)"
    return None


def setup_script() -> Path | None:
    """shared/windows/setup.sh: from TRAINERD_TEST_WINDOWS, else from a folder `shared` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "windows"
    script = Path(os.environ.get("TRAINERD_TEST_WINDOWS") or beside) / "setup.sh"
    return script if script.is_file() else None


def build(where: Path) -> str | None:
    """Build the prefix, or add what it lacks; the reason when that cannot be done."""
    script = setup_script()
    ours = where / "trainerd-packages"
    if missing(where) is None and (os.environ.get("WINPY_ROOT") or not ours.exists() or ours.read_text("utf-8") == PACKAGES):
        return None
    if script is None:
        return missing(where) or "the prefix lacks packages, and there is no shared/windows/setup.sh to add them"
    if sys.platform != "linux" or os.geteuid() != 0:
        return missing(where)
    if not shutil.which("apt-get"):
        return "it is built from Debian's packages, and this is no Debian"
    where.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(where).free < _FREE_BYTES:
        return f"less than 5 GB are free in {where}"
    for stamp in (f"wheels-{_VERSION}", f"packages-{_VERSION}"):  # these two are made again when the list has changed
        (where / "stamps" / stamp).unlink(missing_ok=True)
    environment = {**os.environ, "WINPY_ROOT": str(where), "WINPY_VER": _VERSION, "WINPY_TORCH": "1", "WINPY_PKGS": PACKAGES}
    with open(where / "setup.log", "wb") as log:
        try:
            done = subprocess.run(
                ["bash", script], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=_BUILD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"building it took longer than {_BUILD_SECONDS} s; see {where / 'setup.log'}"
    if done.returncode != 0:
        return f"building it failed; see {where / 'setup.log'}"
    ours.write_text(PACKAGES, "utf-8")
    return None


def lacking(where: Path) -> str | None:
    """Why its Python cannot run the tests, tried out; None when it can."""
    asking = "import accelerate, click, psutil, pydantic, pytest, rich, ruamel.yaml, tokenizers, torch, watchdog"
    try:
        command = [where / "winpy", "-c", asking]
        tried = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its Python does not run: {error}"
    said = tried.stderr.decode("utf-8", "replace").strip().splitlines()
    return None if tried.returncode == 0 else f"its Python is not complete: {said[-1] if said else tried.returncode}"


def main() -> int:
    where = root()
    reason = build(where) or missing(where) or lacking(where)
    print(f"Windows tests: skipped, {reason}." if reason else f"Windows tests: in {where}.")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
