"""Every dialect of every format through `from_pretrained`: packed, dequantized, saved, moved, copied, generating."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wq import WqConfig, WqLinear, formats, quantize
from wq.errors import CheckpointError
from wq.scheme import Scheme
from wq.solvers import rtn
from wq_kernels import stream

TinyModel = Callable[..., Path]
Tensors = dict[str, Tensor]
Config = dict[str, Any]
Change = Callable[[Tensors, Config, Callable[..., Path]], Any]
LAYER = "model.layers.1.mlp.down_proj"
GPTQ, AWQ, COMPRESSED = "gptq", "awq", "compressed-tensors"


def prefixes(tensors: Tensors) -> list[str]:
    """The layers with packed weights."""
    return sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".qweight", ".weight_packed"))})


# --- how other tools write them ---


def scattered(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    """act-order: the columns of each layer belong to groups in no order."""
    generator = torch.Generator().manual_seed(1)
    for name in prefixes(tensors):
        index = tensors[f"{name}.g_idx"]
        order = torch.randperm(index.numel(), generator=generator)
        codes = stream.unpack(tensors[f"{name}.qweight"].t().contiguous(), config["bits"], len(order))
        tensors[f"{name}.qweight"] = stream.pack(codes[:, order], config["bits"]).t().contiguous()
        tensors[f"{name}.g_idx"] = index[order]
    config["desc_act"] = True


def without_index(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    for name in prefixes(tensors):
        del tensors[f"{name}.g_idx"]


def version_1(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    """As GPTQModel saves asymmetric grids for older readers: one less in every field, a word at a time."""
    for name in prefixes(tensors):
        tensors[f"{name}.qzeros"] -= 0x11111111
    config["checkpoint_format"] = "gptq"


def old_fields(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    """AutoGPTQ's `quantize_config`, which has no checkpoint format and much else."""
    del config["checkpoint_format"], config["pack_dtype"], config["lm_head"]
    config |= {"damp_percent": 0.01, "static_groups": False, "true_sequential": True, "model_name_or_path": None}
    config |= {"model_file_base_name": "model", "is_marlin_format": False, "meta": {"quantizer": ["autogptq:0.7.1"]}}


def one_layer_of_8_bits(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    other = load_file(base(GPTQ, bits=8) / "model.safetensors")
    tensors |= {name: tensor for name, tensor in other.items() if name.startswith(f"{LAYER}.")}
    config["dynamic"] = {r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8}}


