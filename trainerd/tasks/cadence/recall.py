"""The walk of the paper's memory layer over its places, with its gradient by hand. Must not know the model around it.

At each place the layer attends to all its states so far and goes on from what it read (the formulas: MemoryLayer in model.py). Left to
autograd, each place keeps a table of scores before their sum, (samples, places so far, attention), and copies all states so far; and
each place's gradient of the weights is a product of its own, as large as the weights, which is added to those before. Here all is
written into buffers over all places, the tables are computed again on the way back, and each weight's gradient is one product. Nothing
is allocated at a place. blocks.py says what is allocated, and must be changed together with this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_sigmoid_back, _tanh_back = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input


Product = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], None]
"""Into the first, (samples, n), of the second and a weight (n, …), with a bias or without."""


class Weights(NamedTuple):
    """What is multiplied at each place: `read` (3 hidden + attention, hidden) with its `bias`, `key` (attention, hidden) and `score`
    (1, attention); without attention those two are empty, and what is read is the state before."""

    read: Tensor
    bias: Tensor
    key: Tensor
    score: Tensor

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(*(weight.to(dtype) for weight in self))


class Walked(NamedTuple):
    """What the places have left. `states` (samples, places, hidden) and `keys` (samples, places, attention) are what attention reads.

    For the way back, of each place: `past`, what was read of the states; `news`, the new state before it is mixed with that, both as
    `states`; `reads` (samples, places, 3 hidden + attention): both gates, what the past gives to the new state, and to the next
    attention; and `shares`, those of all states before in what was read: (samples, n) of the n-th place, one after the other.
    """

    states: Tensor
    keys: Tensor
    past: Tensor
    news: Tensor
    reads: Tensor
    shares: Tensor


def learned(given: Tensor, weights: Weights) -> Tensor:
    """States (samples, places, hidden) from the first place on, through which gradients flow, once; `given` (samples, places, 3 hidden +
    attention) is what gates and attention take from the input. All is computed in its type."""
    with torch.autocast(given.device.type, enabled=False):
        states: Tensor = _Walk.apply(given, *weights)  # type: ignore[no-untyped-call]
        return states


def walked(given: Tensor, weights: Weights, before: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """All states, all keys and the last recall after these places, from those of the places before; without gradients.

    A single place, as a search has it, is multiplied under autocast, which keeps its low copies of the weights from one to the next.
    """
    begin, alone = 0 if before is None else before[0].shape[1], given.shape[1] == 1
    here = _made(given, weights, begin + given.shape[1], kept=1)
    recall = here.reads[:, 0, 3 * weights.key.shape[1] :]
    if before is not None:
        here.states[:, :begin], here.keys[:, :begin], recall[:] = before
    if alone and weights.read.dtype != given.dtype:
        _walk(given, weights._replace(score=weights.score.to(given.dtype)), here, begin, _by_autocast)
    else:
        _walk(given, weights.to(given.dtype), here, begin, _into)
    return here.states, here.keys, recall


def _into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A product, without a tensor of its own."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _by_autocast(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    out.copy_(functional.linear(x, weight, bias))


def _made(given: Tensor, weights: Weights, places: int, kept: int) -> Walked:
    samples, (attention, hidden) = len(given), weights.key.shape
    shares = samples * (places * (places - 1) // 2 if kept > 1 else places) if attention else 0
    return Walked(
        states=given.new_empty(samples, places, hidden),
        keys=given.new_empty(samples, places, attention),
        past=given.new_empty(samples, kept, hidden),
        news=given.new_empty(samples, kept, hidden),
        reads=given.new_empty(samples, kept, 3 * hidden + attention),
        shares=given.new_empty(shares),
    )


def _shares(here: Walked, place: int) -> Tensor:
    """(samples, place): what each state before had in what was read."""
    samples = len(here.states)
    first = samples * place * (place - 1) // 2 if here.past.shape[1] > 1 else 0
    return here.shares[first : first + samples * place].view(samples, place)


class _Scratch:
    """For one place at a time: the table before its sum (samples, places so far, attention), its scores, and one vector."""

    def __init__(self, given: Tensor, places: int, attention: int) -> None:
        self.table = given.new_empty(len(given) * places * attention)
        self.scores = given.new_empty(len(given) * places if attention else 0)
        self.query = given.new_empty(len(given), attention)

    def tables(self, keys: Tensor, given: Tensor, recall: Tensor) -> Tensor:
        """tanh(keys + query), what the scores are sums of."""
        torch.add(given, recall, out=self.query)
        table = self.table[: keys.numel()].view(keys.shape)
        return torch.add(keys, self.query.unsqueeze(1), out=table).tanh_()


def _walk(given: Tensor, weights: Weights, here: Walked, begin: int, multiply: Product) -> None:
    """Place after place, from `begin` on."""
    attention, hidden = weights.key.shape
    scratch, last = _Scratch(given, here.states.shape[1], attention), 0  # where the place before has left what it read
    for place in range(begin, here.states.shape[1]):
        now, row = given[:, place - begin], min(place - begin, here.past.shape[1] - 1)
        past, read, new, state = here.past[:, row], here.reads[:, row], here.news[:, row], here.states[:, place]
        if not place:
            past.zero_()
        elif attention:
            table = scratch.tables(here.keys[:, :place], now[:, 3 * hidden :], here.reads[:, last, 3 * hidden :])
            scores, shares = scratch.scores[: len(given) * place], _shares(here, place)
            torch.mv(table.view(-1, attention), weights.score[0], out=scores)
            torch.softmax(scores.view(shares.shape), 1, out=shares)
            torch.bmm(shares.unsqueeze(1), here.states[:, :place], out=past.unsqueeze(1))
        else:
            past.copy_(here.states[:, place - 1])
        multiply(read, past, weights.read, weights.bias)
        gates = read[:, : 2 * hidden].add_(now[:, : 2 * hidden]).sigmoid_()
        torch.mul(gates[:, :hidden], read[:, 2 * hidden : 3 * hidden], out=new).add_(now[:, 2 * hidden : 3 * hidden]).tanh_()
        torch.lerp(new, past, gates[:, hidden:], out=state)
        if attention:
            multiply(here.keys[:, place], state, weights.key, None)
        last = row


class _Walk(torch.autograd.Function):
    """All places from the first one on."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, *weights: Tensor) -> Tensor:
        here = _made(given, Weights(*weights), given.shape[1], kept=given.shape[1])
        _walk(given, Weights(*weights).to(given.dtype), here, 0, _into)
        ctx.save_for_backward(given, *weights, *here)
        return here.states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_states: Tensor) -> Any:
        given, *saved = ctx.saved_tensors  # asked for once: an activation checkpoint unpacks them once
        weights, here = Weights(*saved[: len(Weights._fields)]), Walked(*saved[len(Weights._fields) :])
        with torch.autocast(given.device.type, enabled=False):
            back = _Back(given, weights, here)
            back.walk(to_states)
            return back.to_given, *back.to_weights(weights)


