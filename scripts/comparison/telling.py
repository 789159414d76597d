"""A recorded comparison for people: intervals, a table, a plot. Nothing here needs a model.

Rows of one bit width and grid are compared with a reference row on the same tokens. The text is resampled in blocks of
128 tokens, both rows with the same blocks, so that an easy passage counts for both; the interval says how far the ratio
of their mean KL depends on the text, and the spread over calibration seeds is given beside it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

RESAMPLES = 10_000
MAIN = "wikitext2"
TITLES = {"wikitext2": "WikiText-2", "code": "Python source", "web": "web text"}
Record = dict[str, Any]
Key = tuple[int, bool, str]  # bits, symmetric, row


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two sums over the same blocks of text, with the bounds of its 95 % interval by a paired bootstrap."""
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} blocks and {len(theirs)}: not the same text")
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    drawn = torch.randint(len(a), (RESAMPLES, len(a)), generator=torch.Generator().manual_seed(seed))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(a.sum() / b.sum()), low, high


def grouped(rows: Iterable[Record]) -> dict[Key, list[Record]]:
    """Rows that have figures, all seeds of one row together."""
    found: dict[Key, list[Record]] = defaultdict(list)
    for row in rows:
        if "scores" in row:
            found[row["bits"], row["symmetric"], row["row"]].append(row)
    return dict(found)


def mean(rows: Sequence[Record], text: str, *path: str) -> float:
    """The mean over seeds of one figure."""
    values = []
    for row in rows:
        value: Any = row["scores"][text]
        for name in path:
            value = value[name]
        values.append(value)
    return statistics.fmean(values)


def blocks(rows: Sequence[Record], text: str) -> list[float]:
    """Sums of KL over blocks of text, the mean over seeds."""
    return [statistics.fmean(values) for values in zip(*(r["scores"][text]["kl_blocks"] for r in rows), strict=True)]


def comparisons(made: Record, reference: str) -> list[Record]:
    """Each row's mean KL over that of the reference with the same bits and grid, on each text."""
    rows, found = grouped(made["rows"]), []
    for (bits, symmetric, name), ours in rows.items():
        theirs = rows.get((bits, symmetric, reference))
        if theirs is None or name == reference:
            continue
        for text in ours[0]["scores"]:
            ratio, low, high = ratio_interval(blocks(ours, text), blocks(theirs, text))
            said = {"row": name, "bits": bits, "symmetric": symmetric, "reference": reference, "text": text}
            found.append(said | {"kl_ratio": round(ratio, 4), "interval": [round(low, 4), round(high, 4)]})
    return found


def table(made: Record, reference: str) -> str:
    """All rows in Markdown, by bits and then by KL; what failed or is not supported is listed below."""
    others = [text for text in made["settings"]["texts"] if text != MAIN]
    head = ["", "grid", "bits per weight", "MB", "KL", "median", "p99", "top-1", "perplexity"]
    head += [f"KL {text}" for text in others] + [f"KL / {reference}", "seconds", "CPU seconds", "peak MB"]
    ratios = {(c["bits"], c["symmetric"], c["row"]): c for c in comparisons(made, reference) if c["text"] == MAIN}
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    rows = grouped(made["rows"])
    for key in sorted(rows, key=lambda key: (-key[0], mean(rows[key], MAIN, "kl", "mean"))):
        lines.append(f"| {' | '.join(_cells(key, rows[key], others, ratios.get(key)))} |")
    dense = ", ".join(f"{text} {value:.2f}" for text, value in made["dense_perplexity"].items())
    return "\n".join([f"{made['model']}; dense perplexity: {dense}.", "", *lines, "", *_missing(made["rows"])]).strip()


def _cells(key: Key, rows: list[Record], others: list[str], ratio: Record | None) -> list[str]:
    bits, symmetric, name = key
    kl = [row["scores"][MAIN]["kl"]["mean"] for row in rows]
    spread = f" ({min(kl):.4f}–{max(kl):.4f}, {len(kl)} seeds)" if len(kl) > 1 else ""
    interval = (
        "–" if ratio is None else f"{ratio['kl_ratio']:.2f} [{ratio['interval'][0]:.2f}, {ratio['interval'][1]:.2f}]"
    )
    return [
        name,
        f"{bits}-bit {'sym' if symmetric else 'asym'}",
        f"{rows[0]['bits_per_weight']:.2f}",
        f"{rows[0]['checkpoint_bytes'] / 1e6:.0f}",
        f"{statistics.fmean(kl):.4f}{spread}",
        f"{mean(rows, MAIN, 'kl', 'median'):.4f}",
        f"{mean(rows, MAIN, 'kl', 'p99'):.2f}",
        f"{mean(rows, MAIN, 'top1_agreement'):.1%}",
        f"{mean(rows, MAIN, 'perplexity'):.2f}",
        *(f"{mean(rows, text, 'kl', 'mean'):.4f}" for text in others),
        interval,
        *(f"{statistics.fmean(row[name] for row in rows):.0f}" for name in ("seconds", "cpu_seconds")),
        f"{max(row['peak_rss_bytes'] for row in rows) / 1e6:.0f}",
    ]


