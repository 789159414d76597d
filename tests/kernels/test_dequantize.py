"""The Triton kernel without a GPU: interpreted, it equals the reference; compiled for two GPUs, it spills nothing.

Triton decides when it is imported whether it interprets, so each half runs this file as a script in a process of its
own, all cases in one go, and the tests look at what it printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GUARD = 4096  # values beside an output that must stay as they were

# out, in, groups. The tile is 16 x 256: below it, across its border, exactly on it.
SHAPES = [(33, 96, 3), (17, 320, 5), (16, 256, 1), (40, 520, 1), (5, 40, 1), (1, 32, 1)]
WIDTHS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
INTERPRETED = {
    f"{bits}-{'sym' if symmetric else 'asym'}-{n}x{k}-{groups}-{scale}-{dtype}": (
        (bits, symmetric), (n, k, groups), scale, dtype
    )
    for bits, symmetric in WIDTHS
    for n, k, groups in SHAPES
    for scale, dtype in (
        [("float16", "float16"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
        if (n, k) == (33, 96)
        else [("float16", "float16")]
    )
}  # fmt: skip
COMPILED = {
    f"sm_{arch}-{bits}-{'sym' if symmetric else 'asym'}-{dtype}{'-channel' if channel else ''}": (
        arch, (bits, symmetric), dtype, channel
    )
    for arch in (80, 90)
    for bits, symmetric, dtype, channel in [
        *((bits, symmetric, "fp16", False) for bits, symmetric in WIDTHS),
        (4, False, "bf16", False),
        (4, False, "fp32", False),
        (4, False, "fp16", True),
    ]
}  # fmt: skip


def interpret() -> dict[str, str]:
    """Run every interpreted case; what was wrong with each, or an empty text."""
    return {name: _interpret(*case) for name, case in INTERPRETED.items()}


def _interpret(width: tuple[int, bool], shape: tuple[int, int, int], scale_dtype: str, dtype: str) -> str:
    from wq_kernels import reference, triton_dequantize

    (bits, symmetric), (n, k, groups), wanted = width, shape, getattr(torch, dtype)
    packed = _words(n, -(-k * bits // 32))
    scale = (torch.rand(n, groups) + 0.1).to(getattr(torch, scale_dtype))
    zero = None if symmetric else _words(-(-n * bits // 32), groups)
    expected = reference.dequantize(packed, scale, zero, bits, k, wanted)
    buffers, real = [], torch.empty

    def poisoned(*size: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        buffers.append(torch.full((GUARD + n * k + GUARD,), torch.nan, dtype=dtype))
        return buffers[-1][GUARD:-GUARD].view(size)

    torch.empty = poisoned  # type: ignore[assignment]
    try:
        # Rows that are not contiguous must not matter either.
        actual = triton_dequantize.dequantize(packed.t().contiguous().t(), scale, zero, bits, k, wanted)
    finally:
        torch.empty = real
    if len(buffers) != 1 or not (buffers[0][:GUARD].isnan().all() and buffers[0][-GUARD:].isnan().all()):
        return "wrote outside of its output"
    if actual.isnan().any():
        return f"left {int(actual.isnan().sum())} values unwritten"
    if wanted is torch.bfloat16:  # the interpreter truncates where a GPU rounds
        far = int((actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max())
        return "" if far <= 1 else f"{far} units in the last place off"
    return "" if torch.equal(actual, expected) else f"off by {(actual - expected).abs().max()}"


def _words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def compile_ahead() -> dict[str, str]:
    """Compile every case without a driver; what cuobjdump says about its resources, or an empty text without it."""
    return {name: _compile(*case) for name, case in COMPILED.items()}


def _compile(arch: int, width: tuple[int, bool], dtype: str, channel: bool) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wq_kernels import triton_dequantize

    kernel = triton_dequantize._dequantize_kernel
    constants = dict(zip(("BITS", "SYMMETRIC"), width, strict=True))
    constants |= {"ROWS": triton_dequantize._ROWS, "COLUMNS": triton_dequantize._COLUMNS}
    if channel:
        constants["groups"] = 1  # the launcher makes a constant of an integer that is 1
    types = {"packed_ptr": "*i32", "scale_ptr": f"*{dtype}", "zero_ptr": "*i32", "out_ptr": f"*{dtype}"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = ("packed_ptr", "scale_ptr", "zero_ptr", "out_ptr", "N", "K", "words", "group_size")
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def run_script(what: str, folder: Path, **env: str) -> dict[str, str]:
    pytest.importorskip("triton", reason="triton is not installed: the kernel can neither be interpreted nor compiled")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, __file__, what],
        capture_output=True,
        text=True,
        timeout=300,
        env={**inherited, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder), **env},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_script("interpret", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_script("compile", tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", INTERPRETED)
def test_the_interpreted_kernel_equals_the_reference_and_writes_its_output_only(
    interpreted: dict[str, str], case: str
) -> None:
    assert interpreted[case] == ""


@pytest.mark.parametrize("case", COMPILED)
def test_the_kernel_compiles_ahead_of_time_and_uses_no_local_memory(compiled: dict[str, str], case: str) -> None:
    usage = compiled[case]
    if not usage:
        pytest.skip("compiled, but this triton ships no cuobjdump to look for spills with")
    assert "STACK:0 " in usage
    assert "LOCAL:0 " in usage


@pytest.mark.parametrize("bits", range(1, 9))
def test_only_widths_whose_values_stay_within_a_word_are_supported(bits: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from wq_kernels import triton_dequantize

    assert triton_dequantize.supports(bits) == (bits in (2, 4, 8))


def test_the_kernel_is_launched_on_the_device_of_the_tensors() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from wq_kernels import triton_dequantize

    second = triton_dequantize._on(torch.device("cuda", 1))
    assert isinstance(second, torch.cuda.device)
    assert second.idx == 1


if __name__ == "__main__":
    torch.manual_seed(0)
    scripts: dict[str, Callable[[], dict[str, str]]] = {"interpret": interpret, "compile": compile_ahead}
    print(json.dumps(scripts[sys.argv[1]]()))
