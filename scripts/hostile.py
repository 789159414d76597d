"""Ten thousand damaged checkpoints, hostile configs and impossible layers, each in front of wq with a limit on it.

usage: python scripts/hostile.py [--count 10000] [--only NUMBER] [--out benchmarks/results/DATE-hostile.json]

One worker process at a time opens the folders, so that a crash, a hang (no answer in LIMIT seconds), seconds of the
processor and memory (the peak above what was there before, from the kernel) are seen as such. What is damaged, and how,
is in tests/hostile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "hostile"), str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels" / "torch-ext")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

LIMIT = 60.0  # seconds by the clock until a case counts as a hang and its worker is killed
SLOW, SLOW_CONFIG = 2.0, 1.0  # seconds of the processor, so that a busy machine is no fault of wq's
MEMORY_CONFIG = 200 << 20
ROOM = 4 << 30  # bytes of address space that a worker may take beyond what it starts with


class Case(NamedTuple):
    """kind: of case. number, name: which. base: the good folder. doors: what opens it."""

    kind: str
    number: int
    name: str
    base: str
    doors: tuple[str, ...]


class Answer(NamedTuple):
    """Of one door: kind and said as in tests/hostile/doors.py, or crash or hang; seconds; peak memory above before."""

    door: str
    kind: str
    said: str
    seconds: float
    bytes: int


def cases(count: int, large: bool) -> Iterator[Case]:
    """Everything that is tried."""
    import configs
    import layers
    import mutations
    from bases import DENSE, FORMATS

    names = [*(f"{name}{ending}" for ending in ("", " sharded") for name in (*FORMATS, DENSE))]
    for kind, found in (("config", configs.of_quantization()), ("model config", configs.of_models())):
        for number, case in enumerate(found):
            yield Case(kind, number, case.name, case.format, ("verify", "load"))
    for number, layer in enumerate(layers.cases()):
        yield Case("layer", number, f"{layer.name}, {layer.layer}", layer.format, ("verify", "from_pretrained"))
    for number in range(2 * len(mutations.MUTATIONS) if large else 0):
        base, doors = [(FORMATS[0], ("verify", "load")), (DENSE, ("source",))][number % 2]
        yield Case("large", number, "", f"large {base}", doors)
    for number in range(count):
        base = names[number // len(mutations.MUTATIONS) % len(names)]
        yield Case("damage", number, "", base, ("source",) if base.startswith(DENSE) else ("verify", "load"))


# --- in the worker ---


class Worker:
    """Makes the folder of a case and opens its doors."""

    def __init__(self, place: Path, large: bool):
        import bases
        import configs
        import layers
        import mutations
        import tiny_models
        import torch
        from bases import FORMATS

        torch.set_num_threads(1)
        self.place = place / "folder"
        one_block = {"num_hidden_layers": 1}
        self.made = bases.make(lambda: tiny_models.make(place / "tiny", "llama", **one_block), place / "small")
        self.whole = bases.files(self.made)
        if large:  # 80 MB and 25 MB, so that what a process needs anyway does not hide what a file makes it take
            sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 320, "num_hidden_layers": 5}
            big = bases.make(lambda: tiny_models.make(place / "big", "llama", **sizes), place / "large", FORMATS[:1])
            for name in (bases.DENSE, FORMATS[0]):
                self.made[f"large {name}"] = big[name]
                self.whole[f"large {name}"] = mutations.read(big[name])
        self.states = {name: bases.state(name, folder) for name, folder in self.made.items()}
        self.configs = {"config": configs.of_quantization(), "model config": configs.of_models()}
        self.layers = layers.cases()

    def prepare(self, case: Case) -> dict[str, Any]:
        """Write the folder; what is told of it."""
        import mutations
        import safetensors.torch

        whole = self.whole[case.base]
        if case.kind in ("damage", "large"):
            made = mutations.mutate(case.number, whole)
            mutations.write(made.files, self.place, made.renewed)
            sizes = [len(content) for content in whole.values() if isinstance(content, bytes)]
            return {"name": made.name, "changed": made.files != whole, "bytes": sum(sizes)}
        if case.kind == "layer":
            single = "model.safetensors"
            tensors = safetensors.torch.load(whole[single])
            layer = self.layers[case.number]
            layer.change(tensors, layer.layer)
            mutations.write(whole | {single: safetensors.torch.save(tensors, {"format": "pt"})}, self.place, True)
            return {"name": layer.name, "layer": layer.layer, "changed": True}
        change = self.configs[case.kind][case.number].change
        mutations.write(mutations.change_json(whole, "config.json", change), self.place, True)
        return {"name": case.name, "changed": True}

    def open(self, case: Case, door: str) -> Answer:
        import doors

        before = _forget_peak()
        started = time.process_time()
        arguments = [] if door == "verify" else [self.states[case.base]]
        peaks: list[int] = []
        kind, said = doors.DOORS[door](self.place, *arguments, on_open=lambda: peaks.append(_status("VmHWM")))
        seconds = time.process_time() - started
        peak = peaks[0] if peaks else _status("VmHWM")
        return Answer(door, kind, said[:500], seconds, max(0, peak - before))


def _forget_peak() -> int:
    """Start a new peak of resident memory; what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def work(connection: Any, place: str, large: bool) -> None:
    """Answer cases until there are none."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    worker = Worker(Path(place), large)
    limit = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while (case := connection.recv()) is not None:
        connection.send(worker.prepare(case))
        for door in case.doors:
            connection.send(worker.open(case, door))


# --- outside ---


class Watched:
    """A worker, and another one when that is gone."""

    def __init__(self, large: bool):
        self.large, self.process = large, None

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="hostile-")
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.folder.name, self.large), daemon=True)
        self.process.start()
        theirs.close()
        assert self.ours.recv() == "ready"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.folder.cleanup()
            self.process = None

    def ask(self, case: Case) -> tuple[dict[str, Any], list[Answer]]:
        """What was done, and what each door answered."""
        if self.process is None:
            self.start()
        self.ours.send(case)
        told: dict[str, Any] = {"name": case.name}
        answers: list[Answer] = []
        try:
            told = self.ours.recv()
            for door in case.doors:
                if not self.ours.poll(LIMIT):
                    answers.append(Answer(door, "hang", f"no answer in {LIMIT} s", LIMIT, 0))
                    break
                answers.append(self.ours.recv())
        except (EOFError, ConnectionError):
            answers.append(Answer(case.doors[len(answers)], "crash", f"exit code {self.process.exitcode}", 0.0, 0))
        if answers[-1].kind in ("hang", "crash"):
            self.stop()
        return told, answers


class Tally:
    """Figures, as cases are answered."""

    def __init__(self) -> None:
        self.count: Counter[tuple[str, str]] = Counter()
        self.by_mutation: dict[str, Counter[str]] = {}
        self.payload: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self.slowest: list[tuple[float, str]] = []
        self.memory: dict[str, tuple[int, str]] = {}
        self.ratio: tuple[float, str] = (0.0, "")

    def add(self, case: Case, told: dict[str, Any], answers: list[Answer]) -> None:
        import mutations

        label = f"{case.kind} {case.number} of {case.base} ({told['name']})"
        for answer in answers:
            told_as = f"{answer.door} {answer.kind}" + ("" if told.get("changed") else ", nothing was changed")
            self.count[case.kind, told_as] += 1
            if case.kind in ("damage", "large"):
                self.by_mutation.setdefault(told["name"], Counter())[told_as] += 1
            if told["name"] in mutations.PAYLOAD and answer.door == "verify" and told["changed"]:
                self.payload[answer.kind] += 1
            if is_fault(case, told, answer):
                fault = {"case": label, "door": answer.door, "kind": answer.kind, "said": answer.said}
                self.faults.append(fault | {"seconds": round(answer.seconds, 2)})
                print(self.faults[-1], file=sys.stderr)
            self.slowest = sorted([*self.slowest, (answer.seconds, f"{label}, {answer.door}")])[-5:]
            self.memory[case.kind] = max(self.memory.get(case.kind, (0, "")), (answer.bytes, f"{label}, {answer.door}"))
            if case.kind == "large":
                self.ratio = max(self.ratio, (answer.bytes / told["bytes"], f"{label}, {answer.door}"))


def is_fault(case: Case, told: dict[str, Any], answer: Answer) -> bool:
    """Whether wq did what it must not: see the docstring of tests/hostile/doors.py."""
    import mutations

    if answer.kind in ("escaped", "crash", "hang") or answer.seconds > (SLOW_CONFIG if "config" in case.kind else SLOW):
        return True
    if "config" in case.kind and answer.bytes > MEMORY_CONFIG:
        return True
    if case.kind == "layer":
        return answer.kind not in ("found", "refused") or told["layer"] not in answer.said
    if case.kind == "config":
        return answer.kind == "different"
    return told["name"] in mutations.PAYLOAD and told["changed"] and answer.door == "verify" and answer.kind != "found"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="damaged checkpoints")
    parser.add_argument("--only", type=int, help="the one damaged checkpoint of this number; prints what came of it")
    parser.add_argument("--small", action="store_true", help="without the large folders that memory is measured on")
    parser.add_argument("--kinds", default="damage,config,model config,layer,large")
    parser.add_argument(
        "--every", type=int, default=1, help="every so-manieth case; a prime leaves out no kind of damage"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many; the report says how far it got")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{date.today()}-hostile.json")
    options = parser.parse_args()
    watched, tally, started = Watched(not options.small and options.only is None), Tally(), time.perf_counter()
    chosen = [case for case in cases(options.count, watched.large) if case.kind in options.kinds.split(",")][
        :: options.every
    ]
    if options.only is not None:
        chosen = [case for case in cases(options.only + 1, False) if case[:2] == ("damage", options.only)]
    done = 0
    for place, case in enumerate(chosen):
        if time.perf_counter() - started > 60 * options.minutes:
            break
        done += 1
        told, answers = watched.ask(case)
        tally.add(case, told, answers)
        if options.only is not None:
            print(case, told, *answers, sep="\n")
        elif place % 100 == 0:
            print(f"{place} of {len(chosen)}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    watched.stop()
    if options.only is None:
        options.out.write_text(
            json.dumps(report(tally, done, len(chosen), time.perf_counter() - started), indent=1) + "\n"
        )


def report(tally: Tally, count: int, planned: int, seconds: float) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "command": shlex.join(["python", "scripts/hostile.py", *sys.argv[1:]]),
        "date": str(date.today()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "limits": {
            "processor seconds": SLOW,
            "of a config": SLOW_CONFIG,
            "bytes of a config": MEMORY_CONFIG,
            "seconds until killed": LIMIT,
        },
        "cases": count,
        "cases planned": planned,
        "seconds": round(seconds, 1),
        "outcomes": {
            kind: {what: n for (k, what), n in sorted(tally.count.items()) if k == kind}
            for kind in dict.fromkeys(kind for kind, _ in tally.count)
        },
        "payload changes that verify found": dict(tally.payload),
        "faults": tally.faults,
        "slowest": [{"seconds": round(s, 3), "case": case} for s, case in reversed(tally.slowest)],
        "most memory": {kind: {"bytes": size, "case": case} for kind, (size, case) in tally.memory.items()},
        "largest memory ratio": {"of the folder's bytes": round(tally.ratio[0], 3), "case": tally.ratio[1]},
        "by mutation": {name: dict(sorted(found.items())) for name, found in sorted(tally.by_mutation.items())},
    }


if __name__ == "__main__":
    main()
