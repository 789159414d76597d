"""AWQ `gemm`, as AutoAWQ writes it: with zero points, written at 4 bits only.

    qweight  int32 [in, out / 8]       packed along out_features
    qzeros   int32 [groups, out / 8]
    scales   fp16  [groups, out]

The eight columns of a word lie in the order 0 2 4 6 1 3 5 7. A symmetric grid is stored with its zero point 8, which
every reader understands.

Read as well are other widths, in GPTQModel's and AutoRound's manner, and AutoAWQ's `gemv`, which packs the other way:

    qweight  int32 [out, in / 8]       qzeros  int32 [out, words]       scales  fp16 [out, 8 * words]

with columns and groups in order. `gemv_fast` is not: it rounds `scale * zero` to fp16, which no integer grid has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wq.errors import CheckpointError, FormatError
from wq.formats import stored
from wq.formats.stored import Leaf, Packed, Read, Stored
from wq.scheme import PER_CHANNEL, STORED_BITS, Scheme, Targets
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


def config(scheme: Scheme, dense: list[str], mixed: Sequence[Targets] = ()) -> dict[str, Any]:
    """`quantization_config`; dense modules go to `modules_to_not_convert`. Raises FormatError for several schemes."""
    if any(one.scheme != scheme for one in mixed):
        raise FormatError("awq has one scheme for all layers. Use --format compressed-tensors or gptq.")
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
    layout = version(config)
    if layout not in ("gemm", "gemv"):
        raise CheckpointError(f"{name}: wq does not read the awq layout {layout!r}, only gemm and gemv.")
    stored.require(name, leaves, "qweight", "qzeros", "scales")
    if layout == "gemv":
        return _inspect_gemv(leaves, shape, config, read, name)
    out_features, in_features = shape
    scales, words = leaves["scales"], leaves["qweight"].shape[-1] if leaves["qweight"].shape else 0
    groups = scales.shape[0] if scales.shape else 0
    size, _ = stored.group_size(name, in_features, groups)
    width = words * 32 // out_features
    if width not in STORED_BITS:
        raise CheckpointError(f"{name}.qweight is {list(leaves['qweight'].shape)}: no 2 to 8 bits for {list(shape)}.")
    stored.agree(name, "bits", width, stored.declared_values(config, "bits"))
    if size != PER_CHANNEL:
        stored.agree(name, "groups of", size, stored.declared_values(config, "group_size"))
    words = bits.words(out_features, width)
    stored.expect(name, leaves, "qweight", (in_features, words), torch.int32)
    stored.expect(name, leaves, "scales", (groups, out_features), None)
    stored.expect(name, leaves, "qzeros", (groups, words), torch.int32)
    # GPTQModel shuffles columns at 4 bits alone, AutoRound at 5 to 7 too.
    shuffled = width == 4 or (width in (5, 6, 7) and stored.declared(config, "packing_format") is not None)
    variant = "" if shuffled else "in order"
    symmetric = bool((_unpack(read("qzeros"), width, shuffled) == 1 << (width - 1)).all())
    return Stored("awq", stored.scheme_of(name, width, size, symmetric, scales.dtype), shape, variant)


def version(config: Mapping[str, Any] | None) -> str:
    """The layout that a config names, in lower case; gemm unless it says otherwise."""
    layout = stored.first_declared(config, "version", "format")
    return "gemm" if layout is None else str(layout)[:100].lower()


def _inspect_gemv(
    leaves: Mapping[str, Leaf], shape: tuple[int, int], config: Mapping[str, Any] | None, read: Read, name: str
) -> Stored:
    """AutoAWQ's layout for one row of input. Its scales are padded, so that only the config knows the group size."""
    out_features, in_features = shape
    said = stored.declared_values(config, "group_size")
    if len(said) != 1:
        raise CheckpointError(f"{name}: config.json must say one group_size for the awq layout gemv.")
    size = said.pop()
    size = PER_CHANNEL if size in (PER_CHANNEL, in_features) else size
    scheme = stored.scheme_of(name, 4, size, False, leaves["scales"].dtype)
    groups = scheme.groups(in_features, name)
    stored.agree(name, "bits", 4, stored.declared_values(config, "bits"))
    words = _gemv_words(groups, in_features)
    stored.expect(name, leaves, "qweight", (out_features, bits.words(in_features, 4)), torch.int32)
    stored.expect(name, leaves, "scales", (out_features, words * 8), None)
    stored.expect(name, leaves, "qzeros", (out_features, words), torch.int32)
    symmetric = bool((bits.unpack(read("qzeros"), 4, groups) == 8).all())
    return Stored("awq", stored.scheme_of(name, 4, size, symmetric, leaves["scales"].dtype), shape, "gemv")


