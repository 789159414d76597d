"""The whole offline job on tiny models of every architecture, and what it refuses."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from wq import errors, formats, grid, solvers
from wq.hf import WqConfig, load
from wq.pipeline.quantizer import quantize
from wq.scheme import Scheme
from wq.solvers import Statistics, rtn

TEXTS = [f"{i} bottles of beer on the wall, {i} bottles of beer; take {i % 7} down." for i in range(99)]
SMALL: dict[str, Any] = {"group_size": 32, "calibration": TEXTS, "samples": 6, "seqlen": 48}
TinyModel = Callable[..., Path]


def dequantized(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=WqConfig(dequantize=True), dtype=torch.float32
    )


def tokens(count: int = 40) -> Tensor:
    return torch.randint(2, 258, (2, count))


@pytest.mark.parametrize("architecture", tiny_models.DENSE)
def test_every_architecture_is_quantized_and_loads_packed(
    architecture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model(architecture)
    report = quantize(source, tmp_path / "out", bits=8, **SMALL)
    packed, _ = load(tmp_path / "out", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = tokens()
    ours, theirs = packed(input_ids=ids).logits, dense(input_ids=ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 0.02  # 8 bits forget almost nothing
    assert not torch.equal(ours, theirs)
    # Mamba multiplies by the weight of its time steps itself: that layer is never called.
    assert [record["layer"] for record in report["fallbacks"] if not record["layer"].endswith(".dt_proj")] == []
    assert 0 < report["quantized_parameters"] < report["parameters"]
    assert report["parameters"] == sum(t.numel() for t in load_file(source / "model.safetensors").values())


@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma3_text", "gpt_neox"])
def test_each_layer_learns_from_what_its_quantized_predecessors_produce(
    architecture: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics each solver call saw are those of the finished model's own layer inputs on the same tokens."""
    seen: list[Statistics] = []

    def solve(weight: Tensor, statistics: Statistics, scheme: Scheme, *, generator: Any) -> solvers.Solution:
        seen.append(statistics)
        return rtn.solve(weight, statistics, scheme, generator=generator)

    spy = types.ModuleType("spy_solver")
    spy.__dict__.update(solve=solve, NEEDS_STATISTICS=True)
    monkeypatch.setitem(sys.modules, "spy_solver", spy)
    monkeypatch.setitem(solvers.SOLVERS, "spy", "spy_solver")
    report = quantize(tiny_model(architecture), tmp_path / "out", method="spy", bits=2, dtype="float32", **SMALL)

    model, tokenizer = dequantized(tmp_path / "out"), tiny_models.tokenizer()
    from wq.pipeline import calibration

    windows = calibration.load(TEXTS, tokenizer, 6, 48).tokens
    moments: dict[str, Tensor] = {}
    for record in report["layers"]:

        def hook(module: nn.Module, args: Any, name: str = record["layer"]) -> None:
            x = args[0].double().flatten(0, -2)
            moments[name] = moments.get(name, 0) + x.T @ x  # type: ignore[operator]

        model.get_submodule(record["layer"]).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=windows)
    expected = [moments[record["layer"]] / windows.numel() for record in report["layers"]]
    assert all(record["tokens"] == windows.numel() for record in report["layers"])
    for statistics in seen:  # one for each group of layers that share an input
        errors_ = [
            float((statistics.second_moment - e).norm() / e.norm())
            for e in expected
            if e.shape == statistics.second_moment.shape
        ]
        assert min(errors_) < 1e-5
    groups_per_block = {"llama": 4, "phi": 3, "gemma3_text": 4, "gpt_neox": 4}
    assert len(seen) == 2 * groups_per_block[architecture]


