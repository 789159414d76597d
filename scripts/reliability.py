"""Kill, race and starve `wq quantize`, and see that nothing is lost, mixed up or left behind.

    python scripts/reliability.py --output benchmarks/results/DATE-reliability.json [--only resume] [--count 100]

    resume  SIGKILL at a random moment, again and again; the run that comes to its end must have made the same bytes as
            one that was never killed, and no block that was done may have been done again
    save    SIGKILL while a checkpoint takes the place of another; what is there must be all of one or all of the other,
            and the next run must leave nothing beside it
    race    two processes write to one folder at once; what is there must be whole
    memory  an operation fails for want of memory, any of them in turn; the checkpoint must have the same bytes
    soak    quantize, load and generate for --count minutes; memory and open files must not grow
    full    a disk of every size (tmpfs, for which one has to be root): refused with what is needed, the old checkpoint
            whole, and the run goes on once there is room

Each prints its counts. Models are random and tiny. What runs in a process of its own is forked from one that has
imported everything and computed nothing: a process that has computed has threads, which no fork survives.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has one thread, whatever its parent had
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[:1], os.environ.get("PYTHONPATH", "")])  # of forks

import tiny_models  # noqa: E402
import torch  # noqa: E402
from faults import Faults  # noqa: E402

import wq  # noqa: E402
from wq import manifest  # noqa: E402
from wq.errors import WqError  # noqa: E402
from wq.machine import release_memory  # noqa: E402
from wq.presets import quantize  # noqa: E402

ARCHITECTURES = ("llama", "mixtral", "qwen3", "llava", "t5")  # dense, experts, tied, image and text, encoder-decoder
METHODS = ("gptq", "awq", "rtn")
COUNTS = {"resume": 100, "save": 200, "race": 50, "full": 50, "memory": 200, "soak": 30}
OPTIONS: dict[str, Any] = {"calibration": "builtin", "samples": 16, "seqlen": 32, "group_size": 32}
Record = dict[str, Any]
NEW: Record = {"bits": 4, "method": "rtn", "overwrite": True, **OPTIONS}
SERVER = multiprocessing.get_context("forkserver")
MODELS = ("clip", "llama", "llava", "mixtral", "qwen3", "t5")
SERVER.set_forkserver_preload(
    [
        "tiny_models",
        "faults",
        "wq.presets",
        "wq.hf",
        *(f"transformers.models.{name}.modeling_{name}" for name in MODELS),
    ]
)


@dataclass
class Run:
    """`quantize` in a process of its own, which tells the number of each block that it has done."""

    source: Path
    out: Path
    options: Record

    def __post_init__(self) -> None:
        self._ear, mouth = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=_work, args=(self.source, self.out, self.options, mouth))
        self.process.start()
        mouth.close()

    def begun(self) -> None:
        """Wait until it begins."""
        self._ear.recv()

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> int:
        """Its exit status, negative for a signal: 0, 3 for a WqError, 1 for any other. Only to be asked once."""
        self.process.join()
        self.said: list[Any] = []
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.said.append(self._ear.recv())
        self._ear.close()
        code = self.process.exitcode
        self.process.close()
        assert code is not None
        return code

    @property
    def blocks(self) -> list[int]:
        """Those that it has done."""
        return [word for word in self.said if isinstance(word, int) and word]

    @property
    def error(self) -> str:
        """What it was refused with."""
        return next((word for word in self.said if isinstance(word, str)), "")


def _work(source: Path, out: Path, options: Record, mouth: Any) -> None:
    torch.set_num_threads(1)

    def tell(event: Record) -> None:
        if not event.get("resumed"):
            mouth.send(event["block"])

    mouth.send(0)
    try:
        quantize(source, out, on_block=tell, **options)
    except WqError as error:
        mouth.send(str(error))
        sys.exit(3)


def whole(folder: Path) -> str | None:
    """The manifest of a checkpoint all of whose files are what it says; None of any other folder."""
    files = manifest.read(folder) if folder.is_dir() else None
    if files is None or set(files) != set(manifest.names(folder)):
        return None
    good = all(manifest.sha256(folder / name) == entry["sha256"] for name, entry in files.items())
    return json.dumps(files, sort_keys=True) if good else None


def beside(folder: Path, *expected: Path) -> list[str]:
    """What lies in a folder besides what is expected there."""
    return sorted(path.name for path in folder.iterdir() if path not in expected)


# --- kills at any moment ---


def resume(count: int, work: Path, seed: int) -> Record:
    """Kill runs until each has come to its end."""
    kinds = [(architecture, method) for architecture in ARCHITECTURES for method in METHODS]
    draw, tallies = random.Random(seed), Counter[str]()
    by_kind: dict[str, Record] = {}
    for number, (architecture, method) in enumerate(kinds):
        kills = count // len(kinds) + (number < count % len(kinds))
        if kills:
            kind = f"{architecture} {method}"
            by_kind[kind] = _resume(work / kind.replace(" ", "-"), architecture, method, kills, draw)
            tallies.update(by_kind[kind])
            print(f"resume, {kind}: {by_kind[kind]}", flush=True)
    return {**tallies, "kinds": by_kind, "good": not (tallies["different"] or tallies["redone"] or tallies["left"])}


def _resume(work: Path, architecture: str, method: str, kills: int, draw: random.Random) -> Record:
    source = tiny_models.make(work / "dense", architecture)
    options = {**OPTIONS, "method": method}
    quantize(source, work / "once", **options)
    run = Run(source, work / "unbroken", options)
    run.begun()
    started = time.perf_counter()
    assert run.end() == 0
    seconds, made = time.perf_counter() - started, whole(work / "unbroken")
    assert made is not None
    assert whole(work / "once") == made
    tally = Counter(kills=0, runs=0, identical=0, different=0, redone=0, left=0)
    while tally["kills"] < kills:
        tally["runs"] += 1
        done = 0
        while True:
            run = Run(source, work / "out", options)
            if tally["kills"] < kills:
                run.begun()
                time.sleep(draw.uniform(0, seconds))
                run.kill()
            code = run.end()
            if run.blocks:  # else it was killed before it had done one
                tally["redone"] += max(0, done - min(run.blocks) + 1)
                done = max(run.blocks)
            if code != -signal.SIGKILL:
                break
            tally["kills"] += 1
        # Killed when all was done but for the last tidying up, it has ended: a folder that is there is refused then.
        same = whole(work / "out") == made and (code == 0 or "is not empty" in run.error)
        tally["identical" if same else "different"] += 1
        tally["left"] += len(beside(work, work / "dense", work / "once", work / "unbroken", work / "out"))
        shutil.rmtree(work / "out", ignore_errors=True)
    return dict(tally)


# --- kills while a checkpoint takes its place ---


def save(count: int, work: Path, seed: int) -> Record:
    """Kill runs while they put a checkpoint in the place of another."""
    source = tiny_models.make(work / "dense", "llama")
    states = {}
    for name, bits in (("old", 8), ("new", 4)):
        quantize(source, work / name, bits=bits, method="rtn", **OPTIONS)
        states[name] = whole(work / name)
    draw, tally = random.Random(seed), Counter(kills=0, old=0, new=0, mixed=0, left=0, wrong_next=0)
    out = work / "place" / "out"
    length = _publishing(source, work)
    while tally["kills"] < count:
        shutil.rmtree(out.parent, ignore_errors=True)
        shutil.copytree(work / "old", out)
        run = Run(source, out, NEW)
        for _ in range(3):  # it begins, and has done two blocks: all tensors are written
            run.begun()
        time.sleep(draw.uniform(0, length))
        run.kill()
        tally["kills"] += run.end() == -signal.SIGKILL
        found = whole(out)
        tally[next((name for name, state in states.items() if found == state), "mixed")] += 1
        quantize(source, out, bits=4, method="rtn", overwrite=True, **OPTIONS)
        tally["wrong_next"] += whole(out) != states["new"]
        tally["left"] += len(beside(out.parent, out))
    print(f"save: {dict(tally)}, in {length:.3f} s of saving", flush=True)
    return {**tally, "good": not (tally["mixed"] or tally["left"] or tally["wrong_next"])}


def _publishing(source: Path, work: Path) -> float:
    """How long the rest takes."""
    shutil.copytree(work / "old", work / "place" / "out")
    run = Run(source, work / "place" / "out", NEW)
    for _ in range(3):
        run.begun()
    started = time.perf_counter()
    assert run.end() == 0
    return time.perf_counter() - started


# --- two at once ---


def race(count: int, work: Path, seed: int) -> Record:
    """Two processes begin at the same time."""
    source = tiny_models.make(work / "dense", "llama")
    quantize(source, work / "alone", method="rtn", **OPTIONS)
    made, draw, out = whole(work / "alone"), random.Random(seed), work / "place" / "out"
    tally = Counter(races=0, one_refused=0, both_wrote=0, corrupt=0, left=0)
    while tally["races"] < count:
        shutil.rmtree(out.parent, ignore_errors=True)
        runs = []
        for _ in range(2):
            runs.append(Run(source, out, {"method": "rtn", "overwrite": True, **OPTIONS}))
            time.sleep(draw.uniform(0, 0.02))
        codes = sorted(run.end() for run in runs)
        tally["races"] += 1
        tally["one_refused"] += codes == [0, 3]
        tally["both_wrote"] += codes == [0, 0]
        tally["corrupt"] += whole(out) != made or codes not in ([0, 0], [0, 3])
        tally["left"] += len(beside(out.parent, out))
    print(f"race: {dict(tally)}", flush=True)
    return {**tally, "good": not (tally["corrupt"] or tally["left"])}


# --- no space ---


def full(count: int, work: Path, seed: int) -> Record:
    """Disks from too small for anything to large enough."""
    source = tiny_models.make(work / "dense", "llama", num_hidden_layers=4)
    options = {"method": "gptq", **OPTIONS}
    quantize(source, work / "alone", **options)
    made = whole(work / "alone")
    old = sum(file.stat().st_size for file in (work / "alone").iterdir())
    tally = Counter(sizes=0, refused=0, done=0, old_lost=0, not_told=0, not_resumed=0, resumed_behind_a_block=0)
    for number in range(count):
        room = old + 65536 + (4 * old) * (number + 1) // count  # for what is there, and for more and more
        with disk(work / "disk", room) as place:
            if place is None:
                print("full: not tried, a tmpfs cannot be mounted here", flush=True)
                return {"skipped": "a tmpfs cannot be mounted here", "good": True}
            _full(source, work, place / "out", made, options, tally)
    print(f"full: {dict(tally)}", flush=True)
    return {**tally, "good": not (tally["old_lost"] or tally["not_told"] or tally["not_resumed"])}


def _full(source: Path, work: Path, out: Path, made: str | None, options: Record, tally: Counter[str]) -> None:
    shutil.copytree(work / "alone", out)
    tally["sizes"] += 1
    run = Run(source, out, {**options, "seed": 1, "overwrite": True})
    code = run.end()
    tally["done"] += code == 0
    if code == 0:
        return
    tally["refused"] += code == 3
    told = any(words in run.error for words in ("bytes are needed", "cannot reserve", "is full"))
    tally["not_told"] += code != 3 or not told
    tally["old_lost"] += whole(out) != made
    subprocess.run(["mount", "-o", "remount,size=64m", str(out.parent)], check=True)
    events: list[Record] = []
    quantize(source, out, overwrite=True, on_block=events.append, **{**options, "seed": 1})
    tally["resumed_behind_a_block"] += bool(events[0].get("resumed"))
    tally["not_resumed"] += whole(out) is None or bool(beside(out.parent, out))


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of so many bytes, or None where that cannot be had."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
    try:
        yield None if mounted.returncode else folder
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True)


# --- no memory ---


def memory(count: int, work: Path, seed: int) -> Record:
    """Operations that fail, evenly spread over a run."""
    kinds = [("llama", "gptq"), ("mixtral", "awq"), ("t5", "gptq"), ("llava", "gptq"), ("mixtral", "gptq")]
    tally: Counter[str] = Counter(sites=0, same_bytes=0, different=0, ended=0)
    for architecture, method in kinds:
        source = tiny_models.make(work / architecture, architecture)
        options = {"method": method, "overwrite": True, "restart": True, **OPTIONS}
        with Faults() as counted:
            quantize(source, work / "one", **options)
        made, sites = whole(work / "one"), count // len(kinds)
        for site in range(sites):
            tally["sites"] += 1
            at = counted.count // 20 + counted.count * 9 // 10 * site // sites
            try:
                with Faults(at):
                    quantize(source, work / "two", **options)
            except torch.OutOfMemoryError:
                tally["ended"] += 1
            else:
                tally["same_bytes" if whole(work / "two") == made else "different"] += 1
    print(f"memory: {dict(tally)}", flush=True)
    return {**tally, "good": not (tally["different"] or tally["ended"])}


# --- for a long time ---


def soak(count: int, work: Path, seed: int) -> Record:
    """Quantize, load and generate for `count` minutes.

    A tokenizer that is dropped does not give back what it has cached (tokenizers 0.23: 70 kB for each of these, without
    any wq): what that comes to is measured by itself, and is not counted as growth.
    """
    import psutil

    from wq.hf import load

    sources = [tiny_models.make(work / name, name) for name in ("llama", "mixtral")]
    process, start, found = psutil.Process(), torch.arange(2, 12).unsqueeze(0), []
    tokenizers = sum(_growth_of_tokenizers(source) for source in sources)  # bytes a round
    stop = time.perf_counter() + 60 * count
    while time.perf_counter() < stop or len(found) < 10:
        for source in sources:
            quantize(source, work / "out", overwrite=True, **OPTIONS)
            model, _ = load(work / "out")
            with torch.no_grad():
                model.generate(start, max_new_tokens=8, do_sample=False)
            del model
        gc.collect()
        release_memory()
        found.append((process.memory_info().rss, process.num_fds()))
    settled = found[len(found) // 5 :]  # what is cached once is there by then
    rss, files = zip(*settled, strict=True)
    growth = (_slope(rss) - tokenizers) * len(rss)
    tally = {
        "minutes": count,
        "rounds": len(found),
        "rss_bytes": [rss[0], rss[-1]],
        "rss_growth_bytes": round(growth),
        "tokenizers_growth_bytes": round(tokenizers * len(rss)),
        "open_files": [files[0], files[-1]],
        "good": growth < 0.02 * rss[0] and files[-1] <= files[0],
    }
    print(f"soak: {tally}", flush=True)
    return tally


def _growth_of_tokenizers(source: Path) -> float:
    """Bytes that stay behind each time when a new tokenizer reads the calibration text, and nothing else happens."""
    import psutil
    from transformers import AutoTokenizer

    from wq.pipeline import calibration

    process, found = psutil.Process(), []
    for _ in range(100):
        calibration.load(OPTIONS["calibration"], AutoTokenizer.from_pretrained(source), 16, 32)
        gc.collect()
        release_memory()
        found.append(process.memory_info().rss)
    return _slope(found[20:])


def _slope(values: Sequence[float]) -> float:
    """By which values grow from one to the next, by least squares."""
    return statistics.linear_regression(range(len(values)), values).slope


PARTS = {"resume": resume, "save": save, "race": race, "full": full, "memory": memory, "soak": soak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--count", type=int, help=f"of each, or minutes; default: {COUNTS}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    made: Record = {
        "date": datetime.date.today().isoformat(),
        "versions": {"wq": wq.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
        "seed": options.seed,
    }
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            made[name] = PARTS[name](options.count or COUNTS[name], Path(folder), options.seed)
            made[name]["seconds"] = round(time.perf_counter() - started, 1)
    text = json.dumps(made, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    if not all(made[name]["good"] for name in options.only or PARTS):
        sys.exit(1)


if __name__ == "__main__":
    main()