class _Back:
    """The way back: `to_…` is the gradient of each. Of `reads` it is that of `given`, but for the part of the new state and the recall."""

    def __init__(self, given: Tensor, weights: Weights, here: Walked) -> None:
        attention, hidden = weights.key.shape
        self.given, self.weights, self.here, self.hidden, self.attention = given, weights.to(given.dtype), here, hidden, attention
        self.to_given, self.to_keys = torch.empty_like(given), torch.zeros_like(here.keys)
        self.to_reads = given.new_empty(*given.shape[:2], hidden + attention)
        self.to_score = torch.zeros_like(weights.score)

    def walk(self, to_states: Tensor) -> None:
        """Place after place, from the last one on."""
        to_states = to_states.clone(memory_format=torch.contiguous_format)
        samples, places, hidden = to_states.shape
        scratch = _Scratch(self.given, places, self.attention)
        to_table, to_shares = torch.empty_like(scratch.table), torch.empty_like(scratch.scores)
        to_past, to_new = (self.given.new_empty(samples, hidden) for _ in range(2))
        self.to_reads[:, -1, hidden:].zero_()
        for place in reversed(range(places)):
            to_state = to_states[:, place]
            if self.attention and place < places - 1:
                to_state.addmm_(self.to_keys[:, place], self.weights.key)
            self._gates(place, to_state, to_past, to_new)
            if place and self.attention:
                self._attention(place, to_past, to_states[:, :place], scratch, to_table, to_shares)
            elif place:
                to_states[:, place - 1].add_(to_past)
        self.to_given[:, 0, 3 * hidden :].zero_()
        del self.weights  # autocast's copies go before the weights' gradients come

    def _gates(self, place: int, to_state: Tensor, to_past: Tensor, to_new: Tensor) -> None:
        """From a state to what was read of the past, and to the input's part in both."""
        hidden, here = self.hidden, self.here
        past, new, to_given, to_read = here.past[:, place], here.news[:, place], self.to_given[:, place], self.to_reads[:, place]
        reset, update, offered = here.reads[:, place, : 3 * hidden].chunk(3, 1)
        to_reset, to_update, to_inner = to_given[:, : 3 * hidden].chunk(3, 1)
        torch.mul(to_state, update, out=to_past)
        torch.sub(to_state, to_past, out=to_new)
        torch.sub(past, new, out=to_update).mul_(to_state)
        _sigmoid_back(to_update, update, grad_input=to_update)
        _tanh_back(to_new, new, grad_input=to_inner)
        torch.mul(to_inner, offered, out=to_reset)
        _sigmoid_back(to_reset, reset, grad_input=to_reset)
        torch.mul(to_inner, reset, out=to_read[:, :hidden])
        to_past.addmm_(to_given[:, : 2 * hidden], self.weights.read[: 2 * hidden]).addmm_(to_read, self.weights.read[2 * hidden :])

    def _attention(self, place: int, to_past: Tensor, to_states: Tensor, scratch: _Scratch, to_table: Tensor, to_shares: Tensor) -> None:
        """From what was read of the past to the states before, their keys, and the query."""
        hidden, here, now = self.hidden, self.here, self.given[:, place]
        shares, number = _shares(here, place), len(now) * place
        table = scratch.tables(here.keys[:, :place], now[:, 3 * hidden :], here.reads[:, place - 1, 3 * hidden :])
        to_table, to_shares, to_scores = to_table[: table.numel()].view(table.shape), to_shares[:number], scratch.scores[:number]
        torch.bmm(here.states[:, :place], to_past.unsqueeze(2), out=to_shares.view(*shares.shape, 1))
        to_states.addcmul_(shares.unsqueeze(2), to_past.unsqueeze(1))
        softmax_back = torch.ops.aten._softmax_backward_data.out
        softmax_back(to_shares.view(shares.shape), shares, 1, shares.dtype, grad_input=to_scores.view(shares.shape))
        self.to_score.add_(torch.mv(table.view(number, -1).t(), to_scores, out=scratch.query[0]))
        torch.mul(to_scores.view(*shares.shape, 1), self.weights.score[0], out=to_table)
        _tanh_back(to_table, table, grad_input=to_table)
        self.to_keys[:, :place].add_(to_table)
        to_query = torch.sum(to_table, 1, out=self.to_given[:, place, 3 * hidden :])
        self.to_reads[:, place - 1, hidden:].copy_(to_query)

    def to_weights(self, like: Weights) -> Weights:
        """One product over all places for each."""
        gates, reads, past = self.to_given.flatten(0, 1)[:, : 2 * self.hidden], self.to_reads.flatten(0, 1), self.here.past.flatten(0, 1)
        to_read, to_bias = past.new_empty(like.read.shape), past.new_empty(like.bias.shape)
        for part, rows in ((gates, slice(0, 2 * self.hidden)), (reads, slice(2 * self.hidden, None))):
            torch.mm(part.t(), past, out=to_read[rows])
            torch.sum(part, 0, out=to_bias[rows])
        to_key = self.to_keys.flatten(0, 1).t() @ self.here.states.flatten(0, 1)
        return Weights(to_read.to(like.read.dtype), to_bias.to(like.bias.dtype), to_key.to(like.key.dtype), self.to_score)