def test_the_same_command_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(tiny_model(), tmp_path / name, **SMALL)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_gptq_beats_rounding_on_the_layers_outputs(tiny_model: TinyModel, tmp_path: Path) -> None:
    options = {**SMALL, "samples": 40}
    gptq = quantize(tiny_model(), tmp_path / "gptq", bits=3, **options)
    awq = quantize(tiny_model(), tmp_path / "awq", method="awq", bits=3, **options)
    assert sum(r["error"] for r in gptq["layers"]) < sum(r["error"] for r in awq["layers"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_every_format_holds_the_same_weights(
    format: str, symmetric: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    options = {**SMALL, "symmetric": symmetric, "dtype": "float16"}
    quantize(tiny_model(), tmp_path / "ct", **options)
    report = quantize(tiny_model(), tmp_path / format, format=format, **options)
    model = dequantized(tmp_path / "ct")
    stored = load_file(tmp_path / format / "model.safetensors")
    scheme = Scheme.from_dict(report["scheme"])
    for record in report["layers"]:
        local = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(record["layer"] + ".")}
        solution = formats.get(format).unpack(local, scheme, tuple(record["shape"]))
        weight = grid.dequantize(solution.codes, solution.scale, solution.zero)
        assert torch.equal(weight, model.get_parameter(record["layer"] + ".weight"))
    config = json.loads((tmp_path / format / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == format


def test_what_stays_dense_stays_byte_for_byte(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model()
    quantize(source, tmp_path / "out", keep=["down_proj", r"layers\.0\.self_attn\.q_proj"], dtype="float32", **SMALL)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = set(before) & set(after)
    assert "model.layers.1.mlp.down_proj.weight" in kept
    assert "model.layers.0.self_attn.q_proj.weight" in kept
    assert "model.layers.1.self_attn.q_proj.weight" not in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignore) == {
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    }


def test_float32_is_stored_as_float16_and_bfloat16_as_it_was(tmp_path: Path) -> None:
    for dtype, stored in ((torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)):
        source = tiny_models.make(tmp_path / f"{dtype}", "llama", dtype)
        quantize(source, tmp_path / f"out{dtype}", method="rtn", group_size=32)
        tensors = load_file(tmp_path / f"out{dtype}" / "model.safetensors")
        assert tensors["model.norm.weight"].dtype is stored
        assert tensors["model.layers.0.self_attn.q_proj.weight_scale"].dtype is stored
        config = json.loads((tmp_path / f"out{dtype}" / "config.json").read_text())
        assert config["dtype"] == str(stored).removeprefix("torch.")


def test_rounding_needs_no_calibration(tiny_model: TinyModel, tmp_path: Path) -> None:
    report = quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32, calibration="not/there")
    assert report["calibration"] is None


def test_the_group_size_is_chosen_to_fit(tmp_path: Path) -> None:
    source = tiny_models.make(tmp_path / "src", "llama", hidden_size=192, intermediate_size=384)
    assert quantize(source, tmp_path / "out", method="rtn")["scheme"]["group_size"] == 64


def test_the_folder_is_complete(tiny_model: TinyModel, tmp_path: Path) -> None:
    report = quantize(tiny_model(), tmp_path / "out", **SMALL)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "wq_report.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert report["checkpoint_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "wq_report.json").read_text()) == report
    assert {"block", "layers"} <= _events(tiny_model(), tmp_path / "again")[-1].keys()


def _events(source: Path, output: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    quantize(source, output, method="rtn", group_size=32, on_block=events.append)
    assert [event["block"] for event in events] == [1, 2]
    return events


def _empty_file(tmp_path: Path) -> str:
    (tmp_path / "empty.txt").touch()
    return str(tmp_path / "empty.txt")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "group size": ({"group_size": 48}, errors.GroupSizeError, r"q_proj.*in_features 64.*group size 48.*--group 64"),
    "bits": ({"bits": 5}, errors.SchemeError, "bits is 5"),
    "method": ({"method": "magic"}, errors.UnknownNameError, "'magic'.*awq, gptq, rtn"),
    "format": ({"format": "gguf"}, errors.UnknownNameError, "'gguf'.*compressed-tensors"),
    "awq with 3 bits": ({"format": "awq", "bits": 3}, errors.FormatError, "4 bits, not 3"),
    "keep": ({"keep": ["("]}, errors.SchemeError, r"'\('"),
    "keep everything": ({"keep": ["."]}, errors.ModelError, "no layer is left"),
    "dtype": ({"dtype": "int7"}, errors.SchemeError, "int7.*float16"),
    "seqlen": ({"seqlen": 512}, errors.CalibrationError, "512.*256 positions"),
    "short text": ({"calibration": ["hello"]}, errors.CalibrationError, "6 tokens.*window of 48"),
    "no text": ({"calibration": []}, errors.CalibrationError, "empty"),
    "data set": ({"calibration": "no/such-set"}, errors.CalibrationError, "no/such-set.*builtin"),
    "missing file": ({"calibration": "no.txt"}, errors.CalibrationError, "no.txt does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_nothing(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        quantize(tiny_model(), tmp_path / "out", **{**SMALL, **options})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_calibration_file_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(errors.CalibrationError, match=r"empty.txt is empty \(0 bytes\)"):
        quantize(tiny_model(), tmp_path / "out", **{**SMALL, "calibration": _empty_file(tmp_path)})


def test_a_model_without_linear_blocks_is_refused(tmp_path: Path) -> None:
    empty = tiny_models.make(tmp_path / "empty", "llama", num_hidden_layers=0)
    with pytest.raises(errors.ModelError, match="LlamaModel.*no linear layers"):
        quantize(empty, tmp_path / "out", **SMALL)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose encoder reads sound."""
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = WhisperConfig(vocab_size=tiny_models.VOCABULARY, num_mel_bins=8, **sizes, **heads, **tokens)
    folder = tmp_path_factory.mktemp("whisper") / "dense"
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def test_text_cannot_calibrate_the_decoder_of_an_encoder_of_sound(whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="encoder that takes no text.*--method rtn"):
        quantize(whisper, tmp_path / "out", **SMALL)
    report = quantize(whisper, tmp_path / "out", method="rtn", **SMALL)
    assert {layer["layer"].split(".")[1] for layer in report["layers"]} == {"decoder"}
    packed, _ = load(tmp_path / "out", dtype="float32")
    sound, ids = torch.randn(1, 8, 40), torch.arange(2, 9).unsqueeze(0)
    exact = WhisperForConditionalGeneration.from_pretrained(whisper)
    with torch.no_grad():
        ours, theirs = (m(input_features=sound, decoder_input_ids=ids).logits for m in (packed, exact))
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.5


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.ModelError, match=r"no config\.json"):
        quantize(tmp_path / "empty", tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty_is_left_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(errors.OutputError, match="not empty.*--overwrite"):
        quantize(tiny_model(), tmp_path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(errors.ModelError, match=r"broken\.gguf.*could not read this GGUF file"):
        quantize(tmp_path / "broken.gguf", tmp_path / "out", method="rtn")
    with pytest.raises(errors.ModelError, match="is a file, but not a .gguf"):
        quantize(__file__, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


def test_a_source_weight_that_is_not_finite_is_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_models.make(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(errors.CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 values"):
        quantize(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_quantized_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    quantize(tiny_model(), tmp_path / "out", method="rtn", group_size=32)
    with pytest.raises(errors.ModelError, match=r"already quantized \(compressed-tensors\)"):
        quantize(tmp_path / "out", tmp_path / "again", method="rtn", group_size=32)


def test_a_failure_on_the_way_leaves_what_is_done_and_no_output(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(), tmp_path / "out", on_block=fail, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
