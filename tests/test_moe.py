"""Mixtures of experts: packed on load, saved under their checkpoint's names, loaded packed from every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from wq import WqConfig
from wq.errors import CheckpointError
from wq.formats import awq, gptq
from wq.formats.stored import Packed, Stored
from wq.layers import ExpertWeight
from wq.scheme import Scheme

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=32, num_experts=12, head_dim=16),
    "gpt_oss": lambda: GptOssConfig(**SMALL, num_local_experts=4, head_dim=16),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=8, n_group=2, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, v_head_dim=16,
        qk_nope_head_dim=16,
    ),
}  # fmt: skip
GRIDS = {"sym": {}, "asym": {"symmetric": False}}

each_model = pytest.mark.parametrize("name", CONFIGS)
each_grid = pytest.mark.parametrize("grid", GRIDS)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("moe") / name
            AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(made[name])
        return made[name]

    return get


def load(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig(**options))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 20).reshape(1, 18)).logits


def expert_weights(model: nn.Module) -> list[ExpertWeight]:
    return [module for module in model.modules() if isinstance(module, ExpertWeight)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@each_model
@each_grid
def test_experts_are_packed_on_load_saved_and_loaded_again(
    name: str, grid: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(dense(name), **GRIDS[grid])
    assert expert_weights(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert len(expert_weights(again)) == len(expert_weights(model))
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "twice")
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "twice"))


@each_model
def test_the_rounded_experts_are_near_the_dense_ones(name: str, dense: Callable[[str], Path]) -> None:
    original = AutoModelForCausalLM.from_pretrained(dense(name))
    for bits, most in ((8, 0.02), (4, 0.3)):
        model = load(dense(name), bits=bits)
        for path, weight in model.named_modules():
            if isinstance(weight, ExpertWeight):
                exact = original.get_parameter(path)
                assert weight.shape == exact.shape
                assert ((weight[:].float() - exact.float()).norm() / exact.float().norm()).item() < most


@each_model
@each_grid
def test_dequantizing_gives_the_same_model(name: str, grid: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(dense(name), **GRIDS[grid])
    expected = logits(model)
    model.save_pretrained(tmp_path / "out")
    plain = load(tmp_path / "out", dequantize=True)
    assert not expert_weights(plain)
    torch.testing.assert_close(logits(plain), expected)
    model.dequantize()
    assert not expert_weights(model)
    torch.testing.assert_close(logits(model), expected)


def test_names_on_disk_are_those_of_the_dense_checkpoint(dense: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("mixtral", "qwen3_moe", "deepseek_v3"):
        load(dense(name)).save_pretrained(tmp_path / name)
        before, after = tensors_of(dense(name)), tensors_of(tmp_path / name)
        packed = {key.removesuffix("_packed") for key in after if key.endswith(".weight_packed")}
        assert packed <= set(before)
        assert [key for key in packed if ".experts." in key]
        for key in packed:
            assert after[f"{key}_shape"].tolist() == list(before[key].shape)
        rest = {key for key in after if not any(key.startswith(f"{weight}_") for weight in packed)}
        assert rest == set(before) - packed


def test_experts_stay_dense_when_told(dense: Callable[[str], Path]) -> None:
    model = load(dense("mixtral"), keep=["experts"])
    assert not expert_weights(model)
    assert logits(model).isfinite().all()


@each_model
@each_grid
def test_three_bits_are_held_as_four_and_saved_as_three(
    name: str, grid: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    """There is no tile of 3 bits; the values are the same."""
    model = load(dense(name), bits=3, **GRIDS[grid])
    weights = expert_weights(model)
    assert {(weight.scheme.bits, weight.width) for weight in weights} == {(3, 4)}
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "twice"))
    plain = load(tmp_path / "out", dequantize=True)
    assert not expert_weights(plain)
    for path, weight in model.named_modules():
        if isinstance(weight, ExpertWeight):
            assert torch.equal(weight[:], plain.get_parameter(path))
    words = sum(t.numel() for n, t in tensors_of(tmp_path / "out").items() if ".experts." in n and n.endswith("packed"))
    assert words * 32 == sum(weight.shape.numel() for weight in weights) * 3


def rewritten(folder: Path, output: Path, format: str, symmetric: bool) -> Path:
    """A compressed-tensors checkpoint as gptq or awq."""
    output.mkdir()
    for file in folder.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(folder)
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        prefix = key.removesuffix(".weight_packed")
        parts = {
            leaf: tensors.pop(f"{prefix}.weight_{leaf}", None) for leaf in ("packed", "scale", "zero_point", "shape")
        }
        info = Stored(format, Scheme(4, 32, symmetric), tuple(parts["shape"].tolist()), "1" if symmetric else "2")
        weight = Packed(parts["packed"], parts["scale"].half(), parts["zero_point"])
        made = (gptq if format == "gptq" else awq).from_packed(weight, info)
        tensors |= {f"{prefix}.{leaf}": tensor for leaf, tensor in made.items()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = {
        "gptq": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "checkpoint_format": f"gptq{'' if symmetric else '_v2'}",
        },
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    }[format]
    (output / "config.json").write_text(json.dumps(config))
    return output


@each_grid
@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_other_formats_load_and_save_as_they_were(
    name: str, format: str, grid: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    load(dense(name), group_size=32, **GRIDS[grid]).save_pretrained(tmp_path / "ct")
    folder = rewritten(tmp_path / "ct", tmp_path / format, format, grid == "sym")
    model = load(folder)
    assert expert_weights(model)
    plain = load(folder, dequantize=True)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "back")
    assert same(tensors_of(folder), tensors_of(tmp_path / "back"))


DAMAGES = {
    "an expert is missing": (
        lambda t, key: [t.pop(k) for k in list(t) if k.startswith(key)],
        r"expert 2 has no packed w1",
    ),
    "its scales are missing": (lambda t, key: t.pop(f"{key}.weight_scale"), r"experts\.2\.w1"),
    "another group size": (
        lambda t, key: t.update({f"{key}.weight_scale": t[f"{key}.weight_scale"][:, :1].contiguous()}),
        r"experts\.\d\.w1 is stored otherwise",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_expert_is_refused_by_name(damage: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    load(dense("mixtral")).save_pretrained(tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    change, message = DAMAGES[damage]
    change(tensors, "model.layers.1.block_sparse_moe.experts.2.w1")
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


def test_experts_that_no_kernel_takes_load_dense_as_the_refusal_says(
    dense: Callable[[str], Path], tmp_path: Path
) -> None:
    load(dense("mixtral"), group_size=32).save_pretrained(tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    for key in [key for key in tensors if ".experts." in key and key.endswith("weight_scale")]:  # groups of 16
        tensors[key] = tensors[key].repeat_interleave(2, 1).contiguous()
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].pop("group_size")
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"groups of 16. Load it with WqConfig\(dequantize=True\)"):
        load(tmp_path / "out")
    plain = load(tmp_path / "out", dequantize=True)
    assert not expert_weights(plain)
    torch.testing.assert_close(logits(plain), logits(load(dense("mixtral"), group_size=32)), rtol=1e-4, atol=1e-5)
