"""The grouped kernel without a GPU: interpreted, every row meets the weight of its own expert, in any routing.

Triton decides when it is imported whether it interprets, so this file runs itself as a script in a process of its own,
all cases in one go, and the tests look at what it printed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import pytest
import torch
from interpreter import attempt, backwards, bounds_checked, guarded, poisoned, run_script, tiled_weight
from torch import Tensor

COUNT, BATCH = 160, 8  # cases, and cases looked at in one test


@dataclass(frozen=True)
class Case:
    """One call of `wq_kernels.expert_linear`."""

    experts: int
    inputs: int
    top: int  # output rows of each input row
    routing: str
    n: int
    columns: tuple[int, int]  # in_features, group size
    bits: int
    symmetric: bool
    dtype: str
    bias: str  # its dtype, or nothing
    scale_weights: bool
    target: str
    index: str  # dtype of the numbers of experts

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


CHOICES: dict[str, list[Any]] = {
    "experts": [1, 2, 3, 5, 8],
    "inputs": [1, 3, 17, 40, 70],
    "top": [1, 2, 4],
    "routing": ["random", "one", "few", "holes", "nobody"],
    "n": [1, 17, 33, 130],
    "columns": [(96, 32), (192, 64), (128, 128), (320, 64), (384, 128), (512, 256), (33, 33), (200, 200)],
    "bits": [2, 4, 8],
    "symmetric": [False, True],
    "dtype": ["float16", "bfloat16"],
    "bias": ["", "like x", "float32"],
    "scale_weights": [False, True],
    "target": ["interpreter", "generic"],
    "index": ["int32", "int64"],
}


@cache
def cases() -> tuple[Case, ...]:
    """Distinct random cases. The interpreter's bfloat16 arithmetic is wrong unless everything is widened."""
    draw, found = random.Random(0), dict[Case, None]()
    while len(found) < COUNT:
        case = Case(**{name: draw.choice(values) for name, values in CHOICES.items()})
        small = case.inputs * case.top * case.n < 6000
        if small and (case.target == "interpreter" or case.dtype == "float16"):
            found[case] = None
    return tuple(found)


