"""`wq doctor`: what it says of this machine, and that the kernels it names are those that the dispatch would launch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wq
import wq_kernels
from wq import quantized
from wq.checkpoint import SINGLE, Entry
from wq.errors import CheckpointError, ModelError
from wq_kernels import configs, layout, native, registry, target

module = import_module("wq.doctor")
doctor = module.doctor

TinyModel = Callable[..., Path]
H100 = configs.Device("NVIDIA H100", "sm_90", 132)
# bits, out, in, groups: an 8B model's layers, and what pads, has short groups, or splits its columns.
SHAPES = [
    (4, 4096, 4096, 32),
    (4, 1024, 4096, 32),
    (4, 4096, 14336, 112),
    (4, 4096, 4096, 128),
    (2, 4096, 4096, 32),
    (8, 28672, 4096, 1),
    (4, 48, 96, 3),
]


@pytest.fixture(autouse=True)
def _no_tile_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the environment's tiles nor a choice remembered from another test, and none left behind."""
    monkeypatch.delenv(configs.ENVIRONMENT, raising=False)
    _forget()
    yield
    _forget()


def _forget(caches: tuple[Any, ...] = (configs.choose, configs.overrides, registry.select)) -> None:
    for cached in caches:  # bound here, as a test may put something else in their place
        cached.cache_clear()


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no accelerator, wherever the test runs."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has an H100 whose kernels work, as far as doctor can tell."""
    monkeypatch.setattr(module, "default_device", lambda: "cuda")
    monkeypatch.setattr(module, "_devices", list)
    monkeypatch.setattr(registry, "unusable", lambda device: "")
    monkeypatch.setattr(target, "describe", lambda device: H100)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of the tiny model, rounded to nearest; made once for the same options."""
    made: dict[tuple[object, ...], Path] = {}

    def get(sizes: dict[str, int] | None = None, **options: Any) -> Path:
        key = (*(sizes or {}).items(), None, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / "out"
            wq.quantize(tiny_model(**(sizes or {})), made[key], method="rtn", device="cpu", **options)
        return made[key]

    return get


def headers_only(folder: Path, weights: list[tuple[int, int, int, int]]) -> Path:
    """A checkpoint of any size that takes no space: holes, but for weight_shape. Asymmetric every other weight."""
    header: dict[str, Any] = {}
    shapes: dict[int, Tensor] = {}
    end = 0

    def add(name: str, dtype: str, itemsize: int, *shape: int) -> None:
        nonlocal end
        start, end = end, end + itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    for i, (bits, out_features, in_features, groups) in enumerate(weights):
        shapes[end] = torch.tensor([out_features, in_features])
        add(f"model.layers.{i}.mlp.up_proj.weight_shape", "I64", 8, 2)
        add(f"model.layers.{i}.mlp.up_proj.weight_packed", "I32", 4, out_features, -(-in_features * bits // 32))
        add(f"model.layers.{i}.mlp.up_proj.weight_scale", "BF16", 2, out_features, groups)
        if i % 2:
            add(f"model.layers.{i}.mlp.up_proj.weight_zero_point", "I32", 4, -(-out_features * bits // 32), groups)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start, shape in shapes.items():
            file.seek(8 + len(text) + start)
            file.write(shape.numpy().tobytes())
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {}}))
    return folder


def damaged(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the tensors of a checkpoint after `change`."""
    tensors = load_file(source / SINGLE)
    change(tensors)
    target.mkdir()
    save_file(tensors, target / SINGLE)
    shutil.copyfile(source / "config.json", target / "config.json")
    return target


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wq", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


# --- the machine ---


def test_it_names_the_versions_that_are_installed() -> None:
    versions = doctor()["versions"]
    assert versions == {name: installed(name) for name in module.PACKAGES}
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert versions["transformers"] is not None


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-at-all"))
    assert doctor()["versions"]["no-such-package-at-all"] is None


def test_without_a_checkpoint_it_says_nothing_of_layers_and_is_json() -> None:
    report = doctor()
    assert set(report) == {"versions", "devices", "backends", "tiles"}
    assert json.loads(json.dumps(report)) == report


def test_the_cpu_is_a_device(cpu: None) -> None:
    assert doctor()["devices"] == [{"device": "cpu", "threads": torch.get_num_threads()}]


