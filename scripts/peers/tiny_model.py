"""Write a random Llama small enough to keep its quantized forms in the repository (about 60 kB at 4 bits).

    python scripts/peers/tiny_model.py OUT [--untied] [--even]

Rows of 96 columns are no multiple of a group of 64; query, key and value have biases. With `--even` all sizes are
multiples of 64, which AutoAWQ's and gptqmodel's AWQ ask for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--untied", action="store_true", help="with a head of its own")
    parser.add_argument("--even", action="store_true", help="all sizes are multiples of 64")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128 if options.even else 96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if options.even else 2,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=not options.untied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # norms and biases start at 1 and 0; move them, so that losing one is noticed
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(options.out)
    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<0>", eos_token="<1>").save_pretrained(options.out)


if __name__ == "__main__":
    main()
