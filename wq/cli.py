"""The command line. Heavy imports happen inside the commands, so that `wq --help` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from wq.errors import ProcessError, WqError


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM, under a name that typer does not take for a good end."""


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    cls=_Commands,
    help="4-bit weights for Hugging Face transformers: quantize, evaluate, share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs, and nothing else.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU by default, or the CPU.")]
Model = Annotated[str, typer.Argument(help="A repo id, a local folder or a GGUF file.")]
Preset = Annotated[
    str, typer.Option(help="fast, balanced or best: how much text and which steps. What else is given counts more.")
]
Method = Annotated[str | None, typer.Option(help="gptq, awq or rtn (which needs no data). Default: gptq.")]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 or 8. Default: 4.")]
TargetBpw = Annotated[
    float | None, typer.Option(help="Instead of --bits: mix widths so that a weight takes so many bits, 3.5 say.")
]
TargetSize = Annotated[
    str | None, typer.Option(help="Instead of --bits: mix widths so that all tensors take so much: 4.5GB.")
]
Mix = Annotated[str | None, typer.Option(help="The widths to mix. Default: 2,3,4,8; SGLang reads 4,8 alone.")]
Group = Annotated[
    int | None, typer.Option("--group", help="Columns that share a scale; -1: a row. Default: 128, or what fits.")
]
Symmetric = Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")]
Format = Annotated[str, typer.Option(help="compressed-tensors, gptq or awq.")]
CalibrationText = Annotated[
    str,
    typer.Option(
        help="c4, wikitext, a dataset id, a .txt/.jsonl/.parquet file, or, with no network, builtin, or self: the "
        "model writes it, and must fit in memory whole for that."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. Default: 128; fast 16, best 256.")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens in a calibration window. Default: 512.")]
Keep = Annotated[
    list[str] | None, typer.Option(help="Regular expression: matching layers stay dense. May be repeated.")
]
Without = Annotated[
    list[str] | None,
    typer.Option(help="Leave out a step (order, refine, search, sequence, target), to see its worth. Repeatable."),
]
Dtype = Annotated[
    str | None, typer.Option(help="Of scales and dense tensors: float16, bfloat16, float32. Default: the model's.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repo.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that the repo brings.")]
MaxMemory = Annotated[
    str | None, typer.Option(help="Refuse what takes more on its device, RAM or a GPU's memory: 12GB.")
]


