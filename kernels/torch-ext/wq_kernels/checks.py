"""What a call must look like, checked before anything is launched: a kernel given wrong sizes reads other memory.

Everything is known from shapes, dtypes and devices, so that no check waits for a device; the values of a permutation,
which would, are checked where one is made (`permutation`), and wherever it is on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout, reference

__all__ = ["experts", "linear", "output", "permutation", "same_device", "weight"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weight(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    tiled: bool,
    experts: int | None = None,
) -> None:
    """Refuse a weight whose tensors do not fit its sizes. Raises ValueError or TypeError."""
    _tensors(packed=packed, scale=scale)
    for name, value in (("bits", bits), ("out_features", out_features), ("in_features", in_features)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
    if not (layout if tiled else reference).supports(bits):
        raise ValueError(f"{bits} bits are not stored in the {'tiled' if tiled else 'stream'} layout")
    lead = () if experts is None else (experts,)
    groups = scale.shape[-2 if tiled else -1] if scale.ndim == 2 + len(lead) else 0
    if tiled:
        rows = out_features + -out_features % layout.ROW_ALIGNMENT
        blocks = -(-in_features // layout.block_columns(bits))
        if not _fits(bits, in_features, groups, blocks):
            raise ValueError(f"scale {_of(scale)}: {groups} groups do not fit {in_features} columns in tiles")
        _expect("packed", packed, (*lead, blocks, rows, layout.WORDS), (torch.int32,))
        _expect("scale", scale, (*lead, groups, rows), _FLOATS)
        one = zero is not None and zero.ndim == scale.ndim and zero.shape[-2] == 1
        _expect("zero", zero, (*lead, 1 if one else groups, rows), (torch.uint8,))
        _contiguous(packed=packed, scale=scale, zero=zero)
    else:
        if groups < 1 or in_features % groups:
            raise ValueError(f"scale {_of(scale)}: {groups} groups do not divide {in_features} columns")
        _expect("packed", packed, (*lead, out_features, -(-in_features * bits // 32)), (torch.int32,))
        _expect("scale", scale, (*lead, out_features, groups), _FLOATS)
        if zero is not None:
            _expect("zero", zero, (*lead, -(-out_features * bits // 32), groups), (torch.int32,))
    same_device("packed", packed, scale=scale, zero=zero)


def _fits(bits: int, in_features: int, groups: int, blocks: int) -> bool:
    """Whether `groups`, padding counted, is what the tiled layout makes of some group size."""
    if groups == 1:
        return True
    columns = blocks * layout.block_columns(bits)
    size = columns // groups if groups > 0 and columns % groups == 0 else 0
    return size > 0 and in_features % size == 0 and layout.fits(bits, in_features, in_features // size)


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    tiled: bool,
) -> None:
    """Refuse a call of `linear`. Raises ValueError or TypeError."""
    _tensors(x=x)
    weight(packed, scale, zero, bits, out_features, in_features, tiled)
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x is {_of(x)}; its last dimension must be in_features, {in_features}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x is {x.dtype}; it must be float16, bfloat16, float32 or float64")
    if bias is not None:
        _expect("bias", bias, (out_features,), _FLOATS)
        _contiguous(bias=bias)
    if order is not None:
        _expect("permutation", order, (in_features,), (torch.int32, torch.int64))
        if order.device.type == "cpu":
            permutation(order, in_features)
    same_device("x", x, packed=packed, bias=bias, permutation=order)


def experts(
    x: Tensor,
    expert_of_row: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
) -> None:
    """Refuse a call of the linear layers of experts. Raises ValueError or TypeError."""
    _tensors(x=x, packed=packed, expert_of_row=expert_of_row)
    if packed.ndim != 4 or packed.shape[0] < 1:
        raise ValueError(f"packed is {_of(packed)}; it must be [experts, blocks, rows, {layout.WORDS}]")
    count = packed.shape[0]
    weight(packed, scale, zero, bits, out_features, in_features, True, count)
    if x.ndim != 2 or x.shape[1] != in_features or x.dtype not in _FLOATS:
        raise ValueError(f"x is {_of(x)}; it must be a float [inputs, {in_features}]")
    rows = expert_of_row.shape[0] if expert_of_row.ndim == 1 else -1
    if rows < 0 or (x.shape[0] == 0) != (rows == 0) or (rows and rows % x.shape[0]):
        raise ValueError(f"expert_of_row is {_of(expert_of_row)}; its length must be a multiple of the {len(x)} inputs")
    _expect("expert_of_row", expert_of_row, (rows,), (torch.int32, torch.int64))
    if bias is not None:
        _expect("bias", bias, (count, out_features), _FLOATS)
        _contiguous(bias=bias)
    same_device("x", x, packed=packed, bias=bias, expert_of_row=expert_of_row)


def permutation(order: Tensor, in_features: int) -> None:
    """Refuse an order of input columns that is no permutation. Raises ValueError. Waits for the device it is on."""
    _expect("permutation", order, (in_features,), (torch.int32, torch.int64))
    outside = (order < 0) | (order >= in_features)
    if outside.any():
        raise ValueError(f"permutation holds {order[outside][0].item()}; columns are numbered 0 to {in_features - 1}")
    seen = torch.zeros(in_features, dtype=torch.bool, device=order.device).index_fill_(0, order.long(), True)
    if not seen.all():
        raise ValueError(f"permutation leaves out column {(~seen).nonzero()[0].item()} and repeats another")


def output(dtype: torch.dtype) -> None:
    """Refuse a dtype that no weight has. Raises TypeError."""
    if dtype not in _FLOATS:
        raise TypeError(f"dtype is {dtype}; it must be float16, bfloat16, float32 or float64")


def _tensors(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {'absent' if value is None else type(value).__name__}; it must be a tensor")


def _contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous, strides {list(tensor.stride())}; the kernels take it as it lies"
            )


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {_of(tensor)}; it must be {list(shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; it must be {' or '.join(str(dtype) for dtype in dtypes)}")


def same_device(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors that are on several devices. Raises ValueError."""
    for other, value in others.items():
        if value is not None and value.device != tensor.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {other} on {value.device}; move the layer to x's device"
            )


def _of(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
