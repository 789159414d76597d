"""Recipes with a name: how much text, which steps, and what comes after the last block.

    fast      GPTQ from a few windows, all layers learning from one pass of the dense model
    balanced  the default: every layer learns behind the quantized ones before it, what the dense model computes there
    best      balanced, and then learning: each block, of the dense one (`pipeline.learning`), and the whole model at
              once, where it fits (`distill`)

Anything said explicitly counts more than the preset.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wq import report
from wq.distill import Rates, StepCallback, distill, required_by
from wq.errors import CalibrationError, ModelError, UnknownNameError
from wq.journal import Journal
from wq.machine import default_device, free_bytes
from wq.pipeline import learning, mixing, quantizer
from wq.pipeline.statistics import HELD_OUT

# Solvers and blocks have fitted to what they saw, so what is distilled on is kept from them: all that is more than
# balanced takes, and a quarter at least.
LESSONS = 4


@dataclass(frozen=True)
class Preset:
    """method, samples, seqlen, without, importance: as `wq.pipeline.quantizer.quantize` has them.

    blocks, rates: of learning block by block and of distillation, by bits, if there is any.
    """

    samples: int
    seqlen: int = 512
    method: str = "gptq"
    without: tuple[str, ...] = ()
    importance: bool = False
    blocks: dict[int, learning.BlockRates] = field(default_factory=dict)
    rates: dict[int, Rates] = field(default_factory=dict)


PRESETS = {
    # Where each layer learns behind the quantized ones and makes up for their errors, importance gains next to nothing
    # (SmolLM2-135M, balanced, 4 bits: KL 0.080 to 0.082 on WikiText-2, 0.117 to 0.113 on code, 0.070 to 0.066 on web
    # text) for 2.6 s a window, two cores.
    "fast": Preset(16, without=("refine", "sequence", "target"), importance=True),
    "balanced": Preset(128),
    "best": Preset(
        384,
        # Wider codes gain nothing: on blocks of SmolLM2 that GPTQ has solved, errors of 3 and 4 bits rise.
        blocks={2: learning.BlockRates(codes=3e-2, scales=2e-3, passes=4)},
        rates={
            2: Rates(scales=3e-3, vectors=3e-3, codes=1.2e-2),
            3: Rates(scales=1.5e-3, vectors=2e-3),
            4: Rates(scales=6e-4, vectors=1e-3),
            8: Rates(),
        },
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A preset with what was said besides: as `wq.pipeline.quantizer.quantize` has them.

    blocks, rates: of learning block by block and of distillation, if there is any. reserve: of the samples, those that
    are kept from solvers and blocks.
    """

    method: str
    samples: int
    seqlen: int
    without: frozenset[str]
    importance: bool
    blocks: learning.BlockRates | None
    rates: Rates | None
    reserve: int


def recipe(
    preset: str,
    *,
    method: str | None = None,
    bits: int | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    without: Iterable[str] = (),
) -> Recipe:
    """What a preset comes to. Raises UnknownNameError; CalibrationError for fewer samples than it takes."""
    if preset not in PRESETS:
        raise UnknownNameError(f"preset {preset!r} is unknown; wq has {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    same = method is None or method == chosen.method
    samples = chosen.samples if samples is None else samples
    width = 4 if bits is None else bits
    rates = chosen.rates.get(width) if same else None
    reserve = 0 if rates is None else max(samples // LESSONS, samples - PRESETS["balanced"].samples)
    if rates is not None and reserve < HELD_OUT:
        raise CalibrationError(f"--samples {samples}: preset {preset} needs at least {LESSONS * HELD_OUT} windows.")
    return Recipe(
        method=method or chosen.method,
        samples=samples,
        seqlen=chosen.seqlen if seqlen is None else seqlen,
        without=frozenset({*without, *(chosen.without if same else ())}),
        importance=same and chosen.importance,
        blocks=chosen.blocks.get(width) if same else None,
        rates=rates,
        reserve=reserve,
    )


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    preset: str = "balanced",
    method: str | None = None,
    bits: int | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    without: Iterable[str] = (),
    device: str | None = None,
    max_memory: int | str | None = None,
    on_step: StepCallback | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a dense model into a checkpoint folder that transformers and vLLM load, and return its report.

    preset: `fast`, `balanced` or `best`; what else is given counts more. on_step: called after each step of
    distillation with its number, their number, and its KL. Everything else: `wq.pipeline.quantizer.quantize`.

    Raises a WqError, before any heavy work, for everything that can be known to fail.
    """
    wanted = recipe(preset, method=method, bits=bits, samples=samples, seqlen=seqlen, without=without)
    rates = wanted.rates

    def finish(folder: Path, tokens: Tensor | None, journal: Journal) -> dict[str, Any]:
        if rates is None or tokens is None:
            return {"preset": preset}
        if len(tokens) < HELD_OUT:
            short = f"the text holds {len(tokens)} windows besides those that were solved on, of {HELD_OUT} it takes"
            return {"preset": preset, "distillation": {"kept": False, "reason": short}}
        place = device or default_device()
        free = free_bytes(place)
        if max_memory is not None:
            free = min(free, mixing.parse_size("--max-memory", max_memory))
        taught = _taught(folder, model, tokens, rates, place, free, journal, on_step)
        return {"preset": preset, "distillation": taught}

    return quantizer.quantize(
        model,
        output,
        method=wanted.method,
        bits=bits,
        samples=wanted.samples,
        seqlen=wanted.seqlen,
        without=wanted.without,
        importance=wanted.importance,
        reserve=wanted.reserve,
        rates=wanted.blocks,
        device=device,
        max_memory=max_memory,
        finish=finish,
        **options,
    )


def _taught(
    folder: Path,
    model: Any,
    tokens: Tensor,
    rates: Rates,
    device: str,
    free: int,
    journal: Journal,
    on_step: StepCallback | None,
) -> dict[str, Any]:
    """Distil, or say why not: the checkpoint is good without it, and was long in the making."""
    need = sum(required_by(folder, tokens.shape[1], rates).values())
    if need > free:
        return {"kept": False, "reason": f"it takes {report.size(need)} of memory, and {report.size(free)} is free"}
    try:
        return distill(folder, model, tokens, rates=rates, device=device, journal=journal, on_step=on_step)
    except ModelError as error:
        return {"kept": False, "reason": str(error)}
