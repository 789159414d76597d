"""AWQ: protect the input channels that matter by scaling them up before rounding, and choose the clipping.

Lin et al., arXiv 2306.00978. Channel j of the input is divided by t_j and column j of the weight multiplied by it; the
product is the same, but the rounding error of an important column shrinks. The division costs nothing when it can be
folded into whatever produced the input, which is the pipeline's business (`pipeline/folding.py`).

    t_j = (E x_j²)^(ρ/2) / (mean_i |w_ij|)^(1 − ρ),  normalised by √(max t · min t)

with ρ from a grid. Candidates are scored by the error of the layer's output, tr(E H Eᵀ) with H = E[x xᵀ], instead of
by running the layer: the same number for a twentieth of the cost. Clipping is the grid search that every solver here
has, scored by the group's own block of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wq import grid
from wq.scheme import Scheme
from wq.solvers import Solution, Statistics, rtn

NEEDS_STATISTICS = True

_STEPS = 20


def solve(
    weight: Tensor, statistics: Statistics, scheme: Scheme, *, generator: torch.Generator | None = None
) -> Solution:
    """Quantize an already scaled `weight`, float `[out_features, in_features]`. Raises GroupSizeError."""
    return rtn.solve(weight, statistics, scheme, generator=generator)


def input_scales(weight: Tensor, statistics: Statistics, scheme: Scheme) -> Tensor:
    """The factor t, float32 `[in_features]`, for each column of `weight`; all ones if scaling does not help."""
    w = weight.float()
    hessian = statistics.second_moment
    salience = hessian.diagonal().clamp_min(0).sqrt().clamp_min(1e-4)
    magnitude = w.abs().mean(0).clamp_min(1e-6)
    best, best_error = torch.ones_like(magnitude), _scaled_error(w, torch.ones_like(magnitude), hessian, scheme)
    for step in range(1, _STEPS + 1):
        ratio = step / _STEPS
        scales = (salience**ratio / magnitude ** (1 - ratio)).clamp_min(1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = _scaled_error(w, scales, hessian, scheme)
        if error < best_error:
            best, best_error = scales, error
    return best


def _scaled_error(weight: Tensor, scales: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    """Output error of rounding `weight · diag(scales)` on the plain covering grid, and undoing the scales."""
    scaled = weight * scales
    scale, zero = grid.cover(scaled, scheme)
    delta = grid.dequantize(grid.quantize(scaled, scale, zero, scheme), scale, zero) / scales - weight
    return float(((delta @ hessian) * delta).sum())
