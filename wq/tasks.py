"""Benchmark tasks: lm-evaluation-harness around a model that wq has loaded, packed, with the layers that serve it.

The harness asks, scores and averages as it does for everyone, so the figures compare with published ones; whether a
beginning-of-text token comes first is left to the tokenizer, as its `HFLM` does by default. With a dense base, both
models answer the same documents, and what matters is who answers which one otherwise: the difference has a standard
error of its own, far below those of the two averages, and a sign test over the documents whose score changed.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wq import report
from wq.errors import TaskError, first_line
from wq.machine import default_device, release_memory


def evaluate(
    model: str | os.PathLike[str],
    tasks: Iterable[str],
    *,
    base: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch: int = 8,
    include_path: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    head_bits: int | None = None,
) -> dict[str, Any]:
    """What `model` scores in lm_eval's `tasks`, and how that differs from `base` on the same documents.

    tasks: names of tasks, groups or tags, or patterns of them. limit: only the first so many documents of each.
    fewshot: examples in front of each document; None is what the task says. batch: requests computed at once.
    include_path: a folder with tasks of one's own, in lm_eval's YAML, which may name Python code to run.
    dtype: what both models run in. head_bits: as in `WqConfig`, of `model`; if that is a folder that wq made, and its
    head is as stored, its report and card are updated.
    The models are loaded one after the other. Raises TaskError, before any model is loaded, for what cannot be run.
    """
    started = time.perf_counter()
    place = device or default_device()
    with _quiet():
        wanted = _find(tasks, include_path)
        options = {"limit": limit, "num_fewshot": fewshot}
        measured, ran_in = _run(model, wanted, batch, dtype, place, head_bits, options)
        compared = None if base is None else _run(base, wanted, batch, ran_in, place, None, options)[0]
    result = {
        "model": os.fspath(model),
        "base": None if base is None else os.fspath(base),
        "tasks": _rows(measured, compared),
        "limit": limit,
        "batch": batch,
        "dtype": ran_in,
        "device": place,
        "lm_eval": version("lm_eval"),
        "seconds": round(time.perf_counter() - started, 1),
        **({} if head_bits is None else {"head_bits": head_bits}),
    }
    if head_bits is None:  # figures of what the folder holds
        report.record(Path(model), "tasks", result)
    return result


def _find(tasks: Iterable[str], include_path: str | os.PathLike[str] | None) -> list[Any]:
    """The harness's objects for names and patterns, their data at hand."""
    if include_path is not None and not Path(include_path).is_dir():
        raise TaskError(f"--include-path {os.fspath(include_path)} is no folder.")
    manager = _harness()[0](include_path=None if include_path is None else os.fspath(include_path))
    names: list[str] = []
    for name in tasks:
        found = manager.match_tasks([name])
        if not found:
            raise TaskError(_unknown(name, manager.all_tasks))
        names += [one for one in found if one not in names]
    if not names:
        raise TaskError("no task was named. Give some, as in --tasks arc_easy,hellaswag.")
    return [item for name in names for item in _load(manager, name)]


def _unknown(name: str, known: list[str]) -> str:
    near = [one for one in known if name and name.lower() in one.lower()]
    near = [*difflib.get_close_matches(name, known, n=5), *near]
    hint = f"Near it: {', '.join(list(dict.fromkeys(near))[:8])}." if near else "Nothing is named like it."
    return f"task {name!r} is none of the {len(known)} that lm_eval knows. {hint} Your own: --include-path DIR."


def _load(manager: Any, name: str) -> list[Any]:
    """What a name stands for: tasks that are in no group, and groups that are in no other."""
    try:
        made = manager.load([name])
    except Exception as error:  # datasets, httpx, fsspec, yaml and the task's own code each raise their own
        raise TaskError(
            f"task {name} could not be loaded ({type(error).__name__}: {first_line(error)}). Its data comes from the "
            "Hub the first time: check the network, or run it once on a machine that has one and copy the cache."
        ) from error
    inside = {child for children in made.get("group_map", {}).values() for child in children}
    return [item for key, item in {**made["tasks"], **made.get("groups", {})}.items() if key not in inside]


