"""The head, rounded as a model loads: near the dense one's logits, and no trace of it in what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from wq.errors import CheckpointError, ModelError, SchemeError
from wq.evaluate import evaluate
from wq.hf import WqConfig, load
from wq.layers import WqLinear
from wq.pipeline.quantizer import quantize

TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A quantized folder of an architecture, made once."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("packed") / "out"
            quantize(tiny_model(architecture), made[architecture], method="rtn", group_size=32)
        return made[architecture]

    return get


def rounded(folder: Path, bits: int = 8, dtype: Any = torch.float32) -> Any:
    return support.from_pretrained(folder, WqConfig(head_bits=bits), dtype)


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3_text", "opt", "gpt2", "modernbert-decoder", "mixtral", "t5", "llava"]
)
def test_it_is_near_the_dense_head(architecture: str, packed: Callable[[str], Path]) -> None:
    plain = support.from_pretrained(packed(architecture), WqConfig())
    model = rounded(packed(architecture))
    head = model.get_output_embeddings()
    assert isinstance(head, WqLinear)
    assert (head.scheme.bits, head.bias is None) == (8, plain.get_output_embeddings().bias is None)
    expected = support.logits(plain)
    found = support.logits(model)
    assert 0 < (found - expected).norm() / expected.norm() < 0.02
    start = torch.arange(2, 12).unsqueeze(0)
    assert model.generate(start, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] >= 5
    model.tie_weights()
    assert torch.equal(support.logits(copy.deepcopy(model)), found)


def test_it_is_rounded_to_nearest(packed: Callable[[str], Path]) -> None:
    plain, model = (load(packed("qwen3"), dtype="float32", head_bits=bits)[0] for bits in (None, 8))
    weight, head = plain.lm_head.weight.detach(), model.lm_head
    step = head.weight_scale.repeat_interleave(head.scheme.group_size, 1)
    steps = (head.dequantize() - weight).abs() / step.abs()
    assert (steps <= 0.5001).float().mean() > 0.99
    assert steps.max() <= 1.0001  # where one of the other sign is nearly as large as the largest
    assert torch.equal(model.get_input_embeddings().weight, weight)  # which it was tied to


def test_a_dense_repo_has_its_head_rounded_too(tiny_model: TinyModel) -> None:
    model = support.from_pretrained(tiny_model("qwen3"), WqConfig(bits=8, head_bits=8))
    support.close(model, support.from_pretrained(tiny_model("qwen3"), None))
    assert isinstance(model.lm_head, WqLinear)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_what_is_saved_is_the_checkpoint(packed: Callable[[str], Path], tmp_path: Path, dtype: Any) -> None:
    rounded(packed("qwen3"), dtype=dtype).save_pretrained(tmp_path / "rounded")
    support.from_pretrained(packed("qwen3"), WqConfig(), dtype).save_pretrained(tmp_path / "plain")
    files = [tmp_path / kind / "model.safetensors" for kind in ("rounded", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("rounded", "plain")]
    assert configs[0] == configs[1]


def test_a_head_of_its_own_cannot_be_saved_once_it_is_rounded(packed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lm_head was rounded as the model loaded.*without head_bits"):
        rounded(packed("llama")).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"format": "gptq"}, {"format": "awq", "symmetric": False}])
def test_repos_of_other_formats_stay_as_they_were(
    options: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    quantize(tiny_model("qwen3"), tmp_path / "packed", method="rtn", group_size=32, **options)
    model = rounded(tmp_path / "packed", dtype="auto")
    assert isinstance(model.lm_head, WqLinear)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_dtype_and_a_compiled_forward(packed: Callable[[str], Path]) -> None:
    model = rounded(packed("qwen3"))
    expected = support.logits(model)
    assert torch.allclose(support.logits(torch.compile(model, backend="eager")), expected, rtol=1e-4, atol=1e-5)
    close = support.logits(model.to(torch.bfloat16)).float()
    assert (close - expected).norm() / expected.norm() < 0.03


def test_a_head_that_is_offloaded_is_refused(packed: Callable[[str], Path], tmp_path: Path) -> None:
    where = {"model": "cpu", "lm_head": "disk"}
    options: dict[str, Any] = {"device_map": where, "offload_folder": tmp_path, "dtype": torch.float32}
    with pytest.raises(ModelError, match="lm_head is offloaded: head_bits takes a head that is whole"):
        AutoModelForCausalLM.from_pretrained(packed("llama"), quantization_config=WqConfig(head_bits=8), **options)


def test_dequantizing_gives_a_tied_head_its_weight_back(packed: Callable[[str], Path], tmp_path: Path) -> None:
    model, plain = rounded(packed("qwen3")).dequantize(), support.from_pretrained(packed("qwen3"), WqConfig())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(support.logits(model), support.logits(plain.dequantize()))
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_head_that_is_packed_stays_as_it_is(tmp_path: Path, packed: Callable[[str], Path]) -> None:
    model = rounded(packed("llama"))
    quantizer = model.hf_quantizer
    assert quantizer.head.path == "lm_head"
    head = model.lm_head
    assert type(quantizer.head).round(model, 4, quantizer.mapped) is None
    assert model.lm_head is head


def test_damage_in_it_is_an_error(packed: Callable[[str], Path], tmp_path: Path) -> None:
    source = packed("llama")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        rounded(tmp_path)


def test_what_has_no_head_or_no_packed_layers_says_so(packed: Callable[[str], Path], tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match=r"Qwen3Model has no linear layer that makes logits"):
        AutoModel.from_pretrained(packed("qwen3"), quantization_config=WqConfig(head_bits=8))
    with pytest.raises(ModelError, match="is dense; head_bits"):
        load(tiny_model("llama"), head_bits=8)


@pytest.mark.parametrize("options", [{"head_bits": 5}, {"head_bits": 8, "dequantize": True}, {"head_bits": "8"}])
def test_values_that_no_head_has_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        WqConfig(**options)


def test_evaluating_it_leaves_the_folder_s_own_figures_alone(packed: Callable[[str], Path]) -> None:
    before = {path.name: path.read_bytes() for path in packed("qwen3").iterdir()}
    options: dict[str, Any] = {"base": packed("qwen3"), "text": "builtin", "seqlen": 32, "windows": 2}
    found = evaluate(packed("qwen3"), head_bits=8, **options)
    assert found["head_bits"] == 8
    assert 0 < found["kl"]["mean"] < 1e-3
    assert {path.name: path.read_bytes() for path in packed("qwen3").iterdir()} == before
