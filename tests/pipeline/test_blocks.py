"""Finding the blocks, grouping layers by shared input, and catching what goes into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from wq.errors import ModelError
from wq.pipeline import blocks as decoder
from wq.pipeline.ranks import Ranks
from wq.pipeline.statistics import collect
from wq.structure.linears import find_linears
from wq.structure.towers import find_towers, model_class

TinyModel = Callable[..., Path]


def model_of(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def inputs(*batches: Tensor) -> list[dict[str, Any]]:
    return [{"input_ids": tokens, "use_cache": False} for tokens in batches]


GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],  # attention and MLP run side by side
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}


@pytest.mark.parametrize("architecture", GROUPS)
def test_layers_that_share_an_input_are_found_without_a_table(architecture: str, tiny_model: TinyModel) -> None:
    model = model_of(tiny_model(architecture))
    (tower,) = find_towers(model, architecture)
    blocks = tower.blocks
    captured = decoder.capture(tower.root, blocks, inputs(torch.randint(2, 258, (2, 16))), architecture)
    linears = find_linears(blocks[0], f"{tower.blocks_path}.0", [])
    groups, producers, _ = decoder.trace(blocks[0], linears, lambda: captured.run(blocks[0], 0, 0))
    short = [sorted(name.rpartition(".")[2] for name in group) for group in groups]
    assert sorted(short) == sorted(sorted(group) for group in GROUPS[architecture])
    assert "norm" in producers[groups[0][0]][0].lower()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "opt", "falcon", "phi", "mixtral"])
def test_running_block_by_block_is_running_the_model(architecture: str, tiny_model: TinyModel) -> None:
    """Catches wrong masks, positions and per-layer arguments: Gemma's layers differ in theirs."""
    model = model_of(tiny_model(architecture))
    (tower,) = find_towers(model, architecture)
    blocks = tower.blocks
    batches = [torch.randint(2, 258, (3, 40)), torch.randint(2, 258, (1, 40))]  # a short last batch
    captured = decoder.capture(tower.root, blocks, inputs(*batches), architecture)
    for index, block in enumerate(blocks):
        captured.advance(block, index)
    last: list[Tensor] = []
    blocks[-1].register_forward_hook(lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for ours, theirs in zip(captured.hidden, last, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", tiny_models.ENCODER_DECODERS)
def test_an_encoder_is_finished_before_its_decoder_is_run(architecture: str, tiny_model: TinyModel) -> None:
    """T5's blocks hand a position bias on, and both its stacks share an embedding that is on disk once."""
    folder = tiny_model(architecture)
    encoder_ids, decoder_ids = torch.randint(2, 258, (3, 20)), torch.randint(2, 258, (3, 12))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(input_ids=encoder_ids, decoder_input_ids=decoder_ids, output_hidden_states=True)
    encoder, decoder_ = find_towers(model, architecture)
    assert (encoder.reads_encoder, decoder_.reads_encoder) == (False, True)
    call: list[dict[str, Any]] = [{"input_ids": encoder_ids}]
    captured = decoder.capture(encoder.root, encoder.blocks, call, architecture)
    for index, block in enumerate(encoder.blocks):
        captured.advance(block, index)
    (states,) = decoder.finish(encoder.root, encoder.blocks, call, captured)
    torch.testing.assert_close(states, out.encoder_last_hidden_state, rtol=1e-4, atol=1e-5)
    call = [{"input_ids": decoder_ids, "encoder_hidden_states": states, "use_cache": False}]
    captured = decoder.capture(decoder_.root, decoder_.blocks, call, architecture)
    for index, block in enumerate(decoder_.blocks):
        captured.advance(block, index)
    (states,) = decoder.finish(decoder_.root, decoder_.blocks, call, captured)
    torch.testing.assert_close(states, out.decoder_hidden_states[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", tiny_models.VISION)
def test_only_the_text_of_a_model_that_sees_is_a_stack_of_blocks(architecture: str, tiny_model: TinyModel) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    (tower,) = find_towers(model, architecture)
    assert len(tower.blocks) == 2
    assert model.get_submodule(tower.blocks_path) is tower.blocks
    ids = torch.randint(2, 258, (3, 20))
    captured = decoder.capture(tower.root, tower.blocks, inputs(ids), architecture)
    for index, block in enumerate(tower.blocks):
        captured.advance(block, index)
    (states,) = decoder.finish(tower.root, tower.blocks, inputs(ids), captured)
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_the_mean_of_x_xt_over_every_token(generator: torch.Generator) -> None:
    layer = nn.Linear(24, 8)
    inputs = [torch.randn(3, 7, 24, generator=generator), torch.randn(1, 5, 24, generator=generator)]
    (statistics,) = collect([layer], lambda i: layer(inputs[i]), [len(x) for x in inputs], Ranks())
    rows = torch.cat([x.flatten(0, 1) for x in inputs]).double()
    expected = rows.T @ rows / len(rows)
    assert statistics.tokens == 26
    assert (statistics.second_moment - expected).norm() / expected.norm() < 1e-6


def test_a_pass_stops_once_it_has_what_it_came_for() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    ran: list[int] = []

    def run(batch: int) -> None:
        second(first(torch.ones(1, 4)))
        ran.append(batch)

    collect([first], run, [1, 1, 1], Ranks())
    assert ran == []


class Tampering(nn.Module):
    """Adds to the hidden states between blocks, as no block-by-block run would."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = input_ids.float().unsqueeze(-1).expand(-1, -1, 8)
        for layer in self.layers:
            hidden = layer(hidden) + 1
        return hidden


def test_a_model_that_works_between_its_blocks_is_refused() -> None:
    model = Tampering()
    with pytest.raises(ModelError, match="between blocks 0 and 1"):
        decoder.capture(model, model.layers, inputs(torch.ones(1, 4, dtype=torch.long)), "tampering")
    assert "forward" not in model.layers[0].__dict__  # the blocks are themselves again


def test_a_model_that_runs_more_than_its_blocks_is_refused(tiny_model: TinyModel) -> None:
    """What is neither a block nor around one has no values when the pipeline runs; a second stack of blocks, say."""
    model = model_of(tiny_model())
    (tower,) = find_towers(model, "llama")
    tower.root.norm.register_forward_pre_hook(lambda module, args: args[0].to("meta").to("cpu"))
    with pytest.raises(ModelError, match="LlamaModel runs more than a row of blocks.*--method rtn"):
        decoder.capture(tower.root, tower.blocks, inputs(torch.randint(2, 258, (2, 16))), "llama")
    assert "forward" not in tower.blocks[0].__dict__


def test_masks_and_positions_are_kept_once(tiny_model: TinyModel) -> None:
    model = model_of(tiny_model())
    (tower,) = find_towers(model, "llama")
    batches = inputs(*(torch.randint(2, 258, (2, 16)) for _ in range(4)))
    captured = decoder.capture(tower.root, tower.blocks, batches, "llama")
    cosines = {id(call.kwargs["position_embeddings"][0]) for calls in captured.calls for call in calls}
    assert len(cosines) == 1


def test_a_config_that_came_with_a_repo_is_built_by_the_code_that_came_with_it() -> None:
    own = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert model_class(own) is LlamaForCausalLM
    brought = type("LlamaConfig", (LlamaConfig,), {"__module__": "transformers_modules.repo.configuration"})
    assert model_class(brought(architectures=["LlamaForCausalLM"])) is AutoModelForCausalLM
    assert model_class(LlamaConfig(architectures=["LlamaModel"])) is AutoModelForCausalLM  # it has no head


def test_routers_and_layers_too_short_for_a_group_stay_out(tiny_model: TinyModel) -> None:
    block = nn.ModuleDict({"gate": nn.Linear(32, 4), "gate_proj": nn.Linear(32, 8), "mlp_router": nn.Linear(32, 4)})
    block["router"] = nn.Linear(32, 4)
    block["dt_proj"] = nn.Linear(31, 8)
    assert set(find_linears(block, "layers.0", [])) == {"gate_proj", "mlp_router"}
