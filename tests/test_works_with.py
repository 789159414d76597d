"""What users do with a model of transformers: compile, generate, pipelines, lm-eval, casts, copies, checkpointing."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from folders import Folder, Table, maker
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CompileConfig, pipeline

from wq import WqConfig
from wq.hf import takeover
from wq.layers import ExpertWeight, WqLinear

IDS = torch.arange(2, 50).reshape(2, 24)
TinyModel = Callable[..., Path]

FOLDERS: Table = {
    "compressed-tensors": ("llama", {"symmetric": False}),
    "gptq": ("llama", {"format": "gptq"}),
    "awq": ("llama", {"format": "awq", "symmetric": False}),
    "mixtral": ("mixtral", None),
    "gpt2": ("gpt2", None),
    "t5": ("t5", None),
    "llava": ("llava", None),
}
each_model = pytest.mark.parametrize("name", FOLDERS)
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return maker(FOLDERS, tiny_model, tmp_path_factory)


def load(folder: Path, **options: Any) -> Any:
    """A model of the class that its config names, by the flag if nothing else is said."""
    kind = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder, **{"dtype": torch.float32, "quantization_config": WqConfig(), **options})


def inputs(model: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Token ids; for T5 also those of the decoder, for Llava also an image and its place."""
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)
    if hasattr(model.config, "vision_config"):
        generator = torch.Generator().manual_seed(0)
        given["input_ids"] = torch.cat([torch.full((len(ids), 4), model.config.image_token_id), ids], 1)
        given["pixel_values"] = torch.randn(len(ids), 3, 16, 16, generator=generator)
    return given


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model, ids)).logits


def packed(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (WqLinear, ExpertWeight))}


def difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


# --- compilation ---


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [("compressed-tensors", "aot_eager"), ("gptq", "eager"), ("mixtral", "eager"), ("gpt2", "eager")],
)
def test_a_compiled_model_is_one_graph_whatever_the_batch(name: str, backend: str, folder: Folder) -> None:
    model = load(folder(name))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((2, 8), (3, 11), (4, 16)):
        ids = torch.randint(2, 200, shape)
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-5, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_layer_through_inductor(folder: Folder) -> None:
    """The default backend, on what is small enough for its compiler to be quick: forward and backward."""
    layer = load(folder("compressed-tensors")).model.layers[0].mlp
    x = torch.randn(5, 64)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        given = x.clone().requires_grad_()
        y = run(given)
        y.square().sum().backward()
        results.append((y.detach(), given.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["compressed-tensors", "mixtral"])
def test_generating_with_a_static_cache_compiles_and_gives_the_same(name: str, folder: Folder) -> None:
    model = load(folder(name))
    expected = model.generate(IDS[:, :8], **GREEDY)
    compile_config = CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True  # else transformers compiles on GPUs only
    actual = model.generate(IDS[:, :8], cache_implementation="static", compile_config=compile_config, **GREEDY)
    assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile
    assert not torch._dynamo.utils.counters["graph_break"]


# --- generation ---


@each_model
def test_generation_is_that_of_the_dequantized_model(name: str, folder: Folder, tmp_path: Path) -> None:
    model = load(folder(name))
    dense = copy.deepcopy(model).dequantize()
    assert packed(model)
    assert not packed(dense)
    assert difference(logits(model), logits(dense)) < 1e-5
    given = {key: value for key, value in inputs(model).items() if key != "decoder_input_ids"}
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(model.generate(**given, **GREEDY, **options), dense.generate(**given, **GREEDY, **options))


@pytest.mark.parametrize("name", ["gptq", "mixtral"])
def test_text_generation_pipeline(name: str, folder: Folder) -> None:
    """The pipeline loads the model itself, by the same flag."""
    generate = pipeline(
        "text-generation",
        model=str(folder(name)),
        model_kwargs={"quantization_config": WqConfig(), "dtype": torch.float32},
        device="cpu",
    )
    assert packed(generate.model)
    tokenizer, model = AutoTokenizer.from_pretrained(folder(name)), load(folder(name))
    for text, said in zip(("Hello", "A b c"), generate(["Hello", "A b c"], **GREEDY), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = tokenizer.decode(model.generate(ids, **GREEDY)[0], skip_special_tokens=True)
        assert said[0]["generated_text"] == expected


def test_lm_eval_computes_our_log_likelihoods(folder: Folder) -> None:
    """lm-eval's own backend, which loads the checkpoint itself."""
    reason = "lm_eval is not installed: its dependencies are large; `pip install --no-deps lm_eval` is enough for this"
    backend = pytest.importorskip("lm_eval.models.huggingface", reason=reason)
    from lm_eval.api.instance import Instance

    requests = [("Hello", " world"), ("A b c", " def ghi"), ("one two", " three")]
    with takeover():
        harness = backend.HFLM(pretrained=str(folder("awq")), device="cpu", dtype="float32", batch_size=2)
    assert packed(harness.model)
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(requests)])
    model, tokenizer = load(folder("awq")), AutoTokenizer.from_pretrained(folder("awq"))
    for (context, continuation), (value, greedy) in zip(requests, found, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        predicted = logits(model, ids)[0, start - 1 : -1].log_softmax(-1)
        expected = predicted.gather(1, ids[0, start:, None]).sum()
        assert value == pytest.approx(expected.item(), rel=1e-4)
        assert greedy == bool((predicted.argmax(-1) == ids[0, start:]).all())


# --- sizes, casts, copies ---


@each_model
def test_the_memory_footprint_is_the_sum_of_all_tensors_and_smaller(name: str, folder: Folder) -> None:
    model = load(folder(name))
    tensors = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == sum(t.numel() * t.element_size() for t in tensors)
    dense = load(folder(name), quantization_config=WqConfig(dequantize=True) if FOLDERS[name][1] is not None else None)
    assert not packed(dense)
    weights = sum(dense.get_submodule(n).weight.numel() for n, m in packed(model).items() if isinstance(m, WqLinear))
    weights += sum(dense.get_parameter(n).numel() for n, m in packed(model).items() if isinstance(m, ExpertWeight))
    saved = dense.get_memory_footprint() - model.get_memory_footprint()
    assert saved > 0.6 * 4 * weights  # of float32, what 4 bits and scales for short rows, padded for experts, leave


def words(layer: nn.Module) -> Tensor:
    """Packed codes as a checkpoint has them."""
    return layer.state_dict()["weight_packed"] if isinstance(layer, WqLinear) else layer.weight_packed


@each_model
def test_casting_keeps_codes_and_casts_scales(name: str, folder: Folder) -> None:
    model = load(folder(name))
    expected = logits(model)
    before = {n: words(m).clone() for n, m in packed(model).items()}
    assert model.to(torch.bfloat16) is model
    for path, layer in packed(model).items():
        assert torch.equal(words(layer), before[path])
        assert words(layer).dtype is torch.int32
        assert layer.weight_scale.dtype is torch.bfloat16
    given = inputs(model)
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].bfloat16()
    with torch.no_grad():
        actual = model(**given).logits
    assert actual.dtype is torch.bfloat16
    assert difference(actual, expected) < 0.05
    assert difference(logits(model.to(torch.float32)), expected) < 0.05


