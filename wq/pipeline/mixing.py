"""Widths for a budget: how much there is to give, what each unit would lose at each width, and who gets what."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wq import loaders
from wq.checkpoint import header_bytes
from wq.errors import BudgetError, FormatError, ModelError
from wq.formats.stored import Stored
from wq.pipeline.budget import allocate
from wq.pipeline.plan import Plan, mix
from wq.pipeline.sensitivity import Measured, OnStep, measure
from wq.pipeline.source import Source
from wq.scheme import BITS, check_quantizable

_BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SPELLED = {name.lower(): name for name in _BYTES}


@dataclass(frozen=True)
class Goal:
    """A budget, and the widths to spend it on.

    widths: bits, smallest first. bpw: bits on disk for each quantized weight, scales and zero points included; or size:
    bytes of all of the checkpoint's tensors and their headers, of which `unit` is how many bytes in which it was given.
    """

    widths: tuple[int, ...]
    bpw: float | None = None
    size: int | None = None
    unit: str = ""

    def to_dict(self) -> dict[str, float]:
        return {"bits_per_weight": self.bpw} if self.bpw is not None else {"checkpoint_bytes": self.size or 0}


def parse(bpw: float | None, size: int | str | None, widths: Iterable[int] | None, bits: int | None) -> Goal | None:
    """What was asked for; None if it was no budget. Raises BudgetError and SchemeError for what contradicts itself.

    bpw: bits of a quantized weight, its share of scales and zero points included. size: bytes of all tensors with their
    headers, or text such as `4.5GB` or `800 MiB`. widths: bits to choose from, all of `wq.scheme.BITS` if None.
    bits: one width for all, which contradicts a budget.
    """
    if bpw is None and size is None:
        if widths is not None:
            raise BudgetError("widths to mix need a budget: --target-bpw 3.5 or --target-size 4GB.")
        return None
    if bpw is not None and size is not None:
        raise BudgetError(f"--target-bpw {bpw} and --target-size {size}: give one of them.")
    if bits is not None:
        raise BudgetError(f"--bits {bits} is one width for all, and a target mixes several. Use --mix to choose them.")
    chosen = tuple(sorted(set(BITS if widths is None else widths)))
    for width in chosen:
        check_quantizable(width)
    if not chosen:
        raise BudgetError(f"there is no width to mix. Use --mix {','.join(map(str, BITS))}.")
    if size is None:
        if not (isinstance(bpw, (int, float)) and math.isfinite(bpw) and bpw > 0):
            raise BudgetError(f"--target-bpw is {bpw!r}; it must be a number of bits, 3.5 say.")
        return Goal(chosen, bpw=float(bpw))
    count, unit = _read_size("--target-size", size)
    return Goal(chosen, size=count, unit=unit)


def parse_size(option: str, size: int | str) -> int:
    """Bytes, of a number or of text such as `4.5GB`. Raises BudgetError, naming the option."""
    return _read_size(option, size)[0]


def _read_size(option: str, size: int | str) -> tuple[int, str]:
    """Bytes, and the unit they were given in."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].lower() not in _SPELLED or isinstance(size, float):
        raise BudgetError(f"{option} is {size!r}; it must be bytes, or a number and MB, GB, MiB or GiB: 4.5GB.")
    unit = _SPELLED[match[2].lower()]
    return int(float(match[1]) * _BYTES[unit]), unit


@dataclass(frozen=True)
class Room:
    """What a goal leaves. plans: one for each width, all layers at it. packed: bytes for all packed tensors, if headers
    are as short as they can be."""

    goal: Goal
    plans: dict[int, Plan]
    packed: int


def room(source: Source, fmt: ModuleType, plan: Plan, goal: Goal) -> Room:
    """How much there is for packed tensors, before any heavy work.

    Raises FormatError for a format that does not hold all widths, BudgetError for a budget below or above that of all
    mixtures, ModelError for an encoder-decoder model.
    """
    if len(plan.towers) > 1 or plan.towers[0][0].reads_encoder:
        raise ModelError(f"{source.name} has an encoder; wq mixes widths in decoders only. Use --bits instead.")
    for width in goal.widths:
        _check(fmt, plan, width)
    plans = {width: mix(source, fmt, plan, dict.fromkeys(plan.schemes, width)) for width in goal.widths}
    least, most = plans[goal.widths[0]], plans[goal.widths[-1]]
    if goal.bpw is not None:
        asked, unit, per = f"--target-bpw {goal.bpw:g}", "bits a weight", plan.quantized / 8
        spent, around = math.floor(goal.bpw * per), [0, 0]
    else:
        unit, per, size = goal.unit or "bytes", float(_BYTES[goal.unit]), goal.size or 0
        asked, around = f"--target-size {size / per:g} {goal.unit}".rstrip(), [_around(least), _around(most)]
        spent = size - around[0]
    limits = [sum(one.bytes.values()) + rest for one, rest in zip((least, most), around, strict=True)]
    if not limits[0] <= spent + around[0] <= limits[1]:
        low, high = _digits(limits[0] / per, math.ceil), _digits(limits[1] / per, math.floor)
        widths = ", ".join(map(str, goal.widths))
        raise BudgetError(f"{asked}: {source.name} takes {low} to {high} {unit} with a choice of {widths} bits.")
    return Room(goal, plans, spent)


