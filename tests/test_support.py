"""The README's support matrix: every row is tried, and says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import support
import tiny_models

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.parametrize("architecture", tiny_models.ALL)
def test_the_row_of_an_architecture_is_true(architecture: str, tmp_path: Path) -> None:
    row = support.check(architecture, tmp_path)
    listed = next(
        (line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{architecture}` |")),
        "no such row",
    )
    assert listed == str(row), "run scripts/support_matrix.py"


def test_the_matrix_has_no_row_that_is_not_tried() -> None:
    text = README.read_text(encoding="utf-8")
    table = text[text.index("<!-- support matrix -->") : text.index("<!-- end of support matrix -->")]
    assert len([line for line in table.splitlines() if line.startswith("| `")]) == len(tiny_models.ALL) >= 16
