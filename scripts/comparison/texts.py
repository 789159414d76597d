"""What is calibrated on, and what is evaluated on, so that no document is both.

The documents of a web text are divided by the digest of what they say: a document that occurs twice falls on one side
both times, and neither the order of the file nor the seed of the calibration can move it across.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wq.errors import CalibrationError
from wq.evaluate import read_tokens
from wq.pipeline import calibration

HELD_OUT = 64  # of 256 values of a digest's first byte: a quarter of the documents
PIECE = 6000  # characters of each source file: many files, not a long one


def held_out(document: str) -> bool:
    """Whether a document is for evaluation; its spaces and capitals do not matter."""
    return hashlib.sha256(" ".join(document.lower().split()).encode()).digest()[0] < HELD_OUT


def split(text: str) -> tuple[list[str], list[str]]:
    """Documents, one a line, for calibration and for evaluation."""
    documents = [line for line in text.split("\n") if line.strip()]
    return [d for d in documents if not held_out(d)], [d for d in documents if held_out(d)]


def code() -> str:
    """The beginnings of the standard library's own files, in the order of their names' digests: many subjects at once.

    It depends on the version of Python, which a report has to say.
    """
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    ordered = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace")[:PIECE] for file in ordered)


def prepare(folder: Path, source: Path, wikitext: Path) -> dict[str, Path]:
    """Write `calibration.txt` and the evaluation texts `code` and `web` to `folder`; paths by name."""
    learn, test = split(source.read_text(encoding="utf-8"))
    assert not {" ".join(d.lower().split()) for d in learn} & {" ".join(d.lower().split()) for d in test}
    found = {"calibration": folder / "calibration.txt", "wikitext2": wikitext}
    found["calibration"].write_text("\n".join(learn) + "\n", encoding="utf-8")
    for name, text in (("code", code()), ("web", "\n\n".join(test))):
        found[name] = folder / f"{name}.txt"
        found[name].write_text(text, encoding="utf-8")
    return found


def windows(paths: dict[str, Path], tokenizer: Any, seqlen: int, first: int, others: int) -> dict[str, Tensor]:
    """The `first` windows of WikiText-2, and so many of the other evaluation texts, int64 `[windows, seqlen]`."""
    found = {}
    for name, path in paths.items():
        if name == "calibration":
            continue
        count = first if name == "wikitext2" else others
        found[name] = read_tokens(str(path), tokenizer, seqlen, count)
        if len(found[name]) < count:
            raise CalibrationError(f"{name} has {len(found[name])} windows of {seqlen} tokens, fewer than {count}.")
    return found


def calibration_ids(path: Path, tokenizer: Any, samples: int, seqlen: int, seed: int, out: Path) -> str:
    """Write the windows that wq would calibrate on, int64 `[samples, seqlen]`; their fingerprint."""
    drawn = calibration.load(str(path), tokenizer, samples, seqlen, seed)
    if len(drawn.tokens) < samples:
        raise CalibrationError(f"{path.name} has {len(drawn.tokens)} windows of {seqlen} tokens, fewer than {samples}.")
    torch.save(drawn.tokens, out)
    return drawn.fingerprint


def digest(tokens: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
