"""The house rules that no type checker knows: who imports whom, what is imported when, and what is never called."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
WQ = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "wq").rglob("*.py"))}
KERNELS = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "kernels").rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8"), name) for name, file in (WQ | KERNELS).items()}

# Leftwards is down: a file imports rooms of a lower rank, or its own. `report` stands before `pipeline`, which writes
# one; `hf` and `pipeline` share a view of models, `structure`; `formats` after `solvers`, whose Solution is packed.
RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            ("errors", "autoload"),
            ("machine", "registry"),
            ("scheme",),
            ("grid",),
            ("solvers",),
            ("formats",),
            ("layers",),
            ("checkpoint", "staging"),
            ("journal",),
            ("report", "structure", "quantized", "manifest", "loaders"),
            ("learner",),
            ("pipeline", "hf"),
            ("evaluate", "speed", "tasks", "hub", "doctor", "tuning", "convert", "verify", "distill"),
            ("presets",),
            ("planning",),
            ("cli",),
            ("__main__",),
        ]
    )
    for name in names
}

LONG_FUNCTIONS = {
    ("wq/cli.py", "quantize"): "more than half of it declares the options of the command",
    ("wq/pipeline/quantizer.py", "quantize"): "two thirds of it declare the options of a run and say what they mean",
}
MAX_LINES, MAX_KERNEL_LINES = 60, 120  # a kernel is one function, and a third of it declares what it is given

PACKAGE = "kernels/torch-ext/wq_kernels/"
WITH_TRITON = ("dense", "descend", "experts", "fused", "inner", "sweep", "tune")
WITHOUT_TRITON = (
    "bags",
    "checks",
    "compiler",
    "configs",
    "counters",
    "dispatch",
    "int4pack",
    "layout",
    "native",
    "reference",
    "registry",
    "stream",
    "target",
)


class Import(NamedTuple):
    """A module that a file imports."""

    module: str
    line: int
    at_top: bool  # outside of any function


def imports(name: str) -> list[Import]:
    """What a file imports, wherever in it; imports for type checkers only are not imports."""
    return list(_imports(TREES[name], True))


def _imports(node: ast.AST, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(_submodule(base, alias.name), child.lineno, at_top)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports(child, at_top and not inside)


def _submodule(base: str, name: str) -> str:
    """`from wq import grid` imports wq.grid; `from wq.grid import x` does not import wq.grid.x."""
    paths = [root.joinpath(*base.split("."), name) for root in (ROOT, ROOT / "kernels" / "torch-ext")]
    found = any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)
    return f"{base}.{name}" if found else base


def room(module: str) -> str:
    """`wq.solvers.rtn` is in the room `solvers`; `wq` itself in none."""
    return module.partition(".")[2].partition(".")[0]


def importers(package: str, at_top_only: bool = False) -> set[str]:
    """Files that import a package or something in it."""
    return {
        name
        for name in TREES
        for found in imports(name)
        if found.module.split(".")[0] == package and (found.at_top or not at_top_only)
    }


def each(files: dict[str, Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", files)


def test_every_room_has_a_rank_and_every_rank_a_room() -> None:
    rooms = {Path(name).relative_to("wq").parts[0].removesuffix(".py") for name in WQ} - {"__init__"}
    assert rooms == set(RANKS)


@each(WQ)
def test_a_file_imports_only_leftwards_or_from_its_own_room(name: str) -> None:
    own = room(name.removesuffix(".py").replace("/", "."))
    if own == "__init__":  # it re-exports all rooms, lazily, and lets a bare import matter
        assert {found.module for found in imports(name) if found.module.startswith("wq")} == {"wq.autoload"}
        return
    wrong = [
        f"{name}:{found.line} imports {found.module}"
        for found in imports(name)
        if found.module.startswith("wq.") and room(found.module) != own and RANKS[room(found.module)] >= RANKS[own]
    ]
    assert not wrong


@each(WQ)
def test_the_package_itself_is_imported_for_its_version_only(name: str) -> None:
    used = {
        node.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "wq"
    }
    taken = {
        alias.name
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and node.module == "wq"
        for alias in node.names
        if _submodule("wq", alias.name) == "wq"
    }
    assert used | taken <= {"__version__"}


@each(WQ)
def test_imports_in_wq_are_absolute(name: str) -> None:
    assert not [found for found in imports(name) if found.module.startswith(".")]


@each(KERNELS)
def test_kernels_know_nothing_of_models(name: str) -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    roots = {found.module.split(".")[0] for found in imports(name) if not found.module.startswith(".")}
    assert roots <= allowed


@each({name: file for name, file in WQ.items() if name.startswith(("wq/solvers/", "wq/formats/"))})
def test_solvers_and_formats_are_functions_on_tensors(name: str) -> None:
    allowed = (
        "wq.grid",
        "wq.scheme",
        "wq.errors",
        "wq.registry",
        "wq.formats.patterns",
        "wq.formats.stored",
        "wq.solvers",
        "wq_kernels.stream",
        "wq_kernels.descend",
        "wq_kernels.sweep",
    )
    wrong = [
        found.module
        for found in imports(name)
        if found.module.split(".")[0] not in sys.stdlib_module_names | {"torch"}
        and not any(found.module == prefix or found.module.startswith(prefix + ".") for prefix in allowed)
    ]
    assert not wrong


def test_few_files_import_transformers() -> None:
    others = {name for name in importers("transformers") if not name.startswith("wq/hf/")}
    assert others == {
        "wq/pipeline/source.py",
        "wq/structure/experts.py",
        "wq/structure/names.py",
        "wq/structure/towers.py",
    }


def test_only_calibration_and_evaluation_import_datasets() -> None:
    assert importers("datasets") <= {"wq/pipeline/calibration.py", "wq/evaluate.py"}
    assert not importers("datasets", at_top_only=True)


def test_layers_and_what_measures_or_loads_them_import_the_kernels() -> None:
    """Not formats, and of solvers only the loops over columns: how a weight is stored depends on no kernel."""
    apart = {f"wq_kernels.{name}" for name in ("descend", "stream", "sweep")}
    rooms = {
        room(name.removesuffix(".py").replace("/", "."))
        for name in TREES
        for found in imports(name)
        if found.module.split(".")[0] == "wq_kernels" and found.module not in apart
    }
    assert rooms == {"layers", "hf", "doctor", "tuning"}


def test_few_kernel_files_import_triton() -> None:
    kernels = {f"{PACKAGE}{name}.py" for name in WITH_TRITON}
    assert importers("triton", at_top_only=True) == kernels
    assert importers("triton") == kernels | {"wq/doctor.py"}  # it tells the version, if there is one


def test_every_kernel_file_is_known_to_need_triton_or_not() -> None:
    assert set(KERNELS) == {f"{PACKAGE}{name}.py" for name in ("__init__", *WITH_TRITON, *WITHOUT_TRITON)}


def test_kernels_compute_on_the_cpu_where_there_is_no_triton() -> None:
    code = f"""
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, wq_kernels
from importlib import import_module
for name in {WITHOUT_TRITON}:
    import_module("wq_kernels." + name)
