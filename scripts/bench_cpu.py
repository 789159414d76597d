"""Speed and memory on a CPU: single products, and a model that reads and writes, beside the dense original and peers.

usage: python scripts/bench_cpu.py raw [--dtypes bfloat16 float32] [--models SmolLM2-135M Llama-3-8B] --out RESULT.json
       python scripts/bench_cpu.py model DENSE PACKED [--environments DIR --gptq DIR --gguf FILE] --out RESULT.json
       python scripts/bench_cpu.py plot RESULT.json PLOT.svg

A machine's speed drifts, so what is compared is measured in turns, round after round, and figures are medians with the
tenth and ninetieth percentile. `model` keeps one process for each contender, which waits while the others have theirs:
`gptqmodel` and `torchao` with the Python DIR/NAME/bin/python (see scripts/peers/README.md), llama.cpp with that of
DIR/llamacpp, which has llama-cpp-python. A contender that cannot run says why. --compile adds compiled decoding.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SHAPES = {  # (out_features, in_features) of the layers of one block that differ
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
WQ: dict[str, int | None] = {"wq": None, "wq, head in 8 bits": 8}  # contenders, and WqConfig's head_bits
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPT, TOKENS, PREFILL = 8, 48, 512


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the tenth and ninetieth percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p10": cuts[0], "p90": cuts[-1]}


# --- single products ---


def raw(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each layer's call beside `F.linear` with its dense weight, in the same dtype."""
    import torch

    torch.set_num_threads(options.threads[0])
    results = []
    for dtype in options.dtypes:
        for name in options.models:
            for shape in SHAPES[name]:
                results += products(name, shape, getattr(torch, dtype), options.bits, options.rounds)
    return results


def products(name: str, shape: tuple[int, int], dtype: Any, bits: int, rounds: int) -> list[dict[str, Any]]:
    """One shape, for every number of rows."""
    import torch
    from torch.nn import functional

    layer = random_layer(shape, bits, 64 if shape[1] < 4096 else 128)
    layer.prepare(dtype)
    exact = layer.dequantize(torch.float64)
    dense = exact.to(dtype)
    results = []
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        with torch.inference_mode():
            y = layer(x)
            expected = x.double() @ exact.t()
            error = float((y.double() - expected).norm() / expected.norm())
            packed, plain = in_turns([lambda x=x: layer(x), lambda x=x: functional.linear(x, dense)], rounds, rows)
            beyond = overhead(layer, x) if layer.layout in ("native", "int4pack") and rows == 1 else {}
        ratios = [b / a for a, b in zip(packed, plain, strict=True)]
        results.append(
            {
                "model": name,
                "out_features": shape[0],
                "in_features": shape[1],
                "rows": rows,
                "dtype": str(dtype).removeprefix("torch."),
                "bits": bits,
                "layout": layer.layout,
                "relative_error": error,
                "seconds": spread(packed),
                "dense_seconds": spread(plain),
                "speedup": spread(ratios),
                **beyond,
            }
        )
        one = results[-1]
        print(f"{name} {shape} {one['dtype']} M={rows}: {one['speedup']['median']:.2f} ({error:.1e})", flush=True)
    return results


def overhead(layer: Any, x: Any) -> dict[str, float]:
    """What a layer's call takes beyond the kernel that it calls: medians, of many calls, in turns."""
    import torch

    from wq_kernels import native

    grid, packed = layer._buffers["_grid"], layer.weight_packed
    if layer.layout == "native":
        op = native.op(layer.scheme.bits)
        whole, kernel = in_turns([lambda: layer(x), lambda: op(x, packed, grid)], 999, 1)
    else:
        call, size = torch._weight_int4pack_mm_for_cpu, layer.in_features // grid.shape[0]
        whole, kernel = in_turns([lambda: layer(x), lambda: call(x, packed, size, grid)], 999, 1)
    seconds = statistics.median(kernel)
    return {"kernel_seconds": seconds, "overhead_seconds": statistics.median(whole) - seconds}


