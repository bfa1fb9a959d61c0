"""Products in registers against NumPy's, for every way that a matrix can be cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import pytest

from featcache.heads.compiled import products
from featcache.heads.compiled.products import multiply
from featcache.heads.compiled.vectors import FEATURES, PANEL, UNITS

_Floats = npt.NDArray[np.float32]

TESTS = [Path(__file__).with_name(f"test_{name}.py") for name in ("products", "weight_kernels")]
ROWS = [1, UNITS, 2 * UNITS + 3]
COLUMNS = [1, PANEL - 1, PANEL, 2 * PANEL + 5]


@numba.njit
def multiply_now(left: _Floats, right: _Floats, out: _Floats) -> None:
    multiply(left, right, left.shape[1], out)


def within(values: _Floats) -> tuple[_Floats, _Floats]:
    """Return a copy of a matrix within other numbers, and all of these."""
    flat = np.full(values.size + 2 * PANEL, np.nan, np.float32)
    inner = flat[PANEL : PANEL + values.size].reshape(values.shape)
    inner[:] = values
    return inner, flat


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("depth", [1, 2, products.DEPTH, 2 * products.DEPTH + 7])
def test_products_equal_those_of_numpy(depth: int, turned: bool) -> None:
    """NaN around each matrix: none of it is read into the product, none of it is written over."""
    rng = np.random.default_rng(depth)
    for num_rows in ROWS:
        for num_columns in COLUMNS:
            left, _ = within(rng.standard_normal((num_rows, depth)).astype("f4"))
            if turned:
                left = np.asfortranarray(left)
            right, _ = within(rng.standard_normal((depth, num_columns)).astype("f4"))
            out, around = within(np.full((num_rows, num_columns), 7, np.float32))
            multiply_now(left, right, out)
            expected = left.astype("f8") @ right.astype("f8")
            assert np.abs(out - expected).max() < 1e-5 * np.sqrt(depth) * 4
            assert np.isnan(around).sum() == 2 * PANEL


@pytest.mark.parametrize(("name", "features"), [
    ("nehalem", "+sse,+sse2,+sse4.1"), ("haswell", "+avx,+avx2,+fma"),
])  # fmt: skip
@pytest.mark.skipif("+avx2" not in FEATURES, reason="needs an x86 with AVX2")
def test_other_processors_get_other_vectors_and_the_same_results(name: str, features: str) -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *map(str, TESTS),
        "-k", "not processors",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    code = "from featcache.heads.compiled import vectors; print(vectors.LANES)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert int(found.stdout) == (4 if name == "nehalem" else 8)
