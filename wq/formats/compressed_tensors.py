"""compressed-tensors `pack-quantized`: the default, read by vLLM, SGLang and transformers.

    weight_packed      int32 [out, words(in)]      codes along in_features
    weight_scale       float [out, groups]
    weight_zero_point  int32 [words(out), groups]  zero points along out_features; absent on a symmetric grid
    weight_shape       int64 [2]
    weight_g_idx       int32 [in]                  the group of each column, where it was quantized in another order

Checked bit for bit against compressed-tensors 0.20. Older versions packed 3, 5, 6 and 7 bits as many whole values as a
word holds, and up to 0.9.3 left zero points as signed int8 `[out, groups]`; such checkpoints are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wq.errors import CheckpointError
from wq.formats import patterns, stored
from wq.formats.stored import Leaf, Packed, Read, Stored
from wq.scheme import PER_CHANNEL, STORED_BITS, Scheme, Targets
from wq.solvers import Solution
from wq_kernels import stream as bits

QUANT_METHOD = "compressed-tensors"
LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def check(scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """Any scheme fits whose groups divide the layer. Raises GroupSizeError."""
    scheme.groups(shape[1], name)


def pack(solution: Solution, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors by local name."""
    packed = {
        "weight_packed": bits.pack(solution.codes, scheme.bits),
        "weight_scale": solution.scale.contiguous(),
        "weight_shape": torch.tensor(tuple(solution.codes.shape)),
    }
    if not scheme.symmetric:
        packed["weight_zero_point"] = bits.pack(solution.zero.t(), scheme.bits).t().contiguous()
    return packed


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Solution:
    """Codes, scales and zero points again."""
    out_features, in_features = shape
    scale = tensors["weight_scale"]
    codes = bits.unpack(tensors["weight_packed"], scheme.bits, in_features)
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.midpoint, dtype=torch.uint8)
    else:
        zero = bits.unpack(tensors["weight_zero_point"].t().contiguous(), scheme.bits, out_features).t().contiguous()
    return Solution(codes, scale, zero, {})


def config(scheme: Scheme, dense: list[str], mixed: Sequence[Targets] = ()) -> dict[str, Any]:
    """`quantization_config`; `dense` becomes its ignore list.

    A group for each scheme. Of several, each names its layers: vLLM before 0.33 and SGLang look for a class, `Linear`,
    before they look for the parts of a joined layer.
    """
    places: dict[Scheme, list[str]] = {} if mixed else {scheme: ["Linear"]}
    for one in sorted(mixed, key=lambda one: (one.scheme.bits, one.names, one.experts)):
        pattern = [rf"re:{one.experts}\.\d+\."] if one.experts else []
        places.setdefault(one.scheme, []).extend([*one.names, *pattern])
    groups = {f"group_{index}": _group(*one) for index, one in enumerate(places.items())}
    return {
        "quant_method": QUANT_METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense),
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == PER_CHANNEL
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def inspect(
    leaves: Mapping[str, Leaf], shape: tuple[int, int], config: Mapping[str, Any] | None, read: Read, name: str
) -> Stored:
    """What the tensors of a layer say. Raises CheckpointError."""
    stored.require(name, leaves, "weight_packed", "weight_scale")
    out_features, in_features = shape
    packed, scale = leaves["weight_packed"], leaves["weight_scale"]
    said = declared_weights(config, name)
    width, variant = _width(packed.shape[-1] if packed.shape else 0, in_features, _numbers(said, "num_bits"), name)
    groups = scale.shape[-1] if len(scale.shape) == 2 else 0
    size, _ = stored.group_size(name, in_features, groups)
    count = _aligned_words if variant else bits.words
    stored.expect(name, leaves, "weight_packed", (out_features, count(in_features, width)), torch.int32)
    stored.expect(name, leaves, "weight_scale", (out_features, groups), None)
    stored.agree(name, "groups of", size, {n for n in _numbers(said, "group_size") if n > 0} if groups > 1 else set())
    if said and all(weights.get("symmetric") is False for weights in said):
        stored.require(name, leaves, "weight_zero_point")
    if said and all(weights.get("actorder") in ("group", "dynamic") for weights in said):
        stored.require(name, leaves, "weight_g_idx")
    if "weight_shape" in leaves and read("weight_shape").flatten().tolist() != list(shape):
        raise CheckpointError(f"{name}.weight_shape is {read('weight_shape').tolist()}; the layer is {list(shape)}.")
    symmetric = "weight_zero_point" not in leaves
    if not symmetric and leaves["weight_zero_point"].dtype == torch.int8:
        stored.expect(name, leaves, "weight_zero_point", (out_features, groups), torch.int8)
        variant = f"{variant} with int8 zero points".strip()
    elif not symmetric:
        stored.expect(name, leaves, "weight_zero_point", (count(out_features, width), groups), torch.int32)
    permuted = False
    if "weight_g_idx" in leaves:
        stored.expect(name, leaves, "weight_g_idx", (in_features,), torch.int32)
        permuted = stored.column_order(name, read("weight_g_idx"), in_features, groups) is not None
        variant = f"{variant} with g_idx".strip()
    scheme = stored.scheme_of(name, width, size, symmetric, scale.dtype)
    return Stored("compressed-tensors", scheme, shape, variant, permuted)


