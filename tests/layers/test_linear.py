"""`WqLinear` is an `nn.Linear` to those who look, holds packed parameters, and computes with the dequantized weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from transformers import AutoModelForCausalLM

import wq_kernels
from wq.formats import compressed_tensors
from wq.hf import WqConfig
from wq.layers import PackedWeight, WqLinear
from wq.pipeline.quantizer import quantize
from wq.scheme import PER_CHANNEL, Scheme
from wq.solvers import Solution
from wq_kernels import bags, int4pack, native, registry

SHAPES = [(40, 96, 32), (40, 96, PER_CHANNEL), (33, 64, 16), (7, 40, PER_CHANNEL)]  # out, in, group size
# All that tiles take: groups shorter and longer than a block of words, columns and rows that are padded and not.
TILED_SHAPES = [(40, 96, 32), (48, 512, 64), (33, 1536, 512), (7, 40, PER_CHANNEL), (16, 256, PER_CHANNEL)]
BLOCK = {2: 256, 4: 128, 8: 64}  # columns that sixteen words hold

each_shape = pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
each_tiled_shape = pytest.mark.parametrize(("out_features", "in_features", "group_size"), TILED_SHAPES)
each_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
each_tiled_width = pytest.mark.parametrize("bits", list(BLOCK))
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_layout = pytest.mark.parametrize("layout", ["stream", "tiled"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def make(
    out_features: int = 40, in_features: int = 96, *, scheme: Scheme | None = None, bias: bool = True
) -> tuple[WqLinear, Tensor]:
    """A layer loaded the way a checkpoint is, and its weight in float32."""
    scheme = scheme or Scheme(4, 32, False)
    groups = scheme.groups(in_features)
    dtype = getattr(torch, scheme.scale_dtype)
    codes = torch.randint(0, scheme.levels, (out_features, in_features), dtype=torch.uint8)
    scale = (torch.rand(out_features, groups) / scheme.levels + 1e-3).to(dtype)
    zero = torch.full((out_features, groups), scheme.midpoint, dtype=torch.uint8)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.levels, zero.shape, dtype=torch.uint8)
    tensors = compressed_tensors.pack(Solution(codes, scale, zero, {}), scheme)
    del tensors["weight_shape"]
    if bias:
        tensors["bias"] = torch.randn(out_features).to(dtype)
    layer = WqLinear(in_features, out_features, bias, scheme, dtype)
    layer.load_state_dict(tensors, assign=True)
    spread = [values.repeat_interleave(in_features // groups, 1).float() for values in (scale, zero)]
    return layer, spread[0] * (codes.float() - spread[1])


def in_layout(layer: WqLinear, layout: str) -> WqLinear:
    """A copy of a layer, laid out in one of the two ways."""
    twin = copy.deepcopy(layer)
    twin._set_layout(layout)
    return twin


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit: names, dtypes, shapes and values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name], tensor), name
        assert actual[name].is_contiguous(), name


def prefer_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """As on a GPU: `prepare` tiles what fits. Returns the questions that it asks, as they come."""
    asked: list[tuple[Any, ...]] = []

    def preferred(
        device: torch.device, bits: int, out_features: int, in_features: int, groups: int, dtype: torch.dtype | None
    ) -> str:
        asked.append((device, bits, in_features, groups))
        return "tiled"

    monkeypatch.setattr(wq_kernels, "preferred_layout", preferred)
    return asked


@each_shape
@each_width
@each_grid
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_parameters_are_those_of_a_compressed_tensors_checkpoint(
    out_features: int, in_features: int, group_size: int, bits: int, symmetric: bool, bias: bool
) -> None:
    scheme = Scheme(bits, group_size, symmetric)
    layer = WqLinear(in_features, out_features, bias, scheme, torch.bfloat16)
    groups = 1 if group_size == PER_CHANNEL else in_features // group_size
    expected = {
        "weight_packed": ((out_features, -(-in_features * bits // 32)), torch.int32),
        "weight_scale": ((out_features, groups), torch.bfloat16),
    }
    if not symmetric:
        expected["weight_zero_point"] = ((-(-out_features * bits // 32), groups), torch.int32)
    if bias:
        expected["bias"] = ((out_features,), torch.bfloat16)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == expected
    assert not list(layer.named_buffers())
    assert all(p.is_meta and not p.requires_grad for p in layer.parameters())


@each_width
def test_parameters_fit_what_the_format_packs(bits: int) -> None:
    layer, _ = make(33, 64, scheme=Scheme(bits, 16, False))
    fresh = WqLinear(64, 33, True, layer.scheme, torch.float16)
    for name, parameter in layer.named_parameters():
        assert parameter.shape == fresh.get_parameter(name).shape
        assert parameter.dtype == fresh.get_parameter(name).dtype


def test_without_a_dtype_scales_and_bias_take_the_default_one() -> None:
    layer = WqLinear(96, 40, True, Scheme(4, 32))
    assert layer.weight_scale.dtype == layer.bias.dtype == torch.get_default_dtype()


def test_it_is_an_nn_linear() -> None:
    layer, _ = make()
    assert isinstance(layer, nn.Linear)
    assert (layer.out_features, layer.in_features) == (40, 96)


def test_weight_answers_questions_and_is_no_tensor() -> None:
    layer, _ = make(scheme=Scheme(3, 32, False, "bfloat16"))
    weight = layer.weight
    assert isinstance(weight, PackedWeight)
    assert not isinstance(weight, Tensor)
    assert weight.shape == weight.size() == torch.Size((40, 96))
    assert (weight.size(0), weight.size(1), weight.size(-1)) == (40, 96, 96)
    assert (weight.ndim, weight.numel()) == (2, 40 * 96)
    assert (weight.dtype, weight.device) == (torch.bfloat16, torch.device("cpu"))
    assert weight.requires_grad is False
    assert weight.grad is None


def test_weight_gives_its_values_only_when_asked_to_dequantize() -> None:
    layer, dense = make()
    with pytest.raises(RuntimeError, match="packed"):
        _ = layer.weight.data
    torch.testing.assert_close(layer.weight.dequantize(), dense.half())


def test_weight_cannot_be_replaced_silently() -> None:
    layer, _ = make()
    with pytest.raises((AttributeError, KeyError, TypeError)):
        layer.weight = nn.Parameter(torch.zeros(40, 96))
    assert isinstance(layer.weight, PackedWeight)


def test_weight_is_no_entry_of_the_state() -> None:
    layer, _ = make()
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale", "weight_zero_point", "bias"}


@each_width
@each_grid
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_state_dict_round_trip_gives_the_same_layer(bits: int, symmetric: bool, assign: bool) -> None:
    layer, _ = make(scheme=Scheme(bits, 32, symmetric))
    fresh = WqLinear(96, 40, True, layer.scheme, torch.float16)
    if not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(layer.state_dict(), assign=assign)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    x = torch.randn(3, 96).half()
    assert torch.equal(fresh(x), layer(x))


def test_a_deep_copy_is_independent() -> None:
    layer, dense = make()
    twin = copy.deepcopy(layer)
    layer.weight_scale.zero_()
    assert torch.equal(layer.dequantize(), torch.zeros(40, 96).half())
    torch.testing.assert_close(twin.dequantize(), dense.half())
    torch.testing.assert_close(twin.weight.dequantize(), dense.half())


@each_dtype
def test_casting_moves_scales_and_bias_and_leaves_packed_words(dtype: torch.dtype) -> None:
    layer, _ = make(scheme=Scheme(4, 32, False, "float32"))
    packed, zero = layer.weight_packed.clone(), layer.weight_zero_point.clone()
    layer.to(dtype)
    assert layer.weight_scale.dtype == layer.bias.dtype == layer.weight.dtype == dtype
    assert torch.equal(layer.weight_packed, packed)
    assert torch.equal(layer.weight_zero_point, zero)
    assert layer(torch.randn(2, 96).to(dtype)).dtype == dtype


@each_shape
@each_width
@each_grid
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_is_a_linear_with_the_dequantized_weight(
    out_features: int, in_features: int, group_size: int, bits: int, symmetric: bool, bias: bool
) -> None:
    scheme = Scheme(bits, group_size, symmetric, "float32")
    layer, dense = make(out_features, in_features, scheme=scheme, bias=bias)
    assert torch.equal(layer.dequantize(), dense)
    for shape in ((5, in_features), (2, 3, in_features)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), functional.linear(x, dense, layer.bias))


@each_dtype
def test_dequantize_gives_the_dtype_asked_for(dtype: torch.dtype) -> None:
    layer, dense = make()
    assert layer.dequantize().dtype == torch.float16
    assert torch.equal(layer.dequantize(dtype), dense.to(dtype))


def test_gradients_reach_the_input_and_no_parameter() -> None:
    layer, dense = make(scheme=Scheme(4, 32, False, "float32"))
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 96))
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(
    ("scheme", "bias", "expected"),
    [
        (
            Scheme(4, 32, True),
            True,
            "in_features=96, out_features=40, bias=True, bits=4, group_size=32, symmetric",
        ),
        (
            Scheme(3, -1, False),
            False,
            "in_features=96, out_features=40, bias=False, bits=3, group_size=-1, asymmetric",
        ),
    ],
)
def test_printing_shows_the_scheme(scheme: Scheme, bias: bool, expected: str) -> None:
    layer = WqLinear(96, 40, bias, scheme)
    assert layer.extra_repr() == expected
    assert repr(layer) == f"WqLinear({expected})"


# --- layouts ---


@each_tiled_shape
@each_tiled_width
@each_grid
def test_tiles_are_parameters_of_the_padded_shapes(
    out_features: int, in_features: int, group_size: int, bits: int, symmetric: bool
) -> None:
    layer, _ = make(out_features, in_features, scheme=Scheme(bits, group_size, symmetric))
    layer._set_layout("tiled")
    rows, blocks = -(-out_features // 16) * 16, -(-in_features // BLOCK[bits])
    groups = 1 if group_size == PER_CHANNEL else blocks * BLOCK[bits] // group_size
    expected = {
        "weight_packed": ((blocks, rows, 16), torch.int32),
        "weight_scale": ((groups, rows), torch.float16),
        "weight_zero_point": ((1 if symmetric else groups, rows), torch.uint8),
        "bias": ((out_features,), torch.float16),
    }
    assert layer.layout == "tiled"
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == expected
    assert all(p.is_contiguous() and not p.requires_grad for p in layer.parameters())
    assert layer.weight.shape == (out_features, in_features)


@each_tiled_shape
@each_tiled_width
@each_grid
@each_dtype
def test_tiles_compute_the_same_bit_for_bit(
    out_features: int, in_features: int, group_size: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = Scheme(bits, group_size, symmetric, str(dtype).removeprefix("torch."))
    layer, dense = make(out_features, in_features, scheme=scheme)
    tiled = in_layout(layer, "tiled")
    assert torch.equal(tiled.dequantize(torch.float32), dense)
    assert torch.equal(tiled.dequantize(), layer.dequantize())
    for shape in ((5, in_features), (2, 3, in_features), (in_features,)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(tiled(x), layer(x))


@each_tiled_shape
@each_tiled_width
@each_grid
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_state_of_a_tiled_layer_is_that_of_the_checkpoint(
    out_features: int, in_features: int, group_size: int, bits: int, symmetric: bool, bias: bool
) -> None:
    layer, _ = make(out_features, in_features, scheme=Scheme(bits, group_size, symmetric), bias=bias)
    tiled = in_layout(layer, "tiled")
    assert_same_state(tiled.state_dict(), layer.state_dict())
    assert tiled.layout == "tiled"
    nested = nn.Sequential(nn.Identity(), tiled).state_dict()
    assert_same_state(nested, {f"1.{name}": tensor for name, tensor in layer.state_dict().items()})


@each_tiled_shape
@each_tiled_width
@each_grid
def test_there_and_back_again_restores_the_bytes(
    out_features: int, in_features: int, group_size: int, bits: int, symmetric: bool
) -> None:
    layer, _ = make(out_features, in_features, scheme=Scheme(bits, group_size, symmetric))
    back = in_layout(in_layout(layer, "tiled"), "stream")
    assert back.layout == "stream"
    assert_same_state(dict(back.named_parameters()), dict(layer.named_parameters()))
    assert (back.weight_zero_point is None) == symmetric


@each_tiled_width
@each_grid
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tiled_layer_loads_the_state_of_a_checkpoint(bits: int, symmetric: bool, assign: bool, device: str) -> None:
    layer, _ = make(scheme=Scheme(bits, 32, symmetric))
    other = in_layout(make(scheme=layer.scheme)[0], "tiled")
    assert not torch.equal(other.dequantize(), layer.dequantize())
    other.to(device)
    if device == "meta" and not assign:
        other.to_empty(device="cpu")
        other._set_layout("tiled")
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert other.layout == "tiled"
    assert_same_state(other.state_dict(), layer.state_dict())
    assert not any(parameter.requires_grad for parameter in other.parameters())
    x = torch.randn(3, 96).half()
    assert torch.equal(other(x), layer(x))


@each_layout
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(layout: str) -> None:
    layer, dense = make(scheme=Scheme(4, 32, True))
    layer._set_layout(layout)
    state = layer.state_dict()
    for damaged, message in (
        ({**state, "weight_scale": state["weight_scale"][:, :2]}, "size mismatch for weight_scale"),
        ({**state, "weight_zero_point": torch.zeros(5, 3, dtype=torch.int32)}, "Unexpected.*weight_zero_point"),
        ({name: tensor for name, tensor in state.items() if name != "weight_packed"}, "Missing.*weight_packed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(damaged)
        assert layer.layout == layout
        assert torch.equal(layer.dequantize(torch.float32), dense)


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [((40, 96), Scheme(3, 32, False)), ((33, 64), Scheme(4, 16, False)), ((40, 96), Scheme(4, 48, False))],
    ids=["3 bits", "groups of 16", "groups of 48"],
)
def test_what_tiles_do_not_take_stays_as_it_is(shape: tuple[int, int], scheme: Scheme) -> None:
    layer, dense = make(*shape, scheme=scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match="tiled layout"):
        layer._set_layout("tiled")
    assert layer.layout == "stream"
    assert_same_state(layer.state_dict(), before)
    assert torch.equal(layer.dequantize(torch.float32), dense)


@each_grid
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["c", "p"])
def test_a_copy_of_a_tiled_layer_is_tiled_and_independent(
    symmetric: bool, duplicate: Callable[[WqLinear], WqLinear]
) -> None:
    layer, _ = make(scheme=Scheme(4, 32, symmetric))
    layer._set_layout("tiled")
    layer.permutation = nn.Parameter(torch.randperm(96), requires_grad=False)
    expected, state = layer.dequantize(), {name: t.clone() for name, t in layer.state_dict().items()}
    twin = duplicate(layer)
    layer.weight_scale.zero_()
    layer.permutation.zero_()
    assert twin.layout == "tiled"
    assert torch.equal(twin.dequantize(), expected)
    assert torch.equal(twin.weight.dequantize(), expected)
    assert_same_state(twin.state_dict(), state)
    assert not torch.equal(layer.dequantize(), expected)


@each_tiled_width
@each_grid
@each_dtype
def test_casting_in_tiles_is_casting_in_the_stream(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    layer, _ = make(scheme=Scheme(bits, 32, symmetric, "float32"))
    tiled = in_layout(layer, "tiled")
    words, points = tiled.weight_packed.clone(), tiled.weight_zero_point.clone()
    layer.to(dtype)
    for cast in (lambda: tiled.to(dtype), {torch.float16: tiled.half, torch.bfloat16: tiled.bfloat16}.get(dtype)):
        if cast is not None:
            cast()
        assert tiled.layout == "tiled"
        assert tiled.weight_scale.dtype == tiled.bias.dtype == tiled.weight.dtype == dtype
        assert torch.equal(tiled.weight_packed, words)
        assert tiled.weight_zero_point.dtype == torch.uint8
        assert torch.equal(tiled.weight_zero_point, points)
        assert_same_state(tiled.state_dict(), layer.state_dict())
        x = torch.randn(3, 96).to(dtype)
        assert torch.equal(tiled(x), layer(x))


def test_half_and_float_in_tiles_lose_what_rounding_the_scales_loses() -> None:
    layer, _ = make(scheme=Scheme(8, 32, False))
    tiled = in_layout(layer, "tiled")
    x = torch.randn(3, 96)
    assert torch.equal(tiled.float()(x), layer.float()(x))
    assert torch.equal(tiled.half()(x.half()), layer.half()(x.half()))
    assert_same_state(tiled.state_dict(), layer.state_dict())


@each_layout
@each_grid
def test_a_layer_can_lose_its_storage_and_get_it_back(layout: str, symmetric: bool) -> None:
    layer, dense = make(scheme=Scheme(4, 32, symmetric, "float32"))
    state = layer.state_dict()
    layer._set_layout(layout)
    layer.to("meta")
    assert layer.layout == layout
    assert all(parameter.is_meta for parameter in layer.parameters())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    assert layer.prepare() is layer
    assert layer.layout == layout
    layer.to_empty(device="cpu").load_state_dict(state)
    assert layer.layout == "stream"  # the layout of this machine
    assert torch.equal(layer.dequantize(), dense)


def test_prepare_on_a_cpu_keeps_the_stream() -> None:
    layer, dense = make()
    packed = layer.weight_packed
    assert layer.prepare() is layer
    assert layer.layout == "stream"
    assert layer.weight_packed is packed
    layer._set_layout("tiled")
    assert layer.prepare().layout == "stream"
    assert torch.equal(layer.dequantize(torch.float32), dense)


@pytest.mark.parametrize(("group_size", "groups"), [(32, 3), (PER_CHANNEL, 1)])
def test_prepare_tiles_where_tiles_are_preferred(group_size: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense = make(scheme=Scheme(8, group_size, False))
    asked = prefer_tiles(monkeypatch)
    assert layer.prepare().layout == "tiled"
    words = layer.weight_packed
    assert layer.prepare().weight_packed is words
    assert asked == 2 * [(torch.device("cpu"), 8, 96, groups)]
    assert torch.equal(layer.dequantize(torch.float32), dense)


def test_only_a_move_to_another_device_lays_a_layer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense = make()
    model, state = nn.Sequential(layer), {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
    asked = prefer_tiles(monkeypatch)
    model.half().float().to("cpu").to(torch.float32)
    assert not asked
    assert layer.layout == "stream"
    model.to("meta").to_empty(device="cpu")
    assert layer.layout == "tiled"
    model.load_state_dict(state)
    assert torch.equal(layer.dequantize(), dense)


@each_grid
def test_a_move_takes_a_tiled_layer_to_the_layout_of_the_new_device(symmetric: bool) -> None:
    """From the only other device there is here, which keeps no values: they come back by hand."""
    layer, dense = make(scheme=Scheme(4, 32, symmetric))
    state = layer.state_dict()
    layer._set_layout("tiled")
    values = iter([parameter.detach().clone() for parameter in layer.parameters()])
    layer.to("meta")
    assert layer.layout == "tiled"
    layer._apply(lambda _: next(values))
    assert layer.layout == "stream"
    assert_same_state(layer.state_dict(), state)
    assert torch.equal(layer.dequantize(torch.float32), dense)


@each_layout
def test_a_compiled_layer_is_one_graph_for_all_batch_sizes(layout: str) -> None:
    layer, _ = make(scheme=Scheme(8, 32, False, "float32"))  # two blocks of words, as many as rows
    layer._set_layout(layout)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in (2, 3, 8, 33):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


# --- the order of columns ---


@each_layout
@each_tiled_width
@each_grid
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_permuted_layer_takes_and_gives_columns_in_the_order_of_the_input(
    layout: str, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    layer, stored = make(scheme=Scheme(bits, 32, symmetric, "float32"))
    layer._set_layout(layout)
    order = torch.randperm(96)
    layer.permutation = nn.Parameter(order.to(dtype), requires_grad=False)
    dense = torch.empty_like(stored)
    for column, source in enumerate(order.tolist()):
        dense[:, source] = stored[:, column]
    assert not torch.equal(dense, stored)
    assert torch.equal(layer.dequantize(), dense)
    assert torch.equal(layer.weight.dequantize(), dense)
    assert torch.equal(layer.dequantize(torch.bfloat16), dense.bfloat16())
    for shape in ((5, 96), (2, 3, 96), (96,), (0, 96)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, functional.linear(x, dense, layer.bias))
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, dense.sum(0).expand(shape))


@each_layout
def test_the_order_survives_casts_and_layouts_and_is_part_of_the_state(layout: str) -> None:
    layer, _ = make()
    order = torch.randperm(96)
    layer.permutation = nn.Parameter(order, requires_grad=False)
    layer._set_layout(layout)
    expected = layer.dequantize(torch.float32)
    layer.float().half()
    assert layer.permutation.dtype == torch.int64
    assert torch.equal(layer.permutation, order)
    assert torch.equal(layer.dequantize(torch.float32), expected)
    names = {"weight_packed", "weight_scale", "weight_zero_point", "bias", "permutation"}
    assert set(layer.state_dict()) == names
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.permutation, order)
    assert layer.to("meta").permutation.is_meta


# --- in a model ---

OPTIONS: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"bits": 2, "symmetric": False},
    {"bits": 8, "group_size": -1},
]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 50).reshape(2, 24)).logits


def prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wq_kernels, "preferred_layout", lambda *asked: name)


def layouts(model: nn.Module) -> list[str]:
    return [module.layout for module in model.modules() if isinstance(module, WqLinear)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_tiled_model_computes_and_saves_what_the_checkpoint_holds(
    options: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    quantize(tiny_model(), source, method="rtn", **{"group_size": 32, **options})
    prefer("stream", monkeypatch)
    models = {"stream": AutoModelForCausalLM.from_pretrained(source, quantization_config=WqConfig(), dtype="auto")}
    prefer_tiles(monkeypatch)
    models["tiled"] = AutoModelForCausalLM.from_pretrained(source, quantization_config=WqConfig(), dtype="auto")
    for layout, model in models.items():
        assert layouts(model) == 14 * [layout]
        model.save_pretrained(tmp_path / layout)
    assert torch.equal(logits(models["tiled"]), logits(models["stream"]))
    assert_same_state(load_file(tmp_path / "tiled" / "model.safetensors"), load_file(source / "model.safetensors"))
    saved = {file.name: file.read_bytes() for file in (tmp_path / "stream").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "tiled").iterdir()} == saved
    for model in models.values():
        model.dequantize(torch.float16)
    assert_same_state(models["tiled"].state_dict(), models["stream"].state_dict())


@each_grid
def test_what_is_quantized_on_load_is_tiled_and_saved_the_same(
    symmetric: bool, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"group_size": 32, "symmetric": symmetric}
    prefer("stream", monkeypatch)
    stream = AutoModelForCausalLM.from_pretrained(tiny_model(), quantization_config=WqConfig(**config))
    prefer_tiles(monkeypatch)
    tiled = AutoModelForCausalLM.from_pretrained(tiny_model(), quantization_config=WqConfig(**config))
    assert (layouts(stream), layouts(tiled)) == (14 * ["stream"], 14 * ["tiled"])
    for layout, model in (("stream", stream), ("tiled", tiled)):
        model.save_pretrained(tmp_path / layout)
    files = [(tmp_path / layout / "model.safetensors").read_bytes() for layout in ("stream", "tiled")]
    assert files[0] == files[1]
    assert torch.equal(logits(tiled), logits(stream))


# --- PyTorch's kernel on CPUs ---

on_a_cpu = pytest.mark.skipif(
    bool(int4pack.unusable() or bags.unusable()), reason=f"here, {int4pack.unusable()}{bags.unusable()}"
)
compiled = pytest.mark.skipif(bool(native.unusable()), reason=f"here, {native.unusable()}")
BF16 = torch.bfloat16
KIND = {"native": BF16, "int4pack": BF16, "bags": torch.float32}
BOUND = {"native": 4e-3, "int4pack": 4e-3, "bags": 1e-5}

each_cpu_layout = pytest.mark.parametrize(
    ("layout", "bits"),
    [*(pytest.param("native", bits, marks=compiled) for bits in (2, 3, 4, 8)), ("int4pack", 4)]
    + [("bags", bits) for bits in (2, 4, 8)],
)


@pytest.fixture(autouse=True)
def _only_this_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for CPUs: the compiled one where a test asks for it, else PyTorch's."""
    wanted = getattr(request.node, "callspec", None)
    ours = wanted is not None and wanted.params.get("layout") == "native"
    monkeypatch.setattr(registry, "CPU_LAYOUTS", ("native",) if ours else ("int4pack", "bags"))


