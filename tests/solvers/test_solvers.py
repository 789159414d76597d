"""The contract that every registered solver keeps, and the registry."""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from synthetic import inputs, output_error, statistics, weights

from wq import grid, solvers
from wq.errors import GroupSizeError, UnknownNameError
from wq.scheme import BITS, Scheme
from wq.solvers import SOLVERS, Solution, Statistics

NAMES = sorted(SOLVERS)
SCHEMES = [
    *(Scheme(bits, 32, symmetric) for bits, symmetric in product(BITS, (True, False))),
    Scheme(4, -1),
    Scheme(3, -1, False, "float32"),
    Scheme(4, 16, False, "bfloat16"),
]


def solve(
    name: str, weight: torch.Tensor, known: Statistics, scheme: Scheme, generator: torch.Generator | None = None
) -> Solution:
    return solvers.get(name).solve(weight, known, scheme, generator=generator)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}-{s.group_size}-{s.symmetric}-{s.scale_dtype}")
@pytest.mark.parametrize("name", NAMES)
def test_a_solution_has_the_promised_types_shapes_and_ranges(
    name: str, scheme: Scheme, generator: torch.Generator
) -> None:
    w, known = weights(generator, 19, 96), statistics(inputs(generator, 300, 96))
    s = solve(name, w, known, scheme, generator)
    assert isinstance(s, Solution)
    assert (s.codes.shape, s.codes.dtype) == (w.shape, torch.uint8)
    assert s.scale.shape == s.zero.shape == (19, scheme.groups(96))
    assert (s.scale.dtype, s.zero.dtype) == (getattr(torch, scheme.scale_dtype), torch.uint8)
    assert max(int(s.codes.max()), int(s.zero.max())) < scheme.levels
    assert not scheme.symmetric or (s.zero == scheme.midpoint).all()
    assert s.scale.isfinite().all()
    assert (s.scale != 0).all()
    assert all(t.is_contiguous() for t in s[:3])
    assert "fallback" not in s.stats
    assert all(math.isfinite(v) for v in s.stats.values())
    json.dumps(s.stats)


@pytest.mark.parametrize("name", NAMES)
def test_the_reported_error_is_the_output_error(name: str, generator: torch.Generator) -> None:
    w, known = weights(generator, 24, 64), statistics(inputs(generator, 500, 64))
    s = solve(name, w, known, Scheme(4, 32))
    expected = output_error(w, grid.dequantize(s.codes, s.scale, s.zero, torch.float64), known.second_moment)
    assert s.stats["error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_no_solver_is_worse_than_plain_rounding_on_correlated_inputs(
    name: str, bits: int, generator: torch.Generator
) -> None:
    w, known = weights(generator, 64, 96), statistics(inputs(generator, 2000, 96))
    scheme = Scheme(bits, 32)
    s, plain = solve(name, w, known, scheme), solvers.get("rtn").solve(w, None, scheme, generator=None)
    mine, floor = (output_error(w, grid.dequantize(x.codes, x.scale, x.zero), known.second_moment) for x in (s, plain))
    assert mine < floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_a_solver_changes_none_of_its_inputs(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    w, known = weights(generator, 16, 160).to(dtype), statistics(inputs(generator, 300, 160))
    before = w.clone(), known.second_moment.clone()
    s = solve(name, w, known, Scheme(4, 32))
    assert torch.equal(w, before[0])
    assert torch.equal(known.second_moment, before[1])
    assert torch.equal(s.codes, solve(name, w.float(), known, Scheme(4, 32)).codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_solver_gives_the_same_answer_twice(name: str, symmetric: bool, generator: torch.Generator) -> None:
    w, known = weights(generator, 32, 160), statistics(inputs(generator, 300, 160))
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # the global generator is nobody's business
        runs.append(solve(name, w, known, Scheme(3, 32, symmetric), torch.Generator().manual_seed(7)))
    for one, other in zip(runs[0][:3], runs[1][:3], strict=True):
        assert torch.equal(one, other)
    assert runs[0].stats == runs[1].stats


@pytest.mark.parametrize("name", NAMES)
def test_a_solver_leaves_the_global_generator_alone(name: str, generator: torch.Generator) -> None:
    state = torch.get_rng_state()
    solve(name, weights(generator, 4, 32), statistics(inputs(generator, 64, 32)), Scheme(4, 32))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("heights", [(32, 8, 8), (33, 7, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_are_solved_as_if_alone(
    name: str, heights: tuple[int, ...], symmetric: bool, generator: torch.Generator
) -> None:
    w, known = weights(generator, sum(heights), 192), statistics(inputs(generator, 900, 192))
    scheme = Scheme(4, 32, symmetric)
    stacked = solve(name, w, known, scheme)
    alone = [solve(name, part, known, scheme) for part in w.split(heights)]
    for i in range(3):
        assert torch.equal(stacked[i], torch.cat([s[i] for s in alone]))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_contiguous_is_solved_alike(name: str, generator: torch.Generator) -> None:
    w, known = weights(generator, 64, 64), statistics(inputs(generator, 300, 64))
    turned = w.t().contiguous().t()
    for one, other in zip(*(solve(name, v, known, Scheme(4, 32))[:3] for v in (w, turned)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zeros_stays_zero(name: str, generator: torch.Generator) -> None:
    known = statistics(inputs(generator, 300, 64))
    for symmetric in (True, False):
        s = solve(name, torch.zeros(5, 64), known, Scheme(4, 32, symmetric))
        assert (grid.dequantize(s.codes, s.scale, s.zero) == 0).all()
        assert s.stats["error"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_do_not_fit_are_refused(name: str, generator: torch.Generator) -> None:
    with pytest.raises(GroupSizeError, match=r"96.*128"):
        solve(name, weights(generator, 4, 96), statistics(inputs(generator, 64, 96)), Scheme())


@pytest.mark.parametrize("name", NAMES)
def test_a_solver_says_whether_it_wants_statistics(name: str) -> None:
    assert type(solvers.get(name).NEEDS_STATISTICS) is bool


def test_an_unknown_solver_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UnknownNameError, match="'gtpq'") as caught:
        solvers.get("gtpq")
    assert all(name in str(caught.value) for name in SOLVERS)


def test_one_line_registers_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("elsewhere_solver")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(SOLVERS, "elsewhere", module.__name__)
    assert solvers.get("elsewhere") is module


def test_an_installed_package_offers_a_solver_but_never_replaces_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "offered_solver.py").write_text("NEEDS_STATISTICS = False\n")
    info = tmp_path / "offered_solver-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered-solver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[wq.solvers]\noffered = offered_solver\nrtn = offered_solver\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "offered_solver", raising=False)
    assert solvers.get("offered").__name__ == "offered_solver"
    assert solvers.get("rtn").__name__ == "wq.solvers.rtn"
    with pytest.raises(UnknownNameError, match="offered"):
        solvers.get("absent")
