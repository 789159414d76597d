"""Where calibration text comes from and how it becomes windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch

from wq.errors import CalibrationError
from wq.pipeline import calibration

LINES = [f"line {i} of a text that is long enough to fill a window or two" for i in range(50)]


def test_builtin_text_needs_nothing_and_is_real_english() -> None:
    tokenizer = tiny_models.tokenizer()
    loaded = calibration.load("builtin", tokenizer, samples=16, seqlen=128)
    assert loaded.tokens.shape == (16, 128)
    assert " the " in tokenizer.decode(loaded.tokens.flatten())


def test_windows_are_packed_without_padding_and_separated_by_the_end_token() -> None:
    tokenizer = tiny_models.tokenizer()
    loaded = calibration.load(LINES, tokenizer, samples=1000, seqlen=64)
    text = tokenizer.decode(loaded.tokens.flatten())
    assert "</s>" in text
    parts = text.split("</s>")
    assert set(parts[1:-1]) <= set(LINES)
    total = sum(len(line) + 1 for line in LINES)
    assert len(loaded.tokens) == total // 64  # fewer than asked for, and no more than there are


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer, plain = tiny_models.opening_tokenizer(), tiny_models.tokenizer()
    assert calibration.opening(plain) == []
    assert calibration.opening(tokenizer) == [0] == tokenizer("")["input_ids"]
    tokens = calibration.load(LINES, tokenizer, samples=1000, seqlen=64).tokens
    assert (tokens[:, 0] == 0).all()
    rest = tokens[:, 1:].flatten()  # and nothing is lost between two windows
    assert not (rest == 0).any()
    stream = calibration.load(LINES, plain, samples=1000, seqlen=63).tokens.flatten()
    assert torch.equal(rest, stream[: len(rest)])
    assert len(stream) - len(rest) < 63


def test_a_stream_that_begins_with_the_opening_has_it_once() -> None:
    tokenizer = tiny_models.opening_tokenizer()
    wanted = [[0, 5, 6], [0, 7, 8]]
    assert calibration.cut([5, 6, 7, 8, 9], tokenizer, 3).tolist() == wanted
    assert calibration.cut([0, 5, 6, 7, 8, 9], tokenizer, 3).tolist() == wanted
    assert calibration.cut([5, 6], tokenizer, 1).tolist() == [[5], [6]]
    assert calibration.cut([5], tokenizer, 3).shape == (0, 3)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_files_of_every_kind_hold_the_same_text(suffix: str, tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    file = tmp_path / f"text.{suffix}"
    if suffix == "txt":
        file.write_text("\n".join(LINES))
    elif suffix == "jsonl":
        file.write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    else:
        import pandas

        pandas.DataFrame({"text": LINES}).to_parquet(file)
    from_file = calibration.load(str(file), tokenizer, samples=8, seqlen=64)
    assert torch.equal(from_file.tokens, calibration.load(LINES, tokenizer, samples=8, seqlen=64).tokens)


def test_chats_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    file = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"question {i}, please"}]} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    loaded = calibration.load(str(file), tokenizer, samples=4, seqlen=32)
    assert "[user] question" in tokenizer.decode(loaded.tokens.flatten())


def test_the_seed_orders_the_text_and_the_fingerprint_tells() -> None:
    tokenizer = tiny_models.tokenizer()
    one, again, other = (calibration.load(LINES, tokenizer, 4, 64, seed) for seed in (0, 0, 1))
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
    assert one.describe() == {
        "source": "texts",
        "samples": 4,
        "wanted": 4,
        "seqlen": 64,
        "seed": 0,
        "sha256": one.fingerprint,
    }


def test_a_file_without_text_says_which_columns_it_has(tmp_path: Path) -> None:
    file = tmp_path / "numbers.jsonl"
    file.write_text('{"a": 1, "b": 2}\n')
    with pytest.raises(CalibrationError, match="columns a, b, none of them text"):
        calibration.load(str(file), tiny_models.tokenizer(), 1, 8)


def test_a_broken_file_is_an_error_with_alternatives(tmp_path: Path) -> None:
    file = tmp_path / "broken.parquet"
    file.write_bytes(b"this is no parquet")
    with pytest.raises(CalibrationError, match=r"broken\.parquet could not be read.*builtin"):
        calibration.load(str(file), tiny_models.tokenizer(), 1, 8)


@pytest.mark.parametrize(("samples", "seqlen"), [(0, 8), (1, 0)])
def test_counts_must_be_positive(samples: int, seqlen: int) -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        calibration.load(LINES, tiny_models.tokenizer(), samples, seqlen)
