"""Calibration text that the model writes itself: no data needed, and none but what the model believes in.

Each text begins with the token that begins a text, and goes on by sampling at temperature 1 from the whole vocabulary,
so that texts are drawn from the model's own distribution and no other (LLM-QAT, arXiv 2305.17888). Where the tokenizer
has no such token, a text begins with a random one, and the few after it are the likeliest, as there. Texts are written
apart, and then joined and cut into windows as those of a corpus are: one that is written behind another, in the same
window, repeats it. SmolLM2-135M-Instruct, told to begin anew behind an answer, mostly ended at once, over and over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wq.errors import CalibrationError, ModelError
from wq.machine import release_memory
from wq.pipeline.calibration import Calibration, cut
from wq.pipeline.source import Source

SELF = "self"
CACHED_TOKENS = 16_384  # in the cache at once: enough rows for full-speed products, few enough for its memory
_LIKELIEST = 3  # tokens after a random one
_SHORTEST = 32  # tokens of a text, so that a model that likes to say nothing comes to an end with this
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
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            stream = _stream(source, samples * seqlen, seqlen, device, on_sample)
    finally:
        source.unload(source.model)
        release_memory()
    tokens = cut(stream, source.tokenizer, seqlen)[:samples]
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


def _stream(
    source: Source, total: int, longest: int, device: torch.device, on_sample: SampleCallback | None
) -> list[int]:
    """`total` tokens of texts that are no longer than `longest`, one behind the other; the last may be cut."""
    stream: list[int] = []
    texts = 0
    while len(stream) < total:
        usual = len(stream) / texts if texts else longest
        rows = min(max(1, CACHED_TOKENS // longest), math.ceil((total - len(stream)) / usual))
        rule = _Rule(source, len(stream), total, on_sample)
        for text in _write(source.model, rule, rows, longest, device):
            stream += text
            texts += 1
    return stream[:total]


def _write(model: Any, rule: _Rule, rows: int, longest: int, device: torch.device) -> Iterator[list[int]]:
    """Texts, each up to the token that ended it."""
    start = rule.start(rows).to(device)
    written = start
    if longest > 1:
        written = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            logits_processor=[rule],
            max_new_tokens=longest - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_beams=1,
            eos_token_id=rule.ends or None,
            pad_token_id=rule.ends[0] if rule.ends else 0,
            use_cache=True,
        )
    for row, length in zip(written.tolist(), rule.lengths(written).tolist(), strict=True):
        yield row[:length]


class _Rule:
    """What may come next in a text; a logits processor of transformers."""

    def __init__(self, source: Source, done: int, total: int, on_sample: SampleCallback | None):
        tokenizer, named = source.tokenizer, _named(source.config)
        ends = {tokenizer.eos_token_id, *named.pop("eos_token_id", ())} - {None}
        self.bos, self.ends = tokenizer.bos_token_id, sorted(ends)
        self.known = min(len(tokenizer), source.config.get_text_config().vocab_size)
        no_text = set().union(*named.values()) - {self.bos, *named.get("bos_token_id", ()), *ends}
        self.never = sorted(token for token in no_text if token < self.known)
        self.done, self.total, self.on_sample = done, total, on_sample

    def start(self, rows: int) -> Tensor:
        """The first token of each text, `[rows, 1]`."""
        if self.bos is not None:
            return torch.full((rows, 1), self.bos)
        allowed = torch.tensor([token for token in range(self.known) if token not in {*self.never, *self.ends}])
        return allowed[torch.randint(len(allowed), (rows, 1))]

    def lengths(self, ids: Tensor) -> Tensor:
        """Of texts `[rows, length]` that are filled up behind their end, and include it: `[rows]`.

        The first token ends none: it is the same that ends a text in some vocabularies.
        """
        ended = torch.isin(ids[:, 1:], torch.tensor(self.ends, dtype=ids.dtype, device=ids.device))
        return 1 + (ended.cumsum(1) - ended.long() == 0).sum(1)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens so far `[rows, length]` and logits `[rows, vocabulary]`; logits with what is excluded at -inf."""
        length = ids.shape[1]
        if self.on_sample is not None and length % _REPORT_EVERY == 0:
            self.on_sample(min(self.total, self.done + int(self.lengths(ids).sum())), self.total)
        scores = scores.float()
        scores[:, self.known :] = -torch.inf  # rows of an embedding that was padded belong to no token
        scores[:, self.never if length >= _SHORTEST else [*self.never, *self.ends]] = -torch.inf
        if self.bos is None and length <= _LIKELIEST:
            return _only(scores, scores.argmax(-1))
        return scores


def _only(scores: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[rows, vocabulary]` with which nothing but `tokens` `[rows]` is drawn."""
    return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _named(config: Any) -> dict[str, set[int]]:
    """Tokens that a config names, by the name: where a text begins and ends, but also padding and places of images."""
    found: dict[str, set[int]] = {}
    for name, value in [*vars(config).items(), *vars(config.get_text_config()).items()]:
        if name.endswith(("_token_id", "_token_index")):
            tokens = value if isinstance(value, list) else [value]
            found.setdefault(name, set()).update(token for token in tokens if isinstance(token, int))
    return found
