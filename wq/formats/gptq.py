"""GPTQ, as AutoGPTQ and GPTQModel write it: for older stacks, and for vLLM's 4- and 8-bit symmetric path.

    qweight  int32 [words(in), out]     codes along in_features
    qzeros   int32 [groups, words(out)]
    scales   fp16  [groups, out]
    g_idx    int32 [in]                 the group of each column; in order when wq writes it

Version 1 stores `zero - 1`, and readers disagree about the zero point 0, which it stores as all ones. So version 1 is
written for symmetric grids only, and version 2 (`checkpoint_format: gptq_v2`), which stores the zero point itself, for
asymmetric ones. Version 1 is read as GPTQModel does: 2-, 4- and 8-bit words are added to as a whole, carries included,
which undoes how it writes them; fields of other widths one by one. AutoRound's 5, 6 and 7 bits are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wq.errors import CheckpointError, FormatError
from wq.formats import stored
from wq.formats.stored import Leaf, Packed, Read, Stored
from wq.scheme import PER_CHANNEL, Scheme, Targets
from wq.solvers import Solution
from wq_kernels import stream as bits

QUANT_METHOD = "gptq"
LEAVES = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)
_AUTO_ROUND_BITS = (5, 6, 7)  # as one stream; GPTQModel has another layout for them
_KERNELS = ("exllamav2", "triton", "tritonv2")  # AutoRound once named one after the layout; it changes nothing


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Raise FormatError or GroupSizeError when GPTQ cannot hold this layer."""
    if scheme.bits not in _BITS:
        raise FormatError(f"{name}: gptq holds 2, 3, 4 or 8 bits, not {scheme.bits}. Use --format compressed-tensors.")
    scheme.groups(shape[1], name)
    if scheme.scale_dtype != "float16":
        raise FormatError(f"{name}: gptq stores float16 scales, not {scheme.scale_dtype}. Use --dtype float16.")
    for label, size in (("out_features", shape[0]), ("in_features", shape[1])):
        if size % 32:
            raise FormatError(
                f"{name}: gptq packs 32 values at a time and {label} is {size}. "
                f"Use --format compressed-tensors, or --keep {name.rpartition('.')[2]}."
            )


