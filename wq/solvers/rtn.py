"""Round to nearest: the floor under every other solver, the one that needs no data, and the template for a new one.

Without statistics the grid covers each group's whole range. Clipping to the least squared error of the weights looks
better by weight and is worse by model: large weights tend to matter, and nothing says which do not. With statistics
the grid is searched, and a group's errors are scored by its own block of E[x xᵀ], so that errors which cancel in the
output are not paid for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wq import grid
from wq.scheme import Scheme
from wq.solvers import Solution, Statistics

NEEDS_STATISTICS = False

_LARGEST_BLOCK = 256


def solve(
    weight: Tensor, statistics: Statistics | None, scheme: Scheme, *, generator: torch.Generator | None = None
) -> Solution:
    """Quantize `weight`, float `[out_features, in_features]`, to the nearest codes. Raises GroupSizeError."""
    stats: dict[str, Any] = {}
    if statistics is not None and not torch.isfinite(statistics.second_moment).all():
        statistics, stats["fallback"] = None, "the statistics are not finite"
    if statistics is None:
        scale, zero = grid.cover(weight, scheme)
    else:
        scale, zero = grid.search(weight, scheme, importance(statistics, scheme))
    codes = grid.quantize(weight, scale, zero, scheme)
    if statistics is not None:
        stats["error"] = output_error(weight, grid.dequantize(codes, scale, zero), statistics)
    return Solution(codes, scale, zero, stats)


def importance(statistics: Statistics, scheme: Scheme) -> Tensor:
    """What final codes are scored by: full blocks of E[x xᵀ], or its diagonal where blocks would cost too much."""
    second_moment = statistics.second_moment
    groups = scheme.groups(second_moment.shape[0])
    if second_moment.shape[0] // groups > _LARGEST_BLOCK:
        return second_moment.diagonal()
    return grid.blocks(second_moment, groups)


def output_error(weight: Tensor, dequantized: Tensor, statistics: Statistics) -> float:
    """Relative squared error of the layer's output on the calibration data: `tr(E H Eᵀ) / tr(W H Wᵀ)`."""
    w, h = weight.float(), statistics.second_moment
    delta = dequantized.float() - w
    norm = ((w @ h) * w).sum().item()
    return ((delta @ h) * delta).sum().item() / norm if norm > 0 else 0.0
