"""Calibration windows that the model writes itself."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from wq.errors import CalibrationError, ModelError
from wq.pipeline import sampling
from wq.pipeline.quantizer import quantize
from wq.pipeline.source import Source, open_source

TinyModel = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture
def source(tiny_model: TinyModel) -> Iterator[Source]:
    with open_source(tiny_model()) as opened:
        yield opened


def sample(source: Source, samples: int = 6, seqlen: int = 40, seed: int = 0, **options: Any) -> Tensor:
    return sampling.sample(source, samples, seqlen, seed, CPU, torch.float32, **options).tokens


def without_bos(folder: Path) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_models.tokenizer()._tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba", "mixtral", "gemma2", "llava"])
def test_windows_are_whole_and_of_known_tokens(architecture: str, tiny_model: TinyModel) -> None:
    with open_source(tiny_model(architecture)) as source:
        tokens = sample(source)
        assert all(parameter.is_meta for parameter in source.model.parameters())  # freed again
    assert tokens.shape == (6, 40)
    assert tokens.dtype == torch.int64
    assert int(tokens[0, 0]) == 0  # <s>
    assert int(tokens.max()) < len(tiny_models.tokenizer())  # the model's vocabulary is larger
    assert len(tokens.unique()) > 60


def test_every_window_begins_as_the_tokenizer_begins_a_text(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    tiny_models.opening_tokenizer().save_pretrained(folder)
    with open_source(folder) as source:
        tokens = sample(source)
    assert tokens.shape == (6, 40)
    assert (tokens[:, 0] == 0).all()
    assert int(tokens[0, 1]) != 0


def test_the_seed_decides(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample(source)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers change
    torch.manual_seed(8)
    assert torch.equal(sample(source), first)
    assert not torch.equal(sample(source, seed=1), first)
    monkeypatch.setattr(sampling, "CACHED_TOKENS", 80)  # two rows at a time
    batched = sample(source)
    assert batched.shape == first.shape
    assert len({tuple(row) for row in batched.tolist()}) == 6  # no batch repeats another


def test_tokens_are_drawn_from_the_models_own_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 1 and of all tokens, with the cache: what is likely comes as often as the model says."""
    monkeypatch.setattr(sampling, "_SHORTEST", 100)  # no text ends: a window is one
    folder = tiny_models.make(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight.data *= 8  # as it is, every token is about as likely as another, at any temperature
    model.save_pretrained(folder)
    known = len(tiny_models.tokenizer())
    with open_source(folder) as source:
        pairs, windows = sample(source, samples=3000, seqlen=2), sample(source, samples=64, seqlen=64)

    def logs(ids: Tensor) -> Tensor:
        with torch.no_grad():
            found = model(input_ids=ids).logits[:, :-1, :known]
        found[..., 1] = -1e9  # </s>
        return found.log_softmax(-1)

    probability = logs(pairs[:1])[0, 0].exp()
    assert probability.max() > 10 / known
    share = torch.bincount(pairs[:, 1], minlength=known) / len(pairs)
    noise = (probability * (1 - probability) / len(pairs)).sqrt() + 1 / len(pairs)
    assert ((share - probability).abs() < 5 * noise).all()
    # The mean surprise of a sample is the entropy of what it was drawn from.
    predicted = logs(windows)
    surprise = -predicted.gather(2, windows[:, 1:, None]).squeeze(-1)
    excess = surprise + (predicted.exp() * predicted).sum(-1)
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / excess.numel() ** 0.5


def test_texts_are_written_apart_and_joined(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text begins anew and sees no other; none is so short that a window would be all beginnings."""
    monkeypatch.setattr(sampling, "_SHORTEST", 8)
    rounds: list[Tensor] = []
    with open_source(tiny_model()) as source:
        ends = [1, *range(100, 110)]  # the tokenizer's, and what else the config names
        source.config.eos_token_id = ends[1:]
        generate = source.model.generate

        def spy(start: Tensor, **options: Any) -> Tensor:
            rounds.append(generate(start, **options))
            return rounds[-1]

        source.model.generate = spy
        windows = sample(source, samples=10, seqlen=64)
    texts = []
    for row in [row for written in rounds for row in written.tolist()]:
        place = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        texts.append(row[: place + 1])
    assert len(rounds) > 1  # the first wrote as many texts as there are windows, most of which ended early
    assert 8 < min(map(len, texts)) < 32
    assert all(text[0] == 0 for text in texts)
    assert windows.flatten().tolist() == [token for text in texts for token in text][: 10 * 64]


def test_without_a_beginning_a_random_token_begins_and_likely_ones_follow(tmp_path: Path) -> None:
    folder = without_bos(tiny_models.make(tmp_path / "model", "llama"))
    with open_source(folder) as source:
        assert source.tokenizer.bos_token_id is None
        tokens = sample(source, samples=40, seqlen=30)
    assert len(tokens[:, 0].unique()) > 25
    assert not (tokens == 1).any()  # 30 tokens are too few for a text to end
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[..., : len(tiny_models.tokenizer())]
    logits[..., 1] = -torch.inf  # which would end the text
    likeliest = logits.argmax(-1)
    assert torch.equal(tokens[:, 1:4], likeliest[:, :3])
    assert (tokens[:, 4:] != likeliest[:, 3:-1]).float().mean() > 0.5


def test_places_of_images_are_never_written(tiny_model: TinyModel) -> None:
    with open_source(tiny_model("llava")) as source:
        source.config.image_token_index = 100
        assert 100 not in sample(source, samples=100, seqlen=40)
        counts = Counter(sample(source, samples=100, seqlen=40).flatten().tolist())
    assert counts[99] > 0


def test_progress_counts_tokens(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CACHED_TOKENS", 4 * 70)
    seen: list[tuple[int, int]] = []
    sample(source, samples=6, seqlen=70, on_sample=lambda *e: seen.append(e))
    assert seen[0] == (4 * 32, 420)
    assert len(seen) > 3
    assert all(one <= other <= 420 for (one, _), (other, _) in pairwise(seen))


def test_a_model_calibrates_itself(tiny_model: TinyModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "calibration": "self",
        "samples": 12,
        "seqlen": 24,
        "group_size": 32,
        "method": "awq",
    }
    made = [
        quantize(tiny_model(), tmp_path / name, seed=seed, **options) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    record = made[0]["calibration"]
    described = {"source": "self", "samples": 12, "wanted": 12, "seqlen": 24, "seed": 3, "sha256": "", "left_out": []}
    assert {**record, "sha256": ""} == described
    assert made[1]["calibration"] == record
    assert made[2]["calibration"]["sha256"] != record["sha256"]
    one, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == again
    assert "self, 12 × 24 tokens, seed 3" in (tmp_path / "a" / "README.md").read_text()


def test_a_method_without_data_writes_none(tiny_model: TinyModel, tmp_path: Path) -> None:
    assert quantize(tiny_model(), tmp_path / "out", calibration="self", method="rtn")["calibration"] is None


def test_an_encoder_decoder_model_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder-decoder model.*Use c4, builtin or a file"):
        quantize(tiny_model("t5"), tmp_path / "out", calibration="self", seqlen=16)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_generate_is_refused(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(source.model), "can_generate", classmethod(lambda kind: False))
    with pytest.raises(ModelError, match=r"\(LlamaForCausalLM\) cannot generate"):
        sample(source)


@pytest.mark.parametrize(("samples", "seqlen"), [(0, 8), (1, 0)])
def test_counts_must_be_positive(samples: int, seqlen: int, source: Source) -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        sample(source, samples, seqlen)


def test_a_window_of_one_token_is_its_beginning(source: Source) -> None:
    assert sample(source, samples=3, seqlen=1).tolist() == [[0], [0], [0]]
