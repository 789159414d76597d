"""Perplexity and KL against plain float64 arithmetic, and what an evaluation leaves behind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from wq import hf, report
from wq.errors import CalibrationError, ModelError
from wq.evaluate import _interval, evaluate, read_tokens
from wq.hf import load
from wq.pipeline.quantizer import quantize

TinyModel = Callable[..., Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {i} says something about the number {i * i}." for i in range(60)))
    return file


def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=w[None]).logits[0, :-1].double().log_softmax(-1) for w in tokens])


def test_perplexity_and_kl_are_what_the_definition_says(tmp_path: Path, text: Path) -> None:
    one, two = tiny_models.make(tmp_path / "one", "llama"), tiny_models.make(tmp_path / "two", "llama", seed=1)
    result = evaluate(one, base=two, text=str(text), seqlen=300, dtype="float32")
    tokens = read_tokens(str(text), tiny_models.tokenizer(), 300)
    ours, theirs = log_probabilities(one, tokens), log_probabilities(two, tokens)
    target = tokens[:, 1:].flatten()
    nll = -ours.gather(1, target[:, None]).mean()
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert result["tokens"] == len(target)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    dense_nll = -theirs.gather(1, target[:, None]).mean()
    assert result["base"]["perplexity"] == pytest.approx(math.exp(dense_nll), rel=1e-5)
    assert result["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result["kl"]["median"] == pytest.approx(float(kl.quantile(0.5)), rel=1e-2)
    assert result["kl"]["p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert result["top1_agreement"] == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


def test_the_interval_is_that_of_means_over_blocks() -> None:
    """Of independent blocks it is the textbook's; of tokens that go up and down together, wider than theirs."""
    generator = torch.Generator().manual_seed(1)
    each = torch.rand(400, generator=generator, dtype=torch.float64)
    low, high = _interval(list(each.repeat_interleave(128).split(128)))  # type: ignore[misc]
    expected = 1.96 * float(each.std()) / math.sqrt(400)
    assert low == pytest.approx(float(each.mean()) - expected, abs=0.2 * expected)
    assert high == pytest.approx(float(each.mean()) + expected, abs=0.2 * expected)
    assert _interval(list(each.repeat_interleave(128).split(128))) == [low, high]  # the same draws each time


def test_several_texts_are_read_by_one_loading(
    tiny_model: TinyModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quantize(tiny_model(), out, method="rtn", group_size=32)
    single = [evaluate(out, base=tiny_model(), text=one, seqlen=300, windows=4) for one in (str(text), "code")]
    loaded: list[Any] = []
    monkeypatch.setattr(hf, "load", lambda model, **options: loaded.append(model) or load(model, **options))
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"seqlen": 300, "windows": 4, "on_window": lambda *e: seen.append(e)}
    result = evaluate(out, base=tiny_model(), text=[str(text), "code"], **options)
    assert loaded == [out, tiny_model()]
    assert seen == [(i, 8) for i in range(1, 9)]
    assert [{**one, "seconds": 0} for one in result["texts"]] == [{**one, "seconds": 0} for one in single]
    assert [one["text"] for one in result["texts"]] == ["text.txt", "code"]
    assert all(low < one["kl"]["mean"] < high for one in single for low, high in [one["kl"]["interval"]])
    assert json.loads((out / "wq_report.json").read_text())["evaluation"] == result
    card = (out / "README.md").read_text()
    for one in single:
        assert f"| perplexity, {one['text']} | {one['base']['perplexity']:.3f} | {one['perplexity']:.3f} |" in card
        assert f"| 95 % interval of the mean KL, {one['text']} | | {report.interval(one['kl'])} |" in card


