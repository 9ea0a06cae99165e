"""Why a trainer died, in words a person can use. Must not decide what follows.

The trainer's own last words count most, then the exit code, then the end of its log.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainerd.contract import wire
from trainerd.contract.errors import DeviceLost, ExportFailed

_MAX_WORDS = 300
_SIGNALS = {
    "SIGSEGV": "a segmentation fault in native code",
    "SIGBUS": "a bus error: a file it had mapped was cut off, or the disk was full",
    "SIGABRT": "an abort in native code",
    "SIGILL": "an instruction this processor does not have",
    "SIGFPE": "an arithmetic fault in native code",
    "SIGTERM": "somebody ended it (SIGTERM)",
    "SIGINT": "somebody interrupted it (SIGINT)",
    "SIGHUP": "its session was closed (SIGHUP)",
}
_WINDOWS_CODES = {
    0x0000000F: "somebody ended it (exit code 15)",
    0x40010004: "the system ended it, as at shutdown (0x40010004)",
    0xC0000005: "an access violation in native code (0xC0000005)",
    0xC0000017: "the system had no memory left (0xC0000017)",
    0xC000001D: "an instruction this processor does not have (0xC000001D)",
    0xC00000FD: "a stack overflow (0xC00000FD)",
    0xC000012D: "memory and page file were full (0xC000012D)",
    0xC0000135: "a DLL is missing (0xC0000135): install again",
    0xC000013A: "its console was closed or Ctrl-C was pressed (0xC000013A)",
    0xC0000142: "the system was shutting down or out of resources (0xC0000142)",
    0xC0000409: "a fatal error in native code (0xC0000409)",
}
_NO_MEMORY_ON_WINDOWS = (0xC0000017, 0xC000012D)
_CUDA = re.compile(
    r"(CUDA (?:driver )?error: [^\n]*|CUDA unknown error[^\n]*|CUDA driver initialization failed[^\n]*|CUDA out of memory[^\n]*"
    r"|(?i:cudnn)[^\n]*STATUS[^\n]*|CUBLAS_STATUS_\w+)"
)
_CUDA_MEANS = {
    "unknown error": "the GPU was lost, as after suspend; on Linux: sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm, or reboot",
    "launch timed out": "Windows reset the graphics driver because one step took over two seconds; a smaller train.micro_batch helps",
    "device-side assert": "an index out of range on the GPU, usually a label or token outside the model's range",
    "out of memory": "the GPU's memory was full",
}
# The device itself is gone, not only what ran on it. A fresh process fails the same way until it is back.
_LOST = re.compile(
    r"CUDA unknown error|CUDA driver initialization failed|No CUDA GPUs are available|Found no NVIDIA driver|GPU is lost"
    r"|CUDA (?:driver )?error: (?:unknown error|no CUDA-capable device|initialization error|system not yet initialized"
    r"|all CUDA-capable devices are busy or unavailable|the launch timed out|uncorrectable ECC|device lost|driver shutting down)"
)
_PYTHON = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration)\b.*$")
_FATAL = re.compile(r"^(Fatal Python error: .*|terminate called .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Death:
    """`permanent`: no restart can mend it. `device_lost`: none can before the device is back. `no_memory`: the system had no RAM left
    for it, and ended it. `trained`: nothing but the task's own export() is left to do."""

    words: str
    permanent: bool = False
    device_lost: bool = False
    no_memory: bool = False
    trained: bool = False


def explain(code: int, exception: Mapping[str, Any] | None, log_tail: str, *, out_of_memory_killed: bool = False) -> Death:
    """The death of a trainer with exit code `code` (negative: a signal) and its last EXCEPTION event, if any."""
    if exception is not None:
        if exception.get("type") == ExportFailed.__name__:
            return Death(_shorten(str(exception.get("text"))), permanent=True, trained=True)
        permanent = bool(exception.get("permanent")) or code in (wire.EXIT_PERMANENT, wire.EXIT_NO_CHECKPOINT)
        lost = exception.get("type") == DeviceLost.__name__ or _LOST.search(str(exception.get("text"))) is not None
        return Death(_exception(exception), permanent, lost and not permanent)
    last = _last_words(log_tail)
    if code == wire.EXIT_NO_CHECKPOINT:
        return Death(last or "no checkpoint could be loaded", permanent=True)
    if code == wire.EXIT_PERMANENT:
        return Death(last or "the configuration, the data or the task cannot work (see the log)", permanent=True)
    if code == wire.EXIT_LEFT:
        return Death("somebody asked it to leave")
    if code == 0:
        return Death("it ended without having finished (exit code 0, no result on disk); the task's own code may have called exit")
    by_code = _by_code(code, out_of_memory_killed)
    if by_code is not None and code in (-signal.SIGABRT, 128 + signal.SIGABRT):
        fatal = _FATAL.findall(log_tail)
        detail = last if "CUDA" in last else _shorten(fatal[-1]) if fatal else ""
        by_code = f"{by_code}: {_with_meaning(detail)}" if detail else by_code
    silent = "somebody ended it (exit code 1, as taskkill does), or it failed without a word" if code == 1 else f"exit code {code}"
    words = by_code or _with_meaning(last) or silent
    return Death(words, device_lost=_LOST.search(words) is not None, no_memory=_had_no_memory(code, out_of_memory_killed))


def _had_no_memory(code: int, out_of_memory_killed: bool) -> bool:
    if sys.platform == "win32":
        return code & 0xFFFFFFFF in _NO_MEMORY_ON_WINDOWS
    return out_of_memory_killed and code in (-signal.SIGKILL, 128 + signal.SIGKILL)


def _by_code(code: int, out_of_memory_killed: bool) -> str | None:
    if sys.platform == "win32":
        return _WINDOWS_CODES.get(code & 0xFFFFFFFF)
    number = -code if code < 0 else code - 128 if 128 < code < 192 else 0
    if number == signal.SIGKILL:
        if out_of_memory_killed:
            return "the out-of-memory killer: RAM was full; lower memory.ram_limit, close programs, or give the container more"
        return "somebody or something killed it (SIGKILL)"
    try:
        name = signal.Signals(number).name
    except ValueError:
        return None
    return _SIGNALS.get(name, f"the signal {name}")


def _exception(event: Mapping[str, Any]) -> str:
    kind, text = str(event.get("type") or "an exception"), str(event.get("text") or "").strip()
    if kind == SystemExit.__name__:
        return _shorten(f"the task's own code called exit ({kind}: {text})")
    lines = text.splitlines()
    first = lines[0] if lines else ""
    return _with_meaning(_shorten(first if first.startswith(kind) else f"{kind}: {first}".rstrip(": ")))


def _last_words(log_tail: str) -> str:
    """What the end of a log says about a death: a CUDA error, else a Python exception's last line."""
    cuda = _CUDA.findall(log_tail)
    if cuda:
        return _shorten(cuda[-1])
    for line in reversed(log_tail.splitlines()):
        if _PYTHON.match(line.strip()):
            return _shorten(line.strip())
    return ""


def _with_meaning(words: str) -> str:
    if "CUDA" not in words:
        return words
    meaning = next((text for key, text in _CUDA_MEANS.items() if key in words), None)
    return f"{words} ({meaning})" if meaning else words


def _shorten(words: str) -> str:
    return words if len(words) <= _MAX_WORDS else words[: _MAX_WORDS - 1] + "…"
