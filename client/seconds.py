"""A number of seconds as an option: within its bounds, and a number. Must not know what is waited for."""

from __future__ import annotations

from typing import Any

import click


class Seconds(click.FloatRange):
    """Of these bounds; "nan" is a number to Python and passes every bound, but a limit to nobody."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if seconds != seconds:
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds
