"""`WqLinear` is an `nn.Linear` to those who look, holds packed parameters, and computes with the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from wq.formats import compressed_tensors
from wq.layers import PackedWeight, WqLinear
from wq.scheme import PER_CHANNEL, Scheme
from wq.solvers import Solution

SHAPES = [(40, 96, 32), (40, 96, PER_CHANNEL), (33, 64, 16), (7, 40, PER_CHANNEL)]  # out, in, group size

each_shape = pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
each_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def make(
    out_features: int = 40, in_features: int = 96, *, scheme: Scheme | None = None, bias: bool = True
) -> tuple[WqLinear, torch.Tensor]:
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
    assert not isinstance(weight, torch.Tensor)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
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
