"""Quantize one model with wq and with every other quantizer at hand, and measure all of them in the same way.

    python scripts/compare_peers.py MODEL --calibration C4.txt --wikitext WIKITEXT2.txt \\
        --environments FOLDER --output benchmarks/results/DATE-comparison.json

Every row calibrates on the same token ids, drawn once by wq for each seed (for wq itself the report's fingerprint must
be theirs, or that of the first of them), runs in a process of its own, and is read back by its own package as dense
weights. Those go into one float32 model, which is compared with the dense one on the same windows of three texts:
WikiText-2, the source of Python's standard library, and the documents of the calibration file that calibration never
sees.

A row is written to the output as soon as it is measured, and not made again by a later run; one that fails is written
with its error. `scripts/peers/README.md` says how to set up the environments. What other packages print is in the
folder of `--work`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from comparison import telling, texts
from comparison.processes import last_words, run, short
from comparison.rows import PEERS, Job, Row, interpreter, matches, rows
from comparison.scores import BLOCK, Scorer, peer_state, sizes, wq_state
from transformers import AutoTokenizer

import wq

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]


class Failed(Exception):
    """A row could not be made; the message is all there is to say."""


@dataclass(frozen=True)
class Bench:
    """What all rows share. paths: texts by name; ids: the fingerprint of the calibration windows by seed."""

    options: argparse.Namespace
    work: Path
    paths: dict[str, Path]
    ids: dict[int, str]
    scorer: Scorer

    def job(self, bits: int, symmetric: bool, seed: int) -> Job:
        o = self.options
        text, ids = self.paths["calibration"], self.work / f"ids-{seed}.pt"
        return Job(bits, o.group, symmetric, seed, o.samples, o.seqlen, text, ids)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a dense folder of safetensors")
    parser.add_argument("--name", help="what to call it in the report; default: its folder")
    parser.add_argument("--calibration", type=Path, help="C4-like text, a document a line; a quarter is for evaluation")
    parser.add_argument("--wikitext", type=Path, help="the test split of WikiText-2 as text")
    parser.add_argument("--environments", type=Path, default=Path("peers"), help="where each has a virtual environment")
    parser.add_argument(
        "--python", action="append", default=[], metavar="DRIVER=PYTHON", help="one that lies elsewhere"
    )
    parser.add_argument("--output", type=Path, help="the JSON file to write, or to go on with")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of WikiText-2")
    parser.add_argument("--other-windows", type=int, help="of the other texts; default: as many")
    parser.add_argument("--eval-seqlen", type=int, default=2048, help="tokens in an evaluation window")
    parser.add_argument("--timeout", type=float, help="hours that a row may take")
    parser.add_argument("--work", type=Path, help="for texts, ids, logs, unfinished checkpoints; default: temporary")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints in the folder of --work")
    parser.add_argument("--reference", default="wq balanced", help="the row that others are divided by")
    parser.add_argument("--plot", type=Path, action="append", help=".png or .svg; default: the output's name, .svg")
    parser.add_argument("--tell", action="store_true", help="only the table and the plot of what is in the output")
    parser.add_argument("--list", action="store_true", help="only the names of the rows")
    choices(parser)
    options = parser.parse_args()
    if not options.list and not options.output:
        parser.error("--output is needed")
    if not (options.list or options.tell) and not (options.model and options.calibration and options.wikitext):
        parser.error("MODEL, --calibration and --wikitext are needed")
    return options


def choices(parser: argparse.ArgumentParser) -> None:
    """Which rows, on which grids, how often."""
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--symmetric", action="store_true", help="the default; with --asymmetric, both grids")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--seeds", default="0", help="calibration seeds, as in 0,1,2")
    parser.add_argument("--headline", action="append", metavar="ROW", help="all seeds for these; default: any")
    parser.add_argument("--only", action="append", metavar="ROW", help="these rows (*: anything)")
    parser.add_argument("--skip", action="append", default=[], metavar="ROW", help="not these rows")
    parser.add_argument("--wq", action="append", default=[], metavar="NAME=OPTIONS", help="one more row of wq")
    parser.add_argument("--redo", action="append", default=[], metavar="ROW", help="measure these again")
    parser.add_argument("--retry", action="store_true", help="try again what failed or had no environment")


def prepare(options: argparse.Namespace, work: Path) -> Bench:
    """Texts, calibration ids for each seed, and the dense model with its hidden states."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    paths = texts.prepare(work, options.calibration, options.wikitext)
    size = options.samples, options.seqlen
    ids = {
        seed: texts.calibration_ids(paths["calibration"], tokenizer, *size, seed, work / f"ids-{seed}.pt")
        for seed in seeds(options)
    }
    print("dense model", flush=True)
    others = options.other_windows or options.windows
    windows = texts.windows(paths, tokenizer, options.eval_seqlen, options.windows, others)
    return Bench(options, work, paths, ids, Scorer(options.model, windows))


