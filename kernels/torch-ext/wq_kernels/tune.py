"""Measure tiles on the device at hand and write the file that WQ_CONFIG names. Nothing here runs with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import exp, log
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, layout
from .fused import multiply_rows
from .target import describe

__all__ = ["SHAPES", "candidates", "measure", "tune"]

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))  # out, in: the linears of 8B and 70B models
_GROUP = 128
_TOLERANCE = 5e-3  # relative; a tile that computes something else is not a fast tile

Timer = Callable[[Callable[[], Tensor]], float]
Problem = tuple[int, int, tuple[Tensor, Tensor, Tensor]]  # out, in, and a weight in the tiled layout


def candidates(bucket: int) -> Iterator[configs.Config]:
    """The tiles worth trying for so many rows."""
    for rows_n in (64, 128, 256):
        for rows_m in {min(bucket, 128), min(bucket, 64)}:
            for warps in (4, 8):
                if rows_n * rows_m * 4 > 32 * 1024 * warps // 2:  # its float32 sums alone would fill the registers
                    continue
                for stages in (2, 3, 4, 5):
                    yield configs.Config(rows_n, rows_m, warps, stages, scale_weights=bucket > 32)


def measure(function: Callable[[], Tensor]) -> float:
    """Median milliseconds of a call, the second-level cache emptied before each."""
    return float(triton.testing.do_bench(function, warmup=5, rep=30, return_mode="median"))


def tune(
    device: torch.device,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    buckets: Iterable[int] = configs.BUCKETS,
    dtype: torch.dtype = torch.bfloat16,
    timer: Timer = measure,
    tiles: Callable[[int], Iterable[configs.Config]] = candidates,
    on_bucket: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The content of a tile file: for each bucket the tile with the least geometric mean of time over the shapes.

    Tiles that do not compile, or whose result differs from the table's, are passed over. 4 bits, groups of 128.
    """
    buckets, problems = tuple(buckets), [_problem(shape, device, dtype) for shape in shapes]
    entries = []
    for done, bucket in enumerate(buckets):
        if on_bucket is not None:
            on_bucket(done, len(buckets))
        default = configs.built_in(describe(device), bucket, 4, 1)
        inputs = [torch.randn(bucket, in_features, device=device).to(dtype) for _, in_features, _ in problems]
        times = {}
        for config in {default, *(replace(c, registers=default.registers) for c in tiles(bucket))}:
            try:
                times[config] = _mean_time(config, default, inputs, problems, timer)
            except Exception:  # out of shared memory or registers, or whatever else a compiler refuses
                continue
        best = min(times, key=lambda config: times[config])
        entries.append(
            {
                "device": describe(device).name,
                "triton": triton.__version__,
                "rows": bucket,
                "config": best.to_dict(),
                "milliseconds": times[best],
                "default_milliseconds": times[default],
            }
        )
    return {"tiles": entries}


def _problem(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Problem:
    """A random weight of that shape in the tiled layout, on the device."""
    out_features, in_features = shape
    rows, blocks = -(-out_features // layout.ROW_ALIGNMENT) * layout.ROW_ALIGNMENT, -(-in_features // _GROUP)
    words = torch.randint(-(2**31), 2**31, (blocks, rows, layout.WORDS), device=device).to(torch.int32)
    scale = (torch.rand(blocks, rows, device=device) / 100).to(dtype)
    zero = torch.full((1, rows), 8, dtype=torch.uint8, device=device)
    return out_features, in_features, (words, scale, zero)


def _mean_time(
    config: configs.Config, default: configs.Config, inputs: list[Tensor], problems: list[Problem], timer: Timer
) -> float:
    """The geometric mean of a tile's times. Raises ValueError when it computes something else than the default."""
    logs = []
    for x, (out_features, _, (words, scale, zero)) in zip(inputs, problems, strict=True):
        run = partial(multiply_rows, x, words, scale, zero, None, 4, out_features)
        expected, actual = run(default).double(), run(config).double()
        if not (actual - expected).norm() < _TOLERANCE * expected.norm():
            raise ValueError(f"{config} computes something else")
        logs.append(log(timer(partial(run, config))))
    return exp(sum(logs) / len(logs))
