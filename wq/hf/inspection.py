"""What the tensors of an already quantized checkpoint are, told from their headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from wq import quantized
from wq.checkpoint import Entry, read_tensor
from wq.errors import CheckpointError
from wq.formats.stored import Stored
from wq.hf import experts
from wq.structure.linears import is_linear, shape_of
from wq.structure.names import check_plain, map_names


@dataclass(frozen=True)
class Found:
    """How each module with a packed weight is stored, and each parameter of experts."""

    layers: dict[str, Stored]
    experts: dict[str, experts.Fused]


def inspect(model: PreTrainedModel, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Found:
    """Match every tensor on disk with the model. Raises CheckpointError for what is missing, left over or damaged."""
    direct, entries = experts.split_names(model, entries)
    packed, others = quantized.split(entries)
    # A packed weight goes where the dense one would.
    weights = [f"{prefix}.weight" for prefix in packed]
    mapped, absent, unexpected = map_names(model, [*others, *weights])
    foreign, new = _heads(model, unexpected), _heads(model, absent) if model.base_model is not model else set()
    _refuse(model, "missing", [name for name in absent if name not in direct and name not in new])
    biases = {f"{prefix}.bias" for prefix in packed}  # of zeros, where the model has none: AutoGPTQ wrote them
    left = [name for name in unexpected if name not in foreign]
    _refuse(model, "unexpected", [name for name in left if name not in biases or read_tensor(others[name]).any()])
    check_plain(model, mapped, others)
    layers: dict[str, Stored] = {}
    parts: dict[str, dict[str, Stored]] = {}  # parameter of experts: how each of its pieces is stored
    for prefix, leaves in packed.items():
        if f"{prefix}.weight" in foreign:
            continue
        target, renamed_only = mapped[f"{prefix}.weight"]
        path = target.rpartition(".")[0]
        if renamed_only:
            layers[path] = quantized.describe(path, leaves, config, _shape(model, path))
        else:
            shape = experts.piece_shape(model, target, leaves, prefix)
            parts.setdefault(target, {})[prefix] = quantized.describe(prefix, leaves, config, shape)
    fused = {target: experts.common(model, target, pieces) for target, pieces in parts.items()}
    return Found(layers, fused | {name: experts.inspect_direct(model, name, direct[name]) for name in direct})


def _heads(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Tensors beside the base model, if another class is asked for than the checkpoint is of.

    `AutoModel` reads a language model's repo without its head, and a classifier's class puts a new one on it: then
    transformers leaves out what is on disk, or makes one and says so, and its user has asked for just that.
    """
    own = type(model).__name__
    if own in (model.config.architectures or [own]):
        return set()
    return {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    """`(out, in)` of the layer at a path. Raises CheckpointError when it is no linear layer."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if layer is None or not is_linear(layer):
        what = "is not in the model" if layer is None else f"is a {type(layer).__name__}, not an nn.Linear"
        raise CheckpointError(f"{path} has packed weights but {what}.")
    return shape_of(layer)


def _refuse(model: nn.Module, what: str, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise CheckpointError(
            f"{type(model).__name__}: {len(names)} {what} tensors in the checkpoint: {', '.join(names[:3])}{more}. "
            "It is damaged, or was written for another architecture; wq does not load it with random weights."
        )
