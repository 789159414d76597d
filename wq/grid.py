"""The one definition of rounding: search a group's scale and zero point, quantize, dequantize.

The largest cheap win in weight-only quantization is a good grid. Each group gets the scale (and zero point) that
minimises the weighted squared rounding error among candidates, and three choices make it good:

* Candidates are rounded to the dtype the checkpoint stores *before* they are compared, so what is scored is what is
  loaded.
* The symmetric grid is used to its full signed range. With b bits there is one more code below zero than above; the
  scale is given the sign that puts the group's largest weight on that extra code.
* Errors are weighted by how much each input column matters (`importance`). The diagonal of E[x xᵀ] is right when a
  solver goes on to cancel what columns have in common (GPTQ); the full blocks of E[x xᵀ] are right when the codes are
  final (round to nearest, AWQ).

The search has two levels, coarse and fine (as NeUQI, arXiv 2505.17595, does for its scales), then one least-squares
step for the codes it found. Work goes over blocks of rows small enough to stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wq.scheme import Scheme

_BLOCK = 1 << 16  # weights a block; the temporaries of one candidate then fit a core's L2 cache


def grouped(weight: Tensor, groups: int) -> Tensor:
    """View `[out, in]` as `[out, groups, in / groups]`."""
    return weight.reshape(weight.shape[0], groups, -1)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Nearest codes, uint8 `[out, in]`, of `weight` `[out, in]` on the grid of `scale`, `zero` `[out, groups]`."""
    w = grouped(weight.float(), scale.shape[1])
    codes = (w / scale.float().unsqueeze(-1)).round_().add_(zero.float().unsqueeze(-1)).clamp_(0, scheme.levels - 1)
    return codes.to(torch.uint8).reshape(weight.shape)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * (codes - zero)` in `dtype`, `[out, in]`, from uint8 codes `[out, in]` and grids `[out, groups]`."""
    q = grouped(codes.to(dtype), scale.shape[1])
    return ((q - zero.to(dtype).unsqueeze(-1)) * scale.to(dtype).unsqueeze(-1)).reshape(codes.shape)


def search(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale (scheme's dtype) and zero point (uint8), both `[out, groups]`, with the least weighted rounding error.

    weight: float `[out, in]`, finite. importance: None for equal weights, `[in]`, not negative, for one weight a
    column, or `[groups, group_size, group_size]`, positive semi-definite, to score `e M eᵀ` for a group's errors e.
    Importance only matters relative to its own group. Raises GroupSizeError when groups do not fit.
    """
    out_features, in_features = weight.shape
    groups = scheme.groups(in_features)
    w = grouped(weight.float(), groups)
    omega = _normalized(importance, groups, in_features // groups, weight.device)
    search_rows = _search_symmetric if scheme.symmetric else _search_asymmetric
    if weight.is_meta:  # shapes alone: there is nothing to search
        return _shapes(out_features, groups, scheme)
    rows = max(1, _BLOCK // in_features)
    found = [search_rows(w[i : i + rows], omega, scheme) for i in range(0, out_features, rows)]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale.to(scale_dtype(scheme)), zero.to(torch.uint8)


def _shapes(rows: int, groups: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    grids = torch.empty(rows, groups, device="meta")
    return grids.to(scale_dtype(scheme)), grids.to(torch.uint8)


def cover(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The plain grid, without a search: the scale and zero point that just cover each group's range.

    Symmetric, that is the range up to the largest weight; one of nearly its size and the other sign clips a little.
    """
    w = grouped(weight.float(), scheme.groups(weight.shape[1]))
    if scheme.symmetric:
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = -largest / scheme.midpoint
        zero = torch.full_like(scale, scheme.midpoint)
    else:
        low = w.amin(-1).clamp_max(0)
        scale = (w.amax(-1).clamp_min(0) - low) / (scheme.levels - 1)
        zero = (-low / scale.clamp_min(1e-30)).round_().clamp_(0, scheme.levels - 1)
    return stored(torch.where(scale == 0, 1.0, scale), scheme).to(scale_dtype(scheme)), zero.to(torch.uint8)


def blocks(second_moment: Tensor, groups: int) -> Tensor:
    """The diagonal blocks, `[groups, size, size]`, of `second_moment` `[in, in]`: importance for final codes."""
    size = second_moment.shape[0] // groups
    return torch.stack([second_moment[i : i + size, i : i + size] for i in range(0, size * groups, size)])


def _normalized(importance: Tensor | None, groups: int, size: int, device: torch.device) -> Tensor:
    """Importance with mean 1 in each group and a floor, so that an input that never fires still gets a sane grid."""
    if importance is None:
        return torch.ones(groups, size, device=device)
    tiny = torch.finfo(torch.float32).tiny
    if importance.dim() == 1:
        omega = importance.float().reshape(groups, size)
        return (omega / omega.mean(-1, keepdim=True).clamp_min(tiny)).clamp_min(1e-6)
    omega = importance.float()
    mean = omega.diagonal(dim1=1, dim2=2).mean(-1)
    return omega / mean.clamp_min(tiny)[:, None, None] + 1e-6 * torch.eye(size, device=device)


def scale_dtype(scheme: Scheme) -> torch.dtype:
    """The torch dtype of the scheme's scales."""
    return getattr(torch, scheme.scale_dtype)


def stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """`scale` as the checkpoint will hold it: rounded to its dtype, finite, and never so small that it vanishes."""
    dtype = scale_dtype(scheme)
    smallest = 1e-7 if dtype is torch.float16 else 1e-30
    bounded = scale.abs().clamp(smallest, torch.finfo(dtype).max)
    return torch.where(scale < 0, -bounded, bounded).to(dtype).float()


def _error(w: Tensor, omega: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Weighted squared error, `[rows, groups]`, of rounding `w` to multiples of `scale` between `low` and `high`."""
    x = w * (1.0 / scale).unsqueeze(-1)
    x.sub_(x.round().clamp_(low, high))  # type: ignore[arg-type]
    return _inner(x, x, omega).mul_(scale.square())


def _inner(a: Tensor, b: Tensor, omega: Tensor) -> Tensor:
    """`a M bᵀ` for each row and group, `[rows, groups]`; M is diagonal (`[groups, size]`) or full."""
    if omega.dim() == 2:
        return (a * b).mul_(omega).sum(-1)
    return torch.matmul(a.transpose(0, 1), omega).transpose(0, 1).mul(b).sum(-1)


class _Best:
    """The best grid seen so far for each group."""

    def __init__(self, scale: Tensor, zero: Tensor):
        self.error = torch.full_like(scale, torch.inf)
        self.scale, self.zero = scale.clone(), zero.clone()

    def offer(self, error: Tensor, scale: Tensor, zero: Tensor | None = None) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not None:
            self.zero = torch.where(better, zero, self.zero)


def _ratios(scheme: Scheme, device: torch.device) -> Tensor:
    """Coarse candidates, as shares of the scale that just covers the group. Few bits clip further."""
    lowest = {2: 0.3, 3: 0.45, 4: 0.55, 8: 0.8}[scheme.bits]
    return torch.linspace(lowest, 1.0, 16, device=device)


def _search_symmetric(w: Tensor, omega: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    mid = scheme.midpoint
    low, high = -mid, mid - 1
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)  # [rows, groups], signed
    # The scale that puts the largest weight on the extra negative code, the one that clips it evenly on the positive
    # end, and (not scaled further) the one of weights that were on a plain symmetric grid before.
    full, plain, exact = -largest / mid, largest / (mid - 0.5), largest / (mid - 1)
    ratios = _ratios(scheme, w.device)
    step = float(ratios[1] - ratios[0])
    zero = torch.full_like(full, mid)
    best = _Best(stored(torch.where(full == 0, 1.0, full), scheme), zero)
    for base in (full, plain):
        for ratio in ratios.tolist():
            scale = stored(base * ratio, scheme)
            best.offer(_error(w, omega, scale, low, high), scale)
    scale = stored(torch.where(exact == 0, 1.0, exact), scheme)
    best.offer(_error(w, omega, scale, low, high), scale)
    center = best.scale
    for offset in torch.linspace(-step, step, 16).tolist():
        scale = stored(center + offset * full, scheme)
        best.offer(_error(w, omega, scale, low, high), scale)
    _least_squares(w, omega, best, scheme, low, high)
    return best.scale, best.zero


def _search_asymmetric(w: Tensor, omega: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    top = scheme.levels - 1
    low_end, high_end = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)  # 0 stays representable
    cover = (high_end - low_end) / top
    cover = torch.where(cover == 0, 1.0, cover)
    ratios = _ratios(scheme, w.device)
    step = float(ratios[1] - ratios[0])
    widest = stored(cover, scheme)
    best = _Best(widest, (-low_end / widest).round().clamp(0, top))

    def offer(scale: Tensor, zero: Tensor) -> None:
        z = zero.clamp(0, top)
        bounds = -z.unsqueeze(-1), (top - z).unsqueeze(-1)
        best.offer(_error(w, omega, scale, *bounds), scale, z)

    for ratio in ratios.tolist():
        scale = stored(cover * ratio, scheme)
        # A smaller scale must clip: at the top (zero from the low end), at the bottom, or evenly.
        for zero in _zero_candidates(low_end, high_end, scale, top):
            offer(scale, zero)
    center, zero = best.scale, best.zero
    for offset in torch.linspace(-step, step, 11).tolist():
        scale = stored(center + offset * cover, scheme)
        for shift in (-1, 0, 1):
            offer(scale, zero + shift)
    z = best.zero.unsqueeze(-1)
    _least_squares(w, omega, best, scheme, -z, top - z)
    return best.scale, best.zero


def _zero_candidates(low_end: Tensor, high_end: Tensor, scale: Tensor, top: int) -> tuple[Tensor, ...]:
    """Zero points that cover the low end, the high end, and the two beside the middle."""
    covers_low, covers_high = (-low_end / scale).round(), (top - high_end / scale).round()
    middle = (covers_low + covers_high) / 2
    return covers_low, covers_high, middle.floor(), middle.ceil()


def _least_squares(
    w: Tensor, omega: Tensor, best: _Best, scheme: Scheme, low: Tensor | int, high: Tensor | int
) -> None:
    """Offer the scale that minimises the error of the codes `best` gives (one Lloyd step)."""
    q = (w / best.scale.unsqueeze(-1)).round_().clamp_(low, high)  # type: ignore[arg-type]
    norm = _inner(q, q, omega)
    scale = torch.where(norm > 0, _inner(q, w, omega) / norm.clamp_min(1e-30), best.scale)
    scale = stored(torch.where(scale == 0, best.scale, scale), scheme)
    best.offer(_error(w, omega, scale, low, high), scale)