def test_every_accelerator_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [
        SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30),
        SimpleNamespace(name="L4", total_memory=1),
    ]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    fake = SimpleNamespace(get_device_properties=lambda index: properties[index])
    monkeypatch.setattr(torch, "get_device_module", lambda *device: fake)
    assert doctor()["devices"][1:] == [
        {"device": "cuda:0", "name": "NVIDIA H100", "memory_bytes": 80 << 30},
        {"device": "cuda:1", "name": "L4", "memory_bytes": 1},
    ]


def test_an_accelerator_without_properties_is_a_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda *device: torch.mps)
    assert doctor()["devices"][1]["device"] == "mps:0"


def test_a_backend_is_listed_with_whether_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "broken", wq_kernels.Backend("no_such_module", "stream", ("cpu",)))
    backends = doctor()["backends"]
    assert set(backends) == {"fused", "tiles", "dequantize", "reference", "broken"}
    assert (backends["tiles"], backends["reference"], backends["broken"]) == (True, True, False)
    assert backends["fused"] == backends["dequantize"] == (installed("triton") is not None)


def test_the_file_of_tiles_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor()["tiles"] is None
    monkeypatch.setenv(configs.ENVIRONMENT, "/somewhere/tiles.json")
    assert doctor()["tiles"] == "/somewhere/tiles.json"


# --- a checkpoint ---


def test_every_packed_layer_is_accounted_for(cpu: None, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(symmetric=False)
    report = doctor(folder)
    assert (report["checkpoint"], report["for"]) == (str(folder), "cpu")
    found = {}
    for layer in report["layers"]:
        leaves = {name.rpartition(".")[2] for name in layer["layers"]}
        found[layer["out_features"], layer["in_features"]] = (leaves, layer["count"])
        assert all(name.startswith("model.layers.*.") for name in layer["layers"])
        assert (layer["bits"], layer["group_size"], layer["symmetric"]) == (4, 64, False)
    assert found == {
        (64, 64): ({"q_proj", "o_proj"}, 4),
        (32, 64): ({"k_proj", "v_proj"}, 4),
        (128, 64): ({"gate_proj", "up_proj"}, 4),
        (64, 128): ({"down_proj"}, 2),
    }
    packed = [name for name in load_file(folder / SINGLE) if name.endswith("weight_packed")]
    assert sum(layer["count"] for layer in report["layers"]) == len(packed)
    assert json.loads(json.dumps(report))["layers"][0]["bits"] == 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_bits_groups_and_grid_are_those_it_was_made_with(
    bits: int, group: int, symmetric: bool, checkpoint: Callable[..., Path]
) -> None:
    layers = doctor(checkpoint(bits=bits, group_size=group, symmetric=symmetric))["layers"]
    assert sum(layer["count"] for layer in layers) == 14
    for layer in layers:
        assert layer["bits"] == bits
        assert layer["group_size"] == (layer["in_features"] if group == -1 else group)
        assert layer["symmetric"] is symmetric


def test_layers_that_were_kept_dense_are_left_out(checkpoint: Callable[..., Path]) -> None:
    layers = doctor(checkpoint(keep=("o_proj",)))["layers"]
    assert sum(layer["count"] for layer in layers) == 12
    assert not any("o_proj" in name for layer in layers for name in layer["layers"])


def test_shards_are_read_as_one_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    tensors = load_file(folder / SINGLE)
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{i}.safetensors")
    shards = {name: f"part-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")

    def in_order(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(layers, key=lambda layer: (layer["out_features"], layer["in_features"]))

    assert in_order(doctor(tmp_path, "sm_90")["layers"]) == in_order(doctor(folder, "sm_90")["layers"])


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]) -> None:
    real, read = quantized.read_tensor, []

    def watched(entry: Entry) -> Tensor:
        read.append((entry.dtype, entry.shape))
        return real(entry)

    monkeypatch.setattr(quantized, "read_tensor", watched)
    monkeypatch.setattr("wq.checkpoint.read_tensor", watched)
    doctor(checkpoint())
    assert set(read) == {(torch.int64, (2,))}  # weight_shape
    assert len(read) <= 2 * 14


