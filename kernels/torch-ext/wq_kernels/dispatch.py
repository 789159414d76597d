"""The calls that layers make: checked, then handed to the backend for the device and the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .registry import STREAM, TILED, select

__all__ = ["dequantize", "expert_linear", "linear"]


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    layout: str = STREAM,
) -> Tensor:
    """`x[..., permutation] @ W.T + bias` for x `[..., in]`, in x's dtype.

    permutation: int `[in]`, the input column that each column of W is for (act-order checkpoints), or None.
    Raises ValueError or TypeError, before any launch, for tensors that do not fit.
    """
    checks.linear(x, packed, scale, zero, permutation, bias, bits, out_features, in_features, layout == TILED)
    if permutation is not None:
        x = x.index_select(-1, permutation)
    backend = select(x.device.type, bits, layout)
    y: Tensor = backend.linear(x, packed, scale, zero, bias, bits, out_features, in_features)
    return y


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    layout: str = STREAM,
) -> Tensor:
    """The weight, `[out, in]` in `dtype`, its columns in the order in which they are stored."""
    checks.weight(packed, scale, zero, bits, out_features, in_features, layout == TILED)
    checks.output(dtype)
    backend = select(packed.device.type, bits, layout)
    weight: Tensor = backend.dequantize(packed, scale, zero, bits, out_features, in_features, dtype)
    return weight


def expert_linear(
    x: Tensor,
    expert_of_row: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Row r is `x[r // s] @ W[expert_of_row[r]].T + bias[expert_of_row[r]]`, s = rows / inputs; see `experts`."""
    checks.experts(x, expert_of_row, packed, scale, zero, bias, bits, out_features, in_features)
    backend = select(x.device.type, bits, TILED)
    y: Tensor = backend.expert_linear(x, expert_of_row, packed, scale, zero, bias, bits, out_features, in_features)
    return y