def _around(plan: Plan) -> int:
    """Bytes of all that is not packed: dense tensors and headers."""
    tensors = sum(spec.bytes for spec in plan.specs.values())
    return tensors - sum(plan.bytes.values()) + header_bytes(plan.specs)


def _check(fmt: ModuleType, plan: Plan, bits: int) -> None:
    """Raise FormatError if the format cannot hold every matrix at this width."""
    for _, tower in plan.towers:
        for block in tower:
            shapes = {layer.path: layer.shape for layer in block.layers.values()}
            for expert in block.experts.values():
                pieces = [piece for row in expert.pieces for piece in row]
                shapes |= {piece.path: piece.shape for piece in pieces} or {expert.path: expert.size.matrix}
            for path, shape in shapes.items():
                try:
                    fmt.check(replace(plan.scheme, bits=bits), shape, path)
                except FormatError as error:
                    raise FormatError(f"a mixture of widths with {bits} bits cannot be written: {error}") from error


def _digits(value: float, rounded: Callable[[float], int]) -> str:
    """Four significant digits at least, rounded so that what is said is possible."""
    places = max(0, 3 - math.floor(math.log10(value)))
    return f"{rounded(value * 10**places) / 10**places:.{places}f}"


def choose(
    source: Source,
    fmt: ModuleType,
    plan: Plan,
    room: Room,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    weighted: bool,
    on_step: OnStep | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan with the widths that lose least, and a JSON-ready record of how they were chosen.

    The other arguments are those of `wq.pipeline.sensitivity.measure`, which finds what is lost.
    """
    started = time.perf_counter()
    measured = measure(source, plan, room.goal.widths, tokens, device, dtype, weighted, on_step)
    owners = _owners(plan)
    options = [
        [
            (sum(one.bytes[owner] for path in unit.paths for owner in owners[path]), unit.damage[width])
            for width, one in room.plans.items()
        ]
        for unit in measured.units
    ]
    limit, least, over = room.packed, sum(min(size for size, _ in one) for one in options), 0
    while True:
        picked = [room.goal.widths[choice] for choice in allocate(options, limit)]
        bits = {path: width for unit, width in zip(measured.units, picked, strict=True) for path in unit.paths}
        mixed = mix(source, fmt, plan, bits)
        if room.goal.size is not None:
            over = sum(mixed.bytes.values()) + _around(mixed) - room.goal.size
        if over <= 0:
            return mixed, _record(room.goal, mixed, measured, picked, time.perf_counter() - started)
        limit = max(least, limit - over)  # its header is longer


def _owners(plan: Plan) -> dict[str, list[str]]:
    """Whose bytes are those of a layer, or of a parameter of experts, by path: its own, or its pieces'."""
    owners = {path: [path] for path in plan.bytes}
    for _, tower in plan.towers:
        for expert in (expert for block in tower for expert in block.experts.values()):
            owners[expert.path] = [piece.path for row in expert.pieces for piece in row] or [expert.path]
    return owners


def _record(goal: Goal, plan: Plan, measured: Measured, picked: list[int], seconds: float) -> dict[str, Any]:
    damage = sum(unit.damage[width] for unit, width in zip(measured.units, picked, strict=True))
    return {
        "target": goal.to_dict(),
        "widths": list(goal.widths),
        "bits_per_weight": sum(plan.bytes.values()) * 8 / plan.quantized,
        "expected_kl": damage,
        "judged_tokens": measured.tokens,
        "measured": "units" if measured.alone else "blocks",
        "seconds": round(seconds, 1),
        "units": [
            {
                "block": unit.block,
                "layers": [path.removeprefix(f"{unit.block}.") for path in unit.paths],
                "bits": width,
                "kl": {str(bits): kl for bits, kl in unit.damage.items()},
            }
            for unit, width in zip(measured.units, picked, strict=True)
        ],
    }


def verdicts(plan: Plan, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each loader will say to the checkpoint whose config.json this is: `{loader, version, takes, why}`."""
    method = str(config["quantization_config"]["quant_method"])
    variant = "" if method != "gptq" else "1" if plan.scheme.symmetric else "2"
    layers: dict[str, Stored] = {}
    whole: set[str] = set()
    for block in (block for _, tower in plan.towers for block in tower):
        pieces = [piece for expert in block.experts.values() for row in expert.pieces for piece in row]
        for layer in (*block.layers.values(), *pieces):
            layers[layer.stored] = Stored(method, plan.schemes[layer.path], layer.shape, variant)
        whole |= {expert.path for expert in block.experts.values() if expert.whole}
    stacks = {name for name, spec in plan.specs.items() if len(spec.shape) == 3 and ".experts." in f".{name}"}
    left = frozenset(name for name in stacks if not name.startswith(tuple(whole)))
    checkpoint = loaders.Checkpoint(config, layers, frozenset(plan.dense), frozenset(whole), left)
    found = [loaders.judge(checkpoint, loader) for loader in loaders.VERSIONS]
    return [{key: one[key] for key in ("loader", "version", "takes", "why")} for one in found]
