"""scripts/gpu_check.py without a GPU: its dry run goes through every section, and what is wrong makes it fail."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
SECTIONS = ["correctness", "races", "speed", "experts", "end_to_end"]
TIMED = ["speed", "experts", "end_to_end"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The dry run's process and the JSON it wrote."""
    file = tmp_path_factory.mktemp("gpu_check") / "result.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry", "--out", file], capture_output=True, text=True, cwd=file.parent, timeout=300
    )
    return done, json.loads(file.read_text()) if file.exists() else {}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check

    return gpu_check


def floats(value: Any) -> Iterator[float]:
    """Every number with a fraction in a piece of JSON."""
    if isinstance(value, float):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from floats(item)


def test_the_dry_run_finds_nothing_wrong(dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, result = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["failures"] == []
    for name in ("correctness", "races"):
        assert all(row["ok"] is True for row in result["sections"][name]["rows"])


def test_the_dry_run_goes_through_every_section(
    dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    _, result = dry
    assert list(result["sections"]) == SECTIONS
    for section in result["sections"].values():
        assert section["rows"]
        assert section["cut"] == section["problems"] == []
        assert [row for row in section["rows"] if "error" in row] == []
    kinds = {row.get("kind") for section in result["sections"].values() for row in section["rows"]}
    assert kinds >= {"copy", "matmul", "packed", "peer", "mixture", "build", "pack", "generation"}
    checked = {row["case"].split()[0] for row in result["sections"]["correctness"]["rows"]}
    assert checked == {"package", "linear", "experts", "dense", "dequantize"}
    splits = [row["splits"] for row in result["sections"]["correctness"]["rows"] if "splits" in row]
    assert min(splits) == 1 < max(splits)
    (race, *_) = result["sections"]["races"]["rows"]
    assert race["counters"] > 0
    peers = [row for row in result["sections"]["speed"]["rows"] if row.get("kind") == "peer"]
    assert {row["peer"] for row in peers} == {"tinygemm", "marlin", "gemlite"}
    assert all("absent" in row or row["seconds"] for row in peers)


def test_the_dry_run_says_that_it_measured_nothing(
    dry: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, result = dry
    assert result["dry"] is True
    assert "DRY RUN" in done.stdout
    assert result["machine"]["card"] is None
    assert result["machine"]["torch"] == torch.__version__
    assert list(floats([result["sections"][name] for name in TIMED])) == []
    assert result["targets"]
    assert all(target["met"] is None and target["value"] is None for target in result["targets"])


SPOILS: list[Callable[[Tensor], Tensor]] = [
    lambda y: y[0, 0].mul_(1.05),
    lambda y: y[1, 2].fill_(torch.nan),
    lambda y: y.add_(1),
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_one_wrong_value_makes_the_check_fail(check: ModuleType, spoil: Callable[[Tensor], Tensor]) -> None:
    x, weight = torch.randn(3, 64).half(), torch.randn(5, 64, dtype=torch.float64)
    exact, magnitude = check.exact(x, weight, None)
    result = made(check, correctness=[{"case": "good", **check.compare(exact.half(), exact, magnitude, torch.float16)}])
    assert check.finish(result) == 0
    broken = exact.clone()
    broken[0, 0] = exact[0, 0] = 3.0
    spoil(broken)
    result = made(check, correctness=[{"case": "bad", **check.compare(broken.half(), exact, magnitude, torch.float16)}])
    assert check.finish(result) == 1
    assert "correctness: bad" in result["failures"][0]
    json.dumps(result, allow_nan=False)


def made(check: ModuleType, **rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result with these rows."""
    sections = {name: {"rows": section, "cut": [], "problems": []} for name, section in rows.items()}
    return {"dry": False, "machine": {}, "sections": sections}


def skewed(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, *rest: Any) -> Tensor:
    """One zero point is one too large."""
    from wq_kernels import layout

    wrong = zero.clone()
    wrong[0, 3] += 1
    return layout.linear(x, words, scale, wrong, *rest)


def beside(x: Tensor, *rest: Any) -> Tensor:
    """A value is written behind the end of the output."""
    from wq_kernels import layout

    y = torch.empty(x.shape[0], rest[5], dtype=x.dtype)
    y.copy_(layout.linear(x, *rest))
    torch.as_strided(y, (1,), (1,), y.storage_offset() + y.numel()).fill_(0)
    return y


def unwritten(x: Tensor, *rest: Any) -> Tensor:
    """The last output is forgotten."""
    from wq_kernels import layout

    y = torch.empty(x.shape[0], rest[5], dtype=x.dtype)
    y[:, :-1] = layout.linear(x, *rest)[:, :-1]
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [None, skewed, beside, unwritten])
def test_a_broken_kernel_is_noticed(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor] | None, dtype: torch.dtype
) -> None:
    from wq_kernels import fused, layout

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "linear", kernel or layout.linear)
    case = check.Case("linear", 4, 32, dtype, True, 3, 33, 160, generic=kernel is None)
    row = check.check_linear(check.timing.Dry(), case)
    assert row["ok"] is (kernel is None), row


def test_a_missing_or_broken_off_check_is_a_failure(check: ModuleType) -> None:
    assert check.finish(made(check, correctness=[], races=[{"case": "a", "ok": True}])) == 1
    assert check.finish(made(check, races=[{"case": "a", "error": "RuntimeError: no"}])) == 1
    result = made(check, races=[{"case": "a", "ok": True}])
    assert check.finish(result) == 0
    result["sections"]["races"]["problems"].append("ended with status -11")
    assert check.finish(result) == 1
    assert check.finish(made(check, speed=[{"case": "a", "kind": "peer", "absent": "not installed"}])) == 0


def test_a_process_that_hangs_or_dies_is_a_problem_of_the_section_it_was_in(check: ModuleType, tmp_path: Path) -> None:
    hung = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert "stopped" in check.wait(hung, time.time())
    dead = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert check.wait(dead, time.time() + 30) == "ended with status 3"
    file = tmp_path / "rows.jsonl"
    file.write_text('{"about": {}}\n{"section": "races", "case": "a", "ok": true}\n{"section": "races", "ca')
    result = made(check, correctness=[], races=[])
    check.collect(check.Group(("correctness", "races"), 1, 1.0), "ended with status 3", file, result)
    assert result["sections"]["races"]["rows"] == [{"case": "a", "ok": True}]
    assert result["sections"]["races"]["problems"] == ["ended with status 3"]
    assert result["sections"]["correctness"]["problems"] == []


def test_jobs_after_the_deadline_are_cut_off(check: ModuleType) -> None:
    late = check.Bench(None, time.time() - 1)
    assert check.attempt(late, lambda: pytest.fail("it ran")) == {"cut": True}


def packed(n: int, k: int, m: int, seconds: float, speedup: float, **others: Any) -> dict[str, Any]:
    plain = {"kind": "packed", "dtype": "fp16", "symmetric": True, "bytes": n * k // 2}
    return {**plain, "n": n, "k": k, "m": m, "seconds": seconds, "speedup": speedup, **others, "case": f"{m}x{n}x{k}"}


def test_targets(check: ModuleType) -> None:
    copy = {"kind": "copy", "case": "copy", "bytes_per_second": 3e12}
    rows = [
        copy,
        packed(8192, 8192, 1, 12e-6, 3.0),  # 33.5 MB in 12 µs: 2.8 TB/s
        packed(8192, 8192, 16, 16e-6, 3.0),  # 2.1 TB/s, not enough
        packed(4096, 4096, 1, 6e-6, 2.1),  # too small for a bandwidth; a speed-up
        packed(4096, 14336, 1, 16e-6, 2.1),  # neither
        packed(4096, 4096, 64, 1e-5, 1.8),
        packed(4096, 4096, 4096, 1e-4, 0.93),
        packed(4096, 4096, 64, 1.04e-5, 1.7, dtype="bf16"),
        packed(4096, 4096, 64, 1.06e-5, 1.7, symmetric=False),
    ]
    found = check.targets(rows)
    assert [(target["case"], target["met"]) for target in found] == [
        ("1x8192x8192", True),
        ("16x8192x8192", False),
        ("1x4096x4096", True),
        ("64x4096x4096", False),
        ("4096x4096x4096", True),
        ("64x4096x4096", True),
        ("64x4096x4096", False),
    ]
    assert found[0]["value"] == pytest.approx(33554432 / 12e-6 / 3e12)
    assert check.targets([{"case": "copy", "error": "RuntimeError: no"}, packed(8192, 8192, 1, 12e-6, 3.0)]) == []


def test_every_tile_of_the_table_is_checked_on_a_gpu(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from wq_kernels import configs

    class Machine:
        dry, device = False, torch.device("cuda", 0)

    monkeypatch.setattr(check, "describe", lambda _: configs.Device("a card", "sm_90", 132))
    cases = [case for case in check.cases(Machine()) if case.kernel in ("linear", "experts")]
    for kernel in ("linear", "experts"):
        mine = [case for case in cases if case.kernel == kernel]
        assert {check.tile_of(Machine(), case)[0].rows_m for case in mine} == {16, 32, 64, 128}
        compared = {check.binary(Machine(), case) for case in mine if case.generic}
        assert compared == {check.binary(Machine(), case) for case in mine}
    linear = {(c.bits, c.group, c.dtype, configs.bucket(c.m), c.symmetric) for c in cases if c.kernel == "linear"}
    assert len(linear) == 3 * 5 * 2 * 5 * 2
    keys = [{check.binary(Machine(), case) for case in shard_of(check, cases, i, 4)} for i in range(4)]
    assert sum(map(len, keys)) == len(set.union(*keys))  # no code is compiled twice


def shard_of(check: ModuleType, cases: list[Any], shard: int, shards: int) -> list[Any]:
    class Machine:
        dry, device = False, torch.device("cuda", 0)

    bench = check.Bench(Machine(), time.time() + 60)
    names = {name for name, _ in check.correctness(bench, shard, shards)}
    runs = [run for _, run in check.correctness(bench, shard, shards)]
    assert len(runs) >= len(names)
    return [run.args[1] for run in runs if run.args[1] in cases]


class FakeCuda:
    """Just enough of torch.cuda to count what is captured and replayed; signatures are the real ones'."""

    def __init__(self, milliseconds: float):
        self.milliseconds, self.replays, self.capturing, self.failing = milliseconds, 0, False, False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = inspect.signature(torch.cuda.graph.__init__)
        fake = self

        class Stream:
            def wait_stream(self, other: Any) -> None: ...

        class Graph:
            def replay(self) -> None:
                fake.replays += 1

        class Event:
            def __init__(self, enable_timing: bool = False):
                assert enable_timing

            def record(self) -> None: ...

            def elapsed_time(self, other: Any) -> float:
                return fake.milliseconds

        @contextmanager
        def graph(*arguments: Any, **options: Any) -> Iterator[None]:
            real.bind(None, *arguments, **options)
            fake.capturing = True
            yield
            fake.capturing = False

        names = {"Stream": Stream, "CUDAGraph": Graph, "Event": Event, "graph": graph, "is_available": lambda: True}
        names |= {"current_device": lambda: 0, "synchronize": lambda: None, "current_stream": Stream}
        names |= {"default_stream": Stream, "set_stream": lambda _: None, "stream": lambda _: nullcontext()}
        for name, value in names.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_timing_is_the_share_of_a_graph_that_goes_round_all_weights(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(milliseconds=6.0)
    cuda.install(monkeypatch)
    gpu, seen = check.timing.Gpu(), []
    calls = [lambda i=i: seen.append((i, cuda.capturing)) for i in range(3)]
    taken = gpu.time(calls, expected=1e-4)  # 3 calls make 0.3 ms: 7 rounds for 2 ms
    assert [i for i, capturing in seen if capturing] == [0, 1, 2] * 7
    assert len([i for i, capturing in seen if not capturing]) == 21  # before, to compile
    assert cuda.replays == 3 + gpu.replays
    assert taken.seconds == pytest.approx(6e-3 / 21)
    assert taken.spread == 0
    assert check.timing.copies(gpu, 100 * 10**6) == 3
    assert check.timing.copies(gpu, 10**9) == 2


def test_what_cannot_be_captured_leaves_its_stream_behind(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(1.0).install(monkeypatch)
    gpu = check.timing.Gpu()
    before = gpu.timing_stream
    with pytest.raises(ZeroDivisionError):
        gpu.capture(lambda: 1 / 0, warm=False)
    assert gpu.timing_stream is not before


def test_without_a_gpu_and_without_dry_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out.json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "--dry" in done.stderr
    assert "Traceback" not in done.stderr