def test_a_checkpoint_larger_than_memory_is_explained(tmp_path: Path) -> None:
    folder = headers_only(tmp_path, [(4, 2**20, 2**20, 2**13)] * 4)
    assert (folder / SINGLE).stat().st_size > 2**41
    (even, odd) = doctor(folder, "sm_90")["layers"]
    assert (even["count"], odd["count"]) == (2, 2)
    assert (even["symmetric"], odd["symmetric"]) == (True, False)
    assert even["group_size"] == 128


# --- its kernels ---


def test_where_no_fused_kernel_runs_it_says_so(
    cpu: None, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "unusable", lambda bits: "no C++ compiler is installed")
    for layer in doctor(checkpoint(bits=3))["layers"]:
        assert (layer["layout"], layer["why"]) == ("stream", "no C++ compiler is installed")
        assert layer["kernels"] == dict.fromkeys(module.ROWS, "dequantize in torch, then matmul")


OURS, PYTORCHS = ("fused", "fused"), ("fused, by PyTorch", "dequantize in tiles, then matmul")


@pytest.mark.parametrize(
    ("dtype", "layout", "named"),
    [
        ("bfloat16", "native", OURS),
        (None, "native", OURS),
        ("bfloat16", "int4pack", PYTORCHS),
        ("float32", "bags", PYTORCHS),
    ],
)
def test_on_a_cpu_what_multiplies_depends_on_compilers_and_the_dtype(
    cpu: None,
    dtype: str | None,
    layout: str,
    named: tuple[str, str],
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layout != "native":
        monkeypatch.setattr(native, "unusable", lambda bits: "no C++ compiler is installed")
    kernels = import_module(f"wq_kernels.{layout}")
    if kernels.unusable():
        pytest.skip(f"here, {kernels.unusable()}")
    folder = checkpoint(sizes={"hidden_size": 64, "intermediate_size": 128})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    taken = [layer for layer in doctor(folder)["layers"] if layer["out_features"] % 64 == 0]
    assert taken
    for layer in taken:
        why = kernels.WHAT if layout == "native" else f"{kernels.WHAT} (no C++ compiler is installed)"
        assert (layer["layout"], layer["why"]) == (layout, why)
        assert (layer["kernels"][1], layer["kernels"][512]) == named


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942"])
def test_an_architecture_is_explained_without_the_device(architecture: str, checkpoint: Callable[..., Path]) -> None:
    report = doctor(checkpoint(), architecture)
    assert report["for"] == architecture
    for layer in report["layers"]:
        assert (layer["layout"], layer["why"]) == ("tiled", "fused")
        assert list(layer["kernels"]) == [1, 16, 64, 256, 512]
        for rows, kernel in layer["kernels"].items():
            assert kernel.startswith("fused, tile " if rows <= 256 else "dequantize in pieces, then matmul")


def test_the_device_at_hand_is_explained_as_its_architecture(h100: None, checkpoint: Callable[..., Path]) -> None:
    report = doctor(checkpoint())
    assert report["for"] == "cuda"
    assert report["layers"] == doctor(checkpoint(), "sm_90")["layers"]


def test_a_device_on_which_the_kernel_fails_is_explained_with_the_reason(
    h100: None, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.setattr(registry, "unusable", lambda device: f"sm_75 on {device.type} is too old")
    for layer in doctor(checkpoint())["layers"]:
        assert (layer["layout"], layer["why"]) == ("stream", "sm_75 on cuda is too old")
        assert not any("fused" in kernel for kernel in layer["kernels"].values())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 3, "group_size": 32}, "3-bit values straddle words"),
        ({"sizes": {"hidden_size": 96, "intermediate_size": 192}, "group_size": 48}, "groups of 48 are not 32 times"),
        ({"sizes": {"hidden_size": 96, "intermediate_size": 192}, "group_size": 96}, "groups of 96 are not 32 times"),
        ({"group_size": 16}, "groups of 16 are not 32 times"),
    ],
    ids=["3 bits", "48", "96", "16"],
)
def test_what_does_not_fit_into_tiles_takes_the_other_way_and_says_why(
    options: dict[str, Any], reason: str, checkpoint: Callable[..., Path]
) -> None:
    layers = doctor(checkpoint(**options), "sm_90")["layers"]
    # Per row is a group of any size: 96 columns in one group of 96 fit.
    for layer in [layer for layer in layers if layer["in_features"] != layer["group_size"]]:
        assert layer["layout"] == "stream"
        assert layer["why"].startswith(reason)
        backend = registry.select("cuda", layer["bits"]).__name__.rpartition(".")[2]
        said = {"dense": "dequantize in Triton, then matmul", "reference": "dequantize in torch, then matmul"}
        assert set(layer["kernels"].values()) == {said[backend]}
    assert any(layer["layout"] == "stream" for layer in layers)


