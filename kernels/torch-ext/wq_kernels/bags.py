"""2, 4 and 8 bits on a CPU, in float32 inside: a product with a weight as PyTorch's quantized embedding bags.

`y = W x` sums the columns of W, each times a number: what recommendation models do with rows of a table, for which
PyTorch has vector code that reads 2, 4 and 8 bits and adds in float32. So the weight is kept as a table of its columns.
Its rows must share a scale and ours change theirs with the group, so each group of columns is a bag of its own, with
scale 1 and the midpoint for zero: exact whole numbers. Scales and what zero points add come after, `[groups, out]`.

That is for few rows of x. For many, runs of columns are dequantized into a scratch that does not grow with the weight.

    packed   uint8 [K, N · b / 8 + H]   codes of a column along out_features, low bits first, and H bytes that say 1 and
                                        the midpoint: two float16, or for 8 bits two float32
    grid     float32 [1 or 2, G, N]     the scale; and where zero points are not the midpoint, (midpoint − zero) · scale
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from . import stream

__all__ = [
    "FEW",
    "WHAT",
    "computes_in",
    "describe",
    "fits",
    "from_stream",
    "make_grid",
    "multiply",
    "supports",
    "to_stream",
    "unusable",
]

WHAT = "PyTorch's embedding bags"
FEW = 6  # rows: the table is read again for each, and to dequantize it costs about as much as reading it six times
_NAMES = {2: "2bit", 4: "4bit", 8: "byte"}
_STEP = 1 << 19  # weights repacked or dequantized at a time
_F32 = torch.float32


def supports(bits: int) -> bool:
    return bits in _NAMES


def computes_in(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.float16, torch.bfloat16, _F32)


def fits(bits: int, out_features: int, in_features: int, groups: int) -> bool:
    """Whether columns fill whole bytes."""
    return supports(bits) and out_features * bits % 8 == 0 and groups >= 1 and in_features % groups == 0


def describe(rows: int) -> str:
    """What multiplies so many rows, in a few words."""
    return "fused, by PyTorch" if rows <= FEW else "dequantize in tiles, then matmul"


@cache
def unusable(bits: int = 4) -> str:
    """Why PyTorch's embedding bags do not serve here; empty when they do. Computes small products, once."""
    name = _NAMES[bits]
    parts = (f"embedding_bag_{name}_rowwise_offsets", f"embedding_bag_{name}_unpack")
    if not all(hasattr(torch.ops.quantized, part) for part in parts):
        return f"torch {torch.__version__} has no embedding bags of {bits} bits"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(FEW + 1, 64, generator=generator)
    codes = torch.randint(0, 1 << bits, (32, 64), generator=generator, dtype=torch.uint8)
    ours = from_stream(stream.pack(codes, bits), bits, 64)
    grid = torch.full((1, 2, 32), 0.5)
    expected = x.double() @ (codes.double() - (1 << (bits - 1))).t() / 2
    for rows in (1, FEW + 1):
        y = multiply(x[:rows], ours, grid, bits)
        if (y.double() - expected[:rows]).norm() > 1e-5 * expected[:rows].norm():
            return f"the embedding bags of torch {torch.__version__} compute something else on this processor"
    return ""


# --- layouts ---


def from_stream(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The table from the words of a checkpoint (see `reference`)."""
    rows = packed.shape[0]
    tail = _tail(bits).to(packed.device)
    out = torch.empty(in_features, rows * bits // 8 + len(tail), dtype=torch.uint8, device=packed.device)
    if packed.is_meta:
        return out
    out[:, -len(tail) :] = tail
    step = max(32, _STEP // rows // 32 * 32)  # columns, of whole words at every width
    for start in range(0, in_features, step):
        stop = min(in_features, start + step)
        words = packed[:, stream.words(start, bits) : stream.words(stop, bits)]
        columns = stream.unpack(words, bits, stop - start).t()
        parts = columns.unflatten(1, (-1, 8 // bits))
        bytes_ = parts[..., 0].clone(memory_format=torch.contiguous_format)
        for i in range(1, 8 // bits):
            bytes_ |= parts[..., i] << (bits * i)
        out[start:stop, : -len(tail)] = bytes_
    return out


def to_stream(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `from_stream`: the words that the checkpoint held."""
    bytes_ = packed[:, : -len(_tail(bits))]
    mask = (1 << bits) - 1
    codes = torch.stack([bytes_ >> shift & mask for shift in range(0, 8, bits)], -1).flatten(1)
    return stream.pack(codes.t().contiguous(), bits)


def make_grid(scale: Tensor, zero: Tensor | None, bits: int, out_features: int, in_features: int) -> Tensor:
    """What `multiply` wants to know of `scale` and `zero`, which are as in `reference`."""
    exact = scale.to(_F32).t()
    if zero is None:
        return exact.unsqueeze(0).contiguous()
    points = stream.unpack(zero.t(), bits, out_features)
    return torch.stack((exact, ((1 << (bits - 1)) - points.to(_F32)) * exact))


@cache
def _tail(bits: int) -> Tensor:
    dtype = _F32 if bits == 8 else torch.float16
    return torch.tensor([1.0, -(1 << (bits - 1))], dtype=dtype).view(torch.uint8)


# --- products ---


def multiply(x: Tensor, packed: Tensor, grid: Tensor, bits: int) -> Tensor:
    """`x @ W.T`, `[rows, N]` in x's dtype, for x `[rows, K]`, contiguous."""
    few = 0 < x.shape[0] <= FEW
    return (_bags if few else _runs)(x.to(_F32), packed, grid, bits).to(x.dtype)


def _bags(x: Tensor, packed: Tensor, grid: Tensor, bits: int) -> Tensor:
    groups, rows = grid.shape[1], x.shape[0]
    columns, starts = _indices(rows, x.shape[1], groups)
    bag = getattr(torch.ops.quantized, f"embedding_bag_{_NAMES[bits]}_rowwise_offsets")
    sums = bag(packed, columns, starts, False, 0, False, x.view(-1), None, True).view(rows, groups, -1)
    y: Tensor = sums.mul_(grid[0]).sum(1)
    return y if len(grid) == 1 else y.addmm_(x.view(rows, groups, -1).sum(-1), grid[1])


@lru_cache(64)
def _indices(rows: int, columns: int, groups: int) -> tuple[Tensor, Tensor]:
    """Of the table's rows, all for each row of x; and where bags start and the last ends."""
    every = torch.arange(columns, dtype=torch.int32).repeat(rows)
    return every, torch.arange(0, rows * columns + 1, columns // groups, dtype=torch.int32)


def _runs(x: Tensor, packed: Tensor, grid: Tensor, bits: int) -> Tensor:
    y = x.new_zeros(x.shape[0], grid.shape[2])
    groups, size = grid.shape[1], x.shape[1] // grid.shape[1]
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{_NAMES[bits]}_unpack")
    high = max(1, _STEP // y.shape[1] // size)
    for first in range(0, groups, high):
        last = min(groups, first + high)
        columns = slice(first * size, last * size)
        weight = unpack(packed[columns]).view(last - first, size, -1)
        weight.mul_(grid[0, first:last, None])
        if len(grid) == 2:
            weight.add_(grid[1, first:last, None])
        y.addmm_(x[:, columns], weight.flatten(0, 1))
    return y
