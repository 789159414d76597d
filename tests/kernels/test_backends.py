"""The reference backend decodes what an independent decoder decodes; backends are chosen from one registry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import wq.layers.ops
import wq_kernels
from wq_kernels import reference

PACKAGE = Path(wq_kernels.__file__).parent
WORD = 0xFFFFFFFF

each_width = pytest.mark.parametrize("bits", range(1, 9))


def random_words(*shape: int) -> Tensor:
    """Any bits, the sign bit included."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def decode(words: list[int], bits: int, count: int) -> list[int]:
    """One bit after another: bit j of value i is bit `i * bits + j` of the stream."""
    stream = "".join(f"{word & WORD:032b}"[::-1] for word in words)
    return [int(stream[i * bits : (i + 1) * bits][::-1], 2) for i in range(count)]


def dense_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, in_features: int) -> Tensor:
    """The weight in float64, value by value."""
    out_features, groups = scale.shape
    codes = [decode(row.tolist(), bits, in_features) for row in packed]
    points = [[1 << (bits - 1)] * out_features] * groups
    if zero is not None:
        points = [decode(column.tolist(), bits, out_features) for column in zero.t()]
    weight = torch.empty(out_features, in_features, dtype=torch.float64)
    for n in range(out_features):
        for k in range(in_features):
            g = k * groups // in_features
            weight[n, k] = scale[n, g].item() * (codes[n][k] - points[g][n])
    return weight


