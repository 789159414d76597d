"""GPTQ with the defaults that decide its quality.

Frantar et al., arXiv 2210.17323: quantize one input column at a time and spread its error over the columns still to
come, by the inverse of the Hessian H = E[x xᵀ]. The name alone says little; what is done here:

* Scales are static. They are searched on the original weight, under the diagonal of H, before any column moves.
  Fitting them to weights that already carry other columns' errors inflates them.
* Columns go in order of falling diag(H), the full activation order, while groups stay where they were. Codes are put
  back in place afterwards, so the checkpoint needs no `g_idx`.
* Damping is sized by how well H is determined: λ = 0.05 · in_features / (tokens / 8), between 0.005 and 0.2 of the
  mean diagonal. Eight neighbouring tokens of text count as one independent sample.
* One Cholesky instead of three: with J the reversal and L = chol(J H J), J L⁻¹ J is the upper factor U of H⁻¹ = UᵀU.
* A Hessian that will not factorise gets more damping, then float64, and only then falls back to weighted rounding,
  which the solution's `stats["fallback"]` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wq import grid
from wq.scheme import Scheme
from wq.solvers import Solution, Statistics, refine, rtn, target

NEEDS_STATISTICS = True
NEEDS_PAIRS = True  # of inputs, the dense model's and the quantized one's

_BLOCK = 128  # columns whose errors are spread eagerly; later columns get them in one matrix product
_DAMPING_CEILING = 0.5
_REFINEMENTS = 3  # at most


def solve(
    weight: Tensor, statistics: Statistics, scheme: Scheme, *, generator: torch.Generator | None = None
) -> Solution:
    """Quantize `weight`, float `[out_features, in_features]`, against `statistics`. Raises GroupSizeError."""
    hessian = statistics.second_moment.float()
    dead = hessian.diagonal() <= 0
    factor, damping = inverse_factor(hessian, statistics.tokens)
    if factor is None:
        return _round_instead(weight, statistics, scheme, generator)
    goal, share = target.retarget(weight, statistics)
    scale, zero = grid.search(goal, scheme, hessian.diagonal())
    codes = _sweep(goal, hessian.diagonal(), factor, scale, zero, scheme)
    codes, scale, rounds = _refined(goal, weight, statistics, damping, codes, scale, zero, scheme)
    stats: dict[str, Any] = {"damping": damping, "dead_columns": int(dead.sum())}
    if statistics.drift is not None:
        stats |= {"drift_share": share, "refinements": rounds}
    stats["error"] = rtn.output_error(weight, grid.dequantize(codes, scale, zero), statistics)
    return Solution(codes, scale, zero, stats)


def _refined(
    goal: Tensor,
    weight: Tensor,
    statistics: Statistics,
    damping: float,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    scheme: Scheme,
) -> tuple[Tensor, Tensor, int]:
    """Scales and codes refined in turn for as long as tokens held out say that it helps, and how often it did."""
    if statistics.heldout is None:
        return codes, scale, 0
    hessian = damped(statistics.second_moment.float(), damping)
    order = activation_order(statistics.second_moment.diagonal())
    best = heldout_error(weight, grid.dequantize(codes, scale, zero), statistics.heldout)
    for rounds in range(_REFINEMENTS):
        new_scale = refine.refit(goal, hessian, codes, scale, zero, scheme)
        new_codes = refine.descend(goal, hessian, codes, new_scale, zero, scheme, order)
        error = heldout_error(weight, grid.dequantize(new_codes, new_scale, zero), statistics.heldout)
        if not error < best:
            return codes, scale, rounds
        best, codes, scale = error, new_codes, new_scale
    return codes, scale, _REFINEMENTS


def heldout_error(weight: Tensor, dequantized: Tensor, heldout: Statistics) -> float:
    """`E‖Ŵ x̂ − W x‖² − E‖W (x̂ − x)‖²` over held-out tokens: what quantizing costs beyond the drift of the input."""
    w, h = weight.float(), heldout.second_moment
    delta = dequantized.float() - w
    error = ((delta @ h) * delta).sum()
    if heldout.drift is not None:
        error = error - 2 * (target.pull(w, heldout) * delta).sum()
    return float(error)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with a share of its mean diagonal added, dead columns given the mean first."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    made = hessian.clone()
    made.diagonal().copy_(torch.where(diagonal <= 0, mean, diagonal) + damping * mean)
    return made


def _round_instead(
    weight: Tensor, statistics: Statistics, scheme: Scheme, generator: torch.Generator | None
) -> Solution:
    """Rounding, weighted by whatever of the Hessian makes sense, with the reason on record."""
    diagonal = statistics.second_moment.diagonal()
    sane = bool(torch.isfinite(statistics.second_moment).all() and (diagonal >= 0).all() and (diagonal > 0).any())
    known = Statistics(torch.diag(diagonal), statistics.tokens) if sane else None
    nearest = rtn.solve(weight, known, scheme, generator=generator)
    reason = "could not be factorised at any damping" if sane else "is zero, negative or not finite"
    return nearest._replace(stats={**nearest.stats, "fallback": f"the Hessian {reason}"})


def activation_order(diagonal: Tensor) -> Tensor:
    """Columns by falling mean square input, `[in_features]`; ties keep their order, so runs agree."""
    return torch.argsort(diagonal, descending=True, stable=True)


def inverse_factor(hessian: Tensor, tokens: int) -> tuple[Tensor | None, float]:
    """Upper Cholesky factor U, with H⁻¹ = UᵀU, of the damped Hessian in activation order, and the damping used.

    The factor is None when nothing helps: a Hessian that is not finite, all zero, or not positive at any damping.
    """
    columns = hessian.shape[0]
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        return None, 0.0
    order = activation_order(diagonal)
    reversed_order = order.flip(0)
    # A column that never fires has no row to factorise; giving it the mean leaves it alone: it spreads no error.
    filled = torch.where(diagonal <= 0, mean, diagonal)
    damping = min(max(0.05 * columns / max(tokens / 8, 1.0), 5e-3), 0.2)
    for dtype in (torch.float32, torch.float64):
        trial = damping
        while trial <= _DAMPING_CEILING:
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().copy_(filled.to(dtype) + trial * mean.to(dtype))
            lower, info = torch.linalg.cholesky_ex(damped[reversed_order][:, reversed_order])
            if not info.item() and torch.isfinite(lower).all():
                identity = torch.eye(columns, dtype=dtype, device=hessian.device)
                inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
                return inverse.flip(0, 1).float().contiguous(), trial
            trial *= 3
    return None, damping


def _sweep(weight: Tensor, diagonal: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Quantize column by column in activation order, spreading each error; codes uint8 `[out, in]` in weight order."""
    order = activation_order(diagonal)
    columns = weight.shape[1]
    group = order // (columns // scale.shape[1])
    # Transposed, so that a column of the weight is one contiguous row: [in, out].
    w = weight.float().t()[order].contiguous()
    codes = torch.empty_like(w, dtype=torch.uint8)
    scales, zeros = scale.float().t()[group].contiguous(), zero.float().t()[group].contiguous()
    top = scheme.levels - 1
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            q = (w[j] / scales[j]).round_().add_(zeros[j]).clamp_(0, top)
            codes[j] = q
            error = torch.sub(w[j], q.sub_(zeros[j]).mul_(scales[j]), out=errors[j - start])
            error.div_(factor[j, j])
            if j + 1 < stop:
                w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        if stop < columns:
            w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return in_place.t().contiguous()
