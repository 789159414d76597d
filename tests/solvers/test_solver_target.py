"""The asymmetric target against the tokens themselves, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from synthetic import dense, inputs, weights
from torch import Tensor

from wq.scheme import Scheme
from wq.solvers import Statistics, gptq, target


class Stream(NamedTuple):
    """Tokens of a layer: its input in the quantized model and in the dense one, and what its output is added to."""

    seen: Tensor
    true: Tensor
    residual: Tensor  # the dense model's minus the quantized one's

    def statistics(self) -> Statistics:
        n, x = len(self.seen), self.seen.double()
        drift, residual = ((left.double().t() @ x / n).float() for left in (self.true - self.seen, self.residual))
        return Statistics((x.t() @ x / n).float(), n, drift, residual)

    def loss(self, weight: Tensor, rounded: Tensor) -> float:
        """Mean square distance of the output, with what it is added to, from the dense model's."""
        wanted = self.true.double() @ weight.double().t() + self.residual.double()
        return float((self.seen.double() @ rounded.double().t() - wanted).square().sum(1).mean())


@pytest.fixture
def streams(generator: torch.Generator) -> tuple[Tensor, Statistics, Stream]:
    """A weight, statistics with some held out, and fresh tokens of the same kind.

    The drift is partly a linear function of the input, and partly noise.
    """
    x = inputs(generator, 2800, 64)
    size = x.square().mean(0).sqrt()
    mix, push = (torch.randn(64, n, generator=generator) / 8 / size[:, None] for n in (64, 48))
    true = x + 0.1 * (x @ mix) * size + 0.3 * size * torch.randn(2800, 64, generator=generator)
    residual = 0.02 * (x @ push) + 0.1 * torch.randn(2800, 48, generator=generator)
    parts = zip(*(t.split([300, 1500, 1000]) for t in (x, true, residual)), strict=True)
    fit, held, fresh = (Stream(*part) for part in parts)
    return weights(generator, 48, 64), replace(fit.statistics(), heldout=held.statistics()), fresh


def test_what_is_lost_is_counted_as_the_tokens_would(streams: tuple[Tensor, Statistics, Stream]) -> None:
    w, _, fresh = streams
    other = w + 0.01 * torch.randn_like(w)
    expected = fresh.loss(w, other) - fresh.loss(w, w)
    assert gptq.heldout_error(w, other, fresh.statistics()) == pytest.approx(expected, rel=1e-3)


def test_the_share_is_the_best_one_for_tokens_held_out(streams: tuple[Tensor, Statistics, Stream]) -> None:
    w, known, _ = streams
    assert known.heldout is not None
    goal, share = target.retarget(w, known)
    assert 0 < share < 1
    step = (goal - w) / share
    best = gptq.heldout_error(w, goal, known.heldout)
    for other in (share - 0.05, share + 0.05, 0.0, 1.0):
        assert gptq.heldout_error(w, w + other * step, known.heldout) > best


def test_fresh_tokens_are_served_better(streams: tuple[Tensor, Statistics, Stream]) -> None:
    w, known, fresh = streams
    with_target, without = (
        dense(gptq.solve(w, known, Scheme(4, 32), without=left_out)) for left_out in ((), ("target",))
    )
    assert fresh.loss(w, with_target) < fresh.loss(w, without)


def test_a_drift_that_others_do_not_share_is_not_learned(generator: torch.Generator) -> None:
    x, y = (inputs(generator, n, 64) for n in (70, 2000))
    nothing = torch.zeros(1, 8)
    fit = Stream(x, x + torch.randn(70, 64, generator=generator), nothing.expand(70, 8))
    held = Stream(y, y + torch.randn(2000, 64, generator=generator), nothing.expand(2000, 8))
    _, share = target.retarget(weights(generator, 8, 64), replace(fit.statistics(), heldout=held.statistics()))
    assert share < 0.1


@pytest.mark.parametrize("case", ["no pairs", "nothing held out", "no drift", "nan drift", "zero input"])
def test_without_a_drift_to_trust_the_target_is_the_weight(case: str, generator: torch.Generator) -> None:
    w, x = weights(generator, 8, 32), inputs(generator, 300, 32)
    known = Stream(x, 1.1 * x, torch.zeros(300, 8)).statistics()
    heldout: Statistics | None = known
    if case == "no pairs":
        known = Statistics(known.second_moment, known.tokens)
    elif case == "nothing held out":
        heldout = None
    elif case == "no drift":
        known = heldout = Stream(x, x, torch.zeros(300, 8)).statistics()
    elif case == "nan drift":
        known = replace(known, drift=torch.full((32, 32), torch.nan))
    else:
        known = replace(known, second_moment=torch.zeros(32, 32))
    goal, share = target.retarget(w, replace(known, heldout=heldout))
    assert share == 0
    assert torch.equal(goal, w)
