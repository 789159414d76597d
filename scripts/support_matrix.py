"""Try every architecture that the tests know, and write the README's support matrix from what is found.

usage: python scripts/support_matrix.py [--check]   (--check prints the table and leaves the README alone)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import support  # noqa: E402
import tiny_models  # noqa: E402

START, END = "<!-- support matrix -->", "<!-- end of support matrix -->"


def table() -> str:
    """The matrix, as Markdown."""
    lines = [f"| {' | '.join(support.HEADER)} |", "|---" * len(support.HEADER) + "|"]
    for architecture in tiny_models.ALL:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(str(support.check(architecture, Path(folder))))
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    made = table()
    if "--check" in sys.argv[1:]:
        print(made)
        return
    file = ROOT / "README.md"
    before, rest = file.read_text(encoding="utf-8").split(START)
    file.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