words, scale = torch.full((3, 4), 0x77777777, dtype=torch.int32), torch.ones(3, 1)
stream = wq_kernels.linear(torch.ones(2, 32), words, scale, None, None, None, 4, 3, 32, "stream")
tiled = wq_kernels.layout.from_stream(words, scale, None, 4, 32)
tiles = wq_kernels.linear(torch.ones(2, 32), *tiled, None, None, 4, 3, 32, "tiled")
print(stream.unique().tolist(), tiles.unique().tolist(), wq_kernels.preferred_layout(torch.device("cpu"), 4, 33, 32, 1))
try:
    wq_kernels.get("fused")
except ImportError as error:
    print(error.name)
"""
    assert run("-c", code).stdout.splitlines() == ["[-32.0] [-32.0] stream", "triton"]


def test_scheme_and_errors_need_no_torch() -> None:
    assert not {"wq/scheme.py", "wq/errors.py", "wq/__init__.py", "wq/cli.py"} & importers("torch", at_top_only=True)


@each(WQ | KERNELS)
def test_only_the_command_line_prints(name: str) -> None:
    printing = [
        f"{name}:{node.lineno}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing or name == "wq/cli.py"


@each(WQ | KERNELS)
def test_nothing_executes_what_it_reads(name: str) -> None:
    banned = {"eval", "exec", "compile", "__import__"}
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in banned]
    assert not [call.lineno for call in calls if ast.unparse(call.func) in ("torch.load", "numpy.load", "np.load")]
    roots = {found.module.split(".")[0] for found in imports(name)}
    assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "kernels"}
    assert not [found for found in imports(name) if found.module == "torch.load"]


@each(WQ)
def test_remote_code_runs_only_for_a_caller_who_says_so(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            default = _default(node.args, "trust_remote_code")
            public = not node.name.startswith("_") or node.name == "__init__"
            assert default in ("False", "absent") or (default == "required" and not public), f"{name}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            handed_on = ast.unparse(node.value) in ("trust_remote_code", "self._remote_code", "False")
            assert handed_on, f"{name}:{node.lineno} sets trust_remote_code={ast.unparse(node.value)}"


@each(WQ)
def test_no_config_is_asked_whether_code_may_run(name: str) -> None:
    """`config.get("trust_remote_code")`, say, would need the name as a text."""
    texts = [node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)]
    assert not [text for text in texts if text in ("trust_remote_code", "trust-remote-code")]


def _default(arguments: ast.arguments, wanted: str) -> str:
    """The default of a parameter as text, or `required` or `absent`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    values: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, values, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    found = [value for argument, value in pairs if argument.arg == wanted]
    if not found:
        return "absent"
    return "required" if found[0] is None else ast.unparse(found[0])


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


