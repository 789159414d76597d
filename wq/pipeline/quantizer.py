"""The loop: one block at a time, and in it one stage at a time, so that memory does not grow with the model.

First, if the solver asks for it, find what each token counts for each layer (`importance`). Then, for each block of the
decoder (in an encoder-decoder model: of the encoder, then of the decoder):

    load it ─► group its layers by shared input ─► for each group, in the order the block runs them:
        collect E[x xᵀ] from the hidden states, up to this group (its predecessors are quantized by now)
        solve the stacked weights ─► split ─► put the dequantized weights in place ─► pack ─► write
    ─► run the block once more to move the hidden states on ─► write what stays dense ─► free it
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import wq
from wq import formats, manifest, report, solvers
from wq.checkpoint import Nowhere, ShardWriter, check_finite, write_text
from wq.errors import CalibrationError, ModelError, OutputError
from wq.journal import Journal
from wq.machine import default_device, keep_memory_tight, peak_rss_bytes, release_memory
from wq.pipeline import calibration as calibration_text
from wq.pipeline import estimate, mixing, sampling
from wq.pipeline import importance as weighing
from wq.pipeline.flow import Flow, NotFiniteError, patiently, windows_at_once
from wq.pipeline.learning import BlockRates
from wq.pipeline.plan import Block, Plan, assigned, make_plan, mix
from wq.pipeline.progress import Progress, Streams, check_same, digests
from wq.pipeline.ranks import Ranks
from wq.pipeline.source import Source, open_source
from wq.pipeline.stages import Stages, pairs
from wq.scheme import Scheme, check_quantizable
from wq.staging import Workplace, check_output, check_space, workplace
from wq.structure.towers import Tower

_MOST_LEFT_OUT = 0.1  # of the calibration windows

# The pipeline's own: a layer learns behind those that are quantized before it, and not from the dense model's pass.
# Tokens count by what the model's prediction owes to them.
STEPS = ("importance", "sequence")

BlockCallback = Callable[[dict[str, Any]], None]
Finish = Callable[[Path, Tensor | None, Journal], dict[str, Any]]


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str = "gptq",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    format: str = "compressed-tensors",
    calibration: str | Iterable[str] = "c4",
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    keep: Iterable[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    target_bpw: float | None = None,
    target_size: int | str | None = None,
    mix: Iterable[int] | None = None,
    without: Iterable[str] = (),
    importance: bool = False,
    reserve: int = 0,
    rates: BlockRates | None = None,
    max_memory: int | str | None = None,
    ranks: Ranks | None = None,
    on_block: BlockCallback | None = None,
    on_sample: sampling.SampleCallback | None = None,
    on_mix: mixing.OnStep | None = None,
    on_part: weighing.OnPart | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Quantize a dense model into a checkpoint folder that transformers and vLLM load, and return its report.

    model: a repo id, a local folder or a GGUF file. output: the folder to make; it appears only when complete.
    method: a name in `wq.solvers.SOLVERS`. bits: 2, 3, 4 or 8; 4 unless said otherwise. group_size: None takes the
    largest of 128, 64 and 32 that divides every layer; -1 is one scale for each output row. symmetric: no stored
    zero points. format: a name in `wq.formats.FORMATS`. calibration: see `wq.pipeline.calibration.load`; or `self`,
    which the model writes, whole in memory for that; methods that need none read none. keep: regular expressions;
    layers whose name one of them matches stay dense. dtype: of scales and dense tensors; None keeps the model's own
    (float32 is stored as float16). device: where blocks run; None is the first GPU, or the CPU. target_bpw,
    target_size, mix: instead of bits; `wq.pipeline.mixing.parse`. restart: forget what an unfinished run to this
    folder has done, and do not go on from there. without: steps of the method, or in `STEPS`, that are left out.
    importance: whether tokens count by what the model's prediction depends on, `wq.pipeline.importance`. reserve:
    how many of the windows the solver does not see. max_memory: bytes, or text such as `12GB`, that a process may
    take on its device; fewer windows run at once for it, as `wq.pipeline.estimate` says. ranks: the processes that
    share the run, each of which calls this; `wq.pipeline.ranks`. on_block: called with a dict after each block.
    on_sample: called with the tokens that the model has written, and how many it will. on_mix: called with what is
    done and to do while widths are chosen. on_part: called with the windows in which it is known what tokens count,
    and all. finish: called with the folder when all but the report is in it, with the windows in reserve and a
    journal; what it returns goes into the report.

    Raises a WqError, before any heavy work, for everything that can be known to fail.
    """
    started = time.perf_counter()
    solver, fmt = solvers.get(method), formats.get(format)
    omitted = solvers.check_steps(method, without, STEPS)
    goal, scheme = mixing.parse(target_bpw, target_size, mix, bits), wished(bits, group_size, symmetric)
    ranks = ranks or Ranks()
    with _at_work(Path(output), overwrite, restart, ranks) as place, torch.no_grad():
        with open_source(model, revision, trust_remote_code) as source:
            plan = make_plan(source, fmt, scheme, group_size is None, keep, dtype)
            room = None if goal is None else mixing.room(source, fmt, plan, goal)
            where = torch.device(device or default_device())
            weighs = weighing.wanted(solver, importance, omitted)
            job = _Job(source, solver, fmt, plan, where, seed, omitted, weighs, place, ranks, rates, on_part)
            asked = {"method": method, "format": format, "samples": samples, "seqlen": seqlen, "reserve": reserve}
            same = {
                **asked,
                "importance": weighs,
                "rates": None if rates is None else vars(rates),
                "goal": None if goal is None else goal.to_dict(),
                "processes": ranks.count,
            }
            data = calibration if solver.NEEDS_STATISTICS or room is not None else None
            if max_memory is not None:
                sight = (0, 0) if data is None else (samples - reserve, seqlen)
                text, widths = data if isinstance(data, str) else None, () if room is None else room.goal.widths
                job.keep_to(max_memory, job.known(*sight, text, widths))
            stream = job.prepare(same, data, samples, seqlen, room, on_mix, on_sample)
            tokens, left = (None, None) if stream is None else stream.tokens.tensor_split([samples - reserve])
            if place.published:
                return _published(place)
            layers = job.build(tokens if solver.NEEDS_STATISTICS else None, on_block)

            def complete() -> dict[str, Any]:
                config = _write_config(source, place.folder, job.plan, fmt)
                source.save_companions(place.folder)
                finished = job.mixed(config) | ({} if finish is None else finish(place.folder, left, job.journal))
                made = _report(source, job.plan, method, format, stream, layers, job, started) | finished
                _describe(place.folder, made)
                return made

            made = ranks.first(complete)
        ranks.first(place.publish)
    return made


