"""What is installed, read from the packages' files: torch's build without importing torch. Must not import what it looks at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

_VERSION_LINE = re.compile(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_CUDA_LINE = re.compile(r"^cuda\b[^=]*=\s*(?:'([^']*)'|\"([^\"]*)\"|None)", re.MULTILINE)


@dataclass(frozen=True)
class TorchFacts:
    """The version as torch itself says it, with its build (2.13.0+cu130): wheels on PyPI are called 2.13.0 alone, for every build, so
    what profiles and receipts go by would not be found. And the CUDA version it was built for; None: a build for the CPU only."""

    version: str
    cuda: str | None

    def newer_than(self, driver_cuda: int | None) -> bool:
        """Whether it is built for a CUDA the driver cannot run; within one major version every driver can."""
        major = (self.cuda or "").partition(".")[0]
        return driver_cuda is not None and major.isdecimal() and int(major) > driver_cuda


def folder(package: str) -> Path | None:
    """Where a package lies, without importing it; None when it is not installed."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def version(distribution: str) -> str | None:
    """The installed version, None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def torch_facts(where: Path | None = None) -> TorchFacts | None:
    """What torch/version.py says; None when torch is not installed."""
    where = where or folder("torch")
    if where is None:
        return None
    try:
        text = (where / "version.py").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    found, named = _CUDA_LINE.search(text), _VERSION_LINE.search(text)
    cuda = (found[1] or found[2]) if found else None
    return TorchFacts(named[1] if named else version("torch") or "unknown", cuda or None)


def bitsandbytes_cuda(where: Path | None = None) -> set[str] | None:
    """The CUDA versions bitsandbytes has libraries for, like "128"; None when it is not installed."""
    where = where or folder("bitsandbytes")
    if where is None:
        return None
    names = (path.name for path in where.glob("libbitsandbytes_cuda*"))
    return {match[1] for name in names if (match := re.match(r"libbitsandbytes_cuda(\d+)", name))}


def bitsandbytes_steps_on_cpus(where: Path | None = None) -> bool | None:
    """Whether it brings the 8-bit optimizers' kernel for CPUs; None when it is not installed. Read from
    its source: so no version has to be remembered."""
    where = where or folder("bitsandbytes")
    if where is None:
        return None
    try:
        text = (where / "backends" / "cpu" / "ops.py").read_text("utf-8", errors="replace")
    except OSError:
        return False
    return "bitsandbytes::optimizer_update_8bit_blockwise" in text