def test_every_window_begins_as_the_tokenizer_begins_a_text(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    tiny_models.opening_tokenizer().save_pretrained(folder)
    tokens = read_tokens(str(text), tiny_models.opening_tokenizer(), 128)
    plain = read_tokens(str(text), tiny_models.tokenizer(), 127)
    assert torch.equal(tokens, torch.nn.functional.pad(plain, (1, 0))[: len(tokens)])  # <s> is 0
    result = evaluate(folder, text=str(text), seqlen=128, windows=2, dtype="float32")
    assert result["bos"] is True
    target = tokens[:2, 1:].flatten()
    nll = -log_probabilities(folder, tokens[:2]).gather(1, target[:, None]).mean()
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert "bos" not in evaluate(tiny_model(), text=str(text), seqlen=128, windows=2, dtype="float32")


def test_code_is_python_of_many_authors() -> None:
    tokenizer = tiny_models.tokenizer()
    source = tokenizer.decode(read_tokens("code", tokenizer, 4096).flatten())
    assert len(source) > 200_000
    assert source.count("\ndef ") + source.count("\nclass ") > 150
    assert "ArgumentParser" in source[:20_000]


def test_a_model_agrees_with_itself(tiny_model: TinyModel, text: Path) -> None:
    result = evaluate(tiny_model(), base=tiny_model(), text=str(text), seqlen=128, windows=2, dtype="float32")
    assert result["windows"] == 2
    assert result["kl"] == {"mean": 0.0, "median": 0.0, "p99": 0.0, "interval": None}  # two blocks tell nothing
    assert result["top1_agreement"] == 1.0
    assert result["perplexity"] == result["base"]["perplexity"]


def test_windows_do_not_overlap_and_the_tail_is_dropped(text: Path) -> None:
    tokens = read_tokens(str(text), tiny_models.tokenizer(), 100)
    assert tiny_models.tokenizer().decode(tokens.flatten()) == text.read_text()[: tokens.numel()]
    assert tokens.shape == (len(text.read_text()) // 100, 100)


def test_builtin_text_is_english_and_none_of_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    tokenizer = tiny_models.tokenizer()
    words = tokenizer.decode(read_tokens("builtin", tokenizer, 4096).flatten())
    assert len(words) > 100_000
    assert words.count(" the ") > 500
    calibration = "\n".join(topics.values())
    windows = [words[i : i + 200] for i in range(0, len(words), 2000)]
    assert sum(window in calibration for window in windows) == 0


def test_figures_go_into_the_report_and_the_card(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model(), out, method="rtn", group_size=32)
    assert "Not evaluated yet" in (out / "README.md").read_text()
    seen: list[tuple[int, int]] = []
    result = evaluate(
        out, base=tiny_model(), text=str(text), seqlen=128, windows=3, on_window=lambda *e: seen.append(e)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert json.loads((out / "wq_report.json").read_text())["evaluation"] == result
    card = (out / "README.md").read_text()
    assert f"{result['perplexity']:.3f}" in card
    assert f"{result['kl']['mean']:.4f}" in card
    assert "Not evaluated yet" not in card


def test_models_of_two_vocabularies_are_not_compared(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    other = tiny_models.make(tmp_path / "other", "llama", vocab_size=400)
    with pytest.raises(ModelError, match="320 and 400 tokens"):
        evaluate(tiny_model(), base=other, text=str(text), seqlen=128)


def test_an_encoder_decoder_model_has_no_perplexity(tiny_model: TinyModel, text: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder-decoder model \(T5ForConditionalGeneration\)"):
        evaluate(tiny_model("t5"), text=str(text), seqlen=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "no-such.txt"}, "no-such.txt does not exist"),
        ({"text": []}, "no evaluation text was named"),
        ({"seqlen": 10**6}, r"fewer than one window of 1000000"),
        ({"seqlen": 1}, "at least 2 tokens"),
        ({"text": "wikitext"}, "--text builtin"),  # the suite runs offline
    ],
)
def test_text_that_cannot_be_used_is_refused(
    options: dict[str, object], message: str, tiny_model: TinyModel, text: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        evaluate(tiny_model(), **{"text": str(text), **options})  # type: ignore[arg-type]
