"""Refining scales and codes: never worse, and as good as brute force says where that can be asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from synthetic import dense, inputs, statistics, weights
from torch import Tensor

from wq import grid
from wq.scheme import Scheme
from wq.solvers import Solution, gptq, refine

SCHEMES = [Scheme(bits, group, symmetric) for bits, symmetric, group in product((2, 3, 4), (True, False), (16, -1))]


def start(generator: torch.Generator, scheme: Scheme, rows: int = 40) -> tuple[Tensor, Tensor, Solution]:
    """A weight, a damped Hessian, and codes that were rounded without knowing of it."""
    w, known = weights(generator, rows, 64), statistics(inputs(generator, 1000, 64))
    scale, zero = grid.search(w, scheme)
    return w, gptq.damped(known.second_moment, 0.01), Solution(grid.quantize(w, scale, zero, scheme), scale, zero, {})


def losses(w: Tensor, hessian: Tensor, s: Solution) -> Tensor:
    """`e H eᵀ` of each row, in float64."""
    e = dense(s) - w.double()
    return ((e @ hessian.double()) * e).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_gets_worse_and_most_get_better(scheme: Scheme, generator: torch.Generator) -> None:
    w, h, s = start(generator, scheme)
    order = gptq.activation_order(h.diagonal())
    before = losses(w, h, s)
    s = s._replace(scale=refine.refit(w, h, s.codes, s.scale, s.zero, scheme)[0])
    refitted = losses(w, h, s)
    assert (refitted <= before * (1 + 1e-5)).all()
    s = s._replace(codes=refine.descend(w, h, s.codes, s.scale, s.zero, scheme, order))
    after = losses(w, h, s)
    assert (after <= refitted * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()
    assert s.scale.dtype is torch.float16
    assert s.codes.dtype is torch.uint8
    assert int(s.codes.max()) < scheme.levels


def test_scales_are_those_of_least_squares(generator: torch.Generator) -> None:
    scheme = Scheme(4, 16, False, "float32")
    w, h, s = start(generator, scheme, 12)
    fitted, _ = refine.refit(w, h, s.codes, s.scale, s.zero, scheme)
    root = torch.linalg.cholesky(h.double()).t()  # e H eᵀ = ‖root e‖²
    for row in range(12):
        levels = (s.codes[row].double() - s.zero[row].double().repeat_interleave(16)).view(4, 16)
        columns = torch.block_diag(*levels).t()  # [in, groups]
        expected = torch.linalg.lstsq(root @ columns, root @ w[row].double().unsqueeze(1)).solution.squeeze(1)
        assert (fitted[row].double() - expected).norm() / expected.norm() < 1e-3


def test_in_the_end_no_single_code_can_be_better(generator: torch.Generator) -> None:
    scheme = Scheme(3, 16)
    w, h, s = start(generator, scheme, 6)
    order = gptq.activation_order(h.diagonal())
    for _ in range(60):
        s = s._replace(codes=refine.descend(w, h, s.codes, s.scale, s.zero, scheme, order))
    best = losses(w, h, s)
    for column, change in product(range(64), (-1, 1)):
        codes = s.codes.int()
        codes[:, column] = (codes[:, column] + change).clamp(0, scheme.levels - 1)
        assert (losses(w, h, s._replace(codes=codes.to(torch.uint8))) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_round_is_at_least_as_good_for_every_row_and_the_last_is_better(
    scheme: Scheme, generator: torch.Generator
) -> None:
    w, h, s = start(generator, scheme)
    order = gptq.activation_order(h.diagonal())
    made = [s, *(s._replace(codes=c, scale=k) for c, k in refine.rounds(w, h, *s[:3], scheme, order))]
    assert len(made) == 1 + refine.ROUNDS
    errors = torch.stack([losses(w, h, one) for one in made])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-5)).all()
    assert errors[-1].sum() < 0.99 * errors[1].sum()


def test_a_row_is_refined_alike_alone_and_among_others_and_again(generator: torch.Generator) -> None:
    scheme = Scheme(3, 16, False)
    w, h, s = start(generator, scheme)
    order = gptq.activation_order(h.diagonal())

    def last(rows: slice) -> Solution:
        part = s._replace(codes=s.codes[rows], scale=s.scale[rows], zero=s.zero[rows])
        codes, scale = list(refine.rounds(w[rows], h, *part[:3], scheme, order))[-1]
        return part._replace(codes=codes, scale=scale)

    whole, again = last(slice(None)), last(slice(None))
    assert torch.equal(whole.codes, again.codes)
    assert torch.equal(whole.scale, again.scale)
    few = last(slice(8, 16))
    same = (few.codes == whole.codes[8:16]).all(1)  # all but a tie that another order of sums may break
    assert same.double().mean() >= 0.8


def test_a_scale_that_its_codes_say_nothing_of_stays(generator: torch.Generator) -> None:
    scheme = Scheme(4, 16)
    w, h, s = start(generator, scheme, 4)
    s.codes[:, :16] = scheme.midpoint  # all zero: any scale would do
    fitted, _ = refine.refit(w, h, s.codes, s.scale, s.zero, scheme)
    assert torch.equal(fitted[:, 0], s.scale[:, 0])
    assert torch.isfinite(fitted.float()).all()


def test_the_solver_stops_refining_when_tokens_held_out_say_so(generator: torch.Generator) -> None:
    w, known = weights(generator, 24, 64), statistics(inputs(generator, 1000, 64))
    same = replace(known, heldout=known)
    refined = gptq.solve(w, same, Scheme(2, 32))
    assert refined.stats["refinements"] > 0
    assert refined.stats["error"] < gptq.solve(w, known, Scheme(2, 32)).stats["error"]
    strangers = statistics(torch.roll(inputs(generator, 1000, 64), 13, 1))
    few = statistics(inputs(generator, 20, 64))  # fitted to 20 tokens, judged by 1000 of another kind
    stubborn = gptq.solve(w, replace(few, heldout=strangers), Scheme(2, 32))
    plain = gptq.solve(w, few, Scheme(2, 32))
    assert gptq.heldout_error(w, dense(stubborn), strangers) <= gptq.heldout_error(w, dense(plain), strangers)
