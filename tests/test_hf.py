"""wq inside from_pretrained: on load, packed, dequantized, saved; and beside the stock loader on the same repo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from wq.errors import CheckpointError, FormatError, GroupSizeError, ModelError, SchemeError
from wq.hf import WqConfig, load
from wq.layers import WqLinear
from wq.pipeline.quantizer import quantize

TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A quantized folder; made once for each set of options."""
    made: dict[Any, Path] = {}

    def get(architecture: str = "llama", **options: Any) -> Path:
        key = (architecture, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "out"
            quantize(tiny_model(architecture), made[key], method="rtn", **{"group_size": 32, **options})
        return made[key]

    return get


def from_pretrained(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 50).reshape(2, 24)).logits


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, WqLinear) for module in model.modules())


def test_a_dense_repo_is_quantized_on_load_by_one_flag(tiny_model: TinyModel) -> None:
    dense, model = from_pretrained(tiny_model()), from_pretrained(tiny_model(), quantization_config=WqConfig(bits=8))
    assert packed_layers(model) == 14
    error = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert 0 < error < 0.02
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, WqLinear) for p in m.parameters())
    assert model.get_memory_footprint() < dense.get_memory_footprint()


def test_on_load_rounding_is_the_rtn_method(tiny_model: TinyModel, packed: Callable[..., Path]) -> None:
    on_load = from_pretrained(tiny_model(), quantization_config=WqConfig(group_size=32))
    offline = from_pretrained(packed(dtype="float32"), quantization_config=WqConfig())
    assert torch.equal(logits(on_load), logits(offline))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 3, "group_size": -1}, {"bits": 2}, {"bits": 8}])
def test_a_packed_repo_stays_packed_after_a_forward(options: dict[str, Any], packed: Callable[..., Path]) -> None:
    folder = packed(**options)
    model = from_pretrained(folder, quantization_config=WqConfig())
    before = model.get_memory_footprint()
    first = logits(model)
    assert torch.equal(first, logits(model))
    assert packed_layers(model) == 14
    assert model.get_memory_footprint() == before
    dense = from_pretrained(folder, quantization_config=WqConfig(dequantize=True))
    assert packed_layers(dense) == 0
    assert (first - logits(dense)).norm() / first.norm() < 1e-5


@pytest.mark.parametrize("options", [{}, {"symmetric": False}])
def test_saving_gives_back_the_same_tensors_and_config(
    options: dict[str, Any], packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed(**options)
    from_pretrained(folder, dtype="auto", quantization_config=WqConfig()).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", "opt"])
def test_what_is_quantized_on_load_can_be_saved_and_loaded(
    architecture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = from_pretrained(tiny_model(architecture), quantization_config=WqConfig(symmetric=False))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(from_pretrained(tmp_path, quantization_config=WqConfig())), logits(model))


def test_dequantize_gives_an_ordinary_dense_model(packed: Callable[..., Path], tmp_path: Path) -> None:
    model = from_pretrained(packed(), quantization_config=WqConfig())
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path / "method")
    from_pretrained(packed(), quantization_config=WqConfig(dequantize=True)).save_pretrained(tmp_path / "flag")
    for name in ("method", "flag"):
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        torch.testing.assert_close(logits(from_pretrained(tmp_path / name)), expected, rtol=1e-4, atol=1e-5)


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(2, 50).reshape(2, 24)).logits, sys.argv[2])
assert not any(name == "wq" or name.startswith("wq.") for name in sys.modules)
"""


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_transformers_without_wq_computes_the_same(
    architecture: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    """A process that has transformers and compressed-tensors, and never imports wq."""
    folder = packed(architecture)
    subprocess.run([sys.executable, "-c", STOCK, folder, tmp_path / "logits"], check=True, cwd=tmp_path)
    stock = torch.load(tmp_path / "logits", weights_only=True)
    ours = logits(from_pretrained(folder, quantization_config=WqConfig()))
    assert (stock - ours).norm() / stock.norm() < 1e-5


def test_compressed_tensors_decompresses_asymmetric_weights_to_ours(packed: Callable[..., Path]) -> None:
    """Stock transformers fails to load asymmetric ones; the package that owns the format is the judge."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    folder = packed(symmetric=False)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    model = from_pretrained(folder, quantization_config=WqConfig())
    tensors = load_file(folder / "model.safetensors")
    checked = 0
    for name, layer in model.named_modules():
        if isinstance(layer, WqLinear):
            local = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            theirs = compressor.decompress(local, scheme)["weight"]
            assert torch.equal(theirs.float(), layer.dequantize(torch.float16).float())
            checked += 1
    assert checked == 14


