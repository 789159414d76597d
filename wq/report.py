"""What a run reports: a JSON file for programs, and a model card whose every figure was measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from wq.checkpoint import write_text

REPORT = "wq_report.json"


def save(report: dict[str, Any], folder: Path) -> None:
    """Write `wq_report.json` and the card, `README.md`, into `folder`."""
    write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    write_text(folder / "README.md", card(report))


def load(folder: Path) -> dict[str, Any] | None:
    """The report in `folder`, or None when wq did not write it."""
    file = folder / REPORT
    return json.loads(file.read_text()) if file.is_file() else None


def record(folder: Path, name: str, figures: dict[str, Any]) -> None:
    """Put measured figures under `name` into the report and card of `folder`, if wq made it; else do nothing."""
    known = load(folder) if folder.is_dir() else None
    if known is not None:
        save({**known, name: figures}, folder)


def size(count: float) -> str:
    """Bytes for people: 1.23 GB, 45.6 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def share(report: dict[str, Any]) -> str:
    """`quantized X of Y parameters (Z %)`."""
    part, whole = report["quantized_parameters"], report["parameters"]
    return f"quantized {part:,} of {whole:,} parameters ({part / whole:.1%})"


def planned(plan: dict[str, Any]) -> list[str]:
    """What `wq plan` found, a line for each thing that a run takes."""
    journal, device = plan["disk_bytes"]["journal"], plan["device"]
    largest = max(plan["moments"], key=lambda moment: moment["bytes"])
    parts = dict(largest["parts"])
    if device == "cpu":
        parts["Python and its libraries"] = plan["process_bytes"]
    told = ", ".join(f"{size(count)} {name}" for name, count in sorted(parts.items(), key=lambda p: -p[1]) if count)
    least, most = plan["seconds"]["least"], plan["seconds"]["most"]
    lines = [
        f"{plan['model']}: {share(plan)}, {plan['method']} to {plan['format']}",
        f"checkpoint: {size(plan['source_bytes'])} → {size(plan['checkpoint_bytes'])}",
        f"peak memory: {size(plan['peak_rss_bytes'])} of RAM",
    ]
    if device != "cpu":
        lines.append(f"peak memory on {device}: {size(plan['peak_device_bytes'])} of tensors, its libraries aside")
    lines += [
        f"  at {largest['name']}: {told}",
        f"disk: {size(sum(plan['disk_bytes'].values()))}, of which {size(journal)} until it is done",
        f"time: {duration(least)} to {duration(most)}, at this machine's pace now; reading calibration text aside",
    ]
    if plan["peak_device_bytes"] > plan["free_bytes"]:
        lines.append(f"! only {size(plan['free_bytes'])} of memory is free on {device} now")
    return lines


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def label(report: dict[str, Any]) -> str:
    """How many bits, in a word: `4-bit`, or `3.5-bit mixed`."""
    mixed = report.get("mixed")
    return f"{report['scheme']['bits']}-bit" if mixed is None else f"{mixed['bits_per_weight']:.3g}-bit mixed"


def mixture(mixed: dict[str, Any]) -> list[str]:
    """What a target became, and who reads it, in a sentence each."""
    bits = Counter(unit["bits"] for unit in mixed["units"])
    counts = ", ".join(f"{count} of {width} bits" for width, count in sorted(bits.items()))
    target = mixed["target"]
    asked = (
        f"of {target['bits_per_weight']:g}" if "bits_per_weight" in target else f"in {size(target['checkpoint_bytes'])}"
    )
    lines = [f"{mixed['bits_per_weight']:.4g} bits a weight {asked}: units {counts}"]
    able = [verdict["loader"] for verdict in mixed["loaders"] if verdict["takes"]]
    lines.append(f"read by wq, {', '.join(able)}" if able else "read by wq alone")
    for verdict in mixed["loaders"]:
        if verdict["takes"] is False:
            why = verdict["why"][0]
            lines.append(f"not by {verdict['loader']}: {why['where']}: {why['problem']} ({why['measured']})")
    return lines


