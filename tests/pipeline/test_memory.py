"""Memory does not grow with the number of blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny_models
from safetensors import safe_open

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
CODE = """
import json, sys
from wq.pipeline.quantizer import quantize
texts = [f"{i} little words in a row, and some more of them to fill it" for i in range(99)]
report = quantize(sys.argv[1], sys.argv[2], calibration=texts, samples=8, seqlen=64, without=["refine"])
print(json.dumps(report["peak_rss_bytes"]))
"""


def peak(folder: Path, blocks: int) -> int:
    """Peak resident bytes of quantizing a random Llama of so many blocks, in a process of its own."""
    source = tiny_models.make(folder / f"source{blocks}", "llama", num_hidden_layers=blocks, **SIZES)
    command = [sys.executable, "-c", CODE, source, folder / f"out{blocks}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_twice_the_blocks_peak_within_one_block(tmp_path: Path) -> None:
    few, many = peak(tmp_path, 8), peak(tmp_path, 16)
    with safe_open(tmp_path / "source8" / "model.safetensors", "pt") as tensors:
        names = [name for name in tensors.keys() if ".layers.0." in name]  # noqa: SIM118
        block = sum(tensors.get_tensor(name).nbytes for name in names)
    assert block > 10_000_000
    assert many - few < block, f"8 blocks: {few:,} bytes, 16 blocks: {many:,}, one block: {block:,}"
