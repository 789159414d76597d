"""How fast a model reads and writes here, beside its dense original.

Both are loaded and measured in turns, round after round, since a machine's speed drifts: what counts is the ratio in a
round. Reading is one forward pass over a prompt; writing is greedy, token by token, without the first, which waits for
the prompt.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wq.errors import ModelError, first_line
from wq.machine import default_device

PROMPT, TOKENS = 512, 32
_SHORT = 8  # tokens of the prompt in front of what is written
ROUNDS = 5

RoundCallback = Callable[[int, int], None]


def speed(
    model: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    compiled: bool = True,
    dtype: str = "auto",
    device: str | None = None,
    head_bits: int | None = None,
    on_round: RoundCallback | None = None,
) -> dict[str, Any]:
    """Tokens per second of `model`, and of the dense `base`: read (`prefill`), written (`decode`), and written with a
    static cache and a compiled forward (`compiled`).

    compiled: whether to measure the last, which takes a minute or more to compile. Where it cannot be compiled, the
    result says why. dtype: what both run in. head_bits: as in `WqConfig`, of `model`. Raises ModelError for an
    encoder-decoder model.
    """
    from wq.hf import load

    place = device or default_device()
    names = {"model": model, **({} if base is None else {"base": base})}
    models: dict[str, Any] = {}
    for key, name in names.items():
        models[key], _ = load(name, dtype=dtype, device=place, head_bits=head_bits if key == "model" else None)
        if models[key].config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder model; speed is measured of models that continue a text.")
        dtype = str(models["model"].dtype).removeprefix("torch.")
    measures = ["prefill", "decode", *(["compiled"] if compiled else [])]
    seconds: dict[tuple[str, str], list[float]] = {(key, what): [] for key in models for what in measures}
    problems: dict[str, str] = {}
    for turn in range(ROUNDS + 1):  # the first warms up
        for what in measures:
            for key, one in models.items():
                if what in problems:
                    continue
                try:
                    took = _MEASURES[what](one)
                except Exception as error:  # whatever a compiler, or the lack of one, makes torch raise
                    if what != "compiled":
                        raise
                    problems[what] = first_line(error)
                    continue
                if turn:
                    seconds[key, what].append(took)
        if on_round:
            on_round(turn, ROUNDS)
    return {
        "device": str(place),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "prompt": PROMPT,
        "tokens": TOKENS,
        "rounds": ROUNDS,
        **{key: {"model": str(name), **_figures(seconds, key)} for key, name in names.items()},
        "speedup": None if base is None else _ratios(seconds, measures, problems),
        "problems": problems,
    }


def _figures(seconds: dict[tuple[str, str], list[float]], key: str) -> dict[str, float]:
    """Tokens per second, by median."""
    mine = {what: took for (whose, what), took in seconds.items() if whose == key and took}
    return {what: 1 / statistics.median(took) for what, took in mine.items()}


def _ratios(
    seconds: dict[tuple[str, str], list[float]], measures: list[str], problems: dict[str, str]
) -> dict[str, float]:
    """How many times as fast as the base, by the median over rounds; `compiled`, than the base's `decode` also."""
    found = {}
    pairs = {what: (what, what) for what in measures} | {"compiled_over_decode": ("compiled", "decode")}
    for name, (mine, other) in pairs.items():
        if mine in measures and mine not in problems:
            both = zip(seconds["model", mine], seconds["base", other], strict=True)
            found[name] = statistics.median(dense / packed for packed, dense in both)
    return found


# --- seconds a token ---


def _ids(model: Any, count: int) -> Tensor:
    """Some tokens: which they are does not matter to the time they take."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(count, device=model.device) * 7 % vocabulary)[None]


def _prefill(model: Any) -> float:
    ids = _ids(model, PROMPT)
    with torch.inference_mode():
        started = _now(model)
        model(input_ids=ids, use_cache=True)
        return (_now(model) - started) / PROMPT


def _decode(model: Any, **how: Any) -> float:
    short, long = (_generate(model, count, **how) for count in (1, TOKENS + 1))
    return max(long - short, 1e-9) / TOKENS


def _compiled(model: Any) -> float:
    from wq.hf.generation import compile_config

    return _decode(model, cache_implementation="static", compile_config=compile_config())


def _generate(model: Any, tokens: int, **how: Any) -> float:
    ids = _ids(model, _SHORT)
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        started = _now(model)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits, **how)
        return _now(model) - started


def _now(model: Any) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


_MEASURES: dict[str, Callable[[Any], float]] = {"prefill": _prefill, "decode": _decode, "compiled": _compiled}
