"""The fused linear kernel without a GPU: interpreted, it equals a product in float64 and touches its own memory only.

Triton decides when it is imported whether it interprets, so this file runs itself as a script in a process of its own,
all cases in one go, and the tests look at what it printed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from interpreter import attempt, backwards, bounds_checked, guarded, poisoned, run_script, tiled_weight
from torch import Tensor

COUNT, BATCH = 640, 10  # cases, and cases looked at in one test
TABLE = (0, 0, False)  # the tile that the table has for the case


@dataclass(frozen=True)
class Case:
    """One call of `wq_kernels.linear`."""

    m: int
    n: int
    columns: tuple[int, int]  # in_features, group size
    bits: int
    symmetric: bool
    dtype: str
    scale: str
    bias: str  # its dtype, or nothing
    splits: int  # 0 leaves it to the formula; never more than there are blocks
    tile: tuple[int, int, bool]  # rows_n, rows_m, scale_weights
    target: str
    permuted: bool
    shape: str  # of x

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @property
    def blocks(self) -> int:
        """What the layout makes of the columns: 512 / bits columns are a block."""
        return -(-self.columns[0] * self.bits // 512)

    @property
    def work(self) -> int:
        """Runs of `dot` that the interpreter has to go through, about."""
        rows_n, rows_m = self.tile[:2] if self.tile != TABLE else (128, min(-(-self.m // 16) * 16, 64))
        return -(-self.n // rows_n) * -(-self.m // rows_m) * self.blocks * 16 // self.bits


CHOICES: dict[str, list[Any]] = {
    "m": [1, 2, 5, 16, 17, 33, 64, 129, 256],
    "n": [1, 16, 17, 33, 96, 130],
    # Most are no multiple of a block of 64, 128 or 256 columns; those of whole rows are no multiple of anything.
    "columns": [
        (96, 32), (160, 32), (512, 32), (192, 64), (320, 64), (384, 128), (640, 128), (512, 256), (768, 256),
        (1024, 512), (1, 1), (33, 33), (96, 96), (200, 200), (777, 777), (1100, 1100),
    ],
    "bits": [2, 4, 8],
    "symmetric": [False, True],
    "dtype": ["float16", "bfloat16"],
    "scale": ["float16", "bfloat16", "float32"],
    "bias": ["", "like x", "float32"],
    "splits": [0, 1, 2, 3, 5, 7],
    "tile": [TABLE, TABLE, (16, 16, False), (32, 64, False), (64, 128, True), (256, 32, True)],
    "target": ["interpreter", "generic"],
    "permuted": [False, True],
    "shape": ["matrix", "batch", "transposed"],
}  # fmt: skip


def possible(case: Case) -> bool:
    """Whether the interpreter can do it, and soon: its bfloat16 arithmetic is wrong unless everything is widened."""
    return case.work <= 90 and (case.target == "interpreter" or case.dtype == "float16")


@cache
def cases() -> tuple[Case, ...]:
    """Distinct random cases; of several drawn, the one with the most pairs of choices that none had before, or a
    quick one."""
    draw, seen, found = random.Random(0), set(), dict[Case, None]()
    while len(found) < COUNT:
        drawn = [Case(**{name: draw.choice(values) for name, values in CHOICES.items()}) for _ in range(12)]
        fresh = [case for case in drawn if possible(case) and case not in found]
        best = max(fresh, key=lambda case: (len(pairs(case) - seen), case.work <= 24))
        found[best] = None
        seen |= pairs(best)
    return tuple(found)


def pairs(case: Case) -> set[tuple[object, ...]]:
    """Every two choices that a case combines."""
    choices = [(field.name, getattr(case, field.name)) for field in fields(case)]
    return set(combinations(choices, 2))


def relative_error(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Of a product, in the Frobenius norm, against float64. A result that happens to be small is no yardstick: it is
    measured against what the product's size would be if the signs were random."""
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    size = max(exact.norm(), (x.double().square() @ weight.t().square()).sum().sqrt())
    return float((actual.double() - exact).norm() / size)


def tolerance(case: Case, outputs: int) -> float:
    """Relative, for the norm. The interpreter truncates to bfloat16: up to 2**-7 for one value, 3.3e-3 for many."""
    if case.dtype == "bfloat16":
        return 6e-3 if outputs > 100 else 2**-7
    if case.target == "generic" and (case.tile == TABLE or case.tile[2]):
        return 1e-3  # the scaled weight is rounded to float16 as well, and so is its scale
    return 6e-4


