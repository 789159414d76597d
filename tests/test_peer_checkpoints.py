"""Checkpoints that other quantizers made, as they left them: loaded with one flag, they are what their owners mean.

`tests/golden/peers/README.md` says what made them. `peer.json` in each holds the hashes of the weights that the owner's
own code dequantizes, in the dtype of the scales and with scales widened to float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from wq import WqConfig, WqLinear
from wq.errors import CheckpointError
from wq.hf.takeover import takeover
from wq.verify import verify

PEERS = Path(__file__).parent / "golden" / "peers"
FOLDERS = sorted(path.parent for path in PEERS.glob("*/peer.json"))
each_peer = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
IDS = torch.arange(2, 50).reshape(2, 24)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def packed_layers(model: nn.Module) -> dict[str, WqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WqLinear)}


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def dense_model(folder: Path, weights: dict[str, Tensor]) -> nn.Module:
    """Plain linear layers with these weights, and the checkpoint's other tensors."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = load_file(folder / "model.safetensors")
    state = {k: t for k, t in stored.items() if k.rpartition(".")[0] not in weights or k.endswith(".bias")}
    left = model.load_state_dict(state | {f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def copy_of(folder: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A checkpoint with another quantization config, or other tensors."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def test_every_kind_of_peer_is_here() -> None:
    peers = {json.loads((folder / "peer.json").read_text())["peer"] for folder in FOLDERS}
    assert peers == {"auto-round", "autoawq", "gptqmodel", "llmcompressor"}


@each_peer
def test_weights_are_the_owners_bit_for_bit_and_so_are_logits(folder: Path) -> None:
    owner = json.loads((folder / "peer.json").read_text())["sha256"]
    model = load(folder, quantization_config=WqConfig())
    layers = packed_layers(model)
    assert layers.keys() == {name for name in owner if ":" not in name}
    weights = {name: layer.dequantize(torch.float32) for name, layer in layers.items()}
    for name, layer in layers.items():
        assert digest(weights[name]) == owner[name], name
        assert digest(layer.dequantize()) == owner[f"{name}:stored"], name
    assert difference(logits(model), logits(dense_model(folder, weights))) < 1e-5


@each_peer
def test_saving_gives_back_the_owners_bytes(folder: Path, tmp_path: Path) -> None:
    load(folder, dtype="auto", quantization_config=WqConfig()).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    layers = {name.rpartition(".")[0] for name in before if name.endswith((".qweight", ".weight_packed"))}
    for name, tensor in before.items():
        packed = name.rpartition(".")[0] in layers and not name.endswith(".bias")
        assert after[name].dtype == tensor.dtype or not packed, name  # the rest is loaded in the model's dtype
        assert torch.equal(after[name], tensor.to(after[name].dtype)), name
    configs = [json.loads((where / "config.json").read_text())["quantization_config"] for where in (folder, tmp_path)]
    assert configs[0] == configs[1]


@each_peer
def test_without_a_flag_wq_serves_them_too(folder: Path) -> None:
    with takeover("always"):
        assert packed_layers(load(folder))


MISSING = {
    "gptqmodel-act-order": ("bits", "group_size", "sym", "desc_act", "lm_head", "meta", "pack_dtype", "method"),
    "gptqmodel-uneven": ("bits", "group_size", "sym", "desc_act", "lm_head", "meta", "pack_dtype", "method"),
    "autoawq-gemm": ("bits", "group_size", "zero_point", "version", "modules_to_not_convert"),
    "autoawq-gemv": ("bits", "zero_point", "modules_to_not_convert"),
    "auto-round": ("bits", "group_size", "packing_format", "data_type", "block_name_to_quantize", "autoround_version"),
    "llmcompressor-gptq-asymmetric": ("config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version"),
}


@pytest.mark.parametrize("name", MISSING)
def test_fields_that_repeat_what_the_tensors_say_may_be_missing(name: str, tmp_path: Path) -> None:
    def forget(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for field in MISSING[name]:
            config.pop(field, None)

    bare = load(copy_of(PEERS / name, tmp_path, forget), quantization_config=WqConfig())
    assert torch.equal(logits(bare), logits(load(PEERS / name, quantization_config=WqConfig())))


@pytest.mark.parametrize("backend", ["auto_round:exllamav2", "auto_round:triton"])
def test_old_auto_round_names_its_layout_backend(backend: str, tmp_path: Path) -> None:
    """Up to 0.4: zero points as they are, or one less, told by the name before that of a kernel."""

    def older(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["backend"] = backend
        del config["packing_format"]

    folder = PEERS / "auto-round-3-bit"  # asymmetric: a mistaken offset would show
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["packing_format"] == "auto_round"
    expected = logits(load(folder, quantization_config=WqConfig()))
    assert torch.equal(logits(load(copy_of(folder, tmp_path / "2", older), quantization_config=WqConfig())), expected)
    backend = backend.replace("auto_round", "auto_round:gptq")
    other = logits(load(copy_of(folder, tmp_path / "1", older), quantization_config=WqConfig()))
    assert not torch.equal(other, expected)


def test_old_compressed_tensors_left_zero_points_unpacked(tmp_path: Path) -> None:
    """Up to 0.9.3: int8, signed, one for each row and group."""
    folder = PEERS / "llmcompressor-gptq-asymmetric"
    expected = packed_layers(load(folder, quantization_config=WqConfig()))

    def older(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, layer in expected.items():
            words = tensors[f"{name}.weight_zero_point"]
            points = (words.unsqueeze(1) >> torch.arange(0, 32, 4).reshape(1, 8, 1)) & 15
            tensors[f"{name}.weight_zero_point"] = (points.flatten(0, 1)[: layer.out_features] - 8).to(torch.int8)

    older_folder = copy_of(folder, tmp_path / "older", older)
    model = load(older_folder, dtype="auto", quantization_config=WqConfig())
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.dequantize(), expected[name].dequantize()), name
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(where / "model.safetensors") for where in (older_folder, tmp_path / "saved"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_gemv_layer_needs_the_group_size(tmp_path: Path) -> None:
    """Its scales are padded, so their number does not tell."""

    def forget(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del config["group_size"]

    folder = copy_of(PEERS / "autoawq-gemv", tmp_path, forget)
    with pytest.raises(CheckpointError, match="group_size"):
        load(folder, quantization_config=WqConfig())


@each_peer
def test_verify_finds_nothing_wrong_with_it(folder: Path) -> None:
    assert verify(folder)["problems"] == []
