"""`wq tune`: what it measures, what it writes, and that the kernels then run the tile it wrote.

Triton decides when it is imported whether it interprets, so the measurement on real kernels runs in a process of its
own: this file as a script. Times are given, not taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import run_script
from torch import Tensor
from typer.testing import CliRunner

from wq import cli, tuning
from wq.errors import ModelError, OutputError
from wq_kernels import configs, registry
from wq_kernels.configs import Config

ROOT = Path(__file__).resolve().parents[1]
DEVICE = configs.Device("interpreter", "cpu", 4)  # what the interpreter calls itself
SHAPES = ((32, 256), (16, 128))
BUCKETS = (16, 32)
TABLE = {bucket: configs.TABLE[""][bucket] for bucket in BUCKETS}
# Milliseconds for each shape. The least geometric mean is not the least sum, nor the least on the first shape.
FAST, EVEN, FIRST = Config(16, 16, 1, 1, False), Config(32, 16, 2, 2, False), Config(16, 16, 4, 3, False)
BROKEN, WRONG, NOTHING = Config(64, 16, 1, 1, False), Config(64, 16, 2, 1, False), Config(64, 16, 4, 1, False)
TIMES = {FAST: (1.0, 16.0), EVEN: (5.0, 5.0), FIRST: (0.9, 100.0), **dict.fromkeys(TABLE.values(), (8.0, 8.0))}
TILES = {16: [EVEN, BROKEN, FAST, WRONG, FIRST, NOTHING], 32: [FIRST, BROKEN]}


def entry(device: str, triton: str, rows: int = 16, **more: Any) -> dict[str, Any]:
    """One tile of a file."""
    return {"device": device, "triton": triton, "rows": rows, "config": FAST.to_dict(), **more}


ENTRIES = [entry("H100", "3.7.1", milliseconds=0.5, default_milliseconds=1.0)]


# --- on kernels, interpreted ---


def interpret() -> dict[str, Any]:
    """Tune on the interpreter, with three tiles that are no good, and then with all that there are."""
    from wq_kernels import tune

    real, timed, last, steps = tune.multiply_rows, [], [], []

    def watched(*arguments: Any) -> Tensor:
        config, out_features = arguments[-1], arguments[-2]
        if config == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        last[:] = [config, out_features]
        y = real(*arguments)
        return y * {WRONG: 1.02, NOTHING: float("nan")}.get(config, 1.0)

    def given(function: Callable[[], Tensor]) -> float:
        function()  # as a real timer would: what is timed is the tile in question
        config, out_features = last
        timed.append([config.to_dict(), out_features])
        return TIMES.get(config, (8.0, 8.0))[[n for n, _ in SHAPES].index(out_features)]

    tune.multiply_rows = watched
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    made = tune.tune(cpu, SHAPES, BUCKETS, torch.float16, given, TILES.__getitem__, lambda *step: steps.append(step))
    few = list(timed)
    tune.tune(cpu, SHAPES[:1], BUCKETS, torch.bfloat16, given)
    return {"made": made, "timed": few, "all": timed[len(few) :], "steps": steps, "triton": tune.triton.__version__}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script(__file__, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


def test_the_tile_with_the_least_geometric_mean_is_written(interpreted: dict[str, Any]) -> None:
    few, _ = interpreted["made"]["tiles"]
    assert Config(**few["config"]) == FAST
    assert (few["rows"], few["device"], few["triton"]) == (16, "interpreter", interpreted["triton"])
    assert few["milliseconds"] == pytest.approx(4.0)
    assert few["default_milliseconds"] == pytest.approx(8.0)


def test_the_table_stays_where_nothing_is_faster(interpreted: dict[str, Any]) -> None:
    _, more = interpreted["made"]["tiles"]
    assert Config(**more["config"]) == TABLE[32]
    assert more["milliseconds"] == more["default_milliseconds"] == pytest.approx(8.0)


def test_tiles_that_fail_or_compute_something_else_are_not_even_timed(interpreted: dict[str, Any]) -> None:
    timed = {Config(**config) for config, _ in interpreted["timed"]}
    assert timed == {FAST, EVEN, FIRST, *TABLE.values()}
    assert len(interpreted["timed"]) == len(SHAPES) * (4 + 2)  # each on every shape, once


def test_progress_is_told_before_each_number_of_rows(interpreted: dict[str, Any]) -> None:
    assert interpreted["steps"] == [[0, 2], [1, 2]]


def test_every_candidate_computes_the_same_as_the_table(interpreted: dict[str, Any]) -> None:
    tune = pytest.importorskip("wq_kernels.tune")
    timed = [Config(**config) for config, _ in interpreted["all"]]
    expected = [{TABLE[bucket], *tune.candidates(bucket)} for bucket in BUCKETS]
    assert len(timed) == sum(map(len, expected))
    assert set(timed) == set.union(*expected)


# --- what the kernels then run ---


@pytest.fixture
def tile_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Write a file and have WQ_CONFIG name it; what was chosen before is forgotten, then and afterwards."""

    def name(content: dict[str, Any]) -> Path:
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps(content))
        monkeypatch.setenv(configs.ENVIRONMENT, str(path))
        _forget()
        return path

    yield name
    _forget()