def card(report: dict[str, Any]) -> str:
    """The model card, Markdown with the Hub's YAML header."""
    scheme = report["scheme"]
    group = "per output row" if scheme["group_size"] == -1 else str(scheme["group_size"])
    grid = "symmetric" if scheme["symmetric"] else "asymmetric"
    name = Path(report["model"]).name
    rows = [
        ("Base model", f"`{report.get('repo') or name}`"),
        ("Method", _method(report)),
        ("Bits / group size / grid", f"{_bits(report)} / {group} / {grid}"),
        ("Format", f"{report['format']}, {report['dtype']} scales and dense tensors"),
        ("Calibration", _calibration(report["calibration"])),
        ("Parameters", share(report)),
        *_experts(report.get("layers", [])),
        (
            "Size",
            f"{size(report['checkpoint_bytes'])}, from {size(report['source_bytes'])} of {report['source_dtype']}",
        ),
        ("Made in", f"{report['seconds']:.0f} s, peak memory {size(report['peak_rss_bytes'])}, on {report['device']}"),
        ("Versions", ", ".join(f"{package} {version}" for package, version in report["versions"].items())),
        ("Command", f"`{report['command']}`"),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return "\n".join(
        [
            _header(report),
            f"# {name}, {label(report)}",
            "",
            *_usage(report["format"], scheme["symmetric"]),
            "| | |",
            "|---|---|",
            table,
            "",
            *_quality(report.get("evaluation")),
            *_tasks(report.get("tasks")),
            *_widths(report.get("mixed")),
            *_fallbacks(report["fallbacks"]),
        ]
    )


def _usage(format: str, symmetric: bool) -> list[str]:
    """How to load it, by what reads this format: stock transformers takes symmetric compressed-tensors only."""
    made = "Quantized with wq (`pip install wq-quant`)"
    if format != "compressed-tensors":
        return [f"{made}, in the {format} format, for whatever reads that.", ""]
    plain = "from_pretrained(REPO)"
    packed = "from_pretrained(REPO, quantization_config=WqConfig())"
    code = ["from transformers import AutoModelForCausalLM", "from wq import WqConfig", ""]
    code += [f"model = AutoModelForCausalLM.{packed}  # stays packed"]
    if symmetric:
        code += [f"model = AutoModelForCausalLM.{plain}  # without wq, with compressed-tensors"]
    return [f"{made}.", "", "```python", *code, "```", ""]


def _header(report: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if report.get("repo"):
        lines += [f"base_model: {report['repo']}", "base_model_relation: quantized"]
    tags = ["wq", report["method"], report["format"], label(report).replace(" ", "-")]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---", ""])


def _method(report: dict[str, Any]) -> str:
    """The algorithm, the preset, and what became of learning."""
    words = [report["method"].upper()]
    if "preset" in report:
        words.append(f"preset {report['preset']}")
    if report.get("without"):
        words.append(f"without {', '.join(report['without'])}")
    importance = report.get("importance")
    if importance and "reason" in importance:
        words.append(f"tokens count alike: {importance['reason']}")
    elif importance:
        words.append(f"tokens count by what the prediction owes to them in {importance['layers']} layers")
    learning = report.get("learning")
    if learning and "reason" in learning:
        words.append(f"blocks have not learned: {learning['reason']}")
    elif learning:
        words.append(f"{learning['kept']} of {learning['layers']} layers learned with their block")
    taught = report.get("distillation")
    if taught and "reason" in taught:
        words.append(f"not distilled: {taught['reason']}")
    elif taught:
        kl = taught["heldout_kl"]
        state = "" if taught["kept"] else ", not kept"
        words.append(f"distilled, KL on held-out calibration text {kl['before']:.4f} → {kl['after']:.4f}{state}")
    return "; ".join(words)


def _calibration(record: dict[str, Any] | None) -> str:
    if record is None:
        return "none (data-free)"
    return (
        f"{record['source']}, {record['samples']} × {record['seqlen']} tokens, seed {record['seed']}, "
        f"sha256 `{record['sha256'][:16]}`"
    )


def _experts(layers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How many tokens of calibration the experts of a mixture learned from."""
    counts = [record["tokens"] for record in layers if isinstance(record["tokens"], list)]
    flat = sorted(count for tokens in counts for count in tokens)
    if not flat:
        return []
    spread = f"{flat[0]:,} to {flat[-1]:,}, median {median(flat):,.0f}" if flat[-1] else "none"
    return [("Experts", f"{len(counts[0])} a layer; calibration tokens routed to each: {spread}")]


def _quality(evaluation: dict[str, Any] | None) -> list[str]:
    """The measured figures of each text, or how to measure them."""
    if evaluation is None:
        return ["Not evaluated yet: `wq eval FOLDER --base BASE` measures it and fills this card in.", ""]
    texts = texts_of(evaluation)
    lines = ["## Measured", "", "| | dense | quantized |", "|---|---|---|"]
    for one in texts:
        base, text = one.get("base"), one["text"]
        dense = f"{base['perplexity']:.3f}" if base else "not measured"
        lines.append(f"| perplexity, {text} | {dense} | {one['perplexity']:.3f} |")
        if base:
            kl, place = one["kl"], "" if len(texts) == 1 else f", {text}"
            values = f"{kl['mean']:.4f} / {kl['median']:.4f} / {kl['p99']:.3f}"
            lines.append(f"| KL to dense{place}: mean / median / p99 | 0 | {values} |")
            if kl.get("interval"):
                lines.append(f"| 95 % interval of the mean KL{place} | | {interval(kl)} |")
            lines.append(f"| top-1 agreement{place} | 100 % | {one['top1_agreement']:.1%} |")
    counts = [f"{one['windows']} windows of {one['seqlen']} tokens" for one in texts]
    windows = counts[0] if len(set(counts)) == 1 else ", ".join(counts)
    place = f"{texts[0]['dtype']} on {texts[0]['device']}"
    return [*lines, "", f"{windows}, {place}; the packed checkpoint, through the layers that serve it.", ""]


def texts_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of `wq.evaluate`, one for each text."""
    return evaluation.get("texts", [evaluation])


def interval(kl: dict[str, Any]) -> str:
    """`0.1180 – 0.1312`, or a dash where there was too little text to tell."""
    return " – ".join(f"{bound:.4f}" for bound in kl["interval"]) if kl["interval"] else "–"


def _tasks(measured: dict[str, Any] | None) -> list[str]:
    """Benchmark tasks, beside those of the dense model where it ran, too."""
    if measured is None:
        return []
    lines = ["## Tasks", "", "| task | metric | dense | quantized | difference |", "|---|---|---|---|---|"]
    for row in measured["tasks"]:
        dense = figure(row["base"]) if "base" in row else "not measured"
        lines.append(f"| {task_name(row)} | {row['metric']} | {dense} | {figure(row)} | {paired(row)} |")
    part = "" if measured["limit"] is None else f", the first {measured['limit']} documents of each task"
    how = f"lm_eval {measured['lm_eval']}{part}, {measured['dtype']} on {measured['device']}"
    return [*lines, "", f"{how}; ± is the standard error.", ""]


def task_name(row: dict[str, Any]) -> str:
    """`arc_easy, 5-shot`, with the name of the filter where there is one."""
    filtered = "" if row["filter"] == "none" else f", {row['filter']}"
    return f"{row['task']}{filtered}" + (f", {row['fewshot']}-shot" if row["fewshot"] else "")


def figure(row: dict[str, Any]) -> str:
    """`0.571 ± 0.010`"""
    return f"{row['value']:.4f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")


def paired(row: dict[str, Any]) -> str:
    """`-0.018 ± 0.006; 12 better, 30 worse, p = 0.008`: what changed on the same documents."""
    if "difference" not in row:
        return "–"
    text = f"{row['difference']:+.4f}"
    if row["paired"] is None:
        return text
    error, better, worse, p = (row["paired"][key] for key in ("stderr", "better", "worse", "p"))
    return f"{text} ± {error:.4f}; {better} better, {worse} worse, p = {p:.2g}"


def _bits(report: dict[str, Any]) -> str:
    mixed = report.get("mixed")
    if mixed is None:
        return str(report["scheme"]["bits"])
    return f"{', '.join(map(str, mixed['widths']))}, mixed to {mixed['bits_per_weight']:.4g} a weight"


def _widths(mixed: dict[str, Any] | None) -> list[str]:
    """The bits of every unit: a row for those of one name, a number for each block."""
    if mixed is None:
        return []
    blocks = list(dict.fromkeys(unit["block"] for unit in mixed["units"]))
    rows: dict[str, dict[str, str]] = {}
    for unit in mixed["units"]:
        rows.setdefault(", ".join(unit["layers"]), {})[unit["block"]] = str(unit["bits"])
    table = [f"| {name} | {' '.join(bits.get(block, '–') for block in blocks)} |" for name, bits in rows.items()]
    told = [f"- {line}" for line in mixture(mixed)]
    how = (
        f"Chosen for the least KL(dense ‖ quantized), measured on {mixed['judged_tokens']:,} tokens of calibration, "
        "one unit quantized at a time."
    )
    head = ["| unit | bits, block by block |", "|---|---|"]
    return ["## Bits by unit", "", *told, "", how, "", *head, *table, ""]


def _fallbacks(fallbacks: list[dict[str, Any]]) -> list[str]:
    if not fallbacks:
        return []
    named = [f"- `{record['layer']}`: {record['fallback']}" for record in fallbacks]
    return ["## Layers rounded to nearest instead", "", *named, ""]
