"""What a quantized folder holds, without a model to ask: formats, shapes, and what cannot be told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wq import quantize
from wq.checkpoint import read_headers
from wq.convert import convert
from wq.errors import CheckpointError, FormatError
from wq.quantized import LEAVES, describe, read_config, split

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def get(format: str) -> Path:
        if format not in folders:
            folders[format] = tmp_path_factory.mktemp("made") / "out"
            quantize(tiny_model(), folders[format], method="rtn", group_size=32, format=format, dtype="float16")
        return folders[format]

    return get


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def q_proj(folder: Path, **config: Any) -> Any:
    layers, _ = split(read_headers(folder))
    return describe(Q, layers[Q], read_config(folder)["quantization_config"] | config)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_every_layer_is_told_from_its_tensors_alone(format: str, made: Callable[[str], Path]) -> None:
    layers, others = split(read_headers(made(format)))
    assert len(layers) == 14
    assert not [name for name in others if name.rpartition(".")[2] in LEAVES]
    stored = q_proj(made(format))
    assert (stored.format, stored.shape, stored.scheme.bits, stored.scheme.group_size) == (format, (64, 64), 4, 32)


def test_without_an_index_the_config_says_how_many_columns_there_are(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(made("gptq"), tmp_path / "out", lambda tensors: tensors.pop(f"{Q}.g_idx"))
    assert q_proj(folder).shape == (64, 64)
    with pytest.raises(CheckpointError, match=f"{Q}: neither g_idx nor config.json"):
        q_proj(folder, bits=None)


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "scales flat": ("gptq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].flatten()}), "is not a matrix"),
    "no scales": ("awq", lambda t: t.pop(f"{Q}.scales"), "is not a matrix"),
    "no codes": ("gptq", lambda t: t.pop(f"{Q}.qweight"), "qweight is missing"),
    "no packed codes": ("compressed-tensors", lambda t: t.pop(f"{Q}.weight_packed"), "weight_packed is missing"),
    "no columns": (
        "compressed-tensors",
        lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 0])}),
        r"is said to be \[64, 0\]",
    ),
    "no shape": ("compressed-tensors", lambda t: t.pop(f"{Q}.weight_shape"), "weight_shape is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_told_is_refused_by_name(damage: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    format, change, message = DAMAGES[damage]
    folder = changed(made(format), tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=f"{Q}.*{message}"):
        q_proj(folder)


def test_a_folder_that_is_not_quantized_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    for content in (None, "{", "[]", json.dumps({"quantization_config": None}), json.dumps({"model_type": "llama"})):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match="has no quantization_config"):
            read_config(tmp_path)
    empty = changed(
        made("awq"), tmp_path / "empty", lambda t: [t.pop(n) for n in list(t) if n.split(".")[-1] in LEAVES]
    )
    with pytest.raises(CheckpointError, match="holds no packed weights"):
        convert(empty, tmp_path / "out", to="gptq")


def test_several_schemes_go_over_into_formats_that_have_a_scheme_for_each_layer(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """One layer's scales repeated: the same weights, in groups half as long."""
    name = f"{Q}.weight_scale"
    folder = changed(
        made("compressed-tensors"), tmp_path / "in", lambda t: t.update({name: t[name].repeat_interleave(2, 1)})
    )
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert q_proj(folder).scheme.group_size == 16
    done = convert(folder, tmp_path / "out", to="gptq")
    assert done["identical"] == done["layers"]
    assert q_proj(tmp_path / "out").scheme.group_size == 16
    rules = read_config(tmp_path / "out")["quantization_config"]["dynamic"]
    assert [values["group_size"] for rule, values in rules.items() if re.search(rule.removeprefix("+:"), Q)] == [16]
    with pytest.raises(FormatError, match="awq"):
        convert(folder, tmp_path / "awq", to="awq")
    assert not (tmp_path / "awq").exists()
