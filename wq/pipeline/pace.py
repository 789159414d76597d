"""How fast this machine works, and how long a run will take at that.

What code does is counted on shapes (`wq.pipeline.shapes`); what a product, a byte and a call cost is measured here, as
are the solvers' loops over columns, which shapes skip. All of it in about a second, on a machine that may be busy now
and idle later: what comes out is no better than that, and says so by giving a range.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wq import grid, solvers
from wq.pipeline.estimate import Estimate, Job, Moment
from wq.scheme import Scheme
from wq.solvers import gptq, refine

_SPREAD = 0.7, 1.6  # of the time that is computed: what runs have taken, see the benchmarks
_COLUMNS, _ROWS = 128, 512


@dataclass(frozen=True)
class Pace:
    """Seconds. flop: for one of a matrix product. byte: read or written by anything else. call: for an operation.

    search, sweep, descend: for a weight, in the solvers' loops: over candidates for its scale, and over columns.
    """

    flop: float
    byte: float
    call: float
    search: float
    sweep: float
    descend: float


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, scheme: Scheme) -> Pace:
    """Measure a device. dtype: of the model; scheme: what is searched."""
    wide = torch.ones(1024, 1024, device=device, dtype=dtype)
    small, large = torch.ones(16, device=device), torch.ones(1 << 22, device=device)
    weight = torch.randn(_ROWS, _COLUMNS, device=device)
    plain = Scheme(scheme.bits, _COLUMNS, scheme.symmetric, scheme.scale_dtype)
    grids = grid.cover(weight, plain)
    codes = grid.quantize(weight, *grids, plain)
    order, identity = torch.arange(_COLUMNS, device=device), torch.eye(_COLUMNS, device=device)
    spread = [one.float().t().expand(_COLUMNS, _ROWS).contiguous() for one in grids]
    columns = weight.t().contiguous()

    def sweep() -> Any:
        return gptq._block_rounder(device)(columns.clone(), identity, *spread, plain.levels - 1)

    weights = weight.numel()
    return Pace(
        flop=_seconds(device, lambda: wide @ wide) / (2 * 1024**3),
        byte=_seconds(device, lambda: large + 1.0) / (2 * large.nbytes),
        call=_seconds(device, lambda: small + 1.0),
        search=_seconds(device, lambda: grid.search(weight, plain, identity.diagonal())) / weights,
        sweep=_seconds(device, sweep) / weights,
        descend=_seconds(device, lambda: refine.descend(weight, identity, codes, *grids, plain, order)) / weights,
    )


def _seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """The least time of a few runs, the first of which does not count."""
    best = float("inf")
    for attempt in range(4):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - started)
    return best


def seconds(job: Job, made: Estimate, pace: Pace) -> tuple[float, float]:
    """The least and the most that a run may take, calibration text and what comes after the last block aside."""
    total = sum(moment.times * _moment(job, moment, pace) for moment in made.moments)
    return _SPREAD[0] * total, _SPREAD[1] * total


def _moment(job: Job, moment: Moment, pace: Pace) -> float:
    work = moment.work
    return (
        work.flops * pace.flop
        + work.moved * pace.byte
        + work.calls * pace.call
        + sum(_loops(job, rows, columns, pace) for rows, columns in moment.solves)
    )


def _loops(job: Job, rows: int, columns: int, pace: Pace) -> float:
    """What solving a matrix takes in loops that shapes skip."""
    weights, products = rows * columns, rows * columns**2 * pace.flop
    if job.solver is not solvers.get("gptq"):
        return weights * pace.search if job.samples else 0.0
    searched = 0.0 if "search" in job.without else weights * pace.search
    refined = 0.0 if "refine" in job.without else refine.ROUNDS * (weights * pace.descend + 4 * products)
    return searched + weights * pace.sweep + products + refined
