"""What each part of a model costs when it is quantized: KL at the end of the model, with that part alone quantized.

    for each block: load it
        learn E[x xᵀ] of its layers on some windows of calibration, from the dense model's hidden states
        for each unit: round it to each width, weighted by E[x xᵀ], and note the error of its output;
            run the block with the unit at one width, on other windows: a new stream of hidden states begins
        run the dense block on all streams that began before, and on the dense one
    at the end: KL(dense ‖ stream) of the logits, for each stream

So a block is loaded once, and every unit's stream sees the rest of the model dense: half a forward pass of the judged
windows for each unit. Other widths need none. What is lost grows with the squared error of the unit's output, in
proportion as long as it is small, so KL is scaled by that. Where the streams of all units would not fit in memory, each
block has one for all of its units, and its KL is split by their relative errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wq import grid
from wq.pipeline import blocks as decoder
from wq.pipeline import experts as mixture
from wq.pipeline.plan import Block, Plan
from wq.pipeline.ranks import Ranks
from wq.pipeline.source import Source
from wq.pipeline.statistics import collect
from wq.pipeline.units import Unit, paths, readers, together
from wq.scheme import Scheme
from wq.solvers import Solution, Statistics, rtn
from wq.structure.linears import is_linear, matrix

JUDGED, LEARNED = 1024, 8192  # tokens of calibration for KL, and for E[x xᵀ]
_BATCH_TOKENS = 4096
STREAM_BYTES = 2 << 30  # of hidden states
_STEP = 4  # one row of a weight in so many tells how its error depends on the width
_REFERENCE = 3  # bits at which KL is measured, if they are a candidate: far above noise, and not yet beyond repair
_LEAST = 1e-9  # nats; units whose loss is lost in noise are still told apart by their errors

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """All units, in the order of the blocks; how many tokens judged them; whether each had a stream of its own."""

    units: list[Unit]
    tokens: int
    alone: bool


@torch.no_grad()
def measure(
    source: Source,
    plan: Plan,
    widths: tuple[int, ...],
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    weighted: bool = True,
    on_step: OnStep | None = None,
) -> Measured:
    """Measure every unit of a decoder at each of `widths`, smallest first.

    tokens: windows of calibration, `[windows, seqlen]`. dtype: what blocks run in. weighted: whether to round by what
    calibration knows; False for a method that will not. on_step: called with runs of blocks done and to do.
    Raises ModelError for a model whose blocks cannot be run one after another.
    """
    tower, blocks = plan.towers[0]
    windows = _windows(tokens)
    inputs = [[{"input_ids": ids.to(device), "use_cache": False} for ids in batches] for batches in windows]
    source.load((blocks[0].path,), device, dtype)
    with source.around(tower, device, dtype):
        learned, dense = (decoder.capture(tower.root, tower.blocks, calls, source.name) for calls in inputs)
    most = sum(len(together(readers(block), ())) for block in blocks)
    held = sum(hidden.numel() * hidden.element_size() for hidden in dense.hidden)
    job = _Pass(learned, dense, plan.scheme, widths, weighted, alone=most * held <= STREAM_BYTES)
    runs = len(blocks) * (len(blocks) + 1) // 2
    report = on_step or (lambda done, total: None)
    for index, block in enumerate(blocks):
        if index:
            source.load((block.path,), device, dtype)
        job.run(block, index)
        source.unload(block.module)
        report((index + 1) * (index + 2) // 2, runs + len(blocks))
    with source.around(tower, device, dtype, with_head=True):
        for place, call in enumerate(inputs[1]):
            job.judge(source.model, tower.blocks, call, place)
            report(runs + len(blocks) * (place + 1) // len(inputs[1]), runs + len(blocks))
    judged = sum(ids.numel() for ids in windows[1])
    return Measured(job.units(judged), judged, job.alone)


def _windows(tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to learn from, and single windows to judge by, `[1, seqlen]`; others, if there are two at least."""
    count, seqlen = tokens.shape
    judged = min(max(1, JUDGED // seqlen), max(1, count // 4))
    learned = max(1, min(LEARNED // seqlen, count - judged))
    return list(tokens[:learned].split(max(1, _BATCH_TOKENS // seqlen))), list(tokens[-judged:].split(1))


@dataclass
class _Part:
    """A unit on its way.

    stream: which of the streams began with it quantized. squared: tr(E H Eᵀ) by bits, of some rows of its weights,
    summed over their tokens; norm: tr(W H Wᵀ), likewise.
    """

    block: str
    paths: tuple[str, ...]
    stream: int
    squared: dict[int, float]
    norm: float = 0.0

    def relative(self, bits: int) -> float:
        return self.squared[bits] / self.norm if self.norm > 0 else 0.0


@dataclass
class _Pass:
    """One pass over the blocks.

    learned, dense: the dense model's hidden states, of windows to learn from and to judge by. scheme: all but the bits.
    alone: whether each unit has a stream of its own. streams: with some units of one block quantized. kl: of each,
    summed over tokens.
    """

    learned: decoder.Captured
    dense: decoder.Captured
    scheme: Scheme
    widths: tuple[int, ...]
    weighted: bool
    alone: bool
    parts: list[_Part] = field(default_factory=list)
    streams: list[decoder.Captured] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    @property
    def reference(self) -> int:
        """The width at which streams begin."""
        return _REFERENCE if _REFERENCE in self.widths else self.widths[0]

    def run(self, block: Block, index: int) -> None:
        """Begin the streams of a block's units, and move all others on."""
        members = readers(block)
        known: dict[str, Any] = {}
        units: list[tuple[str, ...]] = []
        if members:
            groups, known = self._learn(block, index, members)
            units = together(members, groups)
        moved = list(self.streams)
        for one in [[unit] for unit in units] if self.alone else [units] if units else []:
            with _kept(members[name] for unit in one for name in unit):
                for unit in one:
                    self._quantize(block, unit, members, known)
                begun = replace(self.dense, hidden=list(self.dense.hidden))
                begun.advance(block.module, index)
            self.streams.append(begun)
            self.kl.append(0.0)
        for stream in (*moved, self.dense, self.learned):
            stream.advance(block.module, index)

    def _learn(self, block: Block, index: int, members: dict[str, nn.Module]) -> tuple[list[list[str]], dict[str, Any]]:
        """Members that read one input, and what is known of it: statistics, or what experts are given."""

        def run(batch: int) -> Tensor:
            return self.learned.run(block.module, index, batch)

        groups = decoder.trace(block.module, members, lambda: run(0)).groups
        linear = [group for group in groups if is_linear(members[group[0]])]
        windows = [len(hidden) for hidden in self.learned.hidden]
        found = collect([members[group[0]] for group in linear], run, windows, Ranks())
        known: dict[str, Any] = {name: one for group, one in zip(linear, found, strict=True) for name in group}
        for name in (group[0] for group in groups if not is_linear(members[group[0]])):
            known[name] = mixture.watch(members[name], run, len(self.learned.hidden))
        return groups, known

    def _quantize(
        self, block: Block, unit: tuple[str, ...], members: dict[str, nn.Module], known: dict[str, Any]
    ) -> None:
        """Round a unit to the reference width, in place, and note its errors at all widths."""
        part = _Part(block.path, paths(block, unit), len(self.streams), dict.fromkeys(self.widths, 0.0))
        self.parts.append(part)

        def solve(weight: Tensor, statistics: Statistics | None) -> tuple[Solution, Tensor]:
            return self._round(part, weight, statistics)

        for name in unit:
            if is_linear(members[name]):
                weight = matrix(members[name])
                weight.copy_(solve(weight.float(), known.get(name))[1])
            else:
                wanted = {path.rpartition(".")[2] for path in paths(block, [name])}
                for _ in mixture.quantize(members[name], wanted, known.get(name), solve):
                    pass

    def _round(self, part: _Part, weight: Tensor, statistics: Statistics | None) -> tuple[Solution, Tensor]:
        """A weight `[out, in]` at the reference width; its errors at all widths go to `part`."""
        used = statistics if self.weighted else None
        rows = weight[::_STEP]
        tokens = 1 if statistics is None else statistics.tokens
        norm = tokens * float((rows if statistics is None else rows @ statistics.second_moment).mul(rows).sum())
        part.norm += norm
        for bits in self.widths:
            whole = bits == self.reference
            solution = rtn.solve(weight if whole else rows, used, replace(self.scheme, bits=bits))
            restored = grid.dequantize(solution.codes, solution.scale, solution.zero)
            if whole:
                chosen, restored = (solution, restored), restored[::_STEP]
            if statistics is None:
                part.squared[bits] += float((restored - rows).square().sum())
            else:
                part.squared[bits] += norm * rtn.output_error(rows, restored, statistics)
        return chosen

    def judge(self, model: nn.Module, blocks: nn.ModuleList, inputs: dict[str, Any], place: int) -> None:
        """Add the KL of each stream's logits on one window from the dense model's."""

        def predicted(stream: decoder.Captured) -> Tensor:
            window = replace(stream, hidden=[stream.hidden[place]], rest=[stream.rest[place]])
            (logits,) = decoder.finish(model, blocks, [inputs], window)
            return functional.log_softmax(logits.float(), dim=-1)

        dense = predicted(self.dense)
        for index, stream in enumerate(self.streams):
            kl = functional.kl_div(predicted(stream), dense, reduction="sum", log_target=True)
            self.kl[index] += float(kl)

    def units(self, tokens: int) -> list[Unit]:
        """Every unit with its damage. tokens: how many were judged."""
        relative = [0.0] * len(self.streams)
        for part in self.parts:
            relative[part.stream] += part.relative(self.reference)
        made = []
        for part in self.parts:
            share = part.relative(self.reference) / relative[part.stream] if relative[part.stream] else 1.0
            damage = max(self.kl[part.stream] / tokens, _LEAST) * share
            base = part.squared[self.reference] or 1.0
            made.append(Unit(part.block, part.paths, {b: damage * e / base for b, e in part.squared.items()}))
        return made


@contextmanager
def _kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The weights of some modules are afterwards what they were before."""
    saved = [(parameter, parameter.data.clone()) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.data.copy_(value)
