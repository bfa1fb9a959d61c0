"""At which precision the rows of a cache were made, and which errors were measured and are allowed.

Reads: open caches and their provenance. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.errors import CacheError, printable, warn_user
from featcache.precision import (
    FLOAT16_STORAGE_ERROR,
    LARGEST_OWN_BOUND,
    PARITY_BOUNDS,
    format_bound,
    parity_bound,
)

UNKNOWN = "unknown"
"""Stands for the precision of a row where it is not known."""

MAX_PARITY = 8  # number of parity errors to keep: the largest ones
_SPREAD_FACTS = ("spread", "bound")


def known_precision(cache: Cache) -> str | None:
    """Return the precision of a cache; None if it is not known.

    It is unknown for features made elsewhere, and after a repair that lost the provenance.
    """
    precision = str(cache.provenance.get("precision"))
    return precision if precision in PARITY_BOUNDS and "lost" not in cache.provenance else None


def row_precisions(cache: Cache) -> dict[str, list[str]]:
    """Return, by split, the precision of each row, ``UNKNOWN`` where it is not known."""
    sizes = {name: len(split) for name, split in cache.splits.items()}
    told = read_row_precisions(cache.provenance, sizes)
    if told is not None:
        return told
    precision = known_precision(cache) or UNKNOWN
    return {name: [precision] * size for name, size in sizes.items()}


def read_row_precisions(
    provenance: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, list[str]] | None:
    """Return what provenance tells of the precision of each row, by split.

    Args:
        provenance: Has ``row_precisions`` where rows differ: of each split a list of [precision,
            number of rows], in the order of the rows.
        sizes: Split -> its number of rows.

    Returns:
        None where rows do not differ; ``UNKNOWN`` for all where the list is not of these rows.
    """
    told = provenance.get("row_precisions")
    if told is None:
        return None
    names: dict[str, list[str]] = {}
    for split, size in sizes.items():
        runs = told.get(split) if isinstance(told, dict) else None
        names[split] = [UNKNOWN] * size
        if isinstance(runs, list) and all(_is_stretch(run, size) for run in runs):
            listed = [name for name, number in runs for _ in range(number)]
            names[split] = listed if len(listed) == size else names[split]
    return names


def _is_stretch(run: Any, size: int) -> bool:
    """Return whether it is [precision, number of rows], of rows that follow each other."""
    return (
        isinstance(run, list) and len(run) == 2 and isinstance(run[0], str)
        and (run[0] in PARITY_BOUNDS or run[0] == UNKNOWN)
        and type(run[1]) is int and 0 < run[1] <= size
    )  # fmt: skip


def read_parities(cache: Cache) -> dict[str, dict[str, Any]]:
    """Return, by precision, ``errors`` and ``num_probed``: see ``Cache.parity``.

    Where the library's own fp32 missed the usual bound, also its ``spread`` and the ``bound`` that
    the rows were judged by.
    """
    told = cache.provenance.get("parity_per_precision")
    if isinstance(told, dict) and all(map(_is_parity, told.values())):
        return {name: dict(measured) for name, measured in told.items()}
    if not cache.parity:
        return {}
    measured = {"errors": cache.parity, "num_probed": cache.num_probed}
    spread = {key: cache.provenance.get(f"parity_{key}") for key in _SPREAD_FACTS}
    measured |= {key: value for key, value in spread.items() if _is_error(value)}
    return {known_precision(cache) or UNKNOWN: measured}


def with_spread(
    precision: str, measured: Mapping[str, Any], *spreads: float | None
) -> dict[str, Any]:
    """Return what was measured at a precision with the largest spread, if any was measured.

    Args:
        precision: Of the rows.
        measured: ``errors`` and ``num_probed``.
        spreads: Of the library's own network: see ``parity_bound``.
    """
    known = [spread for spread in spreads if spread is not None]
    if not known or precision not in PARITY_BOUNDS:
        return dict(measured)
    return {**measured, "spread": max(known), "bound": parity_bound(precision, max(known))}


def _is_error(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value < 1e9


def _is_parity(measured: Any) -> bool:
    if not isinstance(measured, dict) or not isinstance(measured.get("errors"), list):
        return False
    number, errors = measured.get("num_probed"), measured["errors"]
    return (
        type(number) is int and len(errors) <= number < 2**53
        and all(map(_is_error, errors))
        and all(_is_error(measured[key]) for key in _SPREAD_FACTS if key in measured)
    )  # fmt: skip


def with_parities(
    provenance: Mapping[str, Any], parities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return provenance with the errors that were measured, all together and by precision."""
    told = {key: value for key, value in provenance.items() if not key.startswith("parity")}
    told.pop("num_probed", None)
    if not parities:
        return told
    told["parity"] = sorted(error for measured in parities.values() for error in measured["errors"])
    told["num_probed"] = sum(measured["num_probed"] for measured in parities.values())
    if len(parities) > 1:
        told["parity_per_precision"] = {name: dict(parities[name]) for name in sorted(parities)}
    else:
        (measured,) = parities.values()
        told |= {f"parity_{key}": measured[key] for key in _SPREAD_FACTS if key in measured}
    return told