@contextmanager
def _at_work(output: Path, overwrite: bool, restart: bool, ranks: Ranks) -> Iterator[Workplace]:
    """The workplace of `output`, which keeps what an unfinished run has done; what fails says how to go on.

    The first process has it; to the others it only says where things are.
    """
    keep_memory_tight()
    with ExitStack() as stack:

        def enter() -> tuple[bool, bool]:
            place = stack.enter_context(workplace(output, overwrite))
            if restart:
                place.clear()
            if not place.published:
                check_output(output, overwrite)
            places.append(place)
            return place.keep, place.published

        places: list[Workplace] = []
        keep, published = ranks.first(enter)
        place = places[0] if places else Workplace(output, overwrite)
        place.keep, place.published = keep, published
        try:
            yield place
        except BaseException as error:
            if place.keep and not isinstance(error, OutputError):
                error.add_note(f"What is done is kept in {place.root}: repeat the command to go on from there.")
            raise


def _published(place: Workplace) -> dict[str, Any]:
    """What a run reported that was killed between putting the checkpoint in place and tidying up."""
    place.keep = False
    made = report.load(place.path)
    assert made is not None
    return made


def _describe(stage: Path, made: dict[str, Any]) -> None:
    """Write the report, the card and the manifest of what is in the folder."""
    made["checkpoint_bytes"] = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
    report.save(made, stage)
    manifest.write(stage, {name: made[name] for name in ("command", "versions")})


def wished(bits: int | None, group_size: int | None, symmetric: bool) -> Scheme:
    """The scheme as far as it is known without the model."""
    bits = 4 if bits is None else bits
    check_quantizable(bits)
    return Scheme(bits, -1 if group_size is None else group_size, symmetric)


