"""After GPTQ: the best scales for its codes, and better codes for those scales, one column at a time.

Both steps lower `tr(E H Eᵀ)`, `E = Ŵ − W`, and never raise it. Scales in closed form, as in arXiv 2602.02126; codes by
cyclic coordinate descent, as QuantEase (arXiv 2309.01885). GPTQ chooses each code once, knowing nothing of the codes to
come; a second look does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wq import grid
from wq.scheme import Scheme

_BLOCK = 128
_PIECE = 1 << 22  # elements of the largest temporary
_LARGEST_CHANGE = 0.3  # of a scale; more means that a group's codes say nothing of it


def refit(weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Scales `[out, groups]` that fit the codes best, rounded as they are stored; a row's only where its error falls.

    weight: float `[out, in]`. hessian: `[in, in]`, damped. codes: uint8 `[out, in]`. scale, zero: `[out, groups]`.
    """
    rows, columns = weight.shape
    groups = scale.shape[1]
    levels = grid.grouped(codes.float(), groups) - zero.float().unsqueeze(-1)  # [out, groups, size]
    flat = levels.reshape(rows, columns)
    gram = torch.cat([_gram(part, hessian) for part in levels.split(max(1, _PIECE // (groups * columns)))])
    wanted = grid.grouped((weight.float() @ hessian) * flat, groups).sum(-1)
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(-1))
    fitted, failed = torch.linalg.solve_ex(gram, wanted)
    old = scale.float()
    sane = torch.isfinite(fitted) & ((fitted - old).abs() <= _LARGEST_CHANGE * old.abs())
    fitted = grid.stored(torch.where(sane & (failed == 0).unsqueeze(-1), fitted, old), scheme)

    def loss(s: Tensor) -> Tensor:
        error = (levels * s.unsqueeze(-1)).reshape(rows, columns) - weight.float()
        return ((error @ hessian) * error).sum(-1)

    better = loss(fitted) < loss(old)
    return torch.where(better.unsqueeze(-1), fitted, old).to(scale.dtype)


def _gram(levels: Tensor, hessian: Tensor) -> Tensor:
    """`[rows, groups, groups]`: for each row, `q_g H_gh q_hᵀ` of its groups' levels q, `[rows, groups, size]`."""
    rows, groups, size = levels.shape
    strips = hessian.reshape(groups, size, -1)  # [groups, size, in]
    spread = torch.bmm(levels.transpose(0, 1), strips)  # [groups, rows, in]
    return (spread.view(groups, rows, groups, size) * levels).sum(-1).transpose(0, 1).contiguous()


def descend(
    weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, order: Tensor
) -> Tensor:
    """One sweep of coordinate descent over the columns in `order`: codes uint8 `[out, in]`.

    Each code becomes the best one given all others. Shapes as in `refit`; order: int64 `[in]`.
    """
    columns = weight.shape[1]
    group = order // (columns // scale.shape[1])
    h = hessian[order][:, order].contiguous()
    q = codes.t()[order].float()  # [in, out]: a column of the weight is contiguous
    s, z = scale.float().t()[group].contiguous(), zero.float().t()[group].contiguous()
    error = (q - z) * s - weight.float().t()[order]
    residual = h @ error  # [in, out]
    top = scheme.levels - 1
    for start in range(0, 0 if error.is_meta else columns, _BLOCK):  # on shapes alone, it would make nothing
        stop = min(start + _BLOCK, columns)
        moved = torch.zeros_like(error[start:stop])
        for j in range(start, stop):
            value = (q[j] - z[j]) * s[j]
            new = ((value - residual[j] / h[j, j]) / s[j]).round_().add_(z[j]).clamp_(0, top)
            step = (new - q[j]) * s[j]
            moved[j - start] = step
            q[j] = new
            if j + 1 < stop:
                residual[j + 1 : stop].addr_(h[j, j + 1 : stop], step)
        if stop < columns:
            residual[stop:].addmm_(h[stop:, start:stop], moved)
    in_place = torch.empty_like(codes.t())
    in_place[order] = q.to(torch.uint8)
    return in_place.t().contiguous()