def packed_head(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    method = config["quant_method"]
    scheme = Scheme(4, 32, method != AWQ)
    packed = formats.get(method).pack(rtn.solve(tensors.pop("lm_head.weight").float(), None, scheme), scheme)
    tensors |= {f"lm_head.{leaf}": tensor for leaf, tensor in packed.items()}
    if method == GPTQ:
        config["lm_head"] = True
    else:
        config["modules_to_not_convert"] = []


def auto_round(packing: str) -> Change:
    def change(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
        kept = {"bits": config["bits"], "group_size": config["group_size"], "sym": config.get("sym", False)}
        config.clear()
        config |= {"quant_method": "auto-round", "packing_format": packing, "autoround_version": "0.5.1", "iters": 200}
        config |= {**kept, "data_type": "int", "block_name_to_quantize": "model.layers", "batch_size": 8}

    return change


def two_groups(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    other = load_file(base(COMPRESSED, bits=8) / "model.safetensors")
    tensors |= {name: tensor for name, tensor in other.items() if ".down_proj." in name}
    group = copy.deepcopy(config["config_groups"]["group_0"])
    group["targets"], group["weights"]["num_bits"] = ["re:.*down_proj$"], 8
    config["config_groups"]["group_1"] = group


def aligned(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    """3 bits as older versions packed them: ten whole values in a word."""
    for name in prefixes(tensors):
        packed, (_, columns) = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"].tolist()
        codes = nn.functional.pad(stream.unpack(packed, 3, columns).long(), (0, -columns % 10))
        words = sum(codes.reshape(len(codes), -1, 10)[..., i] << 3 * i for i in range(10))
        tensors[f"{name}.weight_packed"] = words.to(torch.int32)


def weight_index(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    """act-order in compressed-tensors; the columns are in the order they were."""
    generator = torch.Generator().manual_seed(1)
    for name in prefixes(tensors):
        columns, groups = int(tensors[f"{name}.weight_shape"][1]), tensors[f"{name}.weight_scale"].shape[1]
        index = torch.arange(columns, dtype=torch.int32) // (columns // groups)
        tensors[f"{name}.weight_g_idx"] = index[torch.randperm(columns, generator=generator)]
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"


def unchanged(tensors: Tensors, config: Config, base: Callable[..., Path]) -> None:
    """As wq writes it."""


ASYMMETRIC = {"symmetric": False}
DIALECTS: dict[str, tuple[str, dict[str, Any], Change]] = {
    "gptq": (GPTQ, {}, unchanged),
    "gptq 2 bits": (GPTQ, {"bits": 2, **ASYMMETRIC}, unchanged),
    "gptq 3 bits": (GPTQ, {"bits": 3}, unchanged),
    "gptq channel": (GPTQ, {"bits": 8, "group_size": -1}, unchanged),
    "gptq v2": (GPTQ, ASYMMETRIC, unchanged),
    "gptq v1 asymmetric": (GPTQ, ASYMMETRIC, version_1),
    "gptq act-order": (GPTQ, ASYMMETRIC, scattered),
    "gptq act-order 3 bits": (GPTQ, {"bits": 3}, scattered),
    "gptq without g_idx": (GPTQ, {}, without_index),
    "gptq of AutoGPTQ": (GPTQ, {}, old_fields),
    "gptq dynamic": (GPTQ, {}, one_layer_of_8_bits),
    "gptq head": (GPTQ, {}, packed_head),
    "awq": (AWQ, ASYMMETRIC, unchanged),
    "awq symmetric": (AWQ, {}, unchanged),
    "awq head": (AWQ, ASYMMETRIC, packed_head),
    "auto-round v1": (GPTQ, {}, auto_round("auto_round:auto_gptq")),
    "auto-round v2": (GPTQ, ASYMMETRIC, auto_round("auto_round")),
    "auto-round awq": (AWQ, ASYMMETRIC, auto_round("auto_round:auto_awq")),
    "compressed-tensors": (COMPRESSED, ASYMMETRIC, unchanged),
    "compressed-tensors two groups": (COMPRESSED, {}, two_groups),
    "compressed-tensors aligned": (COMPRESSED, {"bits": 3}, aligned),
    "compressed-tensors act-order": (COMPRESSED, {}, weight_index),
}
PERMUTED = ["gptq act-order", "gptq act-order 3 bits", "compressed-tensors act-order"]
each_dialect = pytest.mark.parametrize("dialect", DIALECTS)
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The folder of a dialect; made once."""
    made: dict[Any, Path] = {}

    def base(format: str, tied: bool = False, **options: Any) -> Path:
        key = ("base", format, tied, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base") / "out"
            source = tiny_model("llama", tie_word_embeddings=tied)
            quantize(
                source,
                made[key],
                **{"method": "rtn", "group_size": 32, "format": format, "dtype": "float16", **options},
            )
        return made[key]

    def get(dialect: str, tied: bool = False) -> Path:
        key = ("dialect", dialect, tied)
        if key not in made:
            format, options, change = DIALECTS[dialect]
            source, made[key] = base(format, tied, **options), tmp_path_factory.mktemp("dialect") / "out"
            shutil.copytree(source, made[key])
            tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
            change(tensors, config["quantization_config"], base)
            save_file(
                {k: t.contiguous() for k, t in tensors.items()}, made[key] / "model.safetensors", {"format": "pt"}
            )
            (made[key] / "config.json").write_text(json.dumps(config))
        return made[key]

    return get


def load(folder: Path, dequantize: bool = False, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=WqConfig(dequantize=dequantize)
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 50).reshape(2, 24)).logits


def packed_layers(model: nn.Module) -> dict[str, WqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, WqLinear)}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def assert_same_checkpoint(before: Path, after: Path) -> None:
    first, second = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype, name
        assert torch.equal(second[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (before, after)]
    assert configs[0] == configs[1]


@each_dialect
def test_packed_and_dequantized_loads_compute_the_same(dialect: str, checkpoint: Checkpoint) -> None:
    model, dense = load(checkpoint(dialect)), load(checkpoint(dialect), dequantize=True)
    layers = packed_layers(model)
    assert len(layers) == (15 if "head" in dialect else 14)
    assert not packed_layers(dense)
    for name in layers:
        assert type(dense.get_submodule(name)) is nn.Linear
        assert torch.equal(layers[name].dequantize(torch.float32), dense.get_submodule(name).weight), name
    assert difference(logits(model), logits(dense)) < 1e-5


@each_dialect
def test_saving_gives_back_tensors_and_config_bit_for_bit(dialect: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    load(checkpoint(dialect), dtype="auto").save_pretrained(tmp_path)
    assert_same_checkpoint(checkpoint(dialect), tmp_path)


@pytest.mark.parametrize("dialect", ["gptq", "gptq act-order", "awq", "compressed-tensors", "auto-round v1"])
def test_tied_embeddings_stay_tied(dialect: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(dialect, tied=True)
    model, dense = load(folder), load(folder, dequantize=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(logits(model), logits(dense)) < 1e-5
    load(folder, dtype="auto").save_pretrained(tmp_path)
    assert_same_checkpoint(folder, tmp_path)


@each_dialect
def test_generation_is_that_of_the_dequantized_model(dialect: str, checkpoint: Checkpoint) -> None:
    ids = torch.arange(2, 18).reshape(2, 8)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    ours, dense = (load(checkpoint(dialect), dequantize=flag).generate(ids, **options) for flag in (False, True))
    assert ours.shape == (2, 13)
    assert torch.equal(ours, dense)


@pytest.mark.parametrize("dialect", ["gptq act-order", "gptq act-order 3 bits"])
def test_act_order_is_the_same_model_with_its_columns_moved(dialect: str, checkpoint: Checkpoint) -> None:
    """The weight of each layer, against the checkpoint before its columns were scattered."""
    base = "gptq v2" if dialect == "gptq act-order" else "gptq 3 bits"
    ordered, moved = packed_layers(load(checkpoint(base))), packed_layers(load(checkpoint(dialect)))
    generator = torch.Generator().manual_seed(1)
    for name in sorted(moved):
        order = torch.randperm(moved[name].in_features, generator=generator)
        assert moved[name].permutation is not None
        assert torch.equal(moved[name].dequantize(torch.float32), ordered[name].dequantize(torch.float32)[:, order])


@pytest.mark.parametrize(
    ("dialect", "base"),
    [
        ("gptq v1 asymmetric", "gptq v2"),
        ("auto-round v2", "gptq v2"),
        ("gptq without g_idx", "gptq"),
        ("gptq of AutoGPTQ", "gptq"),
        ("auto-round v1", "gptq"),
        ("auto-round awq", "awq"),
    ],
)
def test_another_spelling_of_a_checkpoint_is_the_same_model(dialect: str, base: str, checkpoint: Checkpoint) -> None:
    assert torch.equal(logits(load(checkpoint(dialect))), logits(load(checkpoint(base))))


def test_layers_of_several_widths_have_their_own(checkpoint: Checkpoint) -> None:
    dynamic = packed_layers(load(checkpoint("gptq dynamic")))
    assert {name for name, layer in dynamic.items() if layer.scheme.bits == 8} == {LAYER}
    groups = packed_layers(load(checkpoint("compressed-tensors two groups")))
    assert {layer.scheme.bits for name, layer in groups.items() if name.endswith("down_proj")} == {8}
    assert {layer.scheme.bits for name, layer in groups.items() if not name.endswith("down_proj")} == {4}


@pytest.mark.parametrize("dialect", [*PERMUTED, "awq"])
def test_a_copy_and_another_dtype_keep_the_order_of_columns(
    dialect: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = load(checkpoint(dialect))
    expected = logits(model)
    clone = copy.deepcopy(model)
    del model
    assert torch.equal(logits(clone), expected)
    half = clone.to(torch.bfloat16)
    for layer in packed_layers(half).values():
        assert layer.state_dict()["weight_packed"].dtype is torch.int32
        assert layer.permutation is None or layer.permutation.dtype is torch.int32
    assert logits(half).dtype is torch.bfloat16
    assert difference(logits(half), expected) < 0.05


@pytest.mark.parametrize("dialect", ["gptq act-order", "awq", "compressed-tensors"])
def test_shards_load_as_one_file_does(dialect: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = load(checkpoint(dialect), dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(load(checkpoint(dialect))))


def test_biases_of_zeros_where_the_model_has_none_are_left_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    """AutoGPTQ wrote them; a bias that is not zero would change the model, and is refused."""
    folder = tmp_path / "out"
    quantize(tiny_model(), folder, method="rtn", group_size=32, format=GPTQ)
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        expected = load(folder)(torch.arange(2, 20).reshape(1, 18)).logits
    for value in (0.0, 0.5):
        tensors[f"{LAYER}.bias"] = torch.full((64,), value, dtype=torch.float16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if value:
            with pytest.raises(CheckpointError, match=rf"1 unexpected tensors in the checkpoint: {LAYER}\.bias"):
                load(folder)
        else:
            with torch.no_grad():
                assert torch.equal(load(folder)(torch.arange(2, 20).reshape(1, 18)).logits, expected)
