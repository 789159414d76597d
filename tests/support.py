"""What wq does with an architecture, tried on a random model: one row of the README's support matrix.

`python scripts/support_matrix.py` writes the matrix; `test_support.py` tries every row again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wq import WqConfig
from wq.hf import load
from wq.layers import ExpertWeight, WqLinear
from wq.pipeline.quantizer import quantize
from wq.structure.linears import is_linear
from wq.structure.towers import find_blocks, model_class

FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {},
    "gptq": {},
    "awq": {"symmetric": False},
}
HEADER = ("architecture", "quantized", "stays dense", "written as")
_SMALL: dict[str, Any] = {"calibration": "builtin", "samples": 8, "seqlen": 32, "group_size": 32}


class Row(NamedTuple):
    """A row of the matrix, as Markdown."""

    architecture: str
    quantized: str
    dense: str
    formats: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def check(architecture: str, folder: Path) -> Row:
    """Quantize, load, save, load again and generate, in each format and on load; raises AssertionError."""
    source = tiny_models.make(folder / "dense", architecture)
    dense = from_pretrained(source, None)
    quantize(source, folder / "eight", bits=8, method="gptq", **_SMALL)
    close(load(folder / "eight", dtype="float32")[0], dense)
    on_load = from_pretrained(source, WqConfig(bits=8, group_size=32))
    close(on_load, dense)
    on_load.save_pretrained(folder / "on-load")
    assert torch.equal(logits(from_pretrained(folder / "on-load", WqConfig())), logits(on_load))
    written = []
    for format, options in FORMATS.items():
        quantize(source, folder / format, method="rtn", format=format, **_SMALL, **options)
        model = round_trip(folder / format, folder / f"{format}-again")
        written.append(format if packed(model) == packed(on_load) else f"{format} (experts dense)")
    return Row(
        f"`{architecture}`",
        ", ".join(sorted(packed(on_load))),
        ", ".join(sorted(dense_in(on_load))),
        ", ".join(written),
    )


def from_pretrained(folder: Path, config: WqConfig | None, dtype: Any = torch.float32) -> Any:
    from transformers import AutoConfig

    kind = model_class(AutoConfig.from_pretrained(folder))
    options = {} if config is None else {"quantization_config": config}
    return kind.from_pretrained(folder, dtype=dtype, **options)


def logits(model: Any) -> Tensor:
    """For some tokens; an encoder-decoder model reads them twice."""
    ids = torch.arange(2, 50).reshape(2, 24)
    also = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **also).logits
    return found


def close(model: Any, dense: Any) -> None:
    """8 bits forget almost nothing; the median of tokens, as a router near a tie may send one elsewhere."""
    expected = logits(dense)
    error = ((logits(model) - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    assert 0 < error < 0.02, error


def round_trip(folder: Path, again: Path) -> Any:
    """Load, save the same tensors, load them to the same model, generate."""
    model, _ = load(folder)
    assert any(isinstance(module, WqLinear) for module in model.modules())
    model.save_pretrained(again)
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # transformers keeps some norms in float32, and saves them so
        assert torch.equal(after[name].to(tensor.dtype), tensor), name
    other = from_pretrained(again, WqConfig(), "auto")
    assert torch.equal(logits(other), logits(model))
    start = torch.arange(2, 12).unsqueeze(0)
    texts = [m.generate(start, max_new_tokens=4, min_new_tokens=4, do_sample=False) for m in (model, other)]
    assert torch.equal(*texts)
    assert texts[0].shape[1] >= 5
    return model


def packed(model: nn.Module) -> set[str]:
    """Names of packed layers and parameters of experts."""
    kinds = {WqLinear: "", ExpertWeight: "experts' "}
    return {
        kinds[type(module)] + path.rpartition(".")[2] for path, module in model.named_modules() if type(module) in kinds
    }


def dense_in(model: Any) -> set[str]:
    """Names of matrices that are not packed; outside of the blocks, of what in the model they belong to."""
    blocks = tuple(f"{path}." for path, _ in find_blocks(model.__class__(model.config), "model"))
    around = {"model", "language_model", "decoder", "encoder", model.base_model_prefix}
    found = set()
    for path, module in model.named_modules():
        if is_linear(module) or isinstance(module, nn.Embedding) or "Router" in type(module).__name__:
            parts = [part for part in path.split(".") if part not in around] or [path]
            found.add(parts[-1] if path.startswith(blocks) else parts[0])
    return found