def random_weight(
    bits: int, symmetric: bool, out_features: int, in_features: int, groups: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """packed, scale and zero of random bits, bits after the last value included."""
    packed = random_words(out_features, -(-in_features * bits // 32))
    zero = None if symmetric else random_words(-(-out_features * bits // 32), groups)
    return packed, torch.rand(out_features, groups).to(dtype), zero


@each_width
@pytest.mark.parametrize("count", [1, 5, 31, 32, 33, 67])
def test_unpack_equals_a_decoder_that_goes_bit_by_bit(bits: int, count: int) -> None:
    stream = random_words(3, -(-count * bits // 32))
    values = reference.unpack(stream, bits, count)
    assert values.dtype == torch.uint8
    assert values.tolist() == [decode(row.tolist(), bits, count) for row in stream]


@each_width
def test_unpack_takes_leading_dimensions_and_any_strides(bits: int) -> None:
    stream = random_words(bits, 3, 2).permute(1, 2, 0)
    values = reference.unpack(stream, bits, 32)
    assert values.shape == (3, 2, 32)
    for i in range(3):
        for j in range(2):
            assert values[i, j].tolist() == decode(stream[i, j].tolist(), bits, 32)


@each_width
def test_unpack_leaves_its_input_as_it_was(bits: int) -> None:
    stream = random_words(3, 2 * bits)
    before = stream.clone()
    reference.unpack(stream, bits, 64)
    assert torch.equal(stream, before)


@each_width
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("out_features", "in_features", "groups"), [(7, 33, 1), (9, 40, 5), (33, 64, 2)])
def test_dequantize_equals_arithmetic_value_by_value(
    bits: int, symmetric: bool, out_features: int, in_features: int, groups: int
) -> None:
    weight = random_weight(bits, symmetric, out_features, in_features, groups)
    expected = dense_weight(*weight, bits, in_features)
    actual = reference.dequantize(*weight, bits, in_features, torch.float64)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dequantize_rounds_once(scale: torch.dtype, dtype: torch.dtype) -> None:
    weight = random_weight(8, False, 9, 64, 2, scale)
    exact = dense_weight(*weight, 8, 64)
    # A product of an 8-bit difference and a 16-bit scale is exact in float32; that of a float32 scale is rounded to it.
    assert torch.equal(reference.dequantize(*weight, 8, 64, dtype), exact.float().to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(33,), (3, 33), (2, 3, 33)], ids=str)
def test_linear_is_the_product_with_that_weight(bits: int, shape: tuple[int, ...]) -> None:
    weight = random_weight(bits, False, 7, 33, 1)
    x, bias = torch.randn(shape), torch.randn(7)
    dense = dense_weight(*weight, bits, 33)
    actual = reference.linear(x, *weight, bias, bits, 33)
    assert actual.dtype == x.dtype
    torch.testing.assert_close(actual, functional.linear(x.double(), dense, bias.double()).float())
    without = reference.linear(x, *weight, None, bits, 33)
    torch.testing.assert_close(without, functional.linear(x.double(), dense).float())


Registry = Callable[..., None]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """`registry(name=(module, devices), ...)` puts entries before the real ones; undone after the test."""

    def prepend(**entries: tuple[str, tuple[str, ...]]) -> None:
        monkeypatch.setattr(wq_kernels, "BACKENDS", {**entries, **wq_kernels.BACKENDS})
        wq_kernels.select.cache_clear()

    wq_kernels.select.cache_clear()
    yield prepend
    wq_kernels.select.cache_clear()


@pytest.fixture
def dummy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend that takes 4 bits and answers with sevens."""
    module = ModuleType("dummy_backend")
    module.supports = lambda bits: bits == 4
    module.dequantize = lambda packed, scale, zero, bits, in_features, dtype: torch.full(
        (scale.shape[0], in_features), 7.0, dtype=dtype
    )
    module.linear = lambda x, packed, scale, zero, bias, bits, in_features: x.new_full(
        (*x.shape[:-1], scale.shape[0]), 7.0
    )
    monkeypatch.setitem(sys.modules, "dummy_backend", module)
    return module


def test_reference_is_last_and_takes_every_device(registry: Registry) -> None:
    assert list(wq_kernels.BACKENDS)[-1] == "reference"
    assert wq_kernels.select("cpu", 4) is reference
    assert wq_kernels.select("a device of the future", 3) is reference


@pytest.mark.parametrize("name", ["no_such_module_at_all", "wq_kernels.no_such_backend"])
def test_a_backend_that_cannot_be_imported_is_passed_over(registry: Registry, name: str) -> None:
    registry(broken=(name, ("cpu",)))
    assert wq_kernels.select("cpu", 4) is reference
    with pytest.raises(ImportError):
        wq_kernels.get("broken")


def test_a_backend_whose_dependency_is_absent_is_passed_over(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # `import triton` now raises ImportError
    monkeypatch.delitem(sys.modules, "wq_kernels.triton_dequantize", raising=False)
    assert wq_kernels.select("cuda", 4) is reference


def test_a_backend_that_does_not_support_the_width_or_device_is_passed_over(
    registry: Registry, dummy: ModuleType
) -> None:
    registry(dummy=("dummy_backend", ("cpu",)))
    assert wq_kernels.select("cpu", 4) is dummy
    assert wq_kernels.select("cpu", 3) is reference
    assert wq_kernels.select("mps", 4) is reference


def test_a_width_that_nobody_supports_is_an_error_that_names_it(registry: Registry) -> None:
    with pytest.raises(LookupError, match="9 bits on cpu"):
        wq_kernels.select("cpu", 9)


def test_one_line_in_the_registry_is_enough_for_the_op(registry: Registry, dummy: ModuleType) -> None:
    packed, scale, _ = random_weight(4, True, 7, 32, 1)
    x = torch.randn(2, 3, 32, requires_grad=True)
    registry(dummy=("dummy_backend", ("cpu",)))
    y = wq.layers.ops.linear(x, packed, scale, None, None, 4, 32)
    assert torch.equal(y, torch.full((2, 3, 7), 7.0))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3, 32), 49.0))  # 7 rows of sevens


def isolated(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_importing_the_package_imports_no_backend_and_no_triton(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
import wq_kernels
print([n for n in sys.modules if n.partition(".")[0] in ("torch", "triton", "wq") or n.startswith("wq_kernels.")])
"""
    done = isolated(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_package_works_under_another_name_as_the_hub_loads_it(tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
sys.modules["wq_kernels"] = None  # what the Hub delivers is not installed
spec = importlib.util.spec_from_file_location("hub_0a1b", {str(PACKAGE / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["hub_0a1b"] = module
spec.loader.exec_module(module)
print(module.select("cpu", 4).supports(4))
"""
    done = isolated(code, tmp_path)
    assert done.stdout.strip() == "True", done.stderr