def test_half_and_float_are_refused_by_transformers_as_for_every_quantized_model(folder: Folder) -> None:
    model = load(folder("compressed-tensors"))
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    assert model.bfloat16().dtype is torch.bfloat16  # transformers leaves this one alone
    layer = model.to(torch.float32).model.layers[0].mlp.up_proj
    assert layer.half().weight.dtype is torch.float16  # of a layer they are what `.to` is
    assert words(layer.float()).dtype is torch.int32


@each_model
def test_a_deep_copy_is_a_model_of_its_own(name: str, folder: Folder, tmp_path: Path) -> None:
    model = load(folder(name))
    expected = logits(model)
    clone = copy.deepcopy(model)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in clone.parameters()}
    assert not shared
    for layer in packed(model).values():
        layer.weight_packed.zero_()
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(clone), expected)
    clone.save_pretrained(tmp_path / name)
    flag = WqConfig()
    assert torch.equal(logits(type(clone).from_pretrained(tmp_path / name, quantization_config=flag)), expected)


@each_model
def test_activations_can_be_recomputed(name: str, folder: Folder) -> None:
    """Gradient checkpointing: the same loss and the same gradients."""
    gradients = []
    for recompute in (False, True):
        model = load(folder(name))
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        norms = [p for n, p in model.named_parameters() if "norm" in n or ".ln_" in n]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in norms:
            parameter.requires_grad_()
        given = {**inputs(model), "use_cache": False}
        torch.manual_seed(0)  # of dropout, which recomputing must repeat
        model(**given).logits.square().mean().backward()
        gradients.append([p.grad for p in norms if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_what_is_tested_here_covers_transposed_layers_two_towers_and_images(folder: Folder) -> None:
    assert {tiny_models.config(FOLDERS[name][0]).model_type for name in FOLDERS} >= {"gpt2", "t5", "llava", "mixtral"}
    assert all(layer.transposed for layer in packed(load(folder("gpt2"))).values())
    for stack in ("encoder", "decoder"):
        assert any(path.startswith(stack) for path in packed(load(folder("t5"))))
    vision = [path for path in packed(load(folder("llava"))) if "vision" in path]
    assert not vision  # which stays dense
