"""Tensor parallelism: two processes that talk over gloo compute, train and save what one process does.

The processes are started once and run every case; run as a script, this file is one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from folders import scatter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from wq import WqConfig, quantize
from wq.errors import WqError
from wq.layers import ExpertWeight, WqLinear
from wq_kernels import registry

PROCESSES = 2
IDS = torch.arange(2, 50).reshape(2, 24)
TinyModel = Callable[..., Path]

# A folder: an architecture and what differs from its usual sizes; how it is quantized offline, if it is.
LLAMA: dict[str, Any] = {"architecture": "llama"}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "sym": (LLAMA, {}),
    "asym": (LLAMA, {"symmetric": False}),
    "3 bits": (LLAMA, {"bits": 3}),
    "channel": (LLAMA, {"group_size": -1, "symmetric": False}),
    "gptq": (LLAMA, {"format": "gptq"}),
    "gptq act-order": (LLAMA, {"format": "gptq", "symmetric": False}),
    "awq": (LLAMA, {"format": "awq", "symmetric": False}),
    "phi3 asym": ({"architecture": "phi3"}, {"symmetric": False}),
    "phi3 act-order": ({"architecture": "phi3"}, {"format": "gptq", "symmetric": False}),
    "llama": (LLAMA, None),
    "qwen2": ({"architecture": "qwen2"}, None),
    "phi": ({"architecture": "phi"}, None),
    "mixtral": ({"architecture": "mixtral"}, None),
    "qwen3_moe": ({"architecture": "qwen3_moe"}, None),
    "three groups": ({**LLAMA, "intermediate_size": 96}, {}),
    "small heads": ({**LLAMA, "num_attention_heads": 16, "head_dim": 4}, {"symmetric": False}),
}
LINEAR = ["sym", "asym", "3 bits", "channel", "gptq", "gptq act-order", "awq", "phi3 asym", "phi3 act-order"]
# Quantized on load: the folder, and the flag.
ON_LOAD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama on load": ("llama", {}),
    "llama asymmetric on load": ("llama", {"symmetric": False}),
    "llama one scale a row on load": ("llama", {"group_size": -1}),
    "qwen2 with biases on load": ("qwen2", {"symmetric": False}),
    "phi with biases on load": ("phi", {}),
    "mixtral on load": ("mixtral", {"symmetric": False, "group_size": 32}),
    "mixtral on load, shared out": ("mixtral", {"symmetric": False}),
    "qwen3_moe on load, shared out": ("qwen3_moe", {}),
}
REFUSED = {
    "qwen3_moe": r"mlp\.experts\.down_proj: the processes would cut the one group of each row.*ep_size",
    "three groups": r"mlp\.down_proj: 96 columns in groups of 32 cannot be split evenly over 2 processes",
    "rounded head": "lm_head is split over processes: head_bits takes a head that is whole in memory",
    "small heads": r"self_attn\.k_proj: 4 of 8 rows for each of 2 processes would cut a word of 4-bit zero points",
}


def load(folder: Path, flag: dict[str, Any], **split: Any) -> nn.Module:
    """split: over how many processes, as a DistributedConfig says it."""
    options = {"distributed_config": DistributedConfig(tp_plan="auto", **split)} if split else {}
    config = WqConfig(**flag)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config, **options)


def computed(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and the gradient for the embedded input."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    torch.manual_seed(0)
    weights = torch.randn(*IDS.shape, model.config.vocab_size)
    (model(inputs_embeds=embedded).logits * weights).sum().backward()
    with torch.no_grad():
        return {"logits": model(input_ids=IDS).logits, "gradient": embedded.grad}


# --- one of the processes ---


def lay_out_in_tiles(model: nn.Module) -> None:
    """As on a GPU."""
    for layer in model.modules():
        if isinstance(layer, WqLinear):
            layer._set_layout(registry.TILED)


def packed_bytes(model: nn.Module) -> int:
    """What this process holds of packed weights, in the layout of checkpoints; others add a little to each part."""
    held: list[Tensor | None] = []
    for module in model.modules():
        if isinstance(module, WqLinear):
            held += [*module._stream(), module.bias, module.permutation]
        elif isinstance(module, ExpertWeight):
            held += module.parameters(recurse=False)
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in held if p is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def run_case(case: dict[str, Any], folder: Path, output: Path) -> dict[str, Tensor]:
    model = load(folder, case["flag"], tp_size=PROCESSES, **({"ep_size": PROCESSES} if case["share"] else {}))
    if case["tiles"]:
        lay_out_in_tiles(model)
    results = computed(model)
    results["bytes"] = torch.tensor(packed_bytes(model))
    if case["save"]:
        model.save_pretrained(output)
    if not case["flag"].get("dequantize"):
        with pytest.raises(WqError, match="split over processes"):
            model.dequantize()
    return results


def run_cases(place: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{place / 'meeting'}", rank=rank, world_size=PROCESSES)
    errors: dict[str, str] = {}
    for name, case in json.loads((place / "cases.json").read_text()).items():
        torch.manual_seed(0)
        output = place / "results" / name
        try:
            results = run_case(case, Path(case["folder"]), output)
        except WqError as error:
            errors[name] = str(error)
            continue
        if rank == 0:
            output.mkdir(exist_ok=True, parents=True)
            save_file({key: tensor.contiguous() for key, tensor in results.items()}, output / "computed.safetensors")
    (place / f"errors{rank}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


# --- the tests ---


@pytest.fixture(scope="module")
def place(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what both processes computed, saved and refused, for every case."""
    place = tmp_path_factory.mktemp("parallel")
    for name, (model, options) in FOLDERS.items():
        dense = tiny_model(**model)
        if options is None:
            shutil.copytree(dense, place / "folders" / name)
        else:
            dtype = "float16" if "format" in options else "float32"
            common = {"method": "rtn", "group_size": 32, "dtype": dtype}
            quantize(dense, place / "folders" / name, **{**common, **options})
        if "act-order" in name:
            scatter(place / "folders" / name)
    load(place / "folders" / "mixtral", ON_LOAD["mixtral on load"][1]).save_pretrained(
        place / "folders" / "mixtral packed"
    )
    cases: dict[str, dict[str, Any]] = {name: {"save": True} for name in (*LINEAR, "mixtral packed", *REFUSED)}
    cases |= {name: {"folder": folder, "flag": flag, "save": True} for name, (folder, flag) in ON_LOAD.items()}
    cases |= {f"{name} in tiles": {"folder": name, "tiles": True, "save": True} for name in ("asym", "channel")}
    cases |= {f"{name} dequantized": {"folder": name, "flag": {"dequantize": True}} for name in ("sym", "asym")}
    cases["rounded head"] |= {"folder": "sym", "flag": {"head_bits": 8}}
    for name, case in cases.items():
        case["folder"] = str(place / "folders" / case.get("folder", name))
        cases[name] = {"flag": {}, "save": False, "tiles": False, "share": "shared out" in name, **case}
    (place / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(place)]
    others = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(1, PROCESSES)]
    try:
        subprocess.run([*command, "0"], env=environment, check=True, timeout=900)
        assert [other.wait(60) for other in others] == [0] * len(others)
    finally:
        for other in others:
            other.kill()
    return place


