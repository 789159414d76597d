"""GPTQ against the algorithm as the paper writes it, slow and in float64, and against Hessians that break it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from synthetic import dense, inputs, output_error, statistics, weights
from torch import Tensor

from wq import grid
from wq.scheme import BITS, Scheme
from wq.solvers import Statistics, gptq, rtn

SCHEMES = [Scheme(bits, group, symmetric) for bits, symmetric, group in product(BITS, (True, False), (32, -1))]


def name_of(s: Scheme) -> str:
    return f"{s.bits}bit-{'sym' if s.symmetric else 'asym'}-{s.group_size}"


def damping_rule(columns: int, tokens: int) -> float:
    return min(max(0.05 * columns / max(tokens / 8, 1.0), 0.005), 0.2)


def damped(moment: Tensor, damping: float) -> Tensor:
    """The Hessian that is factorised, float64, columns in place: dead columns get the mean, then all the damping."""
    h = moment.double().clone()
    diagonal, mean = h.diagonal(), h.diagonal().mean()
    diagonal.copy_(torch.where(diagonal <= 0, mean, diagonal) + damping * mean)
    return h


def textbook(w: Tensor, known: Statistics, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Codes by GPTQ with explicit updates of the inverse Hessian, one column at a time, float64."""
    order = sorted(range(w.shape[1]), key=lambda j: -float(known.second_moment[j, j]))
    size = w.shape[1] // scale.shape[1]
    work = w.double()[:, order]
    hessian = damped(known.second_moment, damping_rule(w.shape[1], known.tokens))
    inverse = torch.linalg.inv(hessian[order][:, order])
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for i, j in enumerate(order):
        s, z = scale[:, j // size].double(), zero[:, j // size].double()
        code = ((work[:, i] / s).round() + z).clamp(0, levels - 1)
        codes[:, j] = code.to(torch.uint8)
        error = (work[:, i] - s * (code - z)) / inverse[i, i]
        work[:, i + 1 :] -= torch.outer(error, inverse[i, i + 1 :])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_codes_and_loss_are_those_of_the_textbook(scheme: Scheme, generator: torch.Generator) -> None:
    w, known = weights(generator, 100, 160), statistics(inputs(generator, 2000, 160))
    s = gptq.solve(w, known, scheme)
    expected = textbook(w, known, s.scale, s.zero, scheme.levels)
    # A tie that float32 breaks differently changes what follows in its row, and 8 bits have more ties.
    assert (s.codes == expected).double().mean() >= (0.999 if scheme.bits < 8 else 0.998)
    assert (s.codes.int() - expected.int()).abs().max() <= (scheme.levels // 32 or 1)
    mine, theirs = (output_error(w, dense(x), known.second_moment) for x in (s, s._replace(codes=expected)))
    assert mine == pytest.approx(theirs, rel=1e-3)
    assert s.stats["error"] == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize(("columns", "tokens"), [(96, 40), (128, 4000), (129, 300), (260, 3000)])
def test_sizes_around_a_block_of_columns_agree_with_the_textbook(
    columns: int, tokens: int, generator: torch.Generator
) -> None:
    w, known = weights(generator, 24, columns), statistics(inputs(generator, tokens, columns))
    s = gptq.solve(w, known, Scheme(4, -1, False))
    assert (s.codes == textbook(w, known, s.scale, s.zero, 16)).double().mean() >= 0.999


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_the_output_error_is_less_than_that_of_rounding(scheme: Scheme, generator: torch.Generator) -> None:
    w, x = weights(generator, 48, 96), inputs(generator, 6000, 96)
    known, unseen = statistics(x[:4000]), statistics(x[4000:]).second_moment
    mine, nearest, plain = (
        output_error(w, dense(s), unseen)
        for s in (gptq.solve(w, known, scheme), rtn.solve(w, known, scheme), rtn.solve(w, None, scheme))
    )
    assert mine < nearest < plain


def test_grids_come_from_the_weight_as_it_was(generator: torch.Generator) -> None:
    w, known, scheme = weights(generator, 16, 64), statistics(inputs(generator, 400, 64)), Scheme(3, 32, False)
    s = gptq.solve(w, known, scheme)
    for mine, searched in zip((s.scale, s.zero), grid.search(w, scheme, known.second_moment.diagonal()), strict=True):
        assert torch.equal(mine, searched)


def test_columns_without_correlation_are_rounded_to_nearest_and_put_back_in_place(generator: torch.Generator) -> None:
    w = weights(generator, 16, 96)
    diagonal = torch.rand(96, generator=generator) + 0.1
    s = gptq.solve(w, Statistics(torch.diag(diagonal), 10**6), Scheme(4, 32))
    assert torch.equal(s.codes, grid.quantize(w, s.scale, s.zero, Scheme(4, 32)))


def test_the_activation_order_falls_and_keeps_ties(generator: torch.Generator) -> None:
    diagonal = torch.randint(5, (200,), generator=generator).float()
    expected = sorted(range(200), key=lambda j: -float(diagonal[j]))
    assert gptq.activation_order(diagonal).tolist() == expected


@pytest.mark.parametrize(("columns", "tokens"), [(1, 10), (40, 7), (96, 500), (150, 10**6)])
def test_the_factor_is_that_of_the_inverse_of_the_damped_reordered_hessian(
    columns: int, tokens: int, generator: torch.Generator
) -> None:
    x = inputs(generator, min(tokens, 3000), columns)
    x[:, 1::40] = 0  # dead columns, but for the first case
    moment = statistics(x).second_moment
    before = moment.clone()
    factor, damping = gptq.inverse_factor(moment, tokens)
    assert factor is not None
    assert factor.dtype is torch.float32
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    assert torch.equal(moment, before)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    hessian = damped(moment, damping)[order][:, order]
    product_with_hessian = factor.double().t() @ factor.double() @ hessian
    assert torch.linalg.norm(product_with_hessian - torch.eye(columns)) < 1e-3 * columns**0.5
    inverse = torch.linalg.inv(hessian)
    assert torch.linalg.norm(factor.double().t() @ factor.double() - inverse) < 1e-4 * torch.linalg.norm(inverse)


@pytest.mark.parametrize(
    ("columns", "tokens", "expected"),
    [
        (1024, 131072, 0.005),  # 0.05 * 1024 / 16384 = 0.003125, raised
        (512, 16384, 0.0125),
        (1024, 8192, 0.05),
        (64, 256, 0.1),
        (64, 64, 0.2),  # 0.4, lowered
        (8, 1, 0.2),  # less than one independent sample counts as one: 0.4, lowered
        (2, 0, 0.1),
    ],
)
def test_damping_follows_how_well_the_hessian_is_determined(columns: int, tokens: int, expected: float) -> None:
    factor, damping = gptq.inverse_factor(torch.eye(columns), tokens)
    assert damping == pytest.approx(expected)
    assert factor is not None
    assert torch.allclose(factor.diagonal(), torch.tensor((1 + expected) ** -0.5), rtol=1e-5)


def indefinite(lowest: float, generator: torch.Generator) -> Tensor:
    """A second moment with mean eigenvalue 1 and the smallest at `lowest`, in directions that mix all columns."""
    values = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5
    values = values / values[1:].sum() * (64 - lowest)
    values[0] = lowest
    vectors, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    moment = (vectors * values) @ vectors.t()
    return ((moment + moment.t()) / 2).float()


@pytest.mark.parametrize(
    ("lowest", "expected"), [(0.1, 0.005), (-0.01, 0.015), (-0.05, 0.135), (-0.3, 0.405), (-0.45, None)]
)
def test_a_hessian_that_is_not_quite_positive_gets_three_times_the_damping_until_it_is(
    lowest: float, expected: float | None, generator: torch.Generator
) -> None:
    moment = indefinite(lowest, generator)
    factor, damping = gptq.inverse_factor(moment, 10**6)
    s = gptq.solve(weights(generator, 8, 64), Statistics(moment, 10**6), Scheme(4, 32))
    assert (factor is None) == ("fallback" in s.stats) == (expected is None)
    if expected is not None:
        assert s.stats["damping"] == damping == pytest.approx(expected)


def test_dead_columns_are_counted_rounded_to_nearest_and_change_no_other(generator: torch.Generator) -> None:
    w, x, dead = weights(generator, 24, 96), inputs(generator, 2000, 96), [0, 17, 18, 95]
    x[:, dead] = 0
    known, scheme = statistics(x), Scheme(4, -1)
    s = gptq.solve(w, known, scheme)
    assert s.stats["dead_columns"] == 4
    assert "fallback" not in s.stats
    assert torch.equal(s.codes[:, dead], grid.quantize(w, s.scale, s.zero, scheme)[:, dead])
    assert (s.codes == textbook(w, known, s.scale, s.zero, 16)).double().mean() >= 0.999
    live = torch.ones(96, dtype=torch.bool).index_fill(0, torch.tensor(dead), False)
    order, factor = (
        gptq.activation_order(known.second_moment.diagonal()),
        gptq.inverse_factor(known.second_moment, 2000),
    )
    moved = gptq._sweep(torch.where(live, w, 100.0), order, factor[0], s.scale, s.zero, scheme)
    assert torch.equal(moved[:, live], s.codes[:, live])


def hard_hessians() -> dict[str, tuple[Tensor, bool]]:
    """Second moments that strain a factorisation, and whether it is impossible."""
    generator = torch.Generator().manual_seed(5)
    x = inputs(generator, 400, 64)
    one = torch.randn(64, generator=generator)
    twins = torch.cat([x[:, :32], x[:, :32]], 1)
    spread = x * torch.logspace(-9, 9, 64)  # mean squares from 1e-18 to 1e18
    poisoned, infinite = (statistics(torch.randn(400, 64, generator=generator)).second_moment for _ in range(2))
    poisoned[3, 5] = poisoned[5, 3] = torch.nan
    infinite[7, 7] = torch.inf
    alone = torch.zeros(64, 64)
    alone[11, 11] = 2.0
    return {
        "rank one": (torch.outer(one, one), False),
        "constant": (torch.ones(64, 64), False),
        "duplicated columns": (statistics(twins).second_moment, False),
        "fewer tokens than columns": (statistics(x[:5]).second_moment, False),
        "spread": (statistics(spread).second_moment, False),
        "tiny": (statistics(1e-9 * x).second_moment, False),
        "huge": (statistics(1e9 * x).second_moment, False),
        "one live column": (alone, False),
        "one value is not a number": (poisoned, True),
        "one value is infinite": (infinite, True),
        "nothing is a number": (torch.full((64, 64), torch.nan), True),
        "zero": (torch.zeros(64, 64), True),
        "negative": (-torch.eye(64), True),
        "indefinite": (torch.eye(64) + 3 * (torch.ones(64, 64) - torch.eye(64)), True),
    }


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, False), Scheme(4, -1, False)], ids=name_of)
@pytest.mark.parametrize("case", hard_hessians())
def test_hard_hessians_give_a_finite_answer_and_say_so_only_when_they_cannot_be_factorised(
    case: str, scheme: Scheme, generator: torch.Generator
) -> None:
    moment, impossible = hard_hessians()[case]
    w = weights(generator, 12, 64)
    s = gptq.solve(w, Statistics(moment, 400), scheme)
    assert ("fallback" in s.stats) is impossible
    assert s.scale.isfinite().all()
    assert (s.scale != 0).all()
    assert dense(s).isfinite().all()
    assert int(s.codes.max()) < scheme.levels
    assert all(math.isfinite(v) for v in s.stats.values() if not isinstance(v, str))
    json.dumps(s.stats)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, False), Scheme(3, -1, False)], ids=name_of)
