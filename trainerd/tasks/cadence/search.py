"""Completing a prefix: the paper's dynamic beam search, and plain beam search, for many prompts at once. Must not read files.

Dynamic: the first words more probable than p1 branch out, each of their next words more probable than p2 founds a group, and every
group is searched with a narrow beam of its own. So the first words differ, and the later ones are good: no penalty is needed.
Where the thresholds leave fewer groups than completions are wanted, the beams are wider: improbable words would be no diversity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from trainerd.tasks.cadence.model import QueryModel, State
from trainerd.tasks.cadence.settings import SearchSettings
from trainerd.tasks.cadence.text import words
from trainerd.tasks.cadence.vocabulary import NUM_SPECIAL, Vocabulary

_LEAST_SHARE = 0.02
_NEVER = float("-inf")


@dataclass(frozen=True)
class Prompt:
    """What was typed so far, in one category."""

    category: int
    context: tuple[int, ...] = ()
    """The tokens of the words that are complete."""
    rest: str = " "
    """How the text must go on, with the blank before the next word: " app"; " " for any word."""


@dataclass(frozen=True)
class Completion:
    """How a prompt goes on, from the blank before the word being typed, and the log-probability of that."""

    text: str
    score: float


@dataclass
class _Path:
    """A continuation being followed. `row` is where its state lies in that of the last step."""

    prompt: Prompt
    row: int
    tokens: tuple[int, ...] = ()
    score: float = 0.0
    rest: str = ""
    share: float = 1.0
    """Probability of the last word among those that could come."""
    done: bool = False


@dataclass
class _Group:
    """Continuations in a beam of their own."""

    width: int
    alive: list[_Path]
    done: list[_Path] = field(default_factory=list)


def typed(vocabulary: Vocabulary, prefix: str) -> tuple[str, tuple[int, ...], str]:
    """What a typed prefix means: its complete words as text, their tokens, and how the text must go on."""
    found = words(prefix)
    if not found or prefix[-1:].isspace():
        return " ".join(found), tuple(token for word in found for token in vocabulary.encode_word(word)), " "
    context = tuple(token for word in found[:-1] for token in vocabulary.encode_word(word))
    rest = " " + found[-1]
    if len(vocabulary.continuing(rest)):
        return " ".join(found[:-1]), context, rest
    return " ".join(found), (*context, *vocabulary.encode_word(found[-1])), " "  # no known word begins so: take it as complete


@torch.no_grad()
def complete(
    model: QueryModel, vocabulary: Vocabulary, prompts: Sequence[Prompt], n: int, settings: SearchSettings
) -> list[list[Completion]]:
    """For each prompt up to `n` completions, the most probable first. The model must be in eval mode."""
    results: dict[int, list[Completion]] = {}
    numbered = sorted(enumerate(prompts), key=lambda item: len(item[1].context))
    for _, same_length in groupby(numbered, key=lambda item: len(item[1].context)):
        places, some = zip(*same_length, strict=True)
        search = _Search(model, vocabulary, n, settings)
        results.update(zip(places, search.run(some), strict=True))
    return [results[place] for place in range(len(prompts))]


@torch.no_grad()
def likely_categories(
    model: QueryModel, vocabulary: Vocabulary, context: tuple[int, ...], rest: str, at_most: int
) -> list[tuple[int, float]]:
    """The categories in which a prefix is by far most probable, each with the log-probability of itself and the complete words.

    Added to a completion's own score it makes completions of different categories comparable.
    """
    if not vocabulary.conditioned:
        return [(0, 0.0)]
    device = model.words.weight.device
    everywhere = torch.arange(len(vocabulary.categories), device=device)
    begins = everywhere.unsqueeze(1) + vocabulary.begin(0)
    rows = torch.tensor(vocabulary.rows, dtype=torch.float32, device=device) + 0.5
    chance = torch.log(rows / rows.sum())
    after, state = model.next_words(begins, everywhere)
    for token in context:
        chance = chance + after[:, token]
        after, state = model.next_words(torch.full_like(begins, token), everywhere, state)
    begun = torch.logsumexp(after[:, torch.from_numpy(vocabulary.continuing(rest)).to(device)], 1)
    share = torch.softmax(chance + begun, 0)
    best = torch.topk(share, min(at_most, len(everywhere))).indices.tolist()
    return [(number, float(chance[number])) for number in best if share[number] >= _LEAST_SHARE * share[best[0]]]


class _Search:
    """One search for prompts whose contexts are equally long, so that they advance together."""

    def __init__(self, model: QueryModel, vocabulary: Vocabulary, n: int, settings: SearchSettings) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._settings = settings
        self._n = n
        self._device = model.words.weight.device
        self._state: State | None = None

    def run(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        inputs = [[self._vocabulary.begin(prompt.category), *prompt.context] for prompt in prompts]
        roots = [_Path(prompt, row, rest=prompt.rest) for row, prompt in enumerate(prompts)]
        scores = self._step(inputs, roots)
        settings = self._settings
        if settings.method == "plain":
            beams = [[_Group(max(settings.width, self._n), [root])] for root in roots]
            self._follow(beams, scores, 0.0, settings.delta)
        else:
            beams = self._founded(roots, scores)
            alive = [path for groups in beams for group in groups for path in group.alive]
            self._follow(beams, self._advance(alive), settings.p3, settings.delta - 2)
        return [self._chosen(groups) for groups in beams]

    def _founded(self, roots: list[_Path], scores: Tensor) -> list[list[_Group]]:
        """The groups of each root: its probable first words, and their probable second ones."""
        settings = self._settings
        first = [_over(children, settings.p1) for children in self._children(roots, scores, settings.groups)]
        alive = [path for some in first for path in some]
        second = iter(self._children(alive, self._advance(alive), settings.groups))
        founded = []
        for some in first:
            found = sorted((child for _ in some for child in _over(next(second), settings.p2)), key=lambda path: -path.score)
            found = found[: settings.groups]
            width = max(settings.gamma, -(-self._n // max(len(found), 1)) + 1)
            founded.append([_Group(width, [], [path]) if path.done else _Group(width, [path]) for path in found])
        return founded

    def _follow(self, beams: list[list[_Group]], scores: Tensor, threshold: float, steps: int) -> None:
        """Advances all groups until they are done, or `steps` words are added. `scores` are those after the paths alive now."""
        for step in range(steps):
            living = [group for groups in beams for group in groups if group.alive]
            if not living:
                return
            alive = [path for group in living for path in group.alive]
            if step:
                scores = self._advance(alive)
            families = iter(self._children(alive, scores, max(group.width for group in living)))
            for group in living:
                children = [child for _ in group.alive for child in _over(next(families)[: group.width], threshold)]
                children = sorted(children, key=lambda path: -path.score)[: group.width]
                group.done += [path for path in children if path.done]
                bound = _NEVER if len(group.done) < group.width else sorted(path.score for path in group.done)[-group.width]
                group.alive = [path for path in children if not path.done and path.score > bound]

    def _advance(self, paths: list[_Path]) -> Tensor:
        """What follows each path, one word further than the step that made it."""
        if not paths:
            return torch.empty(0, self._vocabulary.num_outputs)
        rows = torch.tensor([path.row for path in paths], device=self._device)
        assert self._state is not None
        self._state = [part.index_select(0, rows) for part in self._state]
        scores = self._step([path.tokens[-1:] for path in paths], paths)
        for row, path in enumerate(paths):
            path.row = row
        return scores

    def _step(self, inputs: Sequence[Sequence[int]], paths: list[_Path]) -> Tensor:
        """Log-probabilities after the inputs, -inf for what may not come: unknown words, other ends, other words than were begun."""
        voc = self._vocabulary
        conditioned = [path.prompt.category if voc.conditioned else 0 for path in paths]
        tokens, categories = torch.tensor(inputs, device=self._device), torch.tensor(conditioned, device=self._device)
        scores, self._state = self._model.next_words(tokens, categories, self._state)
        end = scores.gather(1, voc.num_words + categories.unsqueeze(1))
        scores[:, :NUM_SPECIAL] = _NEVER
        scores[:, voc.num_words :] = _NEVER
        scores.scatter_(1, voc.num_words + categories.unsqueeze(1), end)
        for row, path in enumerate(paths):
            if path.rest:
                allowed = torch.from_numpy(voc.continuing(path.rest)).to(self._device)
                kept = scores[row, allowed]
                scores[row] = _NEVER
                scores[row, allowed] = kept
        return scores.cpu()

    def _children(self, paths: list[_Path], scores: Tensor, at_most: int) -> list[list[_Path]]:
        """For each path the most probable words that may follow it, best first."""
        if not paths:
            return []
        best = torch.topk(scores, min(at_most, scores.shape[1]), dim=1)
        shares = torch.exp(best.values - torch.logsumexp(scores, 1, keepdim=True)).tolist()
        rows = zip(paths, best.values.tolist(), best.indices.tolist(), shares, strict=True)
        return [
            [self._child(path, *one) for one in zip(tokens, values, some, strict=True) if one[1] > _NEVER]
            for path, values, tokens, some in rows
        ]

    def _child(self, path: _Path, token: int, value: float, share: float) -> _Path:
        score = path.score + value
        if token >= self._vocabulary.num_words:
            return _Path(path.prompt, path.row, path.tokens, score, share=share, done=True)
        rest = path.rest.removeprefix(self._vocabulary.surfaces[token])
        if rest == path.rest:  # the word goes on after what was typed of it
            rest = ""
        return _Path(path.prompt, path.row, (*path.tokens, token), score, rest, share)

    def _chosen(self, groups: list[_Group]) -> list[Completion]:
        """The best of every group first, then the second best, until there are enough; in the order of their scores."""
        ranked = [sorted(group.done, key=lambda path: -path.score) for group in groups]
        if not any(ranked):
            ranked = [group.alive for group in groups]  # nothing came to an end within delta words
        ranked = sorted((some for some in ranked if some), key=lambda some: -some[0].score)
        chosen: dict[str, Completion] = {}
        for depth in range(max((len(some) for some in ranked), default=0)):
            for some in ranked:
                if depth < len(some) and len(chosen) < self._n:
                    text = "".join(self._vocabulary.surfaces[token] for token in some[depth].tokens)
                    chosen.setdefault(text, Completion(text, some[depth].score))
        return sorted(chosen.values(), key=lambda completion: -completion.score)


def _over(paths: list[_Path], threshold: float) -> list[_Path]:
    """Those whose last word is more probable than the threshold, and in any case the most probable. `paths`: best first."""
    return [path for number, path in enumerate(paths) if number == 0 or path.share > threshold]