def _run(
    model: str | os.PathLike[str],
    tasks: list[Any],
    batch: int,
    dtype: str,
    device: str,
    head_bits: int | None,
    options: dict[str, Any],
) -> tuple[dict[str, Any], str]:
    """The harness's results for one model, and the dtype it ran in; the model is freed before this returns."""
    from wq.hf import load

    _, harness_model, simple_evaluate = _harness()
    loaded, tokenizer = load(model, dtype=dtype, device=device, head_bits=head_bits)
    ran_in = str(loaded.dtype).removeprefix("torch.")
    try:
        wrapped = harness_model(pretrained=loaded, tokenizer=tokenizer, batch_size=batch)
        results = simple_evaluate(wrapped, tasks=tasks, **options)
    except (ValueError, NotImplementedError) as error:  # unsafe code, images, generation by what cannot
        raise TaskError(f"{os.fspath(model)}: lm_eval could not run the tasks ({first_line(error)}).") from error
    del loaded, wrapped
    release_memory()
    return results, ran_in


def _rows(measured: dict[str, Any], compared: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A record for each metric of each task or group."""
    rows = []
    for task, values in measured["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            row = {
                "task": task,
                "metric": metric,
                "filter": filtered,
                **_figure(values, metric, filtered),
                "documents": values.get("sample_len"),
                "fewshot": measured["n-shot"].get(task),
                "version": measured["versions"].get(task),
            }
            if compared is not None:
                theirs = _figure(compared["results"][task], metric, filtered)
                row |= {"base": theirs, "difference": row["value"] - theirs["value"]}
                upwards = measured["higher_is_better"].get(task, {}).get(metric) is not False
                ours, other = (_scores(run, task, metric, filtered) for run in (measured, compared))
                row["paired"] = _pair(ours, other, upwards)
            rows.append(row)
    return rows


def _figure(values: dict[str, Any], metric: str, filtered: str) -> dict[str, float | None]:
    error = values.get(f"{metric}_stderr,{filtered}")
    finite = isinstance(error, (int, float)) and math.isfinite(error)  # the harness says "N/A" where it knows none
    return {"value": values[f"{metric},{filtered}"], "stderr": error if finite else None}


def _scores(results: dict[str, Any], task: str, metric: str, filtered: str) -> dict[Any, float] | None:
    """The score of each document by its number; None where a document's part is no number, as in a perplexity."""
    samples = [one for one in results.get("samples", {}).get(task, ()) if one["filter"] == filtered and metric in one]
    scores = {one["doc_id"]: one[metric] for one in samples}
    return scores if scores and all(isinstance(score, (bool, int, float)) for score in scores.values()) else None


def _pair(ours: dict[Any, float] | None, theirs: dict[Any, float] | None, upwards: bool) -> dict[str, Any] | None:
    """What changed, document by document; None where the two did not score the same ones.

    stderr: of the mean difference. p: of as uneven a split of better and worse, or a more uneven one, by chance.
    """
    if ours is None or theirs is None or set(ours) != set(theirs):
        return None
    changes = [float(ours[key]) - float(theirs[key]) for key in ours]
    count, mean = len(changes), sum(changes) / len(changes)
    spread = sum((change - mean) ** 2 for change in changes) / max(1, count - 1)
    up, down = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    better, worse = (up, down) if upwards else (down, up)
    return {"stderr": math.sqrt(spread / count), "better": better, "worse": worse, "p": _sign_test(better, worse)}


def _sign_test(one: int, other: int) -> float:
    """Two-sided and exact: the probability that a fair coin splits `one + other` throws at least as unevenly."""
    count = one + other
    tail = sum(math.comb(count, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**count)


def _harness() -> tuple[Any, Any, Any]:
    """lm_eval's TaskManager, HFLM and simple_evaluate. Raises TaskError, saying what to install."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:  # the package itself, or one of the many it needs
        raise TaskError(
            f"tasks are run by lm-evaluation-harness, which is not installed whole ({first_line(error)}). "
            "Install it: pip install 'wq-quant[eval]'"
        ) from error
    return TaskManager, HFLM, simple_evaluate


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings about being given a model that is loaded already; its bars stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
