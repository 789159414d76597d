"""Check that wq reads checkpoints which other quantizers made, and computes what their owners mean.

    python scripts/check_peers.py CHECKPOINT... --dequantized FOLDER --out RESULT.json

`scripts/peers` makes both: a CHECKPOINT folder, and FOLDER/NAME.safetensors with its weights as the owner's code
dequantizes them, under each layer's name (scales widened to float32 first) and `LAYER:stored` (in their own dtype).
Each checkpoint is loaded in float32 with `quantization_config=WqConfig()`. Its weights must be those of the owner, bit
for bit, and its logits those of a dense model that carries them. Then it is loaded once more with `import wq` alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import wq
from wq import WqConfig, WqLinear

LIMIT = 1e-5
WINDOW = (2, 48)  # batch and tokens of the random input


def dense_model(checkpoint: Path, weights: Mapping[str, Tensor]) -> nn.Module:
    """A float32 model of the checkpoint's architecture: the owner's weights, and its other tensors as they are."""
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {f"{name}.weight": weight for name, weight in weights.items()}
    for file in checkpoint.glob("*.safetensors"):
        state |= {name: t for name, t in load_file(file).items() if name.rpartition(".")[0] not in weights}
        state |= {name: t for name, t in load_file(file).items() if name.endswith(".bias")}
    left = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not left.unexpected_keys, left.unexpected_keys
    assert set(left.missing_keys) <= tied, left.missing_keys
    return model


def logits(model: nn.Module, vocabulary: int) -> Tensor:
    """Of one fixed random input."""
    ids = torch.randint(vocabulary, WINDOW, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=ids).logits


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes: a zero and a negative zero differ, too."""
    return a.dtype == b.dtype and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def compare(model: nn.Module, owner: Mapping[str, Tensor]) -> dict[str, int]:
    """How many layers there are, and how many of them the owner's dequantization agrees with bit for bit."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WqLinear)}
    if layers.keys() != {name for name in owner if ":" not in name}:
        raise ValueError(f"packed layers differ: {sorted(layers.keys() ^ {n for n in owner if ':' not in n})[:4]}")
    wide = sum(same_bits(layer.dequantize(torch.float32), owner[name]) for name, layer in layers.items())
    stored = sum(same_bits(layer.dequantize(), owner[f"{name}:stored"]) for name, layer in layers.items())
    return {"layers": len(layers), "equal_float32": wide, "equal_stored_dtype": stored}


def bare_load(checkpoint: Path) -> str:
    """Who loads it without a flag: wq, another, or nobody."""
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    except Exception as error:  # whatever another loader raises is the finding
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    packed = any(isinstance(module, WqLinear) for module in model.modules())
    return "wq" if packed else type(model.hf_quantizer).__name__


def check(checkpoint: Path, dequantized: Path, bare: bool) -> dict[str, Any]:
    """One row of the report; `error` instead of numbers when it does not load."""
    row: dict[str, Any] = {"name": checkpoint.name, **json.loads((checkpoint / "peer.json").read_text())}
    owner = load_file(dequantized)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, quantization_config=WqConfig()
        ).eval()
        row |= compare(model, owner)
        ours = logits(model, model.config.vocab_size)
        del model
        theirs = logits(dense_model(checkpoint, {n: t for n, t in owner.items() if ":" not in n}), ours.shape[-1])
        row["logits_relative_error"] = float((ours - theirs).norm() / theirs.norm())
        equal = row["layers"] == row["equal_float32"] == row["equal_stored_dtype"]
        row["passed"] = equal and row["logits_relative_error"] < LIMIT
    except Exception as error:  # a row that fails must not hide the others
        row |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
    if bare:
        row["without_flag"] = bare_load(checkpoint)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--dequantized", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", default="", help="what was quantized, for the report")
    parser.add_argument("--no-bare", action="store_true", help="do not load without the flag as well")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for checkpoint in options.checkpoints:
        row = check(checkpoint, options.dequantized / f"{checkpoint.name}.safetensors", not options.no_bare)
        rows.append(row)
        print(json.dumps(row), flush=True)
    versions = {"wq": wq.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {
        "date": datetime.date.today().isoformat(),
        "model": options.model,
        "machine": platform.machine(),
        "versions": versions,
        "limit": LIMIT,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    passed = sum(row["passed"] for row in rows)
    print(f"{passed} passed, {len(rows) - passed} failed")
    raise SystemExit(passed != len(rows))


if __name__ == "__main__":
    main()
