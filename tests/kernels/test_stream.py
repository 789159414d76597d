"""The bit stream against Python integers of arbitrary size, and against values that touch the sign bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from wq_kernels import stream

BITS = range(1, 9)
COUNTS = (1, 5, 8, 31, 32, 33, 40, 64, 95, 96, 100, 257)


def by_hand(values: Tensor, bits: int) -> list[list[int]]:
    """Each row as one large integer, cut into signed words."""
    rows = []
    for row in values.tolist():
        number = sum(value << (i * bits) for i, value in enumerate(row))
        words = [(number >> 32 * i) % 2**32 for i in range(-(-len(row) * bits // 32))]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return rows


@pytest.mark.parametrize(("bits", "count"), product(BITS, COUNTS))
def test_words_hold_the_values_densely_from_the_low_end(bits: int, count: int, generator: torch.Generator) -> None:
    values = torch.randint(2**bits, (3, count), generator=generator, dtype=torch.uint8)
    packed = stream.pack(values, bits)
    assert packed.dtype is torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == by_hand(values, bits)
    assert packed.shape[1] == stream.words(count, bits)


@pytest.mark.parametrize(("bits", "count"), product(BITS, COUNTS))
def test_unpack_is_the_inverse_and_nothing_changes_its_input(bits: int, count: int, generator: torch.Generator) -> None:
    values = torch.randint(2**bits, (7, count), generator=generator, dtype=torch.uint8)
    before = values.clone()
    packed = stream.pack(values, bits)
    words = packed.clone()
    back = stream.unpack(packed, bits, count)
    assert back.dtype is torch.uint8
    assert back.is_contiguous()
    assert torch.equal(back, before)
    assert torch.equal(values, before)
    assert torch.equal(packed, words)


@pytest.mark.parametrize(("bits", "count"), product(BITS, (32, 40)))
def test_the_largest_code_everywhere_sets_every_bit(bits: int, count: int) -> None:
    values = torch.full((2, count), 2**bits - 1, dtype=torch.uint8)
    packed = stream.pack(values, bits)
    assert (packed[:, : count * bits // 32] == -1).all()
    assert torch.equal(stream.unpack(packed, bits, count), values)


@pytest.mark.parametrize("bits", BITS)
def test_one_value_alone_sets_only_its_own_bits(bits: int) -> None:
    for place in range(32):
        values = torch.zeros(1, 32, dtype=torch.uint8)
        values[0, place] = 2**bits - 1
        packed = stream.pack(values, bits)
        assert packed.tolist() == by_hand(values, bits)
        assert torch.equal(stream.unpack(packed, bits, 32), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_dtype_and_a_transposed_view_pack_alike(dtype: torch.dtype, generator: torch.Generator) -> None:
    values = torch.randint(8, (33, 5), generator=generator, dtype=torch.uint8)
    expected = stream.pack(values.t().contiguous(), 3)
    assert torch.equal(stream.pack(values.to(dtype).t(), 3), expected)


@pytest.mark.parametrize(("bits", "count"), product(BITS, (32, 33, 100)))
def test_meta_tensors_give_the_same_shapes(bits: int, count: int) -> None:
    real = stream.pack(torch.zeros(3, count, dtype=torch.uint8), bits)
    meta = stream.pack(torch.zeros(3, count, dtype=torch.uint8, device="meta"), bits)
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("bits", BITS)
def test_leading_dimensions_and_any_strides_are_taken(bits: int, generator: torch.Generator) -> None:
    values = torch.randint(2**bits, (2, 3, 40), generator=generator, dtype=torch.uint8)
    packed = stream.pack(values, bits)
    assert torch.equal(packed, torch.stack([stream.pack(rows, bits) for rows in values]))
    strided = packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(stream.unpack(strided, bits, 40), values)
    column = stream.pack(values[0, :, :1].repeat(1, stream.words(1, bits)), bits)  # one word a row, and its transpose
    assert torch.equal(stream.unpack(column.t().contiguous().t(), bits, 1), values[0, :, :1])


@pytest.mark.parametrize("bits", BITS)
def test_bits_after_the_last_value_are_ignored(bits: int, generator: torch.Generator) -> None:
    words = torch.randint(-(2**31), 2**31, (3, stream.words(33, bits)), generator=generator).to(torch.int32)
    whole = stream.pack(stream.unpack(words, bits, 33), bits)
    assert torch.equal(stream.unpack(whole, bits, 33), stream.unpack(words, bits, 33))
    assert whole.tolist() == by_hand(stream.unpack(words, bits, 33), bits)
