"""torchao: make a weight-only checkpoint, or write one's weights as torchao's own layers multiply with them.

recipes: `intx` (2 to 8 bits, smallest and largest value), `intx-hqq` (2 to 8 bits, symmetric, HQQ's search for scales),
`int4` and `int4-hqq` (the layout of its CPU kernel: 4 bits, asymmetric, without and with HQQ), `best` (whichever of
these searches for scales on the grid that is asked for, or `intx`). None of them looks at data. The package saves its
tensors by pickling them; here their parts are saved under the layer's name, as safetensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

RECIPES = ("intx", "intx-hqq", "int4", "int4-hqq", "best")


def settings(options: argparse.Namespace) -> Any:
    """The recipe as one of torchao's configs."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    recipe = options.recipe
    if recipe == "best":
        recipe = "intx-hqq" if not options.asymmetric else "int4-hqq" if options.bits == 4 else "intx"
    if recipe in ("int4", "int4-hqq"):
        if options.bits != 4 or not options.asymmetric:
            raise SystemExit("unsupported: torchao's int4 layout has 4 bits and zero points")
        return PrototypeInt4WeightOnlyConfig(options.group, "hqq" if recipe == "int4-hqq" else "tinygemm")
    if recipe == "intx-hqq" and options.asymmetric:
        raise SystemExit("unsupported: torchao's HQQ for this layout finds scales only, no zero points")
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{options.bits}"),
        granularity=PerAxis(0) if options.group < 0 else PerGroup(options.group),
        mapping_type=MappingType.ASYMMETRIC if options.asymmetric else MappingType.SYMMETRIC,
        intx_choose_qparams_algorithm="hqq_scale_only" if recipe == "intx-hqq" else "affine",
    )


def quantize(options: argparse.Namespace, ids: Tensor) -> None:
    """Round every linear layer but the head, and save a folder; `ids` are not looked at."""
    from torchao.quantization import quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float16)
    config = settings(options)
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "tensor_data_names"):
            layer = name.removesuffix(".weight")
            state |= {f"{layer}.{part}": getattr(tensor, part).contiguous() for part in tensor.tensor_data_names}
        elif name not in tied:
            state[name] = tensor.contiguous()
    options.out.mkdir(parents=True)
    save_file(state, options.out / "model.safetensors", {"format": "pt"})
    grid = {"quant_method": "torchao", "bits": options.bits, "group_size": options.group}
    said = model.config.to_dict() | {"quantization_config": grid}
    (options.out / "config.json").write_text(json.dumps(said, indent=2, default=str) + "\n")


def dequantize(checkpoint: Path) -> common.Weights:
    """Each weight `[out, in]` from the package's own tensor, made of its parts again."""
    said = common.quantization(checkpoint)
    for name, local in common.layers(common.tensors(checkpoint), "qdata").items():

        def weight(wide: bool, local: dict = local) -> Tensor:
            kind = int4 if "scale_and_zero" in local else intx
            dtype = torch.float32 if wide else torch.float16
            return kind({leaf: t.to(dtype) if t.is_floating_point() else t for leaf, t in local.items()}, said, dtype)

        yield name, weight


def intx(local: dict[str, Tensor], said: dict, dtype: torch.dtype) -> Tensor:
    """Of the layout with a code in each byte."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    columns = local["qdata"].shape[1]
    block = (1, columns if said["group_size"] < 0 else said["group_size"])
    kind, parts = getattr(torch, f"int{said['bits']}"), (local["qdata"], local["scale"], local["zero_point"])
    return IntxUnpackedToInt8Tensor(*parts, kind, block, dtype, None).dequantize()


def int4(local: dict[str, Tensor], said: dict, dtype: torch.dtype) -> Tensor:
    """Of the layout of the CPU's kernel, which only multiplies: what it makes of the unit matrix."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    rows, columns = local["qdata"].shape[0], local["qdata"].shape[1] * 2
    packed = Int4OpaqueTensor(
        local["qdata"], local["scale_and_zero"], [1, said["group_size"]], torch.Size((rows, columns))
    )
    return functional.linear(torch.eye(columns, dtype=dtype), packed).t()


if __name__ == "__main__":
    common.run("torchao", common.arguments(__doc__, RECIPES), quantize, dequantize)