def main() -> None:
    """Entry point: a `WqError` becomes one line and exit code 1, an interrupt or SIGTERM exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(standalone_mode=False)
    except ProcessError as error:
        _fail(_told(f"{type(error).__name__}: {error}", error), 1, echo=True)
    except WqError as error:
        _fail(_told(f"{type(error).__name__}: {error}", error), 1)
    except (_Interrupted, typer.Abort, KeyboardInterrupt) as error:
        _fail(_told("interrupted", error.__cause__ or error), 130, echo=True)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's way of saying that the words were wrong
        if usage is None:
            raise
        _fail(f"{usage()} Try --help.", getattr(error, "exit_code", 2))


def _told(message: str, error: BaseException) -> str:
    """A message, and what notes say of what to do now."""
    notes = getattr(error, "__notes__", [])
    return "\n".join([message, *notes]) if notes or isinstance(error, WqError) else f"{message}; nothing was written"


def _fail(message: str, code: int, echo: bool = False) -> None:
    """End with a message. echo: whether another of several processes says it, if this is not the first one."""
    rank = int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0
    if not (echo and rank):
        place = f"process {rank}: " if rank else ""
        _err.print(place + message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from wq import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    preset: Preset = "balanced",
    method: Method = None,
    bits: Bits = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    mix: Mix = None,
    group: Group = None,
    symmetric: Symmetric = True,
    format: Format = "compressed-tensors",
    calibration: CalibrationText = "c4",
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Chooses and orders the calibration text.")] = 0,
    keep: Keep = None,
    without: Without = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, where a run to this folder was interrupted.")
    ] = False,
    max_memory: MaxMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantize a dense model into a folder that transformers and vLLM load."""
    from wq import report
    from wq.machine import default_device
    from wq.pipeline.ranks import Ranks, assemble, launched
    from wq.presets import quantize as run

    ranks = assemble(device or default_device()) if launched() else Ranks()
    with _progress("block", as_json or not ranks.is_first) as update:
        made = run(
            model,
            output,
            ranks=ranks,
            preset=preset,
            method=method,
            bits=bits,
            group_size=group,
            symmetric=symmetric,
            format=format,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            keep=keep or (),
            without=without or (),
            dtype=dtype,
            device=device,
            revision=revision,
            overwrite=overwrite,
            restart=restart,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            target_bpw=target_bpw,
            target_size=target_size,
            mix=None if mix is None else _widths(mix),
            on_mix=update and (lambda done, total: update(done, total, "", "choosing widths")),
            on_block=update and partial(_block, update),
            on_sample=update and (lambda done, total: update(done, total, "", "sampled token")),
            on_step=update and partial(_step, update),
            on_part=update and (lambda done, total: update(done, total, "", "weighed window")),
        )
    if not ranks.is_first:
        return
    if as_json:
        print(json.dumps(made))
        return
    for layer in made["fallbacks"]:
        _err.print(f"! {layer['layer']}: rounded to nearest: {layer['fallback']}", style="yellow", markup=False)
    record = made["calibration"]
    if record is not None and record["samples"] < record["wanted"]:
        short = f"! {record['source']} gave {record['samples']} windows, not {record['wanted']}"
        _err.print(short, style="yellow", markup=False)
    if record is not None and record["left_out"]:
        short = f"! {len(record['left_out'])} calibration windows left out, where values are not finite: "
        _err.print(short + ", ".join(map(str, record["left_out"])), style="yellow", markup=False)
    if "reason" in (made.get("importance") or {}):
        _err.print(f"! tokens count alike: {made['importance']['reason']}", style="yellow", markup=False)
    if "reason" in (made["learning"] or {}):
        _err.print(f"! blocks have not learned: {made['learning']['reason']}", style="yellow", markup=False)
    if "reason" in made.get("distillation", {}):
        _err.print(f"! not distilled: {made['distillation']['reason']}", style="yellow", markup=False)
    _out.print(f"{output}: {report.share(made)}", markup=False, highlight=False, soft_wrap=True)
    for line in report.mixture(made["mixed"]) if "mixed" in made else ():
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    _out.print(
        f"{report.size(made['source_bytes'])} → {report.size(made['checkpoint_bytes'])} in {made['seconds']:.0f} s, "
        f"peak memory {report.size(made['peak_rss_bytes'])}",
        highlight=False,
    )
    _out.print(f"next: wq eval {output} --base {model}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A repo id, of which no weights are fetched, or a local folder.")],
    preset: Preset = "balanced",
    method: Method = None,
    bits: Bits = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    mix: Mix = None,
    group: Group = None,
    symmetric: Symmetric = True,
    format: Format = "compressed-tensors",
    calibration: CalibrationText = "c4",
    samples: Samples = None,
    seqlen: Seqlen = None,
    keep: Keep = None,
    without: Without = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """What quantize would make and take, with the same options: size, memory, disk, time, layers. Reads no weights."""
    from wq.planning import plan as run

    made = run(
        model,
        preset=preset,
        method=method,
        bits=bits,
        group_size=group,
        symmetric=symmetric,
        format=format,
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        keep=keep or (),
        without=without or (),
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        target_bpw=target_bpw,
        target_size=target_size,
        mix=None if mix is None else _widths(mix),
        max_memory=max_memory,
    )
    if as_json:
        print(json.dumps(made))
        return
    from wq import report

    for line in report.planned(made):
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    _out.print(layer_table(made["layers"]))


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """Layers by scheme, and what they take on disk."""
    from wq import report

    table = Table(title="layers that are quantized", title_justify="left")
    for column in ("layer", "shape", "blocks", "bits", "group", "grid", "on disk"):
        table.add_column(column, justify="left" if column in ("layer", "grid") else "right")
    for row in layers:
        scheme = row["scheme"]
        group = "row" if scheme["group_size"] == -1 else str(scheme["group_size"])
        grid = "symmetric" if scheme["symmetric"] else "asymmetric"
        shape = " × ".join(map(str, row["shape"]))
        counts = str(row["blocks"]), str(scheme["bits"]), group
        table.add_row(row["layer"], shape, *counts, grid, report.size(row["bytes"]))
    return table


