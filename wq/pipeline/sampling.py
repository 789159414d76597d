"""Calibration text that the model writes itself: no data needed, and none but what the model believes in.

Each window begins with the token that begins a text, and goes on by sampling at temperature 1 from the whole
vocabulary, so that windows are drawn from the model's own distribution and no other (LLM-QAT, arXiv 2305.17888). Where
the tokenizer has no such token, a window begins with a random one, and the few after it are the likeliest, as there. A
text that ends inside a window is followed by another, as in windows cut from a corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wq.errors import CalibrationError, ModelError
from wq.machine import release_memory
from wq.pipeline.calibration import Calibration
from wq.pipeline.source import Source

SELF = "self"
_CACHED_TOKENS = 16_384  # in the cache at once: enough rows for full-speed products, few enough for its memory
_LIKELIEST = 3  # tokens after a random one
_REPORT_EVERY = 32  # tokens of each row

SampleCallback = Callable[[int, int], None]


def sample(
    source: Source,
    samples: int,
    seqlen: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    on_sample: SampleCallback | None = None,
) -> Calibration:
    """`samples` windows of `seqlen` tokens that the model in `source` writes on `device`, computing in `dtype`.

    The whole model is loaded for this, and freed again. The same seed gives the same tokens on the same machine.
    on_sample: called with the tokens written so far, and all. Raises CalibrationError, ModelError, before it is loaded.
    """
    if samples < 1 or seqlen < 1:
        raise CalibrationError(f"{samples} samples of {seqlen} tokens: both must be at least 1.")
    check(source)
    source.load(("",), device, dtype)
    try:
        for module in source.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        rows = max(1, _CACHED_TOKENS // seqlen)
        counts = [min(rows, samples - start) for start in range(0, samples, rows)]
        pieces: list[Tensor] = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            for count in counts:
                done = sum(map(len, pieces)) * seqlen
                rule = _Rule(source, count, done, samples * seqlen, on_sample)
                pieces.append(_write(source.model, rule, seqlen, device))
    finally:
        source.unload(source.model)
        release_memory()
    tokens = torch.cat(pieces)
    return Calibration(tokens, SELF, seed, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), samples)


def check(source: Source) -> None:
    """Raise ModelError for a model that cannot continue a text."""
    reason = ""
    if source.config.is_encoder_decoder:
        reason = "is an encoder-decoder model, which answers a text but does not continue one"
    elif not source.model.can_generate():
        reason = f"({type(source.model).__name__}) cannot generate"
    if reason:
        raise ModelError(f"{source.name} {reason}: --calibration {SELF} is not for it. Use c4, builtin or a file.")


def _write(model: Any, rule: _Rule, seqlen: int, device: torch.device) -> Tensor:
    """Windows `[rows, seqlen]`, int64, on the CPU."""
    start = rule.start().to(device)
    if seqlen == 1:
        return start.cpu()
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        logits_processor=[rule],
        max_new_tokens=seqlen - 1,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        eos_token_id=None,  # a row goes on after the end of a text
        use_cache=True,
    )
    return written.cpu()


class _Rule:
    """What may come next in a window; a logits processor of transformers."""

    def __init__(self, source: Source, rows: int, done: int, total: int, on_sample: SampleCallback | None):
        tokenizer = source.tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.known = min(len(tokenizer), source.config.get_text_config().vocab_size)
        self.never = _markers(source.config) - {self.bos, self.eos}
        self.rows, self.done, self.total, self.on_sample = rows, done, total, on_sample

    def start(self) -> Tensor:
        """The first token of each row, `[rows, 1]`."""
        if self.bos is not None:
            return torch.full((self.rows, 1), self.bos)
        allowed = torch.tensor([token for token in range(self.known) if token not in self.never])
        return allowed[torch.randint(len(allowed), (self.rows, 1))]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens so far `[rows, length]` and logits `[rows, vocabulary]`; logits with what is excluded at -inf."""
        length = ids.shape[1]
        if self.on_sample is not None and length % _REPORT_EVERY == 0:
            self.on_sample(self.done + self.rows * length, self.total)
        scores = scores.float()
        scores[:, self.known :] = -torch.inf  # rows of an embedding that was padded belong to no token
        scores[:, [token for token in self.never if token < self.known]] = -torch.inf
        if self.bos is None and length <= _LIKELIEST:
            return _only(scores, scores.argmax(-1))
        if self.bos is not None and self.eos is not None and self.bos != self.eos:
            ended = ids[:, -1] == self.eos
            again = _only(scores, torch.full_like(ids[:, -1], self.bos))
            scores = torch.where(ended[:, None], again, scores)
        return scores


def _only(scores: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[rows, vocabulary]` with which nothing but `tokens` `[rows]` is drawn."""
    return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _markers(config: Any) -> set[int]:
    """Tokens that the config names for what is no text, such as padding and the places of images."""
    values = {**vars(config), **vars(config.get_text_config())}
    named = {name: value for name, value in values.items() if name.endswith(("_token_id", "_token_index"))}
    text = {value for name, value in named.items() if name.startswith(("bos", "eos")) and isinstance(value, int)}
    return {value for value in named.values() if isinstance(value, int)} - text
