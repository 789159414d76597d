"""Compiles a source of this package for this processor and this torch, once, and loads it: an op in C++.

What is compiled is kept in `$XDG_CACHE_HOME/wq` (`~/.cache/wq`), under a digest of all it depends on. It speaks to
torch through its stable C interface, whose headers are few: a few seconds, on one core.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["CompileError", "find", "load", "processor", "refusal"]

_COMPILERS = ("g++", "clang++", "c++")
# Of the processor's abilities, as torch reports them, the flag that lets a compiler use each.
_AVX2 = {"avx2": "-mavx2", "fma3": "-mfma", "f16c": "-mf16c"}
_AVX512 = _AVX2 | {f"avx512_{name}": f"-mavx512{name}" for name in ("f", "bw", "vl", "dq")}
_BFLOAT16 = {"avx512_bf16": "-mavx512bf16", "avx512_vbmi": "-mavx512vbmi"}  # the second is of use with the first
_SECONDS = 300  # after which a compiler is given up
_log = logging.getLogger(__name__)


class CompileError(Exception):
    """Why nothing was compiled, in a line."""


def find() -> str:
    """The path of a C++ compiler: `$CXX`, or the first that is found; empty when there is none."""
    wanted = os.environ.get("CXX")
    return next((path for name in ([wanted] if wanted else _COMPILERS) if (path := shutil.which(name))), "")


def processor() -> list[str]:
    """The flags that let a compiler use this processor's vectors; empty where there is nothing to gain.

    They go no further than what torch itself uses here, which `$ATEN_CPU_CAPABILITY` may lower.
    """
    able, level = torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability()
    if able["architecture"] != "x86_64":
        return []
    if level == "AVX512" and all(able[name] for name in _AVX512):
        more = {name: flag for name, flag in _BFLOAT16.items() if able[name]} if able["avx512_bf16"] else {}
        every = _AVX512 | more
    elif level in ("AVX2", "AVX512") and all(able[name] for name in _AVX2):
        every = _AVX2
    else:
        return []
    return list(every.values())


def refusal() -> str:
    """Why nothing is compiled here, as far as that is known without trying; empty when it may be."""
    if sys.platform != "linux":
        return f"nothing is compiled on {sys.platform}"
    if not hasattr(torch.cpu, "get_capabilities") or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} has no stable interface in C"
    if not processor():
        return "nothing is compiled for this processor"
    return "" if find() else "no C++ compiler is installed"


def load(source: Path, **defined: str | int) -> Any:
    """The namespace of ops that `source` defines as `WQ_NAMESPACE`. defined: macros, besides that one.

    Raises CompileError when it cannot be compiled or loaded.
    """
    why = refusal()
    if why:
        raise CompileError(why)
    tool, flags = find(), processor()
    root = Path(torch.__file__).parent
    command = ["-shared", "-fPIC", "-std=c++20", "-O3", "-ffp-contract=off", "-w", *flags]
    command += [f"-D{name}={value}" for name, value in sorted(defined.items())]
    command += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{root / 'include'}",
        f"-L{root / 'lib'}",
        "-ltorch_cpu",
    ]
    stat = os.stat(tool)
    facts = [torch.__version__, tool, stat.st_size, stat.st_mtime_ns, *command, source.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:16]
    namespace = f"wq_{source.stem}_{digest}"
    library = _kept(namespace) or _compile([tool, str(source), *command], namespace)
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        library.unlink(missing_ok=True)
        raise CompileError(f"what {tool} made does not load: {_first_line(str(error.__cause__ or error))}") from error
    return getattr(torch.ops, namespace)


def _kept(namespace: str) -> Path | None:
    """A library that was made before and is whole: a cut one would end the process that loads it."""
    for path in sorted(_folder().glob(f"{namespace}-*.so")):
        if path.name == _name(namespace, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def _name(namespace: str, content: bytes) -> str:
    return f"{namespace}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wq"


def _compile(command: list[str], namespace: str) -> Path:
    """Runs a compiler and puts what it makes in place at once: of several processes, any may be first."""
    _log.info("compiling %s, once: %s", namespace, " ".join(command))
    tool = Path(command[0]).name
    try:
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            made = Path(folder) / "made.so"
            command = [*command, f"-DWQ_NAMESPACE={namespace}", "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            if done.returncode:
                raise CompileError(f"{tool} failed: {_first_line(done.stderr)}")
            library = _folder() / _name(namespace, made.read_bytes())
            os.replace(made, library)
            return library
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{tool} could not be run: {_first_line(str(error))}") from error


def _first_line(text: str) -> str:
    """The first line that speaks of an error, or the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it said nothing")
