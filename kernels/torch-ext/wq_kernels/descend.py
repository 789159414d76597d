"""Coordinate descent's inner loop: codes moved one column after the other, each to the best one given all others.

In plain torch that is five launches a column, and a GPU mostly waits for the next. As in `sweep`, a program owns some
rows of the weight and keeps what the columns of the block have moved in registers: a column first takes in what the
columns before it have changed, in one reduction, and then moves. So nothing is written that another column reads, and
rows never meet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import on

__all__ = ["descend"]

COLUMNS, ROWS, WARPS = 128, 32, 4  # a tile of moves takes 32 registers of a thread
_TO_INTEGER = 12582912.0  # 1.5 · 2²³: added and taken away, it rounds a float32 to an integer, ties to even


@triton.jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,  # float32 [columns, rows], whole numbers, moved in place
    residual_ptr,  # float32 [columns, rows]: H E, E the error of the weight
    hessian_ptr,  # float32 [columns, columns], symmetric
    scale_ptr,  # float32 [columns, rows]
    moved_ptr,  # float32 [columns, rows], written
    columns,
    rows,
    hessian_stride,
    top,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TO_INTEGER: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    earlier = tl.arange(0, COLUMNS)
    moved = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    for j in range(columns):
        place = j * rows + row
        shared = tl.load(hessian_ptr + j * hessian_stride + earlier, mask=earlier < j, other=0.0)
        pivot = tl.load(hessian_ptr + j * hessian_stride + j)
        residual = tl.load(residual_ptr + place, mask=inside, other=0.0) + tl.sum(moved * shared[:, None], axis=0)
        scale = tl.load(scale_ptr + place, mask=inside, other=1.0)
        code = tl.load(codes_ptr + place, mask=inside, other=0.0)
        wanted = code - residual * (1.0 / (pivot * scale))
        wanted = tl.minimum(tl.maximum(wanted, -4096.0), 4096.0)  # far beyond any code, near enough to round
        new = tl.minimum(tl.maximum((wanted + TO_INTEGER) - TO_INTEGER, 0.0), top)
        step = (new - code) * scale
        tl.store(codes_ptr + place, new, mask=inside)
        tl.store(moved_ptr + place, step, mask=inside)
        moved = tl.where(earlier[:, None] == j, step[None, :], moved)


def descend(codes: Tensor, residual: Tensor, hessian: Tensor, scale: Tensor, top: int) -> Tensor:
    """Move the codes of one block of at most `COLUMNS` columns, in place; how far weights moved, `[columns, rows]`.

    codes, residual, scale: float32 `[columns, rows]`, contiguous. hessian: float32 `[columns, columns]`, symmetric with
    a positive diagonal, a view with unit stride along its rows. top: the last code.
    """
    columns, rows = codes.shape
    moved = torch.empty_like(codes)
    with on(codes.device):
        _descend_kernel[(triton.cdiv(rows, ROWS),)](
            codes, residual, hessian, scale, moved, columns, rows, hessian.stride(0), float(top),
            COLUMNS=COLUMNS, ROWS=ROWS, TO_INTEGER=_TO_INTEGER, num_warps=WARPS,
        )  # fmt: skip
    return moved
