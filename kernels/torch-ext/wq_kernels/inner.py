"""Device code that the fused kernels share: words to a 16-bit operand, and the product over a run of columns.

Why it looks like this. At batch 1 to 16 an H100 can spend about five instructions of a thread on each 4-bit weight
before arithmetic, not memory, is the limit; converting integers in the ordinary way (shift, mask, convert, subtract,
multiply) takes more than eight. So the bits of a float are written directly: with the exponent of 2**m in place, where
m is the length of the mantissa, a code c ORed into the mantissa at bit o is the number `2**m + c · 2**o`, for two
columns at once and in one instruction. Subtracting 2**m and the zero point (at o = 0), or one fused multiply-add
(elsewhere), leaves `c - zero`, exactly: every number on the way is a small integer. float16 has ten bits of mantissa,
room for two 4-bit fields in a row without a shift; bfloat16 has seven, room for one. 8 bits do not fit into bfloat16,
so they are made in float16 and converted; `c - zero` then still is exact.

The weights are the left operand of `dot`, which Hopper's `wgmma` and Ampere's `mma` both take from registers, so the
dequantized tile never visits shared memory. What is pipelined through shared memory is the packed tile.

The scale is applied to the float32 sum of a group (more exact, and cheap for few rows), or to the weights
(SCALE_WEIGHTS: cheaper when the sums outnumber the weights).

TARGET is "ptx" on NVIDIA; "generic" elsewhere, in plain Triton; "interpreter" where Triton only imitates a device:
bfloat16 arithmetic is wrong there, so everything is widened to float32, which is exact for these integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["multiply"]


@triton.jit
def _pair(word, MASK: tl.constexpr, MAGIC: tl.constexpr, DTYPE: tl.constexpr, TARGET: tl.constexpr):  # type: ignore[no-untyped-def]
    """`(word & MASK) | MAGIC`, its halves taken as two floats: [...] to [..., 2]."""
    if TARGET == "ptx":  # 0xea is the truth table of (a & b) | c; the compiler does not find it with two constants
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xea; mov.b32 {$0, $1}, t; }",
            "=h,=h,r,r,r",
            [word, MASK, MAGIC],
            dtype=(tl.uint16, tl.uint16),
            is_pure=True,
            pack=1,
        )
    else:
        word = (word & MASK) | MAGIC
        low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
    return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))


@triton.jit
def subtile(word, zero, p: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, TARGET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Subtile p of a tile of words [BN, 16]: `code - zero`, [BN, 32] in DTYPE; zero is uint8 [BN]."""
    BF16: tl.constexpr = tl.bfloat16 == DTYPE and BITS < 8
    MANTISSA: tl.constexpr = 7 if BF16 else 10
    ONE_SHIFT: tl.constexpr = MANTISSA // BITS  # fields that a mantissa takes before the word must be shifted
    OFFSET: tl.constexpr = BITS * (p % ONE_SHIFT)
    MAGIC: tl.constexpr = 0x43004300 if BF16 else 0x64006400  # 2**MANTISSA, twice
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001 << OFFSET
    word = word >> (BITS * (p - p % ONE_SHIFT))
    code = tl.reshape(_pair(word, MASK, MAGIC, tl.bfloat16 if BF16 else tl.float16, TARGET), (word.shape[0], 32))
    if TARGET == "interpreter":
        code = code.to(tl.float32)
    shift = zero.to(code.dtype)[:, None] + tl.full((1, 1), 2.0 ** (MANTISSA - OFFSET), code.dtype)
    if OFFSET == 0:
        code = code - shift
    else:
        code = tl.fma(code, tl.full(code.shape, 2.0**-OFFSET, code.dtype), tl.broadcast_to(-shift, code.shape))
    return code if TARGET == "interpreter" else code.to(DTYPE)


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    words,  # pointers [BN, 16] to the first block's words
    x,  # pointers [32, BM] to the first block's first 32 columns
    scale,  # pointers [BN] to group 0
    zero,  # pointers [BN] to group 0
    first,  # blocks [first, last) of the weight
    last,
    rows,  # N, padded: from one block of words, or one group of scales, to the next
    zero_rows,  # the same for zero points; 0 when all groups share one row
    group_shift,  # block t belongs to group t >> group_shift; unused when a block has several
    row_inside,  # [BN]
    column_inside,  # [BM]
    BITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,  # groups in a block: 1, or more when a group is shorter than a block
    SCALE_WEIGHTS: tl.constexpr,
    STAGES: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The float32 product [BN, BM] of `W[:, first block : last block]` and x's columns there."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    SUBTILES: tl.constexpr = 16 // BITS
    GROUP_SUBTILES: tl.constexpr = SUBTILES // BLOCK_GROUPS
    total = tl.zeros((words.shape[0], x.shape[1]), tl.float32)
    for t in tl.range(first, last, num_stages=STAGES):
        word = tl.load(words, mask=row_inside[:, None], other=0, eviction_policy="evict_first")
        for p in tl.static_range(SUBTILES):
            if p % GROUP_SUBTILES == 0:
                group = t * BLOCK_GROUPS + p // GROUP_SUBTILES if BLOCK_GROUPS > 1 else t >> group_shift
                s = tl.load(scale + group * rows, mask=row_inside, other=0.0)
                z = tl.load(zero + group * zero_rows, mask=row_inside, other=0)
            w = subtile(word, z, p, BITS, DTYPE, TARGET)
            a = tl.load(x + 32 * p, mask=column_inside[None, :], other=0.0)
            if TARGET == "interpreter":
                a = a.to(tl.float32)
            if SCALE_WEIGHTS:
                total = tl.dot(w * s.to(w.dtype)[:, None], a, total)
            else:
                if p % GROUP_SUBTILES == 0:  # noqa: SIM108 - `part` is not defined before
                    part = tl.dot(w, a)
                else:
                    part = tl.dot(w, a, part)
                if p % GROUP_SUBTILES == GROUP_SUBTILES - 1:
                    total += part * s.to(tl.float32)[:, None]
        words += rows * 16
        x += 32 * SUBTILES
    return total
