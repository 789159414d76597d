"""`WqLinear`: an `nn.Linear` whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wq_kernels
from wq.layers import ops
from wq.layers.parts import Join, join, local
from wq.scheme import Scheme
from wq_kernels import layout as tiles
from wq_kernels import stream as bit_stream

_WEIGHT = ("weight_packed", "weight_scale", "weight_zero_point")  # what is laid out


class PackedWeight:
    """What `WqLinear.weight` returns: the shape, dtype and device of the weight, without its values.

    Much modeling code asks a linear for `weight.dtype`. This answers. It is not a Tensor, so that code which would
    cast activations to an int32 weight, or edit a throw-away dequantized copy in place (merging an adapter), fails
    loudly instead.
    """

    _is_hf_initialized = True  # transformers' weight initialisation then leaves it alone
    requires_grad = False
    grad = None

    def __init__(self, layer: WqLinear):
        self._layer = layer

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._layer.out_features, self._layer.in_features))

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> torch.dtype:
        return self._layer.weight_scale.dtype

    @property
    def device(self) -> torch.device:
        return self._layer.weight_packed.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def dequantize(self) -> Tensor:
        """The dense weight, in the scale's dtype."""
        return self._layer.dequantize()

    def __matmul__(self, other: Tensor) -> Tensor:
        """For models that multiply by a weight themselves, as Mamba does by that of its time steps."""
        return self._layer.dequantize(other.dtype) @ other

    @property
    def data(self) -> Tensor:
        raise RuntimeError("this weight is packed; call model.dequantize() first, for example to merge an adapter")


