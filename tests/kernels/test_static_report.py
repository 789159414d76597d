"""The machine code of every kernel keeps its bounds, and the report that says so can say otherwise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "kernel_static_report.py"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")

pytest.importorskip("triton", reason="triton is not installed: nothing can be compiled")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("kernel_static_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = dict(os.environ)
    sys.modules["kernel_static_report"] = module
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)  # it sets Triton's variables
    if not (module.BINARIES / "cuobjdump").exists():
        pytest.skip("this triton ships no cuobjdump to look at machine code with")
    return module


@pytest.fixture(scope="module")
def report(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kernel compiled for every processor: minutes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "WQ_"))}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json"],
        capture_output=True,
        text=True,
        env={
            **inherited,
            "PYTHONPATH": str(ROOT / "kernels" / "torch-ext"),
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        },
    )
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout[-5000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["linear", "experts"])
def test_every_processor_has_a_binary_for_every_kind_of_weight(
    report: dict[str, Any], architecture: str, kernel: str
) -> None:
    cases = [row["case"] for row in report["rows"]]
    mine = [case for case in cases if (case["architecture"], case["kernel"]) == (architecture, kernel)]
    assert {(case["bits"], case["group_size"]) for case in mine} == {(4, 128), (4, 64), (4, 32), (2, 128), (8, 128)}
    assert {case["dtype"] for case in mine} == {"fp16", "bf16"}
    assert {case["rows"] for case in mine} >= {16, 32, 64}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_binary_breaks_a_bound_or_spills(report: dict[str, Any], architecture: str) -> None:
    rows = [row for row in report["rows"] if row["case"]["architecture"] == architecture]
    assert rows
    assert [row for row in rows if row["faults"] or row["stack"]] == []
    assert [fault for fault in report["dequantize"] if fault.startswith(architecture)] == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["linear", "experts"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_few_rows_of_4_bits_spend_few_instructions_on_a_weight(
    report: dict[str, Any], architecture: str, kernel: str, dtype: str
) -> None:
    wanted = {"architecture": architecture, "kernel": kernel, "dtype": dtype, "bits": 4, "group_size": 128, "rows": 16}
    (row,) = (row for row in report["rows"] if wanted.items() <= row["case"].items())
    # A loop that was not found would have none: unpacking alone takes one for every two.
    assert 0.5 < row["per_weight"] <= 2.9
    assert row["loop"] > 50
    assert row["wide_loads"] == 4  # of packed words: 128 rows of 64 bytes for 128 threads; the input comes in smaller
    assert row["matrix"].startswith("HGMMA" if architecture == "sm_90" else "HMMA")


def test_the_script_looks_at_these_processors_and_binaries_once(script: ModuleType) -> None:
    assert script.ARCHITECTURES == ARCHITECTURES
    assert script.MAX_INSTRUCTIONS == 2.9
    assert set(script.SHARED_MEMORY) == set(ARCHITECTURES)
    cases = list(script.cases(ARCHITECTURES))
    assert len(set(cases)) == len(cases)
    assert {case.architecture for case in cases} == set(ARCHITECTURES)
    assert len(list(script.cases(("sm_80",)))) < len(cases)


SASS = """
        Function : _fused_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                      /* 0x00000a0000017a02 */
                                                                               /* 0x000fe40000000f00 */
        /*0010*/              @!P1 BRA 0x60 ;                                  /* 0x0000004000009947 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;                     /* 0x0000000102027810 */
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;                     /* 0x0000000103037810 */
        /*0040*/                   ISETP.NE.AND P0, PT, R2, R4, PT ;           /* 0x000000040200720c */
        /*0050*/               @P0 BRA 0x0 ;                                   /* 0xffffffb000000947 */
        /*0060*/                   LDGSTS.E.BYPASS.128 [R7], [R8.64] ;         /* 0x0000000008077fae */
        /*0070*/              @UP0 LOP3.LUT R9, R9, 0xf000f, R10, 0xea, !PT ;  /* 0x000f000f09097812 */
        /*0080*/                   HMMA.16816.F32 R12, R16, R18, R12 ;         /* 0x00000012100c723c */
        /*0090*/              @!P0 BRA 0x60 ;                                  /* 0xffffffc000008947 */
        /*00a0*/                   HMMA.16816.F32 R12, R16, R18, R12 ;         /* 0x00000012100c723c */
        /*00b0*/                   BRA 0xa0 ;                                  /* 0xffffffe000007947 */
        /*00c0*/                   EXIT ;                                      /* 0x000000000000794d */
        /*00d0*/                   BRA 0xd0;                                   /* 0xfffffff000007947 */
