"""`doctor`: looks at this machine and says what to mend. Must not mend anything itself."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from trainerd.contract.errors import EXIT_DONE, EXIT_FAILED
from trainerd.contract.paths import Home

from .. import console, diagnosis
from ..cli import pass_home

_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "problem": "PROBLEM"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@pass_home
def command(home: Home, as_json: bool) -> int:
    """Check this machine, and say what to mend. Exit code 4 when something would not work."""
    findings = diagnosis.examine(home)
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        console.say(json.dumps({"schema": 1, "problems": problems, "findings": [asdict(f) for f in findings]}, indent=1))
    else:
        for finding in findings:
            console.say(f"{_MARKS[finding.level]:<8} {finding.name:<13} {finding.text}")
            if finding.remedy:
                console.say(f"{'':<23}-> {finding.remedy}")
        warnings = sum(finding.level == "warning" for finding in findings)
        console.say(f"\n{_number_of(problems, 'problem')}, {_number_of(warnings, 'warning')}.")
        console.say(f"What fits here, and what it needs: {console.memory_program()} profile")
    return EXIT_FAILED if problems else EXIT_DONE


def _number_of(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
