"""Who serves a quantized repo: an explicit flag means wq, WQ_TAKEOVER decides otherwise, all of it reversible."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from wq import WqConfig, WqLinear, quantize
from wq.errors import FormatError, SchemeError
from wq.hf import takeover
from wq.hf.takeover import ENVIRONMENT, install, serves, uninstall

TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def repos(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for format in ("gptq", "awq", "compressed-tensors"):
        made[format] = tmp_path_factory.mktemp(format) / "out"
        quantize(tiny_model(), made[format], method="rtn", group_size=32, format=format, dtype="float16")
    return made


def uses_wq(folder: Path, **options: object) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return any(isinstance(module, WqLinear) for module in model.modules())


def present(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Say that these packages are installed, and no others that stock loaders need."""
    real = importlib.util.find_spec
    needed = {"optimum", "gptqmodel", "compressed_tensors", "auto_round"}

    def find(name: str, package: str | None = None) -> object:
        return (object() if name in names else None) if name in needed else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.parametrize(
    ("method", "installed", "expected"),
    [
        ("gptq", (), True),
        ("gptq", ("gptqmodel",), True),
        ("gptq", ("optimum", "gptqmodel"), False),
        ("awq", (), True),
        ("awq", ("gptqmodel",), False),
        ("compressed-tensors", (), True),
        ("compressed-tensors", ("compressed_tensors",), False),
        ("auto-round", (), True),
        ("bitsandbytes", (), False),
        (None, (), False),
    ],
)
def test_by_default_wq_serves_what_the_stock_backend_is_missing_for(
    method: str | None, installed: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(monkeypatch, *installed)
    assert serves({"quant_method": method}, None) is expected
    assert serves({"quant_method": method}, WqConfig()) is True


def test_a_policy_decides_within_the_context_and_is_gone_after() -> None:
    for policy, expected in (("always", True), ("never", False)):
        with takeover(policy):
            assert serves({"quant_method": "compressed-tensors"}, None) is expected
            assert serves({"quant_method": "compressed-tensors"}, WqConfig()) is True
            assert serves({"quant_method": "bitsandbytes"}, None) is False
    before = serves({"quant_method": "gptq"}, None)
    with takeover("never"), takeover("always"):
        assert serves({"quant_method": "gptq"}, None) is True
    assert serves({"quant_method": "gptq"}, None) is before


def test_a_policy_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SchemeError, match="WQ_TAKEOVER is 'sometimes'"), takeover("sometimes"):
        pass
    monkeypatch.setenv(ENVIRONMENT, "sometimes")
    with pytest.raises(SchemeError, match="missing, always, never"):
        serves({"quant_method": "gptq"}, None)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_repo_without_a_flag_loads_where_transformers_could_not(format: str, repos: dict[str, Path]) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed: the stock loader serves this repo")
    assert uses_wq(repos[format])
    with takeover("never"), pytest.raises(ImportError):
        AutoModelForCausalLM.from_pretrained(repos[format])


def test_a_repo_that_stock_transformers_loads_stays_with_it_unless_told(repos: dict[str, Path]) -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed")
    assert not uses_wq(repos["compressed-tensors"])
    with takeover("always"):
        assert uses_wq(repos["compressed-tensors"])


def test_what_the_stock_loader_fails_to_load_is_served_although_it_is_installed(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asymmetric compressed-tensors, and AutoRound's first name for itself."""
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed")
    quantize(tiny_model(), tmp_path / "asymmetric", method="rtn", symmetric=False, group_size=32)
    assert uses_wq(tmp_path / "asymmetric")
    with takeover("never"), pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "asymmetric")
    present(monkeypatch, "auto_round")
    assert serves({"quant_method": "intel/auto-round"}, None)
    assert not serves({"quant_method": "auto-round"}, None)


def test_the_wrapped_function_can_be_taken_off_and_put_back(repos: dict[str, Path]) -> None:
    wrapped = AutoHfQuantizer.merge_quantization_configs.__func__
    uninstall()
    try:
        assert AutoHfQuantizer.merge_quantization_configs.__func__ is not wrapped
        assert AutoHfQuantizer.merge_quantization_configs.__func__.__module__ == "transformers.quantizers.auto"
        with pytest.raises(ValueError, match="passing a WqConfig"):
            AutoModelForCausalLM.from_pretrained(repos["compressed-tensors"], quantization_config=WqConfig())
    finally:
        install()
    assert uses_wq(repos["compressed-tensors"], quantization_config=WqConfig())


def test_formats_that_wq_cannot_read_are_refused_by_name() -> None:
    for values in (
        {"quant_method": "hqq"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"},
        {"quant_method": "auto-round", "packing_format": "mlx"},
    ):
        with pytest.raises(FormatError, match=f"quantized as {values['quant_method']}"):
            WqConfig().bind(values)


IMPORTS = {
    "before transformers": "import wq\nfrom transformers import AutoModelForCausalLM",
    "after transformers": "from transformers import AutoModelForCausalLM\nimport wq",
    "with its flag": "import wq\nfrom transformers import AutoModelForCausalLM\nfrom wq import WqConfig",
}


@pytest.mark.parametrize("order", IMPORTS)
@pytest.mark.parametrize("policy", ["", "never"])
def test_a_bare_import_is_enough_unless_it_is_forbidden(order: str, policy: str, repos: dict[str, Path]) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed: the stock loader serves this repo")
    code = f"""
import sys
{IMPORTS[order]}
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(type(model.model.layers[0].mlp.up_proj).__name__)
except ImportError:
    print("ImportError")
"""
    environment = {**os.environ, **({ENVIRONMENT: policy} if policy else {})}
    command = [sys.executable, "-c", code, str(repos["awq"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-1] == ("ImportError" if policy else "WqLinear")