def for_cpu(
    *, symmetric: bool = False, bias: bool = True, permuted: bool = False, bits: int = 4, layout: str = "int4pack"
) -> tuple[WqLinear, WqLinear]:
    """A layer as a checkpoint has it, and prepared: for bfloat16 in `int4pack`, for float32 in `bags`."""
    layer, _ = make(64, 96, scheme=Scheme(bits, 32, symmetric), bias=bias)
    if permuted:
        layer.permutation = nn.Parameter(torch.randperm(96, dtype=torch.int32), requires_grad=False)
    prepared = copy.deepcopy(layer).prepare(KIND[layout])
    assert prepared.layout == layout
    return layer, prepared


def near(actual: Tensor, layer: WqLinear, x: Tensor, bound: float = 4e-3) -> bool:
    bias = None if layer.bias is None else layer.bias.double()
    exact = functional.linear(x.double(), layer.dequantize(torch.float64), bias)
    return bool((actual.double() - exact).norm() < bound * exact.norm())


@on_a_cpu
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("bfloat16", "int4pack"), ("float32", "bags"), ("float16", "bags")]
    + [pytest.param(dtype, "native", marks=compiled) for dtype in ("bfloat16", "float32", "float16")],
)
@each_grid
def test_a_model_loads_onto_the_kernels_for_cpus_and_saves_what_the_checkpoint_holds(
    dtype: str, layout: str, symmetric: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    dense = tiny_model("llama", intermediate_size=128)
    quantize(dense, tmp_path / "made", method="rtn", group_size=32, symmetric=symmetric)
    flag = {"quantization_config": WqConfig(), "dtype": getattr(torch, dtype)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", **flag)
    found = [module for module in model.modules() if isinstance(module, WqLinear)]
    assert {module.layout for module in found if module.out_features % 64 == 0} == {layout}
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", **flag | {"quantization_config": WqConfig(dequantize=True)}
    )
    exact = logits(plain.float()).double()
    assert (logits(model).double() - exact).norm() < {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[
        dtype
    ] * exact.norm()
    model.save_pretrained(tmp_path / "saved")
    packed = {name: t for name, t in load_file(tmp_path / "made" / "model.safetensors").items() if "packed" in name}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert_same_state({name: saved[name] for name in packed}, packed)


@on_a_cpu
@each_grid
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("permuted", [True, False], ids=["act-order", "in order"])
@pytest.mark.parametrize("rows", [1, 5, 200])
@each_cpu_layout
def test_the_kernels_for_cpus_compute_the_product(
    layout: str, bits: int, symmetric: bool, bias: bool, permuted: bool, rows: int
) -> None:
    layer, prepared = for_cpu(symmetric=symmetric, bias=bias, permuted=permuted, layout=layout, bits=bits)
    x = torch.randn(2, rows, 96).to(KIND[layout])
    with torch.inference_mode():
        y = prepared(x)
    assert (y.dtype, y.shape) == (x.dtype, (2, rows, 64))
    assert near(y, layer, x, BOUND[layout])
    assert torch.equal(prepared(x), y)


@on_a_cpu
@each_grid
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32, torch.float64], ids=str)
def test_what_is_not_bfloat16_is_computed_as_before(symmetric: bool, dtype: torch.dtype) -> None:
    layer, prepared = for_cpu(symmetric=symmetric)
    layer.bias.data, prepared.bias.data = layer.bias.data.to(dtype), prepared.bias.data.to(dtype)
    x = torch.randn(3, 96).to(dtype)
    if dtype == BF16:
        assert near(prepared(x), layer, x)
    else:
        assert torch.equal(prepared(x), layer(x))
    assert torch.equal(prepared.dequantize(dtype), layer.dequantize(dtype))


