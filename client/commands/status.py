"""`status`: the truth about a home. The usual call never comes here (main.py takes the short way); `--help` does."""

from __future__ import annotations

import click

from trainerd.contract.paths import Home

from .. import glance
from ..cli import pass_home


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@pass_home
def command(home: Home, as_json: bool) -> int:
    """What is happening now, or how it ended.

    Exit code: 0 live or completed, 3 stopped or never started, 4 failed, crashed, not answering or unreadable.
    """
    return glance.show(home, as_json)