def _forget() -> None:
    configs.choose.cache_clear()
    configs.overrides.cache_clear()


def test_the_kernels_run_what_was_written(
    tile_file: Callable[[dict[str, Any]], Path], interpreted: dict[str, Any]
) -> None:
    version = interpreted["triton"]
    tile_file(interpreted["made"])
    assert configs.overrides("interpreter", version) == {16: FAST, 32: TABLE[32]}
    assert configs.choose(DEVICE, 16, 4, 1, version) == FAST
    assert configs.choose(DEVICE, 64, 4, 1, version) == configs.TABLE[""][64]  # was not tuned
    assert configs.overrides("interpreter", version + "1") == configs.overrides("another device", version) == {}
    assert configs.choose(DEVICE, 16, 4, 1, version + "1") == TABLE[16]


def test_a_tile_measured_on_4_bits_is_kept_from_weights_that_need_more_memory(
    tile_file: Callable[[dict[str, Any]], Path],
) -> None:
    """At 2 bits a block has twice the columns: this tile takes 152 KiB of shared memory at 4 bits on sm_90, and 280."""
    large = Config(128, 128, 8, 4, True)
    tile_file({"tiles": [entry("interpreter", "3", rows, config=large.to_dict()) for rows in configs.BUCKETS]})
    for rows in configs.BUCKETS:
        assert configs.choose(DEVICE, rows, 4, 1, "3") == configs.choose(DEVICE, rows, 8, 1, "3") == large
        assert configs.choose(DEVICE, rows, 2, 1, "3") == configs.TABLE[""][min(rows, 32)]


def test_a_tile_is_compared_with_the_table_and_not_with_an_earlier_file(
    monkeypatch: pytest.MonkeyPatch, tile_file: Callable[[dict[str, Any]], Path]
) -> None:
    tune = pytest.importorskip("wq_kernels.tune")
    version, earlier = tune.triton.__version__, Config(128, 16, 8, 8, False)
    tile_file({"tiles": [entry("interpreter", version, config=earlier.to_dict())]})
    times = {FAST: 4.0, TABLE[16]: 8.0, earlier: 2.0}
    current: list[Config] = []

    def multiplied(x: Tensor, *rest: Any) -> Tensor:
        current[:] = [rest[-1]]
        return x

    monkeypatch.setattr(tune, "multiply_rows", multiplied)
    timer = lambda function: (function(), times[current[0]])[1]  # noqa: E731
    made = tune.tune(torch.device("cpu"), SHAPES, (16,), torch.float16, timer, lambda _: [FAST])
    assert made["tiles"][0]["default_milliseconds"] == pytest.approx(8.0)
    assert Config(**made["tiles"][0]["config"]) == FAST


@pytest.mark.parametrize("bucket", configs.BUCKETS)
def test_candidates_are_tiles_of_the_bucket_that_fit_the_registers(bucket: int) -> None:
    tune = pytest.importorskip("wq_kernels.tune")
    found = list(tune.candidates(bucket))
    assert all(isinstance(config, Config) for config in found)  # it refuses bad values when it is made
    assert len(found) == len(set(found)) > 10
    assert min(bucket, 128) in {config.rows_m for config in found}
    for config in found:
        assert config.rows_m <= bucket
        assert config.rows_n * config.rows_m <= 128 * 32 * config.warps  # float32 sums: 128 of a thread's registers
        assert config.scale_weights == configs.TABLE["sm_90"][bucket].scale_weights


