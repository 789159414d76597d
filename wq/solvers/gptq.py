"""GPTQ with the defaults that decide its quality.

Frantar et al., arXiv 2210.17323: quantize one input column at a time and spread its error over the columns still to
come, by the inverse of the Hessian H = E[x xᵀ]. The name alone says little; what is done here:

* Scales are static. They are searched on the original weight, under the diagonal of H, before any column moves.
  Fitting them to weights that already carry other columns' errors inflates them.
* Columns go in order of falling diag(H), the full activation order, while groups stay where they were. Codes are put
  back in place afterwards, so the checkpoint needs no `g_idx`.
* Damping is sized by how well H is determined: λ = 0.05 · in_features / (tokens / 8), between 0.005 and 0.2 of the
  mean diagonal. Eight neighbouring tokens of text count as one independent sample.
* What is approximated is what the dense model computes there, not what the dense weight makes of an input that the
  quantized layers before it have changed (`target`).
* One Cholesky instead of three: with J the reversal and L = chol(J H J), J L⁻¹ J is the upper factor U of H⁻¹ = UᵀU.
* Scales and codes are refined in turn afterwards (`refine`); tokens held out choose the round.
* A Hessian that will not factorise gets more damping, then float64, and only then falls back to weighted rounding,
  which the solution's `stats["fallback"]` says.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from wq import grid
from wq.scheme import Scheme
from wq.solvers import Solution, Statistics, Total, own, refine, rtn, target

NEEDS_STATISTICS = True
NEEDS_PAIRS = True
DECIDES = True
STEPS = ("order", "refine", "search", "target")

_BLOCK = 128  # columns whose errors are spread eagerly; later columns get them in one matrix product
_DAMPING_CEILING = 0.5


def solve(
    weight: Tensor,
    statistics: Statistics,
    scheme: Scheme,
    *,
    generator: torch.Generator | None = None,
    without: Container[str] = (),
    total: Total = own,
) -> Solution:
    """Quantize `weight`, float `[out_features, in_features]`, against `statistics`. Raises GroupSizeError.

    without: names in `STEPS` that are left out. total: sums what decides over all rows, where `weight` is a part.
    """
    hessian = statistics.second_moment.float()
    dead = hessian.diagonal() <= 0
    order = activation_order(hessian.diagonal())
    if "order" in without:
        order = torch.arange(len(order), device=order.device)
    factor, damping = inverse_factor(hessian, statistics.tokens, order)
    if factor is None:
        return _round_instead(weight, statistics, scheme, generator)
    goal, share = (weight.float(), 0.0) if "target" in without else target.retarget(weight, statistics, total)
    grids = grid.cover(goal, scheme) if "search" in without else grid.search(goal, scheme, hessian.diagonal())
    made = Solution(_sweep(goal, order, factor, *grids, scheme), *grids, {})
    rounds = 0
    if "refine" not in without and statistics.heldout is not None:
        made, rounds = _refined(made, goal, weight, statistics, damped(hessian, damping), order, scheme, total)
    stats: dict[str, Any] = {"damping": damping, "dead_columns": int(dead.sum())}
    if statistics.drift is not None:
        stats["drift_share"] = share
    if statistics.heldout is not None:
        stats["refinements"] = rounds
    stats["error"] = rtn.output_error(weight, grid.dequantize(*made[:3]), statistics)
    return made._replace(stats=stats)


def _refined(
    made: Solution,
    goal: Tensor,
    weight: Tensor,
    statistics: Statistics,
    hessian: Tensor,
    order: Tensor,
    scheme: Scheme,
    total: Total,
) -> tuple[Solution, int]:
    """The best of all rounds of refining by the error on tokens held out, and its number; 0 if none is better."""
    heldout = statistics.heldout
    assert heldout is not None
    pulled = None if heldout.drift is None else target.pull(weight.float(), heldout)
    best, chosen = heldout_error(weight, grid.dequantize(*made[:3]), heldout, total, pulled), 0
    rounds = refine.rounds(goal, hessian, *made[:3], scheme, order)
    for number, (codes, scale) in enumerate(rounds, 1):
        error = heldout_error(weight, grid.dequantize(codes, scale, made.zero), heldout, total, pulled)
        if error < best:
            best, chosen, made = error, number, made._replace(codes=codes, scale=scale)
    return made, chosen


def heldout_error(
    weight: Tensor, dequantized: Tensor, heldout: Statistics, total: Total = own, pulled: Tensor | None = None
) -> float:
    """`E‖Ŵ x̂ − W x‖² − E‖W (x̂ − x)‖²` over held-out tokens: what quantizing costs beyond the drift of the input.

    pulled: `target.pull` of the weight, if it is known already.
    """
    w, h = weight.float(), heldout.second_moment
    delta = dequantized.float() - w
    error = ((delta @ h) * delta).sum()
    if heldout.drift is not None:
        error = error - 2 * ((target.pull(w, heldout) if pulled is None else pulled) * delta).sum()
    return float(total(error))


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


def inverse_factor(hessian: Tensor, tokens: int, order: Tensor | None = None) -> tuple[Tensor | None, float]:
    """Upper Cholesky factor U, with H⁻¹ = UᵀU, of the damped Hessian in `order` (the activation's), and the damping.

    The factor is None when nothing helps: a Hessian that is not finite, all zero, or not positive at any damping.
    """
    columns = hessian.shape[0]
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        return None, 0.0
    reversed_order = (activation_order(diagonal) if order is None else order).flip(0)
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


def _sweep(weight: Tensor, order: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Quantize column by column in `order`, spreading each error; codes uint8 `[out, in]` in weight order."""
    columns = weight.shape[1]
    group = order // (columns // scale.shape[1])
    # Transposed, so that a column of the weight is one contiguous row: [in, out].
    w = weight.float().t()[order].contiguous()
    codes = torch.empty_like(w, dtype=torch.uint8)
    scales, zeros = scale.float().t()[group].contiguous(), zero.float().t()[group].contiguous()
    round_block = _block_rounder(w.device)
    for start in range(0, 0 if w.is_meta else columns, _BLOCK):  # on shapes alone, a loop that makes nothing is skipped
        stop = min(start + _BLOCK, columns)
        own = slice(start, stop)
        codes[own], errors = round_block(w[own], factor[own, own], scales[own], zeros[own], scheme.levels - 1)
        if stop < columns:
            w[stop:].addmm_(factor[own, stop:].t(), errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return in_place.t().contiguous()


def _block_rounder(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """What rounds a block of columns: one Triton program for some rows each, where Triton and a device for it are."""
    if device.type == "cuda":
        try:
            from wq_kernels.sweep import sweep
        except ImportError:
            return round_block
        return sweep
    return round_block


def round_block(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and errors of a block of columns, all `[columns, rows]`, each column seeing those before it.

    weight is used up. factor: `[columns, columns]`, the block's part of the upper factor of the inverse Hessian.
    """
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    for j in range(len(weight)):
        q = (weight[j] / scale[j]).round_().add_(zero[j]).clamp_(0, top)
        codes[j] = q
        error = torch.sub(weight[j], q.sub_(zero[j]).mul_(scale[j]), out=errors[j])
        error.div_(factor[j, j])
        if j + 1 < len(weight):
            weight[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    return codes, errors
