"""One block, stage by stage: what reads the same input is solved together, after everything that runs before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from wq import grid
from wq.checkpoint import ShardWriter
from wq.learner import Learner
from wq.pipeline import blocks as decoder
from wq.pipeline import experts as mixture
from wq.pipeline import folding
from wq.pipeline.learning import BlockRates, Lesson, learn
from wq.pipeline.plan import Block, Experts
from wq.pipeline.ranks import Ranks
from wq.pipeline.source import Source
from wq.pipeline.statistics import Tap, collect, collect_pairs
from wq.scheme import Scheme
from wq.solvers import Solution, Statistics, rtn
from wq.structure.linears import is_linear, matrix

_UNREACHED = "calibration never reached this layer"
_UNROUTED = "no calibration token was routed there"


def pairs(solver: ModuleType, without: frozenset[str]) -> bool:
    """Whether a solver compares with the dense model, whose hidden states then run beside the quantized one's."""
    return getattr(solver, "NEEDS_PAIRS", False) and not without & {"target", "sequence"}


@dataclass
class Stages:
    """The stages of one block.

    forward: runs the block on a batch of calibration; None for a solver that needs none. windows: how many each batch
    has. dense: the dense block, and its run on the dense model's hidden states, for a solver that asks for pairs.
    schemes: of layers and parameters of experts, by path; layers that read one input have the same one, and so have all
    experts. without: steps that are left out. ranks: the processes that have windows; first: the number of the first
    window here. changed: dense parameters that folding altered, by path. known: statistics that were collected ahead.
    rates: of learning rounding together, behind the solver, where there is a dense block to learn from. importance:
    what each token counts for a layer, `[windows, tokens]`, by the layer's path, where that is known.
    outputs: what the block made of its input before it was quantized, if all its layers learn from that pass; then the
    next block learns from it, too. dense_outputs: what the dense block made of the dense model's, if it ran to the end.
    """

    source: Source
    solver: ModuleType
    fmt: ModuleType
    schemes: Mapping[str, Scheme]
    writer: ShardWriter
    block: Block
    forward: Callable[[int], Tensor] | None
    windows: list[int]
    generator: torch.Generator
    dense: tuple[nn.Module, Callable[[int], Tensor]] | None = None
    without: frozenset[str] = frozenset()
    ranks: Ranks = field(default_factory=Ranks)
    first: int = 0
    changed: set[str] = field(default_factory=set)
    known: dict[str, Statistics] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    dense_outputs: list[Tensor] = field(default_factory=list)
    rates: BlockRates | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    solved: dict[str, Solution] = field(default_factory=dict)
    traced: decoder.Traced = field(default_factory=lambda: decoder.Traced([], {}, {}))

    def run(self) -> list[dict[str, Any]]:
        """Solve, replace and write every layer and all experts of the block; one record for each."""
        module = self.block.module
        left: dict[str, nn.Module] = {name: module.get_submodule(name) for name in self.block.layers}
        for name in self.block.experts:
            left[name.rpartition(".")[0]] = module.get_submodule(name.rpartition(".")[0])
        records: list[dict[str, Any]] = []
        if self.forward is not None and left:
            traced = self.traced = self._trace(left)
            if hasattr(self.solver, "input_scales"):
                self._fold([group for group in traced.groups if is_linear(left[group[0]])], left, traced.producers)
            if "sequence" in self.without:
                self._collect([group for group in traced.groups if is_linear(left[group[0]])])
            for group in traced.groups:
                records += self._stage({name: left.pop(name) for name in group})
        for name, reader in left.items():  # no data asked for, or a layer that calibration never reached
            records += self._without_data(name, reader)
        if self.learns and self.solved:
            self._learn(records)
        for name, solution in self.solved.items():
            self._write(self.block.layers[name].stored, solution, self._scheme(name))
        return records

    @property
    def learns(self) -> bool:
        """Whether the layers learn together: one process, and a dense block whose whole output is known."""
        return self.rates is not None and self.dense is not None and self.ranks.alone

    def _trace(self, readers: dict[str, nn.Module]) -> decoder.Traced:
        """How data flows, by the first batch; by the second, a larger one, if that does not reach all layers."""
        traced = decoder.trace(self.block.module, readers, lambda: self._forward(0))
        if sum(map(len, traced.groups)) < len(readers) and len(self.windows) > 1:
            return decoder.trace(self.block.module, readers, lambda: self._forward(1))
        return traced

    def _forward(self, batch: int) -> Tensor:
        assert self.forward is not None
        return self.forward(batch)

    def _stage(self, members: dict[str, nn.Module]) -> list[dict[str, Any]]:
        name, reader = next(iter(members.items()))
        if is_linear(reader):
            return self._solve(members)
        routed = mixture.watch(reader, self._forward, len(self.windows))
        return self._experts(name, reader, None if routed is None else routed.joined(self.ranks))

    def _without_data(self, name: str, reader: nn.Module) -> list[dict[str, Any]]:
        if not is_linear(reader):
            return self._experts(name, reader, None)
        solution, restored = self._solution(matrix(reader).float(), None, self._scheme(name))
        if self.solver.NEEDS_STATISTICS:
            solution.stats["fallback"] = _UNREACHED
        return [self._store(name, reader, solution, restored, 0)]

    # --- linear layers ---

    def _fold(self, groups: list[list[str]], linears: dict[str, nn.Module], producers: dict[str, Any]) -> None:
        """Let the solver scale each group's input wherever something can take the scale over."""
        readers = [linears[group[0]] for group in groups]
        statistics = collect(readers, self._forward, self.windows, self.ranks)
        for group, known in zip(groups, statistics, strict=True):
            fold = folding.find(self.block.module, group, producers.get(group[0]))
            if fold is None or not self._stored(fold.name):
                continue
            members = [linears[name] for name in group]
            weight = torch.cat([matrix(member) for member in members])
            scales = self.solver.input_scales(weight, known, self._scheme(group[0]))
            agreed = lambda good: all(self.ranks.gather(good))  # noqa: E731
            if folding.apply(fold, members, scales, lambda: self._forward(0), agreed):
                path = f"{self.block.path}.{fold.name}"
                self.changed |= {f"{path}.{name}" for name, _ in fold.producer.named_parameters(recurse=False)}

    def _stored(self, name: str) -> bool:
        """Whether every parameter of a module of this block is on disk under a name of its own."""
        path = f"{self.block.path}.{name}"
        parameters = self.block.module.get_submodule(name).named_parameters(recurse=False)
        return all(self.source.on_disk(f"{path}.{leaf}") is not None for leaf, _ in parameters)

    def _solve(self, members: dict[str, nn.Module]) -> list[dict[str, Any]]:
        """Layers that read the same input: one solver call for those to which its tokens count alike."""
        parts = self._alike(list(members))
        known = self._statistics(next(iter(members)), [part[0] for part in parts])
        found: dict[str, dict[str, Any]] = {}
        for part, statistics in zip(parts, known, strict=True):
            found |= zip(part, self._solved_alike({name: members[name] for name in part}, statistics), strict=True)
        return [found[name] for name in members]

    def _collect(self, groups: list[list[str]]) -> None:
        """What is known of every layer's input, from one pass."""
        names = [part[0] for group in groups for part in self._alike(group)]
        readers, counts = [self.block.module.get_submodule(name) for name in names], [self._counts(n) for n in names]
        found = collect(readers, self._forward, self.windows, self.ranks, self.outputs, counts)
        self.known = dict(zip(names, found, strict=True))

    def _alike(self, names: list[str]) -> list[list[str]]:
        """Layers that read one input, apart where its tokens count differently for each."""
        apart = [[name] for name in names if self._counts(name) is not None]
        alike = [name for name in names if self._counts(name) is None]
        return [*apart, alike] if alike else apart

    def _counts(self, name: str) -> Tensor | None:
        return self.importance.get(self.block.layers[name].path)

    def _solved_alike(self, members: dict[str, nn.Module], statistics: Statistics) -> list[dict[str, Any]]:
        """One solver call; rows are independent."""
        weight = torch.cat([matrix(linear).float() for linear in members.values()])
        solution, restored = self._together(weight, statistics, self._scheme(next(iter(members))))
        records, start = [], 0
        for name, linear in members.items():
            rows = slice(start, start + len(matrix(linear)))
            part = _rows(solution, rows)
            if "error" in part.stats:  # the solver's is of all rows together
                part.stats["error"] = rtn.output_error(weight[rows], restored[rows], statistics)
            records.append(self._store(name, linear, part, restored[rows], statistics.tokens))
            start = rows.stop
        return records

    def _statistics(self, name: str, names: list[str]) -> list[Statistics]:
        """Of what a layer reads, and others with it, as its tokens count for each of `names`."""
        if self.known:
            return [self.known[one] for one in names]
        if not getattr(self.solver, "NEEDS_PAIRS", False):
            return collect([self.block.module.get_submodule(name)], self._forward, self.windows, self.ranks)
        quantized = self._tap(name, self.block.module, self._forward)
        dense = None if self.dense is None else self._tap(name, *self.dense)
        if dense is not None:  # the last pass over the dense block moves its stream on, too
            dense.whole = name == self.traced.groups[-1][0]
            self.dense_outputs = dense.outputs
        counts = [self._counts(one) for one in names]
        return collect_pairs(quantized, dense, self.windows, self.ranks, self.first, counts)

    def _tap(self, name: str, block: nn.Module, run: Callable[[int], Tensor]) -> Tap:
        source = self.traced.residuals.get(name)
        return Tap(block.get_submodule(name), None if source is None else block.get_submodule(source), run)

    def _scheme(self, name: str) -> Scheme:
        """Of a layer of this block."""
        return self.schemes[self.block.layers[name].path]

    def _solution(
        self, weight: Tensor, statistics: Statistics | None, scheme: Scheme, **total: Any
    ) -> tuple[Solution, Tensor]:
        """Of a weight `[out, in]`, and the weight that it stands for; rounded to nearest where data is wanting."""
        solver = rtn if statistics is None and self.solver.NEEDS_STATISTICS else self.solver
        steps = {"without": self.without} if hasattr(solver, "STEPS") else {}
        solution = solver.solve(weight, statistics, scheme, generator=self.generator, **steps, **total)
        return solution, grid.dequantize(solution.codes, solution.scale, solution.zero)

    def _together(self, weight: Tensor, statistics: Statistics, scheme: Scheme) -> tuple[Solution, Tensor]:
        """Likewise, each process solving some of the rows."""
        if self.ranks.alone:
            return self._solution(weight, statistics, scheme)
        rows = self.ranks.share(len(weight))
        mine, statistics = weight[rows], _of_rows(statistics, rows)
        total = {"total": self.ranks.sum} if getattr(self.solver, "DECIDES", False) else {}
        part, _ = self._solution(mine, statistics, scheme, **total)
        codes, scale, zero = (self.ranks.join(tensor) for tensor in (part.codes, part.scale, part.zero))
        return Solution(codes, scale, zero, part.stats), grid.dequantize(codes, scale, zero)

    def _store(self, name: str, linear: nn.Module, solution: Solution, restored: Tensor, tokens: int) -> dict[str, Any]:
        layer = self.block.layers[name]
        matrix(linear).copy_(restored)
        scheme = self.schemes[layer.path]
        if self.learns:
            self.solved[name] = solution  # written when the block has learned
        else:
            self._write(layer.stored, solution, scheme)
        known = {"layer": layer.path, "shape": list(layer.shape), "bits": scheme.bits, "tokens": tokens}
        return known | solution.stats

    def _write(self, stored: str, solution: Solution, scheme: Scheme) -> None:
        for leaf, tensor in self.fmt.pack(solution, scheme).items():
            self.writer.write(f"{stored}.{leaf}", tensor)

    def _learn(self, records: list[dict[str, Any]]) -> None:
        """Codes and scales of all layers that are solved, together; the records say what came of it."""
        assert self.rates is not None
        assert self.dense is not None
        module, (_, run) = self.block.module, self.dense
        wanted = self.dense_outputs or [run(batch) for batch in range(len(self.windows))]
        learners = {
            name: Learner(module.get_submodule(name), solution, self._scheme(name))
            for name, solution in self.solved.items()
        }
        before, after = learn(module, learners, Lesson(self._forward, wanted, self.first), self.rates)
        for name, learner in learners.items():
            self.solved[name] = learner.solution()
            matrix(module.get_submodule(name)).copy_(grid.dequantize(*self.solved[name][:3]))
        self.dense_outputs = wanted
        own = {self.block.layers[name].path for name in learners}
        for record in records:
            if record["layer"] in own:
                record["learned"] = {"before": before, "after": after, "kept": after < before}

    # --- experts ---

    def _experts(self, name: str, module: nn.Module, routed: mixture.Routed | None) -> list[dict[str, Any]]:
        """All experts of a module; one record for each parameter."""
        prefix = f"{name}." if name else ""
        plans = {key.removeprefix(prefix): plan for key, plan in self.block.experts.items() if key.startswith(prefix)}
        solved: dict[str, list[mixture.Solved]] = {parameter: [] for parameter in plans}
        scheme = self.schemes[next(iter(plans.values())).path]
        for one in mixture.quantize(module, set(plans), routed, partial(self._solution, scheme=scheme), self.ranks):
            plan = plans[one.parameter]
            for piece, row in enumerate(plan.pieces):
                size = row[one.expert].shape[0]
                rows = slice(piece * size, (piece + 1) * size)
                self._write(row[one.expert].stored, _rows(one.solution, rows), scheme)
            solved[one.parameter].append(one if plan.whole else one._replace(solution=_only_stats(one.solution)))
        for parameter, plan in plans.items():
            if plan.whole:
                self._write_whole(plan.path, [one.solution for one in solved[parameter]], scheme)
        return [self._record(plan, solved[parameter]) for parameter, plan in plans.items()]

    def _write_whole(self, path: str, solutions: list[Solution], scheme: Scheme) -> None:
        packed = [self.fmt.pack(solution, scheme) for solution in solutions]
        for leaf in packed[0]:
            if leaf != "weight_shape":
                stack = torch.stack([tensors[leaf] for tensors in packed])
                self.writer.write(path + leaf.removeprefix("weight"), stack)

    def _record(self, plan: Experts, solved: list[mixture.Solved]) -> dict[str, Any]:
        tokens = [one.tokens for one in solved]
        bits = self.schemes[plan.path].bits
        record = {"layer": plan.path, "shape": [plan.size.experts, *plan.size.matrix], "bits": bits, "tokens": tokens}
        errors = [one.solution.stats.get("error") for one in solved]
        known = [(error, count) for error, count in zip(errors, tokens, strict=True) if error is not None]
        if known:
            record["errors"] = errors
            record["error"] = sum(error * count for error, count in known) / sum(count for _, count in known)
        if self.solver.NEEDS_STATISTICS:
            reasons: dict[str, list[str]] = {}
            for one in solved:
                if not one.tokens or "fallback" in one.solution.stats:
                    why = one.solution.stats.get("fallback", _UNROUTED)
                    reasons.setdefault(why, []).append(str(one.expert))
            if reasons:
                record["fallback"] = "; ".join(f"experts {', '.join(who)}: {why}" for why, who in reasons.items())
        return record


def _rows(solution: Solution, rows: slice) -> Solution:
    """Some rows of a solution."""
    return Solution(solution.codes[rows], solution.scale[rows], solution.zero[rows], dict(solution.stats))


def _of_rows(statistics: Statistics, rows: slice) -> Statistics:
    """For some rows of a weight: all but what is known of each row."""
    heldout = None if statistics.heldout is None else _of_rows(statistics.heldout, rows)
    residual = None if statistics.residual is None else statistics.residual[rows]
    return replace(statistics, residual=residual, heldout=heldout)


def _only_stats(solution: Solution) -> Solution:
    """Without what has been written already: all experts of a layer together are large."""
    nothing = torch.empty(0)
    return Solution(nothing, nothing, nothing, solution.stats)
