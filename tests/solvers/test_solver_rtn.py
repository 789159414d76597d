"""Round to nearest: the nearest code, no data needed, and better by output when data is there."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from synthetic import dense, inputs, output_error, statistics, weights

from wq import grid
from wq.scheme import BITS, Scheme
from wq.solvers import Statistics, rtn

SCHEMES = [Scheme(bits, group, symmetric) for bits, symmetric, group in product(BITS, (True, False), (32, -1))]


def name_of(s: Scheme) -> str:
    return f"{s.bits}bit-{'sym' if s.symmetric else 'asym'}-{s.group_size}"


@pytest.mark.parametrize("informed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_every_code_is_the_nearest_one(scheme: Scheme, informed: bool, generator: torch.Generator) -> None:
    w = weights(generator, 13, 96)
    s = rtn.solve(w, statistics(inputs(generator, 300, 96)) if informed else None, scheme)
    off = (dense(s) - w.double()).abs()
    step = s.scale.double().abs().repeat_interleave(96 // s.scale.shape[1], 1)
    for move in (-1, 1):
        moved = (s.codes.int() + move).clamp(0, scheme.levels - 1)
        other = (dense(s._replace(codes=moved)) - w.double()).abs()
        assert (off <= other + 1e-4 * step).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_statistics_lessen_the_output_error(scheme: Scheme, generator: torch.Generator) -> None:
    w, x = weights(generator, 48, 96), inputs(generator, 4000, 96)
    known, unseen = statistics(x[:2000]), statistics(x[2000:]).second_moment
    informed, plain = (output_error(w, dense(rtn.solve(w, s, scheme)), unseen) for s in (known, None))
    assert informed < plain


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits < 8], ids=name_of)
def test_scoring_by_blocks_beats_scoring_by_columns(scheme: Scheme, generator: torch.Generator) -> None:
    w, known = weights(generator, 48, 96), statistics(inputs(generator, 2000, 96))
    mine = rtn.solve(w, known, scheme)
    scale, zero = grid.search(w, scheme, known.second_moment.diagonal())
    by_columns = grid.dequantize(grid.quantize(w, scale, zero, scheme), scale, zero)
    assert output_error(w, dense(mine), known.second_moment) < 0.97 * output_error(w, by_columns, known.second_moment)


def test_without_statistics_the_grid_is_the_plain_cover_and_nothing_is_reported(generator: torch.Generator) -> None:
    w, scheme = weights(generator, 9, 64), Scheme(4, 32, False)
    s = rtn.solve(w, None, scheme)
    assert all(torch.equal(a, b) for a, b in zip(grid.cover(w, scheme), (s.scale, s.zero), strict=True))
    assert s.stats == {}


@pytest.mark.parametrize(("group", "full"), [(64, True), (256, True), (512, False), (-1, False)])
def test_final_codes_are_scored_by_blocks_unless_a_block_is_large(
    group: int, full: bool, generator: torch.Generator
) -> None:
    moment = statistics(inputs(generator, 100, 512)).second_moment
    omega = rtn.importance(Statistics(moment, 100), Scheme(4, group))
    expected = grid.blocks(moment, 512 // group) if full else moment.diagonal()
    assert torch.equal(omega, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_useless_statistics_do_no_harm(value: float, group: int, symmetric: bool, generator: torch.Generator) -> None:
    w, scheme = weights(generator, 16, 64), Scheme(4, group, symmetric)
    s = rtn.solve(w, Statistics(torch.full((64, 64), value), 100), scheme)
    assert s.scale.isfinite().all()
    plain = dense(rtn.solve(w, None, scheme)) - w
    assert (dense(s) - w).square().sum() <= 1.5 * plain.square().sum()


def test_output_error_is_the_relative_error_of_the_products(generator: torch.Generator) -> None:
    w, x = weights(generator, 8, 40), inputs(generator, 200, 40)
    rounded = w + 0.01 * torch.randn(w.shape, generator=generator)
    y, other = (x.double() @ v.double().t() for v in (w, rounded))
    expected = float((y - other).square().sum() / y.square().sum())
    assert rtn.output_error(w, rounded, statistics(x)) == pytest.approx(expected, rel=1e-4)
    assert rtn.output_error(torch.zeros_like(w), rounded, statistics(x)) == 0
