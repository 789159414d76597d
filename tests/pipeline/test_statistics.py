"""Statistics of pairs, from real blocks, against the tokens they are sums of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from wq.pipeline import blocks as decoder
from wq.pipeline.ranks import Ranks
from wq.pipeline.statistics import SecondMoment, Tap, collect_pairs
from wq.structure.linears import find_linears
from wq.structure.towers import find_towers, model_class

TinyModel = Callable[..., Path]

# What is added to the block's input is in "", what to a later sum in the module that reads it; nothing where outputs
# are normed or scaled first, or several are added at once.
RESIDUALS = {
    "llama": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "qwen3": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
    "gemma2": {},
}


def opened(folder: Path, name: str) -> tuple[nn.ModuleList, decoder.Captured]:
    """The blocks of a model and the stream in front of them: 10 windows in two batches."""
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    (tower,) = find_towers(model, name)
    ids = torch.randint(2, 258, (10, 12))
    calls = [{"input_ids": batch, "use_cache": False} for batch in ids.split(5)]
    return tower.blocks, decoder.capture(tower.root, tower.blocks, calls, name)


@pytest.mark.parametrize("architecture", RESIDUALS)
def test_what_an_output_is_added_to_is_found_without_a_table(architecture: str, tiny_model: TinyModel) -> None:
    blocks, captured = opened(tiny_model(architecture), architecture)
    readers = find_linears(blocks[0], "", ())
    traced = decoder.trace(blocks[0], readers, lambda: captured.run(blocks[0], 0, 0))
    assert traced.residuals == RESIDUALS[architecture]


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj"])
@torch.no_grad()
def test_pairs_are_the_sums_that_they_say(name: str, tiny_model: TinyModel) -> None:
    blocks, captured = opened(tiny_model("llama"), "llama")
    block, dense = blocks[0], copy.deepcopy(blocks[0])
    block.self_attn.v_proj.weight.mul_(1.1)  # what quantizing does: the input of all that follows drifts
    block.self_attn.o_proj.weight.mul_(0.9)
    source = RESIDUALS["llama"].get(name)
    taps = [
        Tap(b.get_submodule(name), None if source is None else b.get_submodule(source), partial(captured.run, b, 0))
        for b in (block, dense)
    ]
    taps[1].whole = True
    (known,) = collect_pairs(*taps, [5, 5], Ranks())
    reads = [[tap.read(batch) for batch in range(2)] for tap in taps]
    x, r = (torch.cat([one[i] for one in reads[1]]) if reads[1][0][i] is not None else None for i in (0, 1))
    q, s = (torch.cat([one[i] for one in reads[0]]) if reads[0][0][i] is not None else None for i in (0, 1))
    assert known.heldout is not None
    for part, rows in ((known, [0, 1, 2, 3, 4, 5, 6, 8, 9]), (known.heldout, [7])):
        tokens = q[rows].flatten(0, 1).double()
        assert part.tokens == len(tokens)
        close(part.second_moment, tokens.t() @ tokens / len(tokens))
        close(part.drift, (x[rows].flatten(0, 1).double() - tokens).t() @ tokens / len(tokens))
        assert (part.residual is None) == (r is None)
        if r is not None:
            close(part.residual, (r - s)[rows].flatten(0, 1).double().t() @ tokens / len(tokens))
    for batch, out in enumerate(taps[1].outputs[:2]):  # the dense pass went on to the end
        torch.testing.assert_close(out, captured.run(dense, 0, batch))


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9


def test_tokens_that_are_not_finite_are_left_out_and_counted(generator: torch.Generator) -> None:
    x, y, r = (torch.randn(50, size, generator=generator) for size in (16, 16, 8))
    clean, dirty = SecondMoment(16, torch.device("cpu")), SecondMoment(16, torch.device("cpu"))
    keep = torch.ones(50, dtype=torch.bool)
    keep[[3, 20, 44]] = False
    clean.add(x[keep], y[keep], r[keep])
    x[3, 0], y[20, 5], r[44, 7] = torch.nan, torch.inf, -torch.inf
    dirty.add(x, y, r)
    expected, found = clean.result(), dirty.result()
    assert found.tokens == 47
    assert found.dropped == 3
    for sums in ("second_moment", "drift", "residual"):
        assert torch.equal(getattr(expected, sums), getattr(found, sums))


@pytest.mark.parametrize("architecture", tiny_models.DENSE)
def test_every_architecture_has_pairs(architecture: str, tiny_model: TinyModel) -> None:
    blocks, captured = opened(tiny_model(architecture), architecture)
    readers = find_linears(blocks[0], "", ())
    traced = decoder.trace(blocks[0], readers, lambda: captured.run(blocks[0], 0, 0))
    twin = copy.deepcopy(blocks[0])
    for name in (group[0] for group in traced.groups):
        one, two = (Tap(b.get_submodule(name), None, partial(captured.run, b, 0)) for b in (blocks[0], twin))
        drift = collect_pairs(one, two, [5, 5], Ranks())[0].drift
        assert drift is not None
        assert float(drift.abs().max()) == 0  # nothing is quantized yet
