"""The best choices for a budget, against all choices there are."""

from __future__ import annotations

import random
from itertools import product

import pytest

from wq.pipeline import budget
from wq.pipeline.budget import allocate

Units = list[list[tuple[int, float]]]


def instance(seed: int, measure: int) -> tuple[Units, int]:
    """A few units of two to four choices, larger ones costing less as a rule, and a budget between the extremes."""
    rng = random.Random(seed)
    units = []
    for _ in range(rng.randint(1, 6)):
        base, count = rng.randint(0, 50), rng.randint(2, 4)
        sizes = sorted(rng.sample(range(1, 40), count))
        costs = sorted((rng.choice([rng.random(), 10 * rng.random(), 0.0]) for _ in sizes), reverse=True)
        if rng.random() < 0.2:
            rng.shuffle(costs)
        units.append([(base + measure * size, cost) for size, cost in zip(sizes, costs, strict=True)])
    low, high = (sum(end(size for size, _ in options) for options in units) for end in (min, max))
    return units, rng.randint(low, high)


def totals(units: Units, choices: list[int] | tuple[int, ...]) -> tuple[int, float]:
    picked = [options[choice] for options, choice in zip(units, choices, strict=True)]
    return sum(size for size, _ in picked), sum(cost for _, cost in picked)


def best(units: Units, limit: int) -> float:
    every = (totals(units, choices) for choices in product(*(range(len(options)) for options in units)))
    return min(cost for size, cost in every if size <= limit)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_that_fits_costs_less(seed: int) -> None:
    units, limit = instance(seed, random.Random(seed).choice([1, 16, 1000]))
    size, cost = totals(units, allocate(units, limit))
    assert size <= limit
    assert cost == pytest.approx(best(units, limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_a_table_that_is_too_small_rounds_and_keeps_the_budget(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    units, limit = instance(seed, 7)
    monkeypatch.setattr(budget, "_TABLE", 60)
    size, cost = totals(units, allocate(units, limit))
    assert size <= limit
    assert cost >= best(units, limit) - 1e-12
    for unit, options in enumerate(units):  # nothing that still fits would help
        for other in range(len(options)):
            choices = allocate(units, limit)
            changed = totals(units, [*choices[:unit], other, *choices[unit + 1 :]])
            assert changed[0] > limit or changed[1] >= cost


def test_a_large_model_is_filled_to_the_last_measure() -> None:
    rng = random.Random(0)
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    units = [
        [(rows * columns * bits // 8, rng.random() * 4.0 ** (3 - bits)) for bits in (2, 3, 4, 8)]
        for _ in range(80)
        for rows, columns in shapes
    ]
    limit = round(sum(options[0][0] for options in units) * 3.5 / 2)
    size, _ = totals(units, allocate(units, limit))
    assert 0.999 * limit < size <= limit


def test_the_ends_of_the_range() -> None:
    units = [[(10, 5.0), (20, 1.0)], [(7, 3.0), (9, 2.0)]]
    assert allocate(units, 17) == [0, 0]
    assert allocate(units, 29) == [1, 1]
    assert allocate(units, 10**9) == [1, 1]
    assert allocate([], 0) == []
    with pytest.raises(ValueError, match="17 bytes at least, 16 allowed"):
        allocate(units, 16)


def test_only_one_size() -> None:
    assert allocate([[(8, 1.0)], [(8, 2.0), (8, 1.0)]], 20) == [0, 1]