def result(place: Path, name: str) -> dict[str, Tensor]:
    errors = json.loads((place / "errors0.json").read_text())
    assert name not in errors, errors[name]
    return load_file(place / "results" / name / "computed.safetensors")


def assert_same_computed(split: dict[str, Tensor], single: nn.Module) -> None:
    for name, expected in computed(single).items():
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(split[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [*LINEAR, "mixtral packed"])
def test_two_processes_compute_what_one_does(name: str, place: Path) -> None:
    single, split = load(place / "folders" / name, {}), result(place, name)
    assert_same_computed(split, single)
    if name not in ("channel", "gptq act-order", "phi3 act-order", "mixtral packed"):  # some small tensors stay whole
        assert int(split["bytes"]) == packed_bytes(single) // PROCESSES


@pytest.mark.parametrize("name", ON_LOAD)
def test_rounding_on_load_does_not_depend_on_the_number_of_processes(name: str, place: Path) -> None:
    folder, flag = ON_LOAD[name]
    single = load(place / "folders" / folder, flag)
    assert_same_computed(result(place, name), single)


def assert_same_tensors(before: Path, after: Path) -> None:
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype or tensor.is_floating_point(), name
        assert torch.equal(second[name].float(), tensor.float()), name


@pytest.mark.parametrize("name", [*LINEAR, "mixtral packed", "asym in tiles", "channel in tiles"])
def test_two_processes_save_the_checkpoint_that_they_loaded(name: str, place: Path) -> None:
    result(place, name)
    assert_same_tensors(place / "folders" / name.removesuffix(" in tiles"), place / "results" / name)


@pytest.mark.parametrize("name", ON_LOAD)
def test_two_processes_save_what_one_does(name: str, place: Path, tmp_path: Path) -> None:
    folder, flag = ON_LOAD[name]
    result(place, name)
    load(place / "folders" / folder, flag).save_pretrained(tmp_path)
    assert_same_tensors(tmp_path, place / "results" / name)


@pytest.mark.parametrize("name", ["asym", "channel"])
def test_parts_in_the_layout_of_kernels_compute_the_same(name: str, place: Path) -> None:
    assert_same_computed(result(place, f"{name} in tiles"), load(place / "folders" / name, {}))


@pytest.mark.parametrize("name", ["sym", "asym"])
def test_a_dequantized_model_can_be_split(name: str, place: Path) -> None:
    assert_same_computed(result(place, f"{name} dequantized"), load(place / "folders" / name, {}))


@pytest.mark.parametrize("name", REFUSED)
def test_a_split_that_would_cut_words_or_groups_is_refused_by_every_process(name: str, place: Path) -> None:
    for rank in range(PROCESSES):
        message = json.loads((place / f"errors{rank}.json").read_text())[name]
        with pytest.raises(WqError, match=REFUSED[name]):
            raise WqError(message)


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), int(sys.argv[2]))
