"""`wq::linear` is a well-formed torch op: right values, right gradients, one graph under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from wq.formats import bits as bit_stream
from wq.layers import ops

OUT, IN, GROUP = 40, 96, 32
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

each_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


class Packed(NamedTuple):
    """Arguments of the op after `x`."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    bits: int
    in_features: int


def make(bits: int, symmetric: bool, bias: bool, dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """A random packed weight, and the same weight dense in float64."""
    codes = torch.randint(0, 1 << bits, (OUT, IN))
    scale = (torch.rand(OUT, IN // GROUP) / (1 << bits) + 1e-3).to(dtype)
    zero = torch.full((OUT, IN // GROUP), 1 << (bits - 1))
    if not symmetric:
        zero = torch.randint(0, 1 << bits, zero.shape)
    spread = [values.repeat_interleave(GROUP, 1).double() for values in (scale, zero)]
    packed = Packed(
        bit_stream.pack(codes, bits),
        scale,
        None if symmetric else bit_stream.pack(zero.t(), bits).t().contiguous(),
        torch.randn(OUT).to(dtype) if bias else None,
        bits,
        IN,
    )
    return packed, spread[0] * (codes - spread[1])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@each_width
@each_grid
@with_and_without_bias
@each_dtype
def test_linear_passes_opcheck(bits: int, symmetric: bool, bias: bool, dtype: torch.dtype) -> None:
    args, _ = make(bits, symmetric, bias, dtype)
    torch.library.opcheck(torch.ops.wq.linear.default, (torch.randn(3, IN).to(dtype), *args))


@each_width
@each_grid
@each_dtype
def test_linear_backward_passes_opcheck(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    args, _ = make(bits, symmetric, False, dtype)
    grad = torch.randn(3, OUT).to(dtype)
    torch.library.opcheck(torch.ops.wq.linear_backward.default, (grad, *args[:3], bits, IN))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: torch.randn(IN),
    "three dimensions": lambda: torch.randn(2, 3, IN),
    "no rows": lambda: torch.randn(0, IN),
    "transposed rows": lambda: torch.randn(3, 2, IN).transpose(0, 1),
    "strided columns": lambda: torch.randn(3, 2 * IN)[:, ::2],
    "expanded": lambda: torch.randn(1, 1, IN).expand(2, 3, IN),
}


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_linear_passes_opcheck_for_any_input_layout(x: Callable[[], Tensor]) -> None:
    args, dense = make(4, False, True, torch.float32)
    torch.library.opcheck(torch.ops.wq.linear.default, (x(), *args))
    y = ops.linear(value := x(), *args)
    assert y.shape == (*value.shape[:-1], OUT)
    torch.testing.assert_close(y, functional.linear(value, dense.float(), args.bias))


@each_width
@each_grid
@with_and_without_bias
@each_dtype
def test_linear_is_close_to_a_float64_product(bits: int, symmetric: bool, bias: bool, dtype: torch.dtype) -> None:
    args, dense = make(bits, symmetric, bias, dtype)
    x = torch.randn(5, 7, IN).to(dtype)
    y = ops.linear(x, *args)
    assert y.dtype == dtype
    expected = functional.linear(x.double(), dense, None if args.bias is None else args.bias.double())
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float32)],
    ids=str,
)
def test_scales_may_have_another_dtype_than_the_input(scale: torch.dtype, dtype: torch.dtype) -> None:
    args, dense = make(4, False, False, scale)
    x = torch.randn(5, IN).to(dtype)
    y = ops.linear(x, *args)
    assert y.dtype == dtype
    assert relative_error(y, functional.linear(x.double(), dense)) < TOLERANCE[dtype]


@each_width
@each_grid
def test_dequantize_gives_the_weight(bits: int, symmetric: bool) -> None:
    args, dense = make(bits, symmetric, False, torch.float16)
    weight = ops.dequantize(*args[:3], bits, IN, torch.float64)
    assert torch.equal(weight, dense)


@each_width
@each_grid
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "x", "bias"])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)], ids=str)
def test_gradients_are_those_of_the_dense_weight(
    bits: int, symmetric: bool, wanted: tuple[bool, bool], shape: tuple[int, ...]
) -> None:
    args, dense = make(bits, symmetric, True, torch.float32)
    x = torch.randn(shape)
    leaves = [(x.clone().requires_grad_(wanted[0]), args.bias.clone().requires_grad_(wanted[1])) for _ in range(2)]
    (own_x, own_bias), (dense_x, dense_bias) = leaves
    outputs = ops.linear(own_x, *args._replace(bias=own_bias)), functional.linear(dense_x, dense.float(), dense_bias)
    grad = torch.randn(*shape[:-1], OUT)
    for y in outputs:
        y.backward(grad)
    for own, reference in zip(*leaves, strict=True):
        assert (own.grad is None) == (reference.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad, reference.grad)


