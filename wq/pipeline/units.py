"""Which layers of a block must have one width: those that read one input, those that loaders join, and all experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from wq.loaders.joined import joined
from wq.pipeline.plan import Block


@dataclass(frozen=True)
class Unit:
    """Layers of a block that get one width, and what each width costs.

    block: its path. paths: of the layers, or of the parameters of experts. damage: by bits, the mean KL in nats of the
    next token's distribution from the dense model's, with this unit alone quantized.
    """

    block: str
    paths: tuple[str, ...]
    damage: dict[int, float]


def readers(block: Block) -> dict[str, nn.Module]:
    """A block's layers and modules of experts that are quantized, by name within it."""
    names = [*block.layers, *(name.rpartition(".")[0] for name in block.experts)]
    return {name: block.module.get_submodule(name) for name in names}


def together(names: Iterable[str], groups: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Readers of a block, by name, as they get one width. groups: of those that read the same input, where known."""
    order = list(names)
    found: list[set[str]] = []
    for part in map(set, [*groups, *joined(order).values()]):
        touched = [other for other in found if other & part]
        found = [other for other in found if not other & part] + [part.union(*touched)]
    ordered = [tuple(name for name in order if name in one) for one in found]
    return sorted(ordered, key=lambda one: order.index(one[0]))


def paths(block: Block, names: Iterable[str]) -> tuple[str, ...]:
    """Where the layers, and the parameters of experts, of some readers are in the model."""
    found = []
    for name in names:
        if name in block.layers:
            found.append(block.layers[name].path)
        else:
            inside = (expert for key, expert in block.experts.items() if key.rpartition(".")[0] == name)
            found += [expert.path for expert in inside]
    return tuple(found)
