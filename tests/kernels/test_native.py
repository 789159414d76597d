"""wq's compiled kernel for CPUs against float64, for every width, dtype and number of rows; its layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_backends import error, random_weight
from torch import Tensor
from torch.nn import functional

from wq.layers import ops
from wq_kernels import compiler, native, reference

BITS = (2, 3, 4, 8)
BF16 = torch.bfloat16
BOUNDS = {torch.float32: 2e-6, torch.float16: 5e-4, BF16: 3e-3}
# out, in, groups: one block of rows and several, of 16 and of 48; groups of one segment, of several, and of odd ones.
SHAPES = [(16, 32, 1), (64, 64, 2), (192, 576, 9), (208, 1184, 1), (48, 2048, 2), (144, 1536, 24)]

each_shape = pytest.mark.parametrize(("out_features", "in_features", "groups"), SHAPES)
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_width = pytest.mark.parametrize("bits", BITS)
each_dtype = pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)

pytestmark = pytest.mark.skipif(bool(native.unusable()), reason=f"here, {native.unusable()}")


def product(x: Tensor, packed: Tensor, grid: Tensor, bits: int) -> Tensor:
    """Where memory held NaN before: what the kernel does not write would show."""
    torch.full((*x.shape[:-1], packed.shape[0] * 16), float("nan"), dtype=x.dtype)
    return native.multiply(x, packed, grid, bits)


def prepared(
    bits: int,
    out_features: int,
    in_features: int,
    groups: int,
    symmetric: bool = False,
    dtype: torch.dtype = BF16,
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's words and grid, and the weight in float64."""
    packed, scale, zero = random_weight(bits, symmetric, out_features, in_features, groups, dtype)
    exact = reference.dequantize(packed, scale, zero, bits, out_features, in_features, torch.float64)
    grid = native.make_grid(scale, zero, bits, out_features, in_features)
    return native.from_stream(packed, bits, in_features), grid, exact


