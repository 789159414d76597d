"""What the tests of Triton kernels share: a process in which Triton interprets, and memory in which mistakes show.

Triton decides when it is imported whether it interprets, so such a test file runs itself as a script in a process of
its own, all cases in one go, and its tests look at what that printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GUARD = 4096  # values beside a tensor that nobody may use


def run_script(file: str, folder: Path, what: str = "", **environment: str) -> Any:
    """Run a test file as a script; what it printed. Nothing that steers Triton or wq is inherited."""
    pytest.importorskip("triton", reason="triton is not installed: the kernel can neither be interpreted nor compiled")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "WQ_"))}
    done = subprocess.run(
        [sys.executable, file, what],
        capture_output=True,
        text=True,
        env={
            **inherited,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests")]),
            "TRITON_CACHE_DIR": str(folder),
            **environment,
        },
    )
    assert done.returncode == 0, f"{file} ended with {done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def attempt(run: Callable[..., dict[str, Any]], *case: Any) -> dict[str, Any]:
    """`run(*case)`; an error is the problem of this case, and the others still run."""
    try:
        return run(*case)
    except Exception as error:
        return {"problem": repr(error), "splits": 1, "blocks": 1}


def words_of(codes: Tensor, points: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The bit streams of codes `[out, in]` and zero points `[G, out]`."""
    from wq_kernels import stream

    zero = None if symmetric else stream.pack(points, bits).t().contiguous()
    return stream.pack(codes, bits), zero


def tiled_weight(
    bits: int, symmetric: bool, n: int, k: int, group: int, scale_dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """A random weight in the tiled layout, any bits where it has no values, and the same weight in float64."""
    from wq_kernels import layout

    groups = k // group
    codes = torch.randint(1 << bits, (n, k))
    points = torch.full((groups, n), 1 << (bits - 1)) if symmetric else torch.randint(1 << bits, (groups, n))
    scale = ((torch.rand(n, groups) + 0.1) / (1 << bits)).to(scale_dtype)
    packed, zero = words_of(codes, points, bits, symmetric)
    words, tiled_scale, tiled_zero = layout.from_stream(packed, scale, zero, bits, k)
    ones, _ = words_of(torch.full((n, k), (1 << bits) - 1), points, bits, symmetric)
    valid = layout.from_stream(ones, scale, zero, bits, k)[0]
    words |= any_bits(*words.shape) & ~valid
    dense = (codes - points.t().repeat_interleave(group, 1)) * scale.double().repeat_interleave(group, 1)
    return (words, tiled_scale, tiled_zero), dense


def any_bits(*shape: int) -> Tensor:
    """int32, the sign bit included."""
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def guarded(tensor: Tensor) -> Tensor:
    """A copy that lies between values whose use is seen in a result: NaN, or the largest there are."""
    top = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    edge = torch.full((GUARD,), top, dtype=tensor.dtype)
    return torch.cat([edge, tensor.flatten(), edge])[GUARD : GUARD + tensor.numel()].view(tensor.shape)


@contextmanager
def poisoned() -> Iterator[list[str]]:
    """Inside, floats of `torch.empty` are NaN, and those of `torch.zeros` too lie between NaN. Afterwards the list
    tells what was written beside them."""
    real = {"empty": torch.empty, "zeros": torch.zeros}
    made: list[Tensor] = []
    problems: list[str] = []

    def maker(name: str) -> Callable[..., Tensor]:
        def make(*size: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
            plain = real[name](*size, dtype=dtype, **options)
            if not dtype.is_floating_point:
                return plain
            buffer = torch.full((plain.numel() + 2 * GUARD,), torch.nan, dtype=dtype)
            made.append(buffer)
            inside = buffer[GUARD : GUARD + plain.numel()].view(plain.shape)
            return inside if name == "empty" else inside.zero_()

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(torch, name, maker(name))
        yield problems
    if not all(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all() for buffer in made):
        problems.append("wrote outside of its buffers")


@contextmanager
def bounds_checked() -> Iterator[None]:
    """Inside, a kernel that loads or stores outside of the tensors it was given raises IndexError."""
    from triton.runtime import interpreter

    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    spans: list[tuple[int, int]] = []

    def launched(self: Any, *arguments: Any, **constants: Any) -> None:
        spans[:] = [span(tensor) for tensor in arguments if isinstance(tensor, Tensor)]
        launch(self, *arguments, **constants)

    def checked(real: Callable[..., Any], what: str, mask_at: int) -> Callable[..., Any]:
        def use(self: Any, pointers: Any, *rest: Any) -> Any:
            address = torch.from_numpy(pointers.data[rest[mask_at].data].astype("int64"))
            size = pointers.get_element_ty().primitive_bitwidth // 8
            inside = torch.zeros(address.shape, dtype=torch.bool)
            for start, end in spans:
                inside |= (address >= start) & (address + size <= end)
            if not inside.all():
                raise IndexError(f"{what}s {int((~inside).sum())} values outside of its tensors")
            return real(self, pointers, *rest)

        return use

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(builder, "create_masked_load", checked(builder.create_masked_load, "load", 0))
        patch.setattr(builder, "create_masked_store", checked(builder.create_masked_store, "store", 1))
        yield


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first byte to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


@contextmanager
def backwards() -> Iterator[None]:
    """Inside, thread blocks run from the last to the first, all tiles of the last split before those of another."""
    from triton.runtime.interpreter import InterpreterBuilder

    real = InterpreterBuilder.set_grid_idx

    def reverse(self: Any, *index: int) -> None:
        _, y, z = size = self.grid_dim
        place, tiles = (index[0] * y + index[1]) * z + index[2], size[0] * y
        split, tile = z - 1 - place // tiles, tiles - 1 - place % tiles
        real(self, tile // y, tile % y, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", reverse)
        yield
