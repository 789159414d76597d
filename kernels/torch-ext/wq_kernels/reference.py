"""Plain torch: the oracle for every other backend, and the path wherever none of them runs.

Layout, for a weight `[out_features, in_features]` with b bits and G groups:

    packed      int32 [out, ceil(in · b / 32)]   codes, a little-endian bit stream along in_features
    scale       float [out, G]
    zero        int32 [ceil(out · b / 32), G]    the same stream along out_features, or None for the midpoint 2**(b-1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dequantize", "linear", "pack", "supports", "unpack"]

_UNIT = 32  # values that fill a whole number of words at any width
_F32 = torch.float32


def supports(bits: int) -> bool:
    """Every width that has a bit stream."""
    return 1 <= bits <= 8


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """int32 words `[..., words]` to uint8 values `[..., count]`."""
    if bits in (2, 4, 8):
        return _unpack_within_bytes(stream, bits)[..., :count]
    padded = functional.pad(stream, (0, -stream.shape[-1] % bits)).unflatten(-1, (-1, bits))
    mask = (1 << bits) - 1
    values = []
    for i in range(_UNIT):
        word, offset = divmod(i * bits, 32)
        value = padded[..., word] >> offset
        if offset + bits > 32:  # straddles: drop the sign bits shifted in, and add the low bits of the next word
            value = (value & ((1 << (32 - offset)) - 1)) | (padded[..., word + 1] << (32 - offset))
        values.append((value & mask).to(torch.uint8))
    return torch.stack(values, -1).flatten(-2)[..., :count]


def _unpack_within_bytes(stream: Tensor, bits: int) -> Tensor:
    """2, 4 or 8 bits: no value leaves its byte, so the words are read as bytes, four times less to move."""
    if not stream.is_contiguous() or stream.stride(-1) != 1:  # [G, 1] transposed counts as contiguous, and is not unit
        stream = stream.clone(memory_format=torch.contiguous_format)
    values = stream.view(torch.uint8)
    if bits == 8:
        return values
    mask = (1 << bits) - 1
    parts = [(values >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)


def pack(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack` for 2, 4 and 8 bits: uint8 `[..., count]` to int32 words."""
    padded = functional.pad(values, (0, -values.shape[-1] % (32 // bits))).unflatten(-1, (-1, 8 // bits))
    stream = padded[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, 8 // bits):
        stream |= padded[..., i] << (bits * i)
    return stream.view(torch.int32)


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
    codes = unpack(packed, bits, in_features).unflatten(-1, (groups, -1))
    # Codes and zero points are whole numbers below 257: exact in every float dtype, and so is their difference.
    work = scale.dtype if scale.dtype == dtype else torch.promote_types(torch.promote_types(scale.dtype, dtype), _F32)
    if zero is None:
        centered = codes.to(work) - (1 << (bits - 1))
    else:
        # A copy: [G, 1] transposed counts as contiguous without having unit strides, and cannot be read as bytes.
        points = unpack(zero.t().clone(memory_format=torch.contiguous_format), bits, out_features).t().unsqueeze(-1)
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
