"""Experts in the pipeline: what each learns from, how that is counted, and what becomes of those nobody asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from wq import WqConfig
from wq import report as reports
from wq.errors import CheckpointError
from wq.formats import compressed_tensors
from wq.hf import load
from wq.pipeline import calibration
from wq.pipeline import experts as mixture
from wq.pipeline.quantizer import quantize
from wq.pipeline.source import open_source
from wq.scheme import Scheme
from wq.solvers import rtn
from wq.structure.experts import is_experts

TinyModel = Callable[..., Path]
SMALL: dict[str, Any] = {"calibration": "builtin", "samples": 8, "seqlen": 64, "group_size": 32}


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def experts_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if is_experts(module)]


@pytest.mark.parametrize("architecture", tiny_models.MOES)
def test_an_expert_taken_apart_is_the_expert(architecture: str, tiny_model: TinyModel) -> None:
    """Gates, biases and transposed weights are as in transformers' own forward."""
    _, module = experts_of(dense(tiny_model(architecture)))[0]
    hidden = torch.randn(11, 64)
    scores, routes = torch.rand(11, len(module.down_proj)).topk(2)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    expected = torch.zeros(11, 64, dtype=torch.float64)
    with torch.no_grad():
        for token in range(11):
            for score, expert in zip(scores[token], routes[token].tolist(), strict=True):
                weight = mixture.matrix(module, first, expert)
                inner = mixture._inner(module, expert, hidden[token : token + 1], weight)
                bias = module.down_proj_bias[expert] if module.has_bias else None
                out = functional.linear(inner, mixture.matrix(module, "down_proj", expert), bias)
                expected[token] += score.double() * out[0].double()
        found = module(hidden, routes, scores)
    assert (found.double() - expected).norm() / expected.norm() < 1e-5


def test_an_experts_statistics_are_shrunk_toward_those_of_the_layer(generator: torch.Generator) -> None:
    size, tokens = 16, 200
    hidden = torch.randn(tokens, size, generator=generator)
    routes = torch.randint(0, 4, (tokens, 2), generator=generator)
    routed = mixture.Routed(hidden, routes)
    rows, own = routed.inputs(3)
    mine = hidden[(routes == 3).any(1)].double()
    everyone = hidden[:: tokens // size][:size].double()
    assert own == len(mine)
    assert len(everyone) == size  # κ
    expected = (mine.T @ mine + everyone.T @ everyone) / (len(mine) + size)
    found = mixture._statistics(rows)
    assert found.tokens == len(mine) + size
    assert (found.second_moment.double() - expected).norm() / expected.norm() < 1e-5
    assert mixture.Routed(hidden, routes.clamp_max(2)).inputs(3)[1] == 0


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_the_report_counts_the_tokens_that_the_router_sent(
    architecture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    report = quantize(tiny_model(architecture), tmp_path / "out", keep=["self_attn"], **SMALL)
    record = next(layer for layer in report["layers"] if layer["layer"].endswith("layers.0.mlp.experts.down_proj"))
    model, routes = dense(tiny_model(architecture)), []
    experts_of(model)[0][1].register_forward_pre_hook(lambda module, args: routes.append(args[1]))
    with open_source(tiny_model(architecture)) as source, torch.no_grad():
        model(input_ids=calibration.load("builtin", source.tokenizer, 8, 64).tokens)
    counts = torch.cat(routes).flatten().bincount(minlength=len(record["tokens"]))
    assert record["tokens"] == counts.tolist()
    assert len(record["errors"]) == len(record["tokens"])
    low, high = min(counts.tolist()), max(counts.tolist())
    for layer in report["layers"]:  # the card speaks of all layers
        if isinstance(layer["tokens"], list):
            low, high = min(low, *layer["tokens"]), max(high, *layer["tokens"])
    assert f"{low:,} to {high:,}" in reports.card(report)


def starved(folder: Path, output: Path) -> Path:
    """A model whose router never chooses expert 1 of layer 0."""
    output.mkdir()
    for file in folder.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.router.bias"][1] = -1e4
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_that_no_token_reaches_is_rounded_to_nearest_and_reported(
    method: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = starved(tiny_model("gpt_oss"), tmp_path / "source")
    report = quantize(source, tmp_path / "out", method=method, **SMALL)
    (first, second) = (layer for layer in report["fallbacks"] if ".layers.0." in layer["layer"])
    for layer, name in ((first, "gate_up_proj"), (second, "down_proj")):
        assert layer["layer"] == f"model.layers.0.mlp.experts.{name}"
        assert layer["tokens"][1] == 0
        assert all(count > 0 for expert, count in enumerate(layer["tokens"]) if expert != 1)
        assert layer["fallback"] == "experts 1: no calibration token was routed there"
        weight = load_file(source / "model.safetensors")[layer["layer"]][1].t()
        scheme = Scheme(4, 32, True, report["dtype"])
        expected = compressed_tensors.pack(rtn.solve(weight, None, scheme), scheme)
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(written[layer["layer"] + "_packed"][1], expected["weight_packed"])
        assert torch.equal(written[layer["layer"] + "_scale"][1], expected["weight_scale"])
    assert "experts 1: no calibration token was routed there" in (tmp_path / "out" / "README.md").read_text()


def output_errors(model: Any, original: Any, tokens: Tensor) -> Tensor:
    """Relative error of each layer's experts on the inputs that the original model gives them."""
    errors = []
    for (path, module), (_, exact) in zip(experts_of(model), experts_of(original), strict=True):
        calls: list[Any] = []
        handle = exact.register_forward_hook(lambda m, args, out, calls=calls: calls.append((args, out)))
        with torch.no_grad():
            original(input_ids=tokens)
            handle.remove()
            (args, expected) = calls[0]
            errors.append((module(*args) - expected).norm() / expected.norm())
        assert path
    return torch.stack(errors)


@pytest.mark.parametrize("architecture", tiny_models.MOES)
def test_calibrated_experts_are_nearer_than_rounded_ones(
    architecture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model(architecture)
    options = {**SMALL, "samples": 32, "keep": ["self_attn", r"mlp\.(gate|up|down)_proj", "shared_experts"]}
    tokens = calibration.load("builtin", tiny_models.tokenizer(), 32, 64, seed=1).tokens  # other text than seed 0's
    errors = {}
    for method in ("rtn", "gptq"):
        quantize(source, tmp_path / method, method=method, bits=3, **options)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / method, dtype=torch.float32, quantization_config=WqConfig(dequantize=True)
        )
        model.set_experts_implementation("eager")
        errors[method] = output_errors(model, dense(source), tokens)
    assert (errors["gptq"] < errors["rtn"]).all(), errors


def test_experts_on_disk_as_one_tensor_stay_dense_in_formats_without_a_form_for_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    quantize(tiny_model("gpt_oss"), tmp_path / "out", method="rtn", format="gptq", **SMALL)
    before, after = (
        load_file(tiny_model("gpt_oss") / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(after[name], before[name].half())
    assert "model.layers.0.self_attn.q_proj.qweight" in after
    model, _ = load(tmp_path / "out", dtype="float32")
    assert model(input_ids=torch.arange(2, 20).reshape(1, 18)).logits.isfinite().all()


def test_a_damaged_expert_is_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = starved(tiny_model("gpt_oss"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"][2, 3, 4] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj holds 1 values that are not finite"):
        quantize(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
