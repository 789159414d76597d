"""Products as PyTorch's embedding bags against float64, at every width they have; the table there and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_backends import error, random_weight
from torch import Tensor

from wq.layers import ops
from wq_kernels import bags, reference

# out, in, groups: short groups, odd sizes, columns that end within a word, whole rows.
SHAPES = [(8, 32, 2), (192, 576, 9), (100, 96, 32), (36, 45, 3), (64, 512, 1)]
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}

each_shape = pytest.mark.parametrize(("out_features", "in_features", "groups"), SHAPES)
each_width = pytest.mark.parametrize("bits", [2, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])

pytestmark = pytest.mark.skipif(bool(bags.unusable()), reason=f"here, {bags.unusable()}")


def prepared(
    bits: int, out_features: int, in_features: int, groups: int, symmetric: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight's table and grid, and the weight in float64."""
    packed, scale, zero = random_weight(bits, symmetric, out_features, in_features, groups, torch.float16)
    exact = reference.dequantize(packed, scale, zero, bits, out_features, in_features, torch.float64)
    grid = bags.make_grid(scale, zero, bits, out_features, in_features)
    return bags.from_stream(packed, bits, in_features), grid, exact


@each_shape
@each_width
def test_there_and_back_again_restores_the_codes(bits: int, out_features: int, in_features: int, groups: int) -> None:
    assert bags.fits(bits, out_features, in_features, groups)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8)
    packed = reference.stream.pack(codes, bits)
    table = bags.from_stream(packed, bits, in_features)
    assert table.shape == (in_features, out_features * bits // 8 + (8 if bits == 8 else 4))
    assert torch.equal(bags.to_stream(table, bits), packed)


@each_width
def test_a_table_is_made_a_piece_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _, _ = random_weight(bits, True, 36, 165, 1)
    whole = bags.from_stream(packed, bits, 165)
    monkeypatch.setattr(bags, "_STEP", 1)
    assert torch.equal(bags.from_stream(packed, bits, 165), whole)


@pytest.mark.parametrize(
    ("bits", "out_features", "in_features", "groups"),
    [(3, 64, 64, 2), (4, 33, 64, 2), (2, 34, 64, 2), (4, 64, 64, 3), (8, 64, 64, 0)],
)
def test_what_bags_do_not_take(bits: int, out_features: int, in_features: int, groups: int) -> None:
    assert not bags.fits(bits, out_features, in_features, groups)


@each_shape
@each_width
@each_grid
@pytest.mark.parametrize("rows", [1, 3, bags.FEW, bags.FEW + 1, 70])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_products_are_near_those_in_float64(
    bits: int, out_features: int, in_features: int, groups: int, symmetric: bool, rows: int, dtype: torch.dtype
) -> None:
    table, grid, exact = prepared(bits, out_features, in_features, groups, symmetric)
    x = torch.randn(rows, in_features).to(dtype)
    y = bags.multiply(x, table, grid, bits)
    assert (y.dtype, tuple(y.shape)) == (dtype, (rows, out_features))
    assert error(y, x.double() @ exact.t()) < BOUND[dtype]


@each_width
@pytest.mark.parametrize("step", [1, 36 * 20, 36 * 15])
def test_runs_of_any_length_give_the_same(bits: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, grid, exact = prepared(bits, 36, 45, 9)
    x = torch.randn(20, 45)
    monkeypatch.setattr(bags, "_STEP", step)
    assert error(bags.multiply(x, table, grid, bits), x.double() @ exact.t()) < 1e-5


@each_width
def test_a_row_is_the_same_whatever_rows_are_beside_it(bits: int) -> None:
    table, grid, _ = prepared(bits, 192, 576, 9, symmetric=True)
    x = torch.randn(bags.FEW, 576)
    alone = [bags.multiply(row.unsqueeze(0), table, grid, bits) for row in x]
    assert torch.equal(bags.multiply(x, table, grid, bits), torch.cat(alone))
    many = torch.randn(100, 576)
    some = bags.multiply(many[:30].contiguous(), table, grid, bits)
    assert torch.equal(bags.multiply(many, table, grid, bits)[:30], some)


@each_width
def test_no_rows_at_all(bits: int) -> None:
    table, grid, _ = prepared(bits, 64, 64, 2)
    assert bags.multiply(torch.empty(0, 64), table, grid, bits).shape == (0, 64)


@each_width
@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_not_finite_in_one_row_stays_there(bits: int, rows: int) -> None:
    table, grid, exact = prepared(bits, 64, 64, 2)
    x = torch.randn(rows + 1, 64)
    x[0, 5] = float("nan")
    y = bags.multiply(x, table, grid, bits)
    assert y[0].isnan().all()
    assert error(y[1:], x[1:].double() @ exact.t()) < 1e-5


@each_width
def test_the_op_takes_any_shape_strides_and_bias(bits: int) -> None:
    table, grid, exact = prepared(bits, 192, 576, 9)
    x, bias = torch.randn(2, 3, 576 * 2)[..., ::2], torch.randn(192, dtype=torch.float16)
    y = ops.on_cpu(x, table, grid, bias, bits, 192, "bags")
    assert (y.dtype, y.shape) == (torch.float32, (2, 3, 192))
    assert error(y, x.double() @ exact.t() + bias.double()) < 1e-5


def test_without_the_bags_of_pytorch_it_says_so(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(bags.__file__).parent.parent)!r})
import torch
from types import SimpleNamespace
torch.ops.quantized = SimpleNamespace()
from wq_kernels import bags
print(bags.unusable(2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert "has no embedding bags of 2 bits" in done.stdout, done.stderr