@pytest.mark.parametrize("case", [name for name, (_, impossible) in hard_hessians().items() if impossible])
def test_the_fallback_is_about_as_good_as_plain_rounding(case: str, scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 24, 64)
    s = gptq.solve(w, Statistics(hard_hessians()[case][0], 400), scheme)
    plain = (dense(rtn.solve(w, None, scheme)) - w).square().sum()
    assert (dense(s) - w).square().sum() <= 1.5 * plain


@pytest.mark.parametrize("case", [name for name, (_, impossible) in hard_hessians().items() if not impossible])
def test_hard_hessians_still_gain_over_rounding(case: str, generator: torch.Generator) -> None:
    moment, w = hard_hessians()[case][0], weights(generator, 24, 64)
    s, plain = gptq.solve(w, Statistics(moment, 400), Scheme(4, 32)), rtn.solve(w, None, Scheme(4, 32))
    mine, floor = (output_error(w, dense(x), moment) for x in (s, plain))
    assert mine <= floor


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(2, 32, False), Scheme(3, -1)], ids=name_of)
@pytest.mark.parametrize("case", hard_hessians())
def test_hard_hessians_are_refined_and_retargeted_without_harm(
    case: str, scheme: Scheme, generator: torch.Generator
) -> None:
    moment, impossible = hard_hessians()[case]
    w, heldout = weights(generator, 24, 64), Statistics(moment, 100)
    s = gptq.solve(w, Statistics(moment, 400, heldout=heldout), scheme)
    assert dense(s).isfinite().all()
    if not impossible:
        mine, floor = (output_error(w, dense(x), moment) for x in (s, rtn.solve(w, None, scheme)))
        assert mine <= floor
    drift = 0.1 * moment.roll(1, 0)
    drifted = Statistics(moment, 400, drift, drift[:24], replace(heldout, drift=drift, residual=drift[:24]))
    s = gptq.solve(w, drifted, scheme)
    assert ("fallback" in s.stats) is impossible
    assert s.scale.isfinite().all()
    assert dense(s).isfinite().all()
    json.dumps(s.stats, allow_nan=False)