def _missing(rows: Iterable[Record]) -> list[str]:
    """A line for each row without figures."""
    said = []
    for row in rows:
        reason = row.get("unsupported") or row.get("error")
        if reason:
            kind = "not supported" if "unsupported" in row else "failed"
            grid = "sym" if row["symmetric"] else "asym"
            said.append(f"- {row['row']}, {row['bits']}-bit {grid}, seed {row['seed']}: {kind}: {reason}")
    return said


# --- the plot ---

COLORS = {  # told apart by people who do not see red and green as others do; wq's is the only dark one
    "wq": "#0b3c8c",
    "gptqmodel": "#e69f00",
    "auto-round": "#cc79a7",
    "llm-compressor": "#009e73",
    "autoawq": "#a6761d",
    "hqq": "#d55e00",
    "torchao": "#56b4e9",
}
MARKERS = "osD^vPX*<>"


def plot(made: Record, files: Iterable[Path], text: str = MAIN) -> None:
    """KL against bits per weight, a line for each row, its name at the right edge. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "wq", "font.family": "DejaVu Sans", "font.size": 9})
    lines: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    for (_, symmetric, name), rows in grouped(made["rows"]).items():
        lines[name, symmetric].append((rows[0]["bits_per_weight"], mean(rows, text, "kl", "mean")))
    grids = {symmetric for _, symmetric in lines}
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    ends: list[tuple[float, float, str, str]] = []
    seen: dict[str, int] = defaultdict(int)
    for (name, symmetric), points in sorted(lines.items()):
        package = name.partition(" ")[0]
        color, marker = COLORS.get(package, "#555555"), MARKERS[seen[package] % len(MARKERS)]
        seen[package] += 1
        bold = package == "wq"
        x, y = zip(*sorted(points), strict=True)
        style: dict[str, Any] = {"linewidth": 2.2 if bold else 1.2, "markersize": 7 if bold else 5.5}
        axes.plot(x, y, color=color, marker=marker, alpha=1.0 if bold else 0.85, zorder=3 if bold else 2, **style)
        grid = f" ({'sym' if symmetric else 'asym'})" if len(grids) > 1 else ""
        ends.append((x[-1], y[-1], f"{name}{grid}", color))
    _finish(axes, made, text)
    _name_lines(axes, ends)
    for file in files:
        figure.savefig(file, dpi=200, bbox_inches="tight", metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _finish(axes: Any, made: Record, text: str) -> None:
    settings = made["settings"]
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel("bits per quantized weight, scales and zero points included")
    axes.set_ylabel(f"mean KL(dense ‖ quantized) on {TITLES.get(text, text)}, nats per token")
    shape = f"groups of {settings['group']}, {settings['samples']} × {settings['seqlen']} calibration tokens"
    axes.set_title(f"{made['model']}: what quantization costs ({shape})", loc="left", fontsize=10.5)
    axes.grid(which="major", color="#d9d9d9", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _name_lines(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of the plot, moved apart where they would overlap, with a thin line to its end."""
    low, high = axes.transData.transform([(0, y) for y in axes.get_ylim()])[:, 1]
    ends = sorted(ends, key=lambda end: end[1])
    line = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    heights = [(axes.transData.transform((0, y))[1] - low) / (high - low) for _, y, _, _ in ends]
    for (x, y, name, color), height in zip(ends, spread(heights, 0.042), strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.02, height),
            textcoords="axes fraction",
            color=color,
            fontsize=8.5,
            va="center",
            fontweight="bold" if name.startswith("wq") else "normal",
            arrowprops={**line, "color": color},
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to be `gap` apart and, if they fit, between 0 and 1.

    Those that touch share their middle.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _bottom(groups[-2], gap) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1].extend(last)
    return [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    """Where the lowest of a group lies whose middle is as close to their own as the edges allow."""
    length = gap * (len(group) - 1)
    return max(0.0, min(statistics.fmean(group) - length / 2, 1.0 - length))
