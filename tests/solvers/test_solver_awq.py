"""AWQ's input scales: finite, positive, never a loss by their own score, and larger where inputs are larger."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from synthetic import dense, inputs, output_error, statistics, weights
from torch import Tensor

from wq.scheme import Scheme
from wq.solvers import Statistics, awq, rtn

SCHEMES = [Scheme(bits, group, symmetric) for bits, symmetric, group in product((3, 4, 8), (True, False), (32, -1))]


def scaled_error(w: Tensor, t: Tensor, moment: Tensor, scheme: Scheme) -> float:
    """Output error, in float64, of plain rounding of `w · diag(t)` followed by the division."""
    return output_error(w, dense(rtn.solve(w * t, None, scheme)) / t.double(), moment)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}-{s.group_size}-{s.symmetric}")
def test_input_scales_are_finite_positive_and_no_worse_than_none(scheme: Scheme, generator: torch.Generator) -> None:
    w, known = weights(generator, 48, 96), statistics(inputs(generator, 1000, 96))
    before = w.clone(), known.second_moment.clone()
    t = awq.input_scales(w, known, scheme)
    assert (t.shape, t.dtype) == ((96,), torch.float32)
    assert t.isfinite().all()
    assert (t > 0).all()
    with_scales, without = (scaled_error(w, v, known.second_moment, scheme) for v in (t, torch.ones(96)))
    assert with_scales <= without * (1 + 1e-4)
    assert torch.equal(w, before[0])
    assert torch.equal(known.second_moment, before[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_with_outlier_inputs_are_scaled_up_and_the_output_is_better(
    symmetric: bool, generator: torch.Generator
) -> None:
    w, x = 0.02 * torch.randn(64, 128, generator=generator), torch.randn(1000, 128, generator=generator)
    x[:, 5] *= 40
    known, scheme = statistics(x), Scheme(4, 64, symmetric)
    t = awq.input_scales(w, known, scheme)
    assert t[5] > 1.5 * t[torch.arange(128) != 5].max()
    plain = scaled_error(w, torch.ones(128), known.second_moment, scheme)
    assert scaled_error(w, t, known.second_moment, scheme) < 0.5 * plain
    folded = dense(awq.solve(w * t, Statistics(known.second_moment / t / t[:, None], 1000), scheme)) / t.double()
    assert output_error(w, folded, known.second_moment) < 0.5 * plain


@pytest.mark.parametrize("spread", [1.0, 1e9])
def test_scales_are_normalised_around_one(spread: float, generator: torch.Generator) -> None:
    x = inputs(generator, 500, 64)
    x[:, 3] *= spread
    t = awq.input_scales(weights(generator, 32, 64), statistics(x), Scheme(4, 32))
    assert float(t.max() * t.min()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "moment"),
    [
        ("nan", torch.full((64, 64), torch.nan)),
        ("infinite", torch.full((64, 64), torch.inf)),
        ("zero", torch.zeros(64, 64)),
        ("huge", 1e30 * torch.eye(64)),
        ("spread", torch.diag(torch.logspace(-18, 18, 64))),
        ("negative", -torch.eye(64)),
    ],
)
def test_input_scales_of_broken_statistics_are_usable(case: str, moment: Tensor, generator: torch.Generator) -> None:
    w = weights(generator, 16, 64)
    t = awq.input_scales(w, Statistics(moment, 10), Scheme(4, 32))
    assert t.isfinite().all()
    assert (t > 0).all()
    assert (w * t).isfinite().all()
    if case in ("nan", "infinite", "zero"):
        assert (t == 1).all()


def test_a_dead_input_channel_and_a_zero_column_do_no_harm(generator: torch.Generator) -> None:
    w, x = weights(generator, 24, 64), inputs(generator, 500, 64)
    x[:, 9] = 0
    w[:, 20] = 0
    t = awq.input_scales(w, statistics(x), Scheme(4, 32))
    assert t.isfinite().all()
    assert (t > 0).all()


def test_solve_is_rounding_with_statistics(generator: torch.Generator) -> None:
    w, known = weights(generator, 12, 64), statistics(inputs(generator, 300, 64))
    mine, other = awq.solve(w, known, Scheme(4, 32)), rtn.solve(w, known, Scheme(4, 32))
    assert all(torch.equal(a, b) for a, b in zip(mine[:3], other[:3], strict=True))