@on_a_cpu
@each_grid
@each_cpu_layout
def test_the_state_of_a_layer_prepared_for_a_cpu_is_that_of_the_checkpoint(
    layout: str, bits: int, symmetric: bool
) -> None:
    layer, prepared = for_cpu(symmetric=symmetric, layout=layout, bits=bits)
    assert_same_state(prepared.state_dict(), layer.state_dict())
    other = for_cpu(symmetric=symmetric, layout=layout, bits=bits)[1]
    other.load_state_dict(layer.state_dict())
    assert other.layout == layout
    x = torch.randn(3, 96).to(KIND[layout])
    assert torch.equal(other(x), prepared(x))
    prepared._set_layout("stream")
    assert_same_state(dict(prepared.named_parameters()), dict(layer.named_parameters()))
    assert prepared._grid is None


@on_a_cpu
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["c", "p"])
@each_cpu_layout
def test_a_copy_of_a_prepared_layer_is_independent(
    layout: str, bits: int, duplicate: Callable[[WqLinear], WqLinear]
) -> None:
    _, prepared = for_cpu(layout=layout, bits=bits)
    x = torch.randn(3, 96).to(KIND[layout])
    expected = prepared(x)
    twin = duplicate(prepared)
    prepared.weight_packed.zero_()
    prepared._grid.zero_()
    assert torch.equal(twin(x), expected)


