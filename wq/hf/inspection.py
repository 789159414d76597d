"""What the tensors of an already quantized checkpoint are, told from their headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from wq import formats
from wq.checkpoint import Entry, read_tensor
from wq.errors import CheckpointError
from wq.formats import compressed_tensors, gptq
from wq.formats.stored import Stored
from wq.hf import experts
from wq.structure import is_linear, map_names
from wq_kernels import stream as bits

LEAVES = (*compressed_tensors.LEAVES, *gptq.LEAVES)  # of every format: awq's are among gptq's


@dataclass(frozen=True)
class Found:
    """How each module with a packed weight is stored, and each parameter of experts."""

    layers: dict[str, Stored]
    experts: dict[str, experts.Fused]


def inspect(model: PreTrainedModel, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Found:
    """Match every tensor on disk with the model. Raises CheckpointError for what is missing, left over or damaged."""
    direct, entries = experts.split_names(model, entries)
    packed: dict[str, dict[str, Entry]] = {}  # prefix on disk: its tensors by leaf
    for name, entry in entries.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf in LEAVES:
            packed.setdefault(prefix, {})[leaf] = entry
    # A packed weight goes where the dense one would.
    plain = [name for name in entries if name.rpartition(".")[2] not in LEAVES]
    weights = [f"{prefix}.weight" for prefix in packed]
    mapped, absent, unexpected = map_names(model, [*plain, *weights])
    _refuse(model, "missing", [name for name in absent if name not in direct])
    _refuse(model, "unexpected", unexpected)
    layers: dict[str, Stored] = {}
    parts: dict[str, dict[str, Stored]] = {}  # parameter of experts: how each of its pieces is stored
    for prefix, leaves in packed.items():
        target, renamed_only = mapped[f"{prefix}.weight"]
        path = target.rpartition(".")[0]
        if renamed_only:
            layers[path] = _inspect(path, leaves, _shape(model, path), config)
        else:
            shape = experts.piece_shape(model, target, leaves, prefix)
            parts.setdefault(target, {})[prefix] = _inspect(prefix, leaves, shape, config)
    fused = {target: experts.common(model, target, pieces) for target, pieces in parts.items()}
    return Found(layers, fused | {name: experts.inspect_direct(model, name, direct[name]) for name in direct})


def _inspect(name: str, leaves: Mapping[str, Entry], shape: tuple[int, int], config: Mapping[str, Any]) -> Stored:
    """One packed weight; its format is told by its tensors."""
    first = "weight_packed" if "weight_packed" in leaves else "qweight"
    if first not in leaves:
        likely = "weight_packed" if any(leaf.startswith("weight_") for leaf in leaves) else "qweight"
        raise CheckpointError(f"{name}.{likely} is missing. Download the checkpoint again.")
    owner = "compressed-tensors" if first == "weight_packed" else "gptq"
    # Both have a `qweight`: awq packs along out_features, gptq along in_features.
    if owner == "gptq" and leaves[first].shape == (shape[1], shape[0] // 8):
        owner = "awq"
    reader = formats.get(owner)
    stored: Stored = reader.inspect(leaves, shape, config, partial(_read, leaves), name)
    if bits.words(shape[0], stored.scheme.bits) * 32 != shape[0] * stored.scheme.bits and owner != "compressed-tensors":
        raise CheckpointError(
            f"{name}: {shape[0]} rows do not fill whole words of {stored.scheme.bits}-bit zero points."
        )
    return replace(stored, format=owner)


def _read(leaves: Mapping[str, Entry], leaf: str) -> Tensor:
    return read_tensor(leaves[leaf])


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    """`(out, in)` of the layer at a path. Raises CheckpointError when it is no linear layer."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if layer is None or not is_linear(layer):
        what = "is not in the model" if layer is None else f"is a {type(layer).__name__}, not an nn.Linear"
        raise CheckpointError(f"{path} has packed weights but {what}.")
    return layer.out_features, layer.in_features


def _refuse(model: nn.Module, what: str, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise CheckpointError(
            f"{type(model).__name__}: {len(names)} {what} tensors in the checkpoint: {', '.join(names[:3])}{more}. "
            "It is damaged, or was written for another architecture; wq does not load it with random weights."
        )