def random_layer(shape: tuple[int, int], bits: int, group: int) -> Any:
    """A packed layer of random codes, scales and zero points."""
    import torch

    from wq.layers import WqLinear
    from wq.scheme import Scheme

    layer = WqLinear(shape[1], shape[0], False, Scheme(bits, group, False), torch.float16).to_empty(device="cpu")
    for name, parameter in layer.named_parameters():
        if name == "weight_scale":
            parameter.data.uniform_(0.001, 0.02)
        else:
            parameter.data.random_(-(2**31), 2**31 - 1)
    return layer


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int, rows: int) -> list[list[float]]:
    """Seconds of each call, one after the other, round after round."""
    rounds = max(7, rounds // (1 + rows // 64))
    for call in calls:
        call()
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, mine in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            mine.append(time.perf_counter() - started)
    return seconds


# --- models: the processes that are measured ---


def worker(options: argparse.Namespace) -> None:
    """Load a contender, then answer lines that name a measure with lines of JSON, until there are none."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        importlib.import_module("llama_cpp" if options.worker == "llama.cpp" else "transformers.modeling_utils")
        if options.worker in WQ:
            importlib.import_module("wq.hf")
        if options.worker != "llama.cpp":
            warm_up(getattr(importlib.import_module("torch"), options.dtypes[0]))
        before = peak_bytes()
        started = time.perf_counter()
        contender = (Llama if options.worker == "llama.cpp" else Transformers)(options)
        seconds = time.perf_counter() - started
        contender.first()
        answer(load_seconds=seconds, peak_bytes=peak_bytes() - before, **contender.said())
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}"[:300])
        return
    for line in sys.stdin:
        try:
            answer(seconds=getattr(contender, line.strip())())
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}"[:300])


def warm_up(dtype: Any) -> None:
    """Let a model of a few numbers write: code that libraries load when they first compute is not what is measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(dtype).eval()
    with torch.inference_mode():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


class Transformers:
    """A model as transformers runs it: dense, or with the layers of wq, gptqmodel or torchao."""

    def __init__(self, options: argparse.Namespace):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(options.threads[0])
        kind, dtype = options.worker, getattr(torch, options.dtypes[0])
        self.kind = kind
        more: dict[str, Any] = {}
        if kind in WQ:
            from wq import WqConfig

            more["quantization_config"] = WqConfig(head_bits=WQ[kind])
        if kind == "gptqmodel":
            from gptqmodel import GPTQModel

            self.model = GPTQModel.load(str(options.folder), device="cpu", dtype=dtype).model
        else:
            self.model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, **more)
        if kind == "torchao":
            from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
            from torchao.quantization import quantize_

            inside = [name for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)]
            config = PrototypeInt4WeightOnlyConfig(64)
            quantize_(self.model, config, lambda _, name: name in inside and "lm_head" not in name)
        self.model.eval()
        self.torch = torch
        vocabulary = self.model.config.get_text_config().vocab_size
        self.ids = torch.arange(PREFILL).remainder(vocabulary - 10).add(5)[None]

    def said(self) -> dict[str, Any]:
        kinds = {type(module).__name__ for module in self.model.modules() if "inear" in type(module).__name__}
        return {"layers": sorted(kinds), "torch": self.torch.__version__}

    def first(self) -> None:
        self.generate(PROMPT, 2)

    def generate(self, prompt: int, tokens: int, **more: Any) -> float:
        """Seconds for tokens, one after the other."""
        ids = self.ids[:, :prompt]
        how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model.generate(ids, attention_mask=self.torch.ones_like(ids), **how, **more)
            return time.perf_counter() - started

    def decode(self) -> float:
        """Seconds a token after the first."""
        return (self.generate(PROMPT, TOKENS) - self.generate(PROMPT, 1)) / (TOKENS - 1)

    def first_token(self) -> float:
        """Seconds until the first token after a long prompt."""
        return self.generate(PREFILL, 1)

    def prefill(self) -> float:
        """Seconds a token of a long prompt, its last logits included."""
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model(self.ids, logits_to_keep=1)
            return (time.perf_counter() - started) / PREFILL

    def compiled(self) -> float:
        """Seconds a token after the first, with a static cache and a compiled forward."""
        how = {"cache_implementation": "static", "compile_config": self.compile_config()}
        return (self.generate(PROMPT, TOKENS, **how) - self.generate(PROMPT, 1, **how)) / (TOKENS - 1)

    def compile_config(self) -> Any:
        """That of `wq.compile_config(final=True)`, where wq is not installed, too.

        But transformers' own for gptqmodel, whose layers do not compile with the other.
        """
        from transformers import CompileConfig

        config = CompileConfig()
        vars(config)["_compile_all_devices"] = True
        if self.kind != "gptqmodel":
            config.mode = None
            unchecked = self.torch.compiler.skip_guard_on_all_nn_modules_unsafe
            config.options = {"cpp_wrapper": True, "guard_filter_fn": unchecked}
        return config


