"""HQQ: make a checkpoint in the package's safetensors form, or write one's weights as its own layers dequantize them.

recipes: `hqq` (every default: groups along a row, as its kernels want them), `axis-0` (groups along a column, which its
documentation prefers for quality), `slow` (as `hqq`, with the package's slower solver). HQQ needs no data, and its zero
points are floats: there is no symmetric grid.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import common
import torch
from safetensors.torch import save_file
from torch import Tensor

RECIPES = ("hqq", "axis-0", "slow")


def quantize(options: argparse.Namespace, ids: Tensor) -> None:
    """Round every linear layer but the head, and save a folder; `ids` are not looked at."""
    from hqq.core.optimize import optimize_weights_proximal_slow
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM

    if not options.asymmetric:
        raise SystemExit("unsupported: HQQ has no symmetric grid")
    if options.recipe == "slow":
        Quantizer.optimize_weights = optimize_weights_proximal_slow
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float16)
    size = options.group if options.group > 0 else None
    grid = BaseQuantizeConfig(nbits=options.bits, group_size=size, axis=0 if options.recipe == "axis-0" else 1)
    AutoHQQHFModel.quantize_model(model, quant_config=grid, compute_dtype=torch.float16, device="cpu")
    options.out.mkdir(parents=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: t.contiguous() for name, t in model.state_dict().items() if t is not None and name not in tied}
    save_file(state, options.out / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "hqq", "bits": options.bits}}
    (options.out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def dequantize(checkpoint: Path) -> common.Weights:
    """Each weight `[out, in]` from the package's own layer."""
    from hqq.core.quantize import HQQLinear

    for name, local in common.layers(common.tensors(checkpoint), "W_q").items():

        def weight(wide: bool, local: dict = local) -> Tensor:
            dtype = torch.float32 if wide else torch.float16
            layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
            layer.load_state_dict(dict(local))
            for leaf in ("scale", "zero"):
                layer.meta[leaf] = layer.meta[leaf].to(dtype)
            return layer.dequantize()

        yield name, weight


if __name__ == "__main__":
    common.run("hqq", common.arguments(__doc__, RECIPES), quantize, dequantize)