def inputs(case: Case, k: int) -> Tensor:
    """x in the wanted shape; the same number of rows in all of them."""
    dtype = getattr(torch, case.dtype)
    if case.shape == "transposed":
        return torch.randn(k, case.m).to(dtype).t()
    x = guarded(torch.randn(case.m, k).to(dtype))
    return x.view(-1, 1, case.m, k) if case.shape == "batch" else x


def run_case(case: Case) -> dict[str, Any]:
    """Call, and call again with the thread blocks in the opposite order. What was wrong, and in how many parts."""
    import wq_kernels
    from wq_kernels import configs, counters, fused

    k, group = case.columns
    weight, dense = tiled_weight(case.bits, case.symmetric, case.n, k, group, getattr(torch, case.scale))
    weight = tuple(guarded(tensor) for tensor in weight)
    x, order = inputs(case, k), torch.randperm(k) if case.permuted else None
    bias = guarded(torch.randn(case.n).to(x.dtype if case.bias == "like x" else torch.float32)) if case.bias else None
    splits, counted, split, take = [], [], configs.split, counters.Arena.take

    def forced(*arguments: Any) -> int:
        splits.append(min(case.splits, case.blocks) if case.splits else split(*arguments))
        return splits[-1]

    def recorded(*arguments: Any) -> Tensor:
        counted.append(take(*arguments))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch, poisoned() as problems:
        patch.setattr(configs, "split", forced)
        patch.setattr(counters.Arena, "take", recorded)
        patch.setattr(fused, "target", lambda device: case.target)
        if case.tile != TABLE:
            rows_n, rows_m, scale_weights = case.tile
            patch.setattr(configs, "choose", lambda *_: configs.Config(rows_n, rows_m, 4, 2, scale_weights))
        call = (x, *weight, order, bias, case.bits, case.n, k, "tiled")
        first = wq_kernels.linear(*call)
        with backwards():
            second = wq_kernels.linear(*call)
    ordered = x if order is None else x[..., order]
    if first.shape != (*x.shape[:-1], case.n) or first.dtype != x.dtype:
        problems.append(f"made {first.dtype} {list(first.shape)}")
    elif first.isnan().any():
        problems.append(f"left {int(first.isnan().sum())} values unwritten, or used what is not its own")
    elif (error := relative_error(first, ordered, dense, bias)) > tolerance(case, first.numel()):
        problems.append(f"is wrong by {error:.1e}")
    if not torch.equal(first, second):
        problems.append("depends on the order of the thread blocks")
    if any(tensor.any() for tensor in counted):
        problems.append("left its counters behind")
    if (max(splits) > 1) != bool(counted):
        problems.append("counts where nothing is split, or does not where it is")
    return {"problem": "; ".join(problems), "splits": splits[0], "blocks": case.blocks}


# dtype, rows of x, bits, bias; the fused kernel takes none of them
DENSE = [
    (dtype, m, bits, bias)
    for dtype, m in (("float16", 257), ("bfloat16", 257), ("float32", 1), ("float32", 300), ("float64", 3))
    for bits in (2, 4, 8)
    for bias in (False, True)
]
# Weights and results are rounded to 16 bits (bfloat16: truncated, by the interpreter); the library adds in float32.
DENSE_TOLERANCE = {"float16": 1e-3, "bfloat16": 1.2e-2, "float32": 1e-6, "float64": 1e-7}


def run_dense(dtype: str, m: int, bits: int, bias: bool) -> dict[str, Any]:
    """The path of many rows and of float32, with room for sixteen rows of the weight at a time."""
    from wq_kernels import fused

    n, k, pieces = 41, 160, []
    weight, dense = tiled_weight(bits, False, n, k, 32, torch.float16)
    x = torch.randn(m, k).to(getattr(torch, dtype))
    b = torch.randn(n).to(x.dtype) if bias else None
    real = fused.dequantize_tiles
    with pytest.MonkeyPatch.context() as patch, poisoned() as problems:
        patch.setattr(fused, "_SCRATCH", 16 * k * x.element_size())
        patch.setattr(fused, "dequantize_tiles", lambda *call: pieces.append(call[4]) or real(*call))
        y = fused.linear(x, *weight, b, bits, n, k)
    if pieces != [(0, 16), (16, 32), (32, 41)]:
        problems.append(f"dequantized rows {pieces}")
    error = relative_error(y, x, dense, b)
    if y.dtype != x.dtype or not error <= DENSE_TOLERANCE[dtype]:
        problems.append(f"{y.dtype}, wrong by {error:.1e}")
    return {"problem": "; ".join(problems)}


