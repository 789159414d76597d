"""Print one table of what the demo measured, and a sentence the quantized model writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wq import load
from wq.report import size


def summary(report: dict[str, Any]) -> Table:
    """Dense and quantized, side by side."""
    evaluation = report["evaluation"]
    table = Table(title=f"{Path(report['model']).stem}, {evaluation['text']} text", title_justify="left")
    for column in ("", "size", "perplexity", "KL", "top-1", "seconds", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    base = evaluation["base"]
    table.add_row(
        f"dense {report['source_dtype']}",
        size(report["source_bytes"]),
        f"{base['perplexity']:.2f}",
        "0",
        "100 %",
        "–",
        "–",
    )
    table.add_row(
        f"{report['scheme']['bits']}-bit {report['method']}",
        size(report["checkpoint_bytes"]),
        f"{evaluation['perplexity']:.2f}",
        f"{evaluation['kl']['mean']:.4f}",
        f"{evaluation['top1_agreement']:.1%}",
        f"{report['seconds']:.0f}",
        size(report["peak_rss_bytes"]),
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a quantized and evaluated checkpoint")
    parser.add_argument("--prompt", default="Why is the sky blue? Answer in one sentence.")
    arguments = parser.parse_args()
    console = Console()
    console.print(summary(json.loads((arguments.folder / "wq_report.json").read_text())))
    model, tokenizer = load(arguments.folder)
    chat = [{"role": "user", "content": arguments.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    console.print(f"\n{arguments.prompt}\n[bold]{text}[/bold]")


if __name__ == "__main__":
    main()
