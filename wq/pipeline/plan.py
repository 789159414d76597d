"""Everything about a job that is known before the first number is computed: layers, scheme, every tensor to come."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import nn

from wq import grid
from wq.checkpoint import Spec
from wq.errors import ModelError, SchemeError
from wq.pipeline.source import Source
from wq.scheme import Scheme
from wq.solvers import Solution
from wq.structure import auto_group_size, find_blocks, find_linears, patterns

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Layer:
    """A linear layer that will be quantized: where it is in the model, and its name on disk."""

    path: str
    stored: str
    shape: tuple[int, int]


@dataclass
class Plan:
    """Everything that is known before the first number is computed."""

    scheme: Scheme
    dtype: torch.dtype
    blocks_path: str
    blocks: nn.ModuleList
    layers: list[dict[str, Layer]]  # one dict a block, by name within it
    dense: list[str]  # on-disk names of weights that could have been quantized, for the config
    specs: dict[str, Spec]
    parameters: int
    quantized: int


def make_plan(
    source: Source, fmt: ModuleType, scheme: Scheme, auto_group: bool, keep: Iterable[str], dtype: str | None
) -> Plan:
    """Plan the job; the scheme's group size is a wish if `auto_group`, its scale dtype is settled here.

    Raises ModelError, GroupSizeError, FormatError and SchemeError for everything that cannot work.
    """
    path, block_list = find_blocks(source.model, source.name)
    keep = tuple(keep)
    kept = patterns(keep)
    layers = [_layers(source, f"{path}.{i}", block, kept) for i, block in enumerate(block_list)]
    found = [layer for block in layers for layer in block.values()]
    if not found:
        raise ModelError(f"{source.name}: no layer is left to quantize; keep={list(keep)} covers all of them.")
    stored = stored_dtype(source, dtype)
    # gptq and awq know float16 scales only, whatever the model's dtype.
    scales = stored if fmt.QUANT_METHOD == "compressed-tensors" else torch.float16
    scheme = replace(scheme, scale_dtype=str(scales).removeprefix("torch."))
    if auto_group:
        scheme = replace(scheme, group_size=auto_group_size({layer.path: layer.shape[1] for layer in found}))
    for layer in found:
        fmt.check(scheme, layer.shape, layer.path)
    return Plan(
        scheme=scheme,
        dtype=stored,
        blocks_path=path,
        blocks=block_list,
        layers=layers,
        dense=_dense(source, found),
        specs=_specs(source, fmt, scheme, {layer.stored: layer for layer in found}, stored),
        parameters=sum(torch.Size(entry.shape).numel() for entry in source.entries.values()),
        quantized=sum(layer.shape[0] * layer.shape[1] for layer in found),
    )


def _layers(source: Source, path: str, block: nn.Module, keep: list[re.Pattern[str]]) -> dict[str, Layer]:
    found = {}
    for name, linear in find_linears(block, path, keep).items():
        stored = source.on_disk(f"{path}.{name}.weight")
        if stored is not None:  # a weight that transformers assembles from several tensors has no place on disk
            shape = (linear.out_features, linear.in_features)
            found[name] = Layer(f"{path}.{name}", stored.removesuffix(".weight"), shape)
    return found


def _specs(
    source: Source, fmt: ModuleType, scheme: Scheme, quantized: dict[str, Layer], dtype: torch.dtype
) -> dict[str, Spec]:
    """Every tensor of the new checkpoint, in the order of the old one; packed ones by packing shapes on meta."""
    specs: dict[str, Spec] = {}
    cast = dtype is not source.dtype
    for name, entry in source.entries.items():
        layer = quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            floating = entry.dtype in _DTYPES.values()
            specs[name] = Spec(dtype if cast and floating else entry.dtype, entry.shape)
            continue
        grids = layer.shape[0], scheme.groups(layer.shape[1])
        empty = Solution(
            torch.empty(layer.shape, dtype=torch.uint8, device="meta"),
            torch.empty(grids, dtype=grid.scale_dtype(scheme), device="meta"),
            torch.empty(grids, dtype=torch.uint8, device="meta"),
            {},
        )
        for local, tensor in sorted(fmt.pack(empty, scheme).items()):
            specs[f"{layer.stored}.{local}"] = Spec(tensor.dtype, tuple(tensor.shape))
    return specs


def _dense(source: Source, quantized: list[Layer]) -> list[str]:
    """Matrices that stay dense, as a loader must be told: heads, routers, experts, kept layers; not embeddings."""
    packed = {layer.stored for layer in quantized}
    embeddings = {name for name, module in source.model.named_modules() if isinstance(module, nn.Embedding)}
    dense = {
        name.removesuffix(".weight")
        for name, entry in source.entries.items()
        if name.endswith(".weight")
        and len(entry.shape) == 2
        and name.removesuffix(".weight") not in packed
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