class Llama:
    """A GGUF file as llama.cpp runs it."""

    def __init__(self, options: argparse.Namespace):
        from llama_cpp import Llama as Model

        count = options.threads[0]
        self.model = Model(str(options.folder), n_ctx=1024, n_threads=count, n_threads_batch=count, verbose=False)
        self.ids = [5 + i % 1000 for i in range(PREFILL)]

    def said(self) -> dict[str, Any]:
        import llama_cpp

        return {"layers": [str(self.model.metadata.get("general.file_type"))], "llama_cpp": llama_cpp.__version__}

    def first(self) -> None:
        self.prefill()

    def decode(self) -> float:
        self.model.reset()
        self.model.eval(self.ids[:PROMPT])
        started = time.perf_counter()
        for token in self.ids[: TOKENS - 1]:
            self.model.eval([token])
        return (time.perf_counter() - started) / (TOKENS - 1)

    def first_token(self) -> float:
        return self.prefill() * PREFILL

    def prefill(self) -> float:
        self.model.reset()
        started = time.perf_counter()
        self.model.eval(self.ids)
        return (time.perf_counter() - started) / PREFILL

    compiled = decode


# --- models: who asks them ---


class Contender:
    """A worker's process. It imports nothing of wq unless it runs wq: a peer's Python has none."""

    def __init__(self, name: str, kind: str, python: str, folder: Path, options: argparse.Namespace):
        self.name = name
        command = [python, __file__, "worker", "--worker", kind, "--folder", str(folder)]
        command += ["--threads", str(options.threads[0]), "--dtypes", options.dtypes[0]]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.about = self.read()
        self.seconds: dict[str, list[float]] = {}
        print(f"{name}: {self.about}", flush=True)

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        return json.loads(line) if line else {"error": "its process ended"}

    def measure(self, what: str) -> None:
        if "error" in self.about or self.process.stdin is None:
            return
        print(what, file=self.process.stdin, flush=True)
        found = self.read()
        if "error" in found:
            self.about.setdefault("failed", {})[what] = found["error"]
        else:
            self.seconds.setdefault(what, []).append(found["seconds"])


