"""How much sooner several processes are through with the calibration windows than one is.

The same `wq quantize` with few windows and with many, in one process and in several, one thread each: the difference is
what the windows cost, without loading, solving and writing. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import wq


def seconds(options: argparse.Namespace, processes: int, samples: int, folder: Path) -> float:
    """Of one run, from its start to its end."""
    words = ["-m", "wq", "quantize", options.model, "-o", str(folder / f"{processes}-{samples}")]
    words += ["--calibration", options.calibration, "--samples", str(samples), "--seqlen", str(options.seqlen)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *launcher, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    return time.perf_counter() - started


def row(options: argparse.Namespace, processes: int, folder: Path) -> dict[str, Any]:
    """What so many processes take, whole and for each window."""
    few, many = (seconds(options, processes, samples, folder) for samples in options.samples)
    return {
        "processes": processes,
        "seconds": [round(few, 2), round(many, 2)],
        "seconds_per_window": (many - few) / (options.samples[1] - options.samples[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="repo id or folder")
    parser.add_argument("--calibration", required=True, help="C4-like text")
    parser.add_argument("--samples", type=int, nargs=2, default=[64, 320], metavar=("FEW", "MANY"))
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    if options.samples[0] >= options.samples[1]:
        parser.error(f"--samples: MANY has to be above FEW, not {options.samples[1]}")
    made: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "model": Path(options.model).name,
        "machine": f"{os.cpu_count()} cores, one thread a process, {platform.machine()}",
        "versions": {"wq": wq.__version__, "torch": torch.__version__},
        "samples": options.samples,
        "seqlen": options.seqlen,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            made["rows"].append(row(options, processes, Path(folder)))
            first, last = made["rows"][0], made["rows"][-1]
            last["speedup"] = round(first["seconds_per_window"] / last["seconds_per_window"], 2)
            print(json.dumps(last), flush=True)
            options.output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
