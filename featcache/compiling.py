"""Functions compiled by Numba, with one rule for where the result is kept. They release the GIL.

Reads, writes: Numba's cache, beside the package or in the user's cache folder. Raises
``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(
    signature: str, *modules: ModuleType, sums_reorder: bool = False
) -> Callable[[_Function], _Function]:
    """Compile now, for one signature, and keep it on the disk if there is a place for it.

    Numba uses kept code again if time and size of the function's file are the same. An installed
    file of another version may have the same, so the name also has a hash of the sources.

    Args:
        signature: Numba's.
        modules: That the function's parts and constants come from, other than its own.
        sums_reorder: Let the terms of a sum be added in any order: several at a time. NaN and
            infinity stay what they are.
    """
    fastmath = {"reassoc", "contract"} if sums_reorder else False

    def compile_now(function: _Function) -> _Function:
        jit = functools.partial(
            numba.njit, signature, nogil=True, error_model="numpy", fastmath=fastmath
        )
        plain_name = function.__qualname__
        try:  # beside its file, else in NUMBA_CACHE_DIR or the user's cache folder
            function.__qualname__ += "_" + _hash_sources(function, modules)
            return cast(_Function, jit(cache=True)(function))
        except (OSError, RuntimeError):  # none of them can be written to
            return cast(_Function, jit()(function))
        finally:
            function.__qualname__ = plain_name

    return compile_now


def _hash_sources(function: Callable[..., Any], modules: Sequence[ModuleType]) -> str:
    # This file too: what is kept does not say with which options it was compiled.
    files = [__file__, function.__code__.co_filename, *map(inspect.getfile, modules)]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def part(function: _Function) -> _Function:
    """Compile with the kernel that calls it."""
    return cast(_Function, numba.njit(nogil=True, error_model="numpy")(function))
