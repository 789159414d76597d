"""The ops of `wq` are well-formed: right values, right gradients, one graph under torch.compile, in both layouts."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import wq_kernels
from wq.layers import WqLinear, ops
from wq.scheme import Scheme
from wq_kernels import layout as tiles
from wq_kernels import stream as bit_stream

OUT, IN, GROUP = 40, 96, 32  # in tiles, all three are padded
EXPERTS = 4
BATCHES = (7, 2, 3, 8, 33)  # the first is no size of a weight: torch would take equal sizes for one variable
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
STORAGE = [("stream", 2), ("stream", 3), ("stream", 4), ("stream", 8), ("tiled", 2), ("tiled", 4), ("tiled", 8)]

each_storage = pytest.mark.parametrize(("layout", "bits"), STORAGE)
each_layout = pytest.mark.parametrize("layout", ["stream", "tiled"])
each_tiled_width = pytest.mark.parametrize("bits", [2, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_order = pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


class Packed(NamedTuple):
    """Arguments of the op after `x`."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    permutation: Tensor | None
    bias: Tensor | None
    bits: int
    out_features: int
    in_features: int
    layout: str

    def backward(self) -> tuple[object, ...]:
        """Arguments of `linear_backward` after `grad`."""
        return (*self[:4], *self[5:])


