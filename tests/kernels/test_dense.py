"""The kernels that write a dense weight, without a GPU: interpreted, they equal plain torch; compiled, none spills.

Triton decides when it is imported whether it interprets, so each half runs this file as a script in a process of its
own, all cases in one go, and the tests look at what it printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import any_bits, attempt, bounds_checked, guarded, poisoned, run_script
from torch import Tensor

# out, in, groups. The tile is 16 x 256: below it, across its border, exactly on it.
SHAPES = [(33, 96, 3), (17, 320, 5), (16, 256, 1), (40, 520, 1), (5, 40, 1), (1, 32, 1)]
DTYPES = [("float16", "float16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
WIDTHS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
STREAM = [
    (bits, symmetric, shape, dtypes)
    for bits, symmetric in WIDTHS
    for shape in SHAPES
    for dtypes in (DTYPES if shape == SHAPES[0] else DTYPES[:1])
]

# out, in, group size (0: one group for a whole row), first and last row wanted.
TILED_SHAPES = [
    (33, 96, 32, 0, 33),
    (33, 96, 32, 16, 33),
    (33, 96, 32, 3, 20),
    (40, 320, 64, 0, 40),
    (17, 384, 128, 1, 2),
    (16, 512, 256, 0, 16),
    (1, 100, 0, 0, 1),
    (50, 777, 0, 32, 48),
]
TILED_DTYPES = [*DTYPES, ("float32", "float32"), ("bfloat16", "bfloat16")]
TILED = [
    (bits, symmetric, shape, dtypes)
    for bits, symmetric in WIDTHS
    if bits != 3
    for shape in TILED_SHAPES
    for dtypes in (TILED_DTYPES if shape in TILED_SHAPES[:3] else DTYPES[:1])
]
COMPILED = [
    (kernel, architecture, bits, symmetric, dtype, channel)
    for architecture in (80, 90)
    for kernel, bits, symmetric, dtype, channel in [
        *(("stream", bits, symmetric, "fp16", False) for bits, symmetric in WIDTHS),
        *(
            ("stream", 4, False, dtype, channel)
            for dtype, channel in [("bf16", False), ("fp32", False), ("fp16", True)]
        ),
        *(("tiled", bits, False, "fp16", False) for bits in (2, 4, 8)),
        *(("tiled", 4, False, dtype, False) for dtype in ("bf16", "fp32")),
    ]
]
Dtypes = tuple[str, str]  # of the scales, of the weight


def interpret() -> dict[str, str]:
    """Run every interpreted case; what was wrong with each, or an empty text."""
    with bounds_checked():
        return {
            str(case): attempt(run, *case)["problem"]
            for run, cases in ((_stream, STREAM), (_tiled, TILED))
            for case in cases
        }


def _stream(bits: int, symmetric: bool, shape: tuple[int, int, int], dtypes: Dtypes) -> dict[str, Any]:
    from wq_kernels import reference
    from wq_kernels.dense import dequantize

    n, k, groups = shape
    packed = any_bits(n, -(-k * bits // 32))
    scale = guarded((torch.rand(n, groups) + 0.1).to(getattr(torch, dtypes[0])))
    zero = None if symmetric else guarded(any_bits(-(-n * bits // 32), groups))
    expected = reference.dequantize(packed, scale, zero, bits, n, k, getattr(torch, dtypes[1]))
    # Rows that are not contiguous must not matter either.
    rows = packed.t().contiguous().t()
    return _compare(expected, lambda: dequantize(rows, scale, zero, bits, n, k, expected.dtype))


def _tiled(bits: int, symmetric: bool, shape: tuple[int, int, int, int, int], dtypes: Dtypes) -> dict[str, Any]:
    from wq_kernels import layout
    from wq_kernels.dense import dequantize_tiles

    n, k, group, start, stop = shape
    rows, blocks, columns = n + -n % 16, -(-k * bits // 512), 512 // bits
    groups = blocks * columns // group if group else 1
    words = guarded(any_bits(blocks, rows, 16))
    scale = guarded((torch.rand(groups, rows) + 0.1).to(getattr(torch, dtypes[0])))
    zero = torch.randint(256, (1 if symmetric else groups, rows), dtype=torch.uint8)
    expected = layout.dequantize(words, scale, zero, bits, n, k, getattr(torch, dtypes[1]))[start:stop]
    return _compare(expected, lambda: dequantize_tiles(words, scale, zero, bits, (start, stop), k, expected.dtype))


def _compare(expected: Tensor, run: Callable[[], Tensor]) -> dict[str, Any]:
    with poisoned() as problems:
        actual = run()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        problems.append(f"made {actual.dtype} {list(actual.shape)}")
    elif actual.isnan().any():
        problems.append(f"left {int(actual.isnan().sum())} values unwritten, or used what is not its own")
    elif actual.dtype == torch.bfloat16:  # the interpreter truncates where a GPU rounds
        far = int((actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max())
        problems += [f"{far} units in the last place off"] if far > 1 else []
    elif not torch.equal(actual, expected):
        problems.append(f"off by {(actual - expected).abs().max()}")
    return {"problem": "; ".join(problems)}


def compile_ahead() -> dict[str, str]:
    """Compile every case without a driver; what cuobjdump says about its resources, or an empty text without it."""
    return {str(case): _compile(*case) for case in COMPILED}


def _compile(name: str, architecture: int, bits: int, symmetric: bool, dtype: str, channel: bool) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wq_kernels.dense import _COLUMNS, _ROWS, _dequantize_kernel, _dequantize_tiles_kernel

    kernel = _dequantize_kernel if name == "stream" else _dequantize_tiles_kernel
    constants: dict[str, Any] = {"BITS": bits, "ROWS": _ROWS}
    if name == "stream":
        constants |= {"SYMMETRIC": symmetric, "COLUMNS": _COLUMNS}
        if channel:
            constants["groups"] = 1  # the launcher makes a constant of an integer that is 1
    types = {"packed_ptr": "*i32", "words_ptr": "*i32", "scale_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    types["zero_ptr"] = "*i32" if name == "stream" else "*u8"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name in kernel.arg_names if name in types or name in ("N", "K", "words", "group_size", "rows")]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
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


@pytest.mark.parametrize("case", map(str, STREAM))
def test_the_kernel_for_checkpoints_equals_plain_torch_and_writes_its_output_only(
    interpreted: dict[str, str], case: str
) -> None:
    assert interpreted[case] == ""


@pytest.mark.parametrize("case", map(str, TILED))
def test_the_kernel_for_tiles_equals_plain_torch_in_the_rows_wanted_and_writes_its_output_only(
    interpreted: dict[str, str], case: str
) -> None:
    assert interpreted[case] == ""


@pytest.mark.parametrize("case", map(str, COMPILED))
def test_the_kernels_compile_ahead_of_time_and_use_no_local_memory(compiled: dict[str, str], case: str) -> None:
    usage = compiled[case]
    if not usage:
        pytest.skip("compiled, but this triton ships no cuobjdump to look for spills with")
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage


@pytest.mark.parametrize("bits", range(10))
def test_the_widths_that_checkpoints_have_are_supported(bits: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from wq_kernels.dense import supports

    assert supports(bits) == (bits in (2, 3, 4, 8))


def test_a_kernel_is_launched_on_the_device_of_the_tensors() -> None:
    from wq_kernels import target

    second = target.on(torch.device("cuda", 1))
    assert isinstance(second, torch.cuda.device)
    assert second.idx == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scripts: dict[str, Callable[[], dict[str, str]]] = {"interpret": interpret, "compile": compile_ahead}
    print(json.dumps(scripts[sys.argv[1]]()))
