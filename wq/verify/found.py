"""What a check finds: problems, and what is only worth knowing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from wq.errors import WqError, plain

AGAIN = "Download it again, or make it again."

_LONGEST = 1000  # characters


@dataclass
class Found:
    """What is wrong, and what is only worth knowing; each `{where, problem, measured, hint}`."""

    problems: list[dict[str, str]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)

    def problem(self, where: str, problem: str, measured: str = "", hint: str = AGAIN) -> None:
        self.problems.append(_told(where, problem, measured, hint))

    def warn(self, where: str, problem: str, measured: str = "", hint: str = "") -> None:
        self.warnings.append(_told(where, problem, measured, hint))

    @contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """An error inside is a problem of `where`, and not the end; its sentence has the measured value."""
        try:
            yield
        except WqError as error:
            self.problem(where, str(error))


def _told(where: str, problem: str, measured: str, hint: str) -> dict[str, str]:
    """Names of any origin, cut to what can be read."""
    return {
        "where": plain(where[:_LONGEST]),
        "problem": plain(problem[:_LONGEST]),
        "measured": plain(measured[:_LONGEST]),
        "hint": hint,
    }
