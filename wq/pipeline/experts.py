"""Experts: each learns from the tokens that the router sends it, and a little from all others.

A router starves some experts. Statistics of a handful of tokens are of low rank, and what is fitted to them fails on
the next text; so an expert's are shrunk toward those of the whole layer,

    H_e ← (n_e H_e + κ H) / (n_e + κ),    κ = hidden_size,

by showing it κ tokens of the layer besides its own n_e, whoever they were routed to. An expert that no token reached is
rounded to nearest instead, without statistics, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from wq import grid
from wq.pipeline import blocks as decoder
from wq.pipeline.ranks import Ranks
from wq.pipeline.statistics import SecondMoment
from wq.solvers import Solution, Statistics

_ROWS = 4096  # tokens whose activations inside of an expert are held at once

Solve = Callable[[Tensor, Statistics | None], tuple[Solution, Tensor]]


class Routed(NamedTuple):
    """What the experts of a layer are given over all of calibration.

    hidden: `[tokens, hidden_size]`. routes: int64 `[tokens, k]`, the experts that each token goes to.
    """

    hidden: Tensor
    routes: Tensor

    def inputs(self, expert: int) -> tuple[Tensor, int]:
        """The tokens an expert learns from, `[n, hidden_size]`, and how many of them come first and were routed to it.

        Empty if there is none of the latter.
        """
        own = self.hidden[(self.routes == expert).any(1)]
        if not len(own):
            return own, 0
        step = max(1, len(self.hidden) // self.hidden.shape[1])
        return torch.cat([own, self.hidden[::step][: self.hidden.shape[1]]]), len(own)

    def joined(self, ranks: Ranks) -> Routed:
        """With the tokens of all processes."""
        return Routed(ranks.join(self.hidden), ranks.join(self.routes))


class Solved(NamedTuple):
    """One matrix: of which expert and parameter, what became of it, and how many tokens were routed there."""

    expert: int
    parameter: str
    solution: Solution
    tokens: int


def watch(module: nn.Module, run: Callable[[int], Any], batches: int) -> Routed | None:
    """What a module of experts is called with in all batches; None if it is not called."""
    calls = decoder.arguments(module, ("hidden_states", "top_k_index"), run, batches)
    if not calls:
        return None
    hidden, routes = zip(*calls, strict=True)
    return Routed(
        torch.cat([h.reshape(-1, h.shape[-1]) for h in hidden]), torch.cat([i.reshape(-1, i.shape[-1]) for i in routes])
    )


def quantize(
    module: Any, wanted: set[str], routed: Routed | None, solve: Solve, ranks: Ranks | None = None
) -> Iterator[Solved]:
    """Quantize parameters of a module of experts in place, one expert after the other.

    solve: weight and statistics to a solution and the dequantized weight. Projections run in order, so that the second
    learns from what the first, quantized, makes of the tokens. ranks: processes, of which each solves some experts.
    """
    ranks = ranks or Ranks()
    first = "gate_up_proj" if module.has_gate else "up_proj"
    count = len(getattr(module, first))
    if ranks.alone:
        for expert in range(count):
            yield from _expert(module, expert, first, wanted, routed, solve)
        return
    mine = {
        expert: list(_expert(module, expert, first, wanted, routed, solve))
        for expert in range(count)
        if expert % ranks.count == ranks.rank
    }
    for expert in range(count):
        for one in _exchanged(mine.pop(expert, []), expert % ranks.count, ranks, matrix(module, first, 0).device):
            codes, scale, zero, _ = one.solution
            matrix(module, one.parameter, expert).copy_(grid.dequantize(codes, scale, zero))
            yield one


def _expert(
    module: Any, expert: int, first: str, wanted: set[str], routed: Routed | None, solve: Solve
) -> Iterator[Solved]:
    x, tokens = (None, 0) if routed is None else routed.inputs(expert)
    for name in (first, "down_proj"):
        weight = matrix(module, name, expert)
        if name in wanted:
            solution, restored = solve(weight.float(), None if x is None or not tokens else _statistics(x))
            weight.copy_(restored)
            yield Solved(expert, name, solution, tokens)
        if name is first and x is not None:
            x = torch.cat([_inner(module, expert, rows, weight) for rows in x.split(_ROWS)])


def _exchanged(solved: list[Solved], source: int, ranks: Ranks, device: torch.device) -> Iterator[Solved]:
    """What process `source` has solved, for all."""
    known = [
        (one.expert, one.parameter, one.tokens, one.solution.stats, [(t.dtype, t.shape[1:]) for t in _tensors(one)])
        for one in solved
    ]
    for place, (expert, parameter, tokens, stats, kinds) in enumerate(ranks.gather(known)[source]):
        blank = [torch.empty(0, *shape, dtype=dtype, device=device) for dtype, shape in kinds]
        own = _tensors(solved[place]) if solved else blank
        codes, scale, zero = (ranks.tensor(tensor, source, len(tensor)) for tensor in own)
        yield Solved(expert, parameter, Solution(codes, scale, zero, stats), tokens)


def _tensors(one: Solved) -> list[Tensor]:
    return [one.solution.codes, one.solution.scale, one.solution.zero]


def matrix(module: Any, name: str, expert: int) -> Tensor:
    """The weight of one expert, `[out, in]`: a view, to read and to write."""
    weight: Tensor = getattr(module, name).data[expert]
    return weight.t() if module.is_transposed else weight


def _statistics(x: Tensor) -> Statistics:
    total = SecondMoment(x.shape[1], x.device)
    for rows in x.split(_ROWS):
        total.add(rows)
    return total.result()


def _inner(module: Any, expert: int, x: Tensor, weight: Tensor) -> Tensor:
    """What an expert's second projection reads, `[n, intermediate_size]`, as transformers' experts compute it."""
    bias = None
    if module.has_bias:
        bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
    inner = functional.linear(x, weight, bias)
    made: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return made
