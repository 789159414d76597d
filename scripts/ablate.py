"""What each step is worth: the balanced preset without one step at a time, and with what `best` adds to it.

    python scripts/ablate.py MODEL --calibration C4.txt --wikitext WIKITEXT2.txt --output ablation.json

Takes the options of `compare_peers.py`, measures rows in its way, writes its file, and tells it by step: how much more
the model forgets without the step (KL without over KL with, and its 95 % interval by a paired bootstrap), and what the
step costs in time. A step earns its place by an interval above 1 on two families of models.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import compare_peers
from comparison import telling

from wq.pipeline.quantizer import STEPS as PIPELINE
from wq.solvers import gptq

FULL, BEST, BARE = "wq balanced", "wq best", "wq without any"
STEPS = tuple(step for step in (*gptq.STEPS, *PIPELINE) if step != "importance")  # which balanced does without


def rows() -> dict[str, str]:
    """Options of `wq quantize` by the name of the row."""
    alone = {f"wq without {step}": f"--without {step}" for step in STEPS}
    return {FULL: "", **alone, BARE: " ".join(alone.values()), BEST: "--preset best"}


def main() -> None:
    asked = [argument for name, options in rows().items() for argument in ("--wq", f"{name}={options}", "--only", name)]
    sys.argv[1:] = [*sys.argv[1:], *asked, "--reference", FULL]
    options = compare_peers.arguments()
    with tempfile.TemporaryDirectory() as folder:
        made = compare_peers.compare(options, (options.work or Path(folder)).resolve())
    print(table(made))


def table(made: dict[str, Any]) -> str:
    """A row for each step and kind of text, in Markdown."""
    lines = [
        "| step | bits | text | KL without / with | 95 % interval | KL with | seconds it takes |",
        "|---|" + "---|" * 6,
    ]
    found = telling.grouped(made["rows"])
    for told in telling.comparisons(made, FULL):
        bits, symmetric, text = told["bits"], told["symmetric"], told["text"]
        ours, full = found[bits, symmetric, told["row"]], found[bits, symmetric, FULL]
        ratio, (low, high) = told["kl_ratio"], told["interval"]
        spent = sum(row["seconds"] for row in full) / len(full) - sum(row["seconds"] for row in ours) / len(ours)
        kl = telling.mean(full, text, "kl", "mean")
        step = told["row"].removeprefix("wq without ")
        if told["row"] == BEST:  # with the step in the row and not in the reference
            step, ratio, low, high, spent = "what best adds", 1 / ratio, 1 / high, 1 / low, -spent
            kl = telling.mean(ours, text, "kl", "mean")
        grid = f"{bits} {'sym' if symmetric else 'asym'}"
        lines.append(f"| {step} | {grid} | {text} | {ratio:.3f} | {low:.3f} to {high:.3f} | {kl:.4f} | {spent:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
