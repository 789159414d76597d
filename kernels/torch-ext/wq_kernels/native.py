"""2, 3, 4 and 8 bits on a CPU, for every number of rows: `native.cpp`, which a compiler on this machine makes fast.

Weights go from packed words to products in registers, or for many rows through a panel that stays in a core's cache.
With AVX-512's bfloat16 products, two columns are multiplied at once in bfloat16, codes exactly; else in float32.

    packed   int32 [N / 16, words, 16]   the words of a checkpoint, those of 16 rows side by side; within a word, codes
                                         of even columns come first. At 3 bits, where they straddle, as they were
    grid     uint8 [N / 16, G, bytes]    of 16 rows: scales in bfloat16 if they are, else in float32 (32 or 64 bytes),
                                         and where there are zero points, those, in 16 more
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import compiler, stream

__all__ = [
    "WHAT",
    "computes_in",
    "describe",
    "fits",
    "from_stream",
    "make_grid",
    "multiply",
    "op",
    "supports",
    "to_stream",
    "unusable",
]

WHAT = "wq's kernel, compiled here"
_MANY = 9  # rows, for which weights go through a panel on every processor
_SOURCE = Path(__file__).with_name("native.cpp")
_BLOCK = 16  # rows of W side by side
_UNIT = 32  # columns: whole words at any width
_WIDTHS = (2, 3, 4, 8)
_BF16, _F32, _U8 = torch.bfloat16, torch.float32, torch.uint8


def supports(bits: int) -> bool:
    return bits in _WIDTHS


def computes_in(dtype: torch.dtype | None) -> bool:
    return dtype in (torch.float16, _BF16, _F32)


def fits(bits: int, out_features: int, in_features: int, groups: int) -> bool:
    """Whether rows fill blocks, and groups words."""
    whole = groups >= 1 and in_features % groups == 0 and in_features // groups % _UNIT == 0
    return supports(bits) and out_features % _BLOCK == 0 and whole


def describe(rows: int) -> str:
    """What multiplies so many rows, in a few words."""
    return "fused"


@cache
def unusable(bits: int = 4) -> str:
    """Why the kernel does not run on this machine; empty when it does. Compiles it, if need be, and tries it, once."""
    if os.environ.get("WQ_NATIVE") == "0":
        return "WQ_NATIVE is 0"
    try:
        op(bits)
    except compiler.CompileError as error:
        return str(error)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (48, 64), generator=generator, dtype=_U8)
    points = torch.randint(0, 1 << bits, (2, 48), generator=generator, dtype=_U8)
    packed = from_stream(stream.pack(codes, bits), bits, 64)
    grid = make_grid(torch.full((48, 2), 0.5), stream.pack(points, bits).t(), bits, 48, 64)
    exact = (codes.double() - points.t().double().repeat_interleave(32, 1)) / 2
    x = torch.randn(_MANY, 64, generator=generator)
    for dtype, bound in ((_F32, 1e-5), (torch.float16, 1e-3), (_BF16, 4e-3)):
        given = x.to(dtype)
        for rows in (1, _MANY):
            y, expected = multiply(given[:rows], packed, grid, bits).double(), given[:rows].double() @ exact.t()
            if not (y - expected).norm() <= bound * expected.norm():
                return f"what {compiler.find()} made of it computes something else on this processor"
    return ""


def op(bits: int, name: str = "linear") -> Any:
    """x `[..., K]`, packed, grid to `[..., N]`; or another of the ops. Raises CompileError when there can be none."""
    return getattr(getattr(torch.ops, _NAMES[bits]()), name).default


@cache
def _loaded(bits: int) -> str:
    """The namespace of the op."""
    space = compiler.load(_SOURCE, WQ_BITS=bits)
    for name, shape in _SHAPES.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{space.name}::{name}", "Meta"):
            torch.library.register_fake(f"{space.name}::{name}", shape)
    return str(space.name)


def _name_of(bits: int) -> Callable[[], str]:
    """`_loaded`, which a tracer takes as it is, rather than look into how it is made."""

    def name() -> str:
        return _loaded(bits)

    return torch.compiler.assume_constant_result(name)  # with no argument: it would have to be a constant, too


_NAMES = {bits: _name_of(bits) for bits in _WIDTHS}


_SHAPES: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, packed, grid: x.new_empty(*x.shape[:-1], packed.shape[0] * _BLOCK),
    "lay": lambda words: words.new_empty(words.shape[0] // _BLOCK, words.shape[1], _BLOCK),
    "unlay": lambda packed: packed.new_empty(packed.shape[0] * _BLOCK, packed.shape[1]),
}


# --- layouts ---


def from_stream(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The kernel's words from those of a checkpoint (see `reference`)."""
    made: Tensor = op(bits, "lay")(packed)
    return made


def to_stream(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `from_stream`: the words that the checkpoint held."""
    made: Tensor = op(bits, "unlay")(packed)
    return made


def make_grid(scale: Tensor, zero: Tensor | None, bits: int, out_features: int, in_features: int) -> Tensor:
    """What the kernel wants to know of `scale` and `zero`, which are as in `reference`."""
    kept = scale if scale.dtype == _BF16 else scale.to(_F32)
    parts = [_blocks(kept).view(_U8)]
    if zero is not None:
        parts.append(_blocks(stream.unpack(zero.t(), bits, out_features).t()))
    return torch.cat(parts, -1)


def _blocks(values: Tensor) -> Tensor:
    """`[N, G]` to `[N / 16, G, 16]`."""
    return values.reshape(-1, _BLOCK, values.shape[1]).transpose(1, 2).contiguous()


# --- products ---


def multiply(x: Tensor, packed: Tensor, grid: Tensor, bits: int) -> Tensor:
    """`x @ W.T`, `[..., N]` in x's dtype, for x `[..., K]`."""
    y: Tensor = op(bits)(x, packed, grid)
    return y
