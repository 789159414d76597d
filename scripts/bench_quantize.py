"""Accuracy, time and memory of every method on one model: quantize, then evaluate the packed checkpoint.

Each row is a real `wq quantize` in a process of its own (so that peak memory is its own) and a `wq eval` of what it
wrote. Time is quoted as a multiple of one dense forward pass over the same calibration tokens, measured first in the
same run. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import wq
from wq.hf import load
from wq.pipeline import calibration

ROWS: dict[str, list[str]] = {
    "rtn 4-bit asymmetric": ["--method", "rtn", "--asymmetric"],
    "rtn 4-bit symmetric": ["--method", "rtn"],
    "awq 4-bit asymmetric": ["--method", "awq", "--asymmetric"],
    "awq 4-bit symmetric": ["--method", "awq"],
    "fast 4-bit asymmetric": ["--preset", "fast", "--samples", "16", "--asymmetric"],
    "balanced 4-bit asymmetric": ["--asymmetric"],
    "balanced 4-bit symmetric": [],
    "balanced 3-bit asymmetric": ["--bits", "3", "--asymmetric"],
    "best 4-bit asymmetric": ["--preset", "best", "--asymmetric"],
    "best 3-bit asymmetric": ["--preset", "best", "--bits", "3", "--asymmetric"],
}


def dense_pass(model: str, text: str, samples: int, seqlen: int, repeats: int) -> float:
    """Median seconds of a dense float32 forward pass over the calibration tokens."""
    network, tokenizer = load(model, dtype="float32", device="cpu")
    tokens = calibration.load(text, tokenizer, samples, seqlen).tokens
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            for batch in tokens.split(max(1, 4096 // seqlen)):
                network(input_ids=batch, use_cache=False)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def run(arguments: list[str]) -> dict[str, Any]:
    """One `wq` command in a fresh process; its JSON."""
    done = subprocess.run([sys.executable, "-m", "wq", *arguments, "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def row(name: str, options: argparse.Namespace, folder: Path, dense_seconds: float | None) -> dict[str, Any]:
    """Quantize and evaluate one configuration."""
    output = str(folder / name.replace(" ", "-"))
    text = ["--calibration", options.calibration, "--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    report = run(["quantize", options.model, "-o", output, "--group", str(options.group), *text, *ROWS[name]])
    result: dict[str, Any] = {
        "row": name,
        "scheme": report["scheme"],
        "calibration": report["calibration"],
        "seconds": report["seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "checkpoint_bytes": report["checkpoint_bytes"],
        "fallbacks": len(report["fallbacks"]),
    }
    if dense_seconds is not None:
        result["dense_passes"] = report["seconds"] / dense_seconds
    if options.text:
        base = ["--base", options.model, "--text", options.text, "--windows", str(options.windows)]
        evaluation = run(["eval", output, *base, "--dtype", "float32", "--device", "cpu"])
        result["evaluation"] = {k: v for k, v in evaluation.items() if k not in ("model", "base", "seconds")}
        result["dense_perplexity"] = evaluation["base"]["perplexity"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="repo id, folder or GGUF file")
    parser.add_argument("--calibration", required=True, help="C4-like text")
    parser.add_argument("--text", help="evaluation text (WikiText-2 test); without it only time and memory")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--row", action="append", choices=ROWS, help="only these rows")
    parser.add_argument("--dense-repeats", type=int, default=0, help="dense passes to time; 0 to leave time out")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    made: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "model": Path(options.model).name,
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()} CPU",
        "versions": {"wq": wq.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        seconds = None
        if options.dense_repeats:
            shape = options.samples, options.seqlen, options.dense_repeats
            seconds = made["dense_pass_seconds"] = dense_pass(options.model, options.calibration, *shape)
        for name in options.row or ROWS:
            made["rows"].append(row(name, options, Path(folder), seconds))
            print(json.dumps(made["rows"][-1]), flush=True)
            options.output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
