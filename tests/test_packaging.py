"""The wheel: it holds the whole package and nothing else, and its command starts from it alone.

An editable install, as every checkout has one, would hide a folder that is not packed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = ("featcache", "tests", "benchmarks", "scripts", "pyproject.toml", "README.md", "LICENSE")


def run_python(code: str, *arguments: object, cwd: Path, path: Path | None = None) -> str:
    environment = dict(os.environ) if path is None else {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this checkout, built from a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run_python(code, folder, cwd=copy)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "featcache"
    wanted = {f"featcache/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    page = {
        f"featcache/{place}/page.{ending}"
        for place in ("reporting", "deployment/server/page")
        for ending in ("html.jinja", "css", "js")
    }
    assert packed == wanted | page | {"featcache/py.typed"}


def test_command_starts_from_an_unpacked_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    wheel.extractall(site)
    elsewhere.mkdir()
    code = (
        "import importlib.metadata, sys, featcache\n"
        "(command,) = importlib.metadata.distribution('featcache').entry_points\n"
        "assert (command.group, command.name) == ('console_scripts', 'featcache'), command\n"
        "sys.argv = ['featcache', '--help']\n"
        "main = command.load()\n"
        "loaded = [m for name, m in sys.modules.items() if name.startswith('featcache')]\n"
        "print(*sorted(m.__file__ for m in loaded), sep='\\n')\n"
        "main()\n"
    )
    output = run_python(code, cwd=elsewhere, path=site)
    modules, _, help_text = output.partition("Usage: featcache")
    assert str(site / "featcache" / "cli" / "main.py") in modules
    assert all(Path(line).is_relative_to(site) for line in modules.split("\n") if line)
    assert "extract" in help_text