def test_a_vector_has_gradients_too() -> None:
    args, _ = make(4, True, True, torch.float32)
    x, bias = torch.randn(IN, requires_grad=True), args.bias.clone().requires_grad_()
    ops.linear(x, *args._replace(bias=bias)).sum().backward()
    torch.testing.assert_close(bias.grad, torch.ones(OUT))


@each_dtype
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype: torch.dtype) -> None:
    args, dense = make(4, True, True, dtype)
    x, bias = torch.randn(5, IN).to(dtype).requires_grad_(), args.bias.clone().requires_grad_()
    ops.linear(x, *args._replace(bias=bias)).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)
    assert relative_error(x.grad, dense.sum(0).expand(5, IN)) < TOLERANCE[dtype]


def test_inference_builds_no_graph() -> None:
    args, _ = make(4, True, True, torch.float32)
    assert ops.linear(torch.randn(5, IN), *args).grad_fn is None
    with torch.no_grad():
        assert ops.linear(torch.randn(5, IN, requires_grad=True), *args).grad_fn is None


@each_width
@with_and_without_bias
def test_compile_makes_one_graph_for_all_batch_sizes(bits: int, bias: bool) -> None:
    args, _ = make(bits, False, bias, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(x: Tensor) -> Tensor:
        return ops.linear(x, *args).relu()

    for rows in (2, 3, 8, 33):
        x = torch.randn(rows, IN)
        torch.testing.assert_close(compiled(x), ops.linear(x, *args).relu())
    assert counter.frame_count == 1


@each_grid
def test_gradients_under_compile_are_those_without(symmetric: bool) -> None:
    args, _ = make(4, symmetric, True, torch.float32)
    torch._dynamo.reset()

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, *args._replace(bias=bias)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5):
        x, bias = torch.randn(rows, IN, requires_grad=True), torch.randn(OUT, requires_grad=True)
        expected = torch.autograd.grad(loss(x, bias), (x, bias))
        actual = torch.autograd.grad(compiled(x, bias), (x, bias))
        torch.testing.assert_close(actual, expected)


def test_autocast_gives_the_same_dtype_with_and_without_compile() -> None:
    args, _ = make(4, True, False, torch.float32)
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear(x, *args)

    x = torch.randn(3, IN)
    assert torch.compile(run, fullgraph=True, backend="aot_eager")(x).dtype == run(x).dtype


@pytest.mark.parametrize("features", [IN - 1, IN + 32])
def test_a_wrong_number_of_features_is_a_clear_error_while_tracing(features: int) -> None:
    args, _ = make(4, True, False, torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, features)
        with pytest.raises(RuntimeError, match=f"x has {features} features, the weight {IN}"):
            torch.ops.wq.linear(x, *args)


def test_a_wrong_number_of_features_is_an_error_when_run() -> None:
    args, _ = make(4, True, False, torch.float32)
    with pytest.raises(RuntimeError, match="shape"):
        ops.linear(torch.randn(3, IN - 1), *args)
