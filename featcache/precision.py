"""Precision: how far features may be from those of the plain fp32 network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

PARITY_BOUNDS = {"fp32": 1e-4, "tf32": 2e-3, "fp16": 2e-2, "bf16": 2e-1}
"""Largest relative L2 error of an image's features against the eager fp32 forward."""

LARGEST_OWN_BOUND = 1e-2
"""A bound is at most this where the library's own fp32 misses the usual one."""

FLOAT16_STORAGE_ERROR = 5e-4
"""Added to the bound when features are stored as float16 (measured 2.4e-4)."""


def parity_bound(precision: str, spread: float | None = None) -> float:
    """Return the largest relative L2 error allowed of an image's features.

    Args:
        precision: One of ``PARITY_BOUNDS``.
        spread: Of the library's own network, its fp32 against float64; None where it is not known.
    """
    own = 3 * spread if spread is not None and math.isfinite(spread) else 0.0
    return max(PARITY_BOUNDS[precision], min(own, LARGEST_OWN_BOUND))


def format_bound(bound: float) -> str:
    """Return a bound as text: ``1e-04``, ``1.3e-03``."""
    return f"{bound:.1e}".replace(".0e", "e")


def relative_errors(found: npt.NDArray[Any], reference: npt.NDArray[Any]) -> tuple[float, ...]:
    """Return the relative L2 error of each row, (N, D) against (N, D); infinite for NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.linalg.norm(found.astype(np.float64) - reference, axis=1)
        length = np.maximum(np.linalg.norm(reference.astype(np.float64), axis=1), 1e-30)
        errors = difference / length
    return tuple(float(e) if np.isfinite(e) else float("inf") for e in errors)
