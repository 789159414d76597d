"""AWQ `gemm`, as AutoAWQ writes it: 4 bits only, with zero points.

    qweight  int32 [in, out / 8]       packed along out_features
    qzeros   int32 [groups, out / 8]
    scales   fp16  [groups, out]

The eight columns of a word lie in the order 0 2 4 6 1 3 5 7. A symmetric grid is stored with its zero point 8, which
every reader understands.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wq.errors import FormatError
from wq.formats import bits
from wq.scheme import Scheme
from wq.solvers import Solution

QUANT_METHOD = "awq"

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


def _pack(values: Tensor) -> Tensor:
    rows, count = values.shape
    ordered = values.reshape(rows, count // 8, 8)[..., list(_ORDER)]
    return bits.pack(ordered.reshape(rows, count), 4)


def _unpack(stream: Tensor) -> Tensor:
    rows, width = stream.shape
    ordered = bits.unpack(stream, 4, width * 8).reshape(rows, width, 8)
    return ordered[..., list(_INVERSE)].reshape(rows, width * 8)
