"""Keep a tiny checkpoint for the tests: its tensors and config, and the hashes of what its owner dequantizes it to.

python scripts/peers/store_golden.py CHECKPOINT DEQUANTIZED.safetensors tests/golden/peers/NAME
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

KEPT = ("config.json", "peer.json", "model.safetensors")


def digest(weight: Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(weight.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dequantized", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(options.checkpoint / name, options.out / name)
    config = (options.checkpoint / "config.json").read_text()
    config = re.sub(r'("offload_to_disk_path": )"[^"]*"', r'\1""', config)  # a folder of the machine that made it
    (options.out / "config.json").write_text(config.rstrip() + "\n")
    note = json.loads((options.out / "peer.json").read_text())
    note["sha256"] = {name: digest(weight) for name, weight in sorted(load_file(options.dequantized).items())}
    (options.out / "peer.json").write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
