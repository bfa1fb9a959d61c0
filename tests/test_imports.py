"""What importing costs, what the public names are, and who prints."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TESTS
from fork_server import run_code
from sample_images import write_tree

import featcache
from featcache.backbones.backbone import Backbone

PACKAGE = Path(featcache.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
VERBS = ("demo", "split", "extract", "select", "info", "verify", "train", "sweep")
VERBS += ("audit", "crossval", "decide", "evaluate", "predict", "explain", "report", "export")
VERBS += ("serve", "log", "convert", "neighbours")
HEAVY = {"torch", "sklearn", "scipy", "matplotlib", "numba", "pandas"}
SLOW = {"torch", "numpy", "h5py", "PIL", "sklearn", "matplotlib", "scipy", "numba"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages in ``sys.modules`` after the code ran in a new process."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    return set(json.loads(run_python(code).splitlines()[-1]))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """A folder with images, a cache and a run."""
    folder = tmp_path_factory.mktemp("work")
    write_tree(folder / "data", {"train": 6, "valid": 3, "test": 3})
    featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_backbone)
    featcache.train(folder / "c.h5", folder / "run", hidden=(4,), epochs=1)
    return folder


LIGHT = [
    "info c.h5",
    "info run",
    "split data/train split.csv",
    "select c.h5 selected.h5",
    "verify c.h5",
    "predict run --cache c.h5",
    "convert c.h5 rows.npz",
    "log run --to tensorboard",
    "neighbours c.h5 train/covid/trc000_0.jpg",
    "evaluate run --split nonsense",
    "train c.h5 run2 --epochs 1",
    "train c.h5 run3 --hidden none --optimizer lbfgs",
    "report run",
]
"""What loads nothing heavy. One process runs all: whatever one loads is there after it."""


@pytest.mark.parametrize(
    ("lines", "heavy"),
    [
        (LIGHT, set()),
        (["evaluate run"], {"matplotlib"}),
        (["export run out.txt"], {"torch"}),
        (["decide run --positive covid --recall 0.9"], {"scipy"}),  # last: the others use it
    ],
    ids=["light", "evaluate", "export", "decide"],
)
def test_a_verb_loads_only_what_it_computes_with(
    work: Path, lines: list[str], heavy: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    code = (
        "import contextlib, json, sys\n"
        "from featcache.cli.main import main\n"
        f"for line in {lines!r}:\n"
        "    with contextlib.suppress(SystemExit): main(line.split())\n"
        f"    loaded = sorted({HEAVY!r} & {{m.split('.')[0] for m in sys.modules}})\n"
        "    print('LOADED', json.dumps([line, loaded]))\n"
    )
    said = run_python(code).splitlines()
    found = [json.loads(line[7:]) for line in said if line.startswith("LOADED ")]
    assert found == [[line, sorted(heavy)] for line in lines]


def test_importing_the_package_imports_nothing_slow() -> None:
    loaded = loaded_by("import featcache; featcache.__version__, dir(featcache)")
    assert loaded & {*SLOW, "click"} == set()


def test_help_lists_all_verbs_and_imports_nothing_slow() -> None:
    code = (
        "import contextlib, runpy, sys\n"
        "sys.argv = ['featcache', '--help']\n"
        "with contextlib.suppress(SystemExit): runpy.run_module('featcache', run_name='__main__')\n"
        f"assert not {SLOW!r} & set(sys.modules)"
    )
    text = run_python(code)
    assert "Usage: " in text
    assert all(f"\n  {verb} " in text for verb in VERBS)


def test_only_the_command_line_prints() -> None:
    for module in MODULES:
        tree = ast.parse((PACKAGE / module).read_text("utf-8"))
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        # verbose=True: scikit-learn's estimators print
        assert calls.count("print") == (module == "heads/estimator.py"), module
        # Isolation and others answer as child processes; outputs flushes it before --csv
        # /dev/stdout; predict_script is a command line of its own, copied out of the package.
        if module not in {
            "cli/main.py", "cli/ending.py", "cache/hdf5.py", "pixels/isolation.py", "outputs.py",
            "cache/converting/reading.py", "data/parquet_index.py", "extraction/workers/local.py",
            "deployment/exporting/predict_script.py",
        }:  # fmt: skip
            assert "sys.stdout" not in ast.unparse(tree), module


def test_public_names_are_what_type_checkers_see_and_what_there_is() -> None:
    assert set(featcache._MODULES) == set(featcache.__all__)
    assert len(set(featcache.__all__)) == len(featcache.__all__)
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
    assert typed == set(featcache.__all__)
    assert (PACKAGE / "py.typed").is_file()


def test_no_folder_or_module_of_the_root_has_the_name_of_a_public_function() -> None:
    """``featcache.split`` would vanish behind a module of its name."""
    assert not {path.split("/")[0].removesuffix(".py") for path in MODULES} & {*featcache.__all__}


def test_every_public_name_works_after_every_module_was_imported() -> None:
    names = [path.removesuffix(".py").replace("/", ".") for path in MODULES if "__" not in path]
    code = (
        "import importlib, types, featcache\n"
        f"for name in {names!r}: importlib.import_module('featcache.' + name)\n"
        "for name in featcache.__all__:\n"
        "    value = getattr(featcache, name)\n"
        "    assert callable(value) and not isinstance(value, types.ModuleType), name\n"
        "    assert value.__doc__, name\n"
        "    namespace = {}\n"
        "    exec(f'from featcache import {name}', namespace)\n"
        "    assert namespace[name] is value, name\n"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