# --- the file ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU to tune on, whose measurement is `ENTRIES`; the list fills with the devices that were measured."""
    kernels = pytest.importorskip("wq_kernels.tune", reason="triton is not installed")
    measured: list[Any] = []

    def measure(device: torch.device, on_bucket: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        measured.append(device)
        if on_bucket is not None:
            on_bucket(0, 1)
        return {"tiles": [dict(entry) for entry in ENTRIES]}

    monkeypatch.setattr(tuning, "default_device", lambda: "cuda")
    monkeypatch.setattr(registry, "reason", lambda *_: ("tiled", "fused"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(kernels, "tune", measure)
    return measured


def test_the_first_gpu_is_measured_and_the_file_holds_what_is_returned(gpu: list[Any], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    made = tuning.tune(tmp_path / "tiles.json", on_bucket=lambda *step: steps.append(step))
    assert gpu == [torch.device("cuda", 3)]
    assert steps == [(0, 1)]
    assert made == {"tiles": ENTRIES} == json.loads((tmp_path / "tiles.json").read_text())


@pytest.mark.parametrize("content", [json.dumps({"tiles": ENTRIES}), "no JSON at all", ""])
def test_a_file_that_exists_is_left_alone_and_nothing_is_measured(content: str, gpu: list[Any], tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text(content)
    with pytest.raises(OutputError, match=r"tiles.json exists. Choose another --output, or add --overwrite"):
        tuning.tune(tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == content
    assert not gpu


def test_overwriting_renews_the_entries_of_this_device_and_triton_and_keeps_others(
    gpu: list[Any], tmp_path: Path
) -> None:
    others = [entry("L4", "3.7.1"), entry("H100", "3.4.0", 32)]
    mine = [entry("H100", "3.7.1", 16), entry("H100", "3.7.1", 256)]
    (tmp_path / "tiles.json").write_text(json.dumps({"tiles": [mine[0], *others, mine[1]]}))
    tuning.tune(tmp_path / "tiles.json", overwrite=True)
    assert json.loads((tmp_path / "tiles.json").read_text()) == {"tiles": [*others, *ENTRIES]}


@pytest.mark.parametrize("content", ["no JSON", "", "[]", "{}", '{"tiles": 3}', '{"tiles": [1]}', '{"tiles": {}}'])
def test_overwriting_what_is_no_file_of_tiles_is_refused(content: str, gpu: list[Any], tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text(content)
    with pytest.raises(OutputError, match=r"tiles.json is no file of tiles"):
        tuning.tune(tmp_path / "tiles.json", overwrite=True)
    assert (tmp_path / "tiles.json").read_text() == content
    assert not gpu


@pytest.mark.parametrize("where", ["nowhere/tiles.json", "file/tiles.json"])
def test_a_place_that_cannot_be_written_is_refused_before_minutes_of_measuring(
    where: str, gpu: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"tiles.json|nowhere|file"):
        tuning.tune(tmp_path / where)
    assert not gpu


def test_a_measurement_that_fails_leaves_the_file_as_it_was(
    gpu: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> dict[str, Any]:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr("wq_kernels.tune.tune", fails)
    before = json.dumps({"tiles": ENTRIES})
    (tmp_path / "tiles.json").write_text(before)
    for name in ("tiles.json", "new.json"):
        with pytest.raises(RuntimeError, match="the driver is gone"):
            tuning.tune(tmp_path / name, overwrite=True)
    assert (tmp_path / "tiles.json").read_text() == before
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_without_a_gpu_it_says_why_and_touches_nothing(
    overwrite: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "default_device", lambda: "cpu")
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        with pytest.raises(ModelError, match="nothing to tune on cpu: no fused kernel runs on cpu. .* on the GPU"):
            tuning.tune(tmp_path / name, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_a_gpu_on_which_the_kernel_fails_is_not_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "default_device", lambda: "cuda")
    monkeypatch.setattr(registry, "unusable", lambda device: f"{device} is older than sm_80")
    with pytest.raises(ModelError, match="nothing to tune on cuda: cuda is older than sm_80"):
        tuning.tune(tmp_path / "tiles.json")


# --- the command line ---


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "wq", "tune", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to tune on")
@pytest.mark.parametrize("more", [[], ["--json"], ["--overwrite"]], ids=str)
def test_the_command_on_a_cpu_is_one_line_and_an_exit_code(more: list[str], tmp_path: Path) -> None:
    done = run("-o", tmp_path / "tiles.json", *more)
    assert done.returncode == 1
    assert done.stderr.startswith("ModelError: there is nothing to tune on cpu: no fused kernel runs on cpu.")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_to_know_where_to_write() -> None:
    done = run()
    assert done.returncode == 2
    assert "--output" in done.stderr


def test_the_command_says_what_was_gained_and_how_to_use_it(gpu: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": [entry("L4", "3.7.1", 64)]}))  # of another device, without times: kept
    done = CliRunner().invoke(cli.app, ["tune", "-o", str(path), "--overwrite"])
    assert done.exit_code == 0, done.exception
    assert "up to 16 rows: 2.00× as fast as the table" in done.output
    assert "up to 64 rows" not in done.output
    assert f"next: WQ_CONFIG={path}" in done.output


def test_the_command_prints_json_for_programs(gpu: list[Any], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["tune", "-o", str(tmp_path / "tiles.json"), "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout) == {"tiles": ENTRIES}


if __name__ == "__main__":
    print(json.dumps(interpret()))
