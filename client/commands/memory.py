"""`memory profile|config|optimize|monitor` (memory_optimizer.py): this machine's memory, and what to train in it. Must not train."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import click

from trainerd.contract.errors import EXIT_DONE, EXIT_REFUSED, OutputLost, UsageError, remedy
from trainerd.contract.paths import Home

from .. import console, forecast_view, freeing, machine_facts, machine_view, options, outlook, recommendation, samples
from ..cli import pass_home
from ..seconds import Seconds
from ..words import size

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
_LINES_A_HEADING = 20
_MOST_PIDS = 4


@click.group("memory", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def command() -> None:
    """This machine's memory: what it has, what to train in it, what to free, and how it is used."""


@command.command("profile", short_help="Processor, RAM, disk, GPU, torch; which trainings fit.")
@_JSON
@pass_home
def profile(home: Home, as_json: bool) -> int:
    """Processor, RAM, disk, GPU, driver and torch; and which trainings fit."""
    facts = machine_facts.look(home)
    if as_json:
        console.say(json.dumps(facts.document(), indent=1))
    else:
        console.say(console.spelled("\n".join(machine_view.lines(facts, f"{console.program()} plan", console.styled))))
    return EXIT_DONE


@command.command("config", short_help="Write optimal_config.json for this machine and task.")
@options.training_options
@_JSON
@pass_home
def config(home: Home, /, as_json: bool, **words: Any) -> int:
    """Write optimal_config.json: what to train, as the planner chooses it for this machine. Exit code 5 when nothing fits."""
    asked = options.configuration(words)
    options.refuse_missing_data(asked)
    found = outlook.look(home, asked)
    made = recommendation.recommend(asked, found)
    path = home.optimal_config
    kept = recommendation.write(path, made) if recommendation.fits(made) else None
    if as_json:
        written = str(path) if recommendation.fits(made) else None
        document = {"schema": 1, "path": written, "kept": str(kept) if kept else None, "verdict": made.verdict, "config": made.document}
        reasons = [{"key": key, "value": value, "why": why} for key, value, why in made.reasons]
        console.say(json.dumps({**document, "reasons": reasons}, indent=1))
    else:
        _tell(made, found, path, kept)
    return EXIT_DONE if recommendation.fits(made) else EXIT_REFUSED


def _tell(made: recommendation.Recommendation, found: outlook.Outlook | outlook.Unknown, path: Path, kept: Path | None) -> None:
    """What was chosen and why, where it lies, and how to start with it."""
    if isinstance(found, outlook.Unknown):
        console.say(console.spelled("\n".join(forecast_view.unknown(found, console.styled))))
    else:
        console.say(console.spelled("\n".join(forecast_view.short(found, console.can_show("█░"), console.styled))))
    if not recommendation.fits(made):
        console.tell("Nothing was written.")
        return
    console.say()
    for key, value, why in made.reasons:
        console.say(console.spelled(f"  {key:<28}{value:<14} {why}"))
    console.say()
    if kept is not None:
        console.tell(f"The {path.name} that was there is kept as {kept}")
    console.tell(f"Written: {path}\nStart with it: {console.program()} start --config {_from_here(path)}")


