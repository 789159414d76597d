"""auto-round: make a checkpoint in one of its export formats, or write one's weights as auto-round dequantizes them.

recipes: a name is the export format (`auto_round`, `auto_round:auto_gptq`, `auto_round:gptqmodel`,
`auto_round:auto_awq`, `auto_gptq`, `auto_awq`, `llm_compressor`), but for `mixed` (`auto_round`, `v_proj` at 8 bits and
one layer dense), `mixed-gptq`, `mixed-ct` and `head` (the head quantized too). These tune for a few steps only, which
is enough for a format. `opt-rtn`, `light`, `default` and `best` are the recipes of the package's own command line, with
its steps, batches and rates, in the format `auto_round`; the windows stay those of `--ids`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from torch import Tensor

FORMATS = (
    "auto_round",
    "auto_round:auto_gptq",
    "auto_round:gptqmodel",
    "auto_round:auto_awq",
    "auto_gptq",
    "auto_awq",
    "llm_compressor",
)
MIXED = {"mixed": "auto_round", "mixed-gptq": "auto_gptq", "mixed-ct": "llm_compressor", "head": "auto_round"}
RECIPES = {"opt-rtn": "opt_rtn", "light": "light", "default": "default", "best": "best"}  # as the package names them
STEPS = 8  # of its optimizer, where only the format matters


def quantize(options: argparse.Namespace, ids: Tensor) -> None:
    """Tune the rounding on `ids` `[n, tokens]` and save a folder."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    grid: dict[str, Any] = {"bits": options.bits, "group_size": options.group, "sym": not options.asymmetric}
    layers: dict[str, Any] = {}
    if options.recipe.startswith("mixed"):
        layers = {"v_proj": {"bits": 8}, "model.layers.0.self_attn.o_proj": {"bits": 16}}
    if options.recipe == "head":
        layers = {"lm_head": {"bits": options.bits}}
    tuning = recipe(options)
    data = {"dataset": list(ids.split(tuning["batch_size"])), "nsamples": len(ids), "seqlen": ids.shape[1]}
    rounder = AutoRound(
        model, tokenizer, **grid, **tuning, **data, layer_config=layers, device_map="cpu", enable_torch_compile=False
    )
    form = "auto_round" if options.recipe in RECIPES else MIXED.get(options.recipe, options.recipe)
    rounder.quantize_and_save(str(options.out), format=form)
    for inner in [config.parent for config in options.out.glob("*/config.json")]:  # it makes a folder of its own inside
        for file in inner.iterdir():
            file.rename(options.out / file.name)
        inner.rmdir()


def recipe(options: argparse.Namespace) -> dict[str, Any]:
    """Steps, batches and rates of its optimizer."""
    if options.recipe not in RECIPES:
        return {"iters": STEPS, "batch_size": 4}
    from auto_round.cli.main import RECIPES as OWN

    tuning = {name: value for name, value in OWN[RECIPES[options.recipe]].items() if name not in ("seqlen", "nsamples")}
    if options.recipe == "best" and options.bits == 2:
        tuning["enable_alg_ext"] = True  # what its README recommends for 2 bits
    return tuning


def dequantize(checkpoint: Path) -> common.Weights:
    """Each weight `[out, in]`: what the package's own layer multiplies its input with."""
    said = common.quantization(checkpoint)
    if said["quant_method"] == "compressed-tensors":
        import llm_compressor_quantize

        yield from llm_compressor_quantize.dequantize(checkpoint)
        return
    packing = said.get("packing_format") or {"gptq": "auto_round:auto_gptq", "awq": "auto_awq"}[said["quant_method"]]
    for name, local in common.layers(common.tensors(checkpoint), "qweight").items():
        yield name, lambda wide, local=local: layer_weight(local, packing, said, wide)


def layer_weight(local: dict[str, Tensor], packing: str, said: dict, wide: bool) -> Tensor:
    """One layer's weight `[out, in]`."""
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    scales = local["scales"].float() if wide else local["scales"]
    groups, out_features = scales.shape
    if "awq" in packing:
        size = local["qweight"].shape[0] // groups
        bits = local["qweight"].shape[1] * 32 // out_features
        return dequantize_gemm(local["qweight"], local["qzeros"], scales, bits, size).t()
    bits = local["qzeros"].shape[1] * 32 // out_features
    in_features = local["qweight"].shape[0] * 32 // bits
    size = said["group_size"] if 0 < said["group_size"] < in_features else in_features
    # The layer cannot compute with a last group of fewer columns: it is given rows of zeros to fill it.
    columns = groups * size
    qweight = torch.nn.functional.pad(local["qweight"], (0, 0, 0, (columns - in_features) * bits // 32))
    # The one with a g_idx of its own reads it wrongly where rows and columns differ in number; it holds nothing else.
    kind = dynamic_import_quant_linear_for_packing(packing.replace(":gptqmodel", ""), bits, size, said["sym"])
    layer = kind(bits, size, columns, out_features, bias=False)
    layer.qweight, layer.qzeros, layer.scales = qweight, local["qzeros"], scales
    with mock.patch("torch.matmul", lambda x, weight: weight):
        return layer(torch.zeros(columns, columns, dtype=scales.dtype))[:in_features].t()


if __name__ == "__main__":
    common.run("auto-round", common.arguments(__doc__, (*FORMATS, *MIXED, *RECIPES)), quantize, dequantize)