"""


def parse(script: ModuleType, listing: str) -> list[tuple[int, str, str]]:
    """What `disassemble` makes of a listing."""
    return [(int(address, 16), name, rest) for address, name, rest in script.INSTRUCTION.findall(listing)]


def test_a_listing_is_read_one_instruction_after_another(script: ModuleType) -> None:
    code = parse(script, SASS)
    assert [address for address, *_ in code] == list(range(0, 0xE0, 16))
    assert [name for _, name, _ in code][:4] == ["MOV", "BRA", "IADD3", "IADD3"]
    assert code[6][1] == "LDGSTS.E.BYPASS.128"
    assert code[7][1] == "LOP3.LUT"


def test_the_main_loop_is_the_longest_that_multiplies(script: ModuleType) -> None:
    code = parse(script, SASS)
    assert [address for address, *_ in script.main_loop(code)] == [0x60, 0x70, 0x80, 0x90]
    hopper = [(address, name.replace("HMMA", "HGMMA"), rest) for address, name, rest in code]
    assert len(script.main_loop(hopper)) == 4
    without = [(address, name.replace("HMMA", "FFMA"), rest) for address, name, rest in code]
    assert script.main_loop(without) == []
    assert script.main_loop([]) == []


def good_row(script: ModuleType, architecture: str = "sm_90", **case: Any) -> Any:
    """A binary without faults."""
    sizes = {"kernel": "linear", "dtype": "fp16", "bits": 4, "group_size": 128, "rows": 16, **case}
    config = script.configs.TABLE[""][16]
    matrix = "HGMMA.64x16x16.F32" if architecture == "sm_90" else "HMMA.16816.F32"
    case = script.Case(architecture=architecture, config=config, **sizes)
    return script.Row(
        case, registers=128, stack=0, shared=40_000, loop=400, per_weight=2.5, wide_loads=4, matrix=matrix
    )


CLEAN = {"REG": 128, "STACK": 0, "LOCAL": 0}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, int], list[str], str]] = {
    "stack": ({}, {"STACK": 8}, [], "spills: 8 bytes"),
    "local memory": ({}, {"LOCAL": 16}, [], "spills"),
    "spilled": ({}, {}, ["STL.64"], "spills"),
    "spilled and read": ({}, {}, ["LDL"], "spills"),
    "shared memory": ({"shared": 227 * 1024 + 1}, {}, [], "232449 bytes of shared memory"),
    "some small loads": ({"wide_loads": 3}, {}, [], "3 loads of 16 bytes a thread, not 4"),
    "no wide loads": ({"wide_loads": 0}, {}, [], "0 loads of 16 bytes a thread, not 4"),
    "Ampere's instruction": ({"matrix": "HMMA.16816.F32"}, {}, [], "not HGMMA"),
    "none": ({"matrix": "none"}, {}, [], "multiplies with none"),
    "slow": ({"per_weight": 2.91}, {}, [], "2.91 instructions for each weight"),
}


@pytest.mark.parametrize(("changes", "usage", "operations", "fault"), BROKEN.values(), ids=BROKEN)
def test_a_binary_that_breaks_a_bound_is_at_fault(
    script: ModuleType, changes: dict[str, Any], usage: dict[str, int], operations: list[str], fault: str
) -> None:
    row, code = good_row(script), ["LDGSTS.E.128", "LDSM", "HGMMA"]
    assert list(script.faults(row, CLEAN, code)) == []
    found = list(script.faults(replace(row, **changes), {**CLEAN, **usage}, code + operations))
    assert len(found) == 1
    assert fault in found[0]


def test_wide_loads_of_the_input_do_not_stand_in_for_those_of_packed_words(script: ModuleType) -> None:
    for config, bits, expected in (((128, 16, 4), 4, 4), ((128, 32, 4), 4, 4 + 4), ((64, 64, 4), 8, 2 + 2 * 2)):
        rows_n, rows_m, warps = config
        tile = script.configs.Config(rows_n, rows_m, warps, 4, False)
        assert script.wide_loads(replace(good_row(script).case, bits=bits, config=tile)) == expected


@pytest.mark.parametrize(
    ("architecture", "case", "bound"),
    [
        ("sm_80", {}, True),
        ("sm_90", {}, True),
        ("sm_90", {"kernel": "experts", "dtype": "bf16"}, True),
        ("sm_89", {}, False),
        ("sm_120", {}, False),
        ("sm_90", {"rows": 32}, False),
        ("sm_90", {"bits": 8}, False),
        ("sm_90", {"group_size": 32}, False),
    ],
)
def test_instructions_are_bounded_where_memory_should_be_the_limit(
    script: ModuleType, architecture: str, case: dict[str, Any], bound: bool
) -> None:
    row = replace(good_row(script, architecture, **case), per_weight=3.5)
    assert bool(list(script.faults(row, CLEAN, []))) == bound


@pytest.mark.parametrize("architecture", ARCHITECTURES[:-1])
def test_shared_memory_is_bounded_by_what_the_processor_has(script: ModuleType, architecture: str) -> None:
    row, most = good_row(script, architecture), script.SHARED_MEMORY[architecture] * 1024
    assert list(script.faults(replace(row, shared=most), CLEAN, [])) == []
    assert "shared memory" in "".join(script.faults(replace(row, shared=most + 1), CLEAN, []))


GCN = ".vgpr_count: 96\n.sgpr_spill_count: 0\n.vgpr_spill_count: {}\nv_{}_f32_16x16x16_f16 a[0:3]\n"


@pytest.mark.parametrize(
    ("spilled", "instruction", "shared", "fault"),
    [
        (0, "mfma", 1024, ""),
        (3, "mfma", 1024, "spills 3 registers"),
        (0, "fma", 1024, "multiplies without matrix instructions"),
        (0, "mfma", 64 * 1024 + 1, "65537 bytes of shared memory"),
    ],
)
def test_amd_s_binaries_can_be_at_fault_too(
    script: ModuleType, spilled: int, instruction: str, shared: int, fault: str
) -> None:
    text = GCN.format(spilled, instruction)
    compiled = SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=shared))
    row = script.amd_row(good_row(script, "gfx942").case, compiled)
    assert row.registers == 96
    assert row.faults == ([fault] if fault else [])


class Serial:
    """A pool that has no processes: what is patched here would not be patched there."""

    def __init__(self, workers: int | None) -> None:
        self.map: Callable[..., Any] = map

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("faults", [[], ["spills: 8 bytes of stack"]], ids=["clean", "at fault"])
@pytest.mark.parametrize(
    "spilling", [[], ["sm_80 _dequantize_kernel 3 bits: 8 bytes of stack"]], ids=["dense", "spilling"]
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_the_exit_code_tells_of_any_fault(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faults: list[str],
    spilling: list[str],
    flags: list[str],
) -> None:
    row = replace(good_row(script), faults=faults)
    monkeypatch.setattr(sys, "argv", ["report", "--arch", "sm_80", *flags])
    monkeypatch.setattr(script, "ProcessPoolExecutor", Serial)
    monkeypatch.setattr(script, "cases", lambda architectures: [row.case])
    monkeypatch.setattr(script, "compile_case", lambda case: row)
    monkeypatch.setattr(script, "dequantize_faults", lambda architecture: spilling)
    assert script.main() == (1 if faults or spilling else 0)
    said = capsys.readouterr().out
    if flags:
        assert json.loads(said)["rows"][0]["faults"] == faults
        assert json.loads(said)["dequantize"] == spilling
    else:
        assert all(fault in said for fault in faults + spilling)
        assert "HGMMA" in said
