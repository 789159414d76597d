"""Triton kernels that write a packed weight out as a dense one, from the checkpoint's layout and from the tiled one.

One program dequantizes a tile of rows and columns: each packed word is read once (3-bit values, which straddle words,
are looked up one by one in the cache) and each weight written once, where plain torch moves the codes several times
over. As a backend, `linear` dequantizes and hands over to the library's product; it is the way for what the fused
kernel does not take: 3 bits, and odd groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import layout
from .target import on, target

__all__ = ["dequantize", "dequantize_tiles", "linear", "supports"]

_ROWS, _COLUMNS = 16, 256


def launch_options(target: str) -> dict[str, int]:
    """Left to itself, NVIDIA's assembler would rather spill a few registers than run one thread block less."""
    return {"maxnreg": 255} if target == "ptx" else {}


def supports(bits: int) -> bool:
    """Widths that checkpoints have."""
    return bits in (2, 3, 4, 8)


@triton.jit
def _value(stream_ptr, i, stride, words, inside, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The word that holds value i of a stream, shifted so that the value is at the bottom; bits above it are rubbish.

    Neighbours read the same word, which the first-level cache serves; words are `stride` apart.
    """
    bit = i * BITS
    low = tl.load(stream_ptr + bit // 32 * stride, mask=inside, other=0)
    offset = (bit % 32).to(tl.int32)
    value = low >> offset
    if 32 % BITS != 0:  # the rest of a value that straddles is at the bottom of the next word
        straddles = inside & (offset + BITS > 32) & (bit // 32 + 1 < words)
        high = tl.load(stream_ptr + (bit // 32 + 1) * stride, mask=straddles, other=0)
        kept = 32 - offset
        value = tl.where(straddles, (value & ((1 << (kept & 31)) - 1)) | (high << (kept & 31)), value)
    return value


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
    MASK: tl.constexpr = (1 << BITS) - 1
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (n < N) & (k < K)
    if 32 % BITS == 0:  # a word holds whole values: each is loaded once and spread out
        PER_WORD: tl.constexpr = 32 // BITS
        w = tl.program_id(1) * (COLUMNS // PER_WORD) + tl.arange(0, COLUMNS // PER_WORD)[None, :]
        word = tl.load(packed_ptr + n * words + w, mask=(n < N) & (w < words), other=0)
        code = tl.reshape(word[:, :, None] >> (tl.arange(0, PER_WORD) * BITS)[None, None, :], (ROWS, COLUMNS)) & MASK
    else:
        code = _value(packed_ptr + n * words, k, 1, words, inside, BITS) & MASK
    group = k // group_size
    scale = tl.load(scale_ptr + n * groups + group, mask=inside, other=0.0).to(tl.float32)
    if SYMMETRIC:
        centered = code - (1 << (BITS - 1))
    else:
        centered = code - (_value(zero_ptr + group, n, groups, tl.cdiv(N * BITS, 32), inside, BITS) & MASK)
    weight = centered.to(tl.float32) * scale
    tl.store(out_ptr + n * K + k, weight.to(out_ptr.dtype.element_ty), mask=inside)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, `[out, in]` in `dtype`; see `reference.dequantize`."""
    groups = scale.shape[1]
    out = torch.empty(out_features, in_features, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(out_features, _ROWS), triton.cdiv(in_features, _COLUMNS))
    with on(packed.device):
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
            **launch_options(target(packed.device)),
        )
    return out


@triton.jit
def _dequantize_tiles_kernel(  # type: ignore[no-untyped-def]
    words_ptr,  # int32 [blocks, N padded, 16], from the first row to write
    scale_ptr,  # float [G, N padded], likewise
    zero_ptr,  # uint8 [G or 1, N padded], likewise
    out_ptr,  # float [N, K]
    N,
    K,
    rows,  # N of the whole weight, padded
    zero_rows,
    columns,  # of one group
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    PER_HALF: tl.constexpr = 16 // BITS
    block = tl.program_id(0)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word_at = (block.to(tl.int64) * rows + n[:, None]) * 16 + tl.arange(0, 16)[None, :]
    word = tl.load(words_ptr + word_at, mask=n[:, None] < N, other=0)
    half = tl.arange(0, 2)[None, None, :]
    for p in tl.static_range(PER_HALF):
        k = block * (32 * PER_HALF) + 32 * p + tl.arange(0, 32)
        group = (block * (32 * PER_HALF) + 32 * p) // columns
        scale = tl.load(scale_ptr + group * rows + n, mask=n < N, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + group * zero_rows + n, mask=n < N, other=0).to(tl.int32)
        code = tl.reshape((word[:, :, None] >> (BITS * p + 16 * half)) & ((1 << BITS) - 1), (ROWS, 32))
        weight = (code - zero[:, None]).to(tl.float32) * scale[:, None]
        out = out_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out, weight.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


def dequantize_tiles(
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    rows: tuple[int, int],
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `[start, stop)` of a weight in the tiled layout, `[stop - start, in]` in `dtype`."""
    start, stop = rows
    out = torch.empty(stop - start, in_features, dtype=dtype, device=words.device)
    with on(words.device):
        _dequantize_tiles_kernel[(words.shape[0], triton.cdiv(stop - start, _ROWS))](
            words[:, start:],
            scale[:, start:],
            zero[:, start:],
            out,
            stop - start,
            in_features,
            words.shape[1],
            zero.shape[1] if zero.shape[0] > 1 else 0,
            words.shape[0] * layout.block_columns(bits) // scale.shape[0],
            BITS=bits,
            ROWS=_ROWS,
            **launch_options(target(words.device)),
        )
    return out


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
