"""How one layer's weight lies in a checkpoint, whatever wrote it, and the form in which wq computes with it.

A format's reader is three functions, pure but for `read`, which fetches the few small tensors whose values decide:

    inspect(leaves, shape, config, read, name) -> Stored    what the tensors say; refuses what contradicts itself
    to_packed(tensors, stored) -> Packed                    into wq's form
    from_packed(packed, stored) -> tensors                  and back, bit for bit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wq.errors import CheckpointError
from wq.scheme import PER_CHANNEL, Scheme

Read = Callable[[str], Tensor]


class Leaf(Protocol):
    """What a header says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Packed(NamedTuple):
    """A weight in the layout of `wq.layers.WqLinear`: the bit streams of compressed-tensors, and a column order.

    permutation: int32 `[in]`, the input column of each stored column (act-order), or None when they are in order.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    permutation: Tensor | None = None


@dataclass(frozen=True)
class Stored:
    """What reading one layer takes, and writing the same bytes again.

    format: a name in FORMATS. shape: of the weight, `(out, in)`. variant: which of its dialects. permuted: whether the
    columns were quantized in another order than the input's. ragged: how many columns a group has on disk where that
    does not divide the row and the last group has fewer; the scheme then has smaller groups, which share their scales.
    """

    format: str
    scheme: Scheme
    shape: tuple[int, int]
    variant: str = ""
    permuted: bool = False
    ragged: int = 0


def expect(name: str, leaves: Mapping[str, Leaf], leaf: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Refuse a tensor of another shape or dtype (None: any of the float dtypes of scales). Raises CheckpointError."""
    require(name, leaves, leaf)
    entry = leaves[leaf]
    if tuple(entry.shape) != shape:
        raise CheckpointError(
            f"{name}.{leaf} is {list(entry.shape)}; with the layer's other tensors it must be {list(shape)}. "
            "The file does not fit this model's config."
        )
    allowed = (torch.float16, torch.bfloat16, torch.float32) if dtype is None else (dtype,)
    if entry.dtype not in allowed:
        raise CheckpointError(f"{name}.{leaf} is {entry.dtype}; it must be {' or '.join(map(str, allowed))}.")


def require(name: str, leaves: Mapping[str, Leaf], *needed: str) -> None:
    """Refuse a layer without one of its tensors. Raises CheckpointError."""
    for leaf in needed:
        if leaf not in leaves:
            raise CheckpointError(f"{name}.{leaf} is missing. Download the checkpoint again.")


def check_shape(name: str, shape: tuple[int, int]) -> None:
    """Refuse a layer of no rows or no columns: a config may say anything. Raises CheckpointError."""
    if min(shape) < 1:
        raise CheckpointError(f"{name} has packed weights; config.json makes it {list(shape)}. Download both again.")


def group_size(name: str, in_features: int, groups: int, said: set[int] | None = None) -> tuple[int, int]:
    """The group size that so many groups mean, and 0; or, where the last group has fewer columns than `said`, the
    largest size that divides all of them, and what was said.

    Raises CheckpointError when they do not divide the row.
    """
    for size in sorted(said or ()):
        if 0 < size < in_features and in_features % size and -(-in_features // size) == groups:
            return gcd(size, in_features), size
    if groups < 1 or in_features % groups:
        raise CheckpointError(f"{name}: {groups} groups do not divide in_features {in_features}.")
    return (PER_CHANNEL if groups == 1 else in_features // groups), 0


def finer(values: Tensor, info: Stored) -> Tensor:
    """Scales or zero points `[rows, groups on disk]` for the groups of the scheme, `[rows, groups]`."""
    if not info.ragged:
        return values
    first_columns = torch.arange(0, info.shape[1], info.scheme.group_size, device=values.device)
    return values.index_select(1, first_columns // info.ragged)


def coarser(values: Tensor, info: Stored) -> Tensor:
    """The inverse of `finer`."""
    return values[:, :: info.ragged // info.scheme.group_size].contiguous() if info.ragged else values


def agree(name: str, what: str, found: int, said: set[int]) -> None:
    """Refuse a value that tensors have and no part of the config says; an empty set says nothing."""
    if said and found not in said:
        raise CheckpointError(f"{name}: its tensors hold {what} {found}; config.json says {sorted(said)}.")


def declared_values(config: Mapping[str, Any] | None, key: str) -> set[int]:
    """The whole numbers that a config gives `key`: for all layers, and for single ones (`dynamic`, `extra_config`)."""
    places = [config]
    for single in ("dynamic", "extra_config"):
        found = declared(config, single)
        places += list(found.values()) if isinstance(found, Mapping) else []
    values = {declared(place, key) for place in places if isinstance(declared(place, key), int)}
    return {value for value in values if type(value) is int} if declared(config, key) is not None else set()


def scheme_of(name: str, bits: int, size: int, symmetric: bool, dtype: torch.dtype) -> Scheme:
    """The scheme of a layer whose scales have that dtype. Raises CheckpointError for groups of one column."""
    if size == 1:
        raise CheckpointError(f"{name}: its groups have one column each; wq has no such scheme.")
    return Scheme(bits, size, symmetric, str(dtype).removeprefix("torch."))


def column_order(name: str, g_idx: Tensor, in_features: int, groups: int, ragged: int = 0) -> Tensor | None:
    """The permutation that sorts columns by group, int32 `[in]`, or None when they are sorted already.

    Raises CheckpointError for an index outside of the groups, and for groups of other sizes than they must have:
    all equal, or `ragged` each and the rest in the last.
    """
    outside = (g_idx < 0) | (g_idx >= groups)
    if outside.any():
        column = int(outside.nonzero()[0])
        raise CheckpointError(
            f"{name}: column {column} is in group {int(g_idx[column])}; there are groups 0 to {groups - 1}. "
            "The file is damaged, or not what it says."
        )
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    wanted = torch.bincount(_in_order(in_features, groups, ragged), minlength=groups)
    if (sizes != wanted).any():
        group = int((sizes != wanted).nonzero()[0])
        raise CheckpointError(
            f"{name}: group {group} has {int(sizes[group])} columns; every group must have {int(wanted[group])}."
        )
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx.long(), stable=True).to(torch.int32)


def group_index(permutation: Tensor | None, in_features: int, groups: int, ragged: int = 0) -> Tensor:
    """The inverse of `column_order`: int32 `[in]`, the group of each input column."""
    sorted_groups = _in_order(in_features, groups, ragged).to(torch.int32)
    if permutation is None:
        return sorted_groups
    return torch.empty_like(sorted_groups).index_copy_(0, permutation.long().cpu(), sorted_groups)


def _in_order(in_features: int, groups: int, ragged: int) -> Tensor:
    """The group of each column where they are in order, int64 `[in]`."""
    return torch.arange(in_features) // (ragged or in_features // groups)


def declared(config: Mapping[str, Any] | None, name: str) -> Any:
    """`name` in a config that may be anything."""
    return config.get(name) if isinstance(config, Mapping) else None


def first_declared(config: Mapping[str, Any] | None, *names: str) -> Any:
    """The first of these that a config says; a zero or an empty list is something said."""
    values = (declared(config, name) for name in names)
    return next((value for value in values if value is not None), None)
