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

import wq_kernels
from wq.layers import ops
from wq_kernels import Backend, bags, int4pack, layout, native, reference, registry

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
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("out_features", "in_features", "groups"), [(7, 33, 1), (9, 40, 5), (33, 64, 2)])
def test_dequantize_equals_arithmetic_value_by_value(
    bits: int, symmetric: bool, out_features: int, in_features: int, groups: int
) -> None:
    weight = random_weight(bits, symmetric, out_features, in_features, groups)
    expected = dense_weight(*weight, bits, in_features)
    actual = reference.dequantize(*weight, bits, out_features, in_features, torch.float64)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dequantize_rounds_once(scale: torch.dtype, dtype: torch.dtype) -> None:
    weight = random_weight(8, False, 9, 64, 2, scale)
    exact = dense_weight(*weight, 8, 64)
    # A product of an 8-bit difference and a 16-bit scale is exact in float32; that of a float32 scale is rounded to it.
    assert torch.equal(reference.dequantize(*weight, 8, 9, 64, dtype), exact.float().to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(33,), (3, 33), (2, 3, 33)], ids=str)
def test_linear_is_the_product_with_that_weight(bits: int, shape: tuple[int, ...]) -> None:
    weight = random_weight(bits, False, 7, 33, 1)
    x, bias = torch.randn(shape), torch.randn(7)
    dense = dense_weight(*weight, bits, 33)
    actual = reference.linear(x, *weight, bias, bits, 7, 33)
    assert actual.dtype == x.dtype
    assert error(actual, functional.linear(x.double(), dense, bias.double())) < 1e-6
    without = reference.linear(x, *weight, None, bits, 7, 33)
    assert error(without, functional.linear(x.double(), dense)) < 1e-6


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative: single elements may cancel."""
    return float((actual.double() - exact).norm() / exact.norm())


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """`register(name=Backend(...), ...)` puts entries before the real ones; undone after the test."""

    def prepend(**entries: Backend) -> None:
        monkeypatch.setattr(registry, "BACKENDS", {**entries, **registry.BACKENDS})
        wq_kernels.select.cache_clear()

    wq_kernels.select.cache_clear()
    yield prepend
    wq_kernels.select.cache_clear()


@pytest.fixture
def dummy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend that takes 4 bits and answers with sevens."""
    module = ModuleType("dummy_backend")
    module.supports = lambda bits: bits == 4
    module.dequantize = lambda packed, scale, zero, bits, out_features, in_features, dtype: torch.full(
        (out_features, in_features), 7.0, dtype=dtype
    )
    module.linear = lambda x, packed, scale, zero, bias, bits, out_features, in_features: x.new_full(
        (*x.shape[:-1], out_features), 7.0
    )
    monkeypatch.setitem(sys.modules, "dummy_backend", module)
    return module


def test_plain_torch_is_last_of_its_layout_and_takes_every_device(register: Register) -> None:
    for name, plain in (("stream", reference), ("tiled", layout)):
        assert registry.get([key for key, value in registry.BACKENDS.items() if value.layout == name][-1]) is plain
        assert wq_kernels.select("cpu", 4, name) is plain
        assert wq_kernels.select("a device of the future", 2, name) is plain


def test_the_layout_of_checkpoints_is_the_one_selected_for_unless_another_is_named(register: Register) -> None:
    assert wq_kernels.select("cpu", 4) is reference
    assert {backend.layout for backend in registry.BACKENDS.values()} == set(wq_kernels.LAYOUTS)


@pytest.mark.parametrize("name", ["no_such_module_at_all", "wq_kernels.no_such_backend"])
def test_a_backend_that_cannot_be_imported_is_passed_over(register: Register, name: str) -> None:
    register(broken=Backend(name, "stream", ("cpu",)))
    assert wq_kernels.select("cpu", 4) is reference
    with pytest.raises(ImportError):
        wq_kernels.get("broken")


