"""Random models small enough to quantize in a second, of the architectures that wq must handle without a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320

# What differs from the common sizes, by model type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}
DECODERS = [name for name in _OVERRIDES if name != "gpt2"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: any text can be encoded, and decodes to itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def config(architecture: str, **overrides: Any) -> Any:
    """A tiny config of `architecture`."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return AutoConfig.for_model(architecture, **{**common, **_OVERRIDES[architecture], **overrides})


def make(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of `architecture` and its tokenizer to `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(architecture, **overrides)).to(dtype)
    with torch.no_grad():  # norms and biases start at 1 and 0; move them, so that losing one is noticed
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