def seeds(options: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in options.seeds.split(",")]


def settings(bench: Bench) -> Record:
    """What must be the same for rows to stand in one file."""
    o, windows = bench.options, bench.scorer.texts
    files = sorted(Path(o.model).glob("*.safetensors"))
    return {
        "group": o.group,
        "samples": o.samples,
        "seqlen": o.seqlen,
        "windows": {name: len(ids) for name, ids in windows.items()},
        "eval_seqlen": o.eval_seqlen,
        "kl_block_tokens": BLOCK,
        "model_bytes": sum(file.stat().st_size for file in files),
        "calibration_text_sha256": hashlib.sha256(bench.paths["calibration"].read_bytes()).hexdigest(),
        "texts": {name: {"token_ids_sha256": texts.digest(ids)} for name, ids in windows.items()},
    }


def opened(bench: Bench) -> Record:
    """The report so far: read from the output, or begun. Rows of other settings do not belong in it."""
    output: Path = bench.options.output
    made: Record = json.loads(output.read_text()) if output.exists() else {"rows": []}
    wanted = settings(bench)
    differing = [name for name in wanted if made["rows"] and made["settings"].get(name) != wanted[name]]
    if differing:
        raise SystemExit(f"{output} was made with another {', '.join(differing)}; give another --output.")
    versions = {"wq": wq.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "date": datetime.date.today().isoformat(),
        "model": bench.options.name,
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()} CPU",
        "versions": {**versions, "python": platform.python_version()},
        "settings": wanted,
        "calibration_ids_sha256": {
            **made.get("calibration_ids_sha256", {}),
            **{str(s): d for s, d in bench.ids.items()},
        },
        "dense_perplexity": made.get("dense_perplexity") or bench.scorer.dense_perplexity(),
        "comparisons": [],
        "rows": made["rows"],
    }


