"""What the launchers decide: which torch fits, what an installation's last words mean, and that every Python can read us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import start
from launcher.problems import explain
from launcher.progress import Pip
from launcher.torch_build import Driver, choose, driver_warning, from_pypi
from trainerd.contract.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


@pytest.mark.parametrize(
    ("driver", "build"),
    [
        (None, "cpu"),
        (Driver("581.29", ("RTX 3050",), (8.6,)), "cu130"),
        (Driver("560.94", ("RTX 3050",), (8.6,)), "cu126"),
        (Driver("581.29", ("GTX 1060",), (6.1,)), "cu126"),
        (Driver("570.10", ("RTX 5060",), (12.0,)), "cu130"),
        (Driver("581.29", ("RTX 3050", "GTX 1060"), (8.6, 6.1)), "cu126"),
        (Driver("470.82", ("RTX 3050",), ()), "cu126"),
        (Driver("[N/A]", ("RTX 3050",), ()), "cu126"),
    ],
)
def test_the_build_of_torch_follows_driver_and_gpu(driver: Driver | None, build: str) -> None:
    """CUDA 13 needs driver 580 and Turing; Blackwell needs CUDA 13; everything older gets CUDA 12.6; no driver, no CUDA."""
    assert choose(driver).name == build


def test_a_driver_too_old_for_its_build_is_said() -> None:
    """A person learns that the driver must be updated before the GPU is used."""
    blackwell, ancient = Driver("570.10", ("RTX 5060",), (12.0,)), Driver("470.82", ("RTX 3050",), ())
    good = Driver("581.29", ("RTX 3050",), (8.6,))
    assert "update it to 580" in (driver_warning(blackwell, choose(blackwell)) or "")
    assert "update it to 525" in (driver_warning(ancient, choose(ancient)) or "")
    assert driver_warning(good, choose(good)) is None


def test_a_wish_overrules_and_a_wrong_one_is_refused() -> None:
    """TRAINERD_TORCH names a build; one that does not exist is answered with those that do."""
    assert choose(None, "cu126").name == "cu126"
    with pytest.raises(UsageError, match="cu130"):
        choose(None, "cu128")


def test_what_pypis_build_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows PyPI's torch cannot use the GPU, on Linux it brings 3 GB of CUDA: who gets it instead is told."""
    driver = Driver("581.29", ("RTX 3050",), (8.6,))
    monkeypatch.setattr(sys, "platform", "win32")
    assert "cannot use the GPU" in from_pypi(choose(driver))[1] and from_pypi(choose(None))[1] == ""
    monkeypatch.setattr(sys, "platform", "linux")
    assert "3 GB" in from_pypi(choose(None))[1] and from_pypi(choose(driver))[1] == ""