@on_a_cpu
def test_casting_chooses_the_layout_again() -> None:
    layer, prepared = for_cpu()
    prepared.to(torch.float64)
    assert prepared.layout == "stream"
    prepared.to(torch.float32)
    assert prepared.layout == "bags"
    layer.to(torch.float32)
    x = torch.randn(3, 96)
    assert near(prepared(x), layer, x, 1e-5)
    prepared.to(BF16)
    assert prepared.layout == "int4pack"
    assert near(prepared(x.to(BF16)), layer, x.to(BF16), 8e-3)  # a cast scale is another scale


@compiled
@pytest.mark.parametrize("layout", ["native"])
def test_casting_keeps_the_layout_that_computes_in_both(layout: str) -> None:
    layer, prepared = for_cpu(layout=layout)
    prepared.to(torch.float64)
    assert prepared.layout == "stream"
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 5e-4), (BF16, 8e-3)):
        prepared.to(dtype)
        layer.to(dtype)
        x = torch.randn(3, 96).to(dtype)
        assert prepared.layout == layout
        assert near(prepared(x), layer, x, bound)


@on_a_cpu
@each_cpu_layout
def test_going_through_no_device_keeps_it_loadable(layout: str, bits: int) -> None:
    layer, prepared = for_cpu(layout=layout, bits=bits)
    prepared.to("meta")
    prepared.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 96).to(KIND[layout])
    assert prepared.layout == layout
    assert near(prepared(x), layer, x, BOUND[layout])