def to_packed(tensors: dict[str, Tensor], info: Stored) -> Packed:
    """Into wq's form."""
    leaves = {leaf: convert_leaf(leaf, tensors[leaf], info) for leaf in LEAVES}
    return Packed(leaves["qweight"], leaves["scales"], None if info.scheme.symmetric else leaves["qzeros"])


def convert_leaf(leaf: str, tensor: Tensor, info: Stored) -> Tensor:
    """One of a layer's tensors as compressed-tensors has it."""
    width = info.scheme.bits
    if info.variant == "gemv":
        groups = info.scheme.groups(info.shape[1])
        if leaf == "qzeros":
            return bits.pack(bits.unpack(tensor, 4, groups).t().contiguous(), 4).t().contiguous()
        return tensor[:, :groups].contiguous() if leaf == "scales" else tensor
    if leaf == "scales":
        return tensor.t().contiguous()
    if leaf == "qweight" and width == 4 and not info.variant and len(tensor) % 8 == 0:
        return _turned(tensor)
    values = _unpack(tensor, width, not info.variant)
    return bits.pack(values, width).t().contiguous() if leaf == "qzeros" else bits.pack(values.t().contiguous(), width)


def _turned(stream: Tensor) -> Tensor:
    """`pack(_unpack(stream).t())` for 4 bits, `[in, out / 8]` to `[out, in / 8]`, without a byte for each code.

    Eight rows of words are an 8 × 8 matrix of nibbles each, which is transposed in three rounds of exchanges (Warren,
    Hacker's Delight, section 7-3).
    """
    rows, count = stream.shape
    words = stream.reshape(rows // 8, 8, count).clone()
    for step, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = words.view(rows // 8, 4 // step, 2, step, count)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        change = ((low >> (4 * step)) ^ high) & mask
        high ^= change
        low ^= change << (4 * step)
    return words[:, list(_INVERSE)].permute(2, 1, 0).reshape(count * 8, rows // 8).contiguous()


def from_packed(weight: Packed, info: Stored) -> dict[str, Tensor]:
    """Back to the checkpoint's tensors."""
    out_features, in_features = info.shape
    width, groups = info.scheme.bits, weight.scale.shape[1]
    if weight.zero is None:
        shape = (groups, out_features)
        points = torch.full(shape, info.scheme.midpoint, dtype=torch.uint8, device=weight.scale.device)
    else:
        points = bits.unpack(weight.zero.t().contiguous(), width, out_features)
    if info.variant == "gemv":
        empty = _gemv_words(groups, in_features) * 8 - groups
        padded = (torch.nn.functional.pad(rows, (0, empty)) for rows in (points.t(), weight.scale))
        points, scales = (rows.contiguous() for rows in padded)
        return {"qweight": weight.packed, "qzeros": bits.pack(points, 4), "scales": scales}
    codes = bits.unpack(weight.packed, width, in_features).t()
    qweight, qzeros = (_pack(values.contiguous(), width, not info.variant) for values in (codes, points))
    return {"qweight": qweight, "qzeros": qzeros, "scales": weight.scale.t().contiguous()}


def _gemv_words(groups: int, in_features: int) -> int:
    """Words of zero points in a row of gemv: rows of small groups are padded to a multiple of two or four."""
    words, step = bits.words(groups, 4), {32: 4, 64: 2}.get(in_features // groups, 1)
    return -(-words // step) * step


def _pack(values: Tensor, width: int = 4, shuffled: bool = True) -> Tensor:
    rows, count = values.shape
    if shuffled:
        values = values.reshape(rows, count // 8, 8)[..., list(_ORDER)].reshape(rows, count)
    return bits.pack(values, width)


def _unpack(stream: Tensor, width: int = 4, shuffled: bool = True) -> Tensor:
    rows, count = stream.shape[0], stream.shape[1] * 32 // width
    values = bits.unpack(stream, width, count)
    return values.reshape(rows, count // 8, 8)[..., list(_INVERSE)].reshape(rows, count) if shuffled else values
