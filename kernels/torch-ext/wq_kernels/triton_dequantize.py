"""A Triton kernel that unpacks and scales a weight in one pass, followed by the library's matrix product.

One program dequantizes a tile of rows and columns: each packed word is read once and each weight written once, where
plain torch moves the codes several times over. 2, 4 and 8 bits, whose values never straddle a word; 3 bits stay with
`reference`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

__all__ = ["dequantize", "linear", "supports"]

_ROWS, _COLUMNS = 16, 256


def supports(bits: int) -> bool:
    """Widths whose values stay within a word."""
    return bits in (2, 4, 8)


@triton.jit
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,  # int32 [N, words]
    scale_ptr,  # float [N, G]
    zero_ptr,  # int32 [ceil(N * BITS / 32), G], unused when SYMMETRIC
    out_ptr,  # float [N, K]
    N,
    K,
    words,
    groups,
    group_size,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (n < N) & (k < K)
    w = tl.program_id(1) * (COLUMNS // PER_WORD) + tl.arange(0, COLUMNS // PER_WORD)[None, :]
    word = tl.load(packed_ptr + n * words + w, mask=(n < N) & (w < words), other=0)
    code = (word[:, :, None] >> (tl.arange(0, PER_WORD) * BITS)[None, None, :]) & MASK
    code = tl.reshape(code, (ROWS, COLUMNS))
    group = k // group_size
    scale = tl.load(scale_ptr + n * groups + group, mask=inside, other=0.0).to(tl.float32)
    if SYMMETRIC:
        centered = code - (1 << (BITS - 1))
    else:
        zero_word = tl.load(zero_ptr + (n // PER_WORD) * groups + group, mask=inside, other=0)
        centered = code - ((zero_word >> ((n % PER_WORD) * BITS).to(tl.int32)) & MASK)
    weight = centered.to(tl.float32) * scale
    tl.store(out_ptr + n * K + k, weight.to(out_ptr.dtype.element_ty), mask=inside)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on: make it theirs."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight, `[out, in]` in `dtype`; see `reference.dequantize`."""
    out_features, groups = scale.shape
    out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(out_features, _ROWS), triton.cdiv(in_features, _COLUMNS))
    with _on(packed.device):
        _dequantize_kernel[grid](
            packed.contiguous(),
            scale.contiguous(),
            packed if zero is None else zero.contiguous(),
            out,
            out_features,
            in_features,
            packed.shape[1],
            groups,
            in_features // groups,
            BITS=bits,
            SYMMETRIC=zero is None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, in_features: int
) -> Tensor:
    """`x @ W.T + bias` for `x` `[..., in]`, in x's dtype."""
    return functional.linear(x, dequantize(packed, scale, zero, bits, in_features, x.dtype), bias)