@on_a_cpu
@each_cpu_layout
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
def test_autocast_is_honoured_as_by_a_dense_layer(layout: str, bits: int, gradient: bool) -> None:
    layer, prepared = for_cpu(layout=layout, bits=bits)
    x = torch.randn(3, 96)
    with torch.autocast("cpu", dtype=BF16):
        y = prepared(x.clone().requires_grad_(gradient))
        assert y.dtype == nn.Linear(96, 64)(x).dtype == BF16
    assert near(y.detach(), layer, x.to(BF16))


@on_a_cpu
@each_grid
def test_a_tiled_layer_that_is_offloaded_goes_back_to_the_layout_of_its_state(symmetric: bool) -> None:
    layer, _ = make(64, 96, scheme=Scheme(4, 32, symmetric, "float32"))
    tiled = in_layout(layer, "tiled")
    model = nn.Sequential(tiled)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert tiled.layout == "stream"
    x = torch.randn(3, 96)
    assert torch.equal(model(x), layer(x))


@on_a_cpu
@each_cpu_layout
@each_grid
def test_a_prepared_layer_that_is_offloaded_goes_back_to_the_layout_of_its_state(
    layout: str, bits: int, symmetric: bool
) -> None:
    layer, prepared = for_cpu(layout=layout, bits=bits, symmetric=symmetric, bias=False)
    model = nn.Sequential(prepared)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert prepared.layout == "stream"
    x = torch.randn(3, 96).to(KIND[layout])
    assert near(model(x), layer, x, BOUND[layout])