def with_row_precisions(
    provenance: Mapping[str, Any], precisions: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return provenance that says at which precision each row was made.

    ``precision`` is that of all rows, or names all there are; ``row_precisions`` (see
    ``read_row_precisions``) is there only if they differ. Errors of precisions that no row has are
    left out.

    Args:
        provenance: Of the rows, apart from their precision.
        precisions: Split -> the precision of each row.
    """
    names = _listed(precisions)
    told = {key: value for key, value in provenance.items() if key != "row_precisions"}
    if names in ([], [UNKNOWN]):
        return told
    parities = provenance.get("parity_per_precision")
    if parities is not None:
        told = with_parities(told, {name: parities[name] for name in names if name in parities})
    told["precision"] = ", ".join(names)
    if len(names) > 1:
        told["row_precisions"] = {
            split: [[name, len([*run])] for name, run in groupby(rows)]
            for split, rows in precisions.items()
        }
    return told


def _listed(precisions: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted({name for rows in precisions.values() for name in rows})


def describe_precision(cache: Cache) -> str | None:
    """Return the precision of all rows, or those there are; None where none is known."""
    names = _listed(row_precisions(cache))
    return None if names in ([], [UNKNOWN]) else ", ".join(names)


def _bound(cache: Cache, precision: str) -> float:
    """Return the largest error allowed of a row; where the precision is not known, that of fp32."""
    narrow = cache.identity.get("feature_dtype") == "float16"
    bound = PARITY_BOUNDS.get(precision, PARITY_BOUNDS["fp32"])
    own = float(read_parities(cache).get(precision, {}).get("bound", 0))
    bound = max(bound, min(own, LARGEST_OWN_BOUND))
    return bound + (FLOAT16_STORAGE_ERROR if narrow else 0)


def error_bounds(cache: Cache) -> dict[str, npt.NDArray[np.float64]]:
    """Return, by split, the largest allowed relative L2 error of each row (N,).

    It is against the eager fp32 network. Where the precision is not known, it is that of fp32.

    Raises:
        CacheError: If the cache states an unknown precision.
    """
    precisions = row_precisions(cache)
    stated = cache.provenance.get("precision")
    if (
        stated is not None
        and known_precision(cache) is None
        and not {"lost", "row_precisions"} & cache.provenance.keys()
    ):
        raise CacheError(
            "precision of the cache", expected=" or ".join(PARITY_BOUNDS), found=stated,
            where=cache.path, hint="It was not made by this version of featcache extract",
        )  # fmt: skip
    bounds = {name: _bound(cache, name) for name in _listed(precisions)}
    return {
        split: np.array([bounds[name] for name in rows], np.float64)
        for split, rows in precisions.items()
    }


def error_bound(cache: Cache) -> float:
    """Return the largest of ``error_bounds``.

    Raises:
        CacheError: If the cache states an unknown precision.
    """
    bounds = [float(rows.max()) for rows in error_bounds(cache).values() if len(rows)]
    return max(bounds, default=PARITY_BOUNDS["fp32"])


def warn_of_precisions(caches: Sequence[Cache]) -> None:
    """Warn of caches with different precision; refuse one with a parity above its bound.

    Raises:
        CacheError: If there is one.
    """
    seen: dict[str, str] = {}
    for cache in caches:
        parity = _parity(cache)
        names = _listed(row_precisions(cache))
        if names in ([], [UNKNOWN]):
            continue
        for name, measured in read_parities(cache).items():
            worst = max(measured["errors"], default=0.0)
            if worst > (bound := _bound(cache, name)):
                raise CacheError(
                    "parity of the cache", expected=f"at most {format_bound(bound)} at {name}",
                    found=f"{worst:.1e}", where=cache.path, hint="Extract it again",
                )  # fmt: skip
        known = f"parity {max(parity):.1e}" if parity else "parity unknown"
        precision = ", ".join(names)
        seen.setdefault(precision, f"{cache.path.as_posix()} {precision} ({known})")
    if len(seen) > 1:
        warn_user(
            printable("features were made at different precision: " + ", ".join(seen.values()))
        )


def _parity(cache: Cache) -> list[float]:
    parity = cache.provenance.get("parity") or []
    if not isinstance(parity, list) or not all(map(_is_error, parity)):
        raise CacheError(
            "provenance of the cache", expected="a list of numbers as parity",
            found=f"{parity!r:.40}", where=cache.path, hint="Extract it again",
        )  # fmt: skip
    return [float(error) for error in parity]


def join_parities(caches: Sequence[Cache]) -> dict[str, dict[str, Any]]:
    """Return the errors of several caches by precision, of each the largest."""
    for cache in caches:
        _parity(cache)  # refuses what is none
    every = [(name, m) for cache in caches for name, m in read_parities(cache).items()]
    joined: dict[str, dict[str, Any]] = {}
    for name in {name for name, _ in every}:
        # once if caches have them from the same cache
        probed = {tuple(m["errors"]): m["num_probed"] for of, m in every if of == name}
        errors = sorted({error for errors in probed for error in errors})
        measured = {"errors": errors[-MAX_PARITY:], "num_probed": sum(probed.values())}
        spreads = [m.get("spread") for of, m in every if of == name]
        joined[name] = with_spread(name, measured, *spreads)
    return joined
