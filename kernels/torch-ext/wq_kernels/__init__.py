"""Kernels for packed integer weights. They see tensors and numbers, never models, and never import `wq`.

    layout = wq_kernels.preferred_layout(device, bits, out_features, in_features, groups, dtype)
    y = wq_kernels.linear(x, packed, scale, zero, permutation, bias, bits, out_features, in_features, layout)

A weight comes in the layout of checkpoints, `stream` (see `reference`); where a fused kernel runs, it is laid out once
as `tiled` (see `layout`), and back when it is saved. On a CPU it may become `native`, `int4pack` or `bags`, for the
modules of these names alone. A backend is a module for one of the first two layouts with

    def supports(bits) -> bool
    def dequantize(packed, scale, zero, bits, out_features, in_features, dtype) -> Tensor
    def linear(x, packed, scale, zero, bias, bits, out_features, in_features) -> Tensor
    def expert_linear(x, expert_of_row, packed, scale, zero, bias, bits, out_features, in_features) -> Tensor   # tiled

A new one adds its file and one line to `BACKENDS`, before the plain torch of its layout, which takes everything and is
the oracle for the others. Importing this package imports no backend, never touches an accelerator, and does not need
triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import BACKENDS, CPU_LAYOUTS, LAYOUTS, Backend, get, preferred_layout, select

if TYPE_CHECKING:
    from .dispatch import dequantize, expert_linear, linear

__all__ = [
    "BACKENDS",
    "CPU_LAYOUTS",
    "LAYOUTS",
    "Backend",
    "dequantize",
    "expert_linear",
    "get",
    "linear",
    "preferred_layout",
    "select",
]


def __getattr__(name: str) -> Any:
    """What needs torch, imported when it is first asked for."""
    if name in ("linear", "dequantize", "expert_linear"):
        from . import dispatch

        return getattr(dispatch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
