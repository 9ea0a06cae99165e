"""start_training.sh on a fresh machine, for real: its own Python, its own environment, a small index in the place of PyPI."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.once import made_once
from tests.stub_index import StubIndex

ROOT = Path(__file__).resolve().parents[1]
CLIENT = """
import json, sys
def main(words=None, checkout=None):
    words = sys.argv[1:] if words is None else words
    print(json.dumps({"words": words, "python": sys.executable, "checkout": str(checkout), "called": sys.argv[0]}))
    return 0
"""
CHECKOUT = "my trainer (1) ü"
NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the shell's launcher; the .bat has its own tests")


@pytest.fixture(scope="module")
def index() -> Iterator[StubIndex]:
    served = StubIndex(ROOT / "pyproject.toml")
    yield served
    served.close()


class Machine:
    """A computer with one Python, a checkout in a folder with an awkward name, and nothing else."""

    def __init__(self, folder: Path, index: StubIndex) -> None:
        self.bin, self.checkout = folder / "bin", folder / CHECKOUT
        self.bin.mkdir()
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "launcher", self.checkout / "launcher", ignore=ignored)
        shutil.copytree(ROOT / "trainerd" / "contract", self.checkout / "trainerd" / "contract", ignore=ignored)
        for name in ("pyproject.toml", "start_training.sh", "run_optimized_training.py", "optimized_train.py"):
            shutil.copy(ROOT / name, self.checkout)
        (self.checkout / "client").mkdir()
        (self.checkout / "client" / "main.py").write_text(CLIENT)
        self.python_named("python3")
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_RETRIES": "0",
            "PIP_INDEX_URL": f"{index.url}/pypi/",
            "TRAINERD_TORCH_INDEX": f"{index.url}/whl",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def python_named(self, name: str, said: str = "", code: int = 0) -> None:
        """A Python under this name: the real one, or one that only says something."""
        real = getattr(sys, "_base_executable", sys.executable)
        self.tool(name, f'exec "{real}" "$@"' if not said else f'echo "{said}"; exit {code}')

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def start(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [self.checkout / "start_training.sh", *words]
        return subprocess.run(
            command, env={**self.environment, **extra}, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=100, check=False
        )


    def has(self, environment: Path) -> Machine:
        """Somebody made its .venv already: a copy of this one."""
        shutil.copytree(environment, self.checkout / ".venv", symlinks=True)
        return self


@pytest.fixture
def machine(tmp_path: Path, index: StubIndex) -> Machine:
    return Machine(tmp_path, index)


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip and nothing else: making one takes longer than all that is installed into it."""
    making = [getattr(sys, "_base_executable", sys.executable), "-m", "venv"]
    return made_once(tmp_path_factory, "empty", lambda folder: subprocess.run([*making, folder], check=True))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, index: StubIndex, empty: Path) -> Path:
    """A whole environment, as the launcher has left it."""

    def install(folder: Path) -> None:
        folder.mkdir()
        client_of(Machine(folder, index).has(empty).start("status"))

    return made_once(tmp_path_factory, "installed", install) / CHECKOUT / ".venv"


