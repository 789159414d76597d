"""Experts that transformers keeps as 3-D parameters: packed on load, loaded packed, saved under the names they had.

On disk most architectures have one matrix for each expert and projection; transformers merges them with converters,
`experts.*.w1.weight` and `experts.*.w3.weight` into `experts.gate_up_proj`. Each packed tensor goes the same way into a
parameter of its own, `experts.gate_up_proj_packed` and so on. When all are loaded they become one `ExpertWeight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from wq import formats
from wq.checkpoint import Entry
from wq.errors import CheckpointError
from wq.formats import compressed_tensors
from wq.formats.stored import Packed, Stored, check_shape
from wq.layers import ExpertWeight, OffloadedExperts, experts
from wq.scheme import Scheme
from wq.structure.experts import PROJECTIONS, Projection, arrange, is_experts, projection
from wq_kernels import layout as tiles
from wq_kernels import stream as bits

if TYPE_CHECKING:
    from wq.hf.quantizer import WqQuantizer

_SUFFIX = {"weight_packed": "_packed", "weight_scale": "_scale", "weight_zero_point": "_zero_point"}
_SHAPE = {"weight_shape": "_shape"}  # written for other readers; wq knows it from the model
_FOREIGN = {"qweight": "weight_packed", "scales": "weight_scale", "qzeros": "weight_zero_point"}
_DIRECT = re.compile(rf"(?P<parameter>.*\.(?:{'|'.join(PROJECTIONS)}))_(?P<leaf>packed|scale|zero_point|shape)$")


@dataclass(frozen=True)
class Fused:
    """How the pieces of one parameter of experts are stored.

    stored: of each piece, `(out, in)` one projection of one expert. pieces: their prefixes on disk, for each projection
    that the parameter joins (gate, up) those of its experts in order; empty when the file has the 3-D tensors.
    """

    stored: Stored
    pieces: tuple[tuple[str, ...], ...]


# --- reading headers ---


def split_names(model: nn.Module, entries: Mapping[str, Entry]) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
    """3-D packed tensors in the file, by parameter and leaf, and all other tensors."""
    known = {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    direct: dict[str, dict[str, Entry]] = {}
    rest: dict[str, Entry] = {}
    for name, entry in entries.items():
        match = _DIRECT.match(name)
        if match and match["parameter"] in known:
            direct.setdefault(match["parameter"], {})[match["leaf"]] = entry
        else:
            rest[name] = entry
    return direct, rest


def piece_shape(model: nn.Module, target: str, leaves: Mapping[str, Entry], prefix: str) -> tuple[int, int]:
    """`(out, in)` of one matrix that is merged into `target`. Raises CheckpointError."""
    path, _, name = target.rpartition(".")
    if name not in PROJECTIONS or not is_experts(model.get_submodule(path)):
        raise CheckpointError(f"{prefix} has packed weights, and {target} is made of several; wq cannot join those.")
    shape = projection(model.get_submodule(path), name)
    scale = leaves.get("weight_scale") or leaves.get("scales")
    if scale is None or len(scale.shape) != 2:
        raise CheckpointError(f"{prefix}: the scales are missing or not 2-D. Download the checkpoint again.")
    out_features = scale.shape[0] if "weight_scale" in leaves else scale.shape[1]
    if out_features not in (shape.out_features, shape.out_features // 2):
        raise CheckpointError(f"{prefix} has {out_features} rows; {target} joins pieces of {shape.out_features} rows.")
    return out_features, shape.in_features


def common(model: PreTrainedModel, target: str, pieces: Mapping[str, Stored]) -> Fused:
    """How all pieces of a parameter are stored. Raises CheckpointError when they differ or one is missing."""
    path, _, name = target.rpartition(".")
    whole = projection(model.get_submodule(path), name)
    (first, *others) = pieces.items()
    for prefix, stored in others:
        if stored != first[1]:
            raise CheckpointError(f"{prefix} is stored otherwise than {first[0]} ({stored.scheme}, {first[1].scheme}).")
    stored = first[1]
    if stored.permuted:
        raise CheckpointError(f"{first[0]}: experts with their columns in another order (act-order) are not supported.")
    table = arrange(model, target, pieces, whole.experts)
    rows = stored.shape[0] * len(table)
    width = stored.scheme.bits
    joins = stored.scheme.symmetric or bits.words(stored.shape[0], width) * len(table) == bits.words(rows, width)
    if rows != whole.out_features or not joins:
        raise CheckpointError(f"{target} has {whole.out_features} rows; its pieces have {stored.shape[0]} each.")
    return Fused(stored, tuple(map(tuple, table)))


def inspect_direct(model: nn.Module, target: str, leaves: Mapping[str, Entry]) -> Fused:
    """3-D packed tensors, as wq writes them for architectures that have 3-D tensors on disk."""
    path, _, name = target.rpartition(".")
    whole = projection(model.get_submodule(path), name)
    packed, scale = leaves.get("packed"), leaves.get("scale")
    if packed is None or scale is None or len(packed.shape) != 3 or len(scale.shape) != 3:
        raise CheckpointError(f"{target}: packed weights or scales are missing. Download the checkpoint again.")
    flat = {f"weight_{leaf}": _Slice(entry.shape[1:], entry.dtype) for leaf, entry in leaves.items() if leaf != "shape"}
    for leaf, entry in leaves.items():
        if entry.shape[:1] != (whole.experts,):
            count = entry.shape[0] if entry.shape else "no"
            raise CheckpointError(f"{target}_{leaf} is for {count} experts; the model has {whole.experts}.")
    shape = (whole.out_features, whole.in_features)
    check_shape(target, shape)
    stored = compressed_tensors.inspect(flat, shape, None, partial(_no_values, target), target)
    return Fused(stored, ())


@dataclass(frozen=True)
class _Slice:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _no_values(target: str, leaf: str) -> Tensor:
    raise CheckpointError(f"{target}: {leaf} is not supported in 3-D tensors.")


def _check_tiles(target: str, scheme: Scheme, whole: Projection) -> None:
    if not tiles.fits(experts.width_of(scheme.bits), whole.in_features, scheme.groups(whole.in_features, target)):
        raise CheckpointError(
            f"{target}: packed experts have groups of 32 · 2ⁿ columns, not groups of {scheme.group_size}. "
            "Load it with WqConfig(dequantize=True)."
        )


# --- parameters, while they load ---


def make_room(model: nn.Module, target: str, scheme: Scheme) -> None:
    """Replace a 3-D parameter by empty ones for its packed tensors, in the layout of checkpoints."""
    path, _, name = target.rpartition(".")
    module: Any = model.get_submodule(path)
    shape = projection(module, name)
    _check_tiles(target, scheme, shape)
    groups = scheme.groups(shape.in_features, target)
    rows = shape.out_features
    sizes = {
        "_packed": ((rows, bits.words(shape.in_features, scheme.bits)), torch.int32),
        "_scale": ((rows, groups), getattr(torch, scheme.scale_dtype)),
        "_zero_point": ((bits.words(rows, scheme.bits), groups), torch.int32),
    }
    del module._parameters[name]
    for suffix, (size, dtype) in sizes.items():
        if suffix == "_zero_point" and scheme.symmetric:
            continue
        empty = torch.empty(shape.experts, *size, dtype=dtype, device="meta")
        module.register_parameter(name + suffix, nn.Parameter(empty, requires_grad=False))
    module.__dict__.setdefault("_wq_projections", {})[name] = shape
    setattr(module, name, _Pending())
    module._is_hf_initialized = True


def transposed(model: nn.Module, target: str) -> bool:
    """Whether a parameter of experts is `[experts, in, out]`."""
    path, _, name = target.rpartition(".")
    return projection(model.get_submodule(path), name).transposed


def sizes(model: nn.Module, target: str) -> Projection:
    """The sizes of a parameter of experts, whether it is there, or room for its packed tensors."""
    path, _, name = target.rpartition(".")
    module = model.get_submodule(path)
    made: Projection | None = module.__dict__.get("_wq_projections", {}).get(name)
    return projection(module, name) if made is None else made


class _Pending:
    """In the place of a parameter that is not there yet; transformers' weight initialisation leaves it alone."""

    _is_hf_initialized = True


