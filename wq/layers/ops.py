"""The ops `wq::linear` and `wq::expert_linear`: x times a packed weight, opaque to torch, whatever computes it.

The schema is defined once; every choice (backend, kernel, tile, by the number of rows) is made inside the op, so that
torch.compile sees one node with fixed inputs. Autograd sits outside, in a Function entered only when a gradient is
wanted: inference does not pay for it. `Library.define` rather than `custom_op`, whose call costs ten times more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wq_kernels
from wq_kernels import checks, int4pack, native, registry
from wq_kernels import layout as tiles

STREAM, TILED = "stream", "tiled"  # the first is that of checkpoints
ON_CPU = {name: registry.cpu_module(name) for name in wq_kernels.CPU_LAYOUTS}  # what multiplies there

_LIBRARY = torch.library.Library("wq", "DEF")
_WEIGHT = "Tensor packed, Tensor scale, Tensor? zero"
_SIZES = "int bits, int out_features, int in_features"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    f"linear(Tensor x, {_WEIGHT}, Tensor? permutation, Tensor? bias, {_SIZES}, str layout) -> Tensor", tags=_TAGS
)
_LIBRARY.define(
    f"linear_backward(Tensor grad, {_WEIGHT}, Tensor? permutation, {_SIZES}, str layout) -> Tensor", tags=_TAGS
)
_LIBRARY.define(
    f"expert_linear(Tensor x, Tensor expert_of_row, {_WEIGHT}, Tensor? bias, {_SIZES}) -> Tensor", tags=_TAGS
)
_LIBRARY.define(
    f"expert_linear_backward(Tensor grad, Tensor expert_of_row, {_WEIGHT}, SymInt inputs, {_SIZES}) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "on_cpu(Tensor x, Tensor packed, Tensor grid, int bits, int out_features, str layout) -> Tensor", tags=_TAGS
)


def _linear_backward(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    permutation: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    layout: str,
) -> Tensor:
    weight = wq_kernels.dequantize(packed, scale, zero, bits, out_features, in_features, grad.dtype, layout)
    grad_x = grad @ weight
    if permutation is None:
        return grad_x
    return torch.empty_like(grad_x).index_copy_(-1, permutation.long(), grad_x)


def _on_cpu(x: Tensor, packed: Tensor, grid: Tensor, bits: int, out_features: int, layout: str) -> Tensor:
    y: Tensor = ON_CPU[layout].multiply(x, packed, grid, bits)
    return y


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _LIBRARY.impl("linear", wq_kernels.linear, _key)
    _LIBRARY.impl("linear_backward", _linear_backward, _key)
    _LIBRARY.impl("expert_linear", wq_kernels.expert_linear, _key)
    _LIBRARY.impl("expert_linear_backward", tiles.expert_linear_backward, _key)
_LIBRARY.impl("on_cpu", _on_cpu, "CPU")


@torch.library.register_fake("wq::linear", lib=_LIBRARY)
def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    layout: str,
) -> Tensor:
    checks.same_device("x", x, packed=packed, scale=scale, zero=zero, permutation=permutation, bias=bias)
    torch._check(x.shape[-1] == in_features, lambda: f"x has {x.shape[-1]} features, the weight {in_features}")
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("wq::linear_backward", lib=_LIBRARY)
def _linear_backward_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], rest[-2])


@torch.library.register_fake("wq::expert_linear", lib=_LIBRARY)
def _expert_linear_fake(
    x: Tensor, expert_of_row: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    checks.same_device("x", x, expert_of_row=expert_of_row, packed=packed, scale=scale, zero=zero, bias=bias)
    return x.new_empty(expert_of_row.shape[0], rest[-2])


@torch.library.register_fake("wq::expert_linear_backward", lib=_LIBRARY)
def _expert_linear_backward_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(rest[-4], rest[-1])


@torch.library.register_fake("wq::on_cpu", lib=_LIBRARY)
def _on_cpu_fake(x: Tensor, packed: Tensor, grid: Tensor, bits: int, out_features: int, layout: str) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def autocast(x: Tensor) -> Tensor:
    """x as nn.Linear would take it: the ops themselves must not see a dtype they were not given."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class _Linear(torch.autograd.Function):
    """Gradients for the input and the bias; the packed weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        packed, scale, zero, permutation, *sizes = weight
        ctx.save_for_backward(packed, scale, zero, permutation)
        ctx.sizes = sizes
        return torch.ops.wq.linear(x, packed, scale, zero, permutation, bias, *sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        need_x, need_bias = ctx.needs_input_grad[:2]
        grad_x = torch.ops.wq.linear_backward(grad, *ctx.saved_tensors, *ctx.sizes) if need_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return grad_x, grad_bias, *(None for _ in ctx.needs_input_grad[2:])


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    permutation: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    layout: str = STREAM,
) -> Tensor:
    """`x[..., permutation] @ W.T + bias`, `[..., out]`, for x `[..., in]`; see `wq_kernels.linear`."""
    cast = autocast(x)
    if cast is not x:
        x, bias = cast, None if bias is None else bias.to(cast.dtype)
    sizes = (bits, out_features, in_features, layout)
    if wants_gradient(x, bias):
        return _Linear.apply(x, bias, packed, scale, zero, permutation, *sizes)
    return torch.ops.wq.linear(x, packed, scale, zero, permutation, bias, *sizes)


def wants_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def on_cpu(
    x: Tensor, packed: Tensor, grid: Tensor, bias: Tensor | None, bits: int, out_features: int, layout: str
) -> Tensor:
    """`x @ W.T + bias`, `[..., out]`, for x `[..., in]` in a dtype that the layout's module computes in. No gradients.

    Ops of torch and of wq's own library are called right here, so that a token costs little more than the kernel, and
    torch.compile sees them.
    """
    if layout == "native":
        y = native.op(bits)(x, packed, grid)
        return y if bias is None else y + bias.to(y.dtype)
    *lead, in_features = x.shape
    rows = x.reshape(-1, in_features).contiguous()
    if layout == "int4pack" and rows.shape[0] <= int4pack.FEW:
        y = torch._weight_int4pack_mm_for_cpu(rows, packed, in_features // grid.shape[0], grid)
    elif torch.compiler.is_compiling() or type(x) is not Tensor:  # a tracer must see one node
        y = torch.ops.wq.on_cpu(rows, packed, grid, bits, out_features, layout)
    else:
        y = _on_cpu(rows, packed, grid, bits, out_features, layout)
    y = y.view(*lead, out_features)
    return y if bias is None else y + bias.to(y.dtype)


class _ExpertLinear(torch.autograd.Function):
    """The gradient for the input; weights and biases of experts have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_of_row: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        packed, scale, zero, *sizes = weight
        ctx.save_for_backward(expert_of_row, packed, scale, zero)
        ctx.inputs, ctx.sizes = x.shape[0], sizes
        return torch.ops.wq.expert_linear(x, expert_of_row, packed, scale, zero, bias, *sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = torch.ops.wq.expert_linear_backward(grads[0], *ctx.saved_tensors, ctx.inputs, *ctx.sizes)
        return grad_x, *(None for _ in ctx.needs_input_grad[1:])


def expert_linear(
    x: Tensor,
    expert_of_row: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Each row times the weight of its expert, `[rows, out]`; see `wq_kernels.expert_linear`."""
    x = autocast(x)
    sizes = (bits, out_features, in_features)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ExpertLinear.apply(x, expert_of_row, bias, packed, scale, zero, *sizes)
    return torch.ops.wq.expert_linear(x, expert_of_row, packed, scale, zero, bias, *sizes)
