"""4-bit weights on a CPU, for bfloat16: PyTorch's own kernel for few rows, tiles and a dense product for many.

`aten::_weight_int4pack_mm_for_cpu` reads a weight once and dequantizes in registers, again for every four rows of x: it
wins while reading is what costs. From `FEW` rows on, arithmetic costs more than that. Then a tile of the weight is
dequantized into a scratch that does not grow with the weight, and the library's dense product, which multiplies in
bfloat16, does the rest. Only bfloat16: the kernel has no vector code for other dtypes.

    packed   uint8 [N, K / 2]   in blocks of B rows, each [K, B / 2]: byte i of column k holds rows i (the low half) and
                                B / 2 + i of the block. B is 64 with AVX-512 and 32 with AVX2: what PyTorch makes of it
    grid     bfloat16 [K / g, N, 2]   scale and offset: a weight is `(code − 8) · scale + offset`

A checkpoint's scale and zero point stay beside it, exact; the grid is made of them (`make_grid`).
"""

from __future__ import annotations

import threading
from functools import cache

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

WHAT = "PyTorch's 4-bit kernel"
FEW = 64  # rows; measured by scripts/bench_cpu.py, see `multiply`
_SIZES = (256, 128, 64, 32)  # groups that the kernel takes
_BLOCKS = (64, 32)
_ROWS = 64  # a weight's rows must fill whole blocks, whichever they are
_OFFSET = 8  # the code that the kernel takes for zero
_STEP = 1 << 20  # weights repacked at a time: the library wants them as int32
_DENSE = 1 << 22  # weights dequantized at a time: 8 MB
_TILE = 1 << 19  # weights that are float32 at a time: smaller tiles cost calls, larger ones leave the cache
_LINE = 64  # bytes to which memory is aligned
_F32, _BF16, _U8 = torch.float32, torch.bfloat16, torch.uint8


def supports(bits: int) -> bool:
    return bits == 4


def computes_in(dtype: torch.dtype | None) -> bool:
    return dtype == _BF16


