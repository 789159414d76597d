"""Everything there is to ask of a GPU, in less than eight minutes: are the kernels right, and are they fast?

    python scripts/gpu_check.py --out result.json            # on the machine with the GPU, from a checkout
    python scripts/gpu_check.py --out dry.json --dry         # the same code in miniature, in Triton's interpreter

correctness   every tile that is chosen here, as compiled for this card, against float64 and against the plain Triton
              path; outputs and workspaces full of NaNs
races         split columns, tens of thousands of launches on two streams; CUDA graphs; torch.compile
speed         against torch.matmul in bfloat16 and other people's kernels; weights come from memory, not from the cache
experts       a mixture of experts against the dense grouped product
end_to_end    a random model with the shape of Llama-3-8B: tokens a second, time to the first one, energy

Each section runs in a process of its own, so that a kernel which writes where it should not spoils no other section.
The most telling measurements come first; what the budget cut off is listed. Writes one JSON file. Exits with 1 when a
result is wrong, not when a speed misses its target. torch and triton are enough, but for the last section.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "torch-ext"))

import gpu_timing as timing
import torch
import triton
from gpu_timing import HALF, Bench, Job, Machine, Row, reason, short
from torch import Tensor

import wq_kernels
from wq_kernels import configs, fused, layout, reference
from wq_kernels.target import describe

CHECKED = ("correctness", "races")  # a fault there is a failure
TIMED = ("speed", "experts", "end_to_end")
# By when each section must be done, as a share of the budget. What one leaves over, the next may use.
UNTIL = {"correctness": 0.26, "races": 0.34, "speed": 0.66, "experts": 0.74, "end_to_end": 1.0}
GRACE = 30.0  # seconds that a section may take to finish what it has begun

# --- correctness ---

TAILS = {32: 2400, 64: 2368, 128: 2432, 256: 2304, 0: 2403}  # columns by group: no block of them is full where possible


@dataclass(frozen=True)
class Case:
    """One product to check. group: columns that share a scale, 0 for whole rows. m: rows, or rows for each expert."""

    kernel: str
    bits: int
    group: int
    dtype: torch.dtype
    symmetric: bool
    m: int
    n: int
    k: int
    generic: bool = False  # compare with the plain Triton path, too

    @property
    def name(self) -> str:
        grid = "sym" if self.symmetric else "asym"
        return f"{self.kernel} {self.bits}b g{self.group} {short(self.dtype)} {grid} {self.m}x{self.n}x{self.k}"


def tile_of(machine: Machine, case: Case) -> tuple[configs.Config, int]:
    """The tile that is chosen for a case, and the groups in a block of columns."""
    columns = layout.block_columns(case.bits)
    block_groups = max(1, columns // case.group) if case.group else 1
    rows = configs.bucket(min(case.m, configs.FUSED_ROWS))
    return configs.choose(describe(machine.device), rows, case.bits, block_groups, triton.__version__), block_groups


def binary(machine: Machine, case: Case) -> tuple[Any, ...]:
    """What decides which code is compiled, but for what Triton makes of the sizes."""
    return case.kernel, case.bits, case.dtype, *tile_of(machine, case)


def cases(machine: Machine) -> Iterator[Case]:
    """Every tile, width, group, dtype and grid, with rests on every side; each tile with even sizes, too."""
    if machine.dry:
        yield from _dry_cases()
        return
    yield from (Case("package", bits, 128, HALF[0], False, m, 387, 2432) for bits in (2, 4, 8) for m in (3, 300))
    seen = set()
    for bits in (4, 8, 2):
        for group in (128, 32, 64, 256, 0):
            for dtype in HALF:
                for rows in configs.BUCKETS:
                    case = Case("linear", bits, group, dtype, True, rows - 3, 387, TAILS[group])
                    if binary(machine, case) not in seen:
                        seen.add(binary(machine, case))
                        yield replace(case, generic=True)
                        yield replace(case, m=rows, n=512, k=4096)
                        yield replace(case, m=1 if rows == 16 else rows - 1, n=512, k=4096, symmetric=False)
                    else:
                        yield case
                    yield replace(case, symmetric=False)
    for bits in (4, 8, 2):
        for group in (128, 32, 0):
            for dtype in HALF:
                for rows in configs.BUCKETS[:4]:
                    case = Case("experts", bits, group, dtype, True, rows - 3, 387, TAILS[group], generic=True)
                    yield from (case, replace(case, symmetric=False, generic=False))
                yield Case("dense", bits, group, dtype, group == 0, 300, 387, TAILS[group])
                yield Case("dequantize", bits, group, dtype, group == 0, 1, 387, TAILS[group])


def _dry_cases() -> Iterator[Case]:
    half, brain = HALF
    yield Case("package", 4, 32, half, False, 3, 19, 160)
    yield Case("linear", 4, 128, half, True, 3, 33, 1280, generic=True)
    yield Case("linear", 2, 32, brain, False, 17, 19, 288)
    yield Case("linear", 8, 0, half, False, 1, 16, 99)
    yield Case("experts", 4, 32, half, False, 2, 19, 160, generic=True)
    yield Case("dense", 4, 64, brain, True, 257, 35, 128)
    yield Case("dequantize", 4, 32, half, False, 1, 35, 160)


def compare(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, slack: float = 3.0) -> Row:
    """Whether every value is as near to the exact one as rounding allows.

    magnitude: the root of the sum of squares of the terms of each value. `worst` is the largest error in units of what
    is allowed: one step of the dtype at the value, and `slack` steps at the size of the terms.
    """
    step, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    allowed = step * (expected.abs() + slack * magnitude) + smallest
    worst = ((actual.double() - expected).abs() / allowed).max().item()
    ok = actual.shape == expected.shape and worst <= 1.0  # a NaN is not
    return {"ok": ok, "worst": worst if math.isfinite(worst) else str(worst)}


def random_stream(machine: Machine, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight as a checkpoint has it: any bits, in the padding as well."""
    groups = case.k // case.group if case.group else 1

    def words(values: int, other: int) -> Tensor:
        shape = (other, -(-values * case.bits // 32))
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=machine.device)

    scale = ((torch.rand(case.n, groups, device=machine.device) + 0.1) / 100).to(case.dtype)
    zero = None if case.symmetric else words(case.n, groups).t().contiguous()
    return words(case.k, case.n), scale, zero


def random_input(machine: Machine, rows: int, case: Case) -> tuple[Tensor, Tensor | None]:
    """Input, and a bias for asymmetric cases."""
    x = torch.randn(rows, case.k, device=machine.device).to(case.dtype)
    return x, None if case.symmetric else torch.randn(case.n, device=machine.device).to(case.dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product in float64, and the magnitude of its terms."""
    x, squares = x.double(), x.double().square() @ weight.square().t()
    y = x @ weight.t()
    if bias is not None:
        y, squares = y + bias.double(), squares + bias.double().square()
    return y, squares.sqrt()


def check_linear(machine: Machine, case: Case) -> Row:
    """The fused kernel, its output and workspace poisoned."""
    tiled = layout.from_stream(*random_stream(machine, case), case.bits, case.k)
    x, bias = random_input(machine, case.m, case)
    sizes = (case.bits, case.n, case.k)
    y, fault = poisoned(partial(fused.linear, x, *tiled, bias, *sizes))
    weight = layout.dequantize(*tiled, *sizes, torch.float64)
    row = judge(machine, case, y, exact(x, weight, bias), fault, partial(fused.linear, x, *tiled, bias, *sizes))
    config, _ = tile_of(machine, case)
    row["splits"] = configs.split(describe(machine.device), config, case.n, case.m, tiled[0].shape[0])
    return row | {"tile": f"{config.rows_n}x{config.rows_m} w{config.warps} s{config.stages}"}


def check_experts(machine: Machine, case: Case) -> Row:
    """The grouped kernel: five rows of output for each input, some of no expert."""
    count, sizes = 5, (case.bits, case.n, case.k)
    weights = [layout.from_stream(*random_stream(machine, case), case.bits, case.k) for _ in range(count)]
    words, scale, zero = (torch.stack(tensors) for tensors in zip(*weights, strict=True))
    x, bias = random_input(machine, case.m, case)
    biases = None if bias is None else torch.stack([bias * (1 + i) for i in range(count)])
    expert = torch.randint(-1, count + 1, (count * case.m,), device=machine.device)
    run = partial(fused.expert_linear, x, expert, words, scale, zero, biases, *sizes)
    y, fault = poisoned(run)
    expected = torch.zeros(count * case.m, case.n, dtype=torch.float64, device=machine.device)
    magnitude = torch.zeros_like(expected)
    for i, tiled in enumerate(weights):
        mine = (expert == i).nonzero().squeeze(1)
        weight = layout.dequantize(*tiled, *sizes, torch.float64)
        expected[mine], magnitude[mine] = exact(x[mine // count], weight, None if biases is None else biases[i])
    return judge(machine, case, y, (expected, magnitude), fault, run)


def check_dense(machine: Machine, case: Case) -> Row:
    """More rows than the fused kernel takes: dequantized in pieces, of which there are several."""
    tiled = layout.from_stream(*random_stream(machine, case), case.bits, case.k)
    x, bias = random_input(machine, case.m, case)
    sizes = (case.bits, case.n, case.k)
    with mock.patch.object(fused, "_SCRATCH", 64 * case.k * x.element_size()):
        y, fault = poisoned(partial(fused.linear, x, *tiled, bias, *sizes))
    expected, magnitude = exact(x, layout.dequantize(*tiled, *sizes, torch.float64), bias)
    row = compare(y, expected, 2 * magnitude, case.dtype)  # twice: the product is rounded before the bias is added
    return row | {"ok": row["ok"] and not fault, "fault": fault}


def check_dequantize(machine: Machine, case: Case) -> Row:
    """Both kernels that write a weight out, value for value. The interpreter truncates to bfloat16; GPUs round."""
    stream = random_stream(machine, case)
    sizes = (case.bits, case.n, case.k, case.dtype)
    tiled = layout.from_stream(*stream, case.bits, case.k)
    wanted = reference.dequantize(*stream, *sizes)
    same = torch.equal(wq_kernels.get("dequantize").dequantize(*stream, *sizes), wanted)
    return {"ok": same and torch.equal(fused.dequantize(*tiled, *sizes), wanted)}


def check_package(machine: Machine, case: Case) -> Row:
    """What layers call, in both layouts: checked, and handed to the backend for this device."""
    stream = random_stream(machine, case)
    x, bias = random_input(machine, case.m, case)
    sizes = (case.bits, case.n, case.k)
    wanted, row = reference.dequantize(*stream, *sizes, torch.float64), {"ok": True}
    for name in wq_kernels.LAYOUTS:
        weight = stream if name == "stream" else layout.from_stream(*stream, case.bits, case.k)
        y = wq_kernels.linear(x, *weight, None, bias, *sizes, name)
        dense = wq_kernels.dequantize(*weight, *sizes, torch.float32, name)
        near = compare(y, *exact(x, wanted, bias), case.dtype, slack=6.0)
        row |= {name: near["worst"], "ok": row["ok"] and near["ok"] and torch.equal(dense, wanted.float())}
    return row


def poisoned(run: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """The result where all memory it could take was NaN, and what was written elsewhere."""
    with timing.Poison() as poison:
        y = run()
    return y, poison.fault()


def judge(
    machine: Machine, case: Case, y: Tensor, wanted: tuple[Tensor, Tensor], fault: str, run: Callable[[], Tensor]
) -> Row:
    """A result against float64 and, if the case says so, against the plain Triton path."""
    row = compare(y, *wanted, case.dtype) | {"fault": fault}
    if case.generic:
        with timing.compiled_for(machine.reference_target):
            other = run()
        between = compare(y, other.double(), wanted[1], case.dtype, slack=0.02)
        row |= {"generic_worst": between["worst"], "generic_identical": torch.equal(y, other)}
        row["ok"] = row["ok"] and between["ok"] and compare(other, *wanted, case.dtype)["ok"]
    row["ok"] = row["ok"] and not fault
    return row


CHECKS = {
    "package": check_package,
    "linear": check_linear,
    "experts": check_experts,
    "dense": check_dense,
    "dequantize": check_dequantize,
}


def correctness(bench: Bench, shard: int = 0, shards: int = 1) -> Iterator[Job]:
    """A share of the cases; those that run the same code stay together."""
    keys: dict[Any, int] = {}
    for case in cases(bench.machine):
        place = keys.setdefault(binary(bench.machine, case), len(keys))
        if place % shards == shard:
            yield case.name, partial(CHECKS[case.kernel], bench.machine, case)


# --- races ---

RACES = ((128, 16384, 1), (4096, 4096, 1), (1024, 8192, 16), (2048, 14336, 48))  # out, in, rows: columns are split


def races(bench: Bench) -> Iterator[Job]:
    machine = bench.machine
    shapes, launches = (((32, 1024, 2),), 8) if machine.dry else (RACES, 10_000)
    for n, k, m in shapes:
        for dtype in HALF[:1] if machine.dry else HALF:
            yield f"{short(dtype)} {m}x{n}x{k}", partial(race, machine, n, k, m, dtype, launches)
    yield "graphs of one stream in any order", partial(graph_order, machine)
    yield "torch.compile", partial(compiled, machine)


def race(machine: Machine, n: int, k: int, m: int, dtype: torch.dtype, launches: int) -> Row:
    """Many launches on two streams at once, from Python and from graphs: one result, and counters back at zero."""
    weight = timing.random_tiled(machine, n, k, dtype, False)
    x = torch.randn(m, k, device=machine.device).to(dtype)
    run = partial(fused.linear, x, *weight, None, 4, n, k)
    expected, magnitude = exact(x, layout.dequantize(*weight, 4, n, k, torch.float64), None)
    first = run()
    row = compare(first, expected, magnitude, dtype)
    bits, different = first.view(torch.int16), [torch.zeros(1, dtype=torch.int64, device=machine.device) for _ in "ab"]
    steps = [partial(_launch, run, bits, count) for count in different]
    with timing.Poison(guarded=False), recorded_counters() as counters:
        _race(machine, steps, launches)
    machine.synchronize()
    wrong, dirty = sum(int(count) for count in different), sum(int(c.count_nonzero()) for c in counters)
    row |= {"launches": launches, "different_values": wrong, "counters_left": dirty, "counters": len(counters)}
    row["ok"] = row["ok"] and not wrong and not dirty and bool(counters)
    return row


def _launch(run: Callable[[], Tensor], bits: Tensor, different: Tensor) -> None:
    different += (run().view(torch.int16) != bits).sum()


def _race(machine: Machine, steps: list[Callable[[], None]], launches: int) -> None:
    """A tenth of the launches one by one, the others from graphs that run side by side."""
    streams = machine.streams(len(steps))
    for stream in streams:
        machine.hold(stream)
    single, burst = max(1, launches // 10 // len(steps)), min(50, launches // 4)
    for _ in range(single):
        for stream, step in zip(streams, steps, strict=True):
            with machine.on(stream):
                step()
    machine.synchronize()
    replays = [
        machine.capture(partial(_repeat, step, burst), stream) for stream, step in zip(streams, steps, strict=True)
    ]
    for _ in range(max(1, (launches // len(steps) - single) // burst)):
        for stream, replay in zip(streams, replays, strict=True):
            with machine.on(stream):
                replay()
    machine.synchronize()


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


@contextmanager
def recorded_counters() -> Iterator[list[Tensor]]:
    """The counters that launches use meanwhile."""
    found: list[Tensor] = []
    original = fused._counters

    def counters(*key: Any) -> Tensor:
        tensor = original(*key)
        if not any(tensor is other for other in found):
            found.append(tensor)
        return tensor

    with mock.patch.object(fused, "_counters", counters):
        yield found


def graph_order(machine: Machine) -> Row:
    """Two graphs captured on one new stream, of which the later is replayed first, in memory that is not zero."""
    n, k, m = (32, 1024, 2) if machine.dry else (512, 8192, 1)
    weight = timing.random_tiled(machine, n, k, torch.float16, True)
    x = torch.randn(m, k, device=machine.device).half()
    outputs = [torch.zeros(m, n, dtype=torch.float16, device=machine.device) for _ in "ab"]
    run = partial(fused.linear, x, *weight, None, 4, n, k)
    expected = run()
    machine.soil()
    (stream,) = machine.streams(1)
    replays = [machine.capture(lambda y=y: y.copy_(run()), stream, warm=False) for y in outputs]
    for replay in reversed(replays):
        replay()
    machine.synchronize()
    same = [torch.equal(y, expected) for y in outputs]
    return {"ok": all(same), "first_graph": same[0], "later_graph": same[1]}


def compiled(machine: Machine) -> Row:
    """The op under torch.compile, with CUDA graphs: what it gives in each call is what it gives without."""
    from wq.layers import ops

    size, options = (1024, {"backend": "eager"}) if machine.dry else (4096, {"mode": "reduce-overhead"})
    first, second = (timing.random_tiled(machine, size, size, torch.float16, True) for _ in range(2))
    sizes = (4, size, size, "tiled")

    def chain(x: Tensor) -> Tensor:
        hidden = ops.linear(x, *first, None, None, *sizes)
        return ops.linear(hidden / 8, *second, None, None, *sizes)

    function, same = torch.compile(chain, fullgraph=True, **options), []
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(1, size, device=machine.device).half()
            torch.compiler.cudagraph_mark_step_begin()
            same.append(torch.equal(function(x).clone(), chain(x)))
    return {"ok": all(same), "calls": len(same), "equal": sum(same)}


# --- a process that runs sections ---

SECTIONS: dict[str, Callable[..., Iterator[Job]]] = {
    "correctness": correctness,
    "races": races,
    "speed": timing.speed,
    "experts": timing.mixtures,
    "end_to_end": timing.end_to_end,
}


def work(options: argparse.Namespace) -> int:
    """Run the sections of this process, a line of JSON for each job as soon as it is done."""
    machine: Machine = timing.Dry() if options.dry else timing.Gpu()
    torch.manual_seed(options.shard)
    with options.rows.open("a", encoding="utf-8") as file:

        def write(**row: Any) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        write(about=timing.about(machine))
        for name in options.section:
            bench = Bench(machine, options.deadline)
            split = {"shard": options.shard, "shards": options.shards} if name == "correctness" else {}
            for job, run in SECTIONS[name](bench, **split):
                write(section=name, case=job, **attempt(bench, run))
    return 0


def attempt(bench: Bench, run: Callable[[], Row]) -> Row:
    """A job's row; what it raised; or that there was no time for it."""
    if not bench.in_time():
        return {"cut": True}
    try:
        return run()
    except Exception as error:
        return {"error": reason(error)}


# --- the process that starts them ---


@dataclass(frozen=True)
class Group:
    """Sections that run one after the other in each of some processes, side by side."""

    sections: tuple[str, ...]
    processes: int
    until: float  # share of the budget


def groups(options: argparse.Namespace) -> list[Group]:
    chosen = tuple(name for name in SECTIONS if name in options.only)
    if options.dry:
        return [Group(chosen, 1, 1.0)]
    compilers = max(1, min(12, (os.cpu_count() or 1) - 2))  # compiling takes longer than running
    return [Group((name,), compilers if name == "correctness" else 1, UNTIL[name]) for name in chosen]


def run_group(group: Group, options: argparse.Namespace, started: float, result: dict[str, Any]) -> None:
    """Start the processes of a group, wait for them, and collect what they wrote."""
    deadline = started + options.budget * group.until
    environment = {**os.environ, "TRITON_INTERPRET": "1" if options.dry else "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.jsonl") for i in range(group.processes)]
        processes = []
        for i, file in enumerate(files):
            arguments = ["--rows", str(file), "--section", *group.sections, "--deadline", str(deadline)]
            arguments += ["--shard", str(i), "--shards", str(group.processes), *(["--dry"] if options.dry else [])]
            processes.append(subprocess.Popen([sys.executable, __file__, *arguments], env=environment))
        for process, file in zip(processes, files, strict=True):
            collect(group, wait(process, deadline + GRACE), file, result)


def wait(process: subprocess.Popen[bytes], deadline: float) -> str:
    """How a process ended, if not well."""
    try:
        code = process.wait(max(1.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "did not come to an end and was stopped"
    return "" if code == 0 else f"ended with status {code}"


def collect(group: Group, problem: str, file: Path, result: dict[str, Any]) -> None:
    """Sort a process's rows into the result. A problem belongs to the section that was running."""
    running = group.sections[0]
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):  # stopped while it wrote
            continue
        row = json.loads(line)
        if "about" in row:
            result["machine"] = row["about"]
        elif "section" in row:
            running = row.pop("section")
            section = result["sections"][running]
            section["cut" if row.get("cut") else "rows"].append(row["case"] if row.get("cut") else row)
    if problem:
        result["sections"][running]["problems"].append(problem)


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the check fail: a wrong or missing result where results are checked."""
    found = []
    for name in CHECKED:
        section = result["sections"].get(name)
        if section is None:
            continue
        wrong = [row for row in section["rows"] if not row.get("ok")]
        found += [f"{name}: {row['case']}: {row.get('error') or json.dumps(row)}" for row in wrong]
        found += [f"{name}: a process {problem}" for problem in section["problems"]]
        if not section["rows"]:
            found.append(f"{name}: nothing was checked")
    return found


# --- targets ---

AT_LEAST = {32: 2.4, 64: 1.9, 128: 1.2, 256: 0.8, 512: 0.85, 1024: 0.85, 2048: 0.92, 4096: 0.92}  # rows: speed-up
SHARE_OF_COPY = 0.75  # up to 16 rows, from 8192 x 8192 on
SMALL_SPEEDUP = 2.0  # up to 16 rows, at 4096 x 4096
VARIANT_LIMIT = 1.05  # times symmetric float16


def targets(rows: list[Row]) -> list[Row]:
    """Each target that a row of the speed section is held to: its value, its bound, and whether it is met."""
    copy = next((row["bytes_per_second"] for row in rows if "bytes_per_second" in row and row["kind"] == "copy"), None)
    packed = [row for row in rows if row.get("kind") == "packed"]
    plain = {(r["n"], r["k"], r["m"]): r for r in packed if (r["dtype"], r["symmetric"]) == ("fp16", True)}
    found = []
    for row in packed:
        if copy:
            row["share_of_copy"] = row["bytes"] / row["seconds"] / copy
        base = plain.get((row["n"], row["k"], row["m"]))
        met, held = False, None
        if base is row:
            held = _held_to(row)
            met = held is not None and held[1] >= held[2]
        elif base is not None:
            ratio = row["seconds"] / base["seconds"]
            met, held = ratio <= VARIANT_LIMIT, ("time of asymmetric or bfloat16 over plain", ratio, VARIANT_LIMIT)
        if held is not None:
            found.append(
                {**dict(zip(("target", "value", "bound"), held, strict=True)), "case": row["case"], "met": met}
            )
    return found


def _held_to(row: Row) -> tuple[str, float, float] | None:
    """What a symmetric float16 row is held to, its value, and the least it should be."""
    m = row["m"]
    if m > 16:
        return f"speed-up at {m} rows", row["speedup"], AT_LEAST.get(m, 0.0)
    if row["n"] * row["k"] >= 8192**2 and "share_of_copy" in row:
        return "share of copy bandwidth up to 16 rows", row["share_of_copy"], SHARE_OF_COPY
    if (row["n"], row["k"]) == (4096, 4096):
        return "speed-up at 4096 x 4096 up to 16 rows", row["speedup"], SMALL_SPEEDUP
    return None


def without_numbers(value: Any) -> Any:
    """Every number with a fraction is a measurement, and a dry run measures nothing."""
    if isinstance(value, dict):
        return {key: without_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_numbers(item) for item in value]
    return None if isinstance(value, float) else value


# --- the report ---


def report(result: dict[str, Any]) -> None:
    """A compact table of what was found."""
    machine, note = result["machine"], "  DRY RUN: nothing was measured" if result["dry"] else ""
    print(f"{machine.get('card')}  torch {machine.get('torch')}  triton {machine.get('triton')}{note}")
    for name, section in result["sections"].items():
        errors = [row for row in section["rows"] if "error" in row or "absent" in row]
        print(f"{name:12} {len(section['rows'])} done, {len(section['cut'])} cut off, {len(errors)} errors or absent")
        for row in errors[:6]:
            print(f"    {row['case']}: {row.get('error') or row.get('absent')}")
    rows = [row for section in result["sections"].values() for row in section["rows"]]
    _print_packed([row for row in rows if row.get("kind") == "packed"])
    for row in rows:
        if row.get("kind") in ("copy", "matmul", "peer", "mixture", "generation") and "absent" not in row:
            values = {key: value for key, value in row.items() if key not in ("kind", "case", "seconds", "spread")}
            print(f"{row['kind']:11}{row['case']:24}" + "  ".join(f"{k} {_figure(v)}" for k, v in values.items()))
    for name in dict.fromkeys(target["target"] for target in result["targets"]):
        mine = [target for target in result["targets"] if target["target"] == name]
        met = sum(bool(target["met"]) for target in mine)
        print(f"target {name}, {mine[0]['bound']}: {'-' if result['dry'] else f'{met} of {len(mine)} met'}")
    for failure in result["failures"]:
        print(f"FAILED {failure}")


def _print_packed(rows: list[Row]) -> None:
    """Speed-up over torch.matmul in bfloat16, a line for each weight and a column for each number of rows."""
    counts = sorted({row["m"] for row in rows})
    kinds = dict.fromkeys((row["n"], row["k"], row["dtype"], row["symmetric"]) for row in rows)
    if rows:
        print(f"{'speed-up over bf16, rows':32}" + "".join(f"{m:>7}" for m in counts))
    for n, k, dtype, symmetric in kinds:
        mine = {r["m"]: r for r in rows if (r["n"], r["k"], r["dtype"], r["symmetric"]) == (n, k, dtype, symmetric)}
        cells = "".join(f"{_figure(mine[m]['speedup'] if m in mine else None):>7}" for m in counts)
        print(f"{f'{n}x{k} {dtype} ' + ('sym' if symmetric else 'asym'):32}{cells}")


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_figure(item)}" for key, item in value.items())
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def finish(result: dict[str, Any]) -> int:
    """Judge, take measurements out of a dry run, and say how it went."""
    result["failures"] = failures(result)
    result["targets"] = targets(result["sections"].get("speed", {}).get("rows", []))
    if result["dry"]:
        for name in TIMED:
            if name in result["sections"]:
                result["sections"][name] = without_numbers(result["sections"][name])
        result["targets"] = [target | {"value": None, "met": None} for target in result["targets"]]
    return 1 if result["failures"] else 0


def start(options: argparse.Namespace) -> int:
    """Run the groups one after the other, writing what there is after each."""
    if not options.dry and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. --dry runs everything in miniature on the CPU.")
    started = time.time()
    sections = {name: {"rows": [], "cut": [], "problems": []} for name in SECTIONS if name in options.only}
    result = {
        "dry": options.dry,
        "date": datetime.date.today().isoformat(),
        "machine": {},
        "budget_seconds": options.budget,
        "sections": sections,
        "failures": [],
        "targets": [],
    }
    for group in groups(options):
        run_group(group, options, started, result)
        if not options.dry:
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result["seconds"] = round(time.time() - started)
    code = finish(result)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result)
    return code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--dry", action="store_true", help="in miniature, on the CPU, in Triton's interpreter")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds; what does not fit is cut off")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these sections")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # this and below: between the processes
    parser.add_argument("--section", nargs="+", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None and options.rows is None:
        parser.error("--out is required")
    return options


if __name__ == "__main__":
    arguments = parse()
    sys.exit(start(arguments) if arguments.rows is None else work(arguments))