@each_width
@each_shape
def test_there_and_back_again_restores_the_words(bits: int, out_features: int, in_features: int, groups: int) -> None:
    assert native.fits(bits, out_features, in_features, groups)
    packed, _, _ = random_weight(bits, True, out_features, in_features, groups)
    kept = packed.clone()
    ours = native.from_stream(packed, bits, in_features)
    assert (ours.dtype, tuple(ours.shape)) == (torch.int32, (out_features // 16, in_features * bits // 32, 16))
    assert ours.is_contiguous()
    assert torch.equal(native.to_stream(ours, bits), packed)
    assert torch.equal(packed, kept)


@each_width
def test_words_lie_as_the_docstring_says(bits: int) -> None:
    packed, _, _ = random_weight(bits, True, 48, 96, 1)
    ours = native.from_stream(packed, bits, 96)
    side_by_side = packed.view(3, 16, -1).transpose(1, 2)
    if bits == 3:
        assert torch.equal(ours, side_by_side)
        return
    half = 16 // bits  # codes in half a word: those of even columns, then those of odd ones
    for column in range(2 * half):
        place = 16 * (column % 2) + bits * (column // 2)
        mask = (1 << bits) - 1
        assert torch.equal(ours >> place & mask, side_by_side >> bits * column & mask)


@each_width
def test_words_of_any_stride_are_laid_out(bits: int) -> None:
    packed, _, _ = random_weight(bits, True, 48, 96, 1)
    whole = native.from_stream(packed, bits, 96)
    assert torch.equal(native.from_stream(packed.t().contiguous().t(), bits, 96), whole)
    assert torch.equal(native.to_stream(whole.transpose(1, 2).contiguous().transpose(1, 2), bits), packed)
    assert native.from_stream(packed.to("meta"), bits, 96).shape == whole.shape
    with pytest.raises(RuntimeError, match="multiple of 16"):
        native.from_stream(packed[:40], bits, 96)


@pytest.mark.skipif("-mavx512vbmi" not in compiler.processor(), reason="this processor has no lookup of bytes")
@pytest.mark.parametrize("rows", [1, 20])
def test_bytes_that_are_looked_up_are_those_that_are_converted(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, grid, _ = prepared(8, 64, 128, 2)
    x = torch.randn(rows, 128).to(BF16)
    looked_up = native.multiply(x, packed, grid, 8)
    flags = [flag for flag in compiler.processor() if flag != "-mavx512vbmi"]
    monkeypatch.setattr(compiler, "processor", lambda: flags)
    converted = compiler.load(native._SOURCE, WQ_BITS=8).linear.default(x, packed, grid)
    assert torch.equal(looked_up, converted)


@pytest.mark.parametrize(
    ("bits", "out_features", "in_features", "groups"),
    [(5, 64, 64, 2), (4, 40, 64, 2), (4, 64, 96, 6), (4, 64, 80, 1), (4, 64, 64, 3), (4, 64, 64, 0)],
)
def test_what_the_kernel_does_not_take(bits: int, out_features: int, in_features: int, groups: int) -> None:
    assert not native.fits(bits, out_features, in_features, groups)


@each_width
@each_shape
@each_grid
@each_dtype
@pytest.mark.parametrize("scale", [torch.float16, BF16, torch.float32], ids=str)
def test_products_are_near_those_in_float64(
    bits: int,
    out_features: int,
    in_features: int,
    groups: int,
    symmetric: bool,
    dtype: torch.dtype,
    scale: torch.dtype,
) -> None:
    """And a row is the same, bit for bit, whatever rows are beside it."""
    packed, grid, exact = prepared(bits, out_features, in_features, groups, symmetric, scale)
    x = torch.randn(37, in_features).to(dtype)
    y = product(x, packed, grid, bits)
    assert (y.dtype, tuple(y.shape)) == (dtype, (37, out_features))
    assert error(y, x.double() @ exact.t()) < BOUNDS[dtype]
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 25):
        assert torch.equal(product(x[-rows:], packed, grid, bits), y[-rows:]), rows


@each_width
@each_dtype
def test_more_rows_than_are_multiplied_at_once(bits: int, dtype: torch.dtype) -> None:
    packed, grid, exact = prepared(bits, 64, 64, 2)
    x = torch.randn(1030, 64).to(dtype)
    y = product(x, packed, grid, bits)
    assert error(y, x.double() @ exact.t()) < BOUNDS[dtype]
    assert torch.equal(y[510:514], product(x[510:514], packed, grid, bits))


@each_width
@each_dtype
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_the_number_of_threads_changes_nothing(bits: int, dtype: torch.dtype, rows: int) -> None:
    packed, grid, _ = prepared(bits, 1040, 576, 9)
    x = torch.randn(rows, 576).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(product(x, packed, grid, bits))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@each_width
def test_one_column_at_a_time_shows_each_weight(bits: int) -> None:
    packed, grid, exact = prepared(bits, 48, 96, 3, dtype=torch.float32)
    y = product(torch.eye(96), packed, grid, bits)
    torch.testing.assert_close(y.t().double(), exact, rtol=1e-5, atol=1e-5)


@each_dtype
def test_values_that_are_not_finite_stay_in_their_rows(dtype: torch.dtype) -> None:
    packed, grid, exact = prepared(4, 64, 64, 2)
    x = torch.randn(20, 64).to(dtype)
    x[3, 7], x[11, 9] = float("nan"), float("inf")
    y = product(x, packed, grid, 4)
    clean = [row for row in range(20) if row not in (3, 11)]
    assert y[3].isnan().all()
    assert not y[11].isfinite().any()
    assert error(y[clean], x[clean].double() @ exact.t()) < BOUNDS[dtype]


def test_rounding_to_bfloat16_is_to_the_nearest_and_ties_go_to_even() -> None:
    """One column of ones: what comes out is the scale, a float32, rounded."""
    scale = torch.randn(4096, 1) * torch.logspace(-30, 30, 4096)[:, None]
    scale[:4, 0] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 2**-130])
    codes = torch.full((4096, 32), 8, dtype=torch.uint8)
    codes[:, 0] = 9  # one above the midpoint
    from wq_kernels import stream

    packed = native.from_stream(stream.pack(codes, 4), 4, 32)
    grid = native.make_grid(scale, None, 4, 4096, 32)
    for rows in (1, 9):
        y = product(torch.ones(rows, 32, dtype=BF16), packed, grid, 4)
        assert torch.equal(y[-1], scale[:, 0].to(BF16))


def test_no_rows_at_all() -> None:
    packed, grid, _ = prepared(4, 64, 64, 2)
    assert product(torch.empty(0, 64, dtype=BF16), packed, grid, 4).shape == (0, 64)
    assert product(torch.empty(2, 0, 64), packed, grid, 4).shape == (2, 0, 64)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
def test_the_op_takes_any_shape_strides_and_bias(rows: int, lead: tuple[int, ...]) -> None:
    packed, grid, exact = prepared(4, 192, 576, 9)
    x = torch.randn(*lead, rows, 576 * 2).to(BF16)[..., ::2]
    bias = torch.randn(192, dtype=torch.float16)
    y = ops.on_cpu(x, packed, grid, bias, 4, 192, "native")
    assert (y.dtype, y.shape) == (BF16, (*lead, rows, 192))
    assert error(y, functional.linear(x.double(), exact, bias.double())) < 4e-3


def test_one_vector() -> None:
    packed, grid, exact = prepared(4, 64, 64, 2)
    x = torch.randn(64)
    assert error(product(x, packed, grid, 4), exact @ x.double()) < 2e-6


@pytest.mark.parametrize(
    ("x", "packed", "grid", "message"),
    [
        (torch.randn(2, 96), None, None, "x has 96 columns, the weight 64"),
        (torch.randn(2, 64).double(), None, None, "float32, float16 or bfloat16"),
        (torch.randn(2, 64), torch.zeros(4, 8, 8, dtype=torch.int32), None, "packed must be"),
        (torch.randn(2, 64), torch.zeros(4, 8, 16), None, "packed must be"),
        (torch.randn(2, 64), None, torch.zeros(4, 2, 48), "grid must be"),
        (torch.randn(2, 64), None, torch.zeros(3, 2, 48, dtype=torch.uint8), "grid is of another weight"),
        (torch.randn(2, 64), None, torch.zeros(4, 2, 40, dtype=torch.uint8), "grid is of another weight"),
        (torch.randn(2, 64), None, torch.zeros(4, 4, 48, dtype=torch.uint8), "64 columns in 4 groups"),
        (torch.tensor(1.0), None, None, "x has 0 dimensions"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    x: Tensor, packed: Tensor | None, grid: Tensor | None, message: str
) -> None:
    good = prepared(4, 64, 64, 2)
    with pytest.raises(RuntimeError, match=message):
        product(x, good[0] if packed is None else packed, good[1] if grid is None else grid, 4)


@each_width
@pytest.mark.parametrize("rows", [1, 12])
def test_it_compiles_into_a_graph(bits: int, rows: int) -> None:
    packed, grid, _ = prepared(bits, 64, 64, 2)
    x = torch.randn(rows, 64).to(BF16)
    compiled = torch.compile(
        lambda x: ops.on_cpu(x + 0, packed, grid, None, bits, 64, "native"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), product(x, packed, grid, bits))
    torch.library.opcheck(native.op(bits), (x, packed, grid))


def test_another_copy_of_the_package_finds_the_op_as_it_is() -> None:
    native._loaded.cache_clear()
    assert native.op(4) is native.op(4)


@pytest.mark.parametrize("capability", ["no bfloat16", "avx2", "default", "off"])
def test_older_processors(tmp_path: Path, capability: str) -> None:
    """No products in bfloat16, or vectors of eight; what torch has none for is left to torch."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(native.__file__).parent.parent), str(Path(__file__).parent)]!r}
import torch
from wq_kernels import compiler, native, reference
if {capability == "no bfloat16"}:
    compiler._BFLOAT16.clear()
print(native.unusable())
if not native.unusable():
    for bits in {BITS}:
        packed = torch.randint(-2**31, 2**31, (80, 18 * bits)).to(torch.int32)
        zero = torch.randint(-2**31, 2**31, (80 * bits // 32 + 1, 9)).to(torch.int32)
        scale = torch.rand(80, 9).half()
        exact = reference.dequantize(packed, scale, zero, bits, 80, 576, torch.float64)
        ours, grid = native.from_stream(packed, bits, 576), native.make_grid(scale, zero, bits, 80, 576)
        for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 5e-4), (torch.bfloat16, 3e-3)):
            x = torch.randn(21, 576).to(dtype)
            y, expected = native.multiply(x, ours, grid, bits), x.double() @ exact.t()
            assert (y.double() - expected).norm() < bound * expected.norm(), (bits, dtype)
            for rows in (1, 2, 3, 7):
                assert torch.equal(native.multiply(x[:rows], ours, grid, bits), y[:rows]), (bits, dtype, rows)
"""
    lowered = {"no bfloat16": {}, "off": {"WQ_NATIVE": "0"}}.get(capability, {"ATEN_CPU_CAPABILITY": capability})
    environment = os.environ | lowered
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    expected = {
        "no bfloat16": "",
        "avx2": "",
        "default": "nothing is compiled for this processor",
        "off": "WQ_NATIVE is 0",
    }
    assert done.stdout.strip() == expected[capability]
