"""From one checkpoint format to another without a change to any weight, or not at all.

Codes, zero points and scales go over as they are; every layer is read back from what is written and its dequantized
weight compared with the original's, bit for bit. What the other format cannot hold is refused, with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import wq
from wq import formats, manifest, quantized
from wq.checkpoint import Entry, ShardWriter, Spec, read_headers, read_tensor, write_text
from wq.errors import CheckpointError, FormatError
from wq.formats.stored import Packed, Stored
from wq.hf.conversion import dense, read
from wq.loaders.joined import targets
from wq.scheme import Scheme
from wq.staging import staged

_LEFT = (
    "config.json",
    "model.safetensors.index.json",
    "wq_report.json",
    "README.md",
    "quantize_config.json",
    manifest.MANIFEST,
)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    overwrite: bool = False,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint in folder `source` to folder `output` in the format `to`; return what was done.

    Raises FormatError when the format cannot hold a layer exactly, CheckpointError for a damaged or dense checkpoint,
    OutputError for an output that cannot be written.
    """
    folder, path, target = Path(source), Path(output), formats.get(to)
    config = quantized.read_config(folder)
    layers, unpacked = quantized.split(read_headers(folder))
    if not layers:
        raise CheckpointError(f"{folder} holds no packed weights. `wq quantize` makes such a checkpoint.")
    said = config["quantization_config"]
    stored = {name: quantized.describe(name, leaves, said) for name, leaves in layers.items()}
    wanted = {name: _wanted(name, info, to) for name, info in stored.items()}
    config["quantization_config"] = _config(target, wanted, _dense_names(said, unpacked, layers))
    specs = {name: Spec(entry.dtype, entry.shape) for name, entry in unpacked.items()}
    specs |= _specs(wanted)
    with staged(path, overwrite) as stage:
        with ShardWriter(stage, specs) as writer:
            for name, entry in unpacked.items():
                writer.copy(name, entry)
            for done, (name, leaves) in enumerate(layers.items()):
                for leaf, tensor in _converted(name, leaves, stored[name], wanted[name]).items():
                    writer.write(f"{name}.{leaf}", tensor)
                if on_layer is not None:
                    on_layer(done + 1, len(layers))
        write_text(stage / "config.json", json.dumps(config, indent=2) + "\n")
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in _LEFT:
                shutil.copyfile(file, stage / file.name)
        versions = {"wq": wq.__version__, "torch": torch.__version__}
        manifest.write(stage, {"command": f"wq convert --to {to}", "versions": versions})
    return {"output": str(path), "format": to, "layers": len(layers), "identical": len(layers)}


def _config(target: ModuleType, wanted: Mapping[str, Stored], dense: list[str]) -> dict[str, Any]:
    """The `quantization_config`, for one scheme or several. Raises FormatError where the format has one for all."""
    schemes = {name: info.scheme for name, info in wanted.items()}
    weights: Counter[Scheme] = Counter()
    for info in wanted.values():
        weights[info.scheme] += info.shape[0] * info.shape[1]
    mixed = targets(schemes) if len(weights) > 1 else []
    config: dict[str, Any] = target.config(weights.most_common(1)[0][0], dense, mixed)
    return config


def _wanted(name: str, info: Stored, to: str) -> Stored:
    """How the layer lies in the other format. Raises FormatError."""
    if info.permuted and to != "gptq":
        raise FormatError(
            f"{name}: its columns are grouped in another order (act-order), which {to} cannot say in a way that vLLM "
            "loads. Convert it to gptq."
        )
    scheme = info.scheme
    if to in ("gptq", "awq") and scheme.scale_dtype != "float16":
        scheme = replace(scheme, scale_dtype="float16")  # exact or refused when the scales are read
    formats.get(to).check(scheme, info.shape, name)
    variant = "" if to != "gptq" else "1" if scheme.symmetric else "2"
    return Stored(to, scheme, info.shape, variant, info.permuted)


def _specs(wanted: Mapping[str, Stored]) -> dict[str, Spec]:
    """Every tensor that will be written, found by converting empty ones."""
    specs: dict[str, Spec] = {}
    for name, info in wanted.items():
        for leaf, tensor in formats.get(info.format).from_packed(_empty(info), info).items():
            specs[f"{name}.{leaf}"] = Spec(tensor.dtype, tuple(tensor.shape))
    return specs


def _empty(info: Stored) -> Packed:
    """A weight of zeros on meta, of the right shapes."""
    out_features, in_features = info.shape
    width, groups = info.scheme.bits, info.scheme.groups(in_features)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    zero = None if info.scheme.symmetric else empty(-(-out_features * width // 32), groups, dtype=torch.int32)
    packed = empty(out_features, -(-in_features * width // 32), dtype=torch.int32)
    return Packed(packed, empty(out_features, groups, dtype=getattr(torch, info.scheme.scale_dtype)), zero)


def _converted(name: str, leaves: Mapping[str, Entry], info: Stored, wanted: Stored) -> dict[str, Tensor]:
    """A layer's tensors in the other format, read back and compared. Raises FormatError when they are not the same."""
    weight = read({leaf: read_tensor(entry) for leaf, entry in leaves.items()}, info)
    scale = weight.scale.to(getattr(torch, wanted.scheme.scale_dtype))
    if not torch.equal(scale.to(weight.scale.dtype), weight.scale):
        raise FormatError(
            f"{name}: its {info.scheme.scale_dtype} scales are not exact in float16, which {wanted.format} has."
        )
    tensors: dict[str, Tensor] = formats.get(wanted.format).from_packed(weight._replace(scale=scale), wanted)
    before = dense(weight, info, torch.float32)
    after = dense(read(tensors, wanted), wanted, torch.float32)
    if not torch.equal(before, after):
        raise FormatError(f"{name}: the weight read back differs from the original. Please report this.")
    return tensors


def _dense_names(config: Mapping[str, Any], unpacked: Mapping[str, Entry], layers: Mapping[str, Any]) -> list[str]:
    """The modules that stay dense: those that the config names, and every other matrix."""
    names = {name.removesuffix(".weight") for name, entry in unpacked.items() if len(entry.shape) == 2}
    said = config.get("ignore") or config.get("modules_to_not_convert") or ()
    names |= {name for name in said if isinstance(name, str) and not name.startswith("re:")}
    if not config.get("lm_head") and "lm_head" not in layers:
        names.add("lm_head")
    return sorted(name for name in names if not name.rpartition(".")[2].startswith("embed"))
