"""The two pipes between supervisor and trainer: JSON lines, commands down, events up. Must not open or own a pipe.

Commands come on the trainer's stdin; its end (EOF) means: commit if you can, then leave. Events go up a pipe that was the
trainer's stdout; progress is latest-wins, and nothing that must not be lost travels here: the truth is on disk.
"""

from __future__ import annotations

import json
from typing import Any

# Commands, supervisor -> trainer.
SAVE = "save"  # {"do": "save", "id": request id}: commit a checkpoint at the next step
DUMP = "dump"  # {"do": "dump"}: it gave no sign of life for too long: write the stack of every thread into the log
LEAVE = "leave"  # {"do": "leave", "why": "stop" | "pause", "save": bool}: commit (unless save is false), then exit LEFT

# Events, trainer -> supervisor. Every event carries "event", "at" (UTC) and "monotonic".
HELLO = "hello"  # {pid}: the process lives; sent before torch is imported
WAITING = "waiting"  # {reason}: for a left-over trainer or a device held by another home
CHECKED = "checked"  # {}: the task file was loaded and its settings are valid (the verdict `start` waits for)
PHASE = "phase"  # {name, done, total, unit}
DATA = "data"  # {rows, used, dropped}
PLAN = "plan"  # {the Plan of the status, plus "record": everything a resume needs to resolve the same}
PROGRESS = "progress"  # {the Progress of the status}
EXACT = "exact"  # {now, since_step, because}
MEMORY = "memory"  # {vram_allocated_bytes, vram_reserved_bytes, cleanups, cleanup_seconds, oom_recoveries, predicted_bytes}
NO_ROOM = "no_room"  # {resource, reason, ceiling_bytes, own_bytes, (of a leak) needs_bytes}: it saves, and leaves with EXIT_NO_ROOM
CHECKPOINT = "checkpoint"  # {the Checkpoint of the status, "request": id or None}: acknowledged, it is durable
UNSAVED = "unsaved"  # {since, missing_bytes, error, "request": id or None}; since None: saving works again
BEAT = "beat"  # {phase, save}: a sign of life, made by the training thread itself; `save` numbers a save under way, or is None
NAN = "nan"  # {step, epoch, what, samples, policy}: the first step whose numbers are not finite; an EXCEPTION follows
WARNING = "warning"  # {text}: shown once in the status, and an event
NOTE = "note"  # {kind, ...}: goes to events.jsonl only
EXCEPTION = "exception"  # {type, text, permanent}: why the trainer is about to exit
FINISHED = "finished"  # {}: the finished record is on disk

# Exit codes of the trainer.
EXIT_FINISHED = 0  # only with the finished record on disk; otherwise it is a crash
EXIT_LEFT = 10  # left as asked (stop, pause or the supervisor's end), after committing where it could
EXIT_NO_ROOM = 11  # left by itself after committing, because the machine is short of memory: to be started again when there is some
EXIT_PERMANENT = 12  # an error no restart can mend: the configuration, the data, the user's task file
EXIT_NO_CHECKPOINT = 13  # checkpoints exist and none can be loaded: never start over silently

MAX_LINE_BYTES = 64 * 1024


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line."""
    return json.dumps(message, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"


def decode(line: bytes) -> dict[str, Any] | None:
    """The message in a line, or None when the line is not one (a stray print, a torn end)."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
