"""Experts on packed weights: one projection of all experts as a module, and the product that runs them in one launch.

transformers keeps the experts of a layer as 3-D parameters and lets others register how they are multiplied.
`ExpertWeight` takes the place of such a parameter. Indexing it dequantizes the experts asked for, so that
transformers' own implementations run on it unchanged; `forward` is the one registered as `wq`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wq.layers import ops
from wq.layers.parts import Join, join, local, whole
from wq.scheme import Scheme
from wq_kernels import layout as tiles
from wq_kernels import stream as bit_stream

IMPLEMENTATION = "wq"  # its name in transformers' registry


def width_of(bits: int) -> int:
    """How many bits experts with codes of so many take in memory: the next width that the tiles have."""
    return next(width for width in (2, 4, 8) if width >= bits)


class ExpertWeight(nn.Module):
    """Weights `[experts, out, in]`, packed on one scheme, in the tiled layout.

    weight_packed: int32 `[experts, blocks, out, 16]`. weight_scale: float `[experts, groups, out]`. weight_zero_point:
    uint8 `[experts, groups or 1, out]`. `out` and `in` are padded; see `wq_kernels.layout`.
    transposed: whether the parameter that this replaces was `[experts, in, out]`, which is what indexing gives then.
    width: bits of a code here; 3 of a checkpoint are held as 4, with the same values.

    split: whether, under tensor or expert parallelism, it holds and says the sizes of this process's part only.
    """

    def __init__(self, experts: int, out_features: int, in_features: int, scheme: Scheme, transposed: bool = False):
        super().__init__()
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.scheme, self.transposed = scheme, transposed
        self.width = width_of(scheme.bits)
        self.split = False
        self._joins: tuple[Join | None, ...] = ()
        self.weight_packed: nn.Parameter
        self.weight_scale: nn.Parameter
        self.weight_zero_point: nn.Parameter

    @classmethod
    def from_stream(
        cls,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        in_features: int,
        scheme: Scheme,
        transposed: bool = False,
    ) -> ExpertWeight:
        """From tensors in the layout of checkpoints, DTensors too, with a dimension of experts before the others."""
        split = hasattr(packed, "placements")
        joins = tuple(None if tensor is None else join(tensor) for tensor in (packed, scale, zero))
        in_features = in_features * local(packed).shape[2] // packed.shape[2]
        packed, scale, zero = local(packed), local(scale), None if zero is None else local(zero)
        weight = cls(packed.shape[0], packed.shape[1], in_features, scheme, transposed)
        weight.split, weight._joins = split, joins
        parts = []
        for expert, (words, scales) in enumerate(zip(packed, scale, strict=True)):
            words, points = weight._widened(words, scales, None if zero is None else zero[expert])
            parts.append(tiles.from_stream(words, scales, points, weight.width, in_features))
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        for name, tensors in zip(names, zip(*parts, strict=True), strict=True):
            weight.register_parameter(name, nn.Parameter(torch.stack(tensors), requires_grad=False))
        return weight

    def stream(self, expert: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scale and zero point of one expert as a checkpoint has them."""
        tensors = self.weight_packed[expert], self.weight_scale[expert], self.weight_zero_point[expert]
        sizes, bits = (self.width, self.out_features, self.in_features), self.scheme.bits
        if self.width == bits:
            return tiles.to_stream(*tensors, *sizes, self.scheme.symmetric)
        packed, scale, zero = tiles.to_stream(*tensors, *sizes, False)
        assert zero is not None
        packed = _repacked(packed, self.width, bits, self.in_features)
        points = None if self.scheme.symmetric else _repacked(zero.t(), self.width, bits, self.out_features).t()
        return packed, scale, None if points is None else points.contiguous()

    def _widened(self, packed: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One expert's codes and zero points in `width` bits; those of a symmetric grid must be given then, too."""
        bits = self.scheme.bits
        if self.width == bits:
            return packed, zero
        if zero is None:
            points = torch.full_like(scale.t(), self.scheme.midpoint, dtype=torch.uint8)
            zero = bit_stream.pack(points.contiguous(), self.width)
        else:
            zero = _repacked(zero.t(), bits, self.width, self.out_features)
        return _repacked(packed, bits, self.width, self.in_features), zero.t().contiguous()

    def streams(self) -> tuple[Tensor | None, ...]:
        """The same of all experts, stacked. What processes share is put together: each must call this."""
        stacks = zip(*(self.stream(expert) for expert in range(self.experts)), strict=True)
        return tuple(
            None if parts[0] is None or rejoin is None else whole(rejoin(torch.stack(parts)))
            for parts, rejoin in zip(stacks, self._joins, strict=True)
        )

    @property
    def shape(self) -> torch.Size:
        sizes = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return torch.Size((self.experts, *sizes))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_scale.dtype

    @property
    def device(self) -> torch.device:
        return self.weight_packed.device

    def __getitem__(self, index: Any) -> Tensor:
        """The dense weight of the expert, or experts, at `index`."""
        wanted = torch.arange(self.experts, device=self.device)[index]
        sizes = (self.width, self.out_features, self.in_features, self.dtype)
        dense = [
            tiles.dequantize(self.weight_packed[e], self.weight_scale[e], self.weight_zero_point[e], *sizes)
            for e in wanted.reshape(-1).tolist()
        ]
        whole = torch.stack(dense) if dense else torch.empty(0, dtype=self.dtype, device=self.device)
        stacked = whole.reshape(*wanted.shape, self.out_features, self.in_features)
        return stacked.transpose(-1, -2) if self.transposed else stacked

    def linear(self, x: Tensor, expert_of_row: Tensor, bias: Tensor | None = None) -> Tensor:
        """Row r: input `r // (rows / inputs)` times the weight of its expert, `[rows, out]`."""
        y: Tensor = self(x, expert_of_row, bias)  # a call, so that accelerate's hooks see it
        return y

    def forward(self, x: Tensor, expert_of_row: Tensor, bias: Tensor | None) -> Tensor:
        return ops.expert_linear(
            x,
            expert_of_row,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            bias,
            self.width,
            self.out_features,
            self.in_features,
        )

    def extra_repr(self) -> str:
        grid = "symmetric" if self.scheme.symmetric else "asymmetric"
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.scheme.bits}, group_size={self.scheme.group_size}, {grid}"
        )


