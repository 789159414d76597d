"""Lay kernels/ out as a repository that `kernels.get_kernel` loads: a folder for each backend, nothing compiled.

    python scripts/stage_hub_kernel.py OUT

Writes OUT/README.md and, for each backend in kernels/build.toml, OUT/build/torch-<backend> with the package, the
metadata that the loader asks for (which names every file and its digest), `_ops.py`, and a folder by the package's
name for those who put such a folder on their path. The same sources give the same bytes. OUT/build must not exist.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# Triton compiles on the device, for that device: all from the first one with the matrix instructions it needs.
ARCHITECTURES = {"cuda": ["8.0+PTX"]}

OPS = '''"""The namespace of this build's ops in torch."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op of this build."""
    return f"{id}::{{op_name}}"
'''

COMPATIBLE = '''"""For those who put the folder above on their path: the package there, under its name."""

import importlib.util
import sys
from pathlib import Path


def _load():
    name = "{id}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "__init__.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


_ITS_OWN = ("__name__", "__file__", "__path__", "__spec__", "__loader__", "__package__", "__cached__", "__builtins__")
globals().update({{name: value for name, value in vars(_load()).items() if name not in _ITS_OWN}})
'''


def stage(out: Path) -> list[Path]:
    """Write the repository; the folders of its variants. Raises FileExistsError where there is one."""
    with (KERNELS / "build.toml").open("rb") as file:
        general: dict[str, Any] = tomllib.load(file)["general"]
    (out / "build").mkdir(parents=True)
    shutil.copy(KERNELS / "CARD.md", out / "README.md")
    return [stage_variant(out / "build" / f"torch-{backend}", general, backend) for backend in general["backends"]]


def stage_variant(folder: Path, general: dict[str, Any], backend: str) -> Path:
    """The package and what belongs to it, for one backend."""
    package = str(general["name"]).replace("-", "_")
    shutil.copytree(KERNELS / "torch-ext" / package, folder, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    known = json.dumps(digests(folder), sort_keys=True).encode()
    name = f"_{package}_{backend}_{hashlib.sha256(known).hexdigest()[:7]}"
    (folder / "_ops.py").write_text(OPS.format(id=name), encoding="utf-8")
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(COMPATIBLE.format(id=name), encoding="utf-8")
    metadata = {
        "id": name,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": ARCHITECTURES[backend]} if backend in ARCHITECTURES else {}),
        "digest": {"algorithm": "sha256", "files": digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Base64 of the SHA-256 of every file, by its path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in files
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    options = parser.parse_args()
    try:
        variants = stage(options.out)
    except FileExistsError:
        sys.exit(f"{options.out / 'build'} exists. Remove it, or choose another folder.")
    for variant in variants:
        print(variant)


if __name__ == "__main__":
    main()
