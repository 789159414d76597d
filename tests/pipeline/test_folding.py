"""AWQ's scales move into the operation before the layer, and only where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from wq.pipeline import blocks as decoder
from wq.pipeline import folding
from wq.pipeline.quantizer import quantize
from wq.structure.linears import find_linears
from wq.structure.towers import find_towers

TinyModel = Callable[..., Path]
FOLDED = {
    # grouped-query attention has fewer value heads than query heads: nothing can take o_proj's scale over
    "llama": {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", "mlp.up_proj"},
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"},
    "phi": {"input_layernorm"},  # GELU is not linear: fc1 cannot take fc2's scale
}


@pytest.mark.parametrize("architecture", FOLDED)
def test_scales_fold_where_the_block_allows_it_and_the_model_stays_the_same(
    architecture: str, tiny_model: TinyModel
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    ids = torch.randint(2, 258, (2, 24))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    (tower,) = find_towers(model, architecture)
    inputs = [{"input_ids": ids, "use_cache": False}]
    captured = decoder.capture(tower.root, tower.blocks, inputs, architecture)
    block = tower.blocks[0]
    linears = find_linears(block, f"{tower.blocks_path}.0", [])
    groups, producers, _ = decoder.trace(block, linears, lambda: captured.run(block, 0, 0))
    folded = set()
    for group in groups:
        fold = folding.find(block, group, producers.get(group[0]))
        if fold is not None:
            members = [linears[name] for name in group]
            scales = torch.rand(members[0].in_features) * 3 + 0.3
            if folding.apply(fold, members, scales, lambda: captured.run(block, 0, 0)):
                folded.add(fold.name)
    assert folded == FOLDED[architecture]
    with torch.no_grad():
        after = model(input_ids=ids).logits
    assert (after - before).norm() / before.norm() < 1e-4


def test_a_fold_that_changes_the_block_is_undone() -> None:
    norm, reader, other = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)
    x = torch.randn(5, 8)

    def run() -> torch.Tensor:  # a second reader that nobody scales
        return reader(norm(x)) + other(norm(x))

    before = run()
    saved = reader.weight.detach().clone()
    assert not folding.apply(folding.Fold("norm", norm), [reader], torch.full((8,), 2.0), run)
    assert torch.equal(run(), before)
    assert torch.equal(reader.weight, saved)


def test_altered_norms_are_what_the_checkpoint_holds(tiny_model: TinyModel, tmp_path: Path) -> None:
    texts = [f"{i} green bottles hanging on the wall" for i in range(80)]
    quantize(
        tiny_model(), tmp_path / "out", method="awq", calibration=texts, samples=8, seqlen=48, group_size=32,
        dtype="float32",
    )  # fmt: skip
    before = load_file(tiny_model() / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
