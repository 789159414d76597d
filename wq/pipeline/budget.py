"""Which width each part of a model gets, so that all of it fits a number of bytes and the damage is least.

A multiple-choice knapsack, solved exactly: sizes are multiples of a common measure (the widths of a layer differ by
whole rows of words), so that a table over what is left of the budget, in that measure, has one row for each unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import gcd

import numpy as np

_TABLE = 1 << 27  # entries of the table of choices, a byte each

Options = Sequence[tuple[int, float]]  # bytes and cost of each choice


def allocate(units: Sequence[Options], budget: int) -> list[int]:
    """The choice for each unit, by its index, with the least total cost of those of at most `budget` bytes in total.

    Exact where the table has room for the sizes' common measure, which it has for every model that is not odd on
    purpose. Elsewhere sizes are rounded up to a coarser one, what that leaves is given out greedily, and the result may
    cost more than the best. Raises ValueError if even the smallest choices do not fit.
    """
    smallest = [min(size for size, _ in options) for options in units]
    room = budget - sum(smallest)
    if room < 0:
        raise ValueError(f"{sum(smallest)} bytes at least, {budget} allowed")
    extra = [[size - least for size, _ in options] for options, least in zip(units, smallest, strict=True)]
    room = min(room, sum(map(max, extra)))
    measure = gcd(*chain.from_iterable(extra)) or 1
    measure *= max(1, -(-(room // measure + 1) * len(units) // _TABLE))
    choices = _table(units, [[-(-size // measure) for size in sizes] for sizes in extra], room // measure)
    _fill(units, extra, choices, room)
    return choices


def _table(units: Sequence[Options], sizes: list[list[int]], room: int) -> list[int]:
    """The best choices for sizes in a measure, by dynamic programming over how much of `room` is used."""
    best = np.zeros(room + 1)
    chosen = np.zeros((len(units), room + 1), dtype=np.uint8)
    for row, options, steps in zip(chosen, units, sizes, strict=True):
        total = np.full(room + 1, np.inf)
        for index, ((_, cost), step) in enumerate(zip(options, steps, strict=True)):
            if step <= room:
                trial = best[: room + 1 - step] + cost
                better = trial < total[step:]
                total[step:][better] = trial[better]
                row[step:][better] = index
        best = total
    found, left = [], room
    for row, steps in zip(chosen[::-1], sizes[::-1], strict=True):
        found.append(int(row[left]))
        left -= steps[found[-1]]
    return found[::-1]


def _fill(units: Sequence[Options], extra: list[list[int]], choices: list[int], room: int) -> None:
    """Spend what rounding left over, one change at a time, on the one that helps most. Changes `choices`."""
    left = room - sum(sizes[choice] for sizes, choice in zip(extra, choices, strict=True))
    while left > 0:
        gain, unit, choice = max(
            (
                (units[unit][now][1] - cost, unit, index)
                for unit, now in enumerate(choices)
                for index, (_, cost) in enumerate(units[unit])
                if extra[unit][index] - extra[unit][now] <= left
            ),
            default=(0.0, 0, 0),
        )
        if gain <= 0:
            return
        left -= extra[unit][choice] - extra[unit][choices[unit]]
        choices[unit] = choice