def make(
    bits: int = 4,
    symmetric: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "stream",
    permuted: bool = False,
) -> tuple[Packed, Tensor]:
    """A random packed weight, and the same weight dense in float64, its columns in the order of the input's."""
    codes = torch.randint(0, 1 << bits, (OUT, IN))
    scale = (torch.rand(OUT, IN // GROUP) / (1 << bits) + 1e-3).to(dtype)
    point = torch.full((OUT, IN // GROUP), 1 << (bits - 1))
    if not symmetric:
        point = torch.randint(0, 1 << bits, point.shape)
    spread = [values.repeat_interleave(GROUP, 1).double() for values in (scale, point)]
    weight = spread[0] * (codes - spread[1])
    packed = bit_stream.pack(codes, bits)
    zero = None if symmetric else bit_stream.pack(point.t(), bits).t().contiguous()
    if layout == "tiled":
        packed, scale, zero = tiles.from_stream(packed, scale, zero, bits, IN)
    order = torch.randperm(IN) if permuted else None
    dense = weight
    if order is not None:
        dense = torch.empty_like(weight)
        dense[:, order] = weight
    own = torch.randn(OUT).to(dtype) if bias else None
    return Packed(packed, scale, zero, order, own, bits, OUT, IN, layout), dense


class Experts(NamedTuple):
    """Arguments of `expert_linear` after `x` and `expert_of_row`."""

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    bits: int
    out_features: int
    in_features: int

    def backward(self, inputs: int) -> tuple[object, ...]:
        """Arguments of `expert_linear_backward` after `grad` and `expert_of_row`."""
        return (*self[:3], inputs, *self[4:])


def make_experts(bits: int, symmetric: bool, bias: bool, dtype: torch.dtype) -> tuple[Experts, Tensor]:
    """Random tiled weights of all experts, and the same dense in float64, `[experts, out, in]`."""
    made = [make(bits, symmetric, bias, dtype, "tiled") for _ in range(EXPERTS)]
    packed, scale, zero = (torch.stack([getattr(args, name) for args, _ in made]) for name in Packed._fields[:3])
    own = torch.stack([args.bias for args, _ in made]) if bias else None
    return Experts(packed, scale, zero, own, bits, OUT, IN), torch.stack([dense for _, dense in made])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


# --- well-formed ---


@each_storage
@each_grid
@with_and_without_bias
@each_order
def test_linear_passes_opcheck(layout: str, bits: int, symmetric: bool, bias: bool, permuted: bool) -> None:
    args, _ = make(bits, symmetric, bias, layout=layout, permuted=permuted)
    torch.library.opcheck(torch.ops.wq.linear.default, (torch.randn(3, IN), *args))


@each_storage
@each_grid
@each_order
def test_linear_backward_passes_opcheck(layout: str, bits: int, symmetric: bool, permuted: bool) -> None:
    args, _ = make(bits, symmetric, layout=layout, permuted=permuted)
    torch.library.opcheck(torch.ops.wq.linear_backward.default, (torch.randn(3, OUT), *args.backward()))


@each_tiled_width
@each_grid
@with_and_without_bias
@pytest.mark.parametrize("slots", [1, 2])
def test_expert_linear_and_its_backward_pass_opcheck(bits: int, symmetric: bool, bias: bool, slots: int) -> None:
    args, _ = make_experts(bits, symmetric, bias, torch.float32)
    owners = torch.randint(0, EXPERTS, (3 * slots,))
    torch.library.opcheck(torch.ops.wq.expert_linear.default, (torch.randn(3, IN), owners, *args))
    grad = torch.randn(3 * slots, OUT)
    torch.library.opcheck(torch.ops.wq.expert_linear_backward.default, (grad, owners, *args.backward(3)))


@each_layout
@each_dtype
def test_every_op_passes_opcheck_in_every_dtype(layout: str, dtype: torch.dtype) -> None:
    args, _ = make(dtype=dtype, layout=layout, permuted=True)
    torch.library.opcheck(torch.ops.wq.linear.default, (torch.randn(3, IN).to(dtype), *args))
    torch.library.opcheck(torch.ops.wq.linear_backward.default, (torch.randn(3, OUT).to(dtype), *args.backward()))
    experts, _ = make_experts(4, False, True, dtype)
    owners = torch.tensor([1, 0, 1], dtype=torch.int32)
    torch.library.opcheck(torch.ops.wq.expert_linear.default, (torch.randn(3, IN).to(dtype), owners, *experts))
    grad = torch.randn(3, OUT).to(dtype)
    torch.library.opcheck(torch.ops.wq.expert_linear_backward.default, (grad, owners, *experts.backward(3)))


SHAPES: dict[str, Callable[[int], Tensor]] = {
    "vector": lambda features: torch.randn(features),
    "three dimensions": lambda features: torch.randn(2, 3, features),
    "no rows": lambda features: torch.randn(0, features),
    "transposed rows": lambda features: torch.randn(3, 2, features).transpose(0, 1),
    "strided columns": lambda features: torch.randn(3, 2 * features)[:, ::2],
    "expanded": lambda features: torch.randn(1, 1, features).expand(2, 3, features),
}
any_strides = pytest.mark.parametrize("tensor", SHAPES.values(), ids=SHAPES)


@any_strides
@each_layout
@each_order
def test_linear_passes_opcheck_for_any_input_strides(
    tensor: Callable[[int], Tensor], layout: str, permuted: bool
) -> None:
    args, dense = make(layout=layout, permuted=permuted)
    x = tensor(IN)
    torch.library.opcheck(torch.ops.wq.linear.default, (x, *args))
    y = ops.linear(x, *args)
    assert y.shape == (*x.shape[:-1], OUT)
    torch.testing.assert_close(y, functional.linear(x, dense.float(), args.bias))


@any_strides
@each_layout
@each_order
def test_linear_backward_passes_opcheck_for_any_gradient_strides(
    tensor: Callable[[int], Tensor], layout: str, permuted: bool
) -> None:
    args, dense = make(layout=layout, permuted=permuted)
    grad = tensor(OUT)
    torch.library.opcheck(torch.ops.wq.linear_backward.default, (grad, *args.backward()))
    torch.testing.assert_close(torch.ops.wq.linear_backward(grad, *args.backward()), grad @ dense.float())


# --- values ---


@each_storage
@each_grid
@with_and_without_bias
@each_order
@each_dtype
def test_linear_is_close_to_a_float64_product(
    layout: str, bits: int, symmetric: bool, bias: bool, permuted: bool, dtype: torch.dtype
) -> None:
    args, dense = make(bits, symmetric, bias, dtype, layout, permuted)
    x = torch.randn(5, 7, IN).to(dtype)
    y = ops.linear(x, *args)
    assert y.dtype == dtype
    expected = functional.linear(x.double(), dense, None if args.bias is None else args.bias.double())
    assert relative_error(y, expected) < TOLERANCE[dtype]


@each_layout
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float32)],
    ids=str,
)
def test_scales_may_have_another_dtype_than_the_input(layout: str, scale: torch.dtype, dtype: torch.dtype) -> None:
    args, dense = make(bias=False, dtype=scale, layout=layout)
    x = torch.randn(5, IN).to(dtype)
    y = ops.linear(x, *args)
    assert y.dtype == dtype
    assert relative_error(y, functional.linear(x.double(), dense)) < TOLERANCE[dtype]


@each_layout
def test_a_permutation_may_be_int32(layout: str) -> None:
    args, dense = make(bias=False, layout=layout, permuted=True)
    args = args._replace(permutation=args.permutation.int())
    x = torch.randn(5, IN, requires_grad=True)
    y = ops.linear(x, *args)
    torch.testing.assert_close(y, x @ dense.float().t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.float().sum(0).expand(5, IN))


@each_storage
@each_grid
def test_dequantize_gives_the_weight(layout: str, bits: int, symmetric: bool) -> None:
    args, dense = make(bits, symmetric, dtype=torch.float16, layout=layout)
    weight = wq_kernels.dequantize(*args[:3], bits, OUT, IN, torch.float64, layout)
    assert torch.equal(weight, dense)


@each_tiled_width
@each_grid
@with_and_without_bias
@pytest.mark.parametrize("slots", [1, 2])
@each_dtype
def test_expert_linear_multiplies_each_row_by_the_weight_of_its_expert(
    bits: int, symmetric: bool, bias: bool, slots: int, dtype: torch.dtype
) -> None:
    args, dense = make_experts(bits, symmetric, bias, dtype)
    x, owners = torch.randn(7, IN).to(dtype), torch.randint(0, EXPERTS, (7 * slots,))
    owners[3] = -1  # a row that another machine computes
    y = ops.expert_linear(x, owners, *args)
    assert y.dtype == dtype
    for row, owner in enumerate(owners.tolist()):
        if owner < 0:
            assert not y[row].any()
            continue
        expected = dense[owner] @ x[row // slots].double()
        expected = expected if args.bias is None else expected + args.bias[owner].double()
        assert relative_error(y[row], expected) < TOLERANCE[dtype]


def test_expert_linear_of_no_rows_is_empty() -> None:
    args, _ = make_experts(4, False, True, torch.float32)
    y = ops.expert_linear(torch.randn(0, IN), torch.zeros(0, dtype=torch.long), *args)
    assert y.shape == (0, OUT)


# --- gradients ---


@each_storage
@each_grid
@each_order
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "x", "bias"])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)], ids=str)
def test_gradients_are_those_of_the_dense_weight(
    layout: str, bits: int, symmetric: bool, permuted: bool, wanted: tuple[bool, bool], shape: tuple[int, ...]
) -> None:
    args, dense = make(bits, symmetric, layout=layout, permuted=permuted)
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