KERNEL = re.compile(r"fused, tile (\d+)×(\d+), (\d+) warps, (\d+) stages(?:, columns split in (\d+))?")


def launched(
    monkeypatch: pytest.MonkeyPatch, device: configs.Device, weight: tuple[int, int, int, int], rows: int
) -> tuple[int, ...]:
    """Tile, warps, stages and split with which `fused.linear` launches its kernel on such a device, if it does."""
    fused = pytest.importorskip("wq_kernels.fused", reason="triton is not installed")
    bits, out_features, in_features, groups = weight
    launches: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            def launch(*_: Any, **options: Any) -> None:
                sizes = (options[name] for name in ("BN", "BM", "num_warps", "num_stages"))
                launches.append((*sizes, grid[2]))

            return launch

    monkeypatch.setattr(fused, "_fused_kernel", Recorder())
    monkeypatch.setattr(fused, "_dense", lambda x, *_: x.new_empty(x.shape[0], out_features))
    monkeypatch.setattr(fused, "describe", lambda _: device)
    blocks = -(-in_features // layout.block_columns(bits))
    padded = 1 if groups == 1 else blocks * layout.block_columns(bits) * groups // in_features
    n = -(-out_features // layout.ROW_ALIGNMENT) * layout.ROW_ALIGNMENT
    words = torch.empty(blocks, n, layout.WORDS, dtype=torch.int32)
    scale, zero = torch.empty(padded, n, dtype=torch.bfloat16), torch.empty(1, n, dtype=torch.uint8)
    x = torch.empty(rows, in_features, dtype=torch.bfloat16)
    fused.linear(x, words, scale, zero, None, bits, out_features, in_features)
    return launches[0] if launches else ()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "gfx942"])
