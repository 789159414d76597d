"""Whether a quantized folder is whole: every problem of it, found from headers, values and digests, with no network.

Meant for folders of any origin: nothing in them is run, files are read piece by piece, and no size that a header or a
config claims is believed before it is compared with what is on disk. One pass over

    files    config.json, the index and its shards, the manifest, a tokenizer
    tensors  those that the architecture needs, no more, each of its shape; how every packed layer is stored
    values   finite scales and dense tensors, no scale of zero, zero points and column groups in range
    config   what it says of each layer against what the tensors say; which loaders take it (`wq.loaders`)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wq import loaders
from wq.errors import CheckpointError, first_line
from wq.verify.contents import check_declared, match
from wq.verify.files import check_companions, check_manifest, harmless, read_config, read_tensors
from wq.verify.found import Found
from wq.verify.values import check_values


def verify(folder: str | os.PathLike[str], loader: str | None = None) -> dict[str, Any]:
    """Look at everything in a quantized folder and return a JSON-ready report.

    loader: a name in `wq.loaders.VERSIONS`; what it refuses is then a problem, too.

    `{"folder", "good", "problems", "warnings", "layers", "tensors", "bytes", "sha256", "loaders"}`: problems and
    warnings are lists of `{where, problem, measured, hint}` (measured is empty where the sentence has the value);
    sha256 counts the files whose digest was compared; loaders has what `wq.loaders.judge` says, for one or for all.
    Raises CheckpointError when the folder cannot be looked at, UnknownNameError for a loader that wq has no rules of.
    """
    if loader is not None:
        loaders.check_name(loader)
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder, so there is nothing to verify. Give a checkpoint's folder.")
    try:
        return _verify(path, loader)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}.") from error


def _verify(folder: Path, loader: str | None) -> dict[str, Any]:
    found = Found()
    config = read_config(folder, found)
    said = config.get("quantization_config")
    said = harmless(said if isinstance(said, dict) else {}, found)
    entries = read_tensors(folder, found)
    digests = check_manifest(folder, found)
    check_companions(folder, found)
    contents = match(folder, config, said, entries, found)
    check_declared(contents, said, found)
    check_values(entries, contents, found)
    checkpoint = loaders.Checkpoint(
        config | {"quantization_config": said},
        contents.layers,
        frozenset(contents.dense),
        frozenset(contents.whole),
        frozenset(contents.dense_whole),
    )
    verdicts = [loaders.judge(checkpoint, name) for name in (loader and [loader]) or loaders.VERSIONS]
    damaged = len(found.problems)
    for verdict in verdicts:
        if damaged:
            verdict["takes"] = False
            verdict["notes"].append(f"the checkpoint itself has problems: {damaged}")
        if loader is not None:
            found.problems += verdict["why"]
            if verdict["takes"] is None:
                found.problem("config.json", verdict["notes"][0], hint="Try it.")
    return {
        "folder": str(folder),
        "good": not found.problems,
        "problems": found.problems,
        "warnings": found.warnings,
        "layers": len(contents.layers) + len(contents.whole),
        "tensors": len(entries),
        "bytes": sum(entry.bytes for entry in entries.values()),
        "sha256": digests,
        "loaders": verdicts,
    }