@each_tiled_width
@with_and_without_bias
@pytest.mark.parametrize("slots", [1, 2])
def test_gradients_of_expert_linear_are_those_of_the_dense_weights(bits: int, bias: bool, slots: int) -> None:
    args, dense = make_experts(bits, False, bias, torch.float32)
    owners = torch.randint(0, EXPERTS, (7 * slots,))
    owners[3] = -1
    own, reference = (torch.randn(7, IN).requires_grad_() for _ in range(2))
    reference.data.copy_(own.data)
    grad = torch.randn(7 * slots, OUT)
    ops.expert_linear(own, owners, *args).backward(grad)
    here = (owners >= 0).float()[:, None]  # a row that another machine computes has no gradient here
    rows = reference.repeat_interleave(slots, 0)
    torch.einsum("rk,rnk->rn", rows, dense.float()[owners.clamp(min=0)]).backward(grad * here)
    torch.testing.assert_close(own.grad, reference.grad)


def test_gradients_of_expert_linear_under_compile_are_one_graph_and_those_without() -> None:
    args, _ = make_experts(4, False, True, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def loss(x: Tensor, owners: Tensor) -> Tensor:
        return ops.expert_linear(x, owners, *args).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for rows in BATCHES:
        x, owners = torch.randn(rows, IN, requires_grad=True), torch.randint(0, EXPERTS, (2 * rows,))
        expected = torch.autograd.grad(loss(x, owners), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x, owners), x), expected)
    assert counter.frame_count == 1