@pytest.mark.parametrize("weight", SHAPES, ids=str)
def test_the_kernel_it_names_is_the_one_that_is_launched(
    architecture: str, weight: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (layer,) = doctor(headers_only(tmp_path, [weight]), architecture)["layers"]
    device = configs.Device(architecture, architecture, module._PROCESSORS[architecture])
    for rows, kernel in layer["kernels"].items():
        expected = launched(monkeypatch, device, weight, rows)
        said = KERNEL.fullmatch(kernel)
        assert (said is None) == (not expected)
        if said is None:
            assert kernel == "dequantize in pieces, then matmul"
        else:
            assert tuple(int(number or 1) for number in said.groups()) == expected


def test_some_kernels_split_their_columns_and_some_do_not(tmp_path: Path) -> None:
    kernels = [layer["kernels"][1] for layer in doctor(headers_only(tmp_path, SHAPES), "sm_90")["layers"]]
    assert {"split" in kernel for kernel in kernels} == {True, False}


def test_a_tile_file_for_the_device_is_what_it_explains(
    h100: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton")
    folder = headers_only(tmp_path / "model", [(4, 4096, 4096, 32)])
    before = doctor(folder)["layers"][0]["kernels"]
    own = configs.Config(64, 16, 2, 7, False)
    entry = {"device": H100.name, "triton": triton.__version__, "rows": 16, "config": own.to_dict()}
    (tmp_path / "tiles.json").write_text(json.dumps({"tiles": [entry]}))
    monkeypatch.setenv(configs.ENVIRONMENT, str(tmp_path / "tiles.json"))
    _forget()
    kernels = doctor(folder)["layers"][0]["kernels"]
    for rows in (1, 16):
        assert kernels[rows].startswith("fused, tile 64×16, 2 warps, 7 stages")
        assert kernels[rows] != before[rows]
    assert [kernels[rows] for rows in (64, 256, 512)] == [before[rows] for rows in (64, 256, 512)]


def test_the_tiles_are_those_of_the_triton_that_runs(
    h100: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its wheels go by other names and versions (pytorch-triton-rocm, 3.4.0+git1234); the kernels ask the module."""
    triton = pytest.importorskip("triton")
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: f"{real(name)}+git1234" if name == "triton" else real(name))
    asked = []
    monkeypatch.setattr(configs, "choose", lambda *a: asked.append(a[-1]) or configs.TABLE["sm_90"][a[1]])
    doctor(headers_only(tmp_path, [(4, 4096, 4096, 32)]))
    assert set(asked) == {triton.__version__}


# --- refused ---


@pytest.mark.parametrize("architecture", ["sm_1", "", "SM_90", "h100"])
def test_an_unknown_architecture_is_named_with_the_known_ones(
    architecture: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=f"architecture is '{architecture}'; wq knows sm_80, .*gfx942"):
        doctor(checkpoint(), architecture)


def test_a_folder_without_packed_weights_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no packed weights"):
        doctor(tiny_model())
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="there is neither model.safetensors nor"):
            doctor(folder)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_other_formats_are_explained_as_the_same_weights(
    format: str, symmetric: bool, checkpoint: Callable[..., Path]
) -> None:
    options = {"group_size": 32, "symmetric": symmetric, "dtype": "float16"}
    explained = [
        doctor(checkpoint(format=name, **options), "sm_90")["layers"] for name in (format, "compressed-tensors")
    ]
    theirs, ours = (sorted(layers, key=lambda layer: str(layer["layers"])) for layers in explained)
    assert theirs == ours


def test_a_quantized_folder_without_its_config_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = damaged(checkpoint(), tmp_path / "out", lambda tensors: None)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        doctor(folder)


LAYER = "model.layers.1.mlp.down_proj"  # [64, 128]


@pytest.mark.parametrize(
    "shape",
    [[], [64], [64, 128, 1], [65, 128], [128, 64], [64, 0], [64, -128], [64, 2**40], [64, 96], [64, 130]],
    ids=str,
)
def test_a_damaged_weight_shape_is_refused(shape: list[int], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    new = torch.tensor(shape, dtype=torch.int64)
    folder = damaged(checkpoint(), tmp_path / "out", lambda tensors: tensors.update({f"{LAYER}.weight_shape": new}))
    with pytest.raises(CheckpointError, match=LAYER):
        doctor(folder)


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_shape"])
def test_a_missing_tensor_is_refused(leaf: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = damaged(checkpoint(), tmp_path / "out", lambda tensors: tensors.pop(f"{LAYER}.{leaf}"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.{leaf} is missing"):
        doctor(folder)


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_packed"])
def test_a_tensor_with_a_row_too_few_is_refused(leaf: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    name = f"{LAYER}.{leaf}"
    folder = damaged(checkpoint(), tmp_path / "out", lambda t: t.update({name: t[name][1:].clone()}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.{leaf} is .* must be"):
        doctor(folder)


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_packed"])
def test_a_tensor_of_another_rank_is_refused(leaf: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    name = f"{LAYER}.{leaf}"
    folder = damaged(checkpoint(), tmp_path / "out", lambda t: t.update({name: t[name].flatten()}))
    with pytest.raises(CheckpointError, match=LAYER):
        doctor(folder)


def test_a_file_that_is_cut_short_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    content = (checkpoint() / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        doctor(tmp_path)


# --- the command line ---


def test_the_command_tells_people_about_the_machine() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert f"torch {metadata.version('torch')}" in done.stdout
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:3]] == ["versions", "devices", "backends"]


def test_the_command_prints_json_for_programs(checkpoint: Callable[..., Path]) -> None:
    done = run(checkpoint(), "--arch", "sm_90", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["for"] == "sm_90"
    assert [set(layer["kernels"]) for layer in report["layers"]] == [{"1", "16", "64", "256", "512"}] * 4
    assert report["layers"] == json.loads(json.dumps(doctor(checkpoint(), "sm_90")["layers"]))


def test_the_command_shows_a_table_for_each_shape(checkpoint: Callable[..., Path]) -> None:
    done = run(checkpoint(bits=3, group_size=32), "--arch", "sm_90")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert len(re.findall(r"layers of \d+ × \d+, 3 bits, groups of 32, symmetric", text)) == 4
    assert text.count("straddle words") == 4
    assert "then matmul" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arch", "sm_1"], "ModelError: architecture is 'sm_1'"), (["nowhere"], "CheckpointError: nowhere")],
)
def test_bad_input_to_the_command_is_one_line_and_exit_code_1(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1
