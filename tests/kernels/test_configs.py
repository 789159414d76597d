"""Every choice of a tile can be compiled, a split fills the device within bounds, and a file overrides the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wq_kernels import configs
from wq_kernels.configs import BUCKETS, TABLE, WORKSPACE, Config, Device

GPU, TRITON = "NVIDIA H100 80GB HBM3", "3.7.1"
OWN = {"rows_n": 64, "rows_m": 16, "warps": 8, "stages": 5, "scale_weights": True, "registers": 0}
VALID = {"rows_n": 128, "rows_m": 32, "warps": 4, "stages": 3, "scale_weights": False, "registers": 0}
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "xpu", "cpu")


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file overrides anything, and nothing is remembered from test to test."""
    monkeypatch.delenv(configs.ENVIRONMENT, raising=False)
    for function in (configs.overrides, configs.choose, configs.split):
        function.cache_clear()
    yield
    for function in (configs.overrides, configs.choose, configs.split):
        function.cache_clear()


def device(architecture: str = "sm_90", processors: int = 132) -> Device:
    return Device(GPU, architecture, processors)


@pytest.mark.parametrize("prefix", TABLE)
def test_the_table_has_a_tile_for_every_bucket(prefix: str) -> None:
    assert tuple(TABLE[prefix]) == BUCKETS
    for config in TABLE[prefix].values():
        assert Config(**config.to_dict()) == config  # made again, checked again


def test_the_table_ends_with_what_every_processor_falls_back_to() -> None:
    assert list(TABLE)[-1] == ""
    for i, prefix in enumerate(TABLE):  # none hides behind one that comes before it
        assert not any(prefix.startswith(earlier) for earlier in list(TABLE)[:i])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", BUCKETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_groups", [1, 2, 4, 8])
def test_every_choice_is_a_tile_that_is_no_taller_than_its_bucket(
    architecture: str, m: int, bits: int, block_groups: int
) -> None:
    config = configs.choose(device(architecture), m, bits, block_groups, TRITON)
    assert config.rows_m <= m
    assert config == configs.built_in(device(architecture), m, bits, block_groups)
    # The float32 sums of a tile are in registers, of which a thread has 255: half of them is already much.
    assert config.rows_n * config.rows_m <= 128 * 32 * config.warps
    if architecture.startswith("gfx"):
        assert config.stages <= 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_have_their_sums_scaled_and_many_their_weights(architecture: str, bits: int) -> None:
    scaled = [configs.choose(device(architecture), m, bits, 1, TRITON).scale_weights for m in BUCKETS]
    assert scaled == sorted(scaled)
    assert not scaled[0]
    assert scaled[-1]


@pytest.mark.parametrize(("m", "expected"), [(1, 16), (16, 16), (17, 32), (33, 64), (128, 128), (129, 256), (256, 256)])
def test_a_bucket_is_the_smallest_that_holds_the_rows(m: int, expected: int) -> None:
    assert configs.bucket(m) == expected


@pytest.mark.parametrize("m", [257, 4096])
def test_more_rows_than_the_fused_kernel_takes_have_no_bucket(m: int) -> None:
    assert configs.FUSED_ROWS == 256
    with pytest.raises(ValueError, match=f"at most 256 rows, not {m}"):
        configs.bucket(m)


SPLITS = [
    (architecture, processors, n, m, bits, blocks)
    for architecture, processors in [("sm_90", 132), ("sm_80", 108), ("sm_120", 188), ("gfx942", 304), ("cpu", 4)]
    for n in (1, 256, 4096, 28672)
    for m in (1, 16, 64, 129, 256)
    for bits in (2, 4, 8)
    for blocks in (1, 3, 7, 32, 112, 448)
]