def to_packed(tensors: dict[str, Tensor], info: Stored) -> Packed:
    """Into wq's form, which this format is but for the dialects of `inspect`."""
    out_features, in_features = info.shape
    width, packed, scale = info.scheme.bits, tensors["weight_packed"], tensors["weight_scale"]
    zero, order = tensors.get("weight_zero_point"), None
    if "aligned" in info.variant:
        packed = bits.pack(_unpack_aligned(packed, width, in_features), width)
        if zero is not None and zero.dtype != torch.int8:
            points = _unpack_aligned(zero.t().contiguous(), width, out_features)
            zero = bits.pack(points, width).t().contiguous()
    if zero is not None and zero.dtype == torch.int8:
        points = (zero.to(torch.int16) + info.scheme.midpoint).to(torch.uint8) & (info.scheme.levels - 1)
        zero = bits.pack(points.t().contiguous(), width).t().contiguous()
    if info.permuted:
        order = stored.column_order("", tensors["weight_g_idx"].cpu(), in_features, scale.shape[1])
        assert order is not None
        order = order.to(packed.device)
        packed = bits.pack(bits.unpack(packed, width, in_features)[:, order.long()], width)
    return Packed(packed, scale, zero, order)


def from_packed(weight: Packed, info: Stored) -> dict[str, Tensor]:
    """Back to the checkpoint's tensors."""
    out_features, in_features = info.shape
    width, packed, zero = info.scheme.bits, weight.packed, weight.zero
    if weight.permutation is not None:
        codes = bits.unpack(packed, width, in_features)
        packed = bits.pack(torch.empty_like(codes).index_copy_(1, weight.permutation.long(), codes), width)
    if zero is not None and "int8" in info.variant:
        points = bits.unpack(zero.t().contiguous(), width, out_features).t()
        zero = (points.to(torch.int16) - info.scheme.midpoint).to(torch.int8).contiguous()
    if "aligned" in info.variant:
        packed = _pack_aligned(bits.unpack(packed, width, in_features), width)
        if zero is not None and zero.dtype != torch.int8:
            points = bits.unpack(zero.t().contiguous(), width, out_features)
            zero = _pack_aligned(points, width).t().contiguous()
    tensors = {"weight_packed": packed, "weight_scale": weight.scale, "weight_shape": torch.tensor(info.shape)}
    if zero is not None:
        tensors["weight_zero_point"] = zero
    if "g_idx" in info.variant:
        groups = weight.scale.shape[1]
        tensors["weight_g_idx"] = stored.group_index(weight.permutation, in_features, groups).to(packed.device)
    return tensors


def is_plain(info: Stored) -> bool:
    """Whether the tensors are those of a `WqLinear` as they are."""
    dialect = "aligned" in info.variant or "int8" in info.variant or info.permuted
    return info.format == "compressed-tensors" and not dialect


def declared_weights(config: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """What a config says of the layer's weights: in the groups that name it, else in those that name only classes."""
    groups = stored.declared(config, "config_groups")
    named: list[Mapping[str, Any]] = []
    general: list[Mapping[str, Any]] = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights, targets = stored.declared(group, "weights"), stored.declared(group, "targets")
        if isinstance(weights, Mapping):
            ours = isinstance(targets, (list, tuple)) and any(_names(target, name) for target in targets)
            (named if ours else general).append(weights)
    return named or general


def _numbers(weights: list[Mapping[str, Any]], key: str) -> set[int]:
    return {group[key] for group in weights if type(group.get(key)) is int}


def _names(target: Any, name: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return name == target or name.endswith(f".{target}")
    return patterns.matches(target.removeprefix("re:"), name)


def _width(words: int, in_features: int, widths: set[int], name: str) -> tuple[int, str]:
    """Bits for each weight, and the dialect."""
    for width in sorted(widths & set(STORED_BITS)) if widths else STORED_BITS:
        if words == bits.words(in_features, width):
            return width, ""
    for width in sorted(widths & set(STORED_BITS)):
        if words == _aligned_words(in_features, width):
            return width, "aligned"
    says = f"config.json says {sorted(widths)}" if widths else "2 to 8 are possible"
    raise CheckpointError(
        f"{name}.weight_packed holds {words * 32 / in_features:.3g} bits for each of {in_features} columns; {says}."
    )


def _aligned_words(count: int, width: int) -> int:
    return -(-count // (32 // width))


def _pack_aligned(values: Tensor, width: int) -> Tensor:
    """`32 // width` values in each word, the rest of it empty: how older versions packed odd widths."""
    rows, count = values.shape
    each = 32 // width
    padded = torch.nn.functional.pad(values.to(torch.int64), (0, -count % each)).reshape(rows, -1, each)
    words = (padded << (torch.arange(each, device=values.device) * width)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpack_aligned(words: Tensor, width: int, count: int) -> Tensor:
    shifts = torch.arange(32 // width, device=words.device, dtype=torch.int32) * width
    values = (words.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return values.to(torch.uint8).flatten(1)[:, :count].contiguous()
