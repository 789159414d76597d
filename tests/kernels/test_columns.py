"""The solvers' inner loops as Triton programs: interpreted, they equal plain torch; compiled, they do not spill."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import attempt, bounds_checked, guarded, poisoned, run_script

# columns, rows, last code: below the tile of 128 x 32, across its border, exactly on it.
CASES = [(128, 32, 15), (128, 50, 255), (37, 33, 7), (100, 7, 3), (1, 1, 15), (2, 65, 15), (127, 31, 3)]
PROGRAMS = ("sweep", "descend")
ARCHITECTURES = (80, 86, 90, 120)


def interpret() -> dict[str, str]:
    """Run every interpreted case; what was wrong with each, or an empty text."""
    with bounds_checked():
        return {
            f"{run.__name__} {case}": attempt(run, *case)["problem"] for run in (_sweep, _descend) for case in CASES
        }


def _sweep(columns: int, rows: int, top: int) -> dict[str, Any]:
    from wq.solvers.gptq import round_block
    from wq_kernels.sweep import sweep

    whole = torch.randn(columns + 30, columns + 30)  # the factor of a weight with more columns than the block
    whole = torch.linalg.cholesky(whole @ whole.t() / len(whole) + torch.eye(len(whole))).t().contiguous()
    factor = guarded(whole)[10 : 10 + columns, 10 : 10 + columns]
    scale = 0.1 + torch.rand(columns, rows)
    scale *= torch.where(torch.rand(columns, rows) < 0.3, -1.0, 1.0)
    zero = torch.randint(0, top + 1, (columns, rows)).float()
    weight = (torch.randint(-1, top + 2, (columns, rows)) - zero + 0.8 * torch.rand(columns, rows) - 0.4) * scale
    expected, errors = round_block(weight.clone(), factor, scale, zero, top)
    with poisoned() as problems:
        codes, found = sweep(guarded(weight), factor, guarded(scale), guarded(zero), top)
    differing = (codes != expected).any(0)  # a tie that falls the other way changes all that follows in its row
    if differing.float().mean() > 0.02:
        problems.append(f"{int(differing.sum())} of {rows} rows have other codes")
    if (found - errors)[:, ~differing].abs().max() > 1e-4:
        problems.append(f"errors are off by {(found - errors)[:, ~differing].abs().max()}")
    return {"problem": "; ".join(problems)}


def _descend(columns: int, rows: int, top: int) -> dict[str, Any]:
    from wq.solvers.refine import move_block
    from wq_kernels.descend import descend

    whole = torch.randn(columns + 30, columns + 30)  # the Hessian of a weight with more columns than the block
    whole = guarded(whole @ whole.t() / len(whole) + torch.eye(len(whole)))
    hessian = whole[10 : 10 + columns, 10 : 10 + columns]
    scale = 0.1 + torch.rand(columns, rows)
    scale *= torch.where(torch.rand(columns, rows) < 0.3, -1.0, 1.0)
    codes = torch.randint(0, top + 1, (columns, rows)).float()
    residual = torch.randn(columns, rows)
    expected, mine = codes.clone(), guarded(codes)
    moves = move_block(expected, residual.clone(), hessian, scale, top)
    with poisoned() as problems:
        found = descend(mine, guarded(residual), hessian, guarded(scale), top)
    if torch.equal(expected, codes) and columns > 1:
        problems.append("no code moves: the case tests nothing")
    differing = (mine != expected).any(0)  # a tie that falls the other way changes all that follows in its row
    if differing.float().mean() > 0.02:
        problems.append(f"{int(differing.sum())} of {rows} rows have other codes")
    if (found - moves)[:, ~differing].abs().max() > 1e-4:
        problems.append(f"moves are off by {(found - moves)[:, ~differing].abs().max()}")
    return {"problem": "; ".join(problems)}


def compile_ahead() -> dict[str, str]:
    """Compile for processors that are not here; what cuobjdump says about its resources, or an empty text without."""
    return {
        f"{name} {architecture}": _compile(name, architecture) for name in PROGRAMS for architecture in ARCHITECTURES
    }


def _compile(name: str, architecture: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"wq_kernels.{name}")
    kernel = getattr(module, f"_{name}_kernel")
    constants = {"COLUMNS": module.COLUMNS, "ROWS": module.ROWS, "TO_INTEGER": module._TO_INTEGER}
    types = {argument: "*fp32" for argument in kernel.arg_names if argument.endswith("_ptr")} | {"top": "fp32"}
    if name == "sweep":
        types["codes_ptr"] = "*u8"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    named = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        ASTSource(kernel, signature, named),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": module.WARPS},
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_script(__file__, tmp_path_factory.mktemp("triton"), "interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_script(__file__, tmp_path_factory.mktemp("triton"), "compile")


@pytest.mark.parametrize("case", map(str, CASES))
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_does_what_plain_torch_does_and_writes_its_output_only(
    interpreted: dict[str, str], program: str, case: str
) -> None:
    assert interpreted[f"_{program} {case}"] == ""


@pytest.mark.parametrize("architecture", map(str, ARCHITECTURES))
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_compiles_ahead_of_time_and_uses_no_local_memory(
    compiled: dict[str, str], program: str, architecture: str
) -> None:
    usage = compiled[f"{program} {architecture}"]
    if not usage:
        pytest.skip("compiled, but this triton ships no cuobjdump to look for spills with")
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scripts: dict[str, Callable[[], dict[str, str]]] = {"interpret": interpret, "compile": compile_ahead}
    print(json.dumps(scripts[sys.argv[1]]()))
