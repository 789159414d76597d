"""`wq eval --speed`: figures of what runs, ratios within a round, and what cannot be compiled says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from wq.cli import app
from wq.errors import ModelError
from wq.pipeline.quantizer import quantize

module = import_module("wq.speed")
TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(module, "PROMPT", 16)
    monkeypatch.setattr(module, "TOKENS", 3)


@pytest.fixture
def pair(tiny_model: TinyModel, tmp_path: Path) -> tuple[Path, Path]:
    dense = tiny_model()
    quantize(dense, tmp_path / "packed", method="rtn", group_size=32)
    return dense, tmp_path / "packed"


def test_both_are_measured_and_compared(pair: tuple[Path, Path]) -> None:
    dense, packed = pair
    rounds: list[tuple[int, int]] = []
    result = module.speed(packed, base=dense, compiled=False, on_round=lambda *at: rounds.append(at))
    assert rounds == [(0, 2), (1, 2), (2, 2)]
    assert (result["model"]["model"], result["base"]["model"]) == (str(packed), str(dense))
    for key in ("model", "base"):
        assert set(result[key]) == {"model", "prefill", "decode"}
        assert all(result[key][what] > 0 for what in ("prefill", "decode"))
    assert set(result["speedup"]) == {"prefill", "decode"}
    assert (result["problems"], result["prompt"], result["tokens"]) == ({}, 16, 3)
    assert result["threads"] == torch.get_num_threads()


def test_ratios_are_those_within_a_round(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower all the time, alike for both: the ratio stays what it is."""
    dense, packed = pair
    clock = [0.0]

    def took(model: Any) -> float:
        clock[0] += 1.0
        packed_model = getattr(model.config, "quantization_config", None) is not None
        return (1.0 if packed_model else 2.0) * 10 ** int(clock[0] / 4.5)

    monkeypatch.setattr(module, "_MEASURES", {"prefill": took, "decode": took})
    result = module.speed(packed, base=dense, compiled=False)
    assert result["speedup"] == {"prefill": 2.0, "decode": 2.0}


def test_without_a_base_nothing_is_compared(pair: tuple[Path, Path]) -> None:
    result = module.speed(pair[1], compiled=False)
    assert result["speedup"] is None
    assert "base" not in result


def test_the_model_s_head_is_rounded_and_the_base_s_is_not(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[str] = []
    measure = module._MEASURES["prefill"]
    noted = {"prefill": lambda model: (heads.append(type(model.lm_head).__name__), measure(model))[1]}
    monkeypatch.setattr(module, "_MEASURES", {**module._MEASURES, **noted})
    module.speed(pair[1], base=pair[0], compiled=False, head_bits=8)
    assert set(heads[::2]) == {"WqLinear"}
    assert set(heads[1::2]) == {"Linear"}


def test_what_cannot_be_compiled_says_why_and_the_rest_is_measured(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> float:
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setitem(module._MEASURES, "compiled", refuse)
    result = module.speed(pair[1], base=pair[0])
    assert result["problems"] == {"compiled": "no compiler"}
    assert "compiled" not in result["model"]
    assert set(result["speedup"]) == {"prefill", "decode"}
    monkeypatch.setitem(module._MEASURES, "decode", refuse)
    with pytest.raises(RuntimeError, match="no compiler"):
        module.speed(pair[1])


def test_an_encoder_decoder_model_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        module.speed(tiny_model("t5"))


def test_options_of_compiling_are_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from wq import compile_config

    unchecked = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    assert (compile_config().mode, compile_config().options) == (None, {"cpp_wrapper": True})
    assert compile_config(final=True).options == {"cpp_wrapper": True, "guard_filter_fn": unchecked}
    monkeypatch.setattr("wq.hf.generation.default_device", lambda: "cuda:0")
    assert (compile_config(final=True).mode, compile_config().options) == ("reduce-overhead", None)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("final", [False, True])
def test_decoding_is_compiled_and_says_the_same(pair: tuple[Path, Path], final: bool) -> None:
    from wq import compile_config, load

    torch._dynamo.reset()
    model, _ = load(pair[1], dtype="bfloat16")
    ids = torch.arange(2, 10)[None]
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eager = model.generate(ids, **how)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = model.generate(ids, **how, cache_implementation="static", compile_config=compile_config(final=final))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(compiled, eager)


def test_the_command(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._MEASURES, "compiled", lambda model: 0.5)
    arguments = ["eval", str(pair[1]), "--base", str(pair[0]), "--speed"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["model"]["compiled"], found["speedup"]["compiled"]) == (2.0, 1.0)
    table = CliRunner().invoke(app, arguments).stdout
    assert "tokens per second" in table
    assert "times the dense" in table


@pytest.mark.parametrize("other", [["--text", "builtin"], ["--tasks", "arc_easy"]])
def test_speed_and_another_evaluation_are_two(other: list[str], pair: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(app, ["eval", str(pair[1]), "--speed", *other])
    assert done.exit_code == 2
    assert "evaluations apart" in done.output
