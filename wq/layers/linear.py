"""`WqLinear`: an `nn.Linear` whose weight stays packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wq.formats import bits as bit_stream
from wq.layers import ops
from wq.scheme import Scheme


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

    @property
    def data(self) -> Tensor:
        raise RuntimeError("this weight is packed; call model.dequantize() first, for example to merge an adapter")


class WqLinear(nn.Linear):
    """A linear layer on packed weights, with the parameters of a compressed-tensors checkpoint.

    weight_packed: int32 `[out, words(in)]`. weight_scale: float `[out, groups]`. weight_zero_point: int32
    `[words(out), groups]`, or None on a symmetric grid. bias: float `[out]` or None. Parameters, not buffers, so that
    offloading and tensor parallelism handle them; a subclass of nn.Linear, so that adapters find it.
    """

    weight_zero_point: nn.Parameter | None
    _hf_quantized_needs_local_tp = True  # tensor parallelism then hands forward plain local tensors

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, dtype: torch.dtype | None = None
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self._is_hf_initialized = True
        groups = scheme.groups(in_features)
        scale = dtype or torch.get_default_dtype()
        self.weight_packed = _empty(out_features, bit_stream.words(in_features, scheme.bits), dtype=torch.int32)
        self.weight_scale = _empty(out_features, groups, dtype=scale)
        zero_point = _empty(bit_stream.words(out_features, scheme.bits), groups, dtype=torch.int32)
        self.register_parameter("weight_zero_point", None if scheme.symmetric else zero_point)
        self.register_parameter("bias", _empty(out_features, dtype=scale) if bias else None)

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias` for x `[..., in]`."""
        return ops.linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.scheme.bits,
            self.in_features,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, `[out, in]`."""
        return ops.dequantize(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.scheme.bits,
            self.in_features,
            dtype or self.weight_scale.dtype,
        )

    def extra_repr(self) -> str:
        grid = "symmetric" if self.scheme.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.scheme.bits}, group_size={self.scheme.group_size}, {grid}"
        )


def _empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without storage; loading gives it one."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)
