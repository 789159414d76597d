"""The bit stream that compressed-tensors and GPTQ share: value i of a row is bits `[i·b, (i+1)·b)` of its int32 words.

Little-endian, dense: 3-bit values straddle words, 32 of them in 3 words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_UNIT = 32  # values that fill a whole number of words at any width: 32 values of b bits are b words


def words(count: int, bits: int) -> int:
    """int32 words that `count` values of `bits` bits take."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers `[rows, count]` in `[0, 2**bits)` to int32 `[rows, words(count, bits)]`."""
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
