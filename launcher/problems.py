"""What pip and venv say when an installation fails, turned into what is wrong and what to do. Must not run anything."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from trainerd.contract.errors import TrainerdError

_AGAIN = "Then start again; what was downloaded is kept."

# The first pattern that is found decides: a full disk also breaks connections, a missing network also finds no version.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"No space left on device|Errno 28|WinError 112|not enough space on the disk",
        "The disk is full.",
        "Free about {needed} in {folder} (`pip cache purge` frees old downloads), or move this folder to a larger disk. " + _AGAIN,
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|SSLError",
        "The secure connection to the package index was refused: its certificate is not trusted here.",
        "A company network or a virus scanner is in between: set PIP_CERT to its certificate file (ask your administrator), "
        "and check this computer's date. " + _AGAIN,
    ),
    (
        r"ProxyError|Tunnel connection failed|407 Proxy",
        "The proxy refused the connection to the package index.",
        "Check HTTPS_PROXY (http://user:password@host:port). " + _AGAIN,
    ),
    (
        r"NewConnectionError|Failed to establish a new connection|NameResolutionError|Temporary failure in name resolution"
        r"|getaddrinfo failed|Name or service not known|ConnectTimeout|ReadTimeout|Read timed out|Max retries exceeded"
        r"|Connection refused|Network is unreachable|ConnectionResetError|IncompleteRead|Connection broken",
        "There is no network, or the package index cannot be reached.",
        "Check the connection (open https://pypi.org in a browser; behind a proxy set HTTPS_PROXY). " + _AGAIN,
    ),
    (
        r"Long Path support|WinError 206|filename or extension is too long",
        "A path is too long for Windows.",
        r"Move this folder closer to the root of the drive (C:\trainerd), then start again.",
    ),
    (
        r"(?:No matching distribution found for|Could not find a version that satisfies the requirement) torch\b",
        "PyTorch has no build for this Python ({python}) on this system.",
        "Install Python 3.11, 3.12 or 3.13 (64-bit) beside it; start_training finds it by itself. " + _AGAIN,
    ),
    (
        r"No matching distribution found for|Could not find a version that satisfies|requires a different Python|Requires-Python",
        "A required package has no version for this Python ({python}).",
        "Install Python 3.11, 3.12 or 3.13 beside it; start_training finds it by itself. " + _AGAIN,
    ),
    (
        r"Permission denied|Errno 13|PermissionError|WinError 5\b|WinError 32\b|Access is denied|Read-only file system|Errno 30",
        "A file in {folder} may not be written.",
        "Stop a training that uses it (start_training stop), close programs that hold files there, and put the folder where you "
        "may write. Then start again.",
    ),
    (
        r"ensurepip is not available|No module named '?ensurepip|ensurepip.*returned non-zero",
        "This Python ({python}) cannot make environments: its venv part is missing.",
        "On Debian and Ubuntu: sudo apt install python{python}-venv. Then start again.",
    ),
    (
        r"WinError 126|WinError 127|WinError 1114|DLL load failed",
        "PyTorch is installed but Windows cannot load it: Microsoft's C++ runtime is missing.",
        "Install https://aka.ms/vs/17/release/vc_redist.x64.exe, then start again.",
    ),
)


def explain(output: str, *, doing: str, folder: Path, needed: str, log: Path) -> TrainerdError:
    """The error for a person, from what the failed step printed; `doing` is the step ("installing PyTorch")."""
    values = {"folder": folder, "needed": needed, "python": "{}.{}".format(*sys.version_info[:2])}
    for pattern, what, remedy in _KNOWN:
        if re.search(pattern, output):
            return TrainerdError(f"{doing} failed. {what.format(**values)}", f"{remedy.format(**values)}\nAll it said is in {log}.")
    said = [line.strip() for line in output.splitlines() if line.strip()]
    last = said[-1] if said else "It said nothing."
    return TrainerdError(f"{doing} failed. Its last words: {last}", f"All it said is in {log}. Try once more: start_training reinstall")
