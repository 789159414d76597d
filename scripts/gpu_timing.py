"""What gpu_check.py measures with: the device, a clock, weights too large for the cache, and other people's kernels.

`Gpu` times CUDA graphs that go round many copies of a weight, so that every byte comes from memory as it does in a
model. `Dry` has the same methods and runs the same code on the CPU in Triton's interpreter, where time means nothing.
"""

from __future__ import annotations

import inspect
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from wq_kernels import experts, fused, layout
from wq_kernels.target import describe

GIB = 2**30
GUARD = 256  # values before and after a poisoned tensor
GROUP = 128

HALF = (torch.float16, torch.bfloat16)

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]
Call = Callable[[], object]
Tiled = tuple[Tensor, Tensor, Tensor]  # words, scale, zero


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over replays, and how far they lie apart, as a share of it."""

    seconds: float
    spread: float


class Gpu:
    """The first CUDA device."""

    dry = False
    work_seconds = 2e-3  # in one graph: what starting it costs is then lost in what it does
    replays = 9
    rotation_bytes = 256 * 10**6  # of weights in turn: several times the largest second-level cache
    reference_target = "generic"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device here; --dry runs everything in miniature on the CPU")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.timing_stream = torch.cuda.Stream()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def streams(self, count: int) -> list[Any]:
        """New streams that wait for what has been queued so far."""
        made = [torch.cuda.Stream() for _ in range(count)]
        for stream in made:
            stream.wait_stream(torch.cuda.current_stream())
        return made

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def hold(self, stream: Any) -> None:
        """Keep a stream busy for some milliseconds, so that what is queued on several starts together."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)

    def soil(self) -> None:
        """Leave memory that is free but not zero, as it is after some use."""
        torch.full((GIB // 4,), 7, dtype=torch.int32, device=self.device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def capture(self, function: Call, stream: Any = None, warm: bool = True) -> Call:
        """A CUDA graph of the function's work; calling it replays. warm: run it before, on the same stream."""
        stream = self.timing_stream if stream is None else stream
        stream.wait_stream(torch.cuda.current_stream())
        if warm:
            with torch.cuda.stream(stream):
                function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                function()
        except Exception:  # something that cannot be captured; what it leaves behind stays on the stream it was on
            torch.cuda.set_stream(torch.cuda.default_stream())
            self.timing_stream = torch.cuda.Stream()
            raise
        return graph.replay

    def time(self, calls: list[Call], expected: float) -> Timing:
        """One call, of several that are made in turn; expected: about how many seconds it takes."""
        rounds = max(1, math.ceil(self.work_seconds / (expected * len(calls))))

        def work() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        replay = self.capture(work)
        for _ in range(3):
            replay()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.replays)]
        for start, end in pairs:
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return _timing([start.elapsed_time(end) / 1e3 / (rounds * len(calls)) for start, end in pairs])

    def processors(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)


class Dry:
    """The CPU in Triton's place of a GPU: every line of a check, on tiny shapes, and no meaning in its times."""

    dry = True
    rotation_bytes = 0
    reference_target = "interpreter"

    def __init__(self) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("a dry run needs TRITON_INTERPRET=1 before Triton is imported")
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def streams(self, count: int) -> list[Any]:
        return [None] * count

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def hold(self, stream: Any) -> None:
        pass

    def soil(self) -> None:
        pass

    def capture(self, function: Call, stream: Any = None, warm: bool = True) -> Call:
        return function

    def time(self, calls: list[Call], expected: float) -> Timing:
        seconds = []
        for call in calls:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return _timing(seconds)

    def processors(self) -> int:
        return 1


Machine = Gpu | Dry


@dataclass(frozen=True)
class Bench:
    """What a section is given."""

    machine: Machine
    deadline: float  # time.time()

    def in_time(self) -> bool:
        return time.time() < self.deadline


