"""Tensors of a packed layer that cannot be: each a change of one layer of a good checkpoint, with a name.

All must be refused, by the layer's name, before a kernel sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, str], object]
FORMATS = ("compressed-tensors", "gptq", "awq")
_NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS = [f"model.layers.0.{name}" for name in (*_NAMES, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]

CODES, SCALES, ZEROS = "codes", "scales", "zero points"
LEAVES = {
    "compressed-tensors": {CODES: "weight_packed", SCALES: "weight_scale", ZEROS: "weight_zero_point"},
    "gptq": {CODES: "qweight", SCALES: "scales", ZEROS: "qzeros"},
    "awq": {CODES: "qweight", SCALES: "scales", ZEROS: "qzeros"},
}
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "a row less": lambda t: t[:-1],
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "a column less": lambda t: t[..., :-1],
    "thrice the columns": lambda t: torch.cat([t, t, t], -1),
    "thrice the rows": lambda t: torch.cat([t, t, t]),
    "flat": lambda t: t.flatten(),
    "one more dimension": lambda t: t[None],
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "no dimension": lambda t: t.flatten()[0],
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool, *FLOATS, torch.float64)
NO_SCALES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64)

INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda g: _at(g, 5, -1),
    "as many as groups": lambda g: _at(g, 5, int(g.max()) + 1),
    "2**31 - 1": lambda g: _at(g, 0, 2**31 - 1),
    "the least": lambda g: _at(g, len(g) - 1, -(2**31)),
    "all negative": lambda g: g - 4,
    "all too high": lambda g: g + 4,
    "one group": lambda g: g * 0,
    "unequal groups": lambda g: _at(g, int((g != 0).nonzero()[0]), 0),
    "short": lambda g: g[:-1],
    "long": lambda g: torch.cat([g, g]),
    "none": lambda g: g[:0],
    "a matrix": lambda g: g[None],
    "int64": lambda g: g.long(),
    "float": lambda g: g.float(),
    "uint8": lambda g: g.to(torch.uint8),
}


class Case(NamedTuple):
    """A change to the tensors of one layer."""

    name: str
    format: str
    layer: str
    change: Change


def cases() -> list[Case]:
    """All, for three formats; asymmetric, in groups of 32."""
    return [
        Case(f"{format}: {name}", format, layer, change)
        for format in FORMATS
        for layer in LAYERS
        for name, change in _changes(format)
    ]


def _changes(format: str) -> Iterator[tuple[str, Change]]:
    leaves = LEAVES[format]
    for what, leaf in leaves.items():
        yield f"{what} absent", _without(leaf)
        for name, shaped in SHAPES.items():
            yield f"{what}: {name}", _put(leaf, shaped)
        for dtype in NO_SCALES if what is SCALES else WORDS:
            yield f"{what} of {dtype}", _put(leaf, lambda t, dtype=dtype: t.to(dtype))
    for groups in (0, 3, 5, 7):
        yield f"{groups} groups", _groups(leaves, groups, 1 if format == "compressed-tensors" else 0)
    if format == "gptq":
        for name, value in INDICES.items():
            yield f"g_idx {name}", _put("g_idx", value)
    if format == "compressed-tensors":
        for name, value in INDICES.items():
            yield f"weight_g_idx {name}", _index(value)
        yield "weight_shape turned", _put("weight_shape", lambda t: t.flip(0) + 1)
        yield "weight_shape negative", _put("weight_shape", lambda t: -t)
        yield "weight_shape enormous", _put("weight_shape", lambda t: t * 0 + 2**62)


def _at(tensor: Tensor, place: int, value: int) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def _put(leaf: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, layer: tensors.update({f"{layer}.{leaf}": value(tensors[f"{layer}.{leaf}"]).contiguous()})


def _without(leaf: str) -> Change:
    return lambda tensors, layer: tensors.pop(f"{layer}.{leaf}")


def _groups(leaves: dict[str, str], count: int, dim: int) -> Change:
    """Scales and zero points that agree with each other, of so many groups."""

    def change(tensors: Tensors, layer: str) -> None:
        for what in (SCALES, ZEROS):
            name = f"{layer}.{leaves[what]}"
            first = torch.zeros(count, dtype=torch.int64)
            tensors[name] = tensors[name].index_select(dim, first).contiguous()

    return change


def _index(value: Callable[[Tensor], Tensor]) -> Change:
    """A column order of act-order, where there was none."""

    def change(tensors: Tensors, layer: str) -> None:
        columns, groups = int(tensors[f"{layer}.weight_shape"][1]), tensors[f"{layer}.weight_scale"].shape[1]
        index = (torch.arange(columns) // (columns // groups)).to(torch.int32)
        tensors[f"{layer}.weight_g_idx"] = value(index).contiguous()

    return change
