"""Memory that runs out and numbers that overflow: the run goes on, and its result is that of a run without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Faults
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from wq import manifest
from wq.cli import app
from wq.errors import BudgetError, CalibrationError, CheckpointError
from wq.pipeline import calibration, flow
from wq.planning import plan
from wq.presets import quantize

TinyModel = Callable[..., Path]
OPTIONS: dict[str, Any] = {"calibration": "builtin", "samples": 16, "seqlen": 32, "group_size": 32}
MEASURED = ("seconds", "peak_rss_bytes")


def files(folder: Path) -> dict[str, Any]:
    return manifest.read(folder) or pytest.fail("no manifest")


@pytest.mark.parametrize(
    ("architecture", "method"), [("llama", "gptq"), ("mixtral", "awq"), ("t5", "gptq"), ("llama", "rtn")]
)
def test_memory_that_runs_out_anywhere_changes_no_byte(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, method: str
) -> None:
    options = {**OPTIONS, "method": method, "overwrite": True}
    with Faults() as counted:
        quantize(tiny_model(architecture), tmp_path / "one", **options)
    first = counted.count // (2 if method == "rtn" else 20)  # before that, no block has begun
    sites = range(first, counted.count * 9 // 10, counted.count // (5 if architecture == "t5" else 9))
    for at in sites:
        with Faults(at) as faults:
            quantize(tiny_model(architecture), tmp_path / "two", **options)
        assert faults.failed == 1
        assert files(tmp_path / "one") == files(tmp_path / "two"), at
    print(f"{architecture}, {method}: {len(sites)} of {counted.count} operations failed, all with the same bytes")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "llava"])  # experts hold all tokens, however they came
def test_memory_for_few_windows_at_once_is_enough(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    seen: list[int] = []
    narrow = flow.Flow.narrow

    def watched(self: flow.Flow) -> bool:
        found = narrow(self)
        seen.append(max(self.sizes))
        return found

    monkeypatch.setattr(flow.Flow, "narrow", watched)
    options = {**OPTIONS, "samples": 32, "seqlen": 64}
    with Faults() as free:
        quantize(tiny_model(architecture), tmp_path / "one", **options)
    assert not seen
    # Not a quarter: what the solver holds in float64 does not shrink with the number of windows.
    with Faults(limit=free.largest / 2.5) as tight:
        quantize(tiny_model(architecture), tmp_path / "two", **options)
    assert tight.failed > 1
    assert seen[-1] < 32
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_memory_that_runs_out_while_a_block_is_loaded_is_met_as_well(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads in threads, and keeps what is raised there to itself."""
    from transformers import core_model_loading

    copy, failed = core_model_loading._materialize_copy, []

    def short(tensor: Any, *place: Any) -> torch.Tensor:
        made = copy(tensor, *place)
        if len(failed) < 3 and made.dim() == 2:
            failed.append(made.shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return made

    quantize(tiny_model(), tmp_path / "one", **OPTIONS)
    monkeypatch.setattr(core_model_loading, "_materialize_copy", short)
    quantize(tiny_model(), tmp_path / "two", **OPTIONS)
    assert failed
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_on_a_device_there_is_less_to_ask_for_before_the_cpu() -> None:
    """Half of the windows until they come one by one, then those that wait go to RAM, then all to the CPU."""
    here: Any = object.__new__(flow.Flow)
    here.sizes, here.device, here.offloaded = [1, 4, 3], torch.device("cuda"), False
    steps = []
    while here._step():
        steps.append((list(here.sizes), here.offloaded, here.device.type))
    assert steps == [
        ([1, 2, 2, 2, 1], False, "cuda"),
        ([1] * 8, False, "cuda"),
        ([1] * 8, True, "cuda"),
        ([1] * 8, True, "cpu"),
    ]


def test_memory_that_is_never_enough_ends_the_run_and_keeps_what_is_done(tiny_model: TinyModel, tmp_path: Path) -> None:
    options = {**OPTIONS, "method": "gptq"}

    def tighten(event: dict[str, Any]) -> None:
        faults.limit = 100

    with Faults() as faults, pytest.raises(torch.OutOfMemoryError, match="injected") as caught:
        quantize(tiny_model(), tmp_path / "out", on_block=tighten, **options)
    assert "repeat the command" in caught.value.__notes__[0]
    told: list[dict[str, Any]] = []
    quantize(tiny_model(), tmp_path / "out", on_block=told.append, **options)
    assert told[0]["resumed"]
    quantize(tiny_model(), tmp_path / "unbroken", **options)
    assert files(tmp_path / "unbroken") == files(tmp_path / "out")


# --- what is not finite ---


def overflowing(folder: Path, token: int) -> Path:
    """A model in which the embedding of a token, finite on disk, overflows: gemma multiplies it."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = 1e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def windows_with(folder: Path, token: int) -> tuple[torch.Tensor, list[int]]:
    """The calibration windows, and the numbers of those that have a token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = calibration.load("builtin", tokenizer, OPTIONS["samples"], OPTIONS["seqlen"], 0).tokens
    return tokens, [int(i) for i in (tokens == token).any(1).nonzero()]


def rare_token(folder: Path, least: int, most: int) -> int:
    """One that so many windows have."""
    tokens, _ = windows_with(folder, -1)
    counts = {int(token): int((tokens == token).any(1).sum()) for token in tokens.unique()}
    return next(token for token, count in sorted(counts.items()) if least <= count <= most)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_windows_that_overflow_are_left_out_as_if_they_had_never_been_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    import tiny_models

    folder = tiny_models.make(tmp_path / "model", "gemma3_text")
    token = rare_token(folder, 1, 1)
    tokens, bad = windows_with(overflowing(folder, token), token)
    made = quantize(folder, tmp_path / "one", method=method, **OPTIONS)
    assert made["calibration"]["left_out"] == bad
    clean = tokens[[i for i in range(len(tokens)) if i not in bad]]
    shorter = calibration.Calibration(clean, "builtin", 0, "", len(clean))
    monkeypatch.setattr(calibration, "load", lambda *_: shorter)
    other = quantize(folder, tmp_path / "two", method=method, **OPTIONS)
    assert other["calibration"]["left_out"] == []
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert made["layers"] == other["layers"]


def test_a_run_without_windows_that_overflow_can_be_interrupted(tmp_path: Path) -> None:
    import tiny_models

    folder = tiny_models.make(tmp_path / "model", "gemma3_text")
    token = rare_token(folder, 1, 1)
    _, bad = windows_with(overflowing(folder, token), token)
    quantize(folder, tmp_path / "one", **OPTIONS)

    def interrupt(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "two", on_block=interrupt, **OPTIONS)
    made = quantize(folder, tmp_path / "two", **OPTIONS)
    assert made["calibration"]["left_out"] == bad
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_command_names_windows_that_overflow(tmp_path: Path) -> None:
    import tiny_models

    folder = tiny_models.make(tmp_path / "model", "gemma3_text")
    token = rare_token(folder, 1, 1)
    _, (window,) = windows_with(overflowing(folder, token), token)
    options = ["--calibration", "builtin", "--samples", "16", "--seqlen", "32", "--group", "32"]
    done = CliRunner().invoke(app, ["quantize", str(folder), "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert f"1 calibration windows left out, where values are not finite: {window}" in done.output


def test_many_windows_that_overflow_end_the_run_with_their_numbers(tmp_path: Path) -> None:
    import tiny_models

    folder = tiny_models.make(tmp_path / "model", "gemma3_text")
    token = rare_token(folder, 2, 10)
    _, bad = windows_with(overflowing(folder, token), token)
    told = f"in {len(bad)} of 16 calibration windows: {', '.join(map(str, bad))}"
    with pytest.raises(CalibrationError, match=told):
        quantize(folder, tmp_path / "out", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj", "layers.0.input_layernorm", "norm", "embed_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_source_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, name: str, value: float, method: str
) -> None:
    import tiny_models

    folder = tiny_models.make(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.{name}.weight"
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds 1 values that are not finite"):
        quantize(folder, tmp_path / "out", method=method, on_block=lambda event: pytest.fail("too late"), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- memory that is said beforehand ---


def test_a_budget_has_fewer_windows_run_at_once_and_changes_no_byte(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    begin = flow.Flow.__init__

    def watched(self: flow.Flow, *arguments: Any) -> None:
        begin(self, *arguments)
        sizes.append(max(self.sizes))

    monkeypatch.setattr(flow.Flow, "__init__", watched)
    model = tiny_model("llama", intermediate_size=1024)
    options = {**OPTIONS, "samples": 32, "seqlen": 128}
    quantize(model, tmp_path / "one", **options)
    whole = plan(model, **options)["peak_rss_bytes"]
    quantize(model, tmp_path / "two", max_memory=whole - (8 << 20), **options)
    assert sizes[0] == 31  # and one, to see how data flows
    assert sizes[1] < 31
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_budget_that_nothing_keeps_is_refused_before_the_first_block(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"--max-memory 50 MB: this run takes .*Python and its libraries"):
        quantize(tiny_model(), tmp_path / "out", max_memory="50MB", **OPTIONS)
    assert list(tmp_path.iterdir()) == []
