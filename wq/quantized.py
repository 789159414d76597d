"""An already quantized checkpoint, told by its tensors: which belong to which layer, and how each layer is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wq import formats
from wq.checkpoint import Entry, read_json, read_tensor
from wq.errors import CheckpointError
from wq.formats import awq, compressed_tensors, gptq
from wq.formats.stored import Stored, check_shape
from wq.scheme import STORED_BITS
from wq_kernels import stream as bit_stream

LEAVES = (*compressed_tensors.LEAVES, *gptq.LEAVES)  # of every format: awq's are among gptq's


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a quantized folder. Raises CheckpointError when it is none."""
    why = "this is no quantized checkpoint"
    try:
        config = read_json(folder / "config.json")
        if isinstance(config.get("quantization_config"), dict):
            return config
    except CheckpointError as error:
        why = str(error)
    raise CheckpointError(f"{folder}/config.json has no quantization_config: {why.removesuffix('.')}.")


def split(entries: Mapping[str, Entry]) -> tuple[dict[str, dict[str, Entry]], dict[str, Entry]]:
    """The tensors of packed weights by layer and local name, and all others by name."""
    packed: dict[str, dict[str, Entry]] = {}
    others: dict[str, Entry] = {}
    for name, entry in entries.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in LEAVES:
            packed.setdefault(layer, {})[leaf] = entry
        else:
            others[name] = entry
    return packed, others


def describe(
    name: str, leaves: Mapping[str, Entry], config: Mapping[str, Any], shape: tuple[int, int] | None = None
) -> Stored:
    """How a layer is stored. shape: its `(out, in)`, if a model says so; else what the tensors and the config say.

    Raises CheckpointError, naming the layer, for tensors that contradict each other, the config or the shape.
    """
    if "weight_packed" not in leaves and "qweight" not in leaves:
        likely = "weight_packed" if any(leaf.startswith("weight_") for leaf in leaves) else "qweight"
        raise CheckpointError(f"{name}.{likely} is missing. Download the checkpoint again.")
    owner = _owner(leaves, shape, config)
    shape = shape or _shape(name, owner, leaves, config)
    check_shape(name, shape)
    stored: Stored = formats.get(owner).inspect(leaves, shape, config, lambda leaf: read_tensor(leaves[leaf]), name)
    width = stored.scheme.bits
    if owner != "compressed-tensors" and bit_stream.words(shape[0], width) * 32 != shape[0] * width:
        raise CheckpointError(f"{name}: {shape[0]} rows do not fill words of {width}-bit zero points.")
    return stored


def _owner(leaves: Mapping[str, Entry], shape: tuple[int, int] | None, config: Mapping[str, Any]) -> str:
    """The format. gptq and awq both have a `qweight`: gptq packs it along in_features, awq along out_features.

    Where the config says which, it is that: a shape turned around must not make a layer of one a layer of the other.
    """
    if "weight_packed" in leaves:
        return "compressed-tensors"
    if config.get("quant_method") in ("awq", "gptq"):
        return str(config["quant_method"])
    qweight, scales = leaves["qweight"].shape, leaves["scales"].shape if "scales" in leaves else ()
    out_features = shape[0] if shape else scales[-1] if scales else 0
    packed = {bit_stream.words(out_features, width) for width in STORED_BITS} - {out_features}
    return "awq" if len(qweight) == 2 and qweight[1] in packed - {0} else "gptq"


def _shape(name: str, owner: str, leaves: Mapping[str, Entry], config: Mapping[str, Any]) -> tuple[int, int]:
    """`(out, in)` of a layer that no model is there to ask about."""
    if owner == "compressed-tensors":
        said = leaves.get("weight_shape")
        if said is None or tuple(said.shape) != (2,) or said.dtype.is_floating_point:
            raise CheckpointError(f"{name}.weight_shape is missing or not two sizes. Download the checkpoint again.")
        out_features, in_features = read_tensor(said).tolist()
    else:
        qweight, scales = leaves["qweight"].shape, leaves["scales"].shape if "scales" in leaves else ()
        if len(qweight) != 2 or len(scales) != 2:
            raise CheckpointError(f"{name}: qweight {list(qweight)} or scales {list(scales)} is not a matrix.")
        out_features, width = scales[1], config.get("bits")
        if owner == "awq" and awq.version(config) == "gemv":
            out_features, in_features = qweight[0], qweight[1] * 8
        elif owner == "awq":
            in_features = qweight[0]
        elif "g_idx" in leaves and len(leaves["g_idx"].shape) == 1:
            in_features = leaves["g_idx"].shape[0]
        elif type(width) is int and width > 0:
            in_features = qweight[0] * 32 // width
        else:
            raise CheckpointError(f"{name}: neither g_idx nor config.json says how many columns it has.")
    if min(out_features, in_features) < 1:
        raise CheckpointError(f"{name} is said to be [{out_features}, {in_features}].")
    return out_features, in_features