def fits(bits: int, out_features: int, in_features: int, groups: int) -> bool:
    """Whether the kernel takes such a weight: whole blocks of rows, groups of a multiple of 32 columns."""
    whole = groups >= 1 and in_features % groups == 0
    return supports(bits) and out_features % _ROWS == 0 and whole and bool(_kernel_size(in_features // groups))


def _kernel_size(group_size: int) -> int:
    """The group size that the kernel is told: a longer group is several with the same scale."""
    return next((size for size in _SIZES if group_size % size == 0), 0)


def describe(rows: int) -> str:
    """What multiplies so many rows, in a few words."""
    return "fused, by PyTorch" if rows <= FEW else "dequantize in tiles, then matmul"


@cache
def unusable(bits: int = 4) -> str:
    """Why the kernel does not run fast on this processor; empty when it does. Computes a small product, once."""
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has no 4-bit kernel for CPUs"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.int32)
    ours = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    if not _block() or not torch.equal(_codes(ours, _block()), codes.to(torch.uint8)):
        return "PyTorch has no vector code for 4 bits on this processor"
    x = torch.randn(3, 64, generator=generator).to(_BF16)
    grid = torch.tensor([0.125, 1.0], dtype=_BF16).expand(2, 128, 2).contiguous()
    y = torch._weight_int4pack_mm_for_cpu(x, ours, 32, grid)
    expected = x.double() @ ((codes - _OFFSET).double() * 0.125 + 1.0).t()
    if (y.double() - expected).norm() > 0.01 * expected.norm():
        return f"the 4-bit kernel of torch {torch.__version__} computes something else on this processor"
    return ""


@cache
def _block() -> int:
    """Rows in a block on this processor; 0 where bytes are laid out otherwise, for code without vectors."""
    codes = torch.arange(_ROWS * 2, dtype=torch.int32).view(_ROWS, 2) * 5 % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return next((block for block in _BLOCKS if torch.equal(_codes(packed, block), codes.to(torch.uint8))), 0)


def _codes(packed: Tensor, block: int) -> Tensor:
    """uint8 `[N, K]`."""
    rows, half = packed.shape[0], block // 2
    blocks = packed.reshape(rows // block, -1, half)
    return torch.stack((blocks & 15, blocks >> 4), 1).transpose(2, 3).reshape(rows, -1)


# --- layouts ---


def from_stream(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The kernel's bytes from the words of a checkpoint (see `reference`)."""
    rows = packed.shape[0]
    out = torch.empty(rows, in_features // 2, dtype=torch.uint8, device=packed.device)
    if packed.is_meta:
        return out
    step = max(_ROWS, _STEP // in_features // _ROWS * _ROWS)
    for start in range(0, rows, step):
        codes = stream.unpack(packed[start : start + step], bits, in_features).to(torch.int32)
        out[start : start + step] = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    return out


def to_stream(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `from_stream`: the words that the checkpoint held."""
    return stream.pack(_codes(packed, _block()), bits)


def make_grid(scale: Tensor, zero: Tensor | None, bits: int, out_features: int, in_features: int) -> Tensor:
    """`[K / g, N, 2]`: what the kernel wants to know of `scale` and `zero`, which are as in `reference`."""
    exact = scale.to(_F32)
    offset = torch.zeros_like(exact)
    if zero is not None:
        points = stream.unpack(zero.t(), bits, out_features).t()
        offset = (_OFFSET - points.to(_F32)) * exact
    size = in_features // scale.shape[1]
    grid = torch.stack((exact, offset), -1).transpose(0, 1).to(_BF16)
    return grid.repeat_interleave(size // _kernel_size(size), 0).contiguous()


# --- products ---


def multiply(x: Tensor, packed: Tensor, grid: Tensor, bits: int = 4) -> Tensor:
    """`x @ W.T`, `[rows, N]`, for x `[rows, K]`, contiguous, in the grid's dtype.

    Up to `FEW` rows the kernel is the faster: with AVX-512 and bfloat16 products (a Zen 4 core), at 64 rows both take
    as long. Where bfloat16 products are slower, the kernel is ahead for longer; with AMX, for less long.
    """
    size = x.shape[1] // grid.shape[0]
    if x.shape[0] <= FEW:
        return torch._weight_int4pack_mm_for_cpu(x, packed, size, grid)
    y = x.new_empty(x.shape[0], packed.shape[0])
    _multiply_dense(x, packed, grid, y)
    return y


_kept = threading.local()


def _scratch(*wanted: tuple[int, torch.dtype]) -> list[Tensor]:
    """Memory of this thread, 11 MB at most, that is kept: to get it anew from the system costs more than to fill it."""
    need = sum(count * dtype.itemsize + _LINE for count, dtype in wanted)
    if getattr(_kept, "memory", None) is None or _kept.memory.numel() < need:
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            _kept.memory = torch.empty(need, dtype=_U8)
    found, start = [], 0
    for count, dtype in wanted:
        found.append(_kept.memory[start : start + count * dtype.itemsize].view(dtype))
        start += -(-count * dtype.itemsize // _LINE) * _LINE
    return found


def _multiply_dense(x: Tensor, packed: Tensor, grid: Tensor, y: Tensor) -> None:
    """`multiply`, for many rows, into y.

    A run of rows of W at a time, all columns; within it a tile at a time, in passes of the library that each run over
    contiguous memory in a core's cache. That leaves the rows of W in the order of the halves of bytes, all low ones
    first; what they are multiplied to is put in order, which is less.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    half, groups = _block() // 2, grid.shape[0]
    size = columns // groups
    wide = min(rows, max(1, _DENSE // columns // _ROWS) * _ROWS)
    high = min(groups, max(1, _TILE // wide // size))  # groups in a tile
    count = high * size * wide
    values, dense, codes, bytes_ = _scratch((count, _F32), (columns * wide, x.dtype), (count, _U8), (count // 2, _U8))
    blocks = packed.view(-1, columns, half)
    halves = grid.view(groups, -1, 2, half, 2).permute(4, 0, 2, 1, 3)
    for start in range(0, rows, wide):
        wide = min(wide, rows - start)
        run = slice(start // half // 2, (start + wide) // half // 2)
        planes = torch.empty(2, groups, 1, wide, dtype=_F32)
        planes.view(2, groups, 2, -1, half).copy_(halves[:, :, :, run])
        scale, base = planes
        base.sub_(scale, alpha=_OFFSET)
        weight = dense[: columns * wide].view(columns, wide)
        for first in range(0, groups, high):
            last = min(groups, first + high)
            k, count = slice(first * size, last * size), (last - first) * size * wide
            here = bytes_[: count // 2].view(-1, wide // 2)
            here.view(here.shape[0], -1, half).copy_(blocks[run, k].transpose(0, 1))
            two = codes[:count].view(-1, 2, wide // 2)
            torch.bitwise_and(here, 15, out=two[:, 0])
            torch.bitwise_right_shift(here, 4, out=two[:, 1])
            value = values[:count].copy_(codes[:count]).view(last - first, size, wide)
            value.mul_(scale[first:last]).add_(base[first:last])
            weight[k].view_as(value).copy_(value)
        product = torch.mm(x, weight).view(x.shape[0], 2, -1, half)
        y[:, start : start + wide].unflatten(1, (-1, 2, half)).copy_(product.transpose(1, 2))
