"""The options of an audit: which go together, and which parts they ask for.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featcache.cache.table import check_path_column
from featcache.errors import ConfigError
from featcache.formatting import join_few

PARTS = ("same", "near", "labels", "shortcuts", "outliers", "sources")
COPIES = {"same", "near"}


def choose_parts(only: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the parts to look at, in the order of ``PARTS``."""
    if only is None:
        return PARTS
    wanted = [*map(str.strip, only.split(","))] if isinstance(only, str) else [*map(str, only)]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        raise ConfigError(
            "--only", expected="some of " + ", ".join(PARTS), found=join_few(unknown) or "none"
        )
    return tuple(name for name in PARTS if name in wanted)


def has_sources(
    table: object, source: str | None, columns: Mapping[str, str] | None = None
) -> bool:
    """Return whether a column names the sources."""
    check_path_column(columns, table)
    if (table is None) != (source is None):
        given = "--table" if source is None else "--source"
        raise ConfigError(given, expected="--table and --source together", found=f"only {given}")
    return source is not None


def check_table(parts: tuple[str, ...], csv: object, copies: str) -> None:
    """Refuse options of ``--csv`` without what they need."""
    if csv is not None and not COPIES.intersection(parts):
        raise ConfigError("--csv", expected="copies to write: --only same,near",
                          found=", ".join(parts))  # fmt: skip
    if copies not in {"group", "drop"}:
        raise ConfigError("--copies", expected="group or drop", found=copies)
    if copies == "drop" and csv is None:
        raise ConfigError("--copies", expected="--csv FILE beside it", found="none")


def check_shares(blackout: float | Sequence[float] | None) -> tuple[float, ...]:
    """Return the shares to black out, each once."""
    if blackout is None:
        return ()
    shares = (blackout,) if isinstance(blackout, int | float) else tuple(blackout)
    if not shares or not all(0 < share < 1 for share in shares):
        raise ConfigError(
            "--blackout", expected="shares of width and height, between 0 and 1",
            found=", ".join(map(str, shares)) or "none",
        )  # fmt: skip
    return tuple(dict.fromkeys(map(float, shares)))


def check_network(asked: dict[str, bool], data: object, weights: object) -> None:
    """Refuse options that need the backbone and images without these, and these without them."""
    named = [option for option, is_asked in asked.items() if is_asked]
    if named and data is None:
        raise ConfigError(
            named[0], expected="the images, by --data DATA", found="none",
            hint="Name the data set that the cache was made of",
        )  # fmt: skip
    if weights is not None and not named:
        expected = f"{' or '.join(asked)} beside it"
        raise ConfigError("--weights", expected=expected, found="none")
