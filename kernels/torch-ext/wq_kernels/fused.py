"""A linear layer on the tiled layout: one kernel that multiplies while it dequantizes, for up to 256 rows of input.

A thread block owns a tile of [rows_n, rows_m] outputs and a run of columns. Where there are fewer tiles than the
device can hold, several blocks share a tile (split-K): each writes its float32 partial sums to a workspace, and the
one that arrives last adds them up in the order of the columns, so that the result does not depend on who was last. It
also sets the counter back to zero, so that a CUDA graph can be replayed. Outputs need no zeroing and no atomics.

More rows than that: the weight is dequantized, a bounded piece at a time, for the library's product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, layout
from .counters import arena
from .counters import take as _counters
from .dense import dequantize_tiles
from .experts import expert_linear
from .inner import multiply
from .target import describe, on, target

__all__ = ["dequantize", "expert_linear", "linear", "self_test", "supports"]

_HALF = (torch.float16, torch.bfloat16)
_SCRATCH = 24 * 2**20  # bytes of dequantized weight at a time: stays in the L2 cache of a large GPU

supports = layout.supports


@triton.jit(do_not_specialize=["M", "blocks", "group_shift"])  # one binary, whatever their values
def _fused_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # float16 or bfloat16 [M, K]
    words_ptr,  # int32 [blocks, N padded, 16]
    scale_ptr,  # float [G, N padded]
    zero_ptr,  # uint8 [G or 1, N padded]
    bias_ptr,  # float [N] or None
    y_ptr,  # like x [M, N]
    partial_ptr,  # float32 [tiles, splits, BN, BM]
    counter_ptr,  # int32 [tiles], zero before and after
    M,
    N,
    blocks,
    zero_rows,
    group_shift,
    BITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    T: tl.constexpr = 512 // BITS
    split, splits = tl.program_id(2), tl.num_programs(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # the fastest: tiles that share weights run side by side
    n_inside, m_inside = n < N, m < M
    rows = tl.cdiv(N, 16) * 16
    first, last = blocks * split // splits, blocks * (split + 1) // splits
    total = multiply(
        words_ptr + (first * rows + n[:, None]) * 16 + tl.arange(0, 16)[None, :],
        x_ptr + m[None, :] * (blocks * T) + (first * T + tl.arange(0, 32))[:, None],
        scale_ptr + n,
        zero_ptr + n,
        first,
        last,
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
    arrived = 0
    if splits > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        partial = partial_ptr + tile * splits * BN * BM + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        tl.store(partial + split * BN * BM, total)
        tl.debug_barrier()  # every thread's sums are on their way before one thread says so
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for i in range(splits):
                total += tl.load(partial + i * BN * BM, cache_modifier=".cg")  # other processors wrote it: not from L1
            tl.store(counter_ptr + tile, 0)
    if arrived == splits - 1:
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
        out = y_ptr + m[None, :] * N + n[:, None]
        tl.store(out, total.to(y_ptr.dtype.element_ty), mask=n_inside[:, None] & m_inside[None, :])


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
    """`x @ W.T + bias` for `x` `[..., in]`, in x's dtype, with sums in float32.

    float16 and bfloat16 inputs of at most `configs.FUSED_ROWS` rows take the fused kernel.
    """
    rows = x.reshape(-1, in_features)
    if x.dtype in _HALF and 0 < rows.shape[0] <= configs.FUSED_ROWS:
        y = multiply_rows(rows, words, scale, zero, bias, bits, out_features)
    else:
        y = _dense(rows, words, scale, zero, bias, bits, out_features)
    return y.view(*x.shape[:-1], out_features)


def multiply_rows(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    config: configs.Config | None = None,
) -> Tensor:
    """The fused kernel on x `[M, in]`, float16 or bfloat16, with the tile of the table or the one given."""
    m, groups, blocks, device = x.shape[0], scale.shape[0], words.shape[0], describe(x.device)
    x, block_groups, kind = layout.pad_columns(x, blocks, bits), layout.block_groups(blocks, groups), target(x.device)
    if config is None:
        config = configs.choose(device, configs.bucket(m), bits, block_groups, triton.__version__)
    tiles_m, tiles_n = -(-m // config.rows_m), -(-out_features // config.rows_n)
    splits = configs.split(device, config, out_features, m, blocks)
    y = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    partial = counters = y  # unused
    with on(x.device):
        if splits > 1:
            places = tiles_m * tiles_n * splits * config.rows_n * config.rows_m
            partial = torch.empty(places, dtype=torch.float32, device=x.device)
            counters = _counters(x.device, tiles_m * tiles_n)
        _fused_kernel[tiles_m, tiles_n, splits](
            x,
            words,
            scale,
            zero,
            bias,
            y,
            partial,
            counters,
            m,
            out_features,
            blocks,
            zero.shape[1] if zero.shape[0] > 1 else 0,
            layout.group_shift(blocks, groups),
            **config.constants(bits, block_groups, kind),
            **config.launch_options(kind),
        )
    return y


def _dense(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, out_features: int
) -> Tensor:
    """Dequantize as many rows of the weight as the scratch holds, multiply, and go on with the next."""
    in_features = x.shape[1]
    step = max(1, _SCRATCH // (in_features * x.element_size()) // layout.ROW_ALIGNMENT) * layout.ROW_ALIGNMENT
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        weight = dequantize_tiles(words, scale, zero, bits, (start, stop), in_features, x.dtype)
        torch.mm(x, weight.t(), out=y[:, start:stop])
    return y if bias is None else y.add_(bias)


def dequantize(
    words: Tensor, scale: Tensor, zero: Tensor, bits: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The weight, `[out, in]` in `dtype`; see `layout.dequantize`."""
    return dequantize_tiles(words, scale, zero, bits, (0, out_features), in_features, dtype)


def self_test(device: torch.device) -> str:
    """Why the kernels do not work on a device, or an empty text: a small product of known result, compiled and run."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{describe(device).architecture} is older than sm_80, the first with the matrix instructions it needs"
    bits, out_features, in_features = 4, 48, 256
    arena(torch.empty(0, device=device).device)  # the counters: made here, so that no graph captures their zeroing
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (2, out_features, layout.WORDS), generator=generator).to(torch.int32)
    scale = torch.rand(4, out_features, generator=generator).half()
    zero = torch.randint(16, (4, out_features), generator=generator, dtype=torch.uint8)
    x = torch.randn(3, in_features, generator=generator).half()
    arguments = (bits, out_features, in_features)
    expected = layout.linear(x.double(), words, scale, zero, None, *arguments)
    try:
        y = linear(x.to(device), words.to(device), scale.to(device), zero.to(device), None, *arguments).double().cpu()
    except Exception as error:  # whatever a compiler or a driver raises: the slower path still works
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    wrong = ((y - expected).norm() / expected.norm()).item()
    return "" if wrong < 2e-3 else f"its result on this device is wrong by {wrong:.1e}"
