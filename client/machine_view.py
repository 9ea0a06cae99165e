"""The facts about a machine as lines for a person, at most 80 wide but for names and paths. Must not look at the machine itself."""

from __future__ import annotations

from collections.abc import Iterator

from trainerd.memory.planner import FITS, TIGHT, TOO_LARGE
from trainerd.memory.profile import Profile

from . import diagnosis
from .forecast_view import Style, unverified
from .machine_facts import Facts, Fit
from .words import NOT_KNOWN, size, sizes

_INDENT = 12
_COLOURS = {FITS: "green", TIGHT: "yellow", TOO_LARGE: "red"}


def lines(facts: Facts, plan: str, style: Style) -> Iterator[str]:
    """Everything; `plan` is how the command `plan` is called here."""
    processor = facts.processor
    yield _row("processor", processor["name"] or NOT_KNOWN)
    nodes = processor["numa_nodes"]
    told = f"{processor['physical_cores']} cores, {processor['logical_cores']} threads"
    yield _row("", f"{told}; NUMA: {f'{nodes} node' + ('s' if nodes != 1 else '') if nodes else NOT_KNOWN}")
    if processor["features"]:
        yield _row("", ", ".join(processor["features"]))
    yield _row("RAM", f"{size(facts.ram['total_bytes'])}, {size(facts.ram['used_bytes'])} in use")
    if facts.ram["limited"]:
        yield _row("", str(facts.ram["limited"]))
    swap = facts.swap
    yield _row("swap", f"{size(swap['total_bytes'])}, {size(swap['used_bytes'])} in use" if swap["total_bytes"] else "none")
    disk = facts.disk
    kind = ", ".join(part for part in (disk["kind"] or "kind of drive n/a", disk["filesystem"]) if part)
    yield _row("disk", f"{size(disk['free_bytes'])} free of {size(disk['total_bytes'])}: {kind}")
    yield from _gpus(facts)
    yield from _finding("torch", facts.torch_finding)
    yield from _measured(facts.measured, plan)
    yield ""
    yield from _fits(facts.fits, style)
    yield ""
    yield f"More about one: {plan} --preset standard"


def _gpus(facts: Facts) -> Iterator[str]:
    for one in facts.gpus:
        heat = "" if one.temperature_c is None else f", {one.temperature_c:.0f} °C"
        yield _row("GPU", f"{one.name}: {size(one.total_bytes)}, {size(one.used_bytes)} in use{heat}")
    if facts.gpus:
        yield _row("driver", facts.driver or NOT_KNOWN)
    else:
        for finding in facts.driver_findings:
            yield from _finding("GPU", finding)


def _finding(name: str, finding: diagnosis.Finding) -> Iterator[str]:
    yield _row(name, finding.text)
    if finding.remedy:
        yield _row("", f"-> {finding.remedy}")


def _measured(profile: Profile, plan: str) -> Iterator[str]:
    if profile.problem:
        yield _row("measured", f"does not count: {profile.problem}; measure again: {plan} --measure")
        return
    if not profile.measured:
        yield _row("measured", f"not yet, the estimates assume it: {plan} --measure")
        return
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in profile.gigaflops.items())
    yield _row("measured", f"bare trainer {size(profile.process_bytes)}; products in 1e9 operations a second: {speeds}")
    if profile.to_device_bytes_per_second is not None:
        there, back = profile.to_device_bytes_per_second / 1e9, (profile.from_device_bytes_per_second or 0) / 1e9
        context = f"CUDA context {size(profile.context_bytes)}, workspace {size(profile.workspace_bytes)}"
        within = f"; {profile.device_bytes_per_second / 1e9:,.0f} through its memory" if profile.device_bytes_per_second else ""
        yield _row("", f"{context}; copies {there:.1f} GB/s to the GPU, {back:.1f} back{within}")


def _fits(fits: list[Fit], style: Style) -> Iterator[str]:
    if not fits:
        return
    budget = max(0, fits[0].answer.budget_bytes)
    needs = [value for fit in fits for value in (fit.answer.estimate.needed.point, fit.answer.estimate.needed.upper)]
    yield f"What fits on {fits[0].where}, where {sizes(*needs, budget)[-1]} are left below the limit:"
    yield f"  {'task':<12}{'preset':<12}{'likely':>9}{'at most':>10}   {'stated below':<24}"
    for fit in fits:
        needed = fit.answer.estimate.needed
        stated = f"{size(fit.stated.vram_bytes)} GPU, {size(fit.stated.ram_bytes)} RAM"
        likely, most, _ = sizes(needed.point, needed.upper, budget)
        row = f"  {fit.task:<12}{fit.preset:<12}{likely:>9}{most:>10}   {stated:<24}"
        yield row + style(fit.answer.verdict, _COLOURS[fit.answer.verdict])
    yield from unverified(fit.answer.setup.device for fit in fits)


def _row(name: str, text: str) -> str:
    return f"{name:<{_INDENT}}{text}".rstrip()
