"""One command in a process of its own: how long it took, and how much memory it and its children held at once."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.1  # seconds between two looks at memory


@dataclass(frozen=True)
class Run:
    """code: exit status; seconds: by the clock; cpu_seconds: of all processors; peak_rss_bytes: of the whole tree."""

    code: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run(command: Sequence[str], log: Path, *, foreign: bool, timeout: float | None = None) -> Run:
    """Run `command` in the folder of `log`, where it may leave files, with what it prints in `log`.

    A foreign one must not import what belongs to the caller. Raises TimeoutError after `timeout` seconds, and ends it.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if foreign:
        environment.pop("PYTHONPATH", None)
    before, started, peak = _children_seconds(), time.perf_counter(), 0
    with log.open("a") as told:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                if timeout is not None and time.perf_counter() - started > timeout:
                    raise TimeoutError(f"stopped after {timeout:.0f} seconds")
                time.sleep(INTERVAL)
        finally:
            if process.poll() is None:  # out of time, or interrupted: it and its children go
                _end(process)
    return Run(process.returncode, time.perf_counter() - started, _children_seconds() - before, peak)


def resident(pid: int) -> int:
    """Bytes that a process and its descendants hold; pages that several share count several times."""
    total = largest = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
                largest = max(largest, _high_water(process.pid))
    return max(total, largest)


def _high_water(pid: int) -> int:
    """The most that a process has held; between two looks it may have held more than at either."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return 0


def _children_seconds() -> float:
    """Processor seconds of all children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _end(process: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    for one in [*children, psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()


def last_words(log: Path) -> str:
    """What a failed command said last: the line that names its error, without folders of this machine."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("unsupported: "):
            return line
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return short((named or lines or ["no output"])[-1])


def short(message: str) -> str:
    """The first line of a message, without folders of this machine."""
    return re.sub(r"(?:~|/[\w.+-]+)(?:/[\w.+-]+)*/", "", message.strip().splitlines()[0])[:300]