def check_can_calibrate(source: Source, plan: Plan, seqlen: int) -> None:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise CalibrationError(f"--seqlen {seqlen} is longer than the {limit} positions {source.name} has.")
    first = plan.towers[0][0]
    if first.reads_encoder:
        raise ModelError(
            f"{source.name}: its decoder reads an encoder that takes no text, so text cannot calibrate it. "
            "Use --method rtn, which needs no data."
        )


@dataclass
class _Job:
    """One run over the blocks."""

    source: Source
    solver: ModuleType
    fmt: ModuleType
    plan: Plan
    device: torch.device
    seed: int
    without: frozenset[str]
    weighs: bool
    place: Workplace
    ranks: Ranks
    rates: BlockRates | None
    on_part: weighing.OnPart | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # what tells it from other runs
    progress: Progress = field(default_factory=Progress)
    changed: set[str] = field(default_factory=set)  # dense parameters that folding altered
    choice: dict[str, Any] | None = None  # of widths
    before: float = 0.0  # seconds that other runs have spent
    rows: int | None = None  # windows at once, if there is not memory for as many as are fast
    importance: dict[str, Tensor] = field(default_factory=dict)  # of tokens, by layer
    alike: str = ""  # why all tokens count alike, if they should not

    @property
    def journal(self) -> Journal:
        return Journal(self.place.root)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32 on the CPU; a GPU runs the model in its own dtype, and sums statistics in float32."""
        return torch.float32 if self.device.type == "cpu" else self.source.dtype

    def known(self, samples: int, seqlen: int, text: str | None = None, widths: tuple[int, ...] = ()) -> estimate.Job:
        """The run, for what it will take. samples: windows that the solver sees, 0 for one that sees none."""
        return estimate.Job(
            self.source,
            self.solver,
            self.fmt,
            self.plan,
            self.device,
            self.compute_dtype,
            samples=samples,
            seqlen=seqlen,
            without=self.without,
            importance=self.weighs,
            text=text,
            widths=widths,
            rates=self.rates if self.ranks.alone else None,
        )

    def keep_to(self, budget: int | str, known: estimate.Job) -> None:
        """Run fewer windows at once, if that keeps to some memory. Raises BudgetError if not even that does."""
        mine = replace(known, samples=known.samples // self.ranks.count)
        size = mixing.parse_size("--max-memory", budget)
        self.rows = estimate.fitting(mine, windows_at_once(mine.seqlen), size).rows

    def prepare(
        self,
        asked: dict[str, Any],
        source: str | Iterable[str] | None,
        samples: int,
        seqlen: int,
        room: mixing.Room | None,
        on_mix: mixing.OnStep | None,
        on_sample: sampling.SampleCallback | None,
    ) -> calibration_text.Calibration | None:
        """Tokens to learn from, and a width for each layer; and how far a run before this one has come.

        What takes long to find is noted. Raises OutputError if the run before was of another job.
        """
        if source is not None:
            check_can_calibrate(self.source, self.plan, seqlen)
        own = isinstance(source, str) and source == sampling.SELF
        stream = None
        if source is not None and not own:
            stream = calibration_text.load(source, self.source.tokenizer, samples, seqlen, self.seed)
        if stream is not None and len(stream.tokens) < self.ranks.count:
            raise CalibrationError(
                f"{len(stream.tokens)} calibration windows for {self.ranks.count} processes: each needs one."
            )
        self.identity = self._identity(asked, source if own else stream and stream.describe())
        self._go_on()
        note = self.journal.read("prepared")
        if note is not None:
            check_same(note.value["job"], self.identity, self.place.path)
            if own:
                stream = calibration_text.Calibration(note.tensors["tokens"], **note.value["calibration"])
            if room is not None:
                self.plan, self.choice = mix(self.source, self.fmt, self.plan, note.value["bits"]), note.value["choice"]
            return stream
        if not self.progress.blocks:
            self.ranks.first(lambda: check_finite(self.source.entries))
        where = self.device, self.compute_dtype
        if own:
            stream = sampling.sample(self.source, samples, seqlen, self.seed, *where, on_sample)
        if room is not None and stream is not None:
            tokens, weighted = stream.tokens[: samples - asked["reserve"]], self.solver.NEEDS_STATISTICS
            self.plan, self.choice = mixing.choose(
                self.source, self.fmt, self.plan, room, tokens, *where, weighted, on_mix
            )
        if own or room is not None:
            self._note_prepared(stream)
        return stream

    def _note_prepared(self, stream: calibration_text.Calibration | None) -> None:
        bits = {path: scheme.bits for path, scheme in self.plan.schemes.items()}
        said = {"job": self.identity, "bits": bits, "choice": self.choice}
        if stream is not None:
            said["calibration"] = {name: value for name, value in vars(stream).items() if name != "tokens"}
        if self.ranks.is_first:
            self.journal.write("prepared", said, {} if stream is None else {"tokens": stream.tokens})
        self.place.keep = True

    def _identity(self, asked: dict[str, Any], data: Any) -> dict[str, Any]:
        """All that the checkpoint depends on; a dict that JSON gives back as it is."""
        return {
            "model": self.ranks.first(lambda: digests(self.source.folder)),
            **asked,
            "scheme": self.plan.scheme.to_dict(),
            "dtype": str(self.plan.dtype),
            "dense": self.plan.dense,
            "without": sorted(self.without),
            "seed": self.seed,
            "calibration": data,
            "device": self.device.type,
            "versions": _versions(),
        }

    def _go_on(self) -> None:
        """Take up what an unfinished run has done; one that had published is only looked at."""
        try:
            found = Progress.load(self.journal, self.identity, self.place.path, self.ranks)
        except OutputError:
            if not self.place.published:
                raise
            found = None
        if found is not None:
            self.progress, self.before = found, found.seconds
        elif self.place.published:
            self.place.published = False
            self.ranks.first(self._forget)

    def _forget(self) -> None:
        self.place.clear()
        check_output(self.place.path, self.place.overwrite)

    def writer(self, tokens: Tensor | None) -> ShardWriter:
        """What puts tensors into the checkpoint, with those in it that are done; nowhere but in the first process.

        tokens: those whose hidden states will be noted. Raises OutputError for want of space.
        """
        if not self.progress.blocks:
            self.ranks.first(lambda: self._make_room(tokens))
        if not self.ranks.is_first:
            return Nowhere(self.place.folder, self.plan.specs)
        return ShardWriter(self.place.folder, self.plan.specs, written=self.progress.written)

    def _make_room(self, tokens: Tensor | None) -> None:
        """An empty folder, on a disk that is large enough."""
        shutil.rmtree(self.place.folder, ignore_errors=True)
        self.place.folder.mkdir()
        whole = sum(spec.bytes for spec in self.plan.specs.values())
        notes = estimate.journal_bytes(self.known(*((0, 0) if tokens is None else tokens.shape)))
        what = f"{report.size(whole)} for the checkpoint, {report.size(notes)} for notes to go on from"
        check_space(self.place.path, whole + notes, what)

    def mixed(self, config: dict[str, Any]) -> dict[str, Any]:
        """For the report, how widths were chosen and who reads the result; nothing if all have one."""
        if self.choice is None:
            return {}
        return {"mixed": self.choice | {"loaders": mixing.verdicts(self.plan, config)}}

    def build(self, tokens: Tensor | None, on_block: BlockCallback | None) -> list[dict[str, Any]]:
        """Quantize every block and write everything; the records of all layers.

        Windows in which the model computes something that is not finite are left out of the whole run, which begins
        again without them. Raises CalibrationError if they are many.
        """
        while True:
            kept = tokens if tokens is None else tokens[self._kept(len(tokens))]
            try:
                with self.writer(kept) as writer:
                    self.run(writer, kept, on_block)
                return self.progress.layers
            except NotFiniteError as found:
                assert tokens is not None
                left_out = [int(self._kept(len(tokens))[window]) for window in found.windows]
                self._leave_out(left_out, len(tokens))

    def _kept(self, count: int) -> Tensor:
        """The numbers of the windows that are not left out."""
        return torch.tensor([window for window in range(count) if window not in set(self.progress.left_out)])

    def _leave_out(self, windows: list[int], count: int) -> None:
        left_out = sorted({*self.progress.left_out, *windows})
        if len(left_out) > _MOST_LEFT_OUT * count:
            raise CalibrationError(
                f"{self.source.name} computes values that are not finite in {len(left_out)} of {count} calibration "
                f"windows: {', '.join(map(str, left_out))}. Use other text, or another --dtype if they overflow."
            )
        self.source.unload(self.source.model)
        self.progress = Progress(left_out=left_out)
        self.progress.save(self.journal, self.identity, self.ranks)

    def run(self, writer: ShardWriter, tokens: Tensor | None, on_block: BlockCallback | None) -> None:
        """Quantize every block from where the progress is, and write everything."""
        self.importance, self.alike = {}, ""
        if tokens is not None and self.weighs:
            self._weigh(tokens)
        left = self.progress.blocks  # of those that a run before has done
        if left and on_block is not None:
            on_block({"block": left, "blocks": self._count, "layers": [], "seconds": 0.0, "resumed": True})
        for tower, blocks in self.plan.towers:
            if left < len(blocks):
                self._tower(writer, tower, blocks, left, tokens, on_block)
            left = max(0, left - len(blocks))
        self._write_dense(writer, "", excluding=tuple(f"{tower.blocks_path}." for tower, _ in self.plan.towers))

    def _weigh(self, tokens: Tensor) -> None:
        """Find what each token counts for each layer, or take what a run before has noted."""
        name = f"importance-{self.ranks.rank}"
        mine = {"job": self.identity, "left_out": self.progress.left_out}
        note = self.journal.read(name)
        known = note is not None and note.value["of"] == mine
        if not all(self.ranks.gather(known)):
            where = (self.device, self.compute_dtype, self.ranks, self.seed, self.rows, self.on_part)
            found, reason = weighing.of_model(self.source, self.plan.towers, tokens, *where)
            self.journal.write(name, {"of": mine, "reason": reason}, found)
            self.place.keep = True
            note = self.journal.read(name)
        assert note is not None
        self.importance, self.alike = note.tensors, note.value["reason"]

    @property
    def _count(self) -> int:
        return sum(len(blocks) for _, blocks in self.plan.towers)

    def _tower(
        self,
        writer: ShardWriter,
        tower: Tower,
        blocks: list[Block],
        start: int,
        tokens: Tensor | None,
        on_block: BlockCallback | None,
    ) -> None:
        """Quantize the blocks of a tower from `start` on, and note the progress after each."""
        last = tower is self.plan.towers[-1][0]
        streams, self.progress.streams = self.progress.streams, {}
        flow = None
        if tokens is not None:
            where, paired = (self.device, self.compute_dtype), pairs(self.solver, self.without)
            flow = Flow(self.source, tower, tokens, *where, paired, streams, self.ranks, self.rows)
            if start:
                flow.go_on(streams)
        streams.clear()
        for index, block in list(enumerate(blocks))[start:]:
            started, ended = time.perf_counter(), index + 1 == len(blocks)
            made = self._block(writer, block, index, flow, last and ended)
            kept: Streams = {} if flow is None or (last and ended) else flow.finish() if ended else flow.streams
            self._note(writer, made, kept, time.perf_counter() - started, on_block)

    def _note(
        self,
        writer: ShardWriter,
        made: list[dict[str, Any]],
        streams: Streams,
        seconds: float,
        on_block: BlockCallback | None,
    ) -> None:
        """Make a block's work outlive this process."""
        writer.sync()
        before = self.progress
        self.progress = Progress(
            before.blocks + 1, before.layers + made, writer.written, before.seconds + seconds, before.left_out, streams
        )
        self.progress.save(self.journal, self.identity, self.ranks)
        self.place.keep = True
        if on_block is not None and self.ranks.is_first:
            done = self.progress.blocks
            on_block({"block": done, "blocks": self._count, "layers": made, "seconds": seconds})

    def _block(
        self, writer: ShardWriter, block: Block, index: int, flow: Flow | None, last: bool
    ) -> list[dict[str, Any]]:
        """Quantize one block, move the hidden states on unless it is the last, write it and free it."""
        written, changed = writer.written, set(self.changed)

        def undo() -> None:
            writer.back_to(written)
            self.changed = set(changed)

        def attempt() -> list[dict[str, Any]]:
            return self._attempt(writer, block, index, flow, last)

        records = patiently(attempt, self._leave_device, undo) if flow is None else flow.attempt(attempt, undo)
        self._write_dense(writer, block.path)
        self.source.unload(block.module)
        release_memory()
        return records

    def _leave_device(self) -> bool:
        """Go on, on the CPU, what needs no activations; False if it is there."""
        before, self.device = self.device, torch.device("cpu")
        return before.type != "cpu"

    def _attempt(
        self, writer: ShardWriter, block: Block, index: int, flow: Flow | None, last: bool
    ) -> list[dict[str, Any]]:
        """The part of it that takes memory, which may be tried again: nothing has moved on unless it succeeds."""
        device = self.device if flow is None else flow.device
        self.source.unload(block.module)  # of what an attempt before may have altered
        self.source.load((block.path,), device, self.compute_dtype)
        dense = None if flow is None else flow.dense
        original = None if dense is None else copy.deepcopy(block.module)
        stages = Stages(
            source=self.source,
            solver=self.solver,
            fmt=self.fmt,
            schemes=self.plan.schemes,
            writer=writer,
            block=block,
            forward=None if flow is None else partial(flow.quantized.run, block.module, index),
            windows=[] if flow is None else flow.sizes,
            ranks=self.ranks,
            first=0 if flow is None else flow.first,
            generator=torch.Generator(device=device).manual_seed(self.seed + self.progress.blocks),
            dense=None if dense is None or original is None else (original, partial(dense.run, original, index)),
            without=self.without,
            rates=self.rates,
            changed=self.changed,
            importance={
                layer.path: self.importance[layer.path].to(device)
                for layer in block.layers.values()
                if layer.path in self.importance
            },
        )
        records = stages.run()
        if flow is not None and not last:
            flow.advance(block.module, original, index, stages.outputs, stages.dense_outputs)
        return records

    def _write_dense(self, writer: ShardWriter, prefix: str, excluding: tuple[str, ...] = ()) -> None:
        """Write the tensors under a module that were not quantized, straight from the source unless altered."""
        for name, (parameter, _) in self.source.tensors.items():
            if name in self.plan.packed or (prefix and not parameter.startswith(f"{prefix}.")):
                continue
            if parameter.startswith(excluding):
                continue
            if parameter in self.changed:
                writer.write(name, self.source.model.get_parameter(parameter).to(self.plan.specs[name].dtype))
            else:
                writer.copy(name, self.source.entries[name])


