"""GPTQ's inner loop: columns rounded one after the other, each seeing the errors of those before it.

In plain torch that is six launches a column, and a GPU mostly waits for the next. Here a program owns some rows of the
weight and keeps the errors of the whole block of columns in registers. It looks back: a column first takes in what the
columns before it owe it, in one reduction, and is then rounded. So nothing is written that another column reads, and
rows never meet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import on

__all__ = ["sweep"]

COLUMNS, ROWS, WARPS = 128, 32, 4  # a tile of errors takes 32 registers of a thread
_TO_INTEGER = 12582912.0  # 1.5 · 2²³: added and taken away, it rounds a float32 to an integer, ties to even


@triton.jit
def _sweep_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # float32 [columns, rows]: a column of the weight is contiguous
    factor_ptr,  # float32 [columns, columns], upper triangular
    scale_ptr,  # float32 [columns, rows]
    zero_ptr,  # float32 [columns, rows]
    codes_ptr,  # uint8 [columns, rows], written
    errors_ptr,  # float32 [columns, rows], written
    columns,
    rows,
    factor_stride,
    top,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TO_INTEGER: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    earlier = tl.arange(0, COLUMNS)
    errors = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    for j in range(columns):
        place = j * rows + row
        owed = tl.load(factor_ptr + earlier * factor_stride + j, mask=earlier < j, other=0.0)
        pivot = tl.load(factor_ptr + j * factor_stride + j)
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0) - tl.sum(errors * owed[:, None], axis=0)
        scale = tl.load(scale_ptr + place, mask=inside, other=1.0)
        zero = tl.load(zero_ptr + place, mask=inside, other=0.0)
        level = tl.minimum(tl.maximum(weight / scale, -4096.0), 4096.0)  # far beyond any code, near enough to round
        code = tl.minimum(tl.maximum((level + TO_INTEGER) - TO_INTEGER + zero, 0.0), top)
        error = (weight - (code - zero) * scale) / pivot
        tl.store(codes_ptr + place, code.to(tl.uint8), mask=inside)
        tl.store(errors_ptr + place, error, mask=inside)
        errors = tl.where(earlier[:, None] == j, error[None, :], errors)


def sweep(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and errors, float32, both `[columns, rows]`, of one block of at most `COLUMNS` columns.

    weight, scale, zero: float32 `[columns, rows]`, contiguous. factor: float32 `[columns, columns]`, upper triangular,
    the block's part of the factor of the inverse Hessian, a view with unit stride along its rows. top: the last code.
    """
    columns, rows = weight.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(weight)
    grid = (triton.cdiv(rows, ROWS),)
    with on(weight.device):
        _sweep_kernel[grid](
            weight, factor, scale, zero, codes, errors, columns, rows, factor.stride(0), float(top),
            COLUMNS=COLUMNS, ROWS=ROWS, TO_INTEGER=_TO_INTEGER, num_warps=WARPS,
        )  # fmt: skip
    return codes, errors