def save(made: Record, output: Path, reference: str) -> None:
    """Write the report, a row a line: the many small numbers of a row are for programs."""
    made["comparisons"] = telling.comparisons(made, reference)
    parts = []
    for name, value in made.items():
        if name in ("rows", "comparisons") and value:
            listed = ",\n  ".join(json.dumps(one) for one in value)
            parts.append(f' "{name}": [\n  {listed}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    whole = "{\n" + ",\n".join(parts) + "\n}\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f"{output.name}.new")
    fresh.write_text(whole, encoding="utf-8")
    os.replace(fresh, output)


def wanted(options: argparse.Namespace) -> Iterator[tuple[Row, int, bool, int]]:
    """Rows with their bits, grid and seed, in the order of bits, grids and rows."""
    chosen = [
        r for r in rows(options.wq) if matches(r.name, options.only or ["*"]) and not matches(r.name, options.skip)
    ]
    grids = [grid for grid, asked in ((False, options.asymmetric), (True, options.symmetric)) if asked] or [True]
    for bits in options.bits:
        for symmetric in grids:
            for row in chosen:
                several = row.calibrates and matches(row.name, options.headline or ["*"])
                for seed in seeds(options) if several else seeds(options)[:1]:
                    yield row, bits, symmetric, seed


def identity(row: Row, bits: int, symmetric: bool, seed: int) -> Record:
    """What tells a row from others. Nothing in it is of this machine."""
    said = {"row": row.name, "bits": bits, "symmetric": symmetric, "seed": seed, "maker": row.maker}
    return {**said, "options": " ".join(row.options)}


def is_done(known: list[Record], asked: Record, options: argparse.Namespace) -> bool:
    """Whether the report has the row, and nobody asks for it again."""
    found = next((r for r in known if all(r.get(name) == value for name, value in asked.items())), None)
    if found is None or matches(asked["row"], options.redo):
        return False
    return not (options.retry and "error" in found)


def measure(bench: Bench, row: Row, bits: int, symmetric: bool, seed: int) -> Record:
    """One row: quantize, dequantize, evaluate; whatever goes wrong becomes its `error`."""
    asked = identity(row, bits, symmetric, seed)
    slug = f"{row.name}-{bits}-{'sym' if symmetric else 'asym'}-{seed}".replace(" ", "-")
    log, checkpoint = bench.work / f"{slug}.log", bench.work / slug
    given = dict(one.split("=", 1) for one in bench.options.python)
    python = interpreter(row, bench.options.environments, given)
    if python is None:
        return {**asked, "error": f"no environment for {row.maker}"}
    try:
        made = quantized(bench, row, bench.job(bits, symmetric, seed), checkpoint, python, log)
        if "unsupported" not in made:
            made |= evaluated(bench, row, bits, checkpoint, python, log)
    except Failed as error:
        made = {"error": str(error)}
    except Exception as error:  # a row that fails must not hide the others
        made = {"error": short(f"{type(error).__name__}: {error}")}
    if not bench.options.keep or "scores" not in made:
        for file in (checkpoint, checkpoint.with_suffix(".safetensors")):
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
    return {**asked, **made}


def quantized(bench: Bench, row: Row, job: Job, checkpoint: Path, python: Path, log: Path) -> Record:
    """Make the checkpoint, unless an interrupted run has; what it took, and who made it."""
    note = checkpoint / "measured.json"
    asked = {"row": repr(row), "job": repr(job)}
    if note.exists() and json.loads(note.read_text())["asked"] == asked:
        return json.loads(note.read_text())["made"]
    shutil.rmtree(checkpoint, ignore_errors=True)
    log.unlink(missing_ok=True)
    limit = bench.options.timeout and bench.options.timeout * 3600
    command = row.command(bench.options.model, checkpoint, job, python)
    done = run(command, log, foreign=row.maker != "wq", timeout=limit)
    if done.code:
        words = last_words(log)
        if words.startswith("unsupported: "):
            return {"unsupported": words.removeprefix("unsupported: ")}
        raise Failed(words)
    made: Record = {
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(done.cpu_seconds, 1),
        "peak_rss_bytes": done.peak_rss_bytes,
        "versions": versions(row, checkpoint),
    }
    if row.maker == "wq":
        made |= same_tokens(json.loads((checkpoint / "wq_report.json").read_text()), job)
    note.write_text(json.dumps({"asked": asked, "made": made}))
    return made


def same_tokens(report: Record, job: Job) -> Record:
    """What wq says of its run, which must have calibrated on the windows of the peers, or on the first of them."""
    said, count = report["calibration"], 0
    if said is not None:
        count = said["samples"]
        if said["sha256"] != texts.digest(torch.load(job.ids)[:count]):
            raise Failed("wq calibrated on other tokens than the peers were given")
    return {"calibration_windows": count, "fallbacks": len(report["fallbacks"])}


def versions(row: Row, checkpoint: Path) -> Record:
    """Of the package that made a checkpoint and of what it ran on, as it says itself."""
    if row.maker == "wq":
        return json.loads((checkpoint / "wq_report.json").read_text())["versions"]
    note = json.loads((checkpoint / "peer.json").read_text())
    return {note["peer"]: note["version"], **note["versions"]}


def evaluated(bench: Bench, row: Row, bits: int, checkpoint: Path, python: Path, log: Path) -> Record:
    """Read a checkpoint back as its owner means it, and compare it with the dense model."""
    if row.maker == "wq":
        state = wq_state(checkpoint)
    else:
        dense = checkpoint.with_suffix(".safetensors")
        driver = str(PEERS / f"{row.maker}_quantize.py")
        if run([str(python), driver, "--dequantize", str(checkpoint), str(dense)], log, foreign=True).code:
            raise Failed(f"while dequantizing: {last_words(log)}")
        state = peer_state(checkpoint, dense)
    bench.scorer.put(state)
    return {**sizes(checkpoint, bench.scorer.model, bits), "scores": bench.scorer.score()}


def compare(options: argparse.Namespace, work: Path) -> Record:
    """Measure every row that is not in the output yet."""
    work.mkdir(parents=True, exist_ok=True)
    options.name, options.model = options.name or Path(options.model).name, str(Path(options.model).resolve())
    bench = prepare(options, work)
    made = opened(bench)
    for row, bits, symmetric, seed in wanted(options):
        asked = identity(row, bits, symmetric, seed)
        if is_done(made["rows"], asked, options):
            continue
        print(f"{row.name}, {bits}-bit {'sym' if symmetric else 'asym'}, seed {seed}", flush=True)
        result = measure(bench, row, bits, symmetric, seed)
        same = ("row", "bits", "symmetric", "seed")
        made["rows"] = [r for r in made["rows"] if any(r[name] != asked[name] for name in same)] + [result]
        save(made, options.output, options.reference)
        print(f"  {brief(result)}", flush=True)
    save(made, options.output, options.reference)
    return made


def brief(result: Record) -> str:
    if "scores" not in result:
        return result.get("error") or f"not supported: {result['unsupported']}"
    figures = ", ".join(f"{text} {scores['kl']['mean']:.4f}" for text, scores in result["scores"].items())
    return f"KL {figures}; {result['bits_per_weight']:.2f} bits per weight, {result['seconds']:.0f} s"


def main() -> None:
    options = arguments()
    transformers.utils.logging.disable_progress_bar()
    if options.list:
        print("\n".join(row.name for row in rows(options.wq)))
        return
    if options.tell:
        made = json.loads(options.output.read_text())
    else:
        with contextlib.ExitStack() as stack:
            work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            made = compare(options, work.resolve())
    print(telling.table(made, options.reference))
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    elif telling.grouped(made["rows"]):
        telling.plot(made, options.plot or [options.output.with_suffix(".svg")])


if __name__ == "__main__":
    main()
