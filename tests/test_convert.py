"""`wq convert`: every weight is the same afterwards, or nothing is written and the reason is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wq import WqConfig, quantize
from wq.convert import convert
from wq.errors import CheckpointError, FormatError, OutputError
from wq.formats import gptq
from wq.formats.stored import Packed, Stored
from wq.scheme import Scheme
from wq_kernels import stream

TinyModel = Callable[..., Path]
FORMATS = ("compressed-tensors", "gptq", "awq")


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint in a format, made once."""
    made: dict[Any, Path] = {}

    def get(format: str, **options: Any) -> Path:
        key = (format, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "out"
            options = {"method": "rtn", "group_size": 32, "dtype": "float16", **options}
            quantize(tiny_model(), made[key], format=format, **options)
        return made[key]

    return get


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig(dequantize=True))
    return dict(model.named_parameters())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_weight_is_the_same_and_the_result_loads(
    source: str, to: str, symmetric: bool, packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed(source, symmetric=symmetric)
    seen: list[tuple[int, int]] = []
    made = convert(folder, tmp_path / "out", to=to, on_layer=lambda *done: seen.append(done))
    assert made["layers"] == made["identical"] == len(seen) == seen[-1][1] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == to
    kept = json.loads((tmp_path / "out" / "wq_manifest.json").read_text())
    assert kept["command"] == f"wq convert --to {to}"
    assert kept["versions"]["torch"] == torch.__version__
    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {file.name for file in folder.iterdir() if "tokenizer" in file.name} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_there_and_back_gives_the_bytes_it_came_from(
    symmetric: bool, packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed("compressed-tensors", symmetric=symmetric)
    convert(folder, tmp_path / "gptq", to="gptq")
    convert(tmp_path / "gptq", tmp_path / "awq", to="awq")
    convert(tmp_path / "awq", tmp_path / "back", to="compressed-tensors")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "3 bits into awq": ({"bits": 3}, "awq", "holds 4 bits, not 3"),
    "bfloat16 scales": ({"dtype": "bfloat16"}, "gptq", "scales are not exact in float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_other_format_cannot_hold_is_refused_and_nothing_written(
    case: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    options, to, message = REFUSED[case]
    folder = packed("compressed-tensors", **options)
    if case == "bfloat16 scales":  # one that float16 has no room for
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("weight_scale"))
        tensors[name][0, 0] = 1e-30
        (folder := tmp_path / "in").mkdir()
        for file in packed("compressed-tensors", **options).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        convert(folder, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def act_order(folder: Path, output: Path) -> Path:
    """A gptq checkpoint whose columns are grouped in a random order."""
    output.mkdir()
    for file in folder.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        prefix = name.removesuffix(".qweight")
        k, n = tensors[f"{prefix}.g_idx"].shape[0], tensors[f"{prefix}.scales"].shape[1]
        scheme = Scheme(4, 32, True)
        order = torch.randperm(k).to(torch.int32)
        info = Stored("gptq", scheme, (n, k), "1", True)
        codes = stream.pack(torch.randint(0, 16, (n, k), dtype=torch.uint8), 4)
        weight = Packed(codes, tensors[f"{prefix}.scales"].t().contiguous(), None, order)
        tensors |= {f"{prefix}.{leaf}": tensor for leaf, tensor in gptq.from_packed(weight, info).items()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


@pytest.mark.parametrize("to", ["compressed-tensors", "awq"])
def test_act_order_is_refused_where_it_cannot_be_said(to: str, packed: Callable[..., Path], tmp_path: Path) -> None:
    folder = act_order(packed("gptq"), tmp_path / "in")
    with pytest.raises(FormatError, match=r"act-order.*Convert it to gptq"):
        convert(folder, tmp_path / "out", to=to)


def test_act_order_loads_runs_and_saves_as_it_was(packed: Callable[..., Path], tmp_path: Path) -> None:
    folder = act_order(packed("gptq"), tmp_path / "in")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=WqConfig(), dtype=torch.float32)
    layers = [module for module in model.modules() if getattr(module, "permutation", None) is not None]
    assert layers
    dense = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=WqConfig(dequantize=True), dtype=torch.float32
    )
    tokens = torch.arange(2, 26).reshape(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dense_checkpoint_and_a_full_folder_are_refused(
    tiny_model: TinyModel, packed: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no quantization_config"):
        convert(tiny_model(), tmp_path / "out", to="gptq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="is not empty"):
        convert(packed("gptq"), tmp_path / "full", to="awq")


def test_the_command_prints_the_proof(packed: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wq", "convert", str(packed("gptq")), str(tmp_path / "out"), "--to", "awq"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dequantized weights identical: 14/14" in done.stdout
    command[-1] = "gptq"
    done = subprocess.run([*command, "--overwrite", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["identical"] == 14


def test_run_lets_any_program_load_quantized_repos(packed: Callable[..., Path], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(sys.argv[2:], type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    command = [sys.executable, "-m", "wq", "run", "--", str(program), str(packed("awq")), "--flag", "-x"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "['--flag', '-x'] WqLinear" in done.stdout
