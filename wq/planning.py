"""What `wq quantize` would do and take, with the same options and no weight read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from wq import formats, solvers
from wq.distill import Rates, required_bytes
from wq.distill import work as distillation_work
from wq.machine import default_device, free_bytes, keep_memory_tight
from wq.pipeline import mixing, pace, quantizer
from wq.pipeline.estimate import Estimate, Job, Moment, fitting
from wq.pipeline.flow import windows_at_once
from wq.pipeline.plan import Plan, make_plan
from wq.pipeline.shapes import Work
from wq.pipeline.source import Source, open_headers
from wq.presets import Recipe, recipe
from wq.scheme import Scheme


def plan(
    model: str | os.PathLike[str],
    *,
    preset: str = "balanced",
    method: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    format: str = "compressed-tensors",
    calibration: str = "c4",
    samples: int | None = None,
    seqlen: int | None = None,
    keep: Iterable[str] = (),
    without: Iterable[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    target_bpw: float | None = None,
    target_size: int | str | None = None,
    mix: Iterable[int] | None = None,
    max_memory: int | str | None = None,
) -> dict[str, Any]:
    """What quantizing a model takes, and which layers get which scheme; JSON-ready.

    The options are those of `wq.quantize`. Of a repo on the Hub, its config, its tokenizer and the headers of its
    weights are fetched. max_memory: bytes, or text such as `12GB`, that the run must keep to on its device.

    Raises a WqError for everything that can be known to fail, BudgetError for a run that does not fit.
    """
    wanted = recipe(preset, method=method, bits=bits, samples=samples, seqlen=seqlen, without=without)
    goal, solver, fmt = (
        mixing.parse(target_bpw, target_size, mix, bits),
        solvers.get(wanted.method),
        formats.get(format),
    )
    omitted = solvers.check_steps(wanted.method, wanted.without, quantizer.STEPS)
    budget = None if max_memory is None else mixing.parse_size("--max-memory", max_memory)
    place = torch.device(device or default_device())
    keep_memory_tight()
    with open_headers(model, revision, trust_remote_code) as source, torch.no_grad():
        wished = quantizer.wished(bits, group_size, symmetric)
        made = make_plan(source, fmt, wished, group_size is None, keep, dtype)
        room = None if goal is None else mixing.room(source, fmt, made, goal)
        runs = torch.float32 if place.type == "cpu" else source.dtype
        job = Job(
            source, solver, fmt, made, place, runs, without=omitted, importance=wanted.importance, rates=wanted.blocks
        )
        if solver.NEEDS_STATISTICS or room is not None:
            quantizer.check_can_calibrate(source, made, wanted.seqlen)
            widths = () if room is None else room.goal.widths
            windows = wanted.samples - wanted.reserve
            job = replace(job, samples=windows, seqlen=wanted.seqlen, text=calibration, widths=widths)
        fit = fitting(job, windows_at_once(job.seqlen), budget)
        if wanted.rates is not None and not source.config.is_encoder_decoder:  # which is not distilled
            fit = _distilled(fit, made, wanted, wanted.rates, source, place, budget)
        least, most = pace.seconds(job, fit, pace.measure(place, runs, made.scheme))
        known = {"model": source.name, "method": wanted.method, "format": format, "preset": preset}
        return known | _described(source, made, fit, place) | {"seconds": {"least": least, "most": most}}


def _distilled(
    fit: Estimate, made: Plan, wanted: Recipe, rates: Rates, source: Source, place: torch.device, budget: int | None
) -> Estimate:
    """With what comes after the last block, if there will be memory for it."""
    layers = [layer.shape for _, blocks in made.towers for block in blocks for layer in block.layers.values()]
    layers += [
        one.size.matrix
        for _, blocks in made.towers
        for block in blocks
        for one in block.experts.values()
        for _ in range(one.size.experts)
    ]
    vocabulary = source.config.get_text_config().vocab_size
    takes = required_bytes(layers, made.parameters, vocabulary, wanted.seqlen, rates)
    if sum(takes.values()) > min(free_bytes(place), budget or free_bytes(place)):
        return fit
    work = Work(flops=distillation_work(made.parameters, wanted.reserve, wanted.seqlen, rates))
    moments = [*fit.moments, Moment("distillation", takes, work=work)]
    # What was learned is noted before it is put in its place; nothing else is by then.
    return replace(fit, moments=moments, journal=max(fit.journal, fit.checkpoint))


def _described(source: Source, made: Plan, fit: Estimate, place: torch.device) -> dict[str, Any]:
    return {
        "scheme": made.scheme.to_dict(),
        "dtype": str(made.dtype).removeprefix("torch."),
        "parameters": made.parameters,
        "quantized_parameters": made.quantized,
        "source_bytes": sum(entry.bytes for entry in source.entries.values()),
        **fit.to_dict(),
        "free_bytes": free_bytes(place),
        "layers": layers(made),
        "stays_dense": made.dense,
    }


def layers(made: Plan) -> list[dict[str, Any]]:
    """The layers by scheme: those of one name, shape and scheme in all blocks are one row."""
    rows: dict[tuple[str, tuple[int, ...], Scheme], Counter[str]] = {}

    def count(block: str, path: str, shape: tuple[int, ...], scheme: Scheme, size: int) -> None:
        row = rows.setdefault((path.removeprefix(f"{block}."), shape, scheme), Counter())
        row.update(count=1, bytes=size)

    for block in (block for _, tower in made.towers for block in tower):
        for layer in block.layers.values():
            count(block.path, layer.path, layer.shape, made.schemes[layer.path], made.bytes[layer.path])
        for one in block.experts.values():
            pieces = [piece.path for row in one.pieces for piece in row] or [one.path]
            shape = (one.size.experts, *one.size.matrix)
            count(block.path, one.path, shape, made.schemes[one.path], sum(made.bytes[path] for path in pieces))
    return [
        {"layer": name, "shape": list(shape), "scheme": scheme.to_dict(), "blocks": row["count"], "bytes": row["bytes"]}
        for (name, shape, scheme), row in rows.items()
    ]
