"""The examples in docstrings do what they say; those marked SKIP need data."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import featcache

ROOT = Path(featcache.__file__).parents[1]


def runs_an_example(path: Path) -> bool:
    lines = path.read_text("utf-8").splitlines()
    return any(">>> " in line and "+SKIP" not in line for line in lines)


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "featcache").rglob("*.py"))
    if runs_an_example(path)
]


def test_there_are_examples_that_run() -> None:
    assert MODULES


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_do_what_they_say(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0
