"""The grid search against float64 and brute force, on ordinary groups and on the ones that break scales."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from synthetic import inputs, statistics, weights
from torch import Tensor

from wq import grid
from wq.scheme import BITS, SCALE_DTYPES, Scheme

SCHEMES = [Scheme(bits, group, symmetric) for bits, symmetric, group in product(BITS, (True, False), (32, -1))]
IMPORTANCE = ("equal", "columns", "blocks")
GRIDS = ("search", "cover")


def name_of(s: Scheme) -> str:
    return f"{s.bits}bit-{'sym' if s.symmetric else 'asym'}-{s.group_size}-{s.scale_dtype}"


def schemes(*selected: Scheme) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scheme", selected or SCHEMES, ids=name_of)


def importance(kind: str, generator: torch.Generator, groups: int, in_features: int) -> Tensor | None:
    moment = statistics(inputs(generator, 3 * in_features, in_features)).second_moment
    return {"equal": None, "columns": moment.diagonal(), "blocks": grid.blocks(moment, groups)}[kind]


def error(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, omega: Tensor | None) -> Tensor:
    """Weighted squared error of rounding to the nearest code, `[out, groups]`, all in float64."""
    groups = scale.shape[1]
    x, s, z = w.double().reshape(w.shape[0], groups, -1), scale.double()[..., None], zero.double()[..., None]
    e = s * (((x / s).round() + z).clamp(0, 2**scheme.bits - 1) - z) - x
    if omega is None:
        return (e * e).sum(-1)
    if omega.dim() == 1:
        return (e * e * omega.double().reshape(groups, -1)).sum(-1)
    return ((e.transpose(0, 1) @ omega.double()).transpose(0, 1) * e).sum(-1)


def brute_force(w: Tensor, scheme: Scheme, omega: Tensor | None) -> Tensor:
    """The least error, `[out, groups]`, among 64 stored scales of either sign and every zero point."""
    x = w.double().reshape(w.shape[0], scheme.groups(w.shape[1]), -1)
    reach = x.abs().amax(-1) / 2 ** (scheme.bits - 1)
    signs, zeros = (1, -1), torch.tensor([2 ** (scheme.bits - 1)])
    if not scheme.symmetric:
        reach = (x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)) / (2**scheme.bits - 1)
        signs, zeros = (1,), torch.arange(2**scheme.bits)
    best = torch.full_like(reach, torch.inf)
    rows, every = w.repeat(len(zeros), 1), zeros.repeat_interleave(len(w))[:, None]
    for ratio, sign in product(torch.linspace(0.2, 1.1, 64).tolist(), signs):
        scale = (sign * ratio * reach).to(getattr(torch, scheme.scale_dtype)).repeat(len(zeros), 1)
        errors = error(rows, scale, every.expand_as(scale), scheme, omega)
        best = torch.minimum(best, errors.reshape(len(zeros), *best.shape).amin(0))
    return best


def quantized(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    return grid.dequantize(grid.quantize(w, scale, zero, scheme), scale, zero, torch.float64)


@pytest.mark.parametrize("kind", IMPORTANCE)
@schemes()
def test_search_is_never_worse_than_the_plain_cover(scheme: Scheme, kind: str, generator: torch.Generator) -> None:
    w = weights(generator, 23, 96)
    omega = importance(kind, generator, scheme.groups(96), 96)
    found = error(w, *grid.search(w, scheme, omega), scheme, omega)
    plain = error(w, *grid.cover(w, scheme), scheme, omega)
    assert (found <= plain * (1 + 1e-4)).all()
    assert found.sum() < plain.sum()


# Weighted errors have narrow minima, so that brute force finds a lucky grid here and there: the more, the more codes.
@pytest.mark.parametrize(("kind", "slack"), [("equal", 1.02), ("columns", 1.04), ("blocks", 1.1)])
@schemes(*(s for s in SCHEMES if s.bits < 8))
def test_search_comes_close_to_brute_force(scheme: Scheme, kind: str, slack: float, generator: torch.Generator) -> None:
    w = weights(generator, 64, 64)
    omega = importance(kind, generator, scheme.groups(64), 64)
    found = error(w, *grid.search(w, scheme, omega), scheme, omega).sum()
    assert found <= slack * brute_force(w, scheme, omega).sum()


@schemes(Scheme(8, 32), Scheme(8, -1))
def test_search_comes_close_to_brute_force_at_8_bits(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 64, 64)
    assert error(w, *grid.search(w, scheme), scheme, None).sum() <= 1.05 * brute_force(w, scheme, None).sum()


@schemes(*(Scheme(bits, 32, symmetric, "float32") for bits, symmetric in product(BITS, (True, False))))
def test_a_least_squares_step_hardly_improves_what_the_search_found(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 64, 64)
    scale, zero = grid.search(w, scheme)
    x, s, z = w.double().reshape(64, 2, 32), scale.double()[..., None], zero.double()[..., None]
    q = ((x / s).round() + z).clamp(0, scheme.levels - 1) - z
    found = error(w, scale, zero, scheme, None)
    better = error(w, (q * x).sum(-1) / (q * q).sum(-1), zero, scheme, None)
    assert found.sum() <= 1.001 * torch.minimum(found, better).sum()


@pytest.mark.parametrize("kind", IMPORTANCE)
@schemes()
def test_shapes_dtypes_and_ranges_are_those_of_the_scheme(
    scheme: Scheme, kind: str, generator: torch.Generator
) -> None:
    w = weights(generator, 5, 96)
    omega = importance(kind, generator, scheme.groups(96), 96)
    for scale, zero in (grid.search(w, scheme, omega), grid.cover(w, scheme)):
        assert scale.shape == zero.shape == (5, scheme.groups(96))
        assert (scale.dtype, zero.dtype) == (torch.float16, torch.uint8)
        assert scale.isfinite().all()
        assert (scale != 0).all()
        assert zero.int().max() < scheme.levels
        assert not scheme.symmetric or (zero == scheme.midpoint).all()
        codes = grid.quantize(w, scale, zero, scheme)
        assert (codes.shape, codes.dtype) == (w.shape, torch.uint8)
        assert int(codes.max()) < scheme.levels


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_have_the_dtype_that_is_stored(
    dtype: str, symmetric: bool, name: str, generator: torch.Generator
) -> None:
    scale, _ = getattr(grid, name)(weights(generator, 3, 64), Scheme(4, 32, symmetric, dtype))
    assert scale.dtype is getattr(torch, dtype)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", BITS)
def test_the_symmetric_search_recovers_a_grid_that_uses_the_extra_code(
    bits: int, sign: int, generator: torch.Generator
) -> None:
    scheme = Scheme(bits, 32)
    codes = torch.randint(scheme.levels, (17, 96), generator=generator).reshape(17, 3, 32)
    codes[..., 5] = 0  # the one code that has no opposite
    w = (sign * 2.0**-6 * (codes - scheme.midpoint)).reshape(17, 96)
    for scale, zero in (grid.search(w, scheme), grid.cover(w, scheme)):
        assert torch.equal(quantized(w, scale, zero, scheme), w.double())
        assert (scale.sign() == sign).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_covering_grid_puts_the_largest_weight_on_the_extra_code(bits: int, generator: torch.Generator) -> None:
    scheme, w = Scheme(bits, -1), weights(generator, 19, 40)
    codes = grid.quantize(w, *grid.cover(w, scheme), scheme)
    assert (codes.gather(1, w.abs().argmax(1, keepdim=True)) == 0).all()


@pytest.mark.parametrize("name", GRIDS)
@schemes()
def test_rounding_is_within_half_a_step_wherever_the_grid_reaches(
    scheme: Scheme, name: str, generator: torch.Generator
) -> None:
    w = weights(generator, 21, 96)
    scale, zero = getattr(grid, name)(w, scheme)
    step = scale.double().abs().repeat_interleave(96 // scale.shape[1], 1)
    ends = torch.stack([grid.dequantize(torch.full_like(w, c), scale, zero) for c in (0, scheme.levels - 1)])
    inside = (w >= ends.amin(0)) & (w <= ends.amax(0))
    off = (quantized(w, scale, zero, scheme) - w.double()).abs()
    assert inside.double().mean() > 0.8
    assert (off <= step * (0.5 + 1e-4))[inside].all()
    beyond = (w.double() - w.double().clamp(ends.amin(0).double(), ends.amax(0).double())).abs()
    assert torch.allclose(off[~inside], beyond[~inside], rtol=1e-4, atol=1e-7)


@schemes()
def test_the_covering_grid_is_never_off_by_more_than_a_step(scheme: Scheme, generator: torch.Generator) -> None:
    w = torch.randn(50, 64, generator=generator)
    scale, zero = grid.cover(w, scheme)
    step = scale.double().abs().repeat_interleave(64 // scale.shape[1], 1)
    assert ((quantized(w, scale, zero, scheme) - w).abs() <= step * 1.02).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantize_is_the_formula_of_the_scheme(dtype: torch.dtype, generator: torch.Generator) -> None:
    codes = torch.randint(16, (3, 6), generator=generator, dtype=torch.uint8)
    scale = torch.randn(3, 2, generator=generator)
    zero = torch.tensor([[0, 15], [8, 3], [1, 2]], dtype=torch.uint8)
    w = grid.dequantize(codes, scale, zero, dtype)
    assert w.dtype is dtype
    for n, k in product(range(3), range(6)):
        expected = float(scale[n, k // 3]) * (int(codes[n, k]) - int(zero[n, k // 3]))
        assert float(w[n, k]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


HARD = {
    "zero": torch.zeros(2, 64),
    "tiny": 1e-8 * torch.linspace(-1, 1, 128).reshape(2, 64),
    "subnormal": torch.full((2, 64), 1e-42),
    "huge": 1e4 * torch.linspace(-1, 1, 128).reshape(2, 64),
    "beyond float16": 1e6 * torch.linspace(-1, 1, 128).reshape(2, 64),
    "constant": torch.full((2, 64), 0.37),
    "negative constant": torch.full((2, 64), -0.37),
    "one outlier": torch.zeros(2, 64).index_fill(1, torch.tensor([7]), 3.0),
    "outlier over noise": torch.linspace(-1e-3, 1e-3, 128).reshape(2, 64).index_fill(1, torch.tensor([7]), -9.0),
    "one dead group": torch.linspace(-1, 1, 128).reshape(2, 64).index_fill(1, torch.arange(32), 0.0),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize(("symmetric", "dtype"), product((True, False), SCALE_DTYPES))
@pytest.mark.parametrize("bits", BITS)
def test_scales_of_hard_groups_are_finite_and_not_zero(
    bits: int, symmetric: bool, dtype: str, case: str, name: str
) -> None:
    scheme, w = Scheme(bits, 32, symmetric, dtype), HARD[case]
    scale, zero = getattr(grid, name)(w, scheme)
    assert scale.isfinite().all()
    assert (scale != 0).all()
    assert int(zero.max()) < scheme.levels
    assert quantized(w, scale, zero, scheme).isfinite().all()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("case", ["zero", "one outlier", "constant", "negative constant"])
@schemes(*(Scheme(b, 32, s, d) for b, s, d in product(BITS, (True, False), SCALE_DTYPES)))
def test_groups_of_one_value_and_zero_are_exact_up_to_the_rounding_of_their_scale(
    scheme: Scheme, case: str, name: str
) -> None:
    w = HARD[case]
    back = quantized(w, *getattr(grid, name)(w, scheme), scheme)
    assert torch.allclose(back, w.double(), rtol=torch.finfo(getattr(torch, scheme.scale_dtype)).eps, atol=0)
    assert (back[w == 0] == 0).all()


@schemes()
def test_a_dead_group_beside_a_live_one_stays_exactly_zero(scheme: Scheme) -> None:
    w = HARD["one dead group"]
    for scale, zero in (grid.search(w, scheme), grid.cover(w, scheme)):
        assert (quantized(w, scale, zero, scheme)[:, :32] == 0).all()


@schemes(*(Scheme(b, 32, s, d) for b, s, d in product((3, 4), (True, False), ("bfloat16", "float32"))))
def test_the_search_does_not_depend_on_the_unit_of_the_weights(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 11, 64)
    scale, zero = grid.search(w, scheme)
    for unit in (2.0**-20, 2.0**20):
        other, same_zero = grid.search(w * unit, scheme)
        assert torch.equal(other, scale * unit)
        assert torch.equal(same_zero, zero)


@schemes()
def test_full_blocks_find_less_output_error_than_the_diagonal(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 48, 64)
    omega = importance("blocks", generator, scheme.groups(64), 64)
    assert omega is not None
    by_block = error(w, *grid.search(w, scheme, omega), scheme, omega).sum()
    diagonal = omega.diagonal(dim1=1, dim2=2).reshape(-1)
    by_column = error(w, *grid.search(w, scheme, diagonal), scheme, omega).sum()
    assert by_block < 0.97 * by_column


@schemes()
def test_a_diagonal_block_scores_as_its_diagonal_does(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 9, 64)
    columns = torch.rand(64, generator=generator) + 0.5
    blocks = torch.stack([torch.diag(part) for part in columns.chunk(scheme.groups(64))])
    one, other = (error(w, *grid.search(w, scheme, omega), scheme, columns) for omega in (columns, blocks))
    assert torch.allclose(one, other, rtol=1e-3)


@schemes()
def test_importance_is_relative_to_its_own_group(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 7, 64)
    columns = torch.rand(64, generator=generator)
    units = torch.tensor([2.0**-30, 2.0**30][: scheme.groups(64)]).repeat_interleave(64 // scheme.groups(64))
    for mine, other in zip(grid.search(w, scheme, columns), grid.search(w, scheme, columns * units), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", ["columns", "blocks"])
@schemes()
def test_importance_that_is_all_zero_is_equal_importance(
    scheme: Scheme, shape: str, generator: torch.Generator
) -> None:
    w, size = weights(generator, 9, 64), 64 // scheme.groups(64)
    nothing = torch.zeros(64) if shape == "columns" else torch.zeros(scheme.groups(64), size, size)
    found = error(w, *grid.search(w, scheme, nothing), scheme, None)
    assert torch.allclose(found, error(w, *grid.search(w, scheme), scheme, None), rtol=1e-3)


@schemes()
def test_a_column_of_overwhelming_importance_is_rounded_best(scheme: Scheme, generator: torch.Generator) -> None:
    w = weights(generator, 40, 64)
    columns = torch.ones(64)
    columns[3] = 1e6
    favoured, fair = ((quantized(w, *grid.search(w, scheme, o), scheme) - w)[:, 3] for o in (columns, None))
    assert favoured.square().mean() < 0.2 * fair.square().mean()


@schemes(Scheme(4, 32), Scheme(4, -1, False))
@pytest.mark.parametrize("kind", ["equal", "columns"])
def test_blocks_of_rows_do_not_show(
    scheme: Scheme, kind: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weights(generator, 13, 96)
    omega = importance(kind, generator, scheme.groups(96), 96)
    whole = grid.search(w, scheme, omega)
    monkeypatch.setattr(grid, "_BLOCK", 4 * 96 + 1)
    for mine, other in zip(whole, grid.search(w, scheme, omega), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@schemes(Scheme(4, 32), Scheme(3, 32, False))
def test_nothing_changes_its_input(scheme: Scheme, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = weights(generator, 6, 64).to(dtype)
    omega = importance("blocks", generator, 2, 64)
    assert omega is not None
    before = w.clone(), omega.clone()
    scale, zero = grid.search(w, scheme, omega)
    grid.cover(w, scheme)
    grids = scale.clone(), zero.clone()
    codes = grid.quantize(w, scale, zero, scheme)
    kept = codes.clone()
    grid.dequantize(codes, scale, zero)
    for now, then in zip((w, omega, scale, zero, codes), (*before, *grids, kept), strict=True):
        assert torch.equal(now, then)


def test_blocks_are_the_diagonal_blocks(generator: torch.Generator) -> None:
    m = torch.randn(12, 12, generator=generator)
    parts = grid.blocks(m, 3)
    assert parts.shape == (3, 4, 4)
    for g, i, j in product(range(3), range(4), range(4)):
        assert parts[g, i, j] == m[4 * g + i, 4 * g + j]