@pytest.mark.parametrize(
    ("said", "what", "remedy"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full", "Free about 9 GB"),
        ("OSError: [WinError 112] There is not enough space on the disk", "disk is full", "Free about 9 GB"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(Failed to establish a new connection: "
            "[Errno 11001] getaddrinfo failed)': /simple/torch/\nERROR: No matching distribution found for torch==2.13.0",
            "no network",
            "HTTPS_PROXY",
        ),
        (
            "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))\nERROR: No matching distribution found for torch",
            "certificate",
            "PIP_CERT",
        ),
        ("WARNING: Retrying after connection broken by 'ProxyError('Cannot connect to proxy.')'", "proxy refused", "HTTPS_PROXY"),
        (
            "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: 2.5.0)",
            "no build for this Python",
            "64-bit",
        ),
        ("ERROR: No matching distribution found for tokenizers>=0.20", "no version for this Python", "Install Python 3.11"),
        (
            "ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: 'c10.dll'",
            "may not be written",
            "start_training stop",
        ),
        (
            "HINT: This error might have occurred since this system does not have Windows Long Path support enabled.",
            "too long",
            r"C:\trainerd",
        ),
        ("The virtual environment was not created successfully because ensurepip is not available.", "venv part is missing", "apt install"),
        ("ImportError: DLL load failed while importing _C", "runtime is missing", "vc_redist"),
        ("first\nsomething nobody has seen\n", "something nobody has seen", "reinstall"),
        ("", "It said nothing", "install.log"),
    ],
)
def test_an_installations_last_words_become_a_remedy(said: str, what: str, remedy: str) -> None:
    """Every known way to fail is said in words, with what to do; an unknown one shows its last line and where the rest is."""
    error = explain(said, doing="Installing PyTorch", folder=Path("/here"), needed="9 GB", log=Path("/here/install.log"))
    assert error.message.startswith("Installing PyTorch failed.") and what in error.message
    assert remedy in error.hint and error.exit_code == 4


def test_what_pip_prints_becomes_one_calm_line() -> None:
    """What is fetched with its size and how much of it has come, then what is unpacked; everything else is not a person's matter."""
    pip = Pip()
    assert [pip.take(line) for line in ("Looking in indexes: x\n", "Collecting torch==2.13.0\n")] == ["", ""] and pip.now == ""
    address = "  Downloading https://download.pytorch.org/whl/cpu/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (182.4 MB)\n"
    assert pip.take(address) == "torch 2.13.0+cpu, 182.4 MB"
    pip.take("Progress 50 of 200\n")
    assert pip.now == "torch 2.13.0+cpu, 25 % of 182.4 MB"
    assert pip.take("  Downloading idna-3.20-py3-none-any.whl.metadata (8 kB)\n") == "" and pip.now.startswith("torch")
    assert pip.take("  Downloading idna-3.20-py3-none-any.whl (69 kB)\n") == "" and pip.now == "idna 3.20, 69 kB (after 182 MB)"
    assert pip.take("  Downloading odd{0}.zip (70 MB)\n") == "odd0.zip, 70 MB (after 182 MB)"
    assert pip.take("Installing collected packages: a, b, c\n") == "unpacking 3 packages" == pip.now


def test_the_words_behind_the_launcher() -> None:
    """No word is the menu, a preset alone starts it, anything else goes to the client untouched."""
    assert start.command([]) == ["menu"]
    assert start.command(["extended", "--wait"]) == ["start", "--preset", "extended", "--wait"]
    assert start.command(["start", "--set", "train.lr=1e-3"]) == ["start", "--set", "train.lr=1e-3"]


def test_the_batch_file_is_as_windows_wants_it() -> None:
    """CRLF line ends and plain ASCII, and no block in parentheses that a folder named "trainer (1)" would end."""
    text = (ROOT / "start_training.bat").read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") > 50
    lines = text.decode("ascii").splitlines()
    assert not [line for line in lines if line.rstrip().endswith("(") or line.startswith(")")]
    assert "*.bat text eol=crlf" in (ROOT / ".gitattributes").read_text("ascii")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_can_read_every_file(version: str) -> None:
    """Each supported Python that is on this machine compiles all sources of the product."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    sources = [str(p) for top in ("trainerd", "client", "launcher") for p in (ROOT / top).rglob("*.py")]
    sources += [str(p) for p in ROOT.glob("*.py")]
    reading = "import sys\nfor name in sys.argv[1:]: compile(open(name, encoding='utf-8').read(), name, 'exec', dont_inherit=True)"
    done = subprocess.run([python, "-I", "-W", "error", "-c", reading, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def interpreter(version: str) -> str | None:
    """A Python of this version: on the PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    kept = sorted(pyenv.glob(f"versions/{version}.*/" + ("python.exe" if sys.platform == "win32" else "bin/python")))
    for candidate in [shutil.which(f"python{version}"), *map(str, kept)]:
        asking = f"import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '{version}'.split('.'))))"
        if candidate and subprocess.run([candidate, "-I", "-c", asking], capture_output=True, check=False).returncode == 0:
            return candidate
    return None
