"""Text to learn activations from: where it comes from, and how it becomes windows of tokens.

Documents are shuffled by the seed, tokenized, joined by the end-of-text token and cut into windows of equal length:
no padding, which would teach the statistics about padding. A window begins as every prompt does: with the token that
the tokenizer puts before a text, if it puts one. Without it some models are not themselves: Gemma 3 270M has a
perplexity of 23 with it and of 64 without.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wq.errors import CalibrationError, first_line

BUILTIN = "builtin"
_FILES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_COLUMNS = ("text", "content", "document", "prompt")
_CHAT_COLUMNS = ("messages", "conversations")
_NAMED: dict[str, dict[str, Any]] = {
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    "wikitext": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
}
_ALTERNATIVES = "Use --calibration builtin, which needs no network, or a local .txt, .jsonl or .parquet file."
_MAX_DOCUMENTS = 20_000  # enough to shuffle; a web-scale set is streamed, not fetched


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens, int64 `[samples, seqlen]`, with what is needed to name them again.

    wanted: how many were asked for; the text may have held fewer.
    """

    tokens: Tensor
    source: str
    seed: int
    fingerprint: str
    wanted: int

    def describe(self) -> dict[str, Any]:
        """A JSON-ready record for the report."""
        samples, seqlen = self.tokens.shape
        return {
            "source": self.source,
            "samples": samples,
            "wanted": self.wanted,
            "seqlen": seqlen,
            "seed": self.seed,
            "sha256": self.fingerprint,
        }


def load(
    source: str | Iterable[str], tokenizer: Any, samples: int = 128, seqlen: int = 512, seed: int = 0
) -> Calibration:
    """Tokens from `builtin`, `c4`, `wikitext`, a dataset id, a local .txt/.jsonl/.parquet, or an iterable of texts.

    Fewer samples than asked for are returned when the text ends before. Raises CalibrationError when it cannot be
    reached, holds no text, or is shorter than one window.
    """
    if samples < 1 or seqlen < 1:
        raise CalibrationError(f"{samples} samples of {seqlen} tokens: both must be at least 1.")
    label, documents = _documents(source, tokenizer)
    texts = list(islice(documents, _MAX_DOCUMENTS))
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"calibration text {label} is empty. {_ALTERNATIVES}")
    random.Random(seed).shuffle(texts)
    tokens = _windows(texts, tokenizer, samples, seqlen)
    if not len(tokens):
        raise CalibrationError(
            f"calibration text {label} gives {tokens.shape[1]} tokens, fewer than one window of {seqlen}. "
            "Use a smaller --seqlen or more text."
        )
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Calibration(tokens, label, seed, digest, samples)


def get_ready(source: str | None) -> None:
    """Import what reading calibration text takes, so that the size of this process tells of it."""
    if source is not None and source not in (BUILTIN, "self"):
        import datasets  # noqa: F401


def _windows(texts: list[str], tokenizer: Any, samples: int, seqlen: int) -> Tensor:
    """Pack `texts` into at most `samples` windows; an empty `[0, tokens found]` if they do not fill one."""
    separator = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
        if separator is not None:
            stream.append(separator)
        if len(stream) >= samples * seqlen:
            break
    found = cut(stream, tokenizer, seqlen)[:samples]
    return found if len(found) else torch.empty(0, len(stream), dtype=torch.int64)


def opening(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text; nothing if it puts none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def cut(stream: Sequence[int], tokenizer: Any, seqlen: int) -> Tensor:
    """A text's tokens as windows, int64 `[windows, seqlen]`, each behind the tokenizer's `opening`.

    The tail that fills no window is dropped.
    """
    first = opening(tokenizer) if seqlen > 1 else []
    if first and list(stream[:1]) == first:
        stream = stream[1:]
    body = seqlen - len(first)
    count = len(stream) // body
    rows = torch.tensor(stream[: count * body], dtype=torch.int64).reshape(count, body)
    return torch.cat([torch.tensor(first, dtype=torch.int64).expand(count, -1), rows], dim=1)


def _documents(source: str | Iterable[str], tokenizer: Any) -> tuple[str, Iterator[str]]:
    if not isinstance(source, str):
        return "texts", iter([str(text) for text in source])
    if source == BUILTIN:
        return source, _builtin()
    path = Path(source).expanduser()
    if path.suffix in _FILES:
        if not path.is_file():
            raise CalibrationError(f"calibration file {source} does not exist. {_ALTERNATIVES}")
        if not path.stat().st_size:
            raise CalibrationError(f"calibration file {source} is empty (0 bytes). {_ALTERNATIVES}")
        request = {"path": _FILES[path.suffix], "data_files": str(path), "split": "train"}
        return path.name, _rows(source, request, tokenizer)
    return source, _rows(source, _NAMED.get(source, {"path": source, "split": "train"}), tokenizer)


def _builtin() -> Iterator[str]:
    """Python's own language reference: half a million characters of English that every Python carries."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _rows(source: str, request: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """Texts of a dataset, streamed; whatever goes wrong on the way to it becomes one CalibrationError."""
    import datasets

    try:
        for row in datasets.load_dataset(**request, streaming=True):
            yield _text(row, source, tokenizer)
    except CalibrationError:
        raise
    except Exception as error:  # datasets, fsspec, httpx and pyarrow each raise their own
        reason = first_line(error)
        raise CalibrationError(f"calibration set {source} could not be read ({reason}). {_ALTERNATIVES}") from error


def _text(row: dict[str, Any], source: str, tokenizer: Any) -> str:
    for column in _TEXT_COLUMNS:
        if isinstance(row.get(column), str):
            return row[column]
    for column in _CHAT_COLUMNS:
        if isinstance(row.get(column), list) and tokenizer.chat_template:
            return tokenizer.apply_chat_template(row[column], tokenize=False)
    raise CalibrationError(
        f"calibration set {source} has columns {', '.join(row)}, none of them text. "
        f"Name one {' or '.join(map(repr, _TEXT_COLUMNS[:2]))}, or use {' or '.join(map(repr, _CHAT_COLUMNS))}."
    )