@on_a_cpu
@each_cpu_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_same_cast_again_damages_nothing(layout: str, bits: int, dtype: torch.dtype) -> None:
    """A buffer is cast with its module: what it is made of has not changed, and it must not either."""
    layer, prepared = for_cpu(layout=layout, bits=bits)
    for _ in range(2):
        prepared.to(dtype)
    layer.to(dtype)
    x = torch.randn(3, 96).to(dtype)
    assert prepared.layout == ("native" if layout == "native" else "bags")
    assert near(prepared(x), layer, x, 1e-5 if dtype == torch.float32 else 5e-4)


@on_a_cpu
def test_gradients_still_reach_the_input() -> None:
    layer, prepared = for_cpu(bias=False)
    x = torch.randn(3, 96).to(BF16).requires_grad_()
    y = prepared(x)
    y.sum().backward()
    expected = layer.dequantize(torch.float64).sum(0).expand(3, 96)
    assert (x.grad.double() - expected).norm() < 8e-3 * expected.norm()


@on_a_cpu
@each_cpu_layout
def test_threads_share_a_layer(layout: str, bits: int) -> None:
    _, prepared = for_cpu(layout=layout, bits=bits)
    inputs = [torch.randn(rows, 96).to(KIND[layout]) for rows in (1, 3, 70, 200)] * 8
    expected = [prepared(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(prepared, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_a_cpu
@pytest.mark.parametrize("rows", [1, 200])
@each_cpu_layout
def test_it_compiles_without_a_break(layout: str, bits: int, rows: int) -> None:
    torch._dynamo.reset()
    layer, prepared = for_cpu(layout=layout, bits=bits)
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(1, rows, 96).to(KIND[layout])
    with torch.inference_mode():
        compiled = torch.compile(prepared, backend=counter, fullgraph=True)
        assert torch.equal(compiled(x), prepared(x))
    assert counter.frame_count == 1
    assert near(compiled(x), layer, x, BOUND[layout])
