"""Time and memory of loading a packed checkpoint and its dense original, side by side.

usage: python scripts/bench_load.py DENSE PACKED [--runs 5] [--out result.json]

Each run is a fresh process that builds the model once on meta (so that imports are not counted), drops the files from
the page cache where the system allows, loads, and then reads every byte of every parameter: safetensors maps files into
memory, so a dense load that is never read has not happened yet. Runs alternate between the two; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def load_once(folder: Path, packed: bool, cold: bool) -> dict[str, Any]:
    """What one load takes: seconds to return, seconds until every byte was read, and peak bytes above the start."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if packed:
        from wq import WqConfig

        options["quantization_config"] = WqConfig()
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    for file in folder.glob("*.safetensors") if cold else ():
        drop(file)
    before = resident()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    returned = time.perf_counter() - started
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8)[:: os.sysconf("SC_PAGE_SIZE")].sum()
    return {
        "returned_seconds": returned,
        "read_seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def drop(file: Path) -> None:
    """Ask the system to forget the pages of a file."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def resident() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def size(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compare(dense: Path, packed: Path, runs: int, cold: bool) -> dict[str, Any]:
    """Medians over alternating runs."""
    found: dict[str, list[dict[str, Any]]] = {"dense": [], "packed": []}
    for _ in range(runs):
        for name, folder in (("dense", dense), ("packed", packed)):
            command = [sys.executable, __file__, str(folder), name, "--once", *(["--cold"] if cold else [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in made) for key in made[0]} for name, made in found.items()
    }
    medians["packed_time_over_dense"] = medians["packed"]["read_seconds"] / medians["dense"]["read_seconds"]
    medians["packed_peak_over_size"] = medians["packed"]["peak_bytes"] / size(packed)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("packed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(load_once(options.dense, options.packed == "packed", options.cold)))
        return
    import torch
    import transformers

    packed = Path(options.packed)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "cores": os.cpu_count(),
        "bytes": {"dense": size(options.dense), "packed": size(packed)},
        "runs": options.runs,
        "cold": compare(options.dense, packed, options.runs, cold=True),
        "warm": compare(options.dense, packed, options.runs, cold=False),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