def _widths(text: str) -> list[int]:
    """`4,8`"""
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of widths. Use --mix 4,8.") from None


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A repo id, a local folder or a GGUF file; dense or quantized.")],
    base: Annotated[str | None, typer.Option(help="The dense model, for KL and top-1 agreement with it.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="wikitext (WikiText-2 test), a local text file, or, without a network, builtin (English) or code "
            "(Python). May be repeated. Default: wikitext."
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Run these tasks of lm_eval instead: arc_easy,hellaswag; patterns, too.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples in front of each document. Default: the task's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests of a task that are computed at once.")] = 8,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of your own tasks in lm_eval's YAML, which may run Python.")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens per second instead, eager and compiled.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="What the models run in: auto, float32, float16, bfloat16.")] = "auto",
    head_bits: Annotated[
        int | None, typer.Option(help="Round the model's dense head to so many bits as it loads; 8 is near lossless.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity; with --base also KL and top-1 agreement on the same windows. With --tasks: benchmark tasks."""
    if sum((bool(text), tasks is not None, speed)) > 1:
        raise typer.BadParameter("--text, --tasks and --speed are evaluations apart: give one of them.")
    common = {"base": base, "dtype": dtype, "device": device, "head_bits": head_bits}
    if tasks is not None:
        own = {"limit": limit, "fewshot": fewshot, "batch": batch, "include_path": include_path}
        _evaluate_tasks(model, tasks, as_json, **common, **own)
    elif speed:
        _measure_speed(model, as_json, **common)
    else:
        _evaluate_texts(model, as_json, text=text or "wikitext", seqlen=seqlen, windows=windows, **common)


def _evaluate_texts(model: str, as_json: bool, **options: Any) -> None:
    from wq import report
    from wq.evaluate import evaluate as run

    with _progress("window", as_json) as update:
        result = run(model, on_window=update and (lambda done, total: update(done, total, "")), **options)
    if as_json:
        print(json.dumps(result))
    else:
        for one in report.texts_of(result):
            _out.print(evaluation_table(one))


def _evaluate_tasks(model: str, tasks: str, as_json: bool, **options: Any) -> None:
    from wq.tasks import evaluate as run

    result = run(model, [name.strip() for name in tasks.split(",") if name.strip()], **options)
    print(json.dumps(result)) if as_json else _out.print(task_table(result))


def task_table(result: dict[str, Any]) -> Table:
    """The figures of `wq.tasks`, side by side with the base's; ± is the standard error."""
    from wq import report

    part = "" if result["limit"] is None else f", first {result['limit']} documents"
    table = Table(title=f"lm_eval {result['lm_eval']}{part}, {result['dtype']}", title_justify="left")
    compared = result["base"] is not None
    names = ("task", "metric", *([result["base"]] if compared else []), result["model"])
    for name in (*names, *(["difference, on the same documents"] if compared else [])):
        table.add_column(Text(name))
    for row in result["tasks"]:
        dense = [report.figure(row["base"])] if compared else []
        change = [report.paired(row)] if compared else []
        table.add_row(report.task_name(row), row["metric"], *dense, report.figure(row), *change)
    return table


def _measure_speed(model: str, as_json: bool, **options: Any) -> None:
    from wq.speed import speed as run

    with _progress("round", as_json) as update:
        notify = update and (lambda done, total: update(done, total, ""))
        result = run(model, on_round=notify, **options)
    print(json.dumps(result)) if as_json else _out.print(speed_table(result))


def speed_table(result: dict[str, Any]) -> Table:
    """The figures of `wq.speed`, side by side with the base's."""
    title = f"tokens per second, {result['dtype']} on {result['device']}, {result['threads']} threads"
    table = Table(title=title, title_justify="left")
    rows = {
        "prefill": f"read, {result['prompt']} at once",
        "decode": "written, one after the other",
        "compiled": "written, static cache and compiled",
    }
    names = [key for key in ("base", "model") if key in result]
    for name in ("", *(result[key]["model"] for key in names), *(["times the dense"] if "base" in result else [])):
        table.add_column(Text(name), justify="right" if name else "left")
    for what, label in rows.items():
        if what in result["problems"]:
            table.add_row(label, f"not compiled: {result['problems'][what]}")
        elif what in result["model"]:
            ratio = [f"{result['speedup'][what]:.2f}"] if "base" in result else []
            table.add_row(label, *(f"{result[key][what]:.1f}" for key in names), *ratio)
    return table


def evaluation_table(result: dict[str, Any]) -> Table:
    """The figures of `wq.evaluate` on one text, side by side with the base's."""
    from wq import report

    title = f"{result['text']}, {result['windows']} × {result['seqlen']} tokens, {result['dtype']}"
    table = Table(title=title, title_justify="left")
    for column in ("model", "perplexity", "KL mean", "95 %", "median", "p99", "top-1"):
        table.add_column(column, justify="left" if column == "model" else "right")
    base, kl = result.get("base"), result.get("kl")
    if base:
        table.add_row(base["model"], f"{base['perplexity']:.3f}", "0", "", "0", "0", "100 %")
    compared = ["–"] * 4
    if kl:
        compared = [f"{kl['mean']:.4f}", report.interval(kl), f"{kl['median']:.4f}", f"{kl['p99']:.4f}"]
    agreement = f"{result['top1_agreement']:.1%}" if kl else "–"
    table.add_row(result["model"], f"{result['perplexity']:.3f}", *compared, agreement)
    return table


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="organisation/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repo private.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Push although the card has no measured figures.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint with its card to the Hub."""
    from wq.hub import push as run

    address = run(folder, repo, private=private, require_evaluation=not no_eval)
    print(json.dumps({"repo": repo, "url": address})) if as_json else _out.print(address, highlight=False)


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint folder: explain the kernel of each layer.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Explain for sm_80, sm_90, ... instead of the device here.")] = None,
    as_json: Json = False,
) -> None:
    """Versions, devices, and which kernel each layer of a checkpoint would use, and why."""
    from wq.doctor import doctor as run

    report = run(checkpoint, arch)
    if as_json:
        print(json.dumps(report))
        return
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in report["versions"].items())
    devices = ", ".join(str(device.get("name", device["device"])) for device in report["devices"])
    backends = ", ".join(name if here else f"{name} (cannot be imported)" for name, here in report["backends"].items())
    for label, text in (("versions", versions), ("devices", devices), ("backends", backends)):
        _out.print(f"{label}: {text}", markup=False, highlight=False, soft_wrap=True)
    if report["tiles"]:
        _out.print(f"tiles: {report['tiles']}", markup=False, highlight=False, soft_wrap=True)
    for layer in report.get("layers", ()):
        _out.print(kernel_table(layer, report["for"]))


def kernel_table(layer: dict[str, Any], device: str) -> Table:
    """What computes a layer, by the rows of its input."""
    grid = "symmetric" if layer["symmetric"] else "asymmetric"
    size = f"{layer['out_features']} × {layer['in_features']}, {layer['bits']} bits, groups of {layer['group_size']}"
    why = "" if layer["why"] == "fused" else f" ({layer['why']})"
    title = f"{layer['count']} layers of {size}, {grid}: {', '.join(layer['layers'])}"
    table = Table(title=title, title_justify="left")
    table.add_column("rows", justify="right")
    table.add_column(f"on {device}{why}")
    for rows, kernel in layer["kernels"].items():
        table.add_row(str(rows), kernel)
    return table


@app.command()
def tune(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; name it in WQ_CONFIG.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the kernels' tiles on this GPU, and write those that beat the built-in table. Takes minutes."""
    from wq.tuning import tune as run

    with _progress("rows", as_json) as update:
        made = run(output, overwrite=overwrite, on_bucket=update and (lambda done, total: update(done, total, "")))
    if as_json:
        print(json.dumps(made))
        return
    for tile in made["tiles"]:
        gain = tile["default_milliseconds"] / tile["milliseconds"]
        _out.print(f"up to {tile['rows']} rows: {gain:.2f}× as fast as the table", highlight=False)
    _out.print(f"next: WQ_CONFIG={output} python ...", markup=False, highlight=False, soft_wrap=True)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="A quantized checkpoint folder, of any origin.")],
    loader: Annotated[
        str | None, typer.Option("--for", help="transformers, vllm or sglang: what it refuses is a problem, too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a finished checkpoint: files, headers, shapes, values, config, and which loaders take it.

    Exit code 0: good. 1: problems, each on a line. 2: it cannot be looked at.
    """
    from wq.verify import verify as run

    try:
        report = run(folder, loader)
    except WqError as error:
        _fail(f"{type(error).__name__}: {error}", 2)
    if as_json:
        print(json.dumps(report))
    else:
        for mark, found in (("✗", report["problems"]), ("!", report["warnings"])):
            for one in found:
                _out.print(problem_line(mark, one), markup=False, highlight=False, soft_wrap=True)
        count = f"{report['layers']} packed layers, {report['tensors']} tensors, {report['sha256']} files by sha256"
        problems = len(report["problems"])
        state = "good" if report["good"] else f"{problems} problem{'s' * (problems > 1)}"
        _out.print(f"{folder}: {state} ({count})", markup=False, highlight=False, soft_wrap=True)
        _out.print(loader_table(report["loaders"]))
    if not report["good"]:
        sys.exit(1)


def problem_line(mark: str, one: dict[str, str]) -> str:
    """`✗ where: what it is (measured). What to do.`"""
    measured = f" ({one['measured']})" if one["measured"] else ""
    hint = f" {one['hint']}" if one["hint"] else ""
    return f"{mark} {one['where']}: {one['problem'].rstrip('.')}{measured}.{hint}"


def loader_table(verdicts: list[dict[str, Any]]) -> Table:
    """What each loader says to a checkpoint, and why."""
    table = Table(title="loaders, by how it is quantized; not by its architecture", title_justify="left")
    for column in ("loader", "takes it", "why, or with what"):
        table.add_column(column)
    for verdict in verdicts:
        why = [problem_line("-", one) for one in verdict["why"]]
        if not why and verdict["takes"]:
            able = [kernel for kernel, refusal in verdict["kernels"].items() if not refusal]
            why = [f"all layers by {', '.join(able)}"] if able else ["each layer by one kernel or another"]
            why = why if verdict["kernels"] else []
        takes = {True: "yes", False: "no", None: "unknown"}[verdict["takes"]]
        lines = Text("\n".join([*why, *verdict["notes"]]))
        table.add_row(f"{verdict['loader']} {verdict['version']}", takes, lines)
    return table


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A quantized checkpoint folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gptq or awq.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another format, with every weight the same, or say why that cannot be."""
    from wq.convert import convert as run

    with _progress("layer", as_json) as update:
        made = run(
            source,
            output,
            to=to,
            overwrite=overwrite,
            on_layer=update and (lambda done, total: update(done, total, "")),
        )
    if as_json:
        print(json.dumps(made))
        return
    proof = f"dequantized weights identical: {made['identical']}/{made['layers']}"
    _out.print(f"{output}: {proof}", markup=False, highlight=False, soft_wrap=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="A Python script or module, lm_eval say; its arguments follow.")],
) -> None:
    """Run a Python program in which wq loads every quantized repo it can read: wq run -- lm_eval --model hf ..."""
    import runpy

    from wq.hf import takeover

    sys.argv = [program, *context.args]
    with takeover(os.environ.get("WQ_TAKEOVER", "always")):
        if Path(program).is_file():
            sys.path.insert(0, str(Path(program).resolve().parent))
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path.insert(0, "")
            runpy.run_module(program, run_name="__main__", alter_sys=True)


@contextmanager
def _progress(verb: str, quiet: bool) -> Iterator[Callable[..., None] | None]:
    """A callback `(done, total, note, verb)`: it moves a bar in a terminal, prints a line elsewhere; None when quiet.

    verb: where it is another than most of the time.
    """
    if quiet:
        yield None
    elif not _err.is_terminal:

        def line(done: int, total: int, note: str, other: str | None = None) -> None:
            text = f"{other or verb} {done}/{total}  {note}".rstrip()
            _err.print(text, markup=False, highlight=False, soft_wrap=True)

        yield line
    else:
        note = TextColumn("{task.fields[note]}")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note
        with Progress(*columns, console=_err, transient=True) as bar:
            task = bar.add_task(verb, total=None, note="")

            def move(done: int, total: int, note: str, other: str | None = None) -> None:
                bar.update(task, description=other or verb, completed=done, total=total, note=note)

            yield move


def _step(update: Callable[[int, int, str, str], None], done: int, total: int, kl: float) -> None:
    update(done, total, f"KL {kl:.4f}", "distillation step")


def _block(update: Callable[[int, int, str], None], event: dict[str, Any]) -> None:
    """Errors of a block's layers, the time it took, and what is left if all others take as long."""
    if event.get("resumed"):
        update(event["block"], event["blocks"], "done before, going on")
        return
    errors = [f"{r['layer'].rpartition('.')[2]} {r['error']:.1e}" for r in event["layers"] if "error" in r]
    left = event["seconds"] * (event["blocks"] - event["block"])
    note = f"{'  '.join(errors)}  {event['seconds']:.1f} s  ETA {left:.0f} s".lstrip()
    update(event["block"], event["blocks"], note)


if __name__ == "__main__":
    main()