def pack(solution: Solution, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors by local name; version 1 if the scheme is symmetric, else version 2."""
    in_features, groups = solution.codes.shape[1], solution.scale.shape[1]
    stored_zero = solution.zero - 1 if scheme.symmetric else solution.zero
    return {
        "qweight": bits.pack(solution.codes, scheme.bits).t().contiguous(),
        "qzeros": bits.pack(stored_zero.t(), scheme.bits),
        "scales": solution.scale.t().contiguous(),
        "g_idx": (torch.arange(in_features) // (in_features // groups)).to(torch.int32),
    }


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Solution:
    """Codes, scales and zero points again."""
    out_features, in_features = shape
    codes = bits.unpack(tensors["qweight"].t().contiguous(), scheme.bits, in_features)
    zero = bits.unpack(tensors["qzeros"], scheme.bits, out_features).t().contiguous()
    if scheme.symmetric:
        zero = zero + 1
    return Solution(codes, tensors["scales"].t().contiguous(), zero, {})


def config(scheme: Scheme, dense: list[str], mixed: Sequence[Targets] = ()) -> dict[str, Any]:
    """`quantization_config`; dense modules but the head are excluded by GPTQModel's `dynamic` rules.

    Layers of another width than `scheme` have rules of their own, also under the names that vLLM and SGLang look them
    up by when they join them. Raises FormatError where some layers are symmetric and some are not: version 1 or 2 is
    all layers' choice.
    """
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in sorted(dense) if name != "lm_head"}
    for one in mixed:
        changed = _changed(one, scheme)
        names = [*one.names, one.joined] if one.joined else one.names
        if changed:
            rules |= {f"+:^{re.escape(name)}$": changed for name in names}
            rules |= {rf"+:{one.experts}(\.|$)": changed} if one.experts else {}
    values = {
        "quant_method": QUANT_METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "pack_dtype": "int32",
    }
    return values | ({"dynamic": rules} if rules else {})


def _changed(one: Targets, scheme: Scheme) -> dict[str, int]:
    """What a rule has to say of layers."""
    own = one.scheme
    if own.symmetric != scheme.symmetric:
        name = (*one.names, one.experts)[0]
        raise FormatError(f"{name}: gptq has symmetric layers or asymmetric ones, not both. Use compressed-tensors.")
    changed = {"bits": own.bits} if own.bits != scheme.bits else {}
    return changed | ({"group_size": own.group_size} if own.group_size != scheme.group_size else {})


def inspect(
    leaves: Mapping[str, Leaf], shape: tuple[int, int], config: Mapping[str, Any] | None, read: Read, name: str
) -> Stored:
    """What the tensors of a layer say, as GPTQModel, AutoGPTQ and AutoRound write them. Raises CheckpointError."""
    version = _version(config, name)
    stored.require(name, leaves, "qweight", "qzeros", "scales")
    out_features, in_features = shape
    rows = leaves["qweight"].shape[0] if leaves["qweight"].shape else 0
    width = rows * 32 // in_features
    by_auto_round = "auto-round" in str(stored.declared(config, "quant_method"))
    if width not in (_BITS + _AUTO_ROUND_BITS if by_auto_round else _BITS):
        raise CheckpointError(f"{name}.qweight is {list(leaves['qweight'].shape)}: no 2, 3, 4 or 8 bits for {shape}.")
    scales = leaves["scales"]
    groups = scales.shape[0] if scales.shape else 0
    index = None
    if "g_idx" in leaves:
        stored.expect(name, leaves, "g_idx", (in_features,), torch.int32)
        index = read("g_idx")
    said = stored.declared_values(config, "group_size")
    if index is not None and not said:
        said = {int(index.unique(return_counts=True)[1].max())}
    size, ragged = stored.group_size(name, in_features, groups, said)
    stored.expect(name, leaves, "qweight", (bits.words(in_features, width), out_features), torch.int32)
    stored.expect(name, leaves, "scales", (groups, out_features), None)
    stored.expect(name, leaves, "qzeros", (groups, bits.words(out_features, width)), torch.int32)
    stored.agree(name, "bits", width, stored.declared_values(config, "bits"))
    if size != PER_CHANNEL:
        stored.agree(name, "groups of", ragged or size, said)
    if stored.declared(config, "desc_act") is True and groups > 1:
        stored.require(name, leaves, "g_idx")
    permuted = index is not None and stored.column_order(name, index, in_features, groups, ragged) is not None
    zero = _zero_points(read("qzeros"), width, out_features, version)
    symmetric = bool((zero == 1 << (width - 1)).all())
    variant = version if index is not None else f"{version} without g_idx"
    scheme = stored.scheme_of(name, width, size, symmetric, scales.dtype)
    return Stored("gptq", scheme, shape, variant, permuted, ragged)


def _version(config: Mapping[str, Any] | None, name: str) -> str:
    """Version "1" or "2". GPTQModel says it in `checkpoint_format`, AutoRound in `packing_format`, once in `backend`.

    Raises CheckpointError for a layout that is neither.
    """
    layout = stored.first_declared(config, "packing_format", "checkpoint_format")
    if layout is None and "auto-round" in str(stored.declared(config, "quant_method")):
        # Without a name, as AutoRound chooses: version 1 wherever it can hold the zero points.
        layout = stored.first_declared(config, "backend")
        layout = layout or ("auto_round" if stored.declared(config, "sym") is False else "auto_round:auto_gptq")
    match tuple(part for part in str("gptq" if layout is None else layout).split(":") if part not in _KERNELS):
        case ("gptq",) | ("auto_gptq",) | ("auto_round", "gptq") | ("auto_round", "auto_gptq"):
            return "1"
        case ("gptq_v2",) | ("auto_round",) | ("auto_round", "gptqmodel"):
            return "2"
    raise CheckpointError(f"{name}: wq does not read the gptq layout {layout!r}.")


def to_packed(tensors: dict[str, Tensor], info: Stored) -> Packed:
    """Into wq's form: transposed, zero points without their offset, columns sorted by group."""
    out_features, in_features = info.shape
    width, groups = info.scheme.bits, tensors["scales"].shape[0]
    packed = tensors["qweight"].t().contiguous()
    order = None
    if info.permuted:
        order = stored.column_order("", tensors["g_idx"].cpu(), in_features, groups, info.ragged)
        assert order is not None
        order = order.to(packed.device)
        packed = bits.pack(bits.unpack(packed, width, in_features)[:, order.long()], width)
    zero = None
    if not info.scheme.symmetric:
        points = _zero_points(tensors["qzeros"], width, out_features, info.variant[0])
        zero = stored.finer(bits.pack(points, width).t(), info).contiguous()
    return Packed(packed, stored.finer(tensors["scales"].t(), info).contiguous(), zero, order)


def convert_leaf(leaf: str, tensor: Tensor, info: Stored) -> Tensor:
    """One of a layer's tensors as compressed-tensors has it, for layers whose columns are in order."""
    if leaf == "qzeros":
        points = _zero_points(tensor, info.scheme.bits, info.shape[0], info.variant[0])
        return stored.finer(bits.pack(points, info.scheme.bits).t(), info).contiguous()
    return (stored.finer(tensor.t(), info) if leaf == "scales" else tensor.t()).contiguous()


def from_packed(weight: Packed, info: Stored) -> dict[str, Tensor]:
    """Back to the checkpoint's tensors."""
    out_features, in_features = info.shape
    width, packed, scale = info.scheme.bits, weight.packed, stored.coarser(weight.scale, info)
    groups = scale.shape[1]
    if weight.permutation is not None:
        codes = bits.unpack(packed, width, in_features)
        packed = bits.pack(torch.empty_like(codes).index_copy_(1, weight.permutation.long(), codes), width)
    if weight.zero is None:
        points = torch.full((groups, out_features), info.scheme.midpoint, dtype=torch.uint8, device=packed.device)
    else:
        points = bits.unpack(stored.coarser(weight.zero, info).t().contiguous(), width, out_features)
    tensors = {
        "qweight": packed.t().contiguous(),
        "qzeros": _store_zero_points(points, width, info.variant[0]),
        "scales": scale.t().contiguous(),
    }
    if "without" not in info.variant:
        tensors["g_idx"] = stored.group_index(weight.permutation, in_features, groups, info.ragged).to(packed.device)
    return tensors


def _zero_points(qzeros: Tensor, width: int, out_features: int, version: str) -> Tensor:
    """uint8 `[groups, out]`."""
    aligned = 32 % width == 0
    if version == "1" and aligned:
        qzeros = qzeros + _ones(width)
    points = bits.unpack(qzeros, width, out_features)
    return points if version == "2" or aligned else (points + 1) & ((1 << width) - 1)


def _store_zero_points(points: Tensor, width: int, version: str) -> Tensor:
    """The inverse of `_zero_points`."""
    aligned = 32 % width == 0
    if version == "1" and not aligned:
        points = (points - 1) & ((1 << width) - 1)
    qzeros = bits.pack(points, width)
    return qzeros - _ones(width) if version == "1" and aligned else qzeros


def _ones(width: int) -> int:
    """A one in every field of an int32 word; sums with it wrap around as int32 does."""
    return sum(1 << i for i in range(0, 32, width))
