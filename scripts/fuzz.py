"""Coverage-guided fuzzing of what reads configs and headers of any origin; needs `pip install 'wq-quant[fuzz]'`.

usage: python scripts/fuzz.py header|config|index|manifest [--seconds 60] [libFuzzer options]

Each target is handed bytes and may raise a `WqError`; any other exception ends the run, and libFuzzer keeps the input
as `crash-...`. Replay it: python scripts/fuzz.py header crash-...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402, F401  # before instrumentation: only wq's own code is to be covered

with atheris.instrument_imports(include=["wq"]):
    from wq import formats, loaders, manifest, quantized
    from wq.checkpoint import INDEX, read_header, read_headers
    from wq.errors import WqError
    from wq.hf.config import WqConfig, readable
    from wq.hf.takeover import serves
    from wq.loaders import config as loader_config
    from wq.scheme import Scheme
    from wq.structure.limits import check_depth
    from wq.verify.files import harmless, read_config
    from wq.verify.found import Found

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))
LAYER = "model.layers.0.mlp.up_proj"
SOLUTIONS = {"compressed-tensors": Scheme(4, 32, False), "gptq": Scheme(4, 32, False), "awq": Scheme(4, 32, False)}


def header(data: bytes) -> None:
    """A whole safetensors file; and the header of one, with its length before it and zeros for values."""
    file = PLACE / "model.safetensors"
    for content in (data, len(data).to_bytes(8, "little") + data + bytes(4096)):
        file.write_bytes(content)
        with contextlib.suppress(WqError):
            for entry in read_header(file).values():
                assert 0 <= entry.start <= entry.stop <= len(content)


def index(data: bytes) -> None:
    """An index, and the shards that it names, which are not there."""
    (PLACE / "model.safetensors").unlink(missing_ok=True)
    (PLACE / INDEX).write_bytes(data)
    read_headers(PLACE)


def digests(data: bytes) -> None:
    (PLACE / manifest.MANIFEST).write_bytes(data)
    for name in manifest.read(PLACE) or {}:
        assert (PLACE / name).parent == PLACE


def config(data: bytes) -> None:
    """A `quantization_config`, or the whole config.json, through everything that reads one."""
    (PLACE / "config.json").write_bytes(data)
    found = Found()
    values = read_config(PLACE, found)
    with contextlib.suppress(WqError):
        check_depth(values, 100)
    said = values.get("quantization_config")
    said = said if isinstance(said, dict) else values
    with contextlib.suppress(WqError):
        WqConfig().bind(said)
    readable(said)
    serves(said, None)
    for format, leaves in PACKED.items():
        with contextlib.suppress(WqError):
            formats.get(format).inspect(leaves, (64, 64), said, leaves.__getitem__, LAYER)
        with contextlib.suppress(WqError):
            quantized.describe(LAYER, ENTRIES[format], said)
    good = harmless(said, found)
    loader_config.excluded(good, LAYER)
    loader_config.names_head(good, "lm_head")
    for first in (True, False):
        loader_config.width(good, LAYER, (LAYER,), first)
    stored = {LAYER: formats.get("gptq").inspect(PACKED["gptq"], (64, 64), None, PACKED["gptq"].__getitem__, LAYER)}
    everything = values | {"quantization_config": good}
    for loader in loaders.VERSIONS:
        loaders.judge(loaders.Checkpoint(everything, stored, frozenset(), frozenset(), frozenset()), loader)
    json.dumps([found.problems, found.warnings])


def _packed() -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, object]]]:
    """A layer in each format, as tensors and as entries of a file."""
    from safetensors.torch import save_file

    from wq.solvers import rtn

    packed, entries = {}, {}
    for format, scheme in SOLUTIONS.items():
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        packed[format] = formats.get(format).pack(rtn.solve(weight, None, scheme), scheme)
        save_file(packed[format], PLACE / f"{format}.st")
        entries[format] = dict(read_header(PLACE / f"{format}.st"))
    return packed, entries


PACKED, ENTRIES = _packed()
TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "index": index, "manifest": digests, "config": config}
WORDS = """
    quantization_config quant_method bits group_size config_groups targets weights num_bits ignore dynamic re: -: +:
    checkpoint_format gptq awq compressed-tensors data_offsets shape dtype I32 F16 weight_map sha256 bytes version
"""


def seeds(name: str) -> Path:
    """A corpus to start from: good inputs."""
    folder = PLACE / "corpus"
    folder.mkdir()
    if name == "header":
        for file in PLACE.glob("*.st"):
            whole = file.read_bytes()
            (folder / file.name).write_bytes(whole)
            (folder / f"{file.name}.header").write_bytes(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    elif name == "index":
        (folder / "one").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "b.safetensors"}}))
    elif name == "manifest":
        (folder / "one").write_text(json.dumps({"version": 1, "files": {"a": {"bytes": 1, "sha256": "0"}}}))
    else:
        for format, scheme in SOLUTIONS.items():
            values = {
                "model_type": "llama",
                "quantization_config": formats.get(format).config(scheme, ["lm_head", "x"]),
            }
            (folder / format).write_text(json.dumps(values))
    return folder


def main() -> None:
    name, *rest = sys.argv[1:] or ["header"]
    seconds = rest.pop(rest.index("--seconds") + 1) if "--seconds" in rest else "60"
    options = [option for option in rest if option != "--seconds"]
    target = TARGETS[name]

    def once(data: bytes) -> None:
        with contextlib.suppress(WqError):
            target(data)

    words = PLACE / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS.split()))
    corpus = [] if any(Path(option).is_file() for option in options) else [str(seeds(name))]
    limits = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=4096", "-max_len=8192", f"-dict={words}"]
    atheris.Setup([sys.argv[0], *limits, *options, *corpus], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