class WqLinear(nn.Linear):
    """A linear layer on packed weights, with the parameters of a compressed-tensors checkpoint.

    weight_packed: int32 `[out, words(in)]`. weight_scale: float `[out, groups]`. weight_zero_point: int32
    `[words(out), groups]`, or None on a symmetric grid. bias: float `[out]` or None. Parameters, not buffers, so that
    offloading and tensor parallelism handle them; a subclass of nn.Linear, so that adapters find it.

    permutation: int32 `[in]`, the input column of each column of the weight where those are in another order
    (act-order), or None.

    transposed: whether the layer in whose place it stands, GPT-2's `Conv1D`, has its weight as `[in, out]`.

    part: `(out, in)` of the rows or columns that this process has, under tensor parallelism; the parameters then are
    DTensors. With some of the columns in another order, x is the whole input.

    `prepare` lays the weight out for the kernels of the device it is on, as `.to(device)` does; the state dict is the
    checkpoint's at all times. Whoever changes a scale in place calls it again: kernels on CPUs read a copy.
    """

    weight_zero_point: nn.Parameter | None
    permutation: nn.Parameter | None
    _hf_quantized_needs_local_tp = True  # tensor parallelism then hands forward plain local tensors

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        dtype: torch.dtype | None = None,
        permuted: bool = False,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.part: tuple[int, int] | None = None
        self.layout = ops.STREAM
        self._dtype: torch.dtype | None = None  # of what the weight is multiplied by, once it is known
        self._joins: dict[str, Join] = {}
        self.transposed = False
        self.register_buffer("_grid", None, persistent=False)  # made of scales and zero points, for a kernel on CPUs
        self._is_hf_initialized = True
        groups = scheme.groups(in_features)
        scale = dtype or torch.get_default_dtype()
        self.weight_packed = _empty(out_features, bit_stream.words(in_features, scheme.bits), dtype=torch.int32)
        self.weight_scale = _empty(out_features, groups, dtype=scale)
        zero_point = _empty(bit_stream.words(out_features, scheme.bits), groups, dtype=torch.int32)
        self.register_parameter("weight_zero_point", None if scheme.symmetric else zero_point)
        self.register_parameter("bias", _empty(out_features, dtype=scale) if bias else None)
        self.register_parameter("permutation", _empty(in_features, dtype=torch.int32) if permuted else None)

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias` for x `[..., in]`."""
        parameters: dict[str, Any] = self._parameters  # attributes of modules cost: this runs for every token
        grid = self._buffers["_grid"]
        permutation, bias = parameters["permutation"], parameters["bias"]
        cast = ops.autocast(x) if grid is not None and torch.is_autocast_enabled("cpu") else x
        if grid is not None and ops.ON_CPU[self.layout].computes_in(cast.dtype) and not ops.wants_gradient(x, bias):
            cast = cast if permutation is None else cast.index_select(-1, permutation)
            out_features = self.out_features if self.part is None else self.part[0]
            return ops.on_cpu(
                cast, parameters["weight_packed"], grid, bias, self.scheme.bits, out_features, self.layout
            )
        out_features, in_features = self._sizes
        if permutation is not None and in_features != self.in_features:
            x, permutation = x.index_select(-1, permutation), None
        sizes = self.scheme.bits, out_features, in_features
        return ops.linear(x, *self._weight(), permutation, bias, *sizes, self._readable)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, `[out, in]`, in the order of the input's columns."""
        sizes = self.scheme.bits, self.out_features, self.in_features
        kind = dtype or self.weight_scale.dtype
        weight = wq_kernels.dequantize(*self._weight(), *sizes, kind, self._readable)
        if self.permutation is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.permutation.long(), weight)

    # --- layouts ---

    def prepare(self, dtype: torch.dtype | None = None) -> WqLinear:
        """Lay the weight out for the device it is on. Weights on no device, or offloaded, stay as they are.

        dtype: of what it is going to be multiplied by, which the kernel on CPUs depends on.
        """
        self._dtype = dtype or self._dtype
        if self.weight_packed.is_meta:
            return self
        out_features, in_features = self._sizes
        groups = max(1, self.scheme.groups(self.in_features) * in_features // self.in_features)
        sizes = self.scheme.bits, out_features, in_features, groups
        self._set_layout(wq_kernels.preferred_layout(self.weight_packed.device, *sizes, self._dtype))
        return self

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.part or (self.out_features, self.in_features)

    def _set_layout(self, layout: str) -> None:
        if layout != self.layout:
            packed, scale, zero = self._stream()
            sizes = self.scheme.bits, self._sizes[1]
            if self.layout == ops.STREAM:
                self._joins = {name: join(getattr(self, name)) for name in _WEIGHT}
            if layout == ops.TILED:
                packed, scale, zero = tiles.from_stream(packed, scale, zero, *sizes)
            elif layout in ops.ON_CPU:
                packed = ops.ON_CPU[layout].from_stream(packed, *sizes)
            for name, part in zip(_WEIGHT, (packed, scale, zero), strict=True):
                tensor = part if part is None or layout != ops.STREAM else self._joins[name](part)
                parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                if parameter is not None:
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(self, name, parameter)
            self.layout = layout
        self._grid = None
        if layout in ops.ON_CPU and not self.weight_packed.is_meta:
            scale, zero = self.weight_scale.detach(), self.weight_zero_point
            self._grid = ops.ON_CPU[layout].make_grid(scale, zero, self.scheme.bits, *self._sizes)

    def _stream(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scale and zero as a checkpoint has them; this process's part of them."""
        packed, scale, zero = local(self.weight_packed), local(self.weight_scale), self.weight_zero_point
        if self.layout == ops.TILED:
            assert zero is not None  # the tiled layout has zero points on every grid
            return tiles.to_stream(packed, scale, zero.detach(), self.scheme.bits, *self._sizes, self.scheme.symmetric)
        if self.layout in ops.ON_CPU:
            packed = ops.ON_CPU[self.layout].to_stream(packed, self.scheme.bits)
        return packed, scale, None if zero is None else local(zero)

    def _weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scale and zero in the layout `_readable`."""
        if self.layout in ops.ON_CPU:
            return self._stream()
        return self.weight_packed, self.weight_scale, self.weight_zero_point

    @property
    def _readable(self) -> str:
        """The layout that every op reads which is nearest to the weight's."""
        return ops.STREAM if self.layout in ops.ON_CPU else self.layout

    def __setattr__(self, name: str, value: Any) -> None:
        """accelerate, which offloads what has a hook of its, brings back the tensors of the state dict: the stream."""
        super().__setattr__(name, value)
        if name == "_hf_hook" and self.weight_packed.is_meta:
            self._set_layout(ops.STREAM)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()` and its kin: to another device, or dtype once it was prepared for one, means to the layout for it."""
        device, before = self.weight_packed.device, self._dtypes()
        super()._apply(fn, recurse)
        if self._dtype is not None or self.weight_packed.device != device:
            self.prepare(next((now for now, was in zip(self._dtypes(), before, strict=True) if now != was), None))
        return self

    def _dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Of what a cast changes, that which is made again first."""
        return None if self._grid is None else self._grid.dtype, self.weight_scale.dtype

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != ops.STREAM:
            for name, tensor in zip(_WEIGHT, self._stream(), strict=True):
                destination.pop(prefix + name, None)
                if tensor is not None:
                    destination[prefix + name] = self._joins[name](tensor)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """A state dict is in the checkpoint's layout: go there, load, and come back."""
        layout = self.layout
        self._set_layout(ops.STREAM)
        super()._load_from_state_dict(*args, **kwargs)
        self._set_layout(layout)

    def extra_repr(self) -> str:
        grid = "symmetric" if self.scheme.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.scheme.bits}, group_size={self.scheme.group_size}, {grid}"
        )


def _empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without storage; loading gives it one."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)
