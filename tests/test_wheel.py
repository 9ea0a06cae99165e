"""What `pip install .` gives a person: the command, its data files and nothing else, also from the sdist and editable."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.person import SMALL

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as git would export it: what a build leaves behind must not land in the real one."""
    copy = tmp_path_factory.mktemp("source") / "trainerd"
    ignored = shutil.ignore_patterns(
        "__pycache__", ".*", "runs", "models", "control", "cache", "dist", "build", "checkpoints", "training_logs"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", *OFFLINE, "-w", folder, source], check=True)
    return next(folder.glob("trainerd-*.whl"))


class Installed:
    """An environment that has trainerd's requirements from this one, and trainerd itself installed from somewhere."""

    def __init__(self, folder: Path, *what: str | Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        bin_folder = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        self.python, self.trainerd = bin_folder / Path(sys.executable).name, bin_folder / "trainerd"
        asking = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.site = Path(subprocess.run(asking, check=True, capture_output=True, text=True).stdout.strip())
        (self.site / "requirements.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
        subprocess.run([*PIP, "--python", self.python, "install", *OFFLINE, *what], check=True)
        self.home, self.folder = folder / "person", folder / "empty"
        self.home.mkdir()
        self.folder.mkdir()

    def run(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRAINERD_", "PYTHON", "XDG_"))}
        environment = {**kept, "HOME": str(self.home), "CUDA_VISIBLE_DEVICES": "", **extra}
        return subprocess.run(
            [self.trainerd, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path, source: Path) -> None:
    """Client, presets and the configuration's schema are in it; no package named `client`, no tests, no leftovers."""
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {"trainerd", metadata}
    expected = {str(p.relative_to(source).as_posix()) for p in (source / "trainerd").rglob("*") if p.is_file()}
    expected |= {f"trainerd/{p.relative_to(source).as_posix()}" for p in (source / "client").rglob("*") if p.is_file()}
    assert {name for name in names if name.startswith("trainerd/")} == {name for name in expected if "__pycache__" not in name}
    assert "trainerd/config/schema.json" in names and "trainerd/config/presets/quick.yml" in names and "trainerd/py.typed" in names


def test_the_metadata_names_what_it_needs(wheel: Path) -> None:
    """Python 3.10 to 3.14, the core requirements, and the extras for what not everybody needs."""
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode("utf-8")
    assert "Requires-Python: >=3.10" in text
    assert all(f"Programming Language :: Python :: 3.{minor}" in text for minor in range(10, 15))
    needed = {match.lower() for match in re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", text, re.MULTILINE)}
    core = {"torch", "accelerate", "bitsandbytes", "psutil", "nvidia-ml-py", "watchdog", "platformdirs", "click", "pydantic", "tokenizers"}
    assert needed == core | {"numpy", "safetensors", "rich", "ruamel-yaml", "wakepy"}  # and jeepney, on Linux
    assert set(re.findall(r"^Provides-Extra: (\w+)$", text, re.MULTILINE)) == {"deepspeed", "parquet", "tensorboard", "test"}


def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    """Who builds from the sdist gets the same files."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    subprocess.run([*PIP, "wheel", *OFFLINE, "-w", tmp_path, unpacked], check=True)
    rebuilt = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    original = zipfile.ZipFile(wheel)
    assert {i.filename: i.CRC for i in rebuilt.infolist() if "RECORD" not in i.filename} == {
        i.filename: i.CRC for i in original.infolist() if "RECORD" not in i.filename
    }


def test_the_installed_command_trains_from_an_empty_folder(installed: Installed) -> None:
    """`trainerd start` works where there is no checkout: it trains in the person's own home, and the result answers."""
    nothing_yet = installed.run("status")
    assert nothing_yet.returncode == 3 and "Traceback" not in nothing_yet.stderr, nothing_yet.stderr
    started = installed.run("start", *SMALL, "--epochs", "2", "--name", "first", "--wait")
    assert started.returncode == 0, started.stdout + started.stderr + installed.run("logs", "-n", "50").stdout
    status = installed.run("status", "--json")
    assert status.returncode == 0 and json.loads(status.stdout)["state"] == "completed"
    home = Path(json.loads(status.stdout)["home"])
    assert home.is_relative_to(installed.home) and list(installed.folder.iterdir()) == []
    answer = installed.run("suggest", "--model", str(home / "models" / "first"), "a")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def test_help_comes_from_the_installed_package(installed: Installed) -> None:
    """The command is the wheel's own client, and shows every command it has."""
    shown = installed.run("--help")
    assert shown.returncode == 0 and "start" in shown.stdout and "doctor" in shown.stdout
    asking = "import trainerd.client.main as m; print(m.__file__)"
    where = subprocess.run([installed.python, "-c", asking], cwd=installed.folder, capture_output=True, text=True, check=True)
    assert Path(where.stdout.strip()).is_relative_to(installed.site)


@pytest.mark.skipif(sys.platform == "win32", reason="the shells it is for are not there")
def test_the_shell_completes_commands(installed: Installed) -> None:
    """`trainerd completion bash` prints what bash needs, and the command answers bash's questions with it."""
    script = installed.run("completion", "bash")
    assert script.returncode == 0
    checked = subprocess.run(["bash", "-c", script.stdout + "\ncomplete -p trainerd"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "trainerd" in checked.stdout, checked.stderr
    answer = installed.run(_TRAINERD_COMPLETE="bash_complete", COMP_WORDS="trainerd sta", COMP_CWORD="1")
    assert {line.split(",")[-1] for line in answer.stdout.split()} == {"start", "status"}


def test_an_editable_installation_has_the_command(source: Path, tmp_path: Path) -> None:
    """`pip install -e .` gives the same command, running from the checkout's files, from any folder."""
    editable = Installed(tmp_path, "-e", source)
    shown = editable.run("status")
    assert shown.returncode == 3 and "Traceback" not in shown.stderr, shown.stderr
    (source / "trainerd" / "added_later.py").write_text("NAME = 'seen at once'\n", "utf-8")
    asking = [editable.python, "-c", "import trainerd.added_later as a; print(a.NAME)"]
    assert subprocess.run(asking, cwd=editable.folder, capture_output=True, text=True, check=True).stdout.strip() == "seen at once"
    (source / "trainerd" / "added_later.py").unlink()
