"""Random models small enough to quantize in a second, of the architectures that wq must handle without a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320

_COMMON: dict[str, Any] = {
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
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# What differs from the common sizes, by model type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    # dense decoders
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
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "modernbert-decoder": {"pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 1, "local_attention": 16},
    "mamba": {"time_step_rank": 32},
    # mixtures of experts
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 12, "num_experts_per_tok": 2, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "pad_token_id": 0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
    },
    # encoder-decoder
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": None,
    },
    # text and images
    "llava": {"vision": "clip_vision_model", "text": "llama", "image_token_index": 300},
    "gemma3": {
        "vision": "siglip_vision_model",
        "text": "gemma3_text",
        "image_token_index": 300,
        "mm_tokens_per_image": 4,
        "boi_token_index": 301,
        "eoi_token_index": 302,
    },
    "qwen2_5_vl": {
        "vision": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
        },
        "text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        "image_token_id": 300,
    },
    "qwen3_vl_moe": {  # its experts are 3-D on disk, and transposed there
        "vision": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 8,
            "deepstack_visual_indexes": [0],
        },
        "text": {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
        },
        "image_token_id": 300,
    },
}
MOES = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"]
ENCODER_DECODERS = ["t5", "bart"]
VISION = ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl_moe"]
DENSE = [name for name in _OVERRIDES if name not in (*MOES, *ENCODER_DECODERS, *VISION)]
DECODERS = [*DENSE, *MOES]
ALL = list(_OVERRIDES)


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
    own = dict(_OVERRIDES[architecture])
    if architecture in VISION:
        vision, text = own.pop("vision"), own.pop("text")
        if isinstance(vision, str):
            own["vision_config"] = AutoConfig.for_model(vision, **_VISION)
            own["text_config"] = config(text, **overrides)
        else:
            own |= {"vision_config": vision, "text_config": {**_COMMON, **text, **overrides}}
        return AutoConfig.for_model(architecture, **own)
    return AutoConfig.for_model(architecture, **{**_COMMON, **own, **overrides})


def build(architecture: str, **overrides: Any) -> PreTrainedModel:
    """A random model of `architecture`, of the class that its checkpoints name."""
    auto = AutoModelForCausalLM
    if architecture in ENCODER_DECODERS:
        auto = AutoModelForSeq2SeqLM
    elif architecture in VISION:
        auto = AutoModelForImageTextToText
    return auto.from_config(config(architecture, **overrides))


def make(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of `architecture` and its tokenizer to `folder`."""
    torch.manual_seed(seed)
    model = build(architecture, **overrides).to(dtype)
    with torch.no_grad():  # norms and biases start at 1 and 0; move them, so that losing one is noticed
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def opening_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts `<s>` before every text, as those of Llama and Gemma do."""
    made = tokenizer()
    made._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made
