"""How a weight becomes integers. One algorithm a file; a new one adds its file and one line to `SOLVERS`.

A solver is a module with

    NEEDS_STATISTICS: bool       whether it wants calibration; without it the pipeline runs no forward pass
    NEEDS_PAIRS: bool            optional: whether it wants tokens held out, and the dense model's inputs, too
    DECIDES: bool                optional: whether it decides anything over all rows; `solve(..., total=sum)` then does
                                 it over those of other processes, too
    STEPS: tuple[str, ...]       optional: parts of it that `solve(..., without=names)` leaves out, to see their worth
    def solve(weight, statistics, scheme, *, generator) -> Solution

and optionally `input_scales(weight, statistics, scheme) -> Tensor`, for algorithms that move scales into the operation
before the layer (AWQ). `solve` is pure: it sees tensors only, changes none of them, prints nothing and chooses no
device. Rows are independent, so the pipeline stacks the layers that read one input (q/k/v, gate/up) into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from wq import registry
from wq.errors import UnknownNameError

SOLVERS: dict[str, str] = {
    "rtn": "wq.solvers.rtn",
    "gptq": "wq.solvers.gptq",
    "awq": "wq.solvers.awq",
}


Total = Callable[[Tensor], Tensor]  # the sum of a number over all rows of a weight, from that over some of them


def own(number: Tensor) -> Tensor:
    """The sum over all rows, where all rows are here."""
    return number


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of a layer's input x.

    second_moment: `E[x xᵀ]`, float32 `[in_features, in_features]`, symmetric.
    tokens: how many tokens it is the mean of.
    drift: `E[(x − x̂) x̂ᵀ]`, float32, like `second_moment`, where x̂ is the input that the statistics are of, in the
    model quantized so far, and x the dense model's for the same token; or None.
    residual: `E[(r − r̂) x̂ᵀ]`, float32 `[out_features, in_features]`, likewise of what the layer's output is added to;
    or None.
    heldout: the same of other tokens, on which choices are made; or None.
    dropped: how many tokens were left out because they were not finite.
    """

    second_moment: Tensor
    tokens: int
    drift: Tensor | None = None
    residual: Tensor | None = None
    heldout: Statistics | None = None
    dropped: int = 0


class Solution(NamedTuple):
    """What every solver returns and every format stores; the weight is `scale * (codes - zero)`, group by group.

    codes: uint8 `[out_features, in_features]`, each in `[0, 2**bits)`.
    scale: the scheme's scale dtype, `[out_features, groups]`; finite and not 0, may be negative.
    zero: uint8 `[out_features, groups]`; the midpoint on a symmetric grid.
    stats: numbers for the report (loss, damping, a fallback and its reason).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    stats: dict[str, Any]


def check_steps(method: str, without: Iterable[str], known: Iterable[str] = ()) -> frozenset[str]:
    """The names in `without` as a set. Raises UnknownNameError for one that is no step of the method or in `known`."""
    steps = {*getattr(get(method), "STEPS", ()), *known}
    for name in without:
        if name not in steps:
            raise UnknownNameError(f"{method} has no step {name!r} to leave out; it has {', '.join(sorted(steps))}.")
    return frozenset(without)


def get(name: str) -> ModuleType:
    """The solver called `name`, also from entry points in group `wq.solvers`. Raises UnknownNameError."""
    return registry.find("method", name, SOLVERS, "wq.solvers")