def test_a_split_stays_within_the_workspace_and_the_blocks() -> None:
    for architecture, processors, n, m, bits, blocks in SPLITS:
        where = device(architecture, processors)
        config = configs.choose(where, configs.bucket(m), bits, 1, TRITON)
        parts = configs.split(where, config, n, m, blocks)
        tiles = -(-n // config.rows_n) * -(-m // config.rows_m)
        assert type(parts) is int
        assert 1 <= parts <= max(1, blocks // 4)
        assert parts == 1 or tiles * parts * config.rows_n * config.rows_m * 4 <= WORKSPACE


@pytest.mark.parametrize(("architecture", "processors"), [("sm_90", 132), ("sm_80", 108), ("sm_120", 188)])
@pytest.mark.parametrize(("n", "blocks"), [(1024, 32), (1024, 112), (4096, 32), (4096, 112), (256, 448)])
def test_a_split_fills_the_device_where_there_are_few_tiles(
    architecture: str, processors: int, n: int, blocks: int
) -> None:
    where = device(architecture, processors)
    config = configs.choose(where, 16, 4, 1, TRITON)
    tiles, parts = -(-n // config.rows_n), configs.split(where, config, n, 1, blocks)
    assert tiles < processors
    # Half of the processors at least have something to do, unless the parts are as short as they may be.
    assert tiles * parts >= processors / 2 or parts >= blocks // 4 * 0.8
    assert parts > 1


@pytest.mark.parametrize("config", [Config(128, 16, 4, 4, False), Config(128, 128, 8, 3, True)], ids=str)
@pytest.mark.parametrize("blocks", [4, 32, 448])
def test_nothing_is_split_where_the_tiles_fill_the_device_anyway(config: Config, blocks: int) -> None:
    resident = 132 * 16 // config.warps
    assert configs.split(device(), config, resident * config.rows_n, config.rows_m, blocks) == 1
    assert configs.split(device(), config, 4 * resident * config.rows_n, config.rows_m, blocks) == 1


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_columns_too_few_to_share_are_not_split(blocks: int) -> None:
    assert configs.split(device(), Config(128, 16, 4, 4, False), 128, 1, blocks) == 1


def test_more_processors_never_mean_fewer_parts_for_one_tile() -> None:
    config = Config(128, 16, 4, 4, False)
    parts = [configs.split(device(processors=count), config, 128, 1, 448) for count in (1, 2, 8, 32, 132)]
    assert parts == sorted(parts)
    assert parts[-1] > 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows_n", 0), ("rows_n", 48), ("rows_n", 512), ("rows_n", 64.0), ("rows_n", "64"), ("rows_n", None),
        ("rows_m", 8), ("rows_m", -16), ("rows_m", True), ("rows_m", 2**40),
        ("warps", 0), ("warps", 3), ("warps", 32), ("warps", "4"),
        ("stages", 0), ("stages", 9), ("stages", -1), ("stages", True), ("stages", 2.0),
        ("scale_weights", 1), ("scale_weights", 0), ("scale_weights", "False"), ("scale_weights", None),
        ("registers", 8), ("registers", 256), ("registers", -1), ("registers", None), ("registers", False),
    ],
)  # fmt: skip
def test_a_tile_that_cannot_be_compiled_is_refused_by_name(name: str, value: Any) -> None:
    assert Config(**VALID).to_dict() == VALID
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; it must be one of"):
        Config(**{**VALID, name: value})


@pytest.mark.parametrize(
    ("registers", "target", "limit"), [(0, "ptx", {}), (96, "ptx", {"maxnreg": 96}), (96, "generic", {})]
)
def test_only_nvidia_s_assembler_is_given_a_limit_of_registers(
    registers: int, target: str, limit: dict[str, int]
) -> None:
    config = Config(**{**VALID, "registers": registers})
    assert config.launch_options(target) == {"num_warps": 4, "num_stages": 3, **limit}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"tiles": entries}))
    return path


def entry(**other: Any) -> dict[str, Any]:
    return {"device": GPU, "triton": TRITON, "rows": 16, "config": OWN, **other}


