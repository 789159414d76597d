"""The bit stream of checkpoints: value i of a row is bits `[i·b, (i+1)·b)` of its int32 words. Plain torch.

Little-endian, dense: 3-bit values straddle words, 32 of them in 3 words. compressed-tensors and GPTQ share it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["pack", "unpack", "words"]

_UNIT = 32  # values that fill a whole number of words at any width: 32 values of b bits are b words
_WITHIN_BYTES = (2, 4, 8)  # no value leaves its byte: words are handled as bytes, four times less to move


def words(count: int, bits: int) -> int:
    """int32 words that `count` values of `bits` bits take."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers `[..., count]` in `[0, 2**bits)` to int32 `[..., words(count, bits)]`."""
    if bits in _WITHIN_BYTES:
        return _pack_within_bytes(values.to(torch.uint8), bits)
    count = values.shape[-1]
    padded = functional.pad(values.to(torch.int64), (0, -count % _UNIT)).unflatten(-1, (-1, _UNIT))
    out = padded.new_zeros(*padded.shape[:-1], bits + 1)
    for i in range(_UNIT):
        word, offset = divmod(i * bits, 32)
        shifted = padded[..., i] << offset
        out[..., word] |= shifted & 0xFFFFFFFF
        out[..., word + 1] |= shifted >> 32
    stream = out[..., :bits].flatten(-2)[..., : words(count, bits)]
    # Two's complement by hand: int64 to int32 is only defined for values that fit.
    return torch.where(stream >= 2**31, stream - 2**32, stream).to(torch.int32).contiguous()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: int32 words `[..., words]`, of any strides, to uint8 `[..., count]`."""
    if bits in _WITHIN_BYTES:
        return _unpack_within_bytes(stream, bits)[..., :count].contiguous()
    padded = functional.pad(stream, (0, -stream.shape[-1] % bits)).unflatten(-1, (-1, bits))
    mask = (1 << bits) - 1
    out = torch.empty(*padded.shape[:-1], _UNIT, dtype=torch.uint8, device=stream.device)
    for i in range(_UNIT):
        word, offset = divmod(i * bits, 32)
        value = padded[..., word] >> offset
        if offset + bits > 32:  # the rest sits at the bottom of the next word; drop the sign bits shifted in
            kept = 32 - offset
            value = (value & ((1 << kept) - 1)) | (padded[..., word + 1] << kept)
        out[..., i] = (value & mask).to(torch.uint8)
    return out.flatten(-2)[..., :count].contiguous()


def _pack_within_bytes(values: Tensor, bits: int) -> Tensor:
    padded = functional.pad(values, (0, -values.shape[-1] % (32 // bits))).unflatten(-1, (-1, 8 // bits))
    stream = padded[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, 8 // bits):
        stream |= padded[..., i] << (bits * i)
    return stream.view(torch.int32)


def _unpack_within_bytes(stream: Tensor, bits: int) -> Tensor:
    if not stream.is_contiguous() or stream.stride(-1) != 1:  # [G, 1] transposed counts as contiguous, and is not unit
        stream = stream.clone(memory_format=torch.contiguous_format)
    values = stream.view(torch.uint8)
    if bits == 8:
        return values
    mask = (1 << bits) - 1
    return torch.stack([(values >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(-2)