def _from_here(path: Path) -> str:
    """As short as it can be typed in this folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


@command.command("optimize", short_help="Free what is ours; show who holds the rest.")
@click.option("--cache", "with_cache", is_flag=True, help="Also delete prepared data and traces; they are made again when needed.")
@_JSON
@pass_home
def optimize(home: Home, with_cache: bool, as_json: bool) -> int:
    """Free what is ours and not needed; show who holds RAM and GPU memory, and what could be closed. Ends no process."""
    found = freeing.free(home, with_cache)
    if as_json:
        console.say(json.dumps(found.document(), indent=1))
        return EXIT_DONE
    console.say(console.spelled("\n".join(_freed(found))))
    return EXIT_DONE


def _freed(found: freeing.Freed) -> Iterator[str]:
    before, after = found.before, found.after
    yield f"{'':<24}{'before':>10}{'after':>10}"
    yield f"{'RAM in use':<24}{_megabytes(before.ram_used_bytes):>10}{_megabytes(after.ram_used_bytes):>10}"
    if before.gpu_used_bytes is not None:
        yield f"{'GPU memory in use':<24}{_megabytes(before.gpu_used_bytes):>10}{_megabytes(after.gpu_used_bytes):>10}"
    if found.cached_bytes is not None:
        yield f"Files of this home in the system's cache: {_megabytes(found.cached_bytes)} let go (programs could have them before, too)."
    if found.cache_bytes:
        yield f"Prepared data and traces deleted: {_megabytes(found.cache_bytes)} of disk."
    elif found.in_cache_bytes:
        yield f"Prepared data and traces hold {_megabytes(found.in_cache_bytes)} of disk: optimize --cache deletes them."
    if found.training_bytes is not None:
        yield f"The training here is {found.state} and holds {_megabytes(found.training_bytes)} of RAM."
        yield f"  {console.program()} pause  gives it back, and loses nothing."
    yield ""
    if found.gpu_holders:
        yield "GPU memory is held by:"
        for holder in sorted(found.gpu_holders, key=lambda one: -(one.used_bytes or 0)):
            ours = "  (this training)" if holder.ours else ""
            yield f"  {holder.name[:40]:<42}{_megabytes(holder.used_bytes):>10}  PID {holder.pid}{ours}"
    yield "Most RAM of their own is held by:"
    for program in found.programs:
        yield f"  {program.name[:40]:<42}{_megabytes(program.own_bytes):>10}  {_processes(program.pids)}"
    for one in found.elsewhere:
        yield f"A training of another home, {one.home}, holds {_megabytes(one.own_bytes)} of RAM."
        yield f"  {console.of_home(one.home)} pause  gives it back, and loses nothing."
    names = "; ".join(f"{program.name} ({size(program.own_bytes)}, {_processes(program.pids)})" for program in found.closable)
    yield f"You could close: {names}." if names else "None of your programs holds so much that closing it would help."


def _processes(pids: Sequence[int]) -> str:
    """Which ones a program has: two of one name may be two programs to the person."""
    more = f" and {len(pids) - _MOST_PIDS} more" if len(pids) > _MOST_PIDS else ""
    return f"PID{'s' if len(pids) > 1 else ''} {', '.join(str(pid) for pid in pids[:_MOST_PIDS])}{more}"


def _megabytes(value: int | None) -> str:
    return "n/a" if value is None else f"{value / 1e6:,.0f} MB"


@command.command("monitor", short_help="RAM, swap and GPU memory from moment to moment.")
@click.option("--duration", type=Seconds(0.1, 7 * 86400), default=60.0, metavar="S", show_default=True, help="Seconds to watch.")
@click.option("--interval", type=Seconds(0.2, 3600), default=2.0, metavar="S", show_default=True, help="Look every S seconds.")
@click.option("--csv", "table", metavar="FILE", type=click.Path(path_type=Path), help="Also write every moment to this new file.")
@_JSON
@pass_home
def monitor(home: Home, duration: float, interval: float, table: Path | None, as_json: bool) -> int:
    """RAM, swap and GPU memory from moment to moment; at the end the least, the mean and the most of each. Ctrl-C ends it earlier."""
    sampler = samples.Sampler(home)
    taken: list[samples.Sample] = []
    lost: OutputLost | None = None
    try:
        with _table(table) as file:
            for sample in _moments(sampler, duration, interval):
                taken.append(sample)
                if file is not None:
                    _note(file, samples.row(sample), table)
                if not as_json:
                    _say_line(sample, len(taken) - 1)
    except KeyboardInterrupt:
        pass  # whoever has seen enough wants the summary
    except OutputLost as error:
        lost = error  # of the table; what was seen is summed up all the same
    finally:
        sampler.close()
    if as_json:
        moments = [dict(zip(samples.NAMES, vars(sample).values(), strict=True)) for sample in taken]
        console.say(json.dumps({"schema": 1, "samples": moments, "summary": samples.summary(taken)}, indent=1))
    elif taken:
        console.say(console.spelled("\n".join(["", samples.heading().replace("time", "", 1).rstrip().removesuffix("step").rstrip()])))
        console.say(console.spelled("\n".join(samples.summary_lines(taken))))
    if lost is not None:
        raise lost
    return EXIT_DONE


def _moments(sampler: samples.Sampler, duration: float, interval: float) -> Iterator[samples.Sample]:
    """A sample now, and one each interval, until the duration is over; a late one puts off none of the others."""
    began = time.monotonic()
    number = 0
    while True:
        yield sampler.take()
        number = max(number + 1, int((time.monotonic() - began) / interval))
        if number * interval > duration + interval / 1000:  # 3 * 0.2 is a little more than 0.6
            return
        time.sleep(max(0.0, began + number * interval - time.monotonic()))


def _say_line(sample: samples.Sample, number: int) -> None:
    """In a terminal the heading comes again before it has scrolled away."""
    if number == 0 or (number % _LINES_A_HEADING == 0 and console.is_terminal(sys.stdout)):
        console.pour(samples.heading())
    console.pour(console.spelled(samples.line(sample)))


@contextmanager
def _table(path: Path | None) -> Iterator[TextIO | None]:
    """The new file for the moments, with its heading. Raises UsageError when it is there already or cannot be made, OutputLost when the
    disk does not even take that."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "x", encoding="utf-8", newline="")  # noqa: SIM115 - closed below; only its making is refused in these words
    except FileExistsError:
        raise UsageError(f"{path} is there already, and would be overwritten.", "Name another file with --csv.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", "Name another file with --csv.") from None
    try:
        _note(file, samples.NAMES, path)
        yield file
    finally:
        with suppress(OSError):  # it writes again what the disk did not take, and that was told
            file.close()


def _note(file: TextIO, row: Sequence[Any], path: Path | None) -> None:
    """One line of the table, there at once. Raises OutputLost when the disk takes no more."""
    try:
        csv.writer(file).writerow(row)
        file.flush()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise OutputLost(f"{path} could not be written: {why}.", remedy(error)) from None
