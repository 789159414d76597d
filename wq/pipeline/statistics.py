"""What calibration says of a layer's input, summed over tokens while a block runs.

Nothing of a token is kept: sums of outer products are all that the solvers ask for, so memory does not grow with the
calibration set. They are summed window by window, whatever the batches: so the sums do not depend on how many windows
run at once. Tokens that are not finite are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from wq.pipeline.blocks import Stop, first_hidden
from wq.pipeline.ranks import Ranks
from wq.solvers import Statistics
from wq.structure.linears import matrix

HELD_OUT = 8  # one window in so many decides, and is not fitted to

Run = Callable[[int], Any]


@torch.no_grad()
def collect(
    readers: list[nn.Module],
    run: Run,
    windows: Sequence[int],
    ranks: Ranks,
    outputs: list[Tensor] | None = None,
    importance: Sequence[Tensor | None] | None = None,
) -> list[Statistics]:
    """Statistics of each reader's input over all batches, of all processes.

    windows: how many each batch has. outputs: takes what the passes return, if that is wanted; else a pass stops once
    the last reader has its input. importance: what each token counts for each reader, as in `collect_pairs`.
    """
    sums = [SecondMoment(*_place(reader)) for reader in readers]
    counted = importance or [None] * len(readers)
    by_reader = {id(r): (total, counts) for r, total, counts in zip(readers, sums, counted, strict=True)}
    left = batch = seen = 0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal left
        total, counts = by_reader[id(module)]
        for number, window in enumerate(_windows(args[0], windows[batch]), seen):
            total.add(window, counts=None if counts is None else counts[number])
        left -= 1
        if not left and outputs is None:
            raise Stop

    with ExitStack() as hooks:
        for reader in readers:
            hooks.callback(reader.register_forward_pre_hook(enter).remove)
        for batch in range(len(windows)):
            left = len(readers)
            with suppress(Stop):
                made = run(batch)
                if outputs is not None:
                    outputs.append(made)
            seen += windows[batch]
    return [total.over(ranks).result() for total in sums]


def _place(reader: nn.Module) -> tuple[int, torch.device]:
    """A layer's `in_features` and device."""
    weight = matrix(reader)
    return weight.shape[1], weight.device


