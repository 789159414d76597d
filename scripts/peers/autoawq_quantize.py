"""AutoAWQ: make an awq checkpoint, or write one's weights as AutoAWQ dequantizes them.

recipes: the layouts `gemm` and `gemv`. There are only 4 bits with zero points (`--asymmetric`). The package dequantizes
gemv on a GPU alone: its weights are decoded here, and the package's own packer must then make the checkpoint's tensors
from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import common
import torch
from torch import Tensor, nn

RECIPES = ("gemm", "gemv")


def older(source: Path, folder: Path) -> Path:
    """`source`, linked to in `folder`, with a config that transformers 4 understands."""
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize(options: argparse.Namespace, ids: Tensor) -> None:
    """Calibrate on `ids` `[n, tokens]` and save a folder."""
    from awq import AutoAWQForCausalLM

    if options.bits != 4 or not options.asymmetric:
        raise SystemExit("unsupported: AutoAWQ packs 4 bits with zero points only")
    grid = {"zero_point": options.asymmetric, "q_group_size": options.group, "w_bit": options.bits}
    grid["version"] = options.recipe
    with tempfile.TemporaryDirectory() as folder:
        source = str(older(options.source, Path(folder)))
        model = AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", torch_dtype=torch.float16)
        data = {"calib_data": ids.tolist(), "max_calib_samples": len(ids), "max_calib_seq_len": ids.shape[1]}
        model.quantize(None, quant_config=grid, **data)
        model.save_quantized(str(options.out))


def dequantize(checkpoint: Path) -> common.Weights:
    """Each weight `[out, in]` from the package's own function."""
    from awq.utils.packing_utils import dequantize_gemm

    said = common.quantization(checkpoint)
    for name, local in common.layers(common.tensors(checkpoint), "qweight").items():
        if said["version"] == "gemv":
            decoded = decode_gemv(local, said["group_size"])
            yield name, lambda wide, found=decoded: found[wide]
            continue

        def weight(wide: bool, local: dict = local) -> Tensor:
            scales = local["scales"].float() if wide else local["scales"]
            size = said["group_size"] if said["group_size"] > 0 else local["qweight"].shape[0]
            return dequantize_gemm(local["qweight"], local["qzeros"], scales, said["bits"], size).t()

        yield name, weight


def decode_gemv(local: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """A gemv layer's weight `[out, in]` in the scales' dtype and in float32, checked with the package's packer."""
    from awq.modules.linear.gemv import WQLinear_GEMV

    def nibbles(words: Tensor) -> Tensor:
        return (words.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15).flatten(1)

    codes = nibbles(local["qweight"])
    groups = codes.shape[1] // size
    scale, zero = local["scales"][:, :groups], nibbles(local["qzeros"])[:, :groups]
    stored, wide = (
        (codes - zero.repeat_interleave(size, 1)) * s.repeat_interleave(size, 1) for s in (scale, scale.float())
    )
    dense = nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    dense.weight.data = wide
    again = WQLinear_GEMV.from_linear(dense, 4, size, scales=scale.float(), zeros=zero.float())
    for leaf in ("qweight", "qzeros", "scales"):
        assert torch.equal(getattr(again, leaf), local[leaf]), leaf
    return stored, wide


if __name__ == "__main__":
    common.run("autoawq", common.arguments(__doc__, RECIPES), quantize, dequantize)
