"""Compile every kernel that wq can launch, for processors that are not here, and hold the machine code to its bounds.

    python scripts/kernel_static_report.py [--arch sm_90 ...] [--json]

No GPU is needed: Triton brings the assembler and the disassembler. Exits with 1 when a kernel spills registers, takes
more shared memory than its processor has, loads packed words in pieces of less than 16 bytes, misses Hopper's HGMMA,
or spends more than 2.9 instructions of a thread on a weight where memory should be the limit (4 bits, groups of 128,
up to 16 rows, on sm_80 and sm_90). Symmetric and asymmetric weights run the same code: one row covers both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it would leave nothing to compile
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wq_kernels import configs, dense, experts, fused

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")
SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99, "gfx942": 64}  # KiB a block
MAX_INSTRUCTIONS = 2.9
FULL_SPEED = ("sm_80", "sm_90")  # where so few instructions are what keeps up with memory
WEIGHTS = [(4, 128), (4, 64), (4, 32), (2, 128), (8, 128)]  # bits, group size; 256 and whole rows run 128's code
DTYPES = ("fp16", "bf16")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Case:
    """One binary: a kernel, what it is compiled for, and the constants it is compiled with."""

    kernel: str
    architecture: str
    dtype: str
    bits: int
    group_size: int
    rows: int  # of the input, a bucket
    config: configs.Config


@dataclass
class Row:
    """What the machine code of a case looks like."""

    case: Case
    registers: int
    stack: int
    shared: int
    loop: int  # instructions in the main loop
    per_weight: float  # instructions of a thread for each weight, in the main loop
    wide_loads: int  # asynchronous loads of 16 bytes for each thread, in the main loop
    matrix: str  # the instruction that multiplies
    faults: list[str] = field(default_factory=list)


def cases(architectures: tuple[str, ...]) -> Iterator[Case]:
    """Every entry of the table, for every processor and kind of weight; one binary once."""
    seen = set()
    for architecture in architectures:
        device = configs.Device(architecture, architecture, 100)
        for kernel in ("linear", "experts"):
            for bits, group_size in WEIGHTS:
                block_groups = max(1, 512 // bits // group_size)
                for rows in configs.BUCKETS:
                    config = configs.built_in(device, rows, bits, block_groups)
                    for dtype in DTYPES:
                        case = Case(kernel, architecture, dtype, bits, group_size, rows, config)
                        key = (kernel, architecture, dtype, bits, block_groups, config)
                        if key not in seen:
                            seen.add(key)
                            yield case


def compile_case(case: Case) -> Row:
    """Compile, disassemble, count."""
    function = {"linear": fused._fused_kernel, "experts": experts._experts_kernel}[case.kernel]
    block = 512 // case.bits
    nvidia = case.architecture.startswith("sm_")
    signature = {
        **dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "y_ptr"), f"*{case.dtype}"),
        **dict.fromkeys(("words_ptr", "counter_ptr", "row_ptr", "expert_ptr"), "*i32"),
        **{"zero_ptr": "*u8", "partial_ptr": "*fp32"},
    }
    target = "ptx" if nvidia else "generic"
    block_groups = max(1, block // case.group_size)
    constants = case.config.constants(case.bits, block_groups, target)
    options = case.config.launch_options(target)
    compiled = build(function, signature, constants, case.architecture, options)
    if not nvidia:
        return amd_row(case, compiled)
    usage, code = disassemble(compiled.asm["cubin"])
    loop = main_loop(code)
    per_weight = len(loop) * case.config.warps * 32 / (case.config.rows_n * block)
    operations = [operation for _, operation, _ in loop]
    wide = sum(op.startswith("LDGSTS") and op.endswith(".128") for op in operations)
    matrix = next((op for op in operations if op.startswith(("HGMMA", "HMMA"))), "none")
    row = Row(
        case,
        usage["REG"],
        usage["STACK"],
        compiled.metadata.shared,
        len(loop),
        per_weight,
        wide,
        matrix,
    )
    row.faults = list(faults(row, usage, operations))
    return row


def faults(row: Row, usage: dict[str, int], operations: list[str]) -> Iterator[str]:
    """What is wrong with a binary."""
    case = row.case
    if usage["STACK"] or usage["LOCAL"] or any(op.startswith(("LDL", "STL")) for op in operations):
        yield f"spills: {usage['STACK']} bytes of stack"
    if row.shared > SHARED_MEMORY[case.architecture] * 1024:
        yield f"{row.shared} bytes of shared memory; the processor has {SHARED_MEMORY[case.architecture]} KiB"
    if row.wide_loads < wide_loads(case):
        yield f"packed words come in pieces: {row.wide_loads} loads of 16 bytes a thread, not {wide_loads(case)}"
    if case.architecture == "sm_90" and not row.matrix.startswith("HGMMA"):
        yield f"multiplies with {row.matrix}, not HGMMA"
    bound = case.architecture in FULL_SPEED and (case.bits, case.group_size, case.rows) == (4, 128, 16)
    if bound and row.per_weight > MAX_INSTRUCTIONS:
        yield f"{row.per_weight:.2f} instructions for each weight; the bound is {MAX_INSTRUCTIONS}"


def wide_loads(case: Case) -> int:
    """How many loads of 16 bytes a thread has, if packed words have no others.

    The input is loaded by subtile, so that small tiles of it come in smaller loads; those that do not are counted too,
    or they could stand in for packed words.
    """
    threads = 32 * case.config.warps
    packed = case.config.rows_n * 64 // (16 * threads)
    subtiles, bytes_of_one = 16 // case.bits, 64 * case.config.rows_m
    return packed + subtiles * (bytes_of_one // (16 * threads))


def amd_row(case: Case, compiled: Any) -> Row:
    """The generic path: it compiles, multiplies with matrix instructions, and spills nothing."""
    text = compiled.asm["amdgcn"]
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    matrix = next(iter(re.findall(r"v_mfma\w+", text)), "none")
    row = Row(case, registers, spills, compiled.metadata.shared, 0, 0.0, 0, matrix)
    if spills:
        row.faults.append(f"spills {spills} registers")
    if row.shared > SHARED_MEMORY[case.architecture] * 1024:
        row.faults.append(f"{row.shared} bytes of shared memory")
    if matrix == "none":
        row.faults.append("multiplies without matrix instructions")
    return row


def build(
    function: Any, types: dict[str, str], constants: dict[str, Any], architecture: str, options: dict[str, int]
) -> Any:
    """Compile for a processor as the launcher would: pointers aligned, numbers from the run."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    # zero_rows and the like are multiples of 16 by the layout; the launcher finds that out from their values.
    aligned = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*") or name == "zero_rows"]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    name, _, number = architecture.rpartition("_")
    target = GPUTarget("cuda", int(number), 32) if name == "sm" else GPUTarget("hip", architecture, 64)
    return triton.compile(source, target=target, options=options)


