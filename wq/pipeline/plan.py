"""Everything about a job that is known before the first number is computed: layers, scheme, every tensor to come."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from types import ModuleType

import torch
from torch import nn

from wq import grid
from wq.checkpoint import Spec
from wq.errors import ModelError, SchemeError
from wq.loaders.joined import targets
from wq.pipeline.source import Source
from wq.scheme import Scheme, Targets
from wq.solvers import Solution
from wq.structure.experts import Projection, arrange, find_experts
from wq.structure.linears import auto_group_size, find_linears, patterns, shape_of
from wq.structure.towers import Tower, find_towers

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """A matrix that will be quantized: where it is in the model, its name on disk, and its `(out, in)`."""

    path: str
    stored: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Experts:
    """A parameter of all experts that will be quantized.

    path: where it is in the model. pieces: its matrices on disk, for each projection that it joins (gate, up) those of
    its experts in order. whole: the names of what it is made of instead, where that is 3-D on disk as well; packed, it
    is written under `path`.
    """

    path: str
    size: Projection
    pieces: list[list[Layer]]
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A block of the model; its layers and parameters of experts by name within it."""

    path: str
    module: nn.Module
    layers: dict[str, Layer]
    experts: dict[str, Experts]


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first number is computed.

    scheme: that of most weights. schemes: of every matrix, by `Layer.path`, and of every parameter of experts, by
    `Experts.path`. bytes: what each of them takes on disk, packed; experts that are many matrices there have none of
    their own. dense: on-disk names of weights that could have been quantized, for the config. packed: on-disk names of
    tensors that others take the place of. specs: every tensor of the new checkpoint.
    """

    scheme: Scheme
    schemes: dict[str, Scheme]
    bytes: dict[str, int]
    dtype: torch.dtype
    towers: list[tuple[Tower, list[Block]]]
    dense: list[str]
    packed: set[str]
    specs: dict[str, Spec]
    parameters: int
    quantized: int


def make_plan(
    source: Source, fmt: ModuleType, scheme: Scheme, auto_group: bool, keep: Iterable[str], dtype: str | None
) -> Plan:
    """Plan the job; the scheme's group size is a wish if `auto_group`, its scale dtype is settled here.

    Raises ModelError, GroupSizeError, FormatError and SchemeError for everything that cannot work.
    """
    keep = tuple(keep)
    towers = [(t, list(_blocks(source, fmt, t, patterns(keep)))) for t in find_towers(source.model, source.name)]
    blocks = [block for _, tower in towers for block in tower]
    layers = [layer for block in blocks for layer in block.layers.values()]
    experts = [expert for block in blocks for expert in block.experts.values()]
    layers += [layer for expert in experts for piece in expert.pieces for layer in piece]
    whole = {name: expert for expert in experts for name in expert.whole}
    if not layers and not whole:
        raise ModelError(f"{source.name}: no layer is left to quantize; keep={list(keep)} covers all of them.")
    stored = stored_dtype(source, dtype)
    # gptq and awq know float16 scales only, whatever the model's dtype.
    scales = stored if fmt.QUANT_METHOD == "compressed-tensors" else torch.float16
    scheme = replace(scheme, scale_dtype=str(scales).removeprefix("torch."))
    shapes = {layer.path: layer.shape for layer in layers} | {e.path: e.size.matrix for e in whole.values()}
    if auto_group:
        scheme = replace(scheme, group_size=auto_group_size({path: shape[1] for path, shape in shapes.items()}))
    for path, shape in shapes.items():
        fmt.check(scheme, shape, path)
    packed = {f"{layer.stored}.weight" for layer in layers}
    plan = Plan(
        scheme=scheme,
        schemes={},
        bytes={},
        dtype=stored,
        towers=towers,
        dense=_dense(source, packed),
        packed=packed | set(whole),
        specs={},
        parameters=sum(torch.Size(entry.shape).numel() for entry in source.entries.values()),
        quantized=sum(torch.Size(source.entries[name].shape).numel() for name in (*packed, *whole)),
    )
    return mix(source, fmt, plan, dict.fromkeys([*shapes, *(expert.path for expert in experts)], scheme.bits))


def mix(source: Source, fmt: ModuleType, plan: Plan, bits: Mapping[str, int]) -> Plan:
    """The plan with other widths. bits: of every layer and parameter of experts in the blocks, by its path."""
    schemes: dict[str, Scheme] = {}
    weights: Counter[Scheme] = Counter()
    by_weight: dict[str, Layer] = {}
    whole: dict[str, Experts] = {}
    for block in (block for _, tower in plan.towers for block in tower):
        for layer in block.layers.values():
            by_weight[f"{layer.stored}.weight"] = layer
            schemes[layer.path] = replace(plan.scheme, bits=bits[layer.path])
            weights[schemes[layer.path]] += torch.Size(layer.shape).numel()
        for expert in block.experts.values():
            pieces = [piece for row in expert.pieces for piece in row]
            by_weight |= {f"{piece.stored}.weight": piece for piece in pieces}
            whole |= dict.fromkeys(expert.whole, expert)
            scheme = replace(plan.scheme, bits=bits[expert.path])
            schemes |= dict.fromkeys([expert.path, *(piece.path for piece in pieces)], scheme)
            weights[scheme] += expert.size.experts * torch.Size(expert.size.matrix).numel()
    found = list(_specs(source, fmt, schemes, by_weight, whole, plan.dtype))
    size: Counter[str] = Counter()
    for owner, _, spec in found:
        size[owner] += spec.bytes
    del size[""]
    specs = {name: spec for _, name, spec in found}
    return replace(plan, scheme=weights.most_common(1)[0][0], schemes=schemes, bytes=dict(size), specs=specs)


def assigned(plan: Plan) -> list[Targets]:
    """Which layers have which scheme, for a config; empty if all have one."""
    if len(set(plan.schemes.values())) == 1:
        return []
    names: dict[str, str] = {}  # on disk, in the model
    for block in (block for _, tower in plan.towers for block in tower):
        names |= {layer.stored: layer.path for layer in block.layers.values()}
        for expert in block.experts.values():
            names |= {piece.stored: piece.path for row in expert.pieces for piece in row}
            names |= {expert.path: expert.path} if expert.whole else {}
    return targets({stored: plan.schemes[path] for stored, path in names.items()}, names)


def _blocks(source: Source, fmt: ModuleType, tower: Tower, keep: list[re.Pattern[str]]) -> Iterator[Block]:
    sources: dict[str, list[str]] = {}
    for name, (parameter, _) in source.tensors.items():
        sources.setdefault(parameter, []).append(name)
    for index, module in enumerate(tower.blocks):
        path = f"{tower.blocks_path}.{index}"
        experts = {}
        for name, size in find_experts(module, path, keep).items():
            found = _experts(source, fmt, f"{path}.{name}", size, sources.get(f"{path}.{name}", []))
            if found is not None:
                experts[name] = found
        yield Block(path, module, dict(_layers(source, path, module, keep)), experts)


def _layers(source: Source, path: str, block: nn.Module, keep: list[re.Pattern[str]]) -> Iterator[tuple[str, Layer]]:
    for name, linear in find_linears(block, path, keep).items():
        stored = source.on_disk(f"{path}.{name}.weight")
        if stored is not None:  # a weight that transformers assembles from several tensors has no place on disk
            yield name, Layer(f"{path}.{name}", stored.removesuffix(".weight"), shape_of(linear))


def _experts(source: Source, fmt: ModuleType, path: str, size: Projection, names: list[str]) -> Experts | None:
    """The parameter at `path`, from its tensors on disk; None where the format has no form for these."""
    if any(len(source.entries[name].shape) != 2 for name in names):
        return Experts(path, size, [], tuple(names)) if fmt.QUANT_METHOD == "compressed-tensors" else None
    table = arrange(source.model, path, [name.removesuffix(".weight") for name in names], size.experts)
    shape = size.out_features // len(table), size.in_features
    if any(source.entries[name].shape != shape for name in names):
        return None  # joined otherwise than row by row
    return Experts(path, size, [[Layer(prefix, prefix, shape) for prefix in row] for row in table])


def _specs(
    source: Source,
    fmt: ModuleType,
    schemes: Mapping[str, Scheme],
    layers: dict[str, Layer],
    whole: dict[str, Experts],
    dtype: torch.dtype,
) -> Iterator[tuple[str, str, Spec]]:
    """Every tensor of the new checkpoint, in the order of the old one: whose it is, "" if dense, its name and spec."""
    cast = dtype is not source.dtype
    packed = cache(partial(_packed, fmt))
    for name, entry in source.entries.items():
        if name in layers:
            layer = layers[name]
            for leaf, spec in packed(schemes[layer.path], layer.shape).items():
                yield layer.path, f"{layer.stored}.{leaf}", spec
        elif name in whole:
            if name != whole[name].whole[0]:  # written once
                continue
            path, size = whole[name].path, whole[name].size
            for leaf, spec in packed(schemes[path], size.matrix).items():
                if leaf != "weight_shape":
                    yield path, path + leaf.removeprefix("weight"), Spec(spec.dtype, (size.experts, *spec.shape))
        else:
            floating = entry.dtype in _DTYPES.values()
            yield "", name, Spec(dtype if cast and floating else entry.dtype, entry.shape)


def _packed(fmt: ModuleType, scheme: Scheme, shape: tuple[int, int]) -> dict[str, Spec]:
    """What a format stores for a matrix, by local name: found by packing shapes on meta."""
    grids = shape[0], scheme.groups(shape[1])
    empty = Solution(
        torch.empty(shape, dtype=torch.uint8, device="meta"),
        torch.empty(grids, dtype=grid.scale_dtype(scheme), device="meta"),
        torch.empty(grids, dtype=torch.uint8, device="meta"),
        {},
    )
    return {leaf: Spec(t.dtype, tuple(t.shape)) for leaf, t in sorted(fmt.pack(empty, scheme).items())}


def _dense(source: Source, packed: set[str]) -> list[str]:
    """Matrices that stay dense, as a loader must be told: heads, routers, kept layers; not embeddings."""
    embeddings = {name for name, module in source.model.named_modules() if isinstance(module, nn.Embedding)}
    dense = {
        name.removesuffix(".weight")
        for name, entry in source.entries.items()
        if name.endswith(".weight")
        and len(entry.shape) == 2
        and name not in packed
        and source.tensors[name][0].removesuffix(".weight") not in embeddings
    }
    head = source.model.get_output_embeddings()
    dense |= {name for name, module in source.model.named_modules() if module is head}  # tied: it has no tensor on disk
    return sorted(dense)


def stored_dtype(source: Source, dtype: str | None) -> torch.dtype:
    """The dtype of scales and dense tensors. Raises SchemeError for an unknown one."""
    if dtype is None:
        return torch.float16 if source.dtype is torch.float32 else source.dtype
    if dtype not in _DTYPES:
        raise SchemeError(f"dtype {dtype!r} is unknown; use {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]