def model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contender's speeds, and their ratios to the dense model's in the same round."""
    places: list[tuple[str, str, str, Path]] = [
        ("dense", "dense", sys.executable, options.dense),
        *((kind, kind, sys.executable, options.packed) for kind in WQ),
    ]
    if options.environments:
        for peer, folder in (("gptqmodel", options.gptq), ("torchao", options.dense), ("llama.cpp", options.gguf)):
            python = options.environments / peer.replace(".", "") / "bin" / "python"
            if python.exists() and folder is not None:
                places.append((peer, peer, str(python), folder))
    results = []
    for count in options.threads:
        here = argparse.Namespace(**{**vars(options), "threads": [count]})
        contenders = [Contender(*place, here) for place in places]
        measures = ["decode", "prefill", "first_token", *(["compiled"] if options.compile else [])]
        for turn in range(options.rounds + 1):
            for what in measures:
                for contender in contenders:
                    contender.measure(what)
            if turn == 0:  # warms up: the first compiles
                for contender in contenders:
                    contender.seconds.clear()
            print(f"{count} threads, round {turn} of {options.rounds}", flush=True)
        for contender in contenders:
            contender.process.kill()
            results.append(summary(contender, contenders[0], count))
            print(json.dumps(results[-1]), flush=True)
    return results


def summary(contender: Contender, dense: Contender, threads: int) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": contender.name, "threads": threads, **contender.about}
    for what, seconds in contender.seconds.items():
        ratios = [b / a for a, b in zip(seconds, dense.seconds[what], strict=False)]
        row[what] = {"seconds": spread(seconds), "tokens_per_second": 1 / statistics.median(seconds)}
        if what == "first_token":
            del row[what]["tokens_per_second"]
        row[what]["speedup"] = spread(ratios)
        if what == "compiled":  # what a user gains who did neither
            row[what]["speedup_over_dense_eager"] = spread(
                [b / a for a, b in zip(seconds, dense.seconds["decode"], strict=False)]
            )
    return row


# --- results ---


def plot(result: Path, file: Path) -> None:
    """How much faster than the dense layer, by rows. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "wq", "font.family": "DejaVu Sans", "font.size": 9})
    made = json.loads(result.read_text())["results"]
    panels = sorted({(row["dtype"], row["model"]) for row in made})
    figure, grid = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True, layout="constrained")
    for axes, (dtype, name) in zip([grid] if len(panels) == 1 else grid, panels, strict=True):
        rows = [row for row in made if (row["dtype"], row["model"]) == (dtype, name)]
        for shape in sorted({(row["out_features"], row["in_features"]) for row in rows}):
            mine = [row for row in rows if (row["out_features"], row["in_features"]) == shape]
            x, y = [row["rows"] for row in mine], [row["speedup"]["median"] for row in mine]
            axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.3, label=f"{shape[0]} × {shape[1]}")
        axes.axhline(1, color="#555555", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_title(f"{name}, {dtype}")
        axes.set_xlabel("rows")
        axes.legend(frameon=False, fontsize=7)
    (grid if len(panels) == 1 else grid[0]).set_ylabel("times as fast as the dense layer")
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)


def machine(threads: list[int]) -> dict[str, Any]:
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return {
        "processor": said.get("model name", platform.processor()),
        "instructions": [name for name in wanted if name in said.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("raw", "model", "worker"):
        one = commands.add_parser(name)
        one.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
        one.add_argument("--dtypes", nargs="+", default=["bfloat16"])
        one.add_argument("--rounds", type=int, default=25 if name == "raw" else 7)
        one.add_argument("--out", type=Path)
        if name == "raw":
            one.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
            one.add_argument("--bits", type=int, default=4)
        elif name == "model":
            one.add_argument("dense", type=Path)
            one.add_argument("packed", type=Path)
            one.add_argument("--environments", type=Path)
            one.add_argument("--gptq", type=Path, help="the packed checkpoint in the gptq format, for gptqmodel")
            one.add_argument("--gguf", type=Path, help="for llama.cpp")
            one.add_argument("--compile", action="store_true")
        else:
            one.add_argument("--worker")
            one.add_argument("--folder", type=Path)
    one = commands.add_parser("plot")
    one.add_argument("result", type=Path)
    one.add_argument("file", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.command == "worker":
        return worker(options)
    if options.command == "plot":
        return plot(options.result, options.file)
    results = raw(options) if options.command == "raw" else model(options)
    made = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["scripts/bench_cpu.py", options.command]),
        "machine": machine(options.threads),
        "results": results,
    }
    if options.out:
        options.out.write_text(json.dumps(made, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