def disassemble(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str, str]]]:
    """Resources used, and (address, operation, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = run("cuobjdump", "-res-usage", file.name)
        listing = run("cuobjdump", "-sass", file.name)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return usage, [(int(a, 16), operation, rest) for a, operation, rest in INSTRUCTION.findall(listing)]


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main_loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The longest run of instructions between a backward branch and its target that multiplies matrices."""
    best: list[tuple[int, str, str]] = []
    for address, operation, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = [line for line in code if int(target[1], 16) <= line[0] <= address]
        if len(body) > len(best) and any(line[1].startswith(("HMMA", "HGMMA")) for line in body):
            best = body
    return best


def dequantize_faults(architecture: str) -> list[str]:
    """The kernels that write a dense weight: they must not spill either."""
    found = []
    for bits in (2, 3, 4, 8):
        for function in (dense._dequantize_kernel, dense._dequantize_tiles_kernel):
            tiles = function is dense._dequantize_tiles_kernel
            if tiles and bits == 3:
                continue
            types = {"packed_ptr": "*i32", "words_ptr": "*i32", "zero_ptr": "*u8" if tiles else "*i32"}
            types |= {"scale_ptr": "*fp16", "out_ptr": "*fp16"}
            constants = {"BITS": bits, "ROWS": dense._ROWS}
            if not tiles:
                constants |= {"SYMMETRIC": False, "COLUMNS": dense._COLUMNS}
            options = dense.launch_options("ptx" if architecture.startswith("sm_") else "generic")
            compiled = build(function, types, constants, architecture, options)
            if architecture.startswith("sm_"):
                usage, _ = disassemble(compiled.asm["cubin"])
                if usage["STACK"] or usage["LOCAL"]:
                    found.append(f"{architecture} {function.__name__} {bits} bits: {usage['STACK']} bytes of stack")
    return found


def report(rows: list[Row], spilling: list[str], as_json: bool) -> None:
    """A line for each binary, or JSON."""
    if as_json:
        print(
            json.dumps(
                {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "dequantize": spilling}, indent=1
            )
        )
        return
    print(f"triton {triton.__version__}, {len(rows)} binaries")
    print("kernel  for     dtype  bits group rows  tile         regs stack  shared instr/w  multiplies")
    for row in rows:
        case, config = row.case, row.case.config
        tile = f"{config.rows_n}x{config.rows_m} w{config.warps} s{config.stages}"
        which = f"{case.kernel:8}{case.architecture:8}{case.dtype:6}{case.bits:5}{case.group_size:6}{case.rows:5}"
        print(
            f"{which}  {tile:12}"
            f"{row.registers:5}{row.stack:6}{row.shared:8}{row.per_weight:8.2f}  {row.matrix}  {'; '.join(row.faults)}"
        )
    for fault in spilling:
        print(fault)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(compile_case, cases(tuple(arguments.arch))))
        spilling = [fault for faults in pool.map(dequantize_faults, arguments.arch) for fault in faults]
    report(rows, spilling, arguments.json)
    broken = [row for row in rows if row.faults]
    if broken or spilling:
        print(f"{len(broken) + len(spilling)} of {len(rows)} binaries break a bound", file=sys.stderr)
    return 1 if broken or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
