"""AWQ `gemm`, as AutoAWQ writes it: 4 bits only, with zero points.

    qweight  int32 [in, out / 8]       packed along out_features
    qzeros   int32 [groups, out / 8]
    scales   fp16  [groups, out]

The eight columns of a word lie in the order 0 2 4 6 1 3 5 7. A symmetric grid is stored with its zero point 8, which
every reader understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wq.errors import CheckpointError, FormatError
from wq.formats import stored
from wq.formats.stored import Leaf, Packed, Read, Stored
from wq.scheme import PER_CHANNEL, Scheme
from wq.solvers import Solution
from wq_kernels import stream as bits

QUANT_METHOD = "awq"
LEAVES = ("qweight", "qzeros", "scales")

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column _ORDER[i]
_INVERSE = tuple(_ORDER.index(column) for column in range(8))


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise FormatError or GroupSizeError when AWQ cannot hold this layer."""
    if scheme.bits != 4:
        raise FormatError(
            f"awq holds 4 bits, not {scheme.bits}. Use --bits 4, or --format compressed-tensors for {scheme.bits} bits."
        )
    scheme.groups(shape[1], name)
    if scheme.scale_dtype != "float16":
        raise FormatError(f"{name}: awq stores float16 scales, not {scheme.scale_dtype}. Use --dtype float16.")
    if shape[0] % 8:
        raise FormatError(
            f"{name}: awq packs 8 output rows in a word and out_features is {shape[0]}. "
            f"Use --format compressed-tensors, or --keep {name.rpartition('.')[2]}."
        )


def pack(solution: Solution, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors by local name."""
    return {
        "qweight": _pack(solution.codes.t()),
        "qzeros": _pack(solution.zero.t()),
        "scales": solution.scale.t().contiguous(),
    }


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Solution:
    """Codes, scales and zero points again."""
    codes, zero = (_unpack(tensors[name]).t().contiguous() for name in ("qweight", "qzeros"))
    return Solution(codes, tensors["scales"].t().contiguous(), zero, {})


def config(scheme: Scheme, dense: list[str]) -> dict[str, Any]:
    """`quantization_config`; dense modules go to `modules_to_not_convert`."""
    return {
        "quant_method": QUANT_METHOD,
        "bits": 4,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(dense),
    }


def inspect(
    leaves: Mapping[str, Leaf], shape: tuple[int, int], config: Mapping[str, Any] | None, read: Read, name: str
) -> Stored:
    """What the tensors of a layer say, as AutoAWQ, GPTQModel and AutoRound write them. Raises CheckpointError."""
    version = stored.declared(config, "version") or stored.declared(config, "format") or "gemm"
    if str(version).lower() != "gemm":
        raise CheckpointError(f"{name}: wq does not read the awq layout {version!r}, only gemm.")
    stored.require(name, leaves, "qweight", "qzeros", "scales")
    out_features, in_features = shape
    scales = leaves["scales"]
    groups = scales.shape[0] if scales.shape else 0
    size = stored.group_size(name, in_features, groups)
    stored.agree(name, "bits", 4, stored.declared_values(config, "bits"))
    if size != PER_CHANNEL:
        stored.agree(name, "groups of", size, stored.declared_values(config, "group_size"))
    stored.expect(name, leaves, "qweight", (in_features, out_features // 8), torch.int32)
    stored.expect(name, leaves, "scales", (groups, out_features), None)
    stored.expect(name, leaves, "qzeros", (groups, out_features // 8), torch.int32)
    symmetric = bool((_unpack(read("qzeros")) == 8).all())
    return Stored("awq", stored.scheme_of(name, 4, size, symmetric, scales.dtype), shape)


def to_packed(tensors: dict[str, Tensor], info: Stored) -> Packed:
    """Into wq's form."""
    packed = bits.pack(_unpack(tensors["qweight"]).t().contiguous(), 4)
    zero = None if info.scheme.symmetric else bits.pack(_unpack(tensors["qzeros"]), 4).t().contiguous()
    return Packed(packed, tensors["scales"].t().contiguous(), zero)


def convert_leaf(leaf: str, tensor: Tensor, info: Stored) -> Tensor:
    """One of a layer's tensors as compressed-tensors has it."""
    if leaf == "qweight":
        return bits.pack(_unpack(tensor).t().contiguous(), 4)
    return bits.pack(_unpack(tensor), 4).t().contiguous() if leaf == "qzeros" else tensor.t().contiguous()


def from_packed(weight: Packed, info: Stored) -> dict[str, Tensor]:
    """Back to the checkpoint's tensors."""
    out_features, in_features = info.shape
    codes = bits.unpack(weight.packed, 4, in_features).t()
    if weight.zero is None:
        groups = weight.scale.shape[1]
        points = torch.full((groups, out_features), 8, dtype=torch.uint8, device=codes.device)
    else:
        points = bits.unpack(weight.zero.t().contiguous(), 4, out_features)
    return {"qweight": _pack(codes), "qzeros": _pack(points), "scales": weight.scale.t().contiguous()}


def _pack(values: Tensor) -> Tensor:
    rows, count = values.shape
    ordered = values.reshape(rows, count // 8, 8)[..., list(_ORDER)]
    return bits.pack(ordered.reshape(rows, count), 4)


def _unpack(stream: Tensor) -> Tensor:
    rows, width = stream.shape
    ordered = bits.unpack(stream, 4, width * 8).reshape(rows, width, 8)
    return ordered[..., list(_INVERSE)].reshape(rows, width * 8)