def converters(quantizer: WqQuantizer, conversions: Iterable[Any], fused: Mapping[str, Fused]) -> list[WeightConverter]:
    """A copy of each merging converter for each packed tensor."""
    from wq.hf.conversion import UnpackExperts

    made: list[WeightConverter] = []
    if not any(entry.pieces for entry in fused.values()):
        return made
    foreign = next(entry.stored.format for entry in fused.values()) != "compressed-tensors"
    for converter in _merging(conversions):
        leaves = _FOREIGN if foreign else {leaf: leaf for leaf in _SUFFIX}
        for leaf, meaning in leaves.items():
            operations = [UnpackExperts(quantizer, leaf), *converter.operations] if foreign else converter.operations
            made.append(_copy(converter, leaf, _SUFFIX[meaning], list(operations)))
    return made


def dequantizers(quantizer: WqQuantizer, fused: Mapping[str, Fused]) -> list[WeightConverter]:
    """Converters to dense parameters for 3-D packed tensors."""
    from wq.hf.conversion import Dequantize

    names = sorted({target.rpartition(".")[2] for target, entry in fused.items() if not entry.pieces})
    return [
        WeightConverter([name + suffix for suffix in _SUFFIX.values()], name, [Dequantize(quantizer)]) for name in names
    ]


def converters_for_saving(conversions: Iterable[Any], quantized: Iterable[str]) -> list[WeightConverter]:
    """What transformers reverses to save experts that were packed on load under the names of the checkpoint."""
    if not list(quantized):
        return []
    return [
        _copy(converter, leaf, suffix, list(converter.operations))
        for converter in _merging(conversions)
        for leaf, suffix in {**_SUFFIX, **_SHAPE}.items()
    ]