def _repacked(words: Tensor, bits: int, width: int, count: int) -> Tensor:
    """A stream of codes in words of another width."""
    return bit_stream.pack(bit_stream.unpack(words.contiguous(), bits, count), width)


class OffloadedExperts:
    """In the place of an `ExpertWeight` whose tensors accelerate moves in and out: laid out anew whenever it is used.

    module: the one that has them as parameters, in the layout of checkpoints, `name` and a suffix.
    """

    def __init__(self, module: nn.Module, name: str, in_features: int, scheme: Scheme, transposed: bool):
        self.module, self.name, self.scheme = module, name, scheme
        self.in_features, self.transposed = in_features, transposed

    def parameter(self, leaf: str) -> Any:
        return self.module._parameters.get(f"{self.name}_{leaf}")

    def present(self) -> ExpertWeight:
        """The weight, while its tensors are on a device."""
        packed, scale, zero = (self.parameter(leaf) for leaf in ("packed", "scale", "zero_point"))
        return ExpertWeight.from_stream(packed, scale, zero, self.in_features, self.scheme, self.transposed)

    @property
    def experts(self) -> int:
        return int(self.parameter("packed").shape[0])

    @property
    def shape(self) -> torch.Size:
        rows = self.parameter("packed").shape[1]
        return torch.Size((self.experts, *((self.in_features, rows) if self.transposed else (rows, self.in_features))))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.parameter("scale").dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.parameter("packed").device
        return device

    def __getitem__(self, index: Any) -> Tensor:
        return self.present()[index]

    def linear(self, x: Tensor, expert_of_row: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.present().linear(x, expert_of_row, bias)


def forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer, for hidden states `[tokens, hidden]` routed to `top_k_index` `[tokens, k]`.

    `experts` has the attributes that transformers' `use_experts_implementation` gives. An index that is no expert
    (another process has it) contributes nothing. Sums over experts are in float32.
    """
    expert_of_row = top_k_index.reshape(-1)
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    bias = (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias) if experts.has_bias else None
    inner = first.linear(hidden_states, expert_of_row, bias)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    y = experts.down_proj.linear(inner, expert_of_row, experts.down_proj_bias if experts.has_bias else None)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    weighted = y.float() * top_k_weights.reshape(-1, 1).float()
    weighted = weighted.masked_fill((expert_of_row < 0).logical_or(expert_of_row >= first.experts).unsqueeze(1), 0.0)
    return weighted.view(*top_k_index.shape, weighted.shape[1]).sum(1).to(hidden_states.dtype)
