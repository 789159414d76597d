"""The layout that the fused kernels read, and the exact way to it and back. Plain torch, on any device.

Checkpoints hold a row of a weight as one long bit stream. A tensor core wants something else, and so does memory:

* A thread block multiplies a tile of BN rows by a run of columns. Here those words are one contiguous piece of
  memory whatever BN is, so that every load is 16 bytes for each thread and every DRAM line is used whole.
* A tensor core takes its 16-bit operand in registers of two neighbouring columns. Here one `lop3` on a word gives such
  a register: the low and the high half of the word hold columns 2r and 2r + 1. No shuffle, no trip through shared
  memory after dequantization.
* Scales change every 32 columns at the most. Here field p of all sixteen words of a row is 32 neighbouring columns, a
  subtile, so groups of 32, 64, 128, 256 and whole rows all read the same bytes.

    words   int32 [K / T, N, 16]    T = 512 / b columns are 16 words; T is 256, 128 or 64 for b = 2, 4 or 8
            word r of row n in block t:  bits [b·(p + P·h), + b)  =  code[n, T·t + 32·p + 2·r + h]
            h in {0, 1}: the half of the word;  p in [0, P), P = 16 / b: the subtile
    scale   float [G, N]            one row for each group of columns
    zero    uint8 [G, N]            or [1, N], the midpoint for every group, where the grid is symmetric

N is padded to a multiple of 16 and K to a multiple of T: with scale 0, so that what is there does not matter.
A zero point is kept as a plain byte: exact in every dtype, so `.to(dtype)` cannot break it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from . import stream

__all__ = [
    "block_groups",
    "dequantize",
    "expert_linear",
    "expert_linear_backward",
    "fits",
    "from_stream",
    "group_shift",
    "linear",
    "pad_columns",
    "supports",
    "to_stream",
]

ROW_ALIGNMENT = 16
WORDS = 16  # of one row in one block
SUBTILE = 32  # columns
_ONE_GROUP = 31  # shifts every number of a block to 0


def supports(bits: int) -> bool:
    """Widths that divide half a word."""
    return bits in (2, 4, 8)


def block_columns(bits: int) -> int:
    """T: the columns that sixteen words hold."""
    return 32 * WORDS // bits


def fits(bits: int, in_features: int, groups: int) -> bool:
    """Whether the layout takes such a weight: whole rows, or groups of 32 · 2**i columns."""
    if not supports(bits) or groups < 1 or in_features % groups:
        return False
    size = in_features // groups
    return groups == 1 or (size >= SUBTILE and size & (size - 1) == 0)


def block_groups(blocks: int, groups: int) -> int:
    """Groups in a block of columns: 1, or more when a group is shorter than a block."""
    return max(1, groups // blocks)


def group_shift(blocks: int, groups: int) -> int:
    """Block t lies in group `t >> shift`, where a block has one."""
    return _ONE_GROUP if groups == 1 else max(0, (blocks // groups).bit_length() - 1)


def pad_columns(x: Tensor, blocks: int, bits: int) -> Tensor:
    """x `[rows, in]` with as many columns as its weight's blocks, contiguous."""
    missing = blocks * block_columns(bits) - x.shape[1]
    return functional.pad(x, (0, missing)) if missing else x.contiguous()


