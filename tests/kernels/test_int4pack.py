"""PyTorch's 4-bit kernel for CPUs, and the dense product for many rows, against float64; its layout there and back."""

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
from wq_kernels import int4pack, reference

# out, in, groups: one block and several, groups shorter and longer than the kernel's, whole rows, many runs of rows.
SHAPES = [(64, 64, 2), (192, 576, 9), (128, 1024, 2), (64, 512, 1), (320, 96, 1)]
BF16 = torch.bfloat16

each_shape = pytest.mark.parametrize(("out_features", "in_features", "groups"), SHAPES)
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_way = pytest.mark.parametrize("rows", [1, 4, 5, 33, int4pack.FEW, int4pack.FEW + 1, 150])

pytestmark = pytest.mark.skipif(bool(int4pack.unusable()), reason=f"here, {int4pack.unusable()}")


def prepared(
    out_features: int, in_features: int, groups: int, symmetric: bool = False, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's bytes and grid, and the weight in float64."""
    packed, scale, zero = random_weight(4, symmetric, out_features, in_features, groups, dtype)
    exact = reference.dequantize(packed, scale, zero, 4, out_features, in_features, torch.float64)
    grid = int4pack.make_grid(scale, zero, 4, out_features, in_features)
    return int4pack.from_stream(packed, 4, in_features), grid, exact


def op(x: Tensor, packed: Tensor, grid: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.on_cpu(x, packed, grid, bias, 4, packed.shape[0], "int4pack")


@each_shape
def test_there_and_back_again_restores_the_words(out_features: int, in_features: int, groups: int) -> None:
    assert int4pack.fits(4, out_features, in_features, groups)
    packed, _, _ = random_weight(4, True, out_features, in_features, groups)
    ours = int4pack.from_stream(packed, 4, in_features)
    assert (ours.dtype, tuple(ours.shape)) == (torch.uint8, (out_features, in_features // 2))
    assert torch.equal(int4pack.to_stream(ours, 4), packed)


def test_a_weight_is_repacked_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _, _ = random_weight(4, True, 320, 96, 1)
    whole = int4pack.from_stream(packed, 4, 96)
    monkeypatch.setattr(int4pack, "_STEP", 1)
    assert torch.equal(int4pack.from_stream(packed, 4, 96), whole)


@pytest.mark.parametrize(
    ("bits", "out_features", "in_features", "groups"),
    [(3, 64, 64, 2), (4, 48, 64, 2), (4, 64, 96, 4), (4, 64, 80, 1), (4, 64, 64, 3), (4, 64, 64, 0)],
)
def test_what_the_kernel_does_not_take(bits: int, out_features: int, in_features: int, groups: int) -> None:
    assert not int4pack.fits(bits, out_features, in_features, groups)


@each_shape
@each_grid
@each_way
@pytest.mark.parametrize("scale", [torch.float16, BF16, torch.float32], ids=str)
def test_products_are_near_those_in_float64(
    out_features: int, in_features: int, groups: int, symmetric: bool, rows: int, scale: torch.dtype
) -> None:
    packed, grid, exact = prepared(out_features, in_features, groups, symmetric, scale)
    x = torch.randn(rows, in_features).to(BF16)
    y = int4pack.multiply(x, packed, grid)
    assert (y.dtype, tuple(y.shape)) == (BF16, (rows, out_features))
    assert error(y, x.double() @ exact.t()) < 4e-3


@pytest.mark.parametrize(("dense", "tile"), [(1, 1), (96 * 128, 96 * 64), (96 * 64 * 3, 32 * 192)])
def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, dense: int, tile: int) -> None:
    """Poisoned scratch: what is not written would show."""
    packed, grid, exact = prepared(320, 96, 3)
    x = torch.randn(70, 96).to(BF16)
    whole = int4pack.multiply(x, packed, grid)
    monkeypatch.setattr(int4pack, "_DENSE", dense)
    monkeypatch.setattr(int4pack, "_TILE", tile)
    poisoned = torch.full((70, 320), float("nan"), dtype=BF16)
    int4pack._multiply_dense(x, packed, grid, poisoned)
    assert error(poisoned, x.double() @ exact.t()) < 4e-3
    assert error(poisoned, whole.double()) < 4e-3


@each_shape
def test_the_dense_tiles_hold_the_weight_rounded_once(out_features: int, in_features: int, groups: int) -> None:
    packed, grid, _ = prepared(out_features, in_features, groups)
    size = in_features // grid.shape[0]
    scale, offset = grid.float().repeat_interleave(size, 0).unbind(-1)
    codes = int4pack._codes(packed, int4pack._block()).t().float()
    expected = codes * scale + (offset - 8 * scale)  # in float32, as in the tiles
    x = torch.eye(in_features).to(BF16)
    y = torch.empty(in_features, out_features, dtype=BF16)
    int4pack._multiply_dense(x, packed, grid, y)
    assert torch.equal(y, expected.to(BF16))


@pytest.mark.parametrize("row", [0, 3, 6])
def test_a_row_is_the_same_whatever_rows_are_beside_it(row: int) -> None:
    """Few rows: the kernel works in rows of four, and rows of another count must not change the sums."""
    packed, grid, _ = prepared(192, 576, 9)
    x = torch.randn(7, 576).to(BF16)
    alone = int4pack.multiply(x[row : row + 1].contiguous(), packed, grid)
    for count in (7, int4pack.FEW):
        beside = torch.cat([x, torch.randn(count - 7, 576).to(BF16)])
        assert torch.equal(int4pack.multiply(beside, packed, grid)[row], alone[0])
    many = torch.cat([x, torch.randn(150, 576).to(BF16)])
    fewer = int4pack.multiply(many[:100].contiguous(), packed, grid)
    assert torch.equal(int4pack.multiply(many, packed, grid)[row], fewer[row])


def test_memory_that_is_kept_serves_in_and_out_of_inference_mode() -> None:
    int4pack._kept.memory = None
    packed, grid, exact = prepared(192, 576, 9)
    x = torch.randn(100, 576).to(BF16)
    with torch.inference_mode():
        first = int4pack.multiply(x, packed, grid)
    assert error(first.clone(), x.double() @ exact.t()) < 4e-3
    kept = int4pack._kept.memory
    kept.fill_(255)  # what is not written would show: these are NaNs
    assert torch.equal(int4pack.multiply(x, packed, grid), first)
    assert int4pack._kept.memory is kept


def test_no_rows_at_all() -> None:
    packed, grid, _ = prepared(64, 64, 2)
    assert int4pack.multiply(torch.empty(0, 64, dtype=BF16), packed, grid).shape == (0, 64)
    assert op(torch.empty(2, 0, 64, dtype=BF16), packed, grid).shape == (2, 0, 64)


@each_way
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
def test_the_op_takes_any_shape_strides_and_bias(rows: int, lead: tuple[int, ...]) -> None:
    packed, grid, exact = prepared(192, 576, 9)
    x = torch.randn(*lead, rows, 576 * 2).to(BF16)[..., ::2]
    bias = torch.randn(192, dtype=torch.float16)
    y = op(x, packed, grid, bias)
    assert (y.dtype, y.shape) == (BF16, (*lead, rows, 192))
    assert error(y, functional.linear(x.double(), exact, bias.double())) < 4e-3


def test_one_vector() -> None:
    packed, grid, exact = prepared(64, 64, 2)
    x = torch.randn(64).to(BF16)
    assert error(op(x, packed, grid), exact @ x.double()) < 4e-3


@pytest.mark.parametrize(("capability", "expected"), [("avx2", ""), ("default", "no vector code for 4 bits")])
def test_older_processors(tmp_path: Path, capability: str, expected: str) -> None:
    """PyTorch lays bytes out otherwise there, and has no fast kernel on the oldest."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(int4pack.__file__).parent.parent), str(Path(__file__).parent)]!r}
import torch
from wq_kernels import int4pack, reference
print(int4pack.unusable())
if not int4pack.unusable():
    packed = torch.randint(-2**31, 2**31, (192, 72)).to(torch.int32)
    zero = torch.randint(-2**31, 2**31, (24, 9)).to(torch.int32)
    scale = torch.rand(192, 9).half()
    exact = reference.dequantize(packed, scale, zero, 4, 192, 576, torch.float64)
    ours, grid = int4pack.from_stream(packed, 4, 576), int4pack.make_grid(scale, zero, 4, 192, 576)
    assert torch.equal(int4pack.to_stream(ours, 4), packed)
    for rows in (1, 100):
        x = torch.randn(rows, 576).bfloat16()
        y, expected = int4pack.multiply(x, ours, grid).double(), x.double() @ exact.t()
        assert (y - expected).norm() < 4e-3 * expected.norm(), rows
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert bool(expected) == bool(done.stdout.strip())