def _damage(folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    return damaged


Q = "model.layers.1.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "scale missing": (lambda t: t.pop(f"{Q}.weight_scale"), rf"{Q}\.weight_scale is missing"),
    "codes missing": (lambda t: t.pop(f"{Q}.weight_packed"), rf"{Q}\.weight_packed is missing"),
    "layer missing": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)],
        rf"1 missing tensors.*{Q}\.weight",
    ),
    "norm missing": (lambda t: t.pop("model.norm.weight"), r"1 missing tensors.*model\.norm\.weight"),
    "a stranger": (lambda t: t.update({"model.x.weight": torch.ones(2)}), r"1 unexpected tensors.*model\.x\.weight"),
    "wrong shape": (
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(64, 5, dtype=torch.float16)}),
        r"5 groups do not divide in_features 64",
    ),
    "wrong rows": (
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:32].contiguous()}),
        r"weight_packed is \[32, 8\].*must be \[64, 8\]",
    ),
    "wrong bits": (
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][:, :4].contiguous()}),
        r"holds 2 bits.*config\.json says \[4\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_not_random_weights(
    damage: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    folder = _damage(packed(), tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder, quantization_config=WqConfig())


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_a_class_without_the_head_reads_the_repo_without_it(
    architecture: str, format: str, packed: Callable[..., Path]
) -> None:
    folder, ids = packed(architecture, format=format, symmetric=False), torch.arange(2, 26).reshape(1, 24)
    whole = from_pretrained(folder, quantization_config=WqConfig())
    base = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=WqConfig())
    assert type(base) is type(whole.model)
    assert packed_layers(base) == packed_layers(whole)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_a_packed_head_is_left_out_with_its_class() -> None:
    folder = Path(__file__).parent / "golden" / "peers" / "gptqmodel-head"
    assert "lm_head.qweight" in load_file(folder / "model.safetensors")
    whole = from_pretrained(folder, quantization_config=WqConfig())
    base = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=WqConfig())
    assert packed_layers(base) == packed_layers(whole) - 1 > 0


def test_a_new_head_on_a_packed_model_is_initialised_and_saved(packed: Callable[..., Path], tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(packed(), dtype=torch.float32, quantization_config=WqConfig())
    model = AutoModelForSequenceClassification.from_pretrained(
        packed(), dtype=torch.float32, num_labels=3, quantization_config=WqConfig()
    )
    assert packed_layers(model) == packed_layers(base)
    assert 0.5 < float(model.score.weight.detach().std()) / model.config.initializer_range < 2
    model.config.pad_token_id = 0
    scores = model(input_ids=torch.arange(2, 26).reshape(1, 24)).logits
    scores.sum().backward()
    assert scores.shape == (1, 3)
    assert model.score.weight.grad.abs().sum() > 0
    for one in (base, model):
        one.save_pretrained(tmp_path / type(one).__name__)
        again = type(one).from_pretrained(tmp_path / type(one).__name__, quantization_config=WqConfig())
        assert again.state_dict().keys() == one.state_dict().keys()
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("damage", ["layer missing", "norm missing", "a stranger"])
def test_a_damaged_checkpoint_is_an_error_to_other_classes_too(
    damage: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = _damage(packed(), tmp_path, DAMAGES[damage][0])
    for kind in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"1 (missing|unexpected) tensors"):
            kind.from_pretrained(folder, quantization_config=WqConfig())


def test_a_dense_repo_that_lacks_a_weight_is_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = _damage(tiny_model(), tmp_path, lambda t: t.pop(f"{Q}.weight"))
    with pytest.raises(CheckpointError, match=rf"{Q}\.weight was not in the checkpoint"):
        from_pretrained(folder, quantization_config=WqConfig())


def test_other_formats_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format"] = "nvfp4-pack-quantized"
    file.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="quantized as compressed-tensors nvfp4-pack-quantized"):
        from_pretrained(tmp_path / "out", quantization_config=WqConfig())


def test_values_no_scheme_has_are_refused_at_once() -> None:
    with pytest.raises(SchemeError, match="bits is 7"):
        WqConfig(bits=7)


def test_a_group_size_that_does_not_fit_is_refused_by_layer(tiny_model: TinyModel) -> None:
    with pytest.raises(GroupSizeError, match=r"model\.layers\.0.*in_features 64 is not a multiple of group size 48"):
        from_pretrained(tiny_model(), quantization_config=WqConfig(group_size=48))


def test_kept_layers_stay_dense(tiny_model: TinyModel) -> None:
    model = from_pretrained(tiny_model(), quantization_config=WqConfig(keep=["mlp"]))
    assert packed_layers(model) == 8
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(ModelError, match="no layer to quantize"):
        from_pretrained(tiny_model(), quantization_config=WqConfig(keep=["proj"]))


def test_generation_and_compilation_work_as_on_any_model(packed: Callable[..., Path]) -> None:
    model = from_pretrained(packed("qwen3"), quantization_config=WqConfig())
    ids = torch.arange(2, 18).reshape(2, 8)
    assert model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1).shape == (2, 14)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_load_takes_dense_and_packed_folders_and_says_when_there_is_no_model(
    tiny_model: TinyModel, packed: Callable[..., Path], tmp_path: Path
) -> None:
    assert packed_layers(load(tiny_model())[0]) == 0
    model, tokenizer = load(packed(), dtype="float32")
    assert packed_layers(model) == 14
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    with pytest.raises(ModelError, match="no model"):
        load(tmp_path)


def test_importing_wq_leaves_other_loads_alone(tiny_model: TinyModel, packed: Callable[..., Path]) -> None:
    """The stock compressed-tensors path still serves whoever did not ask for wq."""
    from transformers.utils.quantization_config import CompressedTensorsConfig

    assert type(from_pretrained(tiny_model()).model.layers[0].mlp.up_proj) is nn.Linear
    model = from_pretrained(packed())
    assert packed_layers(model) == 0
    assert isinstance(model.config.quantization_config, CompressedTensorsConfig)


def test_tiny_models_are_what_the_tests_think(tiny_model: TinyModel) -> None:
    assert from_pretrained(tiny_model("qwen3")).config.tie_word_embeddings
    assert tiny_models.tokenizer().decode(tiny_models.tokenizer()("any bytes: é")["input_ids"]) == "any bytes: é"