def route(routing: str, rows: int, experts: int) -> Tensor:
    """The expert of each row; some of nobody."""
    if routing == "one":
        return torch.full((rows,), experts - 1)
    if routing == "few":  # the others have no rows
        return torch.randint(max(1, experts // 2), (rows,))
    owners = torch.randint(experts, (rows,))
    if routing == "holes":
        owners[torch.rand(rows) < 0.4] = -1
        owners[torch.rand(rows) < 0.2] = experts
    return torch.full((rows,), -1) if routing == "nobody" else owners


def run_case(case: Case) -> dict[str, Any]:
    """Call, and call again with the thread blocks in the opposite order. What was wrong, and how many tiles it took."""
    import wq_kernels
    from wq_kernels import configs, experts

    k, group = case.columns
    made = [tiled_weight(case.bits, case.symmetric, case.n, k, group, torch.float16) for _ in range(case.experts)]
    weight = [guarded(torch.stack(tensors)) for tensors in zip(*(tensors for tensors, _ in made), strict=True)]
    x = guarded(torch.randn(case.inputs, k).to(getattr(torch, case.dtype)))
    bias = torch.randn(case.experts, case.n).to(x.dtype if case.bias == "like x" else torch.float32)
    owners = route(case.routing, case.inputs * case.top, case.experts).to(getattr(torch, case.index))
    exact = exact_product(x, owners, torch.stack([dense for _, dense in made]), bias if case.bias else None)
    tiles, sort = [], experts.sort_rows

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        places, own = sort(*arguments)
        tiles.append(int((own >= 0).sum()))
        return places, own

    with pytest.MonkeyPatch.context() as patch, poisoned() as problems:
        patch.setattr(experts, "target", lambda device: case.target)
        patch.setattr(experts, "sort_rows", counted)
        tile = configs.Config(16 if case.n < 64 else 64, 16, 4, 2, case.scale_weights)
        patch.setattr(configs, "choose", lambda *_: tile)
        call = (x, owners, *weight, guarded(bias) if case.bias else None, case.bits, case.n, k)
        first = wq_kernels.expert_linear(*call)
        with backwards():
            second = wq_kernels.expert_linear(*call)
    problems += compare(case, first, exact, (owners < 0) | (owners >= case.experts))
    if not torch.equal(first, second):
        problems.append("depends on the order of the thread blocks")
    return {"problem": "; ".join(problems), "tiles": tiles[0]}


def exact_product(x: Tensor, owners: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Row by row, in float64."""
    y = torch.zeros(len(owners), weights.shape[1], dtype=torch.float64)
    for row, owner in enumerate(owners.tolist()):
        if 0 <= owner < len(weights):
            y[row] = weights[owner] @ x[row * len(x) // len(owners)].double()
            y[row] += 0 if bias is None else bias[owner].double()
    return y


def compare(case: Case, y: Tensor, exact: Tensor, nobodys: Tensor) -> list[str]:
    """What is wrong with a result."""
    if y.shape != exact.shape or str(y.dtype) != f"torch.{case.dtype}":
        return [f"made {y.dtype} {list(y.shape)}"]
    if y.isnan().any():
        return ["used what is not its own"]
    if y[nobodys].any():
        return ["computed rows that belong to nobody"]
    # The interpreter truncates to bfloat16: up to 2**-7 for one value. Weights that "generic" scales are rounded too.
    tolerance = {"bfloat16": 2**-7, "float16": 1e-3 if case.target == "generic" and case.scale_weights else 6e-4}
    size = max(exact.norm(), exact.numel() ** 0.5)  # where a few values happen to be small, they are no yardstick
    error = float((y.double() - exact).norm() / size)
    return [] if error <= tolerance[case.dtype] else [f"is wrong by {error:.1e}"]


def run_wide(dtype: str) -> dict[str, Any]:
    """The table's own tile, and float32, which no kernel takes."""
    from wq_kernels import experts, layout

    made = [tiled_weight(4, False, 33, 96, 32, torch.float16)[0] for _ in range(3)]
    weight = [torch.stack(tensors) for tensors in zip(*made, strict=True)]
    x, owners = torch.randn(50, 96).to(getattr(torch, dtype)), torch.randint(-1, 3, (100,))
    exact = layout.expert_linear(x.double(), owners, *weight, None, 4, 33, 96)
    with poisoned() as problems:
        y = experts.expert_linear(x, owners, *weight, None, 4, 33, 96)
        none = experts.expert_linear(x[:0], owners[:0], *weight, None, 4, 33, 96)
    error = float((y.double() - exact).norm() / exact.norm())
    if y.dtype != x.dtype or not error < {"float16": 6e-4, "bfloat16": 6e-3, "float32": 1e-6}[dtype]:
        problems.append(f"{y.dtype}, wrong by {error:.1e}")
    if none.shape != (0, 33) or none.dtype != x.dtype:
        problems.append(f"made {none.dtype} {list(none.shape)} of nothing")
    return {"problem": "; ".join(problems)}


def run_all() -> dict[str, Any]:
    """Everything that needs the interpreter."""
    from wq_kernels import registry

    with pytest.MonkeyPatch.context() as patch, bounds_checked():
        patch.setitem(registry.BACKENDS, "fused", registry.Backend(".fused", "tiled", ("cpu",)))
        return {
            "cases": {str(case): attempt(run_case, case) for case in cases()},
            "wide": {dtype: attempt(run_wide, dtype) for dtype in ("float16", "bfloat16", "float32")},
        }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script(__file__, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("start", range(0, COUNT, BATCH))
def test_the_kernel_equals_float64_in_any_routing_and_writes_its_output_only(
    interpreted: dict[str, Any], start: int
) -> None:
    results = interpreted["cases"]
    batch = [str(case) for case in cases()[start : start + BATCH]]
    assert {name: results[name]["problem"] for name in batch if results[name]["problem"]} == {}


def test_the_cases_have_every_choice_and_experts_with_several_tiles(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["cases"]) == len(set(cases())) == COUNT
    for name, values in CHOICES.items():
        assert {getattr(case, name) for case in cases()} == set(values)
    tiles = [(interpreted["cases"][str(case)]["tiles"], case) for case in cases()]
    assert any(count > case.experts for count, case in tiles)
    assert any(0 < count < case.experts for count, case in tiles)
    assert any(count == 0 for count, _ in tiles)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_table_s_tile_and_plain_torch_for_float32_are_right_too(interpreted: dict[str, Any], dtype: str) -> None:
    assert interpreted["wide"][dtype]["problem"] == ""


@pytest.mark.parametrize("routing", CHOICES["routing"])
@pytest.mark.parametrize("experts", [1, 2, 7, 64])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 300])
@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_every_row_of_an_expert_is_in_one_place_of_one_of_its_tiles(
    routing: str, experts: int, rows: int, tile: int, index: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from wq_kernels.experts import sort_rows

    expert_of_row = route(routing, rows, experts).to(index)
    before = expert_of_row.clone()
    places, owners = sort_rows(expert_of_row, experts, tile)
    assert torch.equal(expert_of_row, before)
    assert places.dtype == owners.dtype == torch.int32
    assert places.shape == (len(owners), tile)
    # As many tiles as any routing could need: what a CUDA graph launches must not depend on values.
    assert len(owners) == min(rows, rows // tile + experts)
    assert ((places >= 0) & (places <= rows)).all()
    valid = ((before >= 0) & (before < experts)).nonzero().squeeze(1)
    assert places[places < rows].sort().values.tolist() == valid.tolist()
    for place, owner in zip(places, owners.tolist(), strict=True):
        mine = place[place < rows].long()
        assert (len(mine) > 0) == (0 <= owner < experts)
        assert owner >= -1
        assert (before[mine] == owner).all()
        assert place.tolist() == [*sorted(mine.tolist()), *[rows] * (tile - len(mine))]
    used = torch.bincount(owners[owners >= 0].long(), minlength=experts)
    counts = torch.bincount(before[valid].long(), minlength=experts)
    assert used.tolist() == [-(-count // tile) for count in counts.tolist()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(run_all()))
