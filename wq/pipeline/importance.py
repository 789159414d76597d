"""What each token counts for each layer: how much the model's prediction depends on what the layer makes of it.

A layer's error e at a token moves the prediction by KL ≈ ½ E[(g·e)²], where g is the gradient of the log-probability
of a token drawn from that prediction with respect to the layer's output (the Fisher information). Solvers that sum x xᵀ
over tokens take all g for one size. They are not: where all later tokens attend to the first one, its value vector
counts a thousand times as much as others. So every token counts ‖g‖², as in GuidedQuant (arXiv 2505.07004) with one
group of rows; YAQA (arXiv 2505.22988) takes the same for its input factor, with drawn tokens, as here.

That alone trusts a few tokens with nearly everything. So all are given some: tokens count ‖g‖² + ρ, with a ρ for each
layer that lets both parts add as much to the trace of the sum of x xᵀ.

    for some windows at a time, as many as leave room for what goes into each block:
        run the dense blocks, one in memory at a time, and keep what goes into each
        draw tokens from the prediction, and go back from their log-probability to the last block's output
        run the blocks again, last to first, and go back through each; note ‖g‖² behind each layer
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wq.errors import first_line
from wq.learner import learning_dtype
from wq.machine import memory_at_hand, out_of_memory
from wq.pipeline import blocks as decoder
from wq.pipeline.flow import Flow, NotFiniteError
from wq.pipeline.plan import Block
from wq.pipeline.ranks import Ranks
from wq.pipeline.source import Source
from wq.structure.towers import Tower

HELD_BYTES = 1 << 28  # of hidden states between blocks; or, of a large model, as many as
HELD_SHARE = 8  # one in so many of its own
HELD_DTYPE = torch.bfloat16  # of hidden states between blocks, if it is smaller than the model's
LOGITS = 1 << 24  # at once
CACHED_TOKENS = 512  # at once on a CPU

OnPart = Callable[[int, int], None]


class Noted(NamedTuple):
    """Of the tokens of some windows, `[windows, seqlen]`: slope, ‖g‖² behind a layer; size, ‖x‖² in front of it."""

    slope: Tensor
    size: Tensor


class UnknownImportanceError(Exception):
    """Why it cannot be known for a model."""


def wanted(solver: ModuleType, asked: bool, without: Collection[str]) -> bool:
    """Whether to find what each token counts: if that is asked for, and the solver is one that can use it."""
    return asked and getattr(solver, "NEEDS_PAIRS", False) and "importance" not in without


def of_model(
    source: Source, towers: Sequence[tuple[Tower, list[Block]]], tokens: Tensor, *where: Any
) -> tuple[dict[str, Tensor], str]:
    """As `measure` has it, and ""; or nothing, and why it cannot be known."""
    if len(towers) > 1:
        return {}, "the model has more than one row of blocks"
    try:
        return measure(source, *towers[0], tokens, *where), ""
    except UnknownImportanceError as error:
        return {}, first_line(error)


@torch.no_grad()
def measure(
    source: Source,
    tower: Tower,
    blocks: list[Block],
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
    seed: int,
    rows: int | None = None,
    on_part: OnPart | None = None,
) -> dict[str, Tensor]:
    """What each token of this process's windows counts, float32 `[windows, seqlen]`, 1 in the mean, by a layer's path.

    tokens: int64 `[windows, seqlen]`. seed: of the tokens drawn. rows: windows at once. on_part: called with the
    windows done, and all. Layers to whose output no gradient comes are left out. Raises UnknownImportanceError for a
    model whose code has none, or that does not predict tokens; NotFiniteError.
    """
    share = ranks.share(len(tokens))
    mine = tokens[share]
    parts: list[dict[str, Noted]] = []
    spoiled: set[int] = set()
    reason, done = "", 0
    if device.type == "cpu":  # its caches hold what goes to and fro for few
        few = max(1, CACHED_TOKENS // tokens.shape[1])
        rows = few if rows is None else min(rows, few)
    for part in mine.split(windows_at_once(source, len(blocks), tokens.shape[1], dtype)):
        flow = Flow(source, tower, part, device, dtype, False, {}, Ranks(), rows)
        run = _Part(source, tower, blocks, flow, dtype, seed + share.start + done)
        try:
            with memory_at_hand():
                parts.append(flow.attempt(run.run))
        except NotFiniteError as found:
            spoiled |= {share.start + done + window for window in found.windows}
        except (RuntimeError, NotImplementedError) as error:
            if out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        except UnknownImportanceError as error:
            reason = str(error)
        if reason:
            source.unload(source.model)
            break
        done += len(part)
        if on_part is not None:
            on_part(done, len(mine))
    reasons, everyone = ranks.gather(reason), set().union(*ranks.gather(spoiled))
    if any(reasons):
        raise UnknownImportanceError(next(filter(None, reasons)))
    if everyone:
        raise NotFiniteError(sorted(everyone))
    paths = [layer.path for block in blocks for layer in block.layers.values()]
    return dict(_counts(paths, parts, mine, ranks))


def windows_at_once(source: Source, blocks: int, seqlen: int, dtype: torch.dtype) -> int:
    """How many windows' hidden states there is room for, in front of all blocks."""
    hidden = getattr(source.config.get_text_config(), "hidden_size", 1)
    room = max(HELD_BYTES, sum(entry.bytes for entry in source.entries.values()) // HELD_SHARE)
    return max(1, room // (blocks * seqlen * hidden * held_dtype(dtype).itemsize))


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """What hidden states wait in."""
    return HELD_DTYPE if HELD_DTYPE.itemsize < dtype.itemsize else dtype


def _counts(
    paths: list[str], parts: Sequence[dict[str, Noted]], windows: Tensor, ranks: Ranks
) -> Iterator[tuple[str, Tensor]]:
    """By a layer's path, 1 in the mean over all processes; nothing where a part lacks a layer, or all is 0."""
    for path in paths:
        known = all(path in part for part in parts)
        slope, size = torch.zeros(2, *windows.shape)
        if known and parts:
            slope = torch.cat([part[path].slope for part in parts]).nan_to_num(0.0, 0.0, 0.0)
            size = torch.cat([part[path].size for part in parts]).nan_to_num(0.0, 0.0, 0.0)
        sums = [slope.double().sum(), (slope.double() * size).sum(), size.double().sum()]
        sums += [torch.tensor(float(number), dtype=torch.float64) for number in (slope.numel(), not known)]
        whole, weighed, plain, count, unknown = ranks.sum(torch.stack(sums)).tolist()
        if not unknown and weighed > 0:
            even = weighed / plain
            yield path, (slope + even) / (whole / count + even)


@dataclass
class _Part:
    """Some windows, there and back. seed: of the first one's tokens."""

    source: Source
    tower: Tower
    blocks: list[Block]
    flow: Flow
    dtype: torch.dtype
    seed: int
    held: list[list[Tensor]] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)

    def run(self) -> dict[str, Noted]:
        """What is noted of all windows, float32 on the CPU, by a layer's path."""
        self.flow.capture()
        self.held = []
        for index, block in enumerate(self.blocks):
            self.held.append([hidden.to("cpu", held_dtype(hidden.dtype)) for hidden in self.flow.quantized.hidden])
            with self._loaded(block):
                self.flow.advance(block.module, None, index, [], [])
        self._predict()
        found: dict[str, Noted] = {}
        for index, block in reversed(list(enumerate(self.blocks))):
            with self._loaded(block):
                found |= self._back(block, index)
        return found

    @contextmanager
    def _loaded(self, block: Block) -> Iterator[None]:
        self.source.load((block.path,), self.flow.device, self.dtype)
        block.module.requires_grad_(False)
        with _products(self.flow.device, learning_dtype(next(block.module.parameters()))):
            yield
        self.source.unload(block.module)

    def _predict(self) -> None:
        """Draw tokens; gradients of their log-probability with respect to the last block's output, batch by batch."""
        made, self.slopes = self.flow.quantized, []
        batches = self.flow.tokens.split(self.flow.sizes)
        with self.source.around(self.tower, self.flow.device, self.dtype, with_head=True):
            self.source.model.requires_grad_(False)
            window = 0
            for batch, hidden in enumerate(made.hidden):
                slopes = []
                for row in range(len(hidden)):
                    one = replace(made, hidden=[hidden[row : row + 1]], rest=[made.rest[batch]])
                    slopes.append(self._slope(one, batches[batch][row : row + 1], self.seed + window))
                    window += 1
                self.slopes.append(torch.cat(slopes).to(hidden.device))

    def _slope(self, window: decoder.Captured, ids: Tensor, seed: int) -> Tensor:
        """Of one window, `[1, tokens, hidden_size]`; so many tokens at a time as there is room for logits."""
        (hidden,), device = window.hidden, self.flow.device
        piece = max(1, LOGITS // max(1, getattr(self.source.config.get_text_config(), "vocab_size", 1)))
        generator = torch.Generator(device=device).manual_seed(seed)
        slopes = []
        for part, some in zip(hidden.split(piece, 1), ids.split(piece, 1), strict=True):
            leaf = part.to(device).detach().requires_grad_(True)
            call = {"input_ids": some.to(device), "use_cache": False}
            with torch.enable_grad(), _products(device, learning_dtype(part)):
                ready = window.returned(0, leaf)
                logits = decoder.predict(self.source.model, self.tower.blocks, call, ready)
                if not isinstance(logits, Tensor) or logits.shape[:2] != some.shape or logits.dim() != 3:
                    raise UnknownImportanceError("the model does not predict a token at every place")
            slope = logits.detach()[0].float().softmax(-1)
            drawn = draw(slope, generator)
            slope.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=slope.dtype))  # softmax − one-hot
            logits.backward(slope.unsqueeze(0).to(logits.dtype))
            assert leaf.grad is not None
            slopes.append(leaf.grad)
        return torch.cat(slopes, 1)

    def _back(self, block: Block, index: int) -> dict[str, Noted]:
        """From behind a block to in front of it; what there is of its layers."""
        found: dict[str, list[Noted]] = {}
        made = self.flow.quantized

        def run(hidden: Tensor) -> Tensor:
            made.hidden[batch] = hidden
            return made.run(block.module, index, batch)

        for batch, hidden in enumerate(self.held.pop()):
            slope = self.slopes[batch].to(self.flow.device)
            slope, notes = through(block, run, hidden.to(slope), slope)
            made.hidden[batch] = hidden
            self.slopes[batch] = slope.to(self.slopes[batch].device)
            for path, note in notes.items():
                found.setdefault(path, []).append(Noted(note.slope.cpu(), note.size.cpu()))
        whole = {path: notes for path, notes in found.items() if len(notes) == len(self.slopes)}
        return {path: Noted(*map(torch.cat, zip(*notes, strict=True))) for path, notes in whole.items()}


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row `[rows, choices]` of probabilities: int64 `[rows, 1]`."""
    reached = probabilities.cumsum(-1)
    where = torch.rand(len(reached), 1, generator=generator, device=reached.device) * reached[:, -1:]
    return torch.searchsorted(reached, where).clamp_max_(reached.shape[1] - 1)


def through(
    block: Block, run: Callable[[Tensor], Tensor], hidden: Tensor, slope: Tensor
) -> tuple[Tensor, dict[str, Noted]]:
    """From a gradient behind a block, `[windows, seqlen, hidden_size]`, to that in front of it; and what layers see.

    run: the block. A layer that does not see each token once is left out.
    """
    times: dict[str, int] = {}
    found: dict[str, Noted] = {}

    def norm(vectors: Tensor) -> Tensor:
        return vectors.detach().float().square().sum(-1).reshape(hidden.shape[:2])

    def behind(path: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            times[path] = times.get(path, 0) + 1
            if out.requires_grad and out.shape[:-1].numel() == hidden.shape[:2].numel():
                size = norm(args[0])
                out.register_hook(lambda gradient: found.update({path: Noted(norm(gradient), size)}))

        return hook

    leaf = hidden.detach().requires_grad_(True)
    layers = [(block.module.get_submodule(name), layer.path) for name, layer in block.layers.items()]
    handles = [module.register_forward_hook(behind(path)) for module, path in layers]
    try:
        with torch.enable_grad():
            made = run(leaf.clone())  # which a block may alter in place
            made.backward(slope.to(made.dtype))
    finally:
        for handle in handles:
            handle.remove()
    assert leaf.grad is not None
    return leaf.grad, {path: note for path, note in found.items() if times[path] == 1}


def _products(device: torch.device, dtype: torch.dtype) -> Any:
    """Matrix products in a dtype that the device is faster in."""
    plain = dtype is torch.float32 or device.type == "meta"
    return nullcontext() if plain else torch.autocast(device.type, dtype)
