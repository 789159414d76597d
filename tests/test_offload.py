"""Weights that are not on the device: accelerate's device maps with the CPU and the disk, and its own offloading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from folders import Folder, Table, maker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wq import WqConfig
from wq.errors import CheckpointError, ModelError
from wq.layers import ExpertWeight, OffloadedExperts, WqLinear

IDS = torch.arange(2, 50).reshape(2, 24)
TinyModel = Callable[..., Path]

FOLDERS: Table = {
    "compressed-tensors": ("llama", {}),
    "compressed-tensors asymmetric": ("llama", {"symmetric": False}),
    "gptq": ("llama", {"format": "gptq"}),
    "gptq act-order": ("llama", {"format": "gptq", "symmetric": False}),
    "awq": ("llama", {"format": "awq", "symmetric": False}),
    "experts": ("mixtral", {"symmetric": False}),
    "experts in gptq": ("mixtral", {"format": "gptq"}),
    "llama": ("llama", None),
    "qwen3": ("qwen3", None),  # its embedding is its head
    "mixtral": ("mixtral", None),
    "gpt_oss": ("gpt_oss", None),  # experts with biases, transposed
}
ON_LOAD = {
    "llama on load": ("llama", {}),
    "llama on load, asymmetric": ("llama", {"symmetric": False}),
    "qwen3 on load": ("qwen3", {}),
    "mixtral on load": ("mixtral", {"symmetric": False}),
    "gpt_oss on load": ("gpt_oss", {}),
}
PACKED = [name for name, (_, options) in FOLDERS.items() if options is not None]
HALF = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
MAPS: dict[str, dict[str, str]] = {
    "cpu": {"": "cpu"},
    "half on disk": {**HALF, "model.rotary_emb": "cpu", "lm_head": "cpu"},
    "disk": {"": "disk"},
}
each_map = pytest.mark.parametrize("where", MAPS)


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return maker(FOLDERS, tiny_model, tmp_path_factory)


def load(folder: Path, flag: dict[str, Any] | None = None, **options: Any) -> Any:
    config = WqConfig(**(flag or {}))
    return AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.float32, "quantization_config": config, **options}
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same_logits(model: nn.Module, reference: nn.Module) -> None:
    """Near: what is offloaded is multiplied in the layout of checkpoints, where other kernels run."""
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)


def offloaded(model: nn.Module) -> int:
    """Packed tensors that are on no device now."""
    modules = [m for m in model.modules() if isinstance(m, (WqLinear, ExpertWeight))]
    modules += [
        m.down_proj.module for m in model.modules() if isinstance(getattr(m, "down_proj", None), OffloadedExperts)
    ]
    return sum(p.is_meta for module in modules for p in module.parameters(recurse=False))


def saved(model: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config["quantization_config"]


def assert_same_saved(model: Any, reference: Any, folder: Path) -> None:
    (tensors, config), (expected, expected_config) = saved(model, folder / "one"), saved(reference, folder / "other")
    assert config == expected_config
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


@each_map
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_checkpoint_computes_and_saves_the_same(name: str, where: str, folder: Folder, tmp_path: Path) -> None:
    reference = load(folder(name))
    model = load(folder(name), device_map=MAPS[where], offload_folder=tmp_path / "offload")
    before = offloaded(model)
    assert (before > 0) == (where != "cpu")
    assert_same_logits(model, reference)
    assert where != "cpu" or torch.equal(logits(model), logits(reference))
    assert offloaded(model) == before  # nothing stays behind
    assert_same_saved(model, reference, tmp_path)


@each_map
@pytest.mark.parametrize("name", ON_LOAD)
def test_a_dense_checkpoint_is_rounded_on_load_to_the_same(
    name: str, where: str, folder: Folder, tmp_path: Path
) -> None:
    dense, flag = ON_LOAD[name]
    reference = load(folder(dense), flag)
    model = load(folder(dense), flag, device_map=MAPS[where], offload_folder=tmp_path / "offload")
    assert (offloaded(model) > 0) == (where != "cpu")
    assert_same_saved(model, reference, tmp_path)  # before a forward, which to accelerate makes two of a tied tensor
    assert_same_logits(model, reference)
    again = load(tmp_path / "one", device_map=MAPS[where], offload_folder=tmp_path / "offload again")
    assert_same_logits(again, reference)


@pytest.mark.parametrize(("name", "share"), [("gptq act-order", 0.9), ("llama", 0.9), ("mixtral", 0.5)])
def test_auto_fills_the_memory_it_is_given_and_puts_the_rest_on_disk(
    name: str, share: float, folder: Folder, tmp_path: Path
) -> None:
    reference = load(folder(name))
    memory = {"cpu": int(reference.get_memory_footprint() * share)}  # of which room for the largest layer is kept free
    model = load(folder(name), device_map="auto", max_memory=memory, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert offloaded(model) > 0
    assert_same_logits(model, reference)


@pytest.mark.parametrize("name", ["compressed-tensors asymmetric", "gptq act-order", "experts"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_loaded_model_can_be_offloaded(kind: str, name: str, folder: Folder, tmp_path: Path) -> None:
    model = load(folder(name))
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert offloaded(model) > 0
    assert_same_logits(model, load(folder(name)))


@pytest.mark.parametrize("name", ["gptq", "experts"])
def test_an_offloaded_model_generates(name: str, folder: Folder, tmp_path: Path) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    model = load(folder(name), device_map=MAPS["half on disk"], offload_folder=tmp_path)
    assert torch.equal(model.generate(IDS, **options), load(folder(name)).generate(IDS, **options))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_offloaded_experts_serve_the_implementations_of_transformers(
    implementation: str, folder: Folder, tmp_path: Path
) -> None:
    model = load(
        folder("experts"),
        device_map=MAPS["disk"],
        offload_folder=tmp_path,
        experts_implementation=implementation,
    )
    torch.testing.assert_close(logits(model), logits(load(folder("experts"))), rtol=1e-4, atol=1e-5)


def test_an_offloaded_model_is_dequantized_as_it_loads_not_afterwards(folder: Folder, tmp_path: Path) -> None:
    for name in ("gptq act-order", "experts"):
        options = {"device_map": MAPS["half on disk"], "offload_folder": tmp_path / name}
        dense = load(folder(name), {"dequantize": True}, **options)
        assert torch.equal(logits(dense), logits(load(folder(name), {"dequantize": True})))
        model = load(folder(name), **options)
        with pytest.raises(ModelError, match=r"layers\.1\..* is offloaded; load the model with WqConfig\(dequantize"):
            model.dequantize()
        assert_same_logits(model, load(folder(name)))  # as it was


def test_a_weight_that_is_missing_is_an_error_on_disk_too(folder: Folder, tmp_path: Path) -> None:
    for name, lost in (("llama", "model.layers.1.mlp.up_proj.weight"), ("awq", "model.layers.1.mlp.up_proj.scales")):
        damaged = tmp_path / name
        shutil.copytree(folder(name), damaged)
        tensors = load_file(damaged / "model.safetensors")
        del tensors[lost]
        save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
            load(damaged, device_map=MAPS["disk"], offload_folder=tmp_path / "offload")
