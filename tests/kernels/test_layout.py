"""The tiled layout holds what the checkpoint held, bit for bit, where its description says."""

from __future__ import annotations

import pytest
import torch
from test_backends import decode, random_weight, random_words
from torch import Tensor

from wq_kernels import layout, reference
from wq_kernels import stream as bit_stream

# in_features, group size. Blocks are 256, 128 or 64 columns: most of these end within one, some before a whole group.
COLUMNS = [
    (32, 32), (96, 32), (160, 32), (288, 32), (192, 64), (64, 64), (448, 64), (384, 128), (640, 128),
    (256, 256), (768, 256), (1536, 512), (1, 1), (33, 33), (100, 100), (777, 777),
]  # fmt: skip
each_width = pytest.mark.parametrize("bits", [2, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_height = pytest.mark.parametrize("out_features", [1, 5, 16, 33])
each_shape = pytest.mark.parametrize(("in_features", "group_size"), COLUMNS)


def stream(
    bits: int, symmetric: bool, n: int, k: int, group_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random weight as a checkpoint holds it: bits behind the last value are 0."""
    packed, scale, zero = random_weight(bits, symmetric, n, k, k // group_size, dtype)
    packed = bit_stream.pack(bit_stream.unpack(packed, bits, k), bits)
    if zero is not None:
        zero = bit_stream.pack(bit_stream.unpack(zero.t(), bits, n), bits).t().contiguous()
    return packed, scale, zero


def code(words: Tensor, bits: int, n: int, k: int) -> int:
    """One code, straight from the formula in the description of the layout."""
    columns = 512 // bits
    t, inside = divmod(k, columns)
    p, r, h = inside // 32, inside % 32 // 2, inside % 2
    word = words[t, n, r].item() & 0xFFFFFFFF
    return word >> bits * (p + 16 // bits * h) & (1 << bits) - 1


@each_width
@each_grid
@each_height
@each_shape
def test_the_way_there_and_back_changes_no_bit(
    bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int
) -> None:
    weight = stream(bits, symmetric, out_features, in_features, group_size)
    tiled = layout.from_stream(*weight, bits, in_features)
    again = layout.to_stream(*tiled, bits, out_features, in_features, symmetric)
    for before, after in zip(weight, again, strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert before.dtype == after.dtype
            assert after.is_contiguous()
            assert torch.equal(before, after)


@each_width
@each_grid
@each_height
@each_shape
def test_shapes_and_dtypes_are_those_of_the_description(
    bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int
) -> None:
    words, scale, zero = layout.from_stream(
        *stream(bits, symmetric, out_features, in_features, group_size), bits, in_features
    )
    rows, blocks = -(-out_features // 16) * 16, -(-in_features // (512 // bits))
    groups = 1 if group_size == in_features else blocks * (512 // bits) // group_size
    assert words.shape == (blocks, rows, 16)
    assert words.dtype == torch.int32
    assert scale.shape == (groups, rows)
    assert zero.shape == (1 if symmetric else groups, rows)
    assert zero.dtype == torch.uint8
    assert all(tensor.is_contiguous() for tensor in (words, scale, zero))


@each_width
@each_grid
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(5, 96, 32), (17, 320, 64), (3, 300, 300)])
def test_every_code_scale_and_zero_is_where_the_description_says(
    bits: int, symmetric: bool, out_features: int, in_features: int, group_size: int
) -> None:
    packed, scale, zero = stream(bits, symmetric, out_features, in_features, group_size)
    words, tiled_scale, tiled_zero = layout.from_stream(packed, scale, zero, bits, in_features)
    groups = in_features // group_size
    for n in range(out_features):
        codes = [code(words, bits, n, k) for k in range(in_features)]
        assert codes == decode(packed[n].tolist(), bits, in_features)
    assert torch.equal(tiled_scale[:groups, :out_features], scale.t())
    assert not tiled_scale[groups:].any()
    assert not tiled_scale[:, out_features:].any()
    if zero is None:
        assert tiled_zero[0, :out_features].tolist() == [1 << (bits - 1)] * out_features
    else:
        expected = [decode(column.tolist(), bits, out_features) for column in zero.t()]
        assert tiled_zero[:groups, :out_features].tolist() == expected


@each_width
@each_grid
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(33, 96, 32), (5, 640, 128), (1, 33, 33)])
def test_dequantize_equals_the_reference(
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    group_size: int,
) -> None:
    weight = random_weight(bits, symmetric, out_features, in_features, in_features // group_size, scale_dtype)
    tiled = layout.from_stream(*weight, bits, in_features)
    assert tiled[1].dtype == scale_dtype
    sizes = (bits, out_features, in_features)
    actual = layout.dequantize(*tiled, *sizes, dtype)
    assert actual.is_contiguous()
    assert torch.equal(actual, reference.dequantize(*weight, *sizes, dtype))


@each_width
def test_a_float64_scale_stays_float64(bits: int) -> None:
    weight = random_weight(bits, False, 5, 96, 3, torch.float64)
    tiled = layout.from_stream(*weight, bits, 96)
    actual = layout.dequantize(*tiled, bits, 5, 96, torch.float64)
    assert torch.equal(actual, reference.dequantize(*weight, bits, 5, 96, torch.float64))


@each_width
def test_what_lies_in_the_padding_does_not_matter(bits: int) -> None:
    n, k = 5, 96
    words, scale, zero = layout.from_stream(*stream(bits, False, n, k, 32), bits, k)
    expected = layout.dequantize(words, scale, zero, bits, n, k, torch.float32)
    ones = bit_stream.pack(torch.full((n, k), (1 << bits) - 1, dtype=torch.uint8), bits)
    used = layout.from_stream(ones, torch.ones(n, 3), None, bits, k)[0]
    words |= random_words(*words.shape) & ~used
    zero[3:], zero[:, n:] = 1, 2
    assert torch.equal(layout.dequantize(words, scale, zero, bits, n, k, torch.float32), expected)


@pytest.mark.parametrize(
    ("bits", "in_features", "groups", "expected"),
    [
        (4, 128, 1, True), (4, 1, 1, True), (2, 777, 1, True), (8, 33, 1, True),
        (4, 128, 4, True), (4, 128, 2, True), (8, 96, 3, True), (2, 160, 5, True), (4, 4096, 32, True),
        (2, 1024, 4, True), (4, 1024, 2, True), (8, 3072, 3, True),
        (4, 128, 8, False), (4, 64, 4, False), (4, 48, 3, False),  # groups of 16
        (4, 96, 2, False), (4, 192, 2, False), (4, 2560, 2, False), (4, 80, 2, False), (2, 66, 2, False),
        (4, 128, 3, False), (4, 128, 0, False), (4, 128, -1, False), (4, 128, 129, False),
        (1, 128, 1, False), (3, 128, 1, False), (5, 128, 1, False), (16, 128, 1, False), (0, 128, 1, False),
    ],
)  # fmt: skip
def test_what_fits_are_whole_rows_and_groups_of_32_times_a_power_of_two(
    bits: int, in_features: int, groups: int, expected: bool
) -> None:
    assert layout.fits(bits, in_features, groups) is expected
    if not expected and bits in (2, 4, 8) and groups > 0:
        packed = torch.zeros(3, -(-in_features * bits // 32), dtype=torch.int32)
        with pytest.raises(ValueError, match=f"{bits} bits with {groups} groups of {in_features}"):
            layout.from_stream(packed, torch.ones(3, groups), None, bits, in_features)


@each_width
@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 0, 96), (2, 3, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_linear_equals_the_reference(bits: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(bits, False, 7, 96, 3, torch.float16)
    x, bias = torch.randn(shape).to(dtype), torch.randn(7).to(dtype)
    y = layout.linear(x, *layout.from_stream(*weight, bits, 96), bias, bits, 7, 96)
    assert torch.equal(y, reference.linear(x, *weight, bias, bits, 7, 96))


def expert_weights(bits: int, symmetric: bool, experts: int, n: int, k: int, groups: int) -> list[Tensor]:
    """words, scale and zero of several experts."""
    weights = [layout.from_stream(*random_weight(bits, symmetric, n, k, groups), bits, k) for _ in range(experts)]
    return [torch.stack(tensors) for tensors in zip(*weights, strict=True)]


@each_width
@each_grid
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows_per_input", [1, 2, 4])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_expert_linear_is_one_product_for_each_row(
    bits: int, symmetric: bool, bias: bool, rows_per_input: int, index: torch.dtype
) -> None:
    experts, n, k, inputs = 5, 7, 96, 6
    weights = expert_weights(bits, symmetric, experts, n, k, 3)
    x = torch.randn(inputs, k, dtype=torch.float64)
    biases = torch.randn(experts, n) if bias else None
    owners = torch.randint(-1, experts + 1, (inputs * rows_per_input,)).to(index)  # -1 and 5 are nobody
    owners[owners == 2] = 3  # and 2 has no rows
    owners[0], owners[-1] = -1, experts
    expected = torch.zeros(len(owners), n, dtype=torch.float64)
    for row, owner in enumerate(owners.tolist()):
        if 0 <= owner < experts:
            own = [tensor[owner] for tensor in weights]
            weight = layout.dequantize(*own, bits, n, k, torch.float64)
            expected[row] = weight @ x[row // rows_per_input].double()
            if biases is not None:
                expected[row] += biases[owner].double()
    actual = layout.expert_linear(x, owners, *weights, biases, bits, n, k)
    assert actual.dtype == x.dtype
    assert not actual[0].any()
    assert not actual[-1].any()
    torch.testing.assert_close(actual, expected)


def test_expert_linear_takes_no_rows_at_all() -> None:
    weights = expert_weights(4, False, 3, 7, 96, 3)
    nothing = torch.empty(0, dtype=torch.int64)
    assert layout.expert_linear(torch.empty(0, 96), nothing, *weights, None, 4, 7, 96).shape == (0, 7)


@pytest.mark.parametrize("rows_per_input", [1, 3])
def test_the_gradient_of_expert_linear_is_that_of_the_products(rows_per_input: int) -> None:
    weights = expert_weights(4, False, 4, 7, 96, 3)
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    owners = torch.randint(-1, 4, (5 * rows_per_input,))
    grad = torch.randn(len(owners), 7, dtype=torch.float64)
    layout.expert_linear(x, owners, *weights, None, 4, 7, 96).backward(grad)
    actual = layout.expert_linear_backward(grad, owners, *weights, 5, 4, 7, 96)
    torch.testing.assert_close(actual, x.grad)