def _merging(conversions: Iterable[Any]) -> list[WeightConverter]:
    return [
        c
        for c in conversions
        if isinstance(c, WeightConverter)
        and all(source.endswith(".weight") for source in c._original_source_patterns)
        and any(target.rpartition(".")[2] in PROJECTIONS for target in c._original_target_patterns)
    ]


def _copy(converter: WeightConverter, leaf: str, suffix: str, operations: list[Any]) -> WeightConverter:
    sources = [source.removesuffix("weight") + leaf for source in converter._original_source_patterns]
    targets = [target + suffix for target in converter._original_target_patterns]
    return converter.copy(sources, targets, operations=operations)


# --- after loading, and saving ---


def finish(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Turn the packed tensors of each parameter into an `ExpertWeight`, and let wq multiply them."""
    for target, scheme in schemes.items():
        path, _, name = target.rpartition(".")
        module: Any = model.get_submodule(path)
        shape = module.__dict__.get("_wq_projections", {}).pop(name, None)
        suffixes = ("_packed", "_scale") if scheme.symmetric else tuple(_SUFFIX.values())
        tensors: dict[str, Any] = {suffix: module._parameters.get(name + suffix) for suffix in suffixes}
        offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        for suffix, tensor in tensors.items():
            loaded = offloaded or getattr(tensor, "_is_hf_initialized", False)
            if shape is None or tensor is None or not loaded:
                raise CheckpointError(f"{target}{suffix} was not in the checkpoint. Download it again.")
        delattr(module, name)
        if offloaded:
            setattr(module, name, OffloadedExperts(module, name, shape.in_features, scheme, shape.transposed))
            continue
        for suffix in suffixes:
            del module._parameters[name + suffix]
        packed, scale, zero = (*tensors.values(), None)[:3]
        setattr(
            module, name, ExpertWeight.from_stream(packed, scale, zero, shape.in_features, scheme, shape.transposed)
        )
    if getattr(model.config, "_experts_implementation", None) not in ("eager", "batched_mm"):
        model.set_experts_implementation(experts.IMPLEMENTATION)


def save(model: PreTrainedModel, state: dict[str, Tensor], fused: Mapping[str, Fused]) -> None:
    """Put the tensors of a checkpoint in the place of those of all experts."""
    for path, module in list(model.named_modules()):
        for projected in PROJECTIONS:
            weight, name = getattr(module, projected, None), f"{path}.{projected}"
            entry = fused.get(name)
            if isinstance(weight, ExpertWeight):
                for leaf in _SUFFIX:
                    state.pop(f"{name}.{leaf}", None)
                stacks: Any = weight.streams()
            elif isinstance(weight, OffloadedExperts):
                stacks = tuple(state.pop(name + suffix, None) for suffix in _SUFFIX.values())
                if entry is not None and entry.pieces:
                    stacks = tuple(onloaded(model, name + s, t) for s, t in zip(_SUFFIX.values(), stacks, strict=True))
            else:
                continue
            if entry is not None and entry.pieces:
                _save_pieces(state, entry, stacks)
                continue
            state |= {name + s: t for s, t in zip(_SUFFIX.values(), stacks, strict=True) if t is not None}
            if entry is None and not weight.transposed:  # made here, and transformers will take it apart: pieces have
                state[f"{name}_shape"] = _shapes(name, stacks[0], weight)  # a shape for other readers


def onloaded(model: PreTrainedModel, name: str, tensor: Tensor | None) -> Tensor | None:
    """A parameter's values, read again if it is offloaded."""
    return load_offloaded_parameter(model, name) if tensor is not None and tensor.is_meta else tensor


def _shapes(name: str, packed: Tensor, weight: Any) -> Tensor:
    """`(out, in)` of each expert's pieces in a row, int64 `[experts, 2 · pieces]`."""
    count, rows, words = packed.shape
    joined = 2 if name.endswith("gate_up_proj") else 1
    width, columns = weight.scheme.bits, weight.in_features
    if bits.words(columns, width) != words:  # what one of several processes has
        columns = words * 32 // width
    return torch.tensor([rows // joined, columns]).repeat(joined).repeat(count, 1)


def _save_pieces(state: dict[str, Tensor], entry: Fused, stacks: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """The tensors of each expert and projection, as the checkpoint had them."""
    rows, stored = entry.stored.shape[0], entry.stored
    words = bits.words(rows, stored.scheme.bits)
    packed, scale, zero = stacks
    for piece, prefixes in enumerate(entry.pieces):
        own, points = slice(piece * rows, (piece + 1) * rows), slice(piece * words, (piece + 1) * words)
        for expert, prefix in enumerate(prefixes):
            zeros = None if zero is None else zero[expert, points].clone()
            weight = Packed(packed[expert, own].clone(), scale[expert, own].clone(), zeros)
            for leaf, tensor in formats.get(stored.format).from_packed(weight, stored).items():
                state[f"{prefix}.{leaf}"] = tensor


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """3-D parameters again."""
    for module in list(model.modules()):
        for name in PROJECTIONS:
            weight = module._modules.get(name)
            if isinstance(weight, ExpertWeight):
                dense = weight[:].to(dtype or weight.dtype)
                del module._modules[name]
                module.register_parameter(name, nn.Parameter(dense.contiguous(), requires_grad=False))
    config = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == experts.IMPLEMENTATION:
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The experts implementation called `wq`; experts that are dense take transformers' grouped one."""
    if isinstance(getattr(module, "down_proj", None), (ExpertWeight, OffloadedExperts)):
        return experts.forward(module, *args, **kwargs)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register(experts.IMPLEMENTATION, _forward)