def test_a_file_overrides_the_table_for_its_buckets_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {m: configs.choose(device(), m, 4, 1, TRITON) for m in BUCKETS}
    configs.choose.cache_clear()
    configs.overrides.cache_clear()
    file = write(tmp_path / "tiles.json", entry(), entry(rows=100, milliseconds=1.5))
    monkeypatch.setenv(configs.ENVIRONMENT, str(file))
    after = {m: configs.choose(device(), m, 4, 1, TRITON) for m in BUCKETS}
    assert after == {**before, 16: Config(**OWN), 128: Config(**OWN)}
    assert before[16] != Config(**OWN)
    # `wq tune` measures 4 bits; a block of 2 bits is twice as wide, and may not fit.
    assert configs.choose(device(), 16, 8, 1, TRITON) == Config(**OWN)
    assert configs.choose(device(), 16, 2, 1, TRITON) == configs.built_in(device(), 16, 2, 1)


def test_without_the_variable_nothing_is_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.overrides(GPU, TRITON) == {}
    configs.overrides.cache_clear()
    monkeypatch.setenv(configs.ENVIRONMENT, "")
    assert configs.overrides(GPU, TRITON) == {}


@pytest.mark.parametrize("other", [{"device": "NVIDIA A100-SXM4-80GB"}, {"triton": "3.4.0"}], ids=str)
def test_entries_for_another_device_or_triton_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    # What they hold need not even make sense to this version.
    file = write(tmp_path / "tiles.json", entry(**other, config={"threads": 7}))
    monkeypatch.setenv(configs.ENVIRONMENT, str(file))
    assert configs.overrides(GPU, TRITON) == {}


DAMAGED: dict[str, str | None] = {
    "absent": None,
    "empty": "",
    "no JSON": "tiles: 3",
    "cut off": '{"tiles": [{"device"',
    "a list": "[]",
    "a number": "3",
    "no tiles": '{"configs": []}',
    "tiles that are no list": '{"tiles": 3}',
    "tiles that are numbers": '{"tiles": [1]}',
    "no device": json.dumps({"tiles": [{"triton": TRITON, "rows": 16, "config": OWN}]}),
    "no rows": json.dumps({"tiles": [{"device": GPU, "triton": TRITON, "config": OWN}]}),
    "no config": json.dumps({"tiles": [{"device": GPU, "triton": TRITON, "rows": 16}]}),
    "too many rows": json.dumps({"tiles": [entry(rows=257)]}),
    "rows in words": json.dumps({"tiles": [entry(rows="few")]}),
    "an unknown field": json.dumps({"tiles": [entry(config={**OWN, "threads": 3})]}),
    "a missing field": json.dumps({"tiles": [entry(config={"rows_n": 64})]}),
    "a tile of 48": json.dumps({"tiles": [entry(config={**OWN, "rows_n": 48})]}),
    "a number for a truth": json.dumps({"tiles": [entry(config={**OWN, "scale_weights": 1})]}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_an_error_that_says_which_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    file = tmp_path / "my tiles.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(configs.ENVIRONMENT, str(file))
    with pytest.raises(ValueError, match="my tiles.json is no file of tiles.*`wq tune`") as error:
        configs.choose(device(), 16, 4, 1, TRITON)
    assert error.value.__cause__ is not None


def test_a_file_that_is_no_text_is_damaged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiles.json").write_bytes(bytes(range(256)))
    monkeypatch.setenv(configs.ENVIRONMENT, str(tmp_path / "tiles.json"))
    with pytest.raises(ValueError, match="tiles.json is no file of tiles"):
        configs.overrides(GPU, TRITON)


def test_a_tile_differs_from_another_by_its_numbers() -> None:
    config = Config(**VALID)
    assert config == Config(**VALID)
    assert replace(config, rows_n=64) != config
    with pytest.raises(ValueError, match="rows_n is 3"):
        replace(config, rows_n=3)