def _timing(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    return Timing(median, (max(seconds) - min(seconds)) / median)


def about(machine: Machine) -> dict[str, Any]:
    """What the numbers were made on."""
    info: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if machine.dry:
        return {"card": None, "architecture": None, "driver": None, **info}
    properties = torch.cuda.get_device_properties(machine.device)
    return {
        "card": properties.name,
        "architecture": describe(machine.device).architecture,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        **info,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def energy_counter(machine: Machine) -> tuple[Callable[[], float] | None, str]:
    """A function that returns the joules the card has taken so far, or None and why there is none."""
    if machine.dry:
        return None, "no card"
    try:
        import pynvml

        pynvml.nvmlInit()
        index = torch.cuda._get_nvml_device_index(machine.device)
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # not installed, too old a card, or not allowed in this container
        return None, reason(error)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, ""


def short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def reason(error: BaseException) -> str:
    """What the last line of its traceback says, or the first of several, shortened."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


# --- weights and their kernels ---


def random_tiled(machine: Machine, n: int, k: int, dtype: torch.dtype, symmetric: bool, *lead: int) -> Tiled:
    """A random 4-bit weight in the tiled layout; n is a multiple of 16 and k of the group of 128. lead: experts."""
    device, groups = machine.device, k // GROUP
    words = torch.randint(-(2**31), 2**31, (*lead, groups, n, layout.WORDS), dtype=torch.int32, device=device)
    scale = ((torch.rand(*lead, groups, n, device=device) + 0.1) / 100).to(dtype)
    if symmetric:
        return words, scale, torch.full((*lead, 1, n), 8, dtype=torch.uint8, device=device)
    return words, scale, torch.randint(0, 16, (*lead, groups, n), dtype=torch.uint8, device=device)


def copies(machine: Machine, size: int) -> int:
    """How many weights of `size` bytes must take turns."""
    return max(2, math.ceil(machine.rotation_bytes / size))


@lru_cache(maxsize=1)
def rotating(machine: Machine, n: int, k: int, dtype: torch.dtype, symmetric: bool) -> list[Tiled]:
    """Packed weights that together are too large for the cache."""
    first = random_tiled(machine, n, k, dtype, symmetric)
    return [first, *(random_tiled(machine, n, k, dtype, symmetric) for _ in range(copies(machine, nbytes(*first)) - 1))]


@lru_cache(maxsize=1)
def rotating_dense(machine: Machine, n: int, k: int) -> list[Tensor]:
    """Dense bfloat16 weights, likewise."""
    shape = {"dtype": torch.bfloat16, "device": machine.device}
    return [torch.randn(n, k, **shape) for _ in range(copies(machine, 2 * n * k))]


@cache
def time_dense(machine: Machine, n: int, k: int, m: int) -> Timing:
    """torch.matmul in bfloat16."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=machine.device)
    calls: list[Call] = [partial(torch.mm, x, weight.t()) for weight in rotating_dense(machine, n, k)]
    return machine.time(calls, expected_seconds(2 * n * k, m, n, k))


def time_packed(machine: Machine, n: int, k: int, m: int, dtype: torch.dtype, symmetric: bool) -> tuple[Timing, int]:
    """The fused product, or above 256 rows the one that dequantizes first; and the bytes it must move."""
    weights = rotating(machine, n, k, dtype, symmetric)
    x = torch.randn(m, k, dtype=dtype, device=machine.device)
    calls: list[Call] = [partial(fused.linear, x, *weight, None, 4, n, k) for weight in weights]
    moved = nbytes(*weights[0]) + 2 * m * (n + k)
    return machine.time(calls, expected_seconds(moved, m, n, k)), moved


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def expected_seconds(moved: int, m: int, n: int, k: int) -> float:
    """A guess, good enough to choose how often to repeat."""
    return 2e-6 + max(moved / 2e12, 2 * m * n * k / 5e14)


class Poison:
    """While it is entered, `torch.empty` gives NaNs between more NaNs: who reads before writing, or writes beside, is
    found out. guarded: keep the tensors, for `fault` to look at what lies around them."""

    def __init__(self, guarded: bool = True):
        self.guarded = guarded
        self.buffers: list[Tensor] = []
        self._empty = torch.empty
        self._patch = mock.patch.object(torch, "empty", self._poisoned)

    def __enter__(self) -> Poison:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def _poisoned(self, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        if dtype is None or not dtype.is_floating_point:
            return self._empty(shape, dtype=dtype, **options)
        if not self.guarded:
            return self._empty(shape, dtype=dtype, **options).fill_(math.nan)
        buffer = self._empty(math.prod(shape) + 2 * GUARD, dtype=dtype, **options).fill_(math.nan)
        self.buffers.append(buffer)
        return buffer[GUARD:-GUARD].view(shape)

    def fault(self) -> str:
        """What was written where nothing should be; empty when nothing was."""
        for buffer in self.buffers:
            if not (buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()):
                return "wrote beside a tensor"
        return ""


@contextmanager
def compiled_for(target: str) -> Iterator[None]:
    """Have the kernels compiled as if for another target."""
    stand_in = mock.Mock(return_value=target)
    with mock.patch.object(fused, "target", stand_in), mock.patch.object(experts, "target", stand_in):
        yield


# --- other people's kernels, 4 bits, groups of 128 ---

Peer = Callable[[Machine, int, int], tuple[torch.dtype, list[Callable[[Tensor], object]]]]


def _tinygemm(machine: Machine, n: int, k: int) -> tuple[torch.dtype, list[Callable[[Tensor], object]]]:
    """The kernel that torchao uses, which torch brings along."""
    products: list[Callable[[Tensor], object]] = []
    for _ in range(copies(machine, n * k // 2)):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=machine.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scale = torch.rand(k // GROUP, n, 2, device=machine.device).to(torch.bfloat16)
        products.append(lambda x, p=packed, s=scale: torch.ops.aten._weight_int4pack_mm(x, p, GROUP, s))
    return torch.bfloat16, products


def _marlin(machine: Machine, n: int, k: int) -> tuple[torch.dtype, list[Callable[[Tensor], object]]]:
    """From the Hub, where the `kernels` package has it in its cache already; nothing is downloaded here."""
    from kernels import get_kernel

    module = get_kernel("kernels-community/quantization", version=1)
    types = getattr(module, "scalar_types", None) or module.scalar_type.scalar_types
    known = inspect.signature(module.gptq_marlin_gemm).parameters
    sizes = {"size_n": n, "size_k": k, "is_k_full": True, "use_atomic_add": False, "use_fp32_reduce": True}
    products: list[Callable[[Tensor], object]] = []
    for _ in range(copies(machine, n * k // 2)):
        values = dict.fromkeys(known) | sizes
        values["b_q_weight"] = torch.randint(
            -(2**31), 2**31, (k // 16, 2 * n), dtype=torch.int32, device=machine.device
        )
        values["b_scales"] = torch.rand(k // GROUP, n, device=machine.device).half()
        places = max(4 * machine.processors(), n // 4)
        values["workspace"] = torch.zeros(places, dtype=torch.int32, device=machine.device)
        values |= {"b_q_type": types.uint4b8, "is_zp_float": False}
        chosen = {name: values[name] for name in known}
        products.append(lambda x, v=chosen: module.gptq_marlin_gemm(**{**v, "a": x, "size_m": x.shape[0]}))
    return torch.float16, products


def _gemlite(machine: Machine, n: int, k: int) -> tuple[torch.dtype, list[Callable[[Tensor], object]]]:
    from gemlite.core import DType, GemLiteLinearTriton

    products: list[Callable[[Tensor], object]] = []
    for _ in range(copies(machine, n * k // 2)):
        layer = GemLiteLinearTriton(
            4, group_size=GROUP, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=machine.device)
        scale = (torch.rand(n, k // GROUP, device=machine.device) / 100).half()
        layer.pack(codes, scale, torch.full_like(scale, 8.0), bias=None)
        products.append(layer)
    return torch.float16, products


# The slowest to start is the last: it tunes itself for every number of rows.
PEERS: dict[str, Peer] = {"tinygemm": _tinygemm, "marlin": _marlin, "gemlite": _gemlite}


def time_peer(
    machine: Machine, name: str, n: int, k: int, counts: tuple[int, ...], in_time: Callable[[], bool]
) -> dict[str, Any]:
    """Seconds by number of rows. What a peer does not do, or is not here for, is an error in its place."""
    dtype, products = PEERS[name](machine, n, k)
    seconds: dict[str, Any] = {}
    for m in counts:
        if not in_time():
            seconds[str(m)] = "no time left"
            continue
        x = torch.randn(m, k, device=machine.device).to(dtype)
        try:
            calls: list[Call] = [partial(product, x) for product in products]
            seconds[str(m)] = machine.time(calls, expected_seconds(n * k // 2, m, n, k)).seconds
        except Exception as error:
            seconds[str(m)] = reason(error)
    return seconds


# --- speed ---

SQUARES = ((8192, 8192), (4096, 4096), (16384, 16384))
# out, in: qkv, gate and up, and down projections of Llama-3-8B, Qwen3-8B and Llama-3-70B
MODELS = (
    (28672, 4096),
    (4096, 14336),
    (6144, 4096),
    (57344, 8192),
    (8192, 28672),
    (10240, 8192),
    (24576, 4096),
    (4096, 12288),
)
ROWS = (1, 16, 32, 64, 128, 256, 2048, 8, 512, 1024, 4096, 4, 2)
FEW_ROWS = (1, 16, 64, 256, 2048)
PEER_ROWS = (1, 16, 32, 64, 128, 256, 1024)
VARIANTS = ((torch.bfloat16, True), (torch.float16, False), (torch.bfloat16, False))  # dtype, symmetric


def speed(bench: Bench) -> Iterator[Job]:
    """In the order of what one wants to know first."""
    machine = bench.machine
    if machine.dry:
        squares, models, rows, few, peer_rows = ((128, 256),), ((64, 128),), (1, 20, 260), (1, 20), (1, 4)
    else:
        squares, models, rows, few, peer_rows = SQUARES, MODELS, ROWS, FEW_ROWS, PEER_ROWS
    yield "copy", partial(copy_bandwidth, machine)
    yield "matmul", partial(matmul_ceiling, machine)
    for n, k in squares:
        yield from (packed_job(machine, n, k, m) for m in rows)
    for n, k in squares[:2]:
        yield from (packed_job(machine, n, k, m, *kind) for kind in VARIANTS for m in few)
    *quick, slow = PEERS
    yield from (peer_job(bench, name, n, k, peer_rows) for name in quick for n, k in squares)
    yield from (packed_job(machine, n, k, m) for n, k in models for m in few)
    yield from (packed_job(machine, n, k, m) for n, k in models for m in rows if m not in few)
    yield from (peer_job(bench, slow, n, k, peer_rows) for n, k in squares)


def copy_bandwidth(machine: Machine) -> Row:
    """Bytes read and written in a second."""
    count = 1000 if machine.dry else GIB
    source = torch.ones(count, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    taken = machine.time([partial(target.copy_, source)], 2 * count / 2e12)
    return {"kind": "copy", "bytes_per_second": 2 * count / taken.seconds, "spread": taken.spread}


def matmul_ceiling(machine: Machine) -> Row:
    """Floating point operations in a second of the library's bfloat16 product."""
    size = 64 if machine.dry else 8192
    taken = time_dense(machine, size, size, size)
    return {"kind": "matmul", "flops": 2 * size**3 / taken.seconds, "spread": taken.spread}


def packed_job(
    machine: Machine, n: int, k: int, m: int, dtype: torch.dtype = torch.float16, symmetric: bool = True
) -> Job:
    name = f"{short(dtype)} {'sym' if symmetric else 'asym'} {m}x{n}x{k}"
    return name, partial(packed_row, machine, n, k, m, dtype, symmetric)


def packed_row(machine: Machine, n: int, k: int, m: int, dtype: torch.dtype, symmetric: bool) -> Row:
    """One product, packed and dense."""
    dense = time_dense(machine, n, k, m)
    taken, moved = time_packed(machine, n, k, m, dtype, symmetric)
    what = {"n": n, "k": k, "m": m, "dtype": short(dtype), "symmetric": symmetric, "bytes": moved}
    times = {
        "seconds": taken.seconds,
        "spread": taken.spread,
        "dense_seconds": dense.seconds,
        "dense_spread": dense.spread,
    }
    return {"kind": "packed", **what, **times, "speedup": dense.seconds / taken.seconds}


def peer_job(bench: Bench, name: str, n: int, k: int, rows: tuple[int, ...]) -> Job:
    return f"{name} {n}x{k}", partial(peer_row, bench, name, n, k, rows)


def peer_row(bench: Bench, name: str, n: int, k: int, rows: tuple[int, ...]) -> Row:
    """Somebody else's kernel; `absent` says why there is none."""
    what = {"kind": "peer", "peer": name, "n": n, "k": k}
    try:
        seconds = time_peer(bench.machine, name, n, k, rows, bench.in_time)
    except Exception as error:
        return {**what, "absent": reason(error)}
    dense = {m: time_dense(bench.machine, n, k, m).seconds for m in rows}
    speedups = {m: dense[int(m)] / s for m, s in seconds.items() if isinstance(s, float)}
    return {**what, "seconds": seconds, "speedup": speedups}


# --- experts ---

MIXTURES = (("Mixtral", 8, 14336, 4096, 2), ("Qwen3-MoE", 128, 768, 2048, 8))  # experts, out, in, of a token
TOKENS = (1, 8, 64, 4, 16, 32, 2)


def mixtures(bench: Bench) -> Iterator[Job]:
    machine = bench.machine
    shapes = (("tiny", 4, 32, 128, 2),) if machine.dry else MIXTURES
    for name, count, n, k, chosen in shapes:
        for tokens in (1, 3) if machine.dry else TOKENS:
            yield f"{name} {tokens} tokens", partial(mixture_row, machine, name, count, n, k, chosen, tokens)


def mixture_row(machine: Machine, name: str, count: int, n: int, k: int, chosen: int, tokens: int) -> Row:
    """One projection of all experts, packed and dense, with other experts in every call."""
    kind, device = torch.bfloat16, machine.device
    size = count * n * k // 2
    packed = [random_tiled(machine, n, k, kind, True, count) for _ in range(copies(machine, size))]
    routes = [torch.rand(tokens, count, device=device).topk(chosen).indices.reshape(-1) for _ in range(2 * len(packed))]
    x = torch.randn(tokens, k, device=device).to(kind)
    calls: list[Call] = [
        partial(fused.expert_linear, x, route, *packed[i % len(packed)], None, 4, n, k)
        for i, route in enumerate(routes)
    ]
    active = statistics.mean(len(route.unique()) for route in routes)
    moved = int(active / count * nbytes(*packed[0])) + 2 * tokens * (k + chosen * n)
    expected = expected_seconds(moved, 1, n, k)
    taken = machine.time(calls, expected)
    del packed, calls
    dense, how = dense_mixture(machine, count, n, k, x, routes)
    what = {"model": name, "experts": count, "n": n, "k": k, "top": chosen, "tokens": tokens, "active_experts": active}
    what["bytes_per_second"] = moved / taken.seconds
    times = {"seconds": taken.seconds, "spread": taken.spread, "dense_seconds": dense.seconds, "dense": how}
    return {"kind": "mixture", **what, **times, "speedup": dense.seconds / taken.seconds}


def dense_mixture(machine: Machine, count: int, n: int, k: int, x: Tensor, routes: list[Tensor]) -> tuple[Timing, str]:
    """torch's grouped product where it runs, else a product for each expert; rows are sorted beforehand."""
    weights = [torch.randn(count, n, k, dtype=x.dtype, device=x.device) for _ in range(2)]
    grouped: list[Call] = []
    single: list[Call] = []
    for i, route in enumerate(routes):
        weight, share = weights[i % 2], route.numel() // x.shape[0]
        rows = x[route.argsort(stable=True) // share]
        ends = torch.bincount(route, minlength=count).cumsum(0)
        grouped.append(partial(_grouped, rows, weight.transpose(-2, -1), ends.to(torch.int32)))
        single.append(partial(_expert_by_expert, rows, weight, ends.tolist()))
    expected = expected_seconds(2 * min(count, routes[0].numel()) * n * k, routes[0].numel(), n, k)
    try:
        return machine.time(grouped, expected), "torch._grouped_mm"
    except Exception as error:  # an older torch, or not for this card or this shape
        return machine.time(single, expected), f"torch.mm for each expert ({reason(error)})"


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(rows, weight, offs=ends)


def _expert_by_expert(rows: Tensor, weight: Tensor, ends: list[int]) -> None:
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            torch.mm(rows[start:end], weight[expert].t())


# --- end to end ---

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def end_to_end(bench: Bench) -> Iterator[Job]:
    """The dense model first; then its linear layers are replaced, in place."""
    machine, made = bench.machine, {}
    yield "build", partial(build, machine, made)
    for how in ("eager", "compiled"):
        yield f"bf16 {how}", partial(generation, machine, made, how == "compiled")
    yield "pack", partial(pack, machine, made)
    for how in ("eager", "compiled"):
        yield f"wq {how}", partial(generation, machine, made, how == "compiled")


def build(machine: Machine, made: dict[str, Any]) -> Row:
    """A random model, on the device from the start."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = TINY if machine.dry else LLAMA_8B
    config = LlamaConfig(**sizes, eos_token_id=None, tie_word_embeddings=False)
    with torch.device(machine.device):
        made["model"] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return {"kind": "build", "bytes": nbytes(*made["model"].parameters())}


def pack(machine: Machine, made: dict[str, Any]) -> Row:
    """Random packed weights in place of the blocks' dense ones, of about their size."""
    from wq.layers import WqLinear
    from wq.scheme import Scheme

    model, scheme = made["model"], Scheme(4, GROUP, True, "bfloat16")
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)  # generate keeps the compiled dense model there
    blocks = model.model.layers
    linears = {name: m.weight.shape for name, m in blocks.named_modules() if type(m) is torch.nn.Linear}
    for name, (n, k) in linears.items():
        layer = WqLinear(k, n, False, scheme, torch.bfloat16)
        words = torch.randint(-(2**31), 2**31, (n, k * scheme.bits // 32), dtype=torch.int32, device=machine.device)
        scale = (0.5 + torch.rand(n, scheme.groups(k), device=machine.device)) * 0.02 / 4.6
        layer.weight_packed = torch.nn.Parameter(words, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale.bfloat16(), requires_grad=False)
        blocks.set_submodule(name, layer.prepare())
    layouts = sorted({layer.layout for layer in model.modules() if isinstance(layer, WqLinear)})
    return {"kind": "pack", "layers": len(linears), "layouts": layouts, "bytes": nbytes(*model.parameters())}


def generation(machine: Machine, made: dict[str, Any], compile_it: bool) -> Row:
    """Time to the first token, and then tokens a second and energy for each, with a static cache.

    The clock for the latter runs from one token to another of the same call, after everything has been compiled and
    captured: the prompt and what a call starts with are not in it.
    """
    model, vocabulary = made["model"], made["model"].config.vocab_size
    prompt, skipped, tokens = (8, 3, 6) if machine.dry else (512, 16, 128)
    ids = torch.randint(vocabulary, (1, prompt), device=machine.device)
    with torch.inference_mode():
        finite = bool(model(ids[:, :8]).logits.isfinite().all())
    joules, why = energy_counter(machine)
    marks: list[tuple[float, float]] = []
    options = generation_options(machine, compile_it) | {"attention_mask": torch.ones_like(ids)}

    def mark() -> None:
        machine.synchronize()
        marks.append((time.perf_counter(), joules() if joules else 0.0))

    def run(count: int, at: tuple[int, ...]) -> None:
        y = model.generate(ids, max_new_tokens=count, stopping_criteria=marking(mark, prompt, at), **options)
        if y.shape[1] != prompt + count:
            raise RuntimeError(f"{y.shape[1] - prompt} tokens came, not {count}")

    run(tokens, ())  # compiles, and sets the length of the cache
    run(tokens, (skipped, tokens))
    (start, before), (end, after) = marks
    firsts = []
    for _ in range(1 if machine.dry else 3):
        mark()
        run(1, ())
        mark()
        firsts.append(marks[-1][0] - marks[-2][0])
    speeds = {
        "first_token_seconds": statistics.median(firsts),
        "tokens_per_second": (tokens - skipped) / (end - start),
        "joules_per_token": (after - before) / (tokens - skipped) if joules else None,
    }
    return {"kind": "generation", "prompt": prompt, "finite": finite, **speeds, "energy_absent": why}


def generation_options(machine: Machine, compile_it: bool) -> dict[str, Any]:
    """What `generate` is given. It compiles decoding by itself on a GPU, unless told not to."""
    from transformers import CompileConfig

    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    if not compile_it:
        return options | {"disable_compile": True}
    config = CompileConfig(mode="reduce-overhead")
    if machine.dry:
        config = CompileConfig(mode="default", backend="eager")
        config._compile_all_devices = True
    return options | {"compile_config": config}


def marking(mark: Callable[[], None], prompt: int, at: tuple[int, ...]) -> Any:
    """Stopping criteria that stop nothing, but call `mark` when so many tokens have been generated."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Marking(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] - prompt in at:
                mark()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Marking()])
