"""What is compared: one row for each way of making a checkpoint, and the command that makes it.

A row of wq is a list of options of `wq quantize`; a row of a peer is a recipe of its driver in `scripts/peers`. What a
driver cannot make, it says itself (`unsupported: ...`), so that no table here can be wrong about it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

PEERS = Path(__file__).resolve().parents[1] / "peers"

WQ = {
    "wq rtn": "--method rtn",
    "wq awq": "--method awq",
    "wq fast": "--preset fast --samples 16",
    "wq balanced": "--preset balanced",
    "wq best": "--preset best",
}
# Name, driver without `_quantize.py`, recipe. AutoAWQ has 4 bits with zero points alone.
OTHERS = [
    ("gptqmodel default", "gptqmodel", "gptq"),
    ("gptqmodel best", "gptqmodel", "best"),
    ("gptqmodel gptaq", "gptqmodel", "gptaq"),
    ("gptqmodel awq", "gptqmodel", "awq"),
    ("auto-round light", "auto_round", "light"),
    ("auto-round default", "auto_round", "default"),
    ("auto-round best", "auto_round", "best"),
    ("llm-compressor gptq", "llm_compressor", "gptq"),
    ("llm-compressor gptq-mse", "llm_compressor", "gptq-mse"),
    ("llm-compressor awq", "llm_compressor", "awq"),
    ("autoawq", "autoawq", "gemm"),
    ("hqq", "hqq", "hqq"),
    ("hqq slow", "hqq", "slow"),
    ("torchao", "torchao", "intx"),
    ("torchao best", "torchao", "best"),
]
WITHOUT_DATA = ("wq rtn", "hqq*", "torchao*")  # one calibration seed is as good as another


@dataclass(frozen=True)
class Row:
    """One way of making a checkpoint. maker: `wq`, or the driver of a peer. options: of either's command line."""

    name: str
    maker: str
    options: tuple[str, ...]

    @property
    def calibrates(self) -> bool:
        return not matches(self.name, WITHOUT_DATA)

    def command(self, model: str, out: Path, job: Job, python: Path) -> list[str]:
        """The line that quantizes `model` to `out`."""
        if self.maker != "wq":
            grid = ["--bits", str(job.bits), "--group", str(job.group), *([] if job.symmetric else ["--asymmetric"])]
            driver = str(PEERS / f"{self.maker}_quantize.py")
            return [str(python), driver, model, str(out), *grid, *self.options, "--ids", str(job.ids)]
        grid = ["--bits", str(job.bits), "--group", str(job.group)]
        grid.append("--symmetric" if job.symmetric else "--asymmetric")
        data = ["--calibration", str(job.text), "--samples", str(job.samples), "--seqlen", str(job.seqlen)]
        start = [sys.executable, "-m", "wq", "quantize", model, "-o", str(out), "--device", "cpu", "--json"]
        return [*start, *grid, *data, "--seed", str(job.seed), *self.options]


@dataclass(frozen=True)
class Job:
    """What a row is asked for. text: what `wq` calibrates on; ids: the windows it takes from there, for the peers."""

    bits: int
    group: int
    symmetric: bool
    seed: int
    samples: int
    seqlen: int
    text: Path
    ids: Path


def rows(more: Iterable[str] = ()) -> list[Row]:
    """Every row: wq's, `NAME=OPTIONS` given besides, the peers'."""
    own = dict(WQ)
    for given in more:
        name, equals, options = given.partition("=")
        if not equals:
            raise SystemExit(f"--wq {given}: give NAME=OPTIONS, as in 'balanced=--preset balanced'.")
        own[f"wq {name.removeprefix('wq ')}"] = options
    made = [Row(name, "wq", tuple(shlex.split(options))) for name, options in own.items()]
    return [*made, *(Row(name, driver, ("--recipe", recipe)) for name, driver, recipe in OTHERS)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a row's name is one of `patterns`, in which `*` stands for anything."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def interpreter(row: Row, environments: Path, given: Mapping[str, str]) -> Path | None:
    """The Python of a row's environment: given by name, or found in a folder of environments; None if there is none."""
    if row.maker == "wq":
        return Path(sys.executable)
    if row.maker in given:
        return Path(given[row.maker]).expanduser().absolute()  # not resolved: a link is what makes it an environment
    for spelled in (row.maker, row.maker.replace("_", "-"), row.maker.replace("_", "")):
        python = environments.absolute() / spelled / "bin" / "python"
        if python.exists():
            return python
    return None