def _write_config(source: Source, stage: Path, plan: Plan, fmt: ModuleType) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if plan.dtype is not source.dtype or not ({"dtype", "torch_dtype"} & set(config)):
        config.pop("torch_dtype", None)
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["quantization_config"] = fmt.config(plan.scheme, plan.dense, assigned(plan))
    write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")
    return config


def _report(
    source: Source,
    plan: Plan,
    method: str,
    format: str,
    stream: calibration_text.Calibration | None,
    layers: list[dict[str, Any]],
    job: _Job,
    started: float,
) -> dict[str, Any]:
    fallbacks = [layer for layer in layers if "fallback" in layer]
    return {
        "model": source.name,
        "repo": source.repo,
        "method": method,
        "format": format,
        "scheme": plan.scheme.to_dict(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "calibration": None if stream is None else stream.describe() | {"left_out": job.progress.left_out},
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized,
        "source_dtype": str(source.dtype).removeprefix("torch."),
        "source_bytes": sum(entry.bytes for entry in source.entries.values()),
        "without": sorted(job.without),
        "fallbacks": fallbacks,
        "importance": _importance(job) if job.weighs else None,
        "learning": None if job.rates is None else _learning(layers, job.ranks),
        "layers": layers,
        "seconds": round(job.before + time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "device": str(job.device),
        "processes": job.ranks.count,
        "command": _command(),
        "versions": _versions() | {"python": platform.python_version()},
    }


def _importance(job: _Job) -> dict[str, Any]:
    """For how many layers tokens counted apart, and why for none, if so."""
    return {"layers": len(job.importance)} | ({"reason": job.alike} if job.alike else {})


def _learning(layers: list[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """How many layers learned with their block, and for how many that was kept; or why none did."""
    learned = [layer["learned"] for layer in layers if "learned" in layer]
    if not learned:
        beside = "no dense model runs beside the quantized one"
        return {"reason": beside if ranks.alone else "several processes share the run"}
    return {"layers": len(learned), "kept": sum(one["kept"] for one in learned)}


def _versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {"wq": wq.__version__, "torch": torch.__version__, "transformers": version("transformers")}


def _command() -> str:
    """The line that made this, when a line did; without the machine's path to wq."""
    if Path(sys.argv[0]).name not in ("wq", "__main__.py"):
        return "wq.quantize(...)"
    return shlex.join(["wq", *sys.argv[1:]])
