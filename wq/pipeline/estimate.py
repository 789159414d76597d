"""What a run will take, known before it: memory, disk, and work; from headers alone.

Memory is that of the largest moment. The process itself is measured; to it comes what is loaded at that moment, known
from the shapes of its parameters; and to that what the code makes then, metered by running the code of one block of
each kind on shapes (`wq.pipeline.shapes`): hidden states, the copy of the dense block, statistics, the solver. Batches
of calibration are all alike, so a few and one more tell what any number takes.
"""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from wq import report
from wq.checkpoint import header_bytes
from wq.errors import BudgetError, ModelError, first_line
from wq.machine import rss_bytes
from wq.pipeline import blocks as decoder
from wq.pipeline import calibration, importance, sampling, sensitivity
from wq.pipeline.flow import batch_sizes, root_inputs
from wq.pipeline.learning import BlockRates
from wq.pipeline.plan import Block, Plan
from wq.pipeline.shapes import Meter, Work, metered
from wq.pipeline.source import Source, declare_dtype
from wq.pipeline.stages import Stages, pairs
from wq.pipeline.units import readers, together
from wq.structure.towers import Tower

_HELD_OUT = 8  # windows, of which one is held out: fewer would not show what is made of it
_POPULAR = 2.0  # times as many tokens as the mean expert the most popular one is taken to get
_READERS = min(4, os.cpu_count() or 4)  # threads with which transformers reads tensors
_LOGITS = 4  # copies of a batch's logits while the next token is drawn
_PIECE = 1 << 24  # bytes in which a tensor is copied that stays as it is


@dataclass(frozen=True)
class Job:
    """A run, as far as it can be known.

    solver, fmt, plan: as in `wq.pipeline.quantizer`. device: where blocks run; dtype: in what. samples, seqlen: of
    the calibration that the solver sees, or 0. without: steps that are left out. importance: whether tokens count
    apart. text: the calibration's, None if there is none or it is given. widths: to choose from, if that is asked
    for. rates: of learning rounding block by block.
    """

    source: Source
    solver: ModuleType
    fmt: ModuleType
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    samples: int = 0
    seqlen: int = 0
    without: frozenset[str] = frozenset()
    importance: bool = False
    text: str | None = None
    widths: tuple[int, ...] = ()
    rates: BlockRates | None = None

    @property
    def weighs(self) -> bool:
        """Whether it is found first what each token counts."""
        wanted = bool(self.samples) and len(self.plan.towers) == 1
        return wanted and importance.wanted(self.solver, self.importance, self.without)

    @property
    def paired(self) -> bool:
        """Whether the dense model's hidden states are kept beside those of the model quantized so far."""
        return bool(self.samples) and pairs(self.solver, self.without)


