"""How much a quantized model forgets: perplexity, and the distance from the dense model's own predictions.

WikiText-2 by the protocol of the GPTQ paper: the test split joined by blank lines, one tokenizer call, windows that do
not overlap, cross-entropy of every next token in float32. Perplexity can be gamed by a model that drifts towards the
test text, so with a dense base the same windows also give KL(dense ‖ quantized) over the whole vocabulary, and how
often both rank the same token first. Logits are compared a slice of a window at a time and never kept.

Tokens near each other are hard or easy together, so the interval of the mean KL is a bootstrap over blocks of them: it
says how far the mean would move with other text of this kind, not with text of another.
"""

from __future__ import annotations

import ast
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wq import report
from wq.errors import CalibrationError, ModelError, first_line
from wq.machine import default_device
from wq.pipeline import calibration

WIKITEXT = "wikitext"
BUILTIN = "builtin"
CODE = "code"
_SLICE = 256  # tokens whose float32 distributions over the vocabulary are held at once
_BLOCK = 128  # tokens that are drawn together when the interval is estimated; a slice holds whole blocks
_RESAMPLES = 1000
_FEW_BLOCKS = 8  # with fewer, what is drawn varies too little to say anything
# Modules that are one file in every supported Python, by different authors and of different kinds.
_MODULES = (
    *("argparse", "ast", "calendar", "cmd", "configparser", "csv", "dataclasses", "difflib", "doctest", "fractions"),
    *("heapq", "inspect", "ipaddress", "mailbox", "optparse", "pdb", "random", "shutil", "socket", "statistics"),
    *("subprocess", "tarfile", "textwrap", "threading", "typing", "uuid"),
)
_LINES = 400  # of each of them: a few windows are then of several authors

WindowCallback = Callable[[int, int], None]


