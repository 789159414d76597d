"""The good folders that are damaged: a tiny model, dense and in three formats, in one file and in shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from doors import State
from mutations import Files, read, write
from safetensors.torch import load_file

from wq import manifest, quantize
from wq.checkpoint import SINGLE, ShardWriter, Spec
from wq.hf import load
from wq.pipeline.source import open_source

FORMATS = ("compressed-tensors", "gptq", "awq")
DENSE = "dense"


def make(tiny_model: Callable[[], Path], place: Path, formats: tuple[str, ...] = FORMATS) -> dict[str, Path]:
    """Folders by name; every one has a manifest."""
    made = {}
    options: dict[str, Any] = {"method": "rtn", "group_size": 32, "dtype": "float16", "symmetric": False}
    write(read(tiny_model()), place / DENSE, renewed=True)
    made[DENSE] = place / DENSE
    for format in formats:
        quantize(made[DENSE], place / format, format=format, **options)
        manifest.write(place / format)
        made[format] = place / format
    return made | {f"{name} sharded": _sharded(folder) for name, folder in made.items()}


def _sharded(folder: Path) -> Path:
    """The same in three files."""
    target = folder.with_name(f"{folder.name}-sharded")
    values = load_file(folder / SINGLE)
    write({name: content for name, content in read(folder).items() if name != SINGLE}, target)
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()}
    with ShardWriter(target, specs, sum(spec.bytes for spec in specs.values()) * 2 // 5) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor)
    manifest.write(target)
    return target


def state(name: str, folder: Path) -> State:
    """What is read from an undamaged folder."""
    if not name.startswith(DENSE):
        return dict(load(folder)[0].state_dict())
    with open_source(folder) as source:
        source.load(("",), torch.device("cpu"), source.dtype)
        return dict(source.model.state_dict())


def files(made: dict[str, Path]) -> dict[str, Files]:
    return {name: read(folder) for name, folder in made.items()}