def test_a_backend_whose_dependency_is_absent_is_passed_over(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
sys.modules["triton"] = None  # `import triton` now raises ImportError
import torch, wq_kernels
print(wq_kernels.select("cuda", 4).__name__, wq_kernels.select("cuda", 4, "tiled").__name__)
print(*wq_kernels.registry.reason(torch.device("cuda", 0), 4, 128, 128, 1))
"""
    done = isolated(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wq_kernels.reference wq_kernels.layout\nstream triton is not installed")


def test_a_backend_that_does_not_support_the_width_device_or_layout_is_passed_over(
    register: Register, dummy: ModuleType
) -> None:
    register(dummy=Backend("dummy_backend", "stream", ("cpu",)))
    assert wq_kernels.select("cpu", 4) is dummy
    assert wq_kernels.select("cpu", 3) is reference
    assert wq_kernels.select("mps", 4) is reference
    assert wq_kernels.select("cpu", 4, "tiled") is layout


@pytest.mark.parametrize(("bits", "name"), [(9, "stream"), (0, "stream"), (3, "tiled"), (4, "no such layout")])
def test_what_nobody_supports_is_an_error_that_names_it(register: Register, bits: int, name: str) -> None:
    with pytest.raises(LookupError, match=f"{bits} bits in the {name} layout on cpu"):
        wq_kernels.select("cpu", bits, name)


def test_one_line_in_the_registry_is_enough_for_the_op(register: Register, dummy: ModuleType) -> None:
    packed, scale, _ = random_weight(4, True, 7, 32, 1)
    x = torch.randn(2, 3, 32, requires_grad=True)
    register(dummy=Backend("dummy_backend", "stream", ("cpu",)))
    y = ops.linear(x, packed, scale, None, None, None, 4, 7, 32, "stream")
    assert torch.equal(y, torch.full((2, 3, 7), 7.0))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3, 32), 49.0))  # 7 rows of sevens


@pytest.mark.parametrize("name", wq_kernels.LAYOUTS)
def test_the_op_selects_columns_by_the_permutation(name: str) -> None:
    packed, scale, zero = random_weight(4, False, 7, 96, 3)
    x, bias, order = torch.randn(5, 96), torch.randn(7), torch.randperm(96)
    expected = functional.linear(x.double()[:, order], dense_weight(packed, scale, zero, 4, 96), bias.double())
    if name == "tiled":
        packed, scale, zero = layout.from_stream(packed, scale, zero, 4, 96)
    for permutation in (order, order.int()):
        y = ops.linear(x, packed, scale, zero, permutation, bias, 4, 7, 96, name)
        torch.testing.assert_close(y, expected.float())


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_the_layout_preferred_where_no_fused_kernel_runs_is_that_of_checkpoints(device: str) -> None:
    assert wq_kernels.preferred_layout(torch.device(device), 4, 4096, 4096, 32, torch.bfloat16) == "stream"


OURS, PACK, BAGS = "wq's kernel, compiled here", "PyTorch's 4-bit kernel", "PyTorch's embedding bags"


@pytest.mark.parametrize(
    ("bits", "out_features", "groups", "dtype", "absent", "expected"),
    [
        (4, 4096, 32, torch.bfloat16, "", ("native", OURS)),
        (3, 4096, 1, torch.float32, "", ("native", OURS)),
        (8, 4096, 32, torch.float16, "native", ("bags", f"{BAGS} (native is absent)")),
        (4, 4096, 32, torch.bfloat16, "native", ("int4pack", f"{PACK} (native is absent)")),
        (4, 4096, 32, torch.bfloat16, "native int4pack", ("bags", f"{BAGS} (native is absent)")),
        (4, 4096, 1, torch.bfloat16, "native", ("int4pack", PACK)),
        (4, 4096, 32, torch.float32, "native", ("bags", BAGS)),
        (2, 4096, 32, torch.float16, "native", ("bags", BAGS)),
        (4, 4098, 32, torch.bfloat16, "", ("bags", BAGS)),
        (4, 4096, 256, torch.bfloat16, "", ("bags", BAGS)),
        (3, 4096, 32, torch.bfloat16, "native", ("stream", "native is absent")),
        (3, 4097, 32, torch.bfloat16, "", ("stream", "4097 rows in 32 groups do not fill")),
        (4, 4096, 32, torch.float64, "", ("stream", "no fused kernel for torch.float64 runs on cpu")),
        (4, 4096, 32, None, "", ("stream", "no fused kernel runs on cpu")),
        (4, 4097, 32, torch.bfloat16, "", ("stream", "4097 rows in 32 groups do not fill")),
        (4, 4096, 32, torch.bfloat16, "native int4pack bags", ("stream", "native is absent")),
        (5, 4096, 32, torch.bfloat16, "", ("stream", "no fused kernel for 5 bits runs on cpu")),
    ],
)
def test_the_layout_preferred_on_a_cpu_is_that_of_the_first_kernel_that_takes_the_weight(
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    out_features: int,
    groups: int,
    dtype: torch.dtype | None,
    absent: str,
    expected: tuple[str, str],
) -> None:
    for name, module in (("native", native), ("int4pack", int4pack), ("bags", bags)):
        why = f"{name} is absent" if name in absent else ""
        monkeypatch.setattr(module, "unusable", lambda bits, why=why: why)
    name, why = registry.reason(torch.device("cpu"), bits, out_features, 4096, groups, dtype)
    assert (name, why[: len(expected[1])]) == expected
    assert wq_kernels.preferred_layout(torch.device("cpu"), bits, out_features, 4096, groups, dtype) == name


@pytest.mark.parametrize(
    ("bits", "in_features", "groups", "unusable", "expected"),
    [
        (4, 4096, 32, "", ("tiled", "fused")),
        (2, 100, 1, "", ("tiled", "fused")),
        (3, 4096, 32, "", ("stream", "3-bit values straddle words")),
        (4, 4096, 256, "", ("stream", "groups of 16 are not")),
        (4, 4096, 32, "an old processor", ("stream", "an old processor")),
    ],
)
def test_the_layout_preferred_on_a_gpu_is_tiled_where_the_fused_kernel_takes_the_weight(
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    in_features: int,
    groups: int,
    unusable: str,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr(registry, "unusable", lambda device: unusable)  # there is no GPU here to ask
    name, why = registry.reason(torch.device("cuda", 0), bits, 7, in_features, groups)
    assert (name, why[: len(expected[1])]) == expected
    assert wq_kernels.preferred_layout(torch.device("cuda", 0), bits, 7, in_features, groups) == name


def isolated(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_importing_the_package_imports_no_backend_no_torch_and_no_triton(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
import wq_kernels
print([n for n in sys.modules if n.partition(".")[0] in ("torch", "triton", "wq") or n.startswith("wq_kernels.")])
"""
    done = isolated(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['wq_kernels.registry']"


@pytest.mark.parametrize("name", ["linear", "dequantize", "expert_linear"])
def test_the_calls_are_found_when_asked_for_and_stay_once_every_backend_is_imported(tmp_path: Path, name: str) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
import wq_kernels
before = wq_kernels.{name}
for backend in wq_kernels.BACKENDS:
    try:
        wq_kernels.get(backend)
    except ImportError:
        pass
print(before is wq_kernels.dispatch.{name}, wq_kernels.{name} is before)
"""
    done = isolated(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True True"


def test_the_package_works_under_another_name_as_the_hub_loads_it(tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
sys.modules["wq_kernels"] = None  # what the Hub delivers is not installed
spec = importlib.util.spec_from_file_location("hub_0a1b", {str(PACKAGE / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["hub_0a1b"] = module
spec.loader.exec_module(module)
print(all(module.select("cpu", 4, layout).supports(4) for layout in module.LAYOUTS), module.linear.__module__)
"""
    done = isolated(code, tmp_path)
    assert done.stdout.strip() == "True hub_0a1b.dispatch", done.stderr