@torch.inference_mode()
def evaluate(
    model: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    text: str | Iterable[str] = WIKITEXT,
    seqlen: int = 2048,
    windows: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    head_bits: int | None = None,
    on_window: WindowCallback | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` on `text`; with `base`, also KL and top-1 agreement with it on the same windows.

    text: `wikitext` (WikiText-2 test, from the Hub), a local text file, taken as it is, or, which need no network,
    `builtin` (English) and `code` (Python); or several of these: the result is then `{"texts": [...]}`, one for each.
    windows: only the first so many of each. dtype: what both models run in. head_bits: as in `WqConfig`, of `model`.
    If that is a folder that wq made, and its head is as stored, its report and card are updated. Raises ModelError,
    CalibrationError.
    """
    from wq.hf import load

    place = device or default_device()
    subject, tokenizer = load(model, dtype=dtype, device=place, head_bits=head_bits)
    _check_decoder(model, subject)
    names = [text] if isinstance(text, str) else list(text)
    if not names:
        raise CalibrationError("no evaluation text was named.")
    tokens = {name: read_tokens(name, tokenizer, seqlen, windows) for name in names}
    reference = None
    if base is not None:
        reference, other = load(base, dtype=str(subject.dtype).removeprefix("torch."), device=place)
        _check_vocabularies(model, base, tokenizer, other, subject, reference)
    results: list[dict[str, Any]] = []
    for name, rows in tokens.items():
        started, before = time.perf_counter(), sum(one["windows"] for one in results)
        scores = _Scores()
        for index, window in enumerate(rows):
            scores.window(window.to(place), subject, reference)
            if on_window is not None:
                on_window(before + index + 1, sum(map(len, tokens.values())))
        results.append(
            {
                "model": os.fspath(model),
                "text": Path(name).name,
                "windows": len(rows),
                "seqlen": seqlen,
                **({"bos": True} if calibration.opening(tokenizer) else {}),
                "dtype": str(subject.dtype).removeprefix("torch."),
                "device": place,
                "seconds": round(time.perf_counter() - started, 1),
                **({} if head_bits is None else {"head_bits": head_bits}),
                **scores.result(os.fspath(base) if base is not None else None),
            }
        )
    result = results[0] if len(results) == 1 else {"texts": results}
    if head_bits is None:  # figures of what the folder holds
        report.record(Path(model), "evaluation", result)
    return result


def _check_decoder(name: str | os.PathLike[str], model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder model ({type(model).__name__}); perplexity on running text is defined "
            "for decoders. Measure it on its own task."
        )


def read_tokens(text: str, tokenizer: Any, seqlen: int, windows: int | None = None) -> Tensor:
    """The evaluation text as windows of tokens, int64 `[windows, seqlen]`; the tail that fills none is dropped.

    Each begins as the tokenizer begins a text (`wq.pipeline.calibration.cut`).
    """
    if seqlen < 2:
        raise CalibrationError(f"--seqlen {seqlen}: a window needs at least 2 tokens.")
    ids = tokenizer(_read_text(text), verbose=False)["input_ids"]
    found = calibration.cut(ids, tokenizer, seqlen)[:windows]
    if not len(found):
        raise CalibrationError(f"evaluation text {text} has {len(ids)} tokens, fewer than one window of {seqlen}.")
    return found


def _read_text(text: str) -> str:
    path = Path(text).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if text == BUILTIN:
        return _standard_library_prose()
    if text == CODE:
        return _standard_library_code()
    if text != WIKITEXT:
        raise CalibrationError(
            f"evaluation text {text} does not exist. Give {WIKITEXT!r}, {BUILTIN!r}, {CODE!r} or a local text file."
        )
    import datasets

    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except Exception as error:  # datasets, fsspec and httpx each raise their own
        raise CalibrationError(
            f"WikiText-2 could not be fetched ({first_line(error)}). Give a local copy with --text FILE, "
            f"or use --text {BUILTIN}, which needs no network."
        ) from error
    return "\n\n".join(rows["text"])


def _standard_library_prose() -> str:
    """Module and class docstrings of Python's standard library: English on every machine, none of it in the language
    reference that `--calibration builtin` learns from. Good for a first look; publish figures on WikiText-2."""
    documents = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a file that is not meant for this Python
            continue
        nodes: list[ast.Module | ast.ClassDef] = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        documents += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) > 200]
    return "\n\n".join(documents)


def _standard_library_code() -> str:
    """The beginnings of modules of the standard library, comments and docstrings included; as old as this Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for name in _MODULES if (file := folder / f"{name}.py").is_file()]
    return "\n\n".join("\n".join(file.read_text(encoding="utf-8").splitlines()[:_LINES]) for file in files)


def _check_vocabularies(model: Any, base: Any, one: Any, other: Any, subject: Any, reference: Any) -> None:
    sizes = subject.config.get_text_config().vocab_size, reference.config.get_text_config().vocab_size
    if sizes[0] != sizes[1] or one.get_vocab() != other.get_vocab():
        raise ModelError(
            f"{model} and {base} do not share a vocabulary ({sizes[0]} and {sizes[1]} tokens): their predictions "
            "cannot be compared. Give the dense model it was made from."
        )


@dataclass
class _Scores:
    """Running sums over windows."""

    nll: float = 0.0
    dense_nll: float = 0.0
    tokens: int = 0
    kl: list[Tensor] = field(default_factory=list)
    agree: int = 0

    def window(self, tokens: Tensor, model: Any, base: Any) -> None:
        """Run both models, if there are two, on token ids `[n]` of one window."""
        batch = tokens.unsqueeze(0)
        logits = model(input_ids=batch, use_cache=False).logits[0]
        dense = None if base is None else base(input_ids=batch, use_cache=False).logits[0]
        self.add(tokens, logits, dense)

    def add(self, tokens: Tensor, logits: Tensor, dense: Tensor | None) -> None:
        """One window: token ids `[n]`, logits `[n, vocabulary]` of the model and perhaps of its base."""
        for start in range(0, len(tokens) - 1, _SLICE):
            rows = slice(start, min(start + _SLICE, len(tokens) - 1))
            target = tokens[rows.start + 1 : rows.stop + 1]
            ours = functional.log_softmax(logits[rows].float(), dim=-1)
            self.nll += float(functional.nll_loss(ours, target, reduction="sum").double())
            self.tokens += len(target)
            if dense is not None:
                theirs = functional.log_softmax(dense[rows].float(), dim=-1)
                self.dense_nll += float(functional.nll_loss(theirs, target, reduction="sum").double())
                self.agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                self.kl.append((theirs.exp() * (theirs - ours)).sum(-1).cpu())

    def result(self, base: str | None) -> dict[str, Any]:
        values: dict[str, Any] = {"tokens": self.tokens, "perplexity": _exp(self.nll / self.tokens)}
        if base is not None:
            kl = torch.cat(self.kl).double()
            values["base"] = {"model": base, "perplexity": _exp(self.dense_nll / self.tokens)}
            values["kl"] = {
                "mean": float(kl.mean()),
                "median": float(kl.median()),
                "p99": float(kl.quantile(0.99)),
                "interval": _interval([block for piece in self.kl for block in piece.double().split(_BLOCK)]),
            }
            values["top1_agreement"] = self.agree / self.tokens
        return values


def _interval(blocks: list[Tensor]) -> list[float] | None:
    """The middle 95 % of means over as many blocks drawn with replacement; None for too few of them."""
    if len(blocks) < _FEW_BLOCKS:
        return None
    sums, counts = (torch.tensor([f(block) for block in blocks], dtype=torch.float64) for f in (torch.sum, len))
    drawn = torch.randint(len(blocks), (_RESAMPLES, len(blocks)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return [float(means.quantile(q)) for q in (0.025, 0.975)]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