STRIDED = ["x", "packed", "scale", "zero", "bias"]


def run_strided(name: str) -> dict[str, Any]:
    """A tensor that is not contiguous: refused, or read as what it is."""
    import wq_kernels

    n, k = 33, 256
    weight, dense = tiled_weight(4, False, n, k, 32, torch.float16)
    call = {"x": torch.randn(3, k).half(), **dict(zip(STRIDED[1:4], weight, strict=True))}
    call |= {"permutation": None, "bias": torch.randn(n).half()}
    expected = (call["x"], dense, call["bias"])
    call[name] = torch.stack([call[name], call[name]], -1)[..., 0]
    try:
        error = relative_error(wq_kernels.linear(*call.values(), 4, n, k, "tiled"), *expected)
    except ValueError as refusal:
        return {"problem": "" if name in str(refusal) else str(refusal)}
    return {"problem": "" if error < 6e-4 else f"is wrong by {error:.1e}"}


def run_self_tests() -> dict[str, str]:
    """What the self-test says of kernels that work, cannot be launched, and compute something else."""
    from wq_kernels import fused
    from wq_kernels.configs import Device

    cpu, said = torch.device("cpu"), {}
    said["works"] = fused.self_test(cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_fused_kernel", {})
        said["cannot be launched"] = fused.self_test(cpu)
    with pytest.MonkeyPatch.context() as patch:
        linear = fused.linear
        patch.setattr(fused, "linear", lambda *call: linear(*call) * 1.01)
        said["computes something else"] = fused.self_test(cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(fused, "describe", lambda device: Device("an old GPU", "sm_75", 40))
        said["is too old"] = fused.self_test(torch.device("cuda", 0))
    return said


def run_all() -> dict[str, Any]:
    """Everything that needs the interpreter."""
    from wq_kernels import registry

    with pytest.MonkeyPatch.context() as patch, bounds_checked():
        patch.setitem(registry.BACKENDS, "fused", registry.Backend(".fused", "tiled", ("cpu",)))
        return {
            "cases": {str(case): attempt(run_case, case) for case in cases()},
            "dense": {str(case): attempt(run_dense, *case) for case in DENSE},
            "strided": {name: attempt(run_strided, name) for name in STRIDED},
            "self-test": run_self_tests(),
        }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script(__file__, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("start", range(0, COUNT, BATCH))
def test_the_kernel_equals_float64_twice_and_writes_its_output_only(interpreted: dict[str, Any], start: int) -> None:
    results = interpreted["cases"]
    batch = [str(case) for case in cases()[start : start + BATCH]]
    assert {name: results[name]["problem"] for name in batch if results[name]["problem"]} == {}


def test_the_cases_combine_every_two_choices_that_go_together(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["cases"]) == len(set(cases())) == COUNT
    seen = set().union(*(pairs(case) for case in cases()))
    wanted = {
        ((one, a), (other, b)) for one, other in combinations(CHOICES, 2) for a in CHOICES[one] for b in CHOICES[other]
    }
    assert wanted - seen == {(("dtype", "bfloat16"), ("target", "generic"))}  # what the interpreter cannot do


def test_the_cases_split_the_columns_evenly_and_unevenly(interpreted: dict[str, Any]) -> None:
    results = interpreted["cases"].values()
    assert sum(result["splits"] > 1 for result in results) > COUNT // 3
    assert sum(result["blocks"] % result["splits"] > 0 for result in results) > COUNT // 10
    by_formula = [interpreted["cases"][str(case)]["splits"] for case in cases() if not case.splits]
    assert any(splits > 1 for splits in by_formula)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_many_rows_and_float32_are_multiplied_in_pieces_of_the_dense_weight(
    interpreted: dict[str, Any], case: tuple[str, int, int, bool]
) -> None:
    assert interpreted["dense"][str(case)]["problem"] == ""


@pytest.mark.parametrize("name", STRIDED)
def test_a_tensor_that_is_not_contiguous_is_refused_or_read_as_what_it_is(
    interpreted: dict[str, Any], name: str
) -> None:
    assert interpreted["strided"][name]["problem"] == ""


def test_the_self_test_tells_why_a_kernel_is_not_usable(interpreted: dict[str, Any]) -> None:
    said = interpreted["self-test"]
    assert said["works"] == ""
    assert said["cannot be launched"].startswith("KeyError: ")
    assert said["computes something else"] == "its result on this device is wrong by 1.0e-02"
    assert said["is too old"].startswith("sm_75 is older than sm_80")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(run_all()))
