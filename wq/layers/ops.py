"""The op `wq::linear`: x times a packed weight, opaque to torch, whatever backend computes it.

The schema is defined once; every choice (backend, later the number of rows) is made inside the op, so that
torch.compile sees one node with fixed inputs. Autograd sits outside, in a Function entered only when a gradient is
wanted: inference does not pay for it. `Library.define` rather than `custom_op`, whose call costs ten times more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import wq_kernels

_LIBRARY = torch.library.Library("wq", "DEF")
_ARGUMENTS = "Tensor packed, Tensor scale, Tensor? zero"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"linear(Tensor x, {_ARGUMENTS}, Tensor? bias, int bits, int in_features) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"linear_backward(Tensor grad, {_ARGUMENTS}, int bits, int in_features) -> Tensor", tags=_TAGS)


def _linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, in_features: int
) -> Tensor:
    backend = wq_kernels.select(x.device.type, bits)
    return backend.linear(x, packed, scale, zero, bias, bits, in_features)


def _linear_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int
) -> Tensor:
    return grad @ dequantize(packed, scale, zero, bits, in_features, grad.dtype)


for _key in ("CPU", "CUDA", "XPU", "MPS"):
    _LIBRARY.impl("linear", _linear, _key)
    _LIBRARY.impl("linear_backward", _linear_backward, _key)


@torch.library.register_fake("wq::linear", lib=_LIBRARY)
def _linear_fake(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, in_features: int
) -> Tensor:
    torch._check(x.shape[-1] == in_features, lambda: f"x has {x.shape[-1]} features, the weight {in_features}")
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@torch.library.register_fake("wq::linear_backward", lib=_LIBRARY)
def _linear_backward_fake(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


class _Linear(torch.autograd.Function):
    """Gradients for the input and the bias; the packed weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> Tensor:
        bias, bits, in_features = rest
        ctx.save_for_backward(packed, scale, zero)
        ctx.bits, ctx.in_features, ctx.has_bias = bits, in_features, bias is not None
        return torch.ops.wq.linear(x, packed, scale, zero, bias, bits, in_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        need_x, need_bias = ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[4]
        grad_x = None
        if need_x:
            grad_x = torch.ops.wq.linear_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.in_features)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return grad_x, None, None, None, grad_bias, None, None


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, in_features: int
) -> Tensor:
    """`x @ W.T + bias`, `[..., out]`, for x `[..., in]` and a weight in the layout of `wq_kernels.reference`."""
    if torch.is_autocast_enabled(x.device.type):  # as nn.Linear: the op itself must not see a dtype it was not given
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, packed, scale, zero, bias, bits, in_features)
    return torch.ops.wq.linear(x, packed, scale, zero, bias, bits, in_features)


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight, `[out, in]` in `dtype`."""
    backend = wq_kernels.select(packed.device.type, bits)
    return backend.dequantize(packed, scale, zero, bits, in_features, dtype)
