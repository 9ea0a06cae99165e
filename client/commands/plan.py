"""`plan`: what would be trained, what it will need, whether that fits, and what to change. Must not import torch, nor begin anything."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from typing import Any

import click

from trainerd.contract import interpreter
from trainerd.contract.errors import EXIT_DONE, EXIT_REFUSED, TrainerdError, UsageError
from trainerd.contract.paths import Home
from trainerd.memory.planner import TOO_LARGE, Proposal

from .. import console, forecast_view, options, outlook
from ..cli import pass_home

_MEASURE_SECONDS = 300


@click.command("plan")
@options.training_options
@click.option("--budget", metavar="SIZE", help="Another machine: would it fit into this much GPU memory, e.g. 3.5GB?")
@click.option("--device", type=click.Choice(["gpu", "cpu"]), help="Plan for this kind of device; with --budget, a GPU unless said.")
@click.option("--measure", is_flag=True, help="First measure this machine (once per device, driver and torch; about half a minute).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@pass_home
def command(home: Home, /, budget: str | None, device: str | None, measure: bool, as_json: bool, **words: Any) -> int:
    """What a training would need, and whether it fits. Exit code 5 when it does not."""
    asked = options.configuration(words, elsewhere=budget is not None or device is not None)
    if budget is None or words["data"] is not None:
        options.refuse_missing_data(asked)
    if measure:
        _measure(home, as_json)
    found = outlook.look(home, asked, budget, device)
    if isinstance(found, outlook.Unknown):
        if as_json:
            document = {"schema": 1, "verdict": None, "reason": found.reason, "will": list(found.will), "notes": list(found.notes)}
            console.say(json.dumps(document, indent=1))
        else:
            console.say(console.spelled("\n".join(forecast_view.unknown(found, console.styled))))
        return EXIT_DONE
    if as_json:
        console.say(json.dumps(_document(found), indent=1))
    else:
        console.say(console.spelled("\n".join(forecast_view.lines(found, console.can_show("█░"), console.styled))))
    return EXIT_REFUSED if found.answer.verdict == TOO_LARGE else EXIT_DONE


def _document(found: outlook.Outlook) -> dict[str, Any]:
    """For the Studio and scripts: bytes are integers, seconds are seconds."""
    answer = found.answer
    return {
        "schema": 1,
        "verdict": answer.verdict,
        "device": found.place.device,
        "where": found.where,
        "budget_bytes": answer.budget_bytes,
        "estimate": _whole(answer.estimate.document()),
        "techniques": list(answer.used),
        "proposals": [_proposal(one) for one in answer.proposals],
        "least": _proposal(answer.least) if answer.least is not None else None,
        "profile": asdict(found.place.profile),
        "notes": list(found.notes),
        "stated": asdict(found.stated) if found.stated else None,
    }


def _proposal(found: Proposal) -> dict[str, Any]:
    needed = _whole(asdict(found.estimate.needed))
    return {"settings": list(found.settings), "price": list(found.price), "needed": needed, "verdict": found.verdict}


def _whole(value: Any, name: str = "") -> Any:
    """Bytes as integers, however they were computed."""
    if isinstance(value, dict):
        return {key: _whole(entry, key if key not in ("point", "upper") else name) for key, entry in value.items()}
    if isinstance(value, float) and "seconds" not in name:
        return round(value)
    return value


def _measure(home: Home, as_json: bool) -> None:
    """Measure this machine in a process of its own: torch and a CUDA context end with it. Raises TrainerdError."""
    if not as_json:
        console.complain("Measuring this machine …")
    command_line = interpreter.command("trainerd.engine.measuring", "--home", str(home.root))
    try:
        done = subprocess.run(
            command_line, env=interpreter.environment(), capture_output=True, text=True, timeout=_MEASURE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TrainerdError(f"This machine could not be measured: {error}.", "Plan without --measure.") from None
    if done.returncode == 2:
        raise UsageError(done.stderr.strip() or "It could not be measured.", "Plan without --measure.")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TrainerdError(f"This machine could not be measured: {last}", "Plan without --measure.")
