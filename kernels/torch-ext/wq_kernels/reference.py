"""Plain torch: the oracle for every other backend, and the path wherever none of them runs.

Layout, for a weight `[out_features, in_features]` with b bits and G groups:

    packed      int32 [out, ceil(in · b / 32)]   codes, a bit stream along in_features (see `stream`)
    scale       float [out, G]
    zero        int32 [ceil(out · b / 32), G]    the same stream along out_features, or None for the midpoint 2**(b-1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import stream

__all__ = ["dequantize", "linear", "supports"]

_F32 = torch.float32


def supports(bits: int) -> bool:
    """Every width that has a bit stream."""
    return 1 <= bits <= 8


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, `[out, in]` in `dtype`: `scale · (code − zero)`, rounded once."""
    groups = scale.shape[1]
    codes = stream.unpack(packed, bits, in_features).unflatten(-1, (groups, -1))
    # Codes and zero points are whole numbers below 257: exact in every float dtype, and so is their difference.
    work = scale.dtype if scale.dtype == dtype else torch.promote_types(torch.promote_types(scale.dtype, dtype), _F32)
    if zero is None:
        centered = codes.to(work) - (1 << (bits - 1))
    else:
        points = stream.unpack(zero.t(), bits, out_features).t().unsqueeze(-1)
        centered = codes.to(work) - points.to(work)
    return (centered * scale.to(work).unsqueeze(-1)).flatten(-2).to(dtype)


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`x @ W.T + bias` for `x` `[..., in]`, in x's dtype."""
    return functional.linear(x, dequantize(packed, scale, zero, bits, out_features, in_features, x.dtype), bias)
