"""The asymmetric target: let a layer make up for what the quantized layers before it have done to its input.

With x the input in the dense model and x̂ the one in the model quantized so far, what a layer should minimise is not
`E‖(Ŵ − W) x̂‖²` but `E‖Ŵ x̂ − W x‖²`. Up to a constant the latter is the former with W replaced by

    W* = W + W D H⁻¹,    H = E[x̂ x̂ᵀ],  D = E[(x − x̂) x̂ᵀ]

so GPTAQ (arXiv 2504.02692), QEP (arXiv 2504.09629) and others are plain GPTQ on W*, up to approximations. Taken
whole, the correction fits the calibration tokens too well; here it is damped, and its share α is the one that is best
on tokens held out, in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wq.solvers import Statistics, Total, own

_DAMPING = 0.2  # of the mean diagonal of H
_LARGEST_SHARE = 1.0
RESIDUAL = 1.0


def retarget(weight: Tensor, statistics: Statistics, total: Total = own) -> tuple[Tensor, float]:
    """W* for `weight`, float `[out, in]`, and the share α of the correction that it has, 0 when none helps.

    Needs `statistics.drift`, and `statistics.heldout` with a drift of its own; without them α is 0. total: as in
    `wq.solvers.gptq.solve`.
    """
    heldout = statistics.heldout
    if statistics.drift is None or heldout is None or heldout.drift is None:
        return weight, 0.0
    hessian = statistics.second_moment.double()
    mean = hessian.diagonal().mean()
    if not (torch.isfinite(hessian).all() and torch.isfinite(statistics.drift).all() and mean > 0):
        return weight, 0.0
    hessian.diagonal().add_(_DAMPING * mean)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return weight, 0.0
    w = weight.float()
    correction = torch.cholesky_solve(pull(w, statistics).double().t(), factor).t().float()
    norm = float(total(((correction @ heldout.second_moment) * correction).sum()))
    gain = float(total((pull(w, heldout) * correction).sum()))
    share = min(max(gain / norm, 0.0), _LARGEST_SHARE) if norm > 0 else 0.0
    return w + share * correction, share


def pull(weight: Tensor, statistics: Statistics) -> Tensor:
    """`E[(t − W x̂) x̂ᵀ]`, `[out, in]`: how the wanted output t differs from what the dense weight gives by now."""
    assert statistics.drift is not None
    found = weight @ statistics.drift
    return found if statistics.residual is None or RESIDUAL == 0 else found + RESIDUAL * statistics.residual
