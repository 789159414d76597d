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
        ("Method", report["method"].upper()),
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
    """The measured figures, or how to measure them."""
    if evaluation is None:
        return ["Not evaluated yet: `wq eval FOLDER --base BASE` measures it and fills this card in.", ""]
    lines = ["## Measured", "", "| | dense | quantized |", "|---|---|---|"]
    base = evaluation.get("base")
    dense = f"{base['perplexity']:.3f}" if base else "not measured"
    lines.append(f"| perplexity, {evaluation['text']} | {dense} | {evaluation['perplexity']:.3f} |")
    if base:
        kl = evaluation["kl"]
        values = f"{kl['mean']:.4f} / {kl['median']:.4f} / {kl['p99']:.3f}"
        lines.append(f"| KL to dense: mean / median / p99 | 0 | {values} |")
        lines.append(f"| top-1 agreement | 100 % | {evaluation['top1_agreement']:.1%} |")
    windows = f"{evaluation['windows']} windows of {evaluation['seqlen']} tokens"
    place = f"{evaluation['dtype']} on {evaluation['device']}"
    return [*lines, "", f"{windows}, {place}; the packed checkpoint, through the layers that serve it.", ""]


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
