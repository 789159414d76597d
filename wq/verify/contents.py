"""Tensors against the architecture, packed layers against themselves, and the config against both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wq import quantized
from wq.checkpoint import Entry
from wq.errors import CheckpointError, first_line
from wq.formats import compressed_tensors
from wq.formats.stored import Stored
from wq.loaders import METHODS
from wq.loaders.config import excluded
from wq.scheme import PER_CHANNEL
from wq.verify.found import Found


@dataclass
class Contents:
    """What the tensors are: packed layers by on-disk name, 3-D packed experts, and modules that stay dense.

    linear: of the dense ones, those that are linear layers of the architecture, `{on-disk name: path in the model}`.
    """

    layers: dict[str, Stored] = field(default_factory=dict)
    whole: dict[str, Stored] = field(default_factory=dict)
    dense: set[str] = field(default_factory=set)
    dense_whole: set[str] = field(default_factory=set)
    linear: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)  # of packed layers


def match(
    folder: Path, config: Mapping[str, Any], said: Mapping[str, Any], entries: Mapping[str, Entry], found: Found
) -> Contents:
    """Every tensor against the architecture; without one, packed layers against themselves."""
    model = _architecture(folder, config, len(entries), found) if entries and config else None
    if model is not None:
        contents = Contents()
        with found.guard(str(folder)):
            contents = _matched(model, said, entries, found)
    else:
        packed, others = quantized.split(entries)
        contents = Contents(dense=_matrices(others))
        for name, leaves in packed.items():
            with found.guard(name):
                contents.layers[name] = quantized.describe(name, leaves, said)
    if entries and not contents.layers and not contents.whole and not found.problems:
        found.problem(str(folder), "holds no packed weights", f"{len(entries)} tensors")
    return contents


def _matrices(others: Mapping[str, Entry]) -> set[str]:
    names = {name.removesuffix(".weight") for name, entry in others.items() if len(entry.shape) == 2}
    return {name for name in names if "embed" not in name.rpartition(".")[2] and f"{name}.weight" in others}


def _architecture(folder: Path, config: Mapping[str, Any], count: int, found: Found) -> Any:
    """The model that config.json describes, on the meta device; None, and why, where there is none to build."""
    if "auto_map" in config:
        found.warn("config.json", "names modeling code of its own, which is not run: tensors are not matched with it")
        return None
    from wq.hf.loading import read_config
    from wq.structure.limits import check_depth, few_modules
    from wq.structure.towers import model_class

    try:
        check_depth(config, count)
        described = read_config(str(folder), None)
        described.__dict__.pop("quantization_config", None)
        kind = model_class(described)
        with torch.device("meta"), few_modules(count):
            model = getattr(kind, "_from_config", None) or kind.from_config
            return model(described)
    except CheckpointError as error:
        found.problem("config.json", str(error))
    except Exception as error:  # whatever a config of any origin makes transformers raise
        found.problem("config.json", "describes no model that transformers can build", first_line(error))
    return None


def _matched(model: Any, said: Mapping[str, Any], entries: Mapping[str, Entry], found: Found) -> Contents:
    """Names, shapes and packed layers, as `wq.hf.inspection` matches them, but all problems and not the first."""
    from wq.hf import experts
    from wq.structure.names import map_names, misfits

    direct, rest = experts.split_names(model, entries)
    packed, others = quantized.split(rest)
    for name in packed:
        if f"{name}.weight" in others:
            found.problem(name, "is there both packed and dense")
    mapped, absent, unexpected = map_names(model, [*others, *(f"{name}.weight" for name in packed)])
    for name in absent:
        if name not in direct:
            found.problem(name, "is missing: the architecture needs it, and no tensor goes there")
    for name in unexpected:
        found.problem(name.removesuffix(".weight") if name not in others else name, "is unknown to the architecture")
    contents = Contents(
        dense=_matrices(others) - _embeddings(model, mapped),
        dense_whole={name for name, entry in others.items() if len(entry.shape) == 3 and ".experts." in f".{name}."},
    )
    for name, what in misfits(model, mapped, others).items():
        found.problem(name, what)
    parts: dict[str, dict[str, Stored]] = {}
    for name, leaves in packed.items():
        if f"{name}.weight" not in unexpected:
            with found.guard(name):
                _packed(model, name, leaves, mapped[f"{name}.weight"], said, contents, parts)
    for target, pieces in parts.items():
        with found.guard(target):
            experts.common(model, target, pieces)
    for target, leaves in direct.items():
        with found.guard(target):
            contents.whole[target] = experts.inspect_direct(model, target, leaves).stored
    contents.linear = _linear(model, mapped, contents)
    return contents


def _packed(
    model: Any,
    name: str,
    leaves: Mapping[str, Entry],
    goal: tuple[str, bool],
    said: Mapping[str, Any],
    contents: Contents,
    parts: dict[str, dict[str, Stored]],
) -> None:
    """One packed layer, or one matrix of an expert. Raises CheckpointError."""
    from wq.hf import experts
    from wq.structure.linears import is_linear, shape_of

    target, renamed_only = goal
    path = target.rpartition(".")[0]
    if not renamed_only:
        shape = experts.piece_shape(model, target, leaves, name)
        stored = parts.setdefault(target, {})[name] = quantized.describe(name, leaves, said, shape)
    else:
        layer = model.get_submodule(path)
        if not is_linear(layer):
            raise CheckpointError(f"{name} has packed weights and is a {type(layer).__name__}, no linear layer.")
        contents.paths[name] = path
        stored = quantized.describe(name, leaves, said, shape_of(layer))
    contents.layers[name] = stored


def _embeddings(model: nn.Module, mapped: Mapping[str, tuple[str, bool]]) -> set[str]:
    """Modules, by on-disk name, that look rows up and multiply nothing."""
    tables = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {name.removesuffix(".weight") for name, (target, _) in mapped.items() if target in tables}


def _linear(model: Any, mapped: Mapping[str, tuple[str, bool]], contents: Contents) -> dict[str, str]:
    """Dense linear layers: `{on-disk name: path}`. A tied head has no tensor on disk; its path is its name."""
    from wq.structure.linears import is_linear

    on_disk = {target: name for name, (target, plain) in mapped.items() if plain}
    on_disk |= {name: name for name in model.all_tied_weights_keys if name not in on_disk}
    paths = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) or is_linear(module)}
    weights = {path: on_disk.get(f"{path}.weight") for path in sorted(paths - set(contents.paths.values()))}
    return {name.removesuffix(".weight"): path for path, name in weights.items() if name is not None}


def check_declared(contents: Contents, said: Mapping[str, Any], found: Found) -> None:
    """What the config says of each layer: dense or packed, grid and groups."""
    method = said.get("quant_method")
    if method not in METHODS:
        return
    for name, path in contents.linear.items():
        if not any(excluded(said, known) for known in (name, path)):
            what = "is dense, and the config does not leave it out"
            hint = "Add it to the config's list of dense modules (ignore, dynamic, modules_to_not_convert)."
            (found.problem if method == "compressed-tensors" else found.warn)(name, what, "", hint)
    for name, stored in contents.layers.items():
        if all(excluded(said, known) for known in (name, contents.paths.get(name, name))):
            found.problem(name, "is packed, and the config leaves it out", "", "Remove it from the config's list.")
        _grid(name, stored, said, found)


def _grid(name: str, stored: Stored, said: Mapping[str, Any], found: Found) -> None:
    """Symmetry and groups of a layer, where `inspect` leaves what it says open."""
    weights = compressed_tensors.declared_weights(said, name) if said["quant_method"] == "compressed-tensors" else []
    symmetric = bool(weights) and all(group.get("symmetric") is True for group in weights)
    symmetric |= said.get("sym") is True or said.get("zero_point") is False
    if symmetric and not stored.scheme.symmetric:
        found.problem(name, "has zero points other than the middle, and the config says symmetric; loaders skip them")
    groups = stored.shape[1] // stored.scheme.group_size if stored.scheme.group_size != PER_CHANNEL else 1
    if groups > 1 and weights and all(group.get("strategy") == "channel" for group in weights):
        found.problem(name, "has groups, and the config says one scale a row (strategy channel)", f"{groups} groups")
    sizes = [group.get("group_size") for group in weights] or [said.get("group_size")]
    wrong = all(type(size) is int and size > 0 and size < stored.shape[1] for size in sizes)
    if groups == 1 and wrong:
        found.problem(
            name, f"has one scale a row, and the config says groups of {sizes[0]}", f"{stored.shape[1]} columns"
        )
