"""The loop: one block at a time, and in it one stage at a time, so that memory does not grow with the model.

For each decoder block:

    load it ─► group its layers by shared input ─► for each group, in the order the block runs them:
        collect E[x xᵀ] from the hidden states, up to this group (its predecessors are quantized by now)
        solve the stacked weights ─► split ─► put the dequantized weights in place ─► pack ─► write
    ─► run the block once more to move the hidden states on ─► write what stays dense ─► free it
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import wq
from wq import formats, grid, report, solvers
from wq.checkpoint import ShardWriter, check_output, staged, write_text
from wq.errors import CalibrationError, CheckpointError
from wq.machine import default_device, keep_memory_tight, peak_rss_bytes, release_memory
from wq.pipeline import blocks as decoder
from wq.pipeline import calibration as calibration_text
from wq.pipeline import folding
from wq.pipeline.plan import Layer, Plan, make_plan
from wq.pipeline.source import Source, open_source
from wq.scheme import Scheme, check_quantizable
from wq.solvers import Solution, rtn

_BATCH_TOKENS = 4096  # enough rows for full-speed matrix products, few enough for small activations

BlockCallback = Callable[[dict[str, Any]], None]


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str = "gptq",
    bits: int = 4,
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
    trust_remote_code: bool = False,
    on_block: BlockCallback | None = None,
) -> dict[str, Any]:
    """Quantize a dense model into a checkpoint folder that transformers and vLLM load, and return its report.

    model: a repo id, a local folder or a GGUF file. output: the folder to make; it appears only when complete.
    method: a name in `wq.solvers.SOLVERS`. bits: 2, 3, 4 or 8. group_size: None takes the largest of 128, 64 and 32
    that divides every layer; -1 is one scale for each output row. symmetric: no stored zero points.
    format: a name in `wq.formats.FORMATS`. calibration: see `wq.pipeline.calibration.load`; methods that need none
    read none. keep: regular expressions; layers whose name one of them matches stay dense.
    dtype: of scales and dense tensors; None keeps the model's own (float32 is stored as float16).
    device: where blocks run; None is the first GPU, or the CPU. on_block: called with a dict after each block.

    Raises a WqError, before any heavy work, for everything that can be known to fail.
    """
    started = time.perf_counter()
    solver, fmt = solvers.get(method), formats.get(format)
    check_quantizable(bits)
    scheme = Scheme(bits, -1 if group_size is None else group_size, symmetric)
    check_output(Path(output), overwrite)
    keep_memory_tight()
    with open_source(model, revision, trust_remote_code) as source, torch.no_grad():
        plan = make_plan(source, fmt, scheme, group_size is None, keep, dtype)
        stream = None
        if solver.NEEDS_STATISTICS:
            _check_length(source, seqlen)
            stream = calibration_text.load(calibration, source.tokenizer, samples, seqlen, seed)
        job = _Job(source, solver, fmt, plan, torch.device(device or default_device()), seed)
        with staged(Path(output), overwrite) as stage:
            with ShardWriter(stage, plan.specs) as writer:
                layers = job.run(writer, None if stream is None else stream.tokens, on_block)
            _write_config(source, stage, plan, fmt)
            source.save_companions(stage)
            made = _report(source, plan, method, format, stream, layers, job, started)
            made["checkpoint_bytes"] = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
            report.save(made, stage)
    return made


def _check_length(source: Source, seqlen: int) -> None:
    limit = getattr(source.config, "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise CalibrationError(f"--seqlen {seqlen} is longer than the {limit} positions {source.name} has.")


@dataclass
class _Job:
    """One run over the blocks."""

    source: Source
    solver: ModuleType
    fmt: ModuleType
    plan: Plan
    device: torch.device
    seed: int
    changed: set[str] = field(default_factory=set)  # dense parameters that folding altered

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32 on the CPU; a GPU runs the model in its own dtype, and sums statistics in float32."""
        return torch.float32 if self.device.type == "cpu" else self.source.dtype

    def run(self, writer: ShardWriter, tokens: Tensor | None, on_block: BlockCallback | None) -> list[dict[str, Any]]:
        """Quantize every block and write everything; the records of all layers."""
        path = self.plan.blocks_path
        captured = None if tokens is None else self._capture(tokens)
        records: list[dict[str, Any]] = []
        for index, block in enumerate(self.plan.blocks):
            started = time.perf_counter()
            if index or captured is None:
                self._load((f"{path}.{index}",))
            generator = torch.Generator(device=self.device).manual_seed(self.seed + index)
            run = _BlockRun(self, block, index, captured, generator)
            made = run.quantize(writer)
            if captured is not None and index + 1 < len(self.plan.blocks):
                captured.advance(block, index)
            self._write_dense(writer, f"{path}.{index}")
            self.source.unload(block)
            release_memory()
            records += made
            if on_block is not None:
                seconds = time.perf_counter() - started
                on_block({"block": index + 1, "blocks": len(self.plan.blocks), "layers": made, "seconds": seconds})
        self._write_dense(writer, "", excluding=path)
        return records

    def _load(self, prefixes: tuple[str, ...]) -> None:
        self.source.load(prefixes, self.device, self.compute_dtype)

    def _capture(self, tokens: Tensor) -> decoder.Captured:
        """Hidden states in front of block 0, which stays loaded."""
        model, path = self.source.model, self.plan.blocks_path
        body = model.base_model
        inside = {id(module) for module in body.modules()}
        outside = tuple(
            name
            for name, module in model.named_modules()
            if name and id(module) in inside and module._parameters and not f"{name}.".startswith(f"{path}.")
        )
        self._load((*outside, f"{path}.0"))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        rows = max(1, _BATCH_TOKENS // tokens.shape[1])
        batches = [batch.to(self.device) for batch in tokens.split(rows)]
        captured = decoder.capture(body, self.plan.blocks, batches, self.source.name)
        for name in outside:
            self.source.unload(model.get_submodule(name))
        return captured

    def _write_dense(self, writer: ShardWriter, prefix: str, excluding: str | None = None) -> None:
        """Write the tensors under a module that were not quantized, straight from the source unless altered."""
        quantized = {f"{layer.stored}.weight" for block in self.plan.layers for layer in block.values()}
        for name, (parameter, _) in self.source.tensors.items():
            if name in quantized or (prefix and not parameter.startswith(f"{prefix}.")):
                continue
            if excluding is not None and parameter.startswith(f"{excluding}."):
                continue
            if parameter in self.changed:
                writer.write(name, self.source.model.get_parameter(parameter).to(self.plan.specs[name].dtype))
            else:
                writer.copy(name, self.source.entries[name])


@dataclass
class _BlockRun:
    """The stages of one block."""

    job: _Job
    block: nn.Module
    index: int
    captured: decoder.Captured | None
    generator: torch.Generator

    def quantize(self, writer: ShardWriter) -> list[dict[str, Any]]:
        """Solve, replace and write every layer of the block; one record each."""
        layers = self.job.plan.layers[self.index]
        linears = {name: m for name, m in self.block.named_modules() if name in layers and isinstance(m, nn.Linear)}
        records: list[dict[str, Any]] = []
        for name, linear in linears.items():
            _check_finite(layers[name], linear.weight)
        left = dict(linears)
        if self.captured is not None and linears:
            groups, producers = decoder.trace(self.block, linears, lambda: self._forward(0))
            if hasattr(self.job.solver, "input_scales"):
                self._fold(groups, linears, producers)
            for group in groups:
                records += self._solve({name: left.pop(name) for name in group}, writer)
        for name, linear in left.items():  # no data asked for, or a layer that calibration never reached
            records += self._solve_without_data(name, linear, writer)
        return records

    def _forward(self, batch: int) -> Tensor:
        assert self.captured is not None
        return self.captured.run(self.block, self.index, batch)

    def _fold(self, groups: list[list[str]], linears: dict[str, nn.Linear], producers: dict[str, Any]) -> None:
        """Let the solver scale each group's input wherever something can take the scale over."""
        assert self.captured is not None
        readers = [linears[group[0]] for group in groups]
        statistics = decoder.collect(readers, self._forward, len(self.captured.hidden))
        for group, known in zip(groups, statistics, strict=True):
            fold = folding.find(self.block, group, producers.get(group[0]))
            if fold is None or not self._stored(fold.name):
                continue
            members = [linears[name] for name in group]
            weight = torch.cat([member.weight.data for member in members])
            scales = self.job.solver.input_scales(weight, known, self.job.plan.scheme)
            if folding.apply(fold, members, scales, lambda: self._forward(0)):
                path = f"{self.job.plan.blocks_path}.{self.index}.{fold.name}"
                self.job.changed |= {f"{path}.{name}" for name, _ in fold.producer.named_parameters(recurse=False)}

    def _stored(self, name: str) -> bool:
        """Whether every parameter of a module of this block is on disk under a name of its own."""
        path = f"{self.job.plan.blocks_path}.{self.index}.{name}"
        parameters = self.block.get_submodule(name).named_parameters(recurse=False)
        return all(self.job.source.on_disk(f"{path}.{leaf}") is not None for leaf, _ in parameters)

    def _solve(self, members: dict[str, nn.Linear], writer: ShardWriter) -> list[dict[str, Any]]:
        """One solver call for layers that read the same input; their rows are independent."""
        assert self.captured is not None
        first = next(iter(members.values()))
        (statistics,) = decoder.collect([first], self._forward, len(self.captured.hidden))
        weight = torch.cat([linear.weight.data.float() for linear in members.values()])
        solution = self.job.solver.solve(weight, statistics, self.job.plan.scheme, generator=self.generator)
        records, start = [], 0
        for name, linear in members.items():
            rows = slice(start, start + linear.out_features)
            part = Solution(solution.codes[rows], solution.scale[rows], solution.zero[rows], dict(solution.stats))
            restored = grid.dequantize(part.codes, part.scale, part.zero)
            if "error" in part.stats:  # the solver's is of all rows together
                part.stats["error"] = rtn.output_error(weight[rows], restored, statistics)
            records.append(self._store(name, linear, part, restored, writer, statistics.tokens))
            start += linear.out_features
        return records

    def _solve_without_data(self, name: str, linear: nn.Linear, writer: ShardWriter) -> list[dict[str, Any]]:
        weight = linear.weight.data.float()
        solution = rtn.solve(weight, None, self.job.plan.scheme)
        if self.job.solver.NEEDS_STATISTICS:
            solution.stats["fallback"] = "calibration never reached this layer"
        else:
            solution = self.job.solver.solve(weight, None, self.job.plan.scheme, generator=self.generator)
        restored = grid.dequantize(solution.codes, solution.scale, solution.zero)
        return [self._store(name, linear, solution, restored, writer, 0)]

    def _store(
        self, name: str, linear: nn.Linear, solution: Solution, restored: Tensor, writer: ShardWriter, tokens: int
    ) -> dict[str, Any]:
        layer = self.job.plan.layers[self.index][name]
        linear.weight.data.copy_(restored)
        for local, tensor in self.job.fmt.pack(solution, self.job.plan.scheme).items():
            writer.write(f"{layer.stored}.{local}", tensor)
        return {"layer": layer.path, "shape": list(layer.shape), "tokens": tokens, **solution.stats}


def _check_finite(layer: Layer, weight: Tensor) -> None:
    wrong = int((~torch.isfinite(weight)).sum())
    if wrong:
        raise CheckpointError(
            f"{layer.stored}.weight holds {wrong} values that are not finite. The source is damaged; download it again."
        )


def _write_config(source: Source, stage: Path, plan: Plan, fmt: ModuleType) -> None:
    config = json.loads((source.folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if plan.dtype is not source.dtype or not ({"dtype", "torch_dtype"} & set(config)):
        config.pop("torch_dtype", None)
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["quantization_config"] = fmt.config(plan.scheme, plan.dense)
    write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")


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
        "calibration": None if stream is None else stream.describe(),
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized,
        "source_dtype": str(source.dtype).removeprefix("torch."),
        "source_bytes": sum(entry.bytes for entry in source.entries.values()),
        "fallbacks": fallbacks,
        "layers": layers,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "device": str(job.device),
        "command": _command(),
        "versions": {
            "wq": wq.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }


def _command() -> str:
    """The line that made this, when a line did; without the machine's path to wq."""
    if Path(sys.argv[0]).name not in ("wq", "__main__.py"):
        return "wq.quantize(...)"
    return shlex.join(["wq", *sys.argv[1:]])