@dataclass
class Tap:
    """A layer in a block that runs batch by batch.

    residual: the module whose input the layer's output is added to, or None. outputs: the block's, one for each batch,
    if `whole` has its passes run to the end; else a pass stops at the layer.
    """

    reader: nn.Module
    residual: nn.Module | None
    run: Run
    whole: bool = False
    outputs: list[Tensor] = field(default_factory=list)

    def read(self, batch: int) -> tuple[Tensor, Tensor | None]:
        """The layer's input, and what its output is added to."""
        found: dict[str, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found["residual"] = first_hidden(args, kwargs)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            found["input"] = args[0]
            if not self.whole:
                raise Stop

        with ExitStack() as hooks:
            hooks.callback(self.reader.register_forward_pre_hook(enter).remove)
            if self.residual is not None:
                hooks.callback(self.residual.register_forward_pre_hook(note, with_kwargs=True).remove)
            with suppress(Stop):
                self.outputs.append(self.run(batch))
        return found["input"], found.get("residual")


@torch.no_grad()
def collect_pairs(
    quantized: Tap,
    dense: Tap | None,
    windows: Sequence[int],
    ranks: Ranks,
    first: int = 0,
    importance: Sequence[Tensor | None] = (None,),
) -> list[Statistics]:
    """Statistics of a layer's input in the model quantized so far, and of its drift from the dense model's if given.

    windows: how many each batch has; first: the number of the first of them, where other processes have those before.
    importance: what each token counts, `[windows, tokens]`, or None for all alike; there are statistics for each of
    them. Every eighth window is held out, to decide on.
    """
    place = _place(quantized.reader)
    sums = [(SecondMoment(*place), SecondMoment(*place)) for _ in importance]
    seen = 0
    for batch, count in enumerate(windows):
        x, r = (None, None) if dense is None else dense.read(batch)
        q, s = quantized.read(batch)
        drift = None if r is None or s is None else r - s
        parts = [[None] * count if t is None else _windows(t, count) for t in (q, x, drift)]
        for number, (given, beside, offset) in enumerate(zip(*parts, strict=True), seen):
            decides = (first + number) % HELD_OUT == HELD_OUT - 1
            for totals, counts in zip(sums, importance, strict=True):
                totals[decides].add(given, beside, offset, None if counts is None else counts[number])
        seen += count
    rows = len(matrix(quantized.reader)) if quantized.residual is not None else 0
    found = []
    for totals in sums:
        fitted, decisive = (total.over(ranks, dense is not None, rows).result() for total in totals)
        found.append(replace(fitted, heldout=decisive if decisive.tokens else None))
    return found


def _windows(tokens: Tensor, count: int) -> Tensor:
    """`[windows, tokens, size]`, also of tokens whose windows a model has joined."""
    return tokens.reshape(count, -1, tokens.shape[-1])


class SecondMoment:
    """Sums x̂ x̂ᵀ over tokens, and where they are given (x − x̂) x̂ᵀ and (r − r̂) x̂ᵀ, in float32.

    mass: of all tokens, each of which counts 1 if not said otherwise.
    """

    def __init__(self, size: int, device: torch.device):
        self.tokens = 0
        self.mass = torch.zeros((), dtype=torch.float64)
        self.dropped = 0
        self.total = torch.zeros(size, size, dtype=torch.float32, device=device)
        self.drift: Tensor | None = None
        self.residual: Tensor | None = None

    def add(
        self,
        quantized: Tensor,
        x: Tensor | None = None,
        residual: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Add some tokens, `[..., size]`. residual: `[..., out_features]`, a difference already. counts: of each."""
        rows = quantized.reshape(-1, quantized.shape[-1]).float()
        drift = None if x is None else x.reshape(rows.shape).float() - rows
        offset = None if residual is None else residual.reshape(len(rows), residual.shape[-1]).float()
        given = [part for part in (rows, drift, offset) if part is not None]
        finite = torch.stack([part.sum(-1).isfinite() for part in given]).all(0)
        if not finite.all():
            self.dropped += int((~finite).sum())
            rows = rows[finite]
            drift, offset, counts = (None if part is None else part[finite] for part in (drift, offset, counts))
        self.tokens += len(rows)
        if counts is None:
            self.mass += len(rows)
            self.total.addmm_(rows.t(), rows)
        else:
            if not counts.is_meta:
                self.mass += counts.sum().double().cpu()
            root = rows * counts.sqrt().unsqueeze(-1)  # so that the sum is symmetric to the last bit
            self.total.addmm_(root.t(), root)
            rows = rows * counts.unsqueeze(-1)
        if drift is not None:
            self.drift = self._plus(self.drift, drift, rows)
        if offset is not None:
            self.residual = self._plus(self.residual, offset, rows)

    def over(self, ranks: Ranks, paired: bool = False, rows: int = 0) -> SecondMoment:
        """Add the sums of all processes. paired: whether there are drifts, and, with `rows`, residuals, of so many."""
        if ranks.alone:
            return self
        size = self.total.shape[1]
        if paired and self.drift is None:
            self.drift = torch.zeros_like(self.total)
        if paired and rows and self.residual is None:
            self.residual = self.total.new_zeros(rows, size)
        counts = ranks.sum(torch.tensor([self.tokens, self.dropped], device=self.total.device))
        self.tokens, self.dropped = counts.tolist()
        self.mass = ranks.sum(self.mass.to(self.total.device)).cpu()
        for part in (self.total, self.drift, self.residual):
            if part is not None:
                ranks.sum(part)
        return self

    @staticmethod
    def _plus(total: Tensor | None, left: Tensor, rows: Tensor) -> Tensor:
        if total is None:
            total = torch.zeros(left.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
        return total.addmm_(left.t(), rows)

    def result(self) -> Statistics:
        """Their mean."""
        count = 1.0 if self.total.is_meta or self.mass <= 0 else float(self.mass)
        drift = None if self.drift is None else self.drift / count
        residual = None if self.residual is None else self.residual / count
        return Statistics(self.total / count, self.tokens, drift, residual, dropped=self.dropped)