@each_layout
@each_order
def test_a_vector_has_gradients_too(layout: str, permuted: bool) -> None:
    args, dense = make(layout=layout, permuted=permuted)
    x, bias = torch.randn(IN, requires_grad=True), args.bias.clone().requires_grad_()
    ops.linear(x, *args._replace(bias=bias)).sum().backward()
    torch.testing.assert_close(bias.grad, torch.ones(OUT))
    torch.testing.assert_close(x.grad, dense.sum(0).float())


@each_layout
@each_order
@each_dtype
def test_gradients_have_the_dtype_of_what_they_belong_to(layout: str, permuted: bool, dtype: torch.dtype) -> None:
    args, dense = make(dtype=dtype, layout=layout, permuted=permuted)
    x, bias = torch.randn(5, IN).to(dtype).requires_grad_(), args.bias.clone().requires_grad_()
    ops.linear(x, *args._replace(bias=bias)).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)
    assert relative_error(x.grad, dense.sum(0).expand(5, IN)) < TOLERANCE[dtype]


@each_layout
def test_inference_builds_no_graph(layout: str) -> None:
    args, _ = make(layout=layout)
    assert ops.linear(torch.randn(5, IN), *args).grad_fn is None
    with torch.no_grad():
        assert ops.linear(torch.randn(5, IN, requires_grad=True), *args).grad_fn is None
        experts, _ = make_experts(4, True, True, torch.float32)
        owners = torch.zeros(5, dtype=torch.long)
        assert ops.expert_linear(torch.randn(5, IN, requires_grad=True), owners, *experts).grad_fn is None


# --- compiled, exported ---


@each_storage
@with_and_without_bias
@each_order
def test_compile_makes_one_graph_for_all_batch_sizes(layout: str, bits: int, bias: bool, permuted: bool) -> None:
    args, _ = make(bits, bias=bias, layout=layout, permuted=permuted)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(x: Tensor) -> Tensor:
        return ops.linear(x, *args).relu()

    for rows in BATCHES:
        x = torch.randn(rows, IN)
        torch.testing.assert_close(compiled(x), ops.linear(x, *args).relu())
    assert counter.frame_count == 1


@each_tiled_width
@with_and_without_bias
def test_compile_makes_one_graph_for_experts_of_all_batch_sizes(bits: int, bias: bool) -> None:
    args, _ = make_experts(bits, False, bias, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def routed(x: Tensor, router: Tensor) -> Tensor:
        owners = (x @ router).topk(2).indices.flatten()
        return ops.expert_linear(x, owners, *args).relu()

    compiled = torch.compile(routed, fullgraph=True, backend=counter, dynamic=True)
    router = torch.randn(IN, EXPERTS)
    for rows in BATCHES:
        x = torch.randn(rows, IN)
        assert compiled(x, router).shape == (2 * rows, OUT)
        torch.testing.assert_close(compiled(x, router), routed(x, router))
    assert counter.frame_count == 1


@each_layout
@each_grid
@each_order
def test_gradients_under_compile_are_one_graph_and_those_without(layout: str, symmetric: bool, permuted: bool) -> None:
    args, _ = make(symmetric=symmetric, layout=layout, permuted=permuted)
    torch._dynamo.reset()

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, *args._replace(bias=bias)).square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for rows in BATCHES:
        x, bias = torch.randn(rows, IN, requires_grad=True), torch.randn(OUT, requires_grad=True)
        expected = torch.autograd.grad(loss(x, bias), (x, bias))
        actual = torch.autograd.grad(compiled(x, bias), (x, bias))
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


