"""How far a quantized model is from the dense one: both as float32 models of the same code, on the same windows.

Only the dense model's last hidden states are kept (a window of 2048 tokens: 2048 times the hidden size, not times the
vocabulary); its head makes exact logits of them again, a slice at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from wq import WqConfig
from wq.checkpoint import read_headers

SLICE = 256  # tokens whose distributions over the vocabulary are held at once
BLOCK = 128  # tokens that are resampled together
CODES = ("weight_packed", "qweight", "W_q", "qdata")  # what formats call the integers of a layer


@dataclass
class PerToken:
    """Of each predicted token, float64 `[windows, seqlen - 1]`: KL(dense ‖ quantized), its loss, same first choice."""

    kl: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Figures for a report; `kl_blocks` are sums over blocks of tokens, in the order of the text."""
        kl, nll = torch.stack(self.kl), torch.stack(self.nll)
        return {
            "perplexity": math.exp(min(float(nll.mean()), 700.0)),
            "kl": {
                "mean": float(kl.mean()),
                "median": float(kl.flatten().quantile(0.5)),
                "p99": float(kl.flatten().quantile(0.99)),
            },
            "top1_agreement": float(torch.stack(self.agree).double().mean()),
            "kl_blocks": [float(f"{value:.6g}") for value in block_sums(kl).tolist()],
        }


def block_sums(values: Tensor, size: int = BLOCK) -> Tensor:
    """Sums of `[windows, tokens]` over blocks of `size` tokens; the last block of a window may be shorter."""
    return torch.stack([block.sum(1) for block in values.split(size, dim=1)], dim=1).flatten()


class Scorer:
    """A dense model in float32, into which the weights of one quantized model after another are put.

    texts: windows of token ids by name, int64 `[windows, seqlen]`.
    """

    def __init__(self, model: str, texts: Mapping[str, Tensor]):
        self.texts = dict(texts)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.head = self.model.get_output_embeddings().weight.detach().clone()
        self._check_head()
        self.hidden = {name: [self._hidden(window) for window in windows] for name, windows in self.texts.items()}

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Logits must be the head's product with the last hidden state, and nothing more."""
        head = self.model.get_output_embeddings()
        ids = next(iter(self.texts.values()))[:1, :16]
        expected = self.model(input_ids=ids, use_cache=False).logits[0]
        found = functional.linear(self._hidden(ids[0]), self.head, head.bias)
        if head.bias is not None or not torch.allclose(found, expected, rtol=1e-4, atol=1e-3):
            raise SystemExit(
                "this model's logits are more than its head times its last hidden state: not comparable here"
            )

    @torch.inference_mode()
    def _hidden(self, window: Tensor) -> Tensor:
        """Last hidden states `[tokens, hidden]` of one window."""
        return self.model.base_model(input_ids=window.unsqueeze(0), use_cache=False).last_hidden_state[0]

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Take over a model's weights, all of them, under the names of the dense model."""
        left = self.model.load_state_dict(dict(state), strict=False)
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        if left.unexpected_keys or set(left.missing_keys) - tied:
            names = [*left.unexpected_keys, *left.missing_keys]
            raise ValueError(f"{names[0]} is in one of the two models only ({len(names)} such tensors)")

    @torch.inference_mode()
    def score(self) -> dict[str, dict[str, Any]]:
        """Figures for each text, of the weights that are in place."""
        head = self.model.get_output_embeddings().weight
        found = {}
        for name, windows in self.texts.items():
            tokens = PerToken()
            for window, dense in zip(windows, self.hidden[name], strict=True):
                self._compare(window, dense, self._hidden(window), head, tokens)
            found[name] = tokens.summary()
        return found

    def _compare(self, window: Tensor, dense: Tensor, ours: Tensor, head: Tensor, into: PerToken) -> None:
        """One window: ids `[n]`, hidden states `[n, hidden]` of both."""
        pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(window) - 1, SLICE):
            stop = min(start + SLICE, len(window) - 1)
            p = functional.log_softmax(functional.linear(dense[start:stop], self.head), dim=-1)
            q = functional.log_softmax(functional.linear(ours[start:stop], head), dim=-1)
            nll = functional.nll_loss(q, window[start + 1 : stop + 1], reduction="none")
            agree = p.argmax(-1) == q.argmax(-1)
            pieces.append(((p.exp() * (p - q)).sum(-1).double(), nll.double(), agree))
        for values, parts in zip((into.kl, into.nll, into.agree), zip(*pieces, strict=True), strict=True):
            values.append(torch.cat(parts))

    def dense_perplexity(self) -> dict[str, float]:
        """The dense model's own, while its weights are still in place."""
        return {name: figures["perplexity"] for name, figures in self.score().items()}


def wq_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of wq, dequantized by its own loader."""
    config = WqConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, quantization_config=config)
    return dict(model.state_dict())


def peer_state(checkpoint: Path, dequantized: Path) -> dict[str, Tensor]:
    """Every tensor of a peer's checkpoint: dense weights that its own code made, and what it kept dense as it is."""
    weights = {name: tensor for name, tensor in load_file(dequantized).items() if ":" not in name}
    state = {f"{name}.weight": weight for name, weight in weights.items()}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name.rpartition(".")[0] not in weights or name.endswith(".bias"):
                state[name] = tensor
    return state


def sizes(checkpoint: Path, model: nn.Module, bits: int) -> dict[str, Any]:
    """What the checkpoint takes on disk: bytes, and bits for each quantized weight with its scales and all else.

    Codes that lie one in a byte are counted at their own width: such a layout is for the processor, not for the disk.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, entry in read_headers(checkpoint).items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = entry
    weights, stored = 0, 0.0
    packed = {layer: leaves for layer, leaves in layers.items() if any(code in leaves for code in CODES)}
    for layer, leaves in packed.items():
        count = model.get_parameter(f"{layer}.weight").numel()
        weights += count
        for leaf, entry in leaves.items():
            wide = leaf in CODES and entry.dtype in (torch.int8, torch.uint8) and math.prod(entry.shape) == count
            stored += count * bits if wide else 0 if leaf == "bias" else entry.bytes * 8
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        "bits_per_weight": round(stored / weights, 4),
        "layers": len(packed),
        "quantized_parameters": weights,
    }