@dataclass(frozen=True)
class Moment:
    """A part of a run. held: bytes that it takes throughout, by what takes them. peaks: bytes besides, for each of its
    steps. work: what it does; times: how often. solves: matrices `(out, in)` that are solved in it.
    """

    name: str
    held: dict[str, int]
    peaks: tuple[int, ...] = (0,)
    work: Work = field(default_factory=Work)
    times: int = 1
    solves: tuple[tuple[int, int], ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at its largest step, by what takes them."""
        return self.held | {"statistics, solver, activations": max(self.peaks)}

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    device: where blocks run. process: bytes that the process takes before it begins. moments: of the run, with what
    they take on the device besides. staging: bytes of the host's memory that pass through it on their way to and from a
    GPU; 0 on a CPU. checkpoint, journal: bytes on disk. rows: windows of calibration in a batch.
    """

    device: str
    process: int
    moments: list[Moment]
    staging: int
    checkpoint: int
    journal: int
    rows: int

    @property
    def largest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def on_host(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def host(self) -> int:
        """Bytes of RAM at the peak."""
        return self.process + (self.largest.bytes if self.on_host else self.staging)

    @property
    def memory(self) -> int:
        """Bytes at the peak on the device: on a CPU of the process, on a GPU of its tensors."""
        return self.host if self.on_host else self.largest.bytes

    @property
    def disk(self) -> int:
        return self.checkpoint + self.journal

    def to_dict(self) -> dict[str, Any]:
        """For a program."""
        return {
            "device": self.device,
            "checkpoint_bytes": self.checkpoint,
            "peak_rss_bytes": self.host,
            "peak_device_bytes": self.memory,
            "disk_bytes": {"checkpoint": self.checkpoint, "journal": self.journal},
            "process_bytes": self.process,
            "windows_at_once": self.rows,
            "moments": [{"name": m.name, "bytes": m.bytes, "parts": m.parts, "times": m.times} for m in self.moments],
        }


def estimate(job: Job, rows: int) -> Estimate:
    """What a job takes with `rows` windows of calibration at once; nothing is read.

    Raises ModelError for a model whose code asks for values where shapes alone are known.
    """
    process = _process(job)
    moments = [*_preparation(job), *_blocks(job, rows)]
    streams = _stream(job)
    moments.append(Moment("writing what stays dense", {"hidden states": streams, "a tensor": _largest_dense(job)}))
    off = job.device.type != "cpu"
    read = sum(sorted(entry.bytes for entry in job.source.entries.values())[-_READERS:])
    return Estimate(
        device=str(job.device),
        process=process,
        moments=moments,
        staging=max(read, _largest_dense(job)) if off else 0,
        checkpoint=sum(spec.bytes for spec in job.plan.specs.values()) + header_bytes(job.plan.specs),
        journal=journal_bytes(job),
        rows=rows,
    )


def fitting(job: Job, rows: int, budget: int | None) -> Estimate:
    """The estimate with `rows` windows of calibration at once, or as many as fit into `budget` bytes on the device.

    Raises BudgetError, naming what takes the memory, if not even one does.
    """
    made = estimate(job, rows)
    if budget is None or made.memory <= budget:
        return made
    least = estimate(job, 1) if rows > 1 else made
    if least.memory > budget:
        raise BudgetError(too_large(least, budget))
    low, high = 1, rows  # the first fits, the second does not
    while high - low > 1:
        middle = (low + high) // 2
        tried = estimate(job, middle)
        if tried.memory <= budget:
            low, least = middle, tried
        else:
            high = middle
    return least


def too_large(made: Estimate, budget: int) -> str:
    """What to say of a run that does not fit."""
    size, largest = report.size, made.largest
    own = {"Python and its libraries": made.process} if made.on_host else {}
    parts = sorted((own | largest.parts).items(), key=lambda part: -part[1])
    told = ", ".join(f"{size(count)} for {name}" for name, count in parts if count)
    return (
        f"--max-memory {size(budget)}: this run takes {size(made.memory)} on {made.device} at {largest.name}: {told}. "
        "Give fewer --samples or a shorter --seqlen, which hidden states and statistics follow; what the block and the "
        "process take is the least there is."
    )


# --- before the blocks ---


def _preparation(job: Job) -> Iterator[Moment]:
    """What runs before: a text of the model's own, a choice of widths."""
    if job.text == sampling.SELF:
        weights = _bytes(job, _parameters(job.source.model))
        parts = {"the whole model": weights, **_writing(job)}
        yield Moment("writing calibration text", parts)
    if job.widths and job.samples:
        yield Moment("choosing widths", _choosing(job))


def _writing(job: Job) -> dict[str, int]:
    """What the model takes to write text, besides itself: keys and values of all tokens at once, and logits."""
    config = job.source.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    keys = (getattr(config, "num_key_value_heads", None) or heads) * size * config.num_hidden_layers
    rows = max(1, sampling.CACHED_TOKENS // job.seqlen)
    cache = 2 * keys * min(rows * job.seqlen, sampling.CACHED_TOKENS) * job.dtype.itemsize
    return {"keys and values": cache, "logits": _LOGITS * rows * config.vocab_size * 4}


def _choosing(job: Job) -> dict[str, int]:
    """What it takes to choose widths: hidden states of all streams, and a block with the statistics of its inputs."""
    _, blocks = job.plan.towers[0]
    hidden = job.source.config.get_text_config().hidden_size * job.dtype.itemsize
    judged = min(max(1, sensitivity.JUDGED // job.seqlen), max(1, job.samples // 4)) * job.seqlen
    learned = min(max(job.seqlen, sensitivity.LEARNED), job.samples * job.seqlen)
    units = sum(len(together(readers(block), ())) for block in blocks)
    alone = units * judged * hidden <= sensitivity.STREAM_BYTES
    streams = (units if alone else len(blocks)) + 1
    largest = max(blocks, key=lambda block: _bytes(job, _parameters(block.module)))
    weights = _bytes(job, _parameters(largest.module))
    moments = sum(4 * layer.shape[1] ** 2 for layer in largest.layers.values())
    return {
        "hidden states": (streams * judged + learned) * hidden,
        "a block": weights,
        "its copy": weights,
        "statistics": moments,
    }


def _around(tower: Tower) -> list[Tensor]:
    """Parameters of a tower outside of its blocks: its embeddings, as a rule."""
    inside = {id(parameter) for parameter in tower.blocks.parameters()}
    return [parameter for parameter in tower.root.parameters() if id(parameter) not in inside]


# --- blocks ---


def _blocks(job: Job, rows: int) -> list[Moment]:
    """Capture, and one block of each kind."""
    sizes, least = batch_sizes(job.samples, rows), _few(rows)
    if len(sizes) <= least + 2:
        return _metered(job, sizes)
    few, more = _metered(job, [1, *[rows] * least]), _metered(job, [1, *[rows] * (least + 1)])
    return [_extended(a, b, (job.samples - 1) / rows - least) for a, b in zip(few, more, strict=True)]


def _few(rows: int) -> int:
    """How many batches, and one more, tell what any number takes."""
    return max(2, math.ceil(_HELD_OUT / rows))


def _extended(few: Moment, more: Moment, further: float) -> Moment:
    """A moment with so many further batches, from those with few and with one more."""

    def line(a: int, b: int) -> int:
        return round(a + further * (b - a))

    held = {name: line(count, more.held[name]) for name, count in few.held.items()}
    peaks = tuple(line(a, b) for a, b in zip(few.peaks, more.peaks, strict=True))
    work = few.work.plus(more.work.plus(few.work, -1.0), further)
    return replace(few, held=held, peaks=peaks, work=work)


def _metered(job: Job, sizes: list[int]) -> list[Moment]:
    declare_dtype(job.source.model, ("",), job.dtype)
    try:
        with metered(job.source.model, _share(job.plan)) as meter:
            return list(_Walk(job, meter).run(sizes))
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{job.source.name}: what it takes cannot be known beforehand, its code asks for values "
            f"({first_line(error)})."
        ) from error


def _share(plan: Plan) -> float:
    """Of the tokens, the part that a popular expert gets for each expert that a token goes to."""
    experts = [one.size.experts for _, blocks in plan.towers for block in blocks for one in block.experts.values()]
    return _POPULAR / max(experts, default=1)


@dataclass
class _Walk:
    """A run on shapes."""

    job: Job
    meter: Meter
    encoded: list[Tensor] = field(default_factory=list)
    dense_encoded: list[Tensor] = field(default_factory=list)

    def run(self, sizes: list[int]) -> Iterator[Moment]:
        """Every moment with batches of so many windows."""
        towers = self.job.plan.towers
        for tower, blocks in towers:
            captured = dense = None
            if sizes:
                tokens = [torch.zeros(size, self.job.seqlen, dtype=torch.int64, device="meta") for size in sizes]
                inputs = root_inputs(self.job.source, tower, tokens, self.encoded)
                yield self._captured(tower, blocks[0], inputs)
                captured = self.last
                dense = replace(captured, hidden=[h.clone() for h in captured.hidden]) if self.job.paired else None
                self.meter.take()
            if captured is not None and self.job.weighs:
                yield from self._weighed(tower, blocks, captured)
            for index, times in _kinds(blocks):
                yield self._block(blocks[index], index, captured, dense, times)
            if captured is not None and tower is not towers[-1][0]:
                self.encoded = decoder.finish(tower.root, tower.blocks, inputs, captured)
                self.dense_encoded = [] if dense is None else [one.clone() for one in self.encoded]

    def _captured(self, tower: Tower, first: Block, inputs: list[dict[str, Any]]) -> Moment:
        self.last = decoder.capture(tower.root, tower.blocks, inputs, self.job.source.name)
        peak, work = self.meter.take()
        around, block = _around(tower), _parameters(first.module)
        held = {"embeddings": _bytes(self.job, around), "a block": _bytes(self.job, block)}
        return Moment(f"the way to {first.path}", held, (peak, self.meter.live, _reading(self.job, "")), work)

    def _weighed(self, tower: Tower, blocks: list[Block], captured: decoder.Captured) -> Iterator[Moment]:
        """Finding what each token counts: a pass through each kind of block, and back; and the prediction."""
        job, size = self.job, captured.hidden[0][0].nbytes
        held = size * importance.held_dtype(job.dtype).itemsize // job.dtype.itemsize
        windows = min(job.samples, importance.windows_at_once(job.source, len(blocks), job.seqlen, job.dtype))
        between = {"hidden states before all blocks": windows * held * len(blocks)}
        # The first batch has one window, as all have on a CPU.
        batches = range(1 if job.device.type == "cpu" else len(captured.hidden))
        often = sum(map(len, captured.hidden)) / sum(len(captured.hidden[batch]) for batch in batches)
        for index, times in _kinds(blocks):
            block, total, peaks = blocks[index], Work(), [_reading(job, blocks[index].path)]
            for batch in batches:
                run = partial(_once, captured, block.module, index, batch)
                before = self.meter.live
                run(captured.hidden[batch])
                importance.through(block, run, captured.hidden[batch], captured.hidden[batch])
                peak, work = self.meter.take()
                peaks.append(peak - before)
                total = total.plus(work, often)
            own = {"a block": _bytes(job, _parameters(block.module)), "gradients behind a block": windows * size}
            yield Moment(f"what tokens count in {block.path}", between | own, (max(peaks),), total, times)
        inside = {id(parameter) for parameter in tower.blocks.parameters()}
        around = [one for one in job.source.model.parameters() if id(one) not in inside]
        vocabulary = getattr(job.source.config.get_text_config(), "vocab_size", 0)
        logits = {
            "logits": 4 * _LOGITS * min(importance.LOGITS, job.seqlen * vocabulary),
            "embeddings, head": _bytes(job, around),
        }
        yield Moment("what tokens count in the prediction", between | logits)

    def _block(
        self, block: Block, index: int, captured: decoder.Captured | None, dense: decoder.Captured | None, times: int
    ) -> Moment:
        held, module, solves = self.meter.live, block.module, []
        steps: list[tuple[int, Work]] = []
        original = None if dense is None else copy.deepcopy(module)
        copied = self.meter.live - held

        def solve(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            solves.append((weight.shape[0], weight.shape[1]))
            return self.job.solver.solve(weight, *args, **kwargs)

        stages = _Steps(
            done=lambda: steps.append(self.meter.take()),
            source=self.job.source,
            solver=SimpleNamespace(**{**vars(self.job.solver), "solve": solve}),  # type: ignore[arg-type]
            fmt=self.job.fmt,
            schemes=self.job.plan.schemes,
            writer=_Nowhere(),  # type: ignore[arg-type]
            block=block,
            forward=None if captured is None else lambda batch: captured.run(module, index, batch),
            windows=[] if captured is None else [len(hidden) for hidden in captured.hidden],
            generator=torch.Generator(),
            dense=None if dense is None or original is None else (original, partial(dense.run, original, index)),
            without=self.job.without,
            rates=self.job.rates,
            importance={} if captured is None or not self.job.weighs else self._counts(block, captured),
        )
        stages.run()
        if captured is not None:
            captured.hidden = stages.outputs or captured.outputs(module, index)
        if dense is not None and original is not None:  # the last layer's pass has moved it on, as a rule
            dense.hidden = stages.dense_outputs or [dense.run(original, index, i) for i in range(len(dense.hidden))]
        steps.append(self.meter.take())
        peaks = (*(peak - held - copied for peak, _ in steps), _reading(self.job, block.path))
        own = {"a block": _bytes(self.job, _parameters(module)), "its dense copy": copied, "hidden states": held}
        return Moment(block.path, own, peaks, sum((work for _, work in steps), Work()), times, tuple(solves))

    def _counts(self, block: Block, captured: decoder.Captured) -> dict[str, Tensor]:
        counts = torch.zeros(sum(map(len, captured.hidden)), self.job.seqlen, device="meta")
        return {layer.path: counts for layer in block.layers.values()}


@dataclass
class _Steps(Stages):
    """done: called after each stage, whose peak grows with the number of batches in its own way."""

    done: Callable[[], None] = lambda: None

    def _stage(self, members: dict[str, nn.Module]) -> list[dict[str, Any]]:
        records = super()._stage(members)
        self.done()
        return records

    def _learn(self, records: list[dict[str, Any]]) -> None:
        super()._learn(records)
        self.done()


def _once(captured: decoder.Captured, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
    """What a block makes of other hidden states than those of a batch."""
    others = list(captured.hidden)
    others[batch] = hidden
    return replace(captured, hidden=others).run(block, index, batch)


class _Nowhere:
    """Takes what is written."""

    def write(self, name: str, tensor: Tensor) -> None:
        """As a `wq.checkpoint.ShardWriter`, and forget it."""


def _kinds(blocks: list[Block]) -> list[tuple[int, int]]:
    """The index of one block of each kind, and how many of the kind there are."""
    count: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.module.named_parameters())
        count.setdefault((shapes, *block.layers, *block.experts), []).append(index)
    return [(found[-1], len(found)) for found in count.values()]


# --- tensors ---


def _parameters(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


def _bytes(job: Job, parameters: Iterable[Tensor]) -> int:
    """What parameters take on the device; shared ones once."""
    return sum(one.numel() * (job.dtype.itemsize if one.is_floating_point() else one.itemsize) for one in parameters)


def _reading(job: Job, prefix: str) -> int:
    """Bytes that loading what is under a module takes besides what is loaded.

    Tensors whose dtype is another on disk are cast, as many at once as there are threads; those that make up one
    parameter are all there when it is put together.
    """
    source = job.source
    inside = {name: where for name, where in source.tensors.items() if not prefix or where[0].startswith(f"{prefix}.")}
    passing, joined = [], Counter[str]()
    for name, (parameter, plain) in inside.items():
        entry = source.entries[name]
        loaded = math.prod(entry.shape) * job.dtype.itemsize
        passing.append(0 if entry.dtype == job.dtype else entry.bytes)
        joined[parameter] += 0 if plain else loaded
    return sum(sorted(passing)[-_READERS:]) + max(joined.values(), default=0)


def journal_bytes(job: Job) -> int:
    """Bytes on disk of what is noted to go on from: a note takes the place of another that is removed only then."""
    layers = sum(len(block.layers) for _, blocks in job.plan.towers for block in blocks)
    return 2 * _stream(job) + (4 * layers * job.samples * job.seqlen if job.weighs else 0)


def _stream(job: Job) -> int:
    """Bytes of the hidden states that are kept between blocks."""
    if not job.samples:
        return 0
    hidden = getattr(job.source.config.get_text_config(), "hidden_size", 0)
    return job.samples * job.seqlen * hidden * job.dtype.itemsize * (2 if job.paired else 1)


def _largest_dense(job: Job) -> int:
    """Bytes for the largest tensor that is written as it was, or cast."""
    took = [0]
    for name, entry in job.source.entries.items():
        spec = job.plan.specs.get(name)
        if spec is not None:
            took.append(min(entry.bytes, _PIECE) if spec.dtype == entry.dtype else entry.bytes + spec.bytes)
    return max(took)


def _process(job: Job) -> int:
    """Bytes of this process once it has all that it computes with: libraries of linear algebra, the tokenizer."""
    if job.samples:
        job.source.tokenizer("as many words as it takes " * 5000)
        calibration.get_ready(job.text)
    one = torch.ones(1024, 1024)
    torch.linalg.cholesky_ex(one @ one)
    del one
    return rss_bytes()