@each(WQ | KERNELS)
def test_functions_are_short(name: str) -> None:
    long = {
        (name, node.name): node.end_lineno - node.lineno + 1
        for node in ast.walk(TREES[name])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > (MAX_KERNEL_LINES if _is_kernel(node) else MAX_LINES)
    }
    excused = {key for key in LONG_FUNCTIONS if key[0] == name}
    assert set(long) == excused, f"{long} lines; excused are {excused}"


@each(WQ | KERNELS)
def test_every_file_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(TREES[name])


@each(KERNELS)
def test_every_kernel_file_says_what_it_exports(name: str) -> None:
    assigned = [target for node in TREES[name].body if isinstance(node, ast.Assign) for target in node.targets]
    assert "__all__" in [ast.unparse(target) for target in assigned]


CONTAINERS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
CHANGES = {"append", "add", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "sort", "update"}


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple):
        return any(_is_mutable(element) for element in value.elts)
    called = ast.unparse(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else ""
    return isinstance(value, CONTAINERS) or called in MAKERS


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import: those of the file and of its `if`, `try`, `with` and `for` blocks."""
    for statement in body:
        yield statement
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for block in ("body", "orelse", "finalbody"):
                yield from _module_level(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from _module_level(handler.body)


def _state(tree: ast.Module) -> list[str]:
    """Containers of a file that calls could change, and what is said to be changed by calls."""
    found = []
    for statement in _module_level(tree.body):
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
            targets = [statement.target]
        if targets and statement.value is not None and _is_mutable(statement.value):
            found += [ast.unparse(target) for target in targets]
    constants = [name for name in found if name.isupper()]
    changed = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
        or (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _base(node) in constants)
        or (isinstance(node, ast.Call) and _base(node.func) in constants and getattr(node.func, "attr", "") in CHANGES)
    ]
    return [name for name in found if not name.isupper() and name != "__all__"] + changed


def _base(node: ast.expr) -> str:
    """`TABLE` for `TABLE[key]` and `TABLE.update`."""
    return ast.unparse(node.value) if isinstance(node, (ast.Subscript, ast.Attribute)) else ""


@each(KERNELS)
def test_kernel_files_keep_no_state(name: str) -> None:
    assert not _state(TREES[name])


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("cache = {}", ["cache"]),
        ("cache: dict[str, int] = dict()", ["cache"]),
        ("if True:\n    seen = set()", ["seen"]),
        ("one, other = {}, None", ["(one, other)"]),
        ("_seen = [i for i in range(3)]", ["_seen"]),
        ("import collections\nseen = collections.defaultdict(list)", ["seen"]),
        ("TABLE = {}\ndef f():\n    TABLE['a'] = 1", ["TABLE['a']"]),
        ("TABLE = []\ndef f():\n    TABLE.append(1)", ["TABLE.append(1)"]),
        ("x = 1\ndef f():\n    global x\n    x = 2", ["global x"]),
        ("__all__ = ['f']\nTABLE = {1: 2}\nPAIR = (1, 2)\ndef f():\n    own = {}\n    own[1] = TABLE[1]", []),
    ],
)
def test_state_is_found(source: str, state: list[str]) -> None:
    assert _state(ast.parse(source)) == state


def test_the_kernels_folder_is_no_package() -> None:
    """An `__init__.py` there would shadow the `kernels` package, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository's root, with that root first on its path, as `python -c` has it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_kernels_from_the_root_does_not_find_ours() -> None:
    try:
        metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("the package `kernels` is not installed: nothing to shadow")
    code = """
import kernels
import transformers.integrations.hub_kernels  # imports from `kernels`
print(kernels.__file__, hasattr(kernels, "get_kernel"))
"""
    file, genuine = run("-c", code).stdout.split()
    assert not Path(file).is_relative_to(ROOT / "kernels")
    assert genuine == "True"


def test_import_wq_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "triton", "datasets", "numpy", "wq_kernels")
    code = f"import sys, wq; dir(wq); wq.__version__; print([name for name in {heavy} if name in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"]], ids=" ".join)
def test_the_command_line_answers_without_importing_torch(arguments: list[str]) -> None:
    done = run("-X", "importtime", "-m", "wq", *arguments)
    assert done.stdout.strip()
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert {"wq", "typer"} <= loaded
    assert not loaded & {"torch", "transformers", "triton", "datasets", "numpy"}


def test_every_public_name_resolves() -> None:
    code = """
import wq
print([name for name in wq.__all__ if getattr(wq, name, None) is None])
print(sorted(set(wq._EXPORTS) | {"__version__"}) == sorted(wq.__all__) == sorted(dir(wq)))
print(callable(wq.evaluate), callable(wq.quantize), wq.WqLinear.__module__)
"""
    assert run("-c", code).stdout.splitlines() == ["[]", "True", "True True wq.layers.linear"]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    import wq

    with pytest.raises(AttributeError, match=r"no attribute 'quantise'; it has .*quantize"):
        _ = wq.quantise