def client_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the client was called with: the last line."""
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_first_start_installs_and_shows_the_menu_later_ones_are_instant(machine: Machine) -> None:
    """One command on a fresh machine ends in the menu, run by the environment's own Python; after that nothing is installed again."""
    first = machine.start()
    told = client_of(first)
    assert told["words"] == ["menu"]
    assert told["python"] == str(machine.checkout / ".venv" / "bin" / "python") and told["checkout"] == str(machine.checkout)
    assert told["called"] == str(machine.checkout / "start_training.sh")
    assert "PyTorch: the cpu build (no NVIDIA driver answers)" in first.stdout
    assert "Installed: torch 2.13.0+cpu, computing on the CPU." in first.stdout
    for noise in ("Collecting", "Downloading", "Looking in indexes", "━"):
        assert noise not in first.stdout + first.stderr, first.stdout
    assert len(first.stdout.splitlines()) < 15 and str(machine.checkout / ".venv" / "trainerd-install.log") in first.stdout
    seconds = []
    for words, expected in ((["quick", "--epochs", "1"], ["start", "--preset", "quick", "--epochs", "1"]), (["status"], ["status"])):
        begun = time.monotonic()
        again = machine.start(*words)
        seconds.append(time.monotonic() - begun)
        assert client_of(again)["words"] == expected and len(again.stdout.splitlines()) == 1
    assert min(seconds) < 5, "nothing is installed again"
    folder = subprocess.run(
        ["sh", "start_training.sh", "logs"],
        cwd=machine.checkout,
        env={**machine.environment, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert client_of(folder)["words"] == ["logs"]


def test_the_scripts_go_on_in_the_environment_whatever_python_starts_them(machine: Machine, installed: Path) -> None:
    """`python run_optimized_training.py status` with a bare system Python: says how to install, then works by the .venv."""

    def typed(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [getattr(sys, "_base_executable", sys.executable), "-S", machine.checkout / script, *words]
        return subprocess.run(command, env=machine.environment, capture_output=True, text=True, check=False)

    before = typed("run_optimized_training.py", "status")
    assert before.returncode == 4 and "./start_training.sh" in before.stderr and "Traceback" not in before.stderr
    client_of(machine.has(installed).start("status"))
    told = client_of(typed("run_optimized_training.py", "start", "--set", "train.lr=1e-3"))
    assert told["words"] == ["start", "--set", "train.lr=1e-3"] and told["python"] == str(machine.checkout / ".venv" / "bin" / "python")
    assert client_of(typed("optimized_train.py", "--epochs", "5"))["words"] == ["foreground", "--epochs", "5"]


def test_what_the_checkout_newly_asks_for_is_installed(machine: Machine, index: StubIndex, installed: Path) -> None:
    """After an update of the checkout the next start brings the environment up to date, and keeps it."""
    assert len(machine.has(installed).start("status").stdout.splitlines()) == 1, "it is whole"
    index.add("pypi", "newly-needed", "1.0")
    pyproject = machine.checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text("utf-8").replace("dependencies = [\n", 'dependencies = [\n  "newly-needed>=1",\n', 1), "utf-8")
    again = machine.start("status")
    client_of(again)
    assert "unpacking 1 package\n" in again.stdout and "Making the environment" not in again.stdout
    assert "Successfully installed newly-needed-1.0" in (machine.checkout / ".venv" / "trainerd-install.log").read_text("utf-8")


@pytest.mark.parametrize(
    ("answer", "build"),
    [("581.29, Stub RTX 3050, 8.6", "cu130"), ("560.94, Stub RTX 3050, 8.6", "cu126")],
)
def test_an_nvidia_driver_brings_the_cuda_build(machine: Machine, empty: Path, answer: str, build: str) -> None:
    """Where an NVIDIA driver answers, torch comes from PyTorch's CUDA index that this driver can use."""
    machine.tool("nvidia-smi", f'echo "{answer}"')
    done = machine.has(empty).start("status")
    client_of(done)
    assert f"PyTorch: the {build} build (Stub RTX 3050" in done.stdout
    assert f"Installed: torch 2.13.0+{build}, computing on Stub" in done.stdout


def test_without_pytorchs_index_pypi_is_taken_and_said(machine: Machine, empty: Path) -> None:
    """Where PyTorch's index cannot be reached the installation goes on with PyPI's build and says so."""
    done = machine.has(empty).start("status", TRAINERD_TORCH_INDEX=NOWHERE)
    client_of(done)
    assert "cannot be reached" in done.stdout and "taking PyPI's build instead" in done.stdout
    assert "Installed: torch 2.13.0, computing on the CPU." in done.stdout


def test_an_installation_that_was_killed_is_repaired(machine: Machine, index: StubIndex, empty: Path) -> None:
    """A power cut in the middle of the download: the next start notices, begins again, and ends well."""
    machine.has(empty)
    index.hold, holding = "tokenizers-999", index.holding
    holding.clear()
    with subprocess.Popen(
        [machine.checkout / "start_training.sh", "status"],
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as cut:
        try:
            assert holding.wait(60)
        finally:
            index.hold = None
            os.killpg(cut.pid, signal.SIGKILL)
    done = machine.start("status")
    client_of(done)
    assert "The last installation did not come to its end" in done.stdout and "Making the environment" in done.stdout


def test_two_first_starts_at_once(machine: Machine) -> None:
    """Two double-clicks: one installs, the other waits for it, both end in their command."""
    command = [machine.checkout / "start_training.sh", "status"]
    both = [
        subprocess.Popen(command, env=machine.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("Making the environment" in text for text in said) == 1
    assert sum("waiting for it" in text for text in said) <= 1


def test_a_foreign_environment_of_another_python_is_left_alone(machine: Machine) -> None:
    """A .venv somebody else made is not deleted: the message says what to do with it."""
    (machine.checkout / ".venv" / "bin").mkdir(parents=True)
    (machine.checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (machine.checkout / ".venv" / "bin" / "python").chmod(0o755)
    done = machine.start("status")
    assert done.returncode == 4 and "was made by something else" in done.stderr and "Move it away" in done.stderr
    assert (machine.checkout / ".venv" / "bin" / "python").exists()


def test_no_network_is_said_in_words(machine: Machine, empty: Path) -> None:
    """Without a network the installation ends with the reason and the remedy, without a traceback."""
    done = machine.has(empty).start("status", PIP_INDEX_URL=NOWHERE, TRAINERD_TORCH_INDEX=NOWHERE)
    assert done.returncode == 4
    assert "There is no network, or the package index cannot be reached." in done.stderr
    assert "What to do: Check the connection" in done.stderr
    log = done.stderr.rpartition("All it said is in ")[2].strip().rstrip(".")
    assert "Could not fetch URL" in Path(log).read_text("utf-8")
    assert "Traceback" not in done.stderr


def test_only_a_wrong_python(machine: Machine) -> None:
    """Where no Python fits, the ones found are named with what is wrong with them, and a remedy is given."""
    (machine.bin / "python3").unlink()
    machine.python_named("python3", "Python 3.8.18 at /usr/bin/python3: too old (3.10 to 3.14 is needed)", 10)
    done = machine.start("status")
    assert done.returncode == 4
    assert "no Python from 3.10 to 3.14" in done.stderr and "Python 3.8.18 at /usr/bin/python3: too old" in done.stderr
    assert "sudo apt install" in done.stderr and "python.org" in done.stderr


def test_a_python_without_venv_is_passed_over(machine: Machine) -> None:
    """Debian's bare python3 cannot make environments: another Python is taken, and alone it is named with its remedy."""
    machine.tool("python3", f'PYTHONPATH="{machine.bin}/bare" exec "{getattr(sys, "_base_executable", sys.executable)}" "$@"')
    (machine.bin / "bare").mkdir()
    (machine.bin / "bare" / "ensurepip.py").write_text("raise ModuleNotFoundError(\"No module named 'ensurepip'\", name='ensurepip')\n")
    version = "{}.{}".format(*sys.version_info[:2])
    alone = machine.start("status")
    assert alone.returncode == 4 and f"sudo apt install python{version}-venv" in alone.stderr
    machine.python_named("python3.12")
    client_of(machine.start("status"))


def test_no_permission_is_said_in_words(machine: Machine) -> None:
    """In a folder that may not be written the message names the folder and what to do."""
    launcher = f'"{machine.checkout}/start_training.sh" status'
    if os.geteuid() == 0:  # root may write anywhere but on a disk that is read-only
        here = f'"{machine.checkout}"'
        done = in_own_mounts(machine, f"mount --bind {here} {here} && mount -o remount,bind,ro {here} && {launcher}")
    else:
        machine.checkout.chmod(0o555)
        done = machine.start("status")
        machine.checkout.chmod(0o755)
    assert done.returncode == 4 and "cannot be written" in done.stderr and "correct its permissions" in done.stderr


def in_own_mounts(machine: Machine, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that mounts things nobody else sees; skips where that cannot be done."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root, with a mount namespace, can make such a disk")
    environment = {**machine.environment, "PATH": f"{machine.bin}:{os.environ['PATH']}"}
    return subprocess.run(["unshare", "-m", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_a_full_disk_is_said_before_anything_is_downloaded(machine: Machine, tmp_path: Path) -> None:
    """With too little space the message says how much is needed and free, and nothing is left behind."""
    small = tmp_path / "small disk"
    small.mkdir()
    script = f'mount -t tmpfs -o size=5m tmpfs "{small}" && cp -r "{machine.checkout}/." "{small}" && '
    script += f'"{small}/start_training.sh" status; code=$?; ls -d "{small}/.venv"; exit $code'
    done = in_own_mounts(machine, script)
    assert done.returncode == 4 and "needs about 2.0 GB, and 0.0 GB are free" in done.stderr and "Free some space" in done.stderr
    assert ".venv" not in done.stdout


def test_a_given_python_is_used_and_nothing_installed(machine: Machine) -> None:
    """TRAINERD_PYTHON names a complete environment: it is used as it is; what it lacks is named."""
    given = client_of(machine.start("status", TRAINERD_PYTHON=sys.executable))
    assert given["words"] == ["status"] and not (machine.checkout / ".venv").exists()
    machine.tool("bare-python", f'exec "{sys.executable}" -I -S "$@"')
    lacking = machine.start("status", TRAINERD_PYTHON=str(machine.bin / "bare-python"))
    assert lacking.returncode == 2 and "which has no click" in lacking.stderr
    wrong = machine.start("status", TRAINERD_PYTHON="/no/such/python")
    assert wrong.returncode == 2 and "/no/such/python" in wrong.stderr


def test_reinstall_begins_from_an_empty_environment_but_not_under_a_training(machine: Machine, installed: Path) -> None:
    """`reinstall` replaces the environment; while a training of this folder runs it is refused, since it would break it."""
    client_of(machine.has(installed).start("status"))
    left_over = machine.checkout / ".venv" / "left-over"
    left_over.touch()
    holding = f"import fcntl, sys\nfile = open({str(machine.checkout / 'supervisor.lock')!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    with subprocess.Popen(
        [sys.executable, "-c", holding + "print('held', flush=True)\nsys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"held\n"
        refused = machine.start("reinstall")
        assert refused.returncode == 5 and "start_training stop" in refused.stderr and left_over.exists()
        trainer.communicate()
    again = machine.start("reinstall")
    assert again.returncode == 0 and "Installed: torch" in again.stdout and not left_over.exists()
