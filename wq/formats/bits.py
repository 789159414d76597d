"""The bit stream that compressed-tensors and GPTQ share: value i of a row is bits `[i·b, (i+1)·b)` of its int32 words.

Little-endian, dense: 3-bit values straddle words, 32 of them in 3 words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WITHIN_BYTES = (2, 4, 8)  # no value leaves its byte: words are handled as bytes, an order of magnitude faster
_UNIT = 32  # values that fill a whole number of words at any width: 32 values of b bits are b words


def words(count: int, bits: int) -> int:
    """int32 words that `count` values of `bits` bits take."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers `[rows, count]` in `[0, 2**bits)` to int32 `[rows, words(count, bits)]`."""
    if bits in _WITHIN_BYTES:
        return _pack_within_bytes(values.to(torch.uint8), bits)
    rows, count = values.shape
    padded = functional.pad(values.to(torch.int64), (0, -count % _UNIT)).reshape(rows, -1, _UNIT)
    out = padded.new_zeros(rows, padded.shape[1], bits + 1)
    for i in range(_UNIT):
        word, offset = divmod(i * bits, 32)
        shifted = padded[..., i] << offset
        out[..., word] |= shifted & 0xFFFFFFFF
        out[..., word + 1] |= shifted >> 32
    stream = out[..., :bits].reshape(rows, -1)[:, : words(count, bits)]
    # Two's complement by hand: int64 to int32 is only defined for values that fit.
    return torch.where(stream >= 2**31, stream - 2**32, stream).to(torch.int32).contiguous()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: int32 `[rows, words]` to uint8 `[rows, count]`."""
    if bits in _WITHIN_BYTES:
        return _unpack_within_bytes(stream, bits)[:, :count].contiguous()
    rows = stream.shape[0]
    padded = functional.pad(stream, (0, -stream.shape[1] % bits)).reshape(rows, -1, bits)
    mask = (1 << bits) - 1
    out = torch.empty(rows, padded.shape[1], _UNIT, dtype=torch.uint8, device=stream.device)
    for i in range(_UNIT):
        word, offset = divmod(i * bits, 32)
        value = padded[..., word] >> offset
        if offset + bits > 32:  # the rest sits at the bottom of the next word; drop the sign bits shifted in
            kept = 32 - offset
            value = (value & ((1 << kept) - 1)) | (padded[..., word + 1] << kept)
        out[..., i] = (value & mask).to(torch.uint8)
    return out.reshape(rows, -1)[:, :count].contiguous()


def _pack_within_bytes(values: Tensor, bits: int) -> Tensor:
    padded = functional.pad(values, (0, -values.shape[1] % (32 // bits))).unflatten(-1, (-1, 8 // bits))
    stream = padded[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, 8 // bits):
        stream |= padded[..., i] << (bits * i)
    return stream.view(torch.int32)


def _unpack_within_bytes(stream: Tensor, bits: int) -> Tensor:
    # A copy: [G, 1] transposed counts as contiguous without having unit strides, and cannot be read as bytes.
    packed = stream.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], -1).flatten(1)
