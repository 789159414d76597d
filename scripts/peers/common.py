"""What the peers' drivers share: their command line, the calibration windows, and how dense weights are written."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

NOTE = "peer.json"  # left beside the config: who made the checkpoint, and how
Weights = Iterable[tuple[str, Callable[[bool], Tensor]]]  # a layer's name, and its weight [out, in]: wide, or as stored


def arguments(description: str | None, recipes: Iterable[str]) -> argparse.Namespace:
    """Parse `MODEL OUT ...` or `--dequantize CHECKPOINT OUT`. The first recipe is the default."""
    names = list(recipes)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL", help="a dense folder; with --dequantize, a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; with --dequantize, a .safetensors file")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64, help="columns that share a scale; -1 is a whole row")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--recipe", choices=names, default=names[0])
    parser.add_argument("--ids", type=Path, help="calibration windows [n, tokens], .pt or .npy; else random tokens")
    parser.add_argument("--dequantize", action="store_true", help="write a checkpoint's weights as the peer reads them")
    return parser.parse_args()


def windows(path: Path | None, source: Path) -> Tensor:
    """Calibration windows `[n, tokens]`, int64; without a file, random ones of the model's vocabulary."""
    if path is None:
        vocabulary = AutoConfig.from_pretrained(source).vocab_size
        return torch.randint(vocabulary, (16, 128), generator=torch.Generator().manual_seed(0))
    if path.suffix == ".npy":
        import numpy

        return torch.from_numpy(numpy.load(path)).long()
    found = torch.load(path)
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def note(out: Path, package: str, options: argparse.Namespace) -> None:
    """Leave a note beside the checkpoint: package, versions, recipe, and the grid that was asked for."""
    said: dict[str, Any] = {"peer": package, "version": importlib.metadata.version(package), "recipe": options.recipe}
    said |= {"bits": options.bits, "group": options.group, "symmetric": not options.asymmetric}
    said["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    (out / NOTE).write_text(json.dumps(said, indent=2) + "\n")


def quantization(checkpoint: Path) -> dict:
    """The `quantization_config` of a checkpoint."""
    return json.loads((checkpoint / "config.json").read_text())["quantization_config"]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors checkpoint, sharded or not."""
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    return found


def layers(state: dict[str, Tensor], leaf: str) -> dict[str, dict[str, Tensor]]:
    """Tensors of each layer that has a `leaf` (`qweight`, ...), by layer and local name."""
    found: dict[str, dict[str, Tensor]] = {name[: -len(leaf) - 1]: {} for name in state if name.endswith(f".{leaf}")}
    for name, tensor in state.items():
        layer, _, local = name.rpartition(".")
        if layer in found:
            found[layer][local] = tensor
    return found


def skeleton(checkpoint: Path) -> nn.Module:
    """The checkpoint's model on meta, not quantized: for peers that find a layer's settings in a model."""
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_dense(out: Path, weights: Weights) -> None:
    """Save each layer's weight twice: `NAME` with scales widened to float32 first, `NAME:stored` in their own dtype."""
    found = {}
    for name, weight in weights:
        found[f"{name}:stored"] = weight(False).detach().clone().contiguous()
        found[name] = weight(True).detach().clone().contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, out)
    print(f"{out}: {len(found) // 2} weights")


def run(
    package: str,
    options: argparse.Namespace,
    quantize: Callable[[argparse.Namespace, Tensor], None],
    dequantize: Callable[[Path], Weights],
) -> None:
    """Do what the command line asks for."""
    if options.dequantize:
        write_dense(options.out, dequantize(options.source))
        return
    quantize(options, windows(options.ids, options.source))
    note(options.out, package, options)
