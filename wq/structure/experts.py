"""Experts that transformers keeps as 3-D parameters.

On disk most architectures have one matrix for each expert and projection, which transformers merges while it loads:
`experts.*.w1.weight` and `experts.*.w3.weight` into `experts.gate_up_proj`. A few have the 3-D tensors on disk as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from wq.errors import CheckpointError

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Projection:
    """A 3-D parameter as a stack of matrices `[out, in]`; transposed: stored as `[experts, in, out]`."""

    experts: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """`(out, in)` of each."""
        return self.out_features, self.in_features


def find_experts(model: nn.Module, path: str = "", keep: Iterable[re.Pattern[str]] = ()) -> dict[str, Projection]:
    """The parameters of experts in a module at `path`, by path within it, but for what `keep` matches."""
    keep = tuple(keep)
    found = {
        f"{inner}.{name}" if inner else name: projection(module, name)
        for inner, module in model.named_modules()
        if is_experts(module)
        for name in PROJECTIONS
        if isinstance(getattr(module, name, None), nn.Parameter) and getattr(module, name).ndim == 3
    }
    start = f"{path}." if path else ""
    return {name: size for name, size in found.items() if not any(p.search(start + name) for p in keep)}


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the attributes that transformers' `use_experts_implementation` gives."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def projection(module: Any, name: str) -> Projection:
    """A parameter's shape as matrices."""
    count, rows, columns = getattr(module, name).shape
    transposed = bool(module.is_transposed)
    return Projection(count, *((columns, rows) if transposed else (rows, columns)), transposed)


def arrange(model: PreTrainedModel, target: str, prefixes: Iterable[str], count: int) -> list[list[str]]:
    """Prefixes on disk of what is merged into `target`: for each projection it joins (w1, w3), its experts in order.

    Raises CheckpointError for a prefix that is no such piece, and for a piece that is not there.
    """
    order = _joined(model, target)
    table: list[dict[int, str]] = [{} for _ in order]
    for prefix in prefixes:
        *_, index, leaf = prefix.split(".")
        if leaf not in order or not index.isdecimal():
            raise CheckpointError(f"{prefix} is no piece of {target}, which joins {order}.")
        table[order.index(leaf)][int(index)] = prefix
    for leaf, row in zip(order, table, strict=True):
        absent = [index for index in range(count) if index not in row]
        if absent:
            raise CheckpointError(f"{target}: expert {absent[0]} has no packed {leaf}. Download the checkpoint again.")
    return [[row[index] for index in range(count)] for row in table]


def _joined(model: PreTrainedModel, target: str) -> list[str]:
    """The names of the projections that are joined in a parameter, in order: w1, w3."""
    for converter in get_model_conversion_mapping(model):
        if isinstance(converter, WeightConverter):
            ends = [pattern.replace("*.", "").strip("^$") for pattern in converter.target_patterns]
            if any(target.endswith(end) for end in ends):
                return [re.sub(r"\W", "", pattern.split(".")[-2]) for pattern in converter._original_source_patterns]
    raise CheckpointError(f"{target} is not merged from other tensors.")
