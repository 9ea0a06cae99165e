"""Whether a new training fits, asked before anything is started; in the background and in this terminal alike. Must not start it."""

from __future__ import annotations

from trainerd.config.load import Resolved
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.memory import planner

from . import console, forecast_view, options, outlook


def warnings(home: Home, asked: Resolved) -> list[str]:
    """What to warn of. Raises Refused, with the smallest changes that would help, when it is surely not going to fit."""
    found = outlook.look(home, asked)
    notes = list(found.notes)
    if isinstance(found, outlook.Unknown) or found.answer.verdict == planner.FITS:
        return notes
    needed = found.answer.estimate.needed
    what = "GPU memory" if found.place.device == "cuda" else "RAM"
    doubt = "".join(f" {line}" for line in forecast_view.unverified([found.place.device]))
    (likely, most), budget = found.budget.beside(needed.point, needed.upper)
    said = f"This training needs {likely} of {what}, at most {most}; {budget}.{doubt}"
    if found.answer.verdict == planner.TOO_LARGE and not found.is_certain:
        return [*notes, said]
    if found.answer.verdict == planner.TIGHT:
        better = "".join(_certain(one, found.answer.budget_bytes) for one in found.answer.proposals[:1])
        return [*notes, f"{said} It may have to repeat steps in smaller pieces.{better}"]
    raise Refused(f"It does not fit. {said}", "\n".join([*forecast_view.remedies(found), _room(found)]))


def _certain(proposal: planner.Proposal, budget_bytes: int) -> str:
    changes = " ".join(f"--set {setting}" for setting in proposal.settings)
    return f" It would fit for certain with: {changes} ({forecast_view.needs(proposal, budget_bytes)})"


def _room(found: outlook.Outlook) -> str:
    if found.answer.no_model_fits and not found.answer.proposals:
        return f"The whole estimate: {console.program()} plan"  # to raise the limit, or free memory, is what that says
    key = "vram_limit" if found.place.device == "cuda" else "ram_limit"
    whole = f"The whole estimate: {console.program()} plan{options.typed()}"
    if found.answer.no_model_fits and not found.answer.proposals:
        return whole  # what to do about the limit stands there already
    return f"Or close other programs, or raise the limit (memory.{key}). {whole}"