def from_stream(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """words, scale and zero from the layout of `reference`. Raises ValueError where `fits` is false."""
    out_features, groups = scale.shape
    if not fits(bits, in_features, groups):
        raise ValueError(f"the tiled layout takes no weight of {bits} bits with {groups} groups of {in_features}")
    rows, columns = _padding(out_features, ROW_ALIGNMENT), _padding(in_features, block_columns(bits))
    codes = functional.pad(stream.unpack(packed, bits, in_features), (0, columns, 0, rows))
    fields = codes.view(codes.shape[0], -1, 16 // bits, WORDS, 2)  # [N, block, p, r, h]
    words = torch.zeros(fields.shape[1], fields.shape[0], WORDS, dtype=torch.int32, device=packed.device)
    for p, h, offset in _fields(bits):
        words |= fields[:, :, p, :, h].transpose(0, 1).to(torch.int32) << offset
    group_size = in_features // groups
    extra = 0 if groups == 1 else columns // group_size  # groups that lie in the padding wholly
    tiled_scale = functional.pad(scale.t(), (0, rows, 0, extra)).contiguous()
    if zero is None:
        points = torch.full((1, out_features + rows), 1 << (bits - 1), dtype=torch.uint8, device=packed.device)
    else:
        points = functional.pad(stream.unpack(zero.t(), bits, out_features), (0, rows, 0, extra))
    return words, tiled_scale, points


def to_stream(
    words: Tensor, scale: Tensor, zero: Tensor, bits: int, out_features: int, in_features: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `from_stream`: the bytes that the checkpoint held."""
    packed = stream.pack(_codes(words, bits)[:out_features, :in_features], bits)
    groups = scale.shape[0] if scale.shape[0] == 1 else in_features // _group_size(words, scale, bits)
    stream_scale = scale[:groups, :out_features].t().contiguous()
    if symmetric:
        return packed, stream_scale, None
    return packed, stream_scale, stream.pack(zero[:groups, :out_features], bits).t().contiguous()


def dequantize(
    words: Tensor, scale: Tensor, zero: Tensor, bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight, `[out, in]` in `dtype`: `scale · (code − zero)`, rounded once."""
    codes = _codes(words, bits)
    work = torch.promote_types(torch.promote_types(scale.dtype, dtype), torch.float32)
    centered = codes.view(codes.shape[0], scale.shape[0], -1).to(torch.float32) - zero.t().unsqueeze(-1)
    weight = (centered.to(work) * scale.t().unsqueeze(-1)).flatten(1)
    return weight[:out_features, :in_features].to(dtype).contiguous()


def linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """`x @ W.T + bias` for `x` `[..., in]`, in x's dtype: the oracle of the fused kernels."""
    return functional.linear(x, dequantize(words, scale, zero, bits, out_features, in_features, x.dtype), bias)


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
    """Row r is `x[r // s] @ W[expert_of_row[r]].T + bias[expert_of_row[r]]`, s = rows / inputs: `[rows, out]`.

    words, scale, zero and bias have a dimension of experts before the others. Rows without an expert are 0. One expert
    after the other: the oracle of the grouped kernel.
    """
    y = x.new_zeros(expert_of_row.shape[0], out_features)
    share = _rows_per_input(x, expert_of_row)
    for expert, mine in _rows_by_expert(expert_of_row, words.shape[0]):
        weight = dequantize(words[expert], scale[expert], zero[expert], bits, out_features, in_features, x.dtype)
        y[mine] = functional.linear(x[mine // share], weight, None if bias is None else bias[expert].to(x.dtype))
    return y


def expert_linear_backward(
    grad: Tensor,
    expert_of_row: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    inputs: int,
    bits: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """The gradient of `expert_linear` for x, `[inputs, in]`, from that for its result, `[rows, out]`."""
    grad_x = grad.new_zeros(inputs, in_features)
    share = _rows_per_input(grad_x, expert_of_row)
    for expert, mine in _rows_by_expert(expert_of_row, words.shape[0]):
        weight = dequantize(words[expert], scale[expert], zero[expert], bits, out_features, in_features, grad.dtype)
        grad_x.index_add_(0, mine // share, grad[mine] @ weight)
    return grad_x


def _rows_per_input(x: Tensor, expert_of_row: Tensor) -> int:
    return max(1, expert_of_row.shape[0] // max(1, x.shape[0]))


def _rows_by_expert(expert_of_row: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Every expert that has rows, and which."""
    for expert in torch.unique(expert_of_row).tolist():
        if 0 <= expert < experts:
            yield expert, (expert_of_row == expert).nonzero().squeeze(1)


def _padding(size: int, multiple: int) -> int:
    return -size % multiple


def _group_size(words: Tensor, scale: Tensor, bits: int) -> int:
    return words.shape[0] * block_columns(bits) // scale.shape[0]


def _fields(bits: int) -> list[tuple[int, int, int]]:
    """Subtile, half of the word, and first bit of every field of a word."""
    count = 16 // bits
    return [(p, h, bits * (p + count * h)) for p in range(count) for h in range(2)]


def _codes(words: Tensor, bits: int) -> Tensor:
    """uint8 `[N, K]`, padding included."""
    blocks, rows, _ = words.shape
    codes = torch.empty(rows, blocks, 16 // bits, WORDS, 2, dtype=torch.uint8, device=words.device)
    for p, h, offset in _fields(bits):
        codes[:, :, p, :, h] = ((words >> offset) & ((1 << bits) - 1)).transpose(0, 1).to(torch.uint8)
    return codes.view(rows, -1)
