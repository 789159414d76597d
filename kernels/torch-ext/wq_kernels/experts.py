"""A mixture of experts on the tiled layout: every row of input times the weight of its own expert, in one launch.

Rows are sorted by expert and cut into tiles of at most BM rows, each of one expert; a thread block takes one such tile
and BN rows of that expert's weight, and runs the loop of the linear kernel. How many tiles there are depends on the
routing, which is only known on the device; the grid has as many as there could be, and those left over return at once.
So nothing waits for the device, and a CUDA graph can be captured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import configs, layout
from .inner import multiply
from .target import describe, on, target

__all__ = ["expert_linear", "sort_rows"]

_HALF = (torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["M", "blocks", "groups", "group_shift", "rows_per_input"])
def _experts_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # float16 or bfloat16 [rows / rows_per_input, K]
    words_ptr,  # int32 [E, blocks, N padded, 16]
    scale_ptr,  # float [E, G, N padded]
    zero_ptr,  # uint8 [E, G or 1, N padded]
    bias_ptr,  # float [E, N] or None
    y_ptr,  # like x [rows, N]
    row_ptr,  # int32 [tiles, BM]: the output row in each place of each tile; M in the places that are empty
    expert_ptr,  # int32 [tiles]: whose rows they are; -1 in tiles that are empty
    M,  # output rows
    N,
    blocks,
    groups,
    zero_rows,
    group_shift,
    rows_per_input,  # output row r reads input row r // rows_per_input
    BITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    expert = tl.load(expert_ptr + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        row = tl.load(row_ptr + tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
        n_inside, m_inside = n < N, row < M
        rows = tl.cdiv(N, 16) * 16
        zero_groups = groups if zero_rows > 0 else 1
        total = multiply(
            words_ptr + expert * blocks * rows * 16 + n[:, None] * 16 + tl.arange(0, 16)[None, :],
            x_ptr + (row // rows_per_input)[None, :] * (blocks * (512 // BITS)) + tl.arange(0, 32)[:, None],
            scale_ptr + expert * groups * rows + n,
            zero_ptr + expert * zero_groups * rows + n,
            0,
            blocks,
            rows,
            zero_rows,
            group_shift,
            n_inside,
            m_inside,
            BITS,
            BLOCK_GROUPS,
            SCALE_WEIGHTS,
            STAGES,
            TARGET,
        )
        if bias_ptr is not None:
            total += tl.load(bias_ptr + expert * N + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
        out = y_ptr + row[None, :] * N + n[:, None]
        tl.store(out, total.to(y_ptr.dtype.element_ty), mask=n_inside[:, None] & m_inside[None, :])


def sort_rows(expert_of_row: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Cut rows into tiles of one expert each.

    expert_of_row: int `[M]`, an expert outside of `[0, experts)` leaves its row out. Returns int32 `[tiles, tile]`,
    the rows in each tile, ascending, then M; and int32 `[tiles]`, the expert of each tile, -1 for empty ones. The
    number of tiles depends on the shapes alone.
    """
    rows, device = expert_of_row.shape[0], expert_of_row.device
    tiles = min(rows, rows // tile + experts)
    valid = (expert_of_row >= 0) & (expert_of_row < experts)
    key = torch.where(valid, expert_of_row, experts).long()
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=device).scatter_add_(0, key, torch.ones_like(key))
    full = (counts[:-1] + tile - 1) // tile  # tiles of each expert
    ends = full.cumsum(0)
    first_row, first_place = counts.cumsum(0) - counts, functional.pad((ends - full) * tile, (0, 1))
    sorted_key = key[order]
    place = first_place[sorted_key] + torch.arange(rows, device=device) - first_row[sorted_key]
    place = torch.where(sorted_key < experts, place, tiles * tile)
    table = torch.full((tiles * tile + 1,), rows, dtype=torch.int32, device=device)
    table.scatter_(0, place, torch.where(sorted_key < experts, order, rows).to(torch.int32))
    index = torch.arange(tiles, device=device)
    expert = torch.searchsorted(ends, index, right=True)
    return table[:-1].view(tiles, tile), torch.where(expert < experts, expert, -1).to(torch.int32)


def expert_linear(
    x: Tensor,
    expert_of_row: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Row r is `x[r // s] @ W[expert_of_row[r]].T + bias[expert_of_row[r]]`, with s = rows / inputs: `[rows, out]`.

    x: float16 or bfloat16 `[inputs, in]`; other dtypes take `layout.expert_linear`. words, scale, zero: the tiled
    layout, with a dimension of experts before the others. bias `[E, out]`. Rows without an expert are 0.
    """
    rows = expert_of_row.shape[0]
    if x.dtype not in _HALF or rows == 0:
        return layout.expert_linear(x, expert_of_row, words, scale, zero, bias, bits, out_features, in_features)
    experts, blocks = words.shape[:2]
    groups, kind = scale.shape[1], target(x.device)
    block_groups = layout.block_groups(blocks, groups)
    # The tile that fits an expert's share of the rows; more rows than that are more tiles.
    share = min(-(-rows // experts), 128)
    config = configs.choose(describe(x.device), configs.bucket(share), bits, block_groups, triton.__version__)
    places, owners = sort_rows(expert_of_row, experts, config.rows_m)
    x = layout.pad_columns(x, blocks, bits)
    y = torch.zeros(rows, out_features, dtype=x.dtype, device=x.device)
    with on(x.device):
        _experts_kernel[(owners.shape[0], -(-out_features // config.rows_n))](
            x,
            words,
            scale,
            zero,
            bias,
            y,
            places,
            owners,
            rows,
            out_features,
            blocks,
            groups,
            zero.shape[2] if zero.shape[1] > 1 else 0,
            layout.group_shift(blocks, groups),
            rows // x.shape[0],
            **config.constants(bits, block_groups, kind),
            **config.launch_options(kind),
        )
    return y
