"""PEFT on packed weights: LoRA trains, is saved, comes back; the packed weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Folder, Table, maker
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from wq import WqConfig
from wq.layers import ExpertWeight, WqLinear

IDS = torch.arange(2, 50).reshape(2, 24)
TinyModel = Callable[..., Path]
TARGETS = {"q and v": ["q_proj", "v_proj"], "all linear": "all-linear"}
each_target = pytest.mark.parametrize("targets", TARGETS)

FOLDERS: Table = {
    "compressed-tensors": ("llama", {"symmetric": False}),
    "gptq act-order": ("llama", {"format": "gptq"}),
    "awq": ("llama", {"format": "awq", "symmetric": False}),
    "llama on load": ("llama", None),
    "mixtral on load": ("mixtral", None),
}
each_folder = pytest.mark.parametrize("name", FOLDERS)


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return maker(FOLDERS, tiny_model, tmp_path_factory)


def load(folder: Path, dtype: torch.dtype = torch.float32, **flag: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=WqConfig(**flag))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of packed weights, copied."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, (WqLinear, ExpertWeight))}
    return {f"{n}.{k}": p.clone() for n, m in modules.items() for k, p in m.named_parameters(recurse=False)}


def adapted(model: Any, targets: str) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[targets], task_type="CAUSAL_LM"))


def train(model: nn.Module, steps: int = 6) -> list[float]:
    """The loss before each step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@each_folder
@each_target
def test_lora_trains_is_saved_and_comes_back(targets: str, name: str, folder: Folder, tmp_path: Path) -> None:
    model = adapted(load(folder(name)), targets)
    before, first = packed(model), logits(model)
    losses = train(model)
    assert all(later < earlier for earlier, later in pairwise(losses))
    after = packed(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    trained = logits(model)
    assert (trained - first).norm() / first.norm() > 0.05
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder(name)), tmp_path)
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), first)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq act-order", "awq"])
def test_gradients_are_those_of_the_dequantized_model(name: str, folder: Folder) -> None:
    gradients = []
    for flag in ({}, {"dequantize": True}):
        model = adapted(load(folder(name), **flag), "all linear")
        torch.manual_seed(0)
        with torch.no_grad():  # B starts at zero, which would leave A without a gradient
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 28
    for key, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_all_linear_reaches_every_packed_layer_and_only_those(folder: Folder) -> None:
    model = adapted(load(folder("compressed-tensors")), "all linear")
    wrapped = [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert len(wrapped) == 14
    assert all(isinstance(m.base_layer, WqLinear) for m in wrapped)


@each_target
@pytest.mark.parametrize("name", ["compressed-tensors", "mixtral on load"])
def test_merging_into_packed_weights_is_refused_and_changes_nothing(targets: str, name: str, folder: Folder) -> None:
    model = adapted(load(folder(name)), targets)
    train(model, 2)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"weight is packed; call model\.dequantize\(\) first.*merge an adapter"):
            merge()
    for layer in model.modules():  # what is refused did not leave a mark
        if hasattr(layer, "merged_adapters"):
            assert not layer.merged_adapters
    assert torch.equal(logits(model), expected)


@each_target
def test_an_adapter_is_merged_once_the_model_is_dequantized(targets: str, folder: Folder, tmp_path: Path) -> None:
    model = adapted(load(folder("compressed-tensors")), targets)
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    dense = PeftModel.from_pretrained(load(folder("compressed-tensors")).dequantize(), tmp_path)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)
    merged = dense.merge_and_unload()
    assert not any(isinstance(module, WqLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_lora_on_transposed_layers(folder: Folder, tmp_path: Path) -> None:
    """GPT-2 has Conv1D, whose weight is [in, out]; packed it is a linear layer as any other."""
    for targets in (["c_attn"], "all-linear"):
        model = get_peft_model(load(folder("gpt2")), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        losses = train(model)
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(load(folder("gpt2")), tmp_path)), logits(model))


def test_training_in_half_precision_after_the_usual_preparation(folder: Folder) -> None:
    """`prepare_model_for_kbit_training` makes what is float float32, scales too, and checkpoints activations."""
    model = prepare_model_for_kbit_training(load(folder("compressed-tensors"), torch.bfloat16))
    model = adapted(model, "all linear")
    before = packed(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[key], tensor) for key, tensor in packed(model).items())


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, **quiet, **options
    )


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_trainer_trains_an_adapter(options: dict[str, Any], folder: Folder, tmp_path: Path) -> None:
    model = adapted(load(folder("compressed-tensors")), "all linear")
    before = packed(model)
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = Trainer(model=model, args=arguments(tmp_path / "run", **options), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(before[key], tensor) for key, tensor in packed(model).items())
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder("compressed-tensors")), tmp_path / "adapter")
    trained = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # bf16 had wrapped its forward
    assert torch.equal(logits(again), logits(trained))


def test_trainer_refuses_packed_weights_without_an_adapter(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=load(folder("compressed-tensors")), args=arguments(tmp_path), train_dataset=[])