@each_layout
@with_and_without_bias
def test_autocast_is_that_of_a_dense_layer_with_and_without_compile(layout: str, bias: bool) -> None:
    args, dense = make(bias=bias, layout=layout)
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear(x, *args)

    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.linear(x, dense.float(), args.bias)
    for y in (run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected)


@with_and_without_bias
def test_autocast_casts_the_input_of_experts(bias: bool) -> None:
    args, _ = make_experts(4, False, bias, torch.float32)
    x, owners = torch.randn(3, IN), torch.tensor([2, 0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.expert_linear(x, owners, *args)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, ops.expert_linear(x, owners, *args).bfloat16(), rtol=3e-2, atol=3e-2)


@each_layout
@each_grid
@each_order
def test_a_module_can_be_exported_saved_and_loaded(layout: str, symmetric: bool, permuted: bool) -> None:
    args, _ = make(symmetric=symmetric, permuted=permuted)
    layer = WqLinear(IN, OUT, True, Scheme(4, GROUP, symmetric, "float32"), torch.float32)
    names = ("weight_packed", "weight_scale", "weight_zero_point", "bias")
    tensors = dict(zip(names, (*args[:3], args.bias), strict=True))
    layer.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, assign=True)
    if args.permutation is not None:
        layer.permutation = nn.Parameter(args.permutation, requires_grad=False)
    layer._set_layout(layout)
    model = nn.Sequential(layer, nn.ReLU())
    exported = torch.export.export(model, (torch.randn(3, IN),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for rows in (3, 8):
        x = torch.randn(rows, IN)
        assert torch.equal(exported.module()(x), model(x))
        assert torch.equal(loaded.module()(x), model(x))
    assert sum(node.target is torch.ops.wq.linear.default for node in loaded.graph.nodes) == 1


# --- refused ---


@each_layout
@pytest.mark.parametrize("features", [IN - 1, IN + 32])
def test_a_wrong_number_of_features_is_a_clear_error_while_tracing(layout: str, features: int) -> None:
    args, _ = make(bias=False, layout=layout)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, features)
        with pytest.raises(RuntimeError, match=f"x has {features} features, the weight {IN}"):
            torch.ops.wq.linear(x, *args)


@each_layout
def test_a_wrong_number_of_features_is_an_error_when_run(layout: str) -> None:
    args, _ = make(bias=False, layout=layout)
    with pytest.raises(ValueError, match=rf"x is \[3, {IN - 1}\]; its last dimension must be in_features, {IN}"):
        ops.linear(torch.randn(3, IN - 1), *args)


@each_layout
def test_a_weight_in_the_other_layout_is_refused(layout: str) -> None:
    args, _ = make(layout=layout)
    with pytest.raises((ValueError, TypeError), match="scale|packed|zero"):
        ops.linear(torch.randn(3, IN), *args._replace(layout="stream" if layout == "tiled" else "tiled"))


@each_layout
@pytest.mark.parametrize(
    ("column", "message"), [(IN, f"permutation holds {IN}"), (-1, "permutation holds -1"), (1, "leaves out column 0")]
)
def test_an_order_that_is_no_permutation_is_refused(layout: str, column: int, message: str) -> None:
    args, _ = make(layout=layout)
    order = torch.arange(IN)
    order[0] = column
    with pytest.raises(ValueError, match=message):
        ops.linear(torch.randn(3, IN), *args._replace(permutation=order))
