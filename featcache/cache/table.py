"""A table: a CSV that names rows of caches, and their new target, split and group.

Reads: CSV files. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from featcache.data.folders import SPLIT_OF_FOLDER
from featcache.data.listing import Listing
from featcache.data.tables import Extra, read_table
from featcache.errors import ConfigError, DataError, printable
from featcache.formatting import count
from featcache.runtime import Say


class Table:
    """A CSV with the column ``path`` and optionally ``target``, ``split`` and ``group``.

    A column that is missing or empty changes nothing. In other columns an empty cell means what it
    means to ``extract``: unlabelled, split ``all``, a group of its own. If no path of the table is
    in the caches, paths are compared without the leading folders that all of the table's have, or
    without the split folders of the caches', or, where the table has names of files alone (NIH's
    ``Image Index``), by these; a line says so.

    Args:
        file: The CSV.
        known: Paths of all rows and failed images.
        say: Called with lines for the user.
        columns: Column (path, target, split, group) -> its header.
        ignore_columns: Headers that are not used.
        extra: A further column, the key ``extra`` of a line. Only the path is used besides.

    Raises:
        DataError: If it is not such a CSV, names a path twice, or names none of the known paths;
            if the name of a file is that of several; or if a header or a target is a question (see
            ``tables``).
    """

    def __init__(
        self, file: Path, known: Iterable[str], say: Say, *,
        columns: Mapping[str, str] | None = None, ignore_columns: str | Iterable[str] = (),
        extra: Extra | None = None,
    ) -> None:  # fmt: skip
        listing = Listing.of(columns=columns, ignore_columns=ignore_columns)
        table = read_table(
            file, columns=listing.columns, ignore_columns=listing.ignore_columns, extra=extra
        )  # fmt: skip
        if table.unused and extra is None:
            say(f"table: columns that are not used: {', '.join(map(printable, table.unused))}")
        lines = table.rows
        keys = {posixpath.normpath(path) for path in known}
        names = [posixpath.normpath(line["path"]) for line in lines]
        names = [name if name in keys else name.strip() for name in names]
        self._leaves_split_out = False
        for folder, leaves_split_out in _ways_to_compare(names, keys):
            shorter = [name.removeprefix(folder) for name in names]
            fitting = {_without_split(key) for key in keys} if leaves_split_out else keys
            if not fitting.isdisjoint(shorter):
                names, keys, self._leaves_split_out = shorter, fitting, leaves_split_out
                if folder:
                    say(f"table: its paths are read without {printable(folder)}")
                if leaves_split_out:
                    say("table: the caches' paths are read without train/, valid/, test/")
                break
        else:
            found_of = _find_by_name(names, keys, file)
            if found_of:
                names = [found_of.get(name, name) for name in names]
                say(f"table: {count(len(found_of), 'row')} found by the name of its file")
        self._lines = dict(zip(names, lines, strict=True))
        if len(self._lines) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise DataError("table", expected="every path once", found=f"{twice} twice", where=file)
        if keys.isdisjoint(names):
            found = f"none, but such as {names[0]}" if names else "no lines"
            raise DataError(
                "table", expected=f"paths of the caches, such as {min(keys, default='none')}",
                found=found, where=file, hint="Write paths as the caches have them",
            )  # fmt: skip
        self.columns = {c for c in ("target", "split", "group") if any(line[c] for line in lines)}
        self.without_row = [name for name in self._lines if name not in keys]

    def find(self, path: str) -> dict[str, str] | None:
        """Return the table's line for a path; None if there is none."""
        key = posixpath.normpath(path)
        return self._lines.get(_without_split(key) if self._leaves_split_out else key)


def check_path_column(columns: Mapping[str, str] | None, table: object) -> None:
    """Refuse columns of a table of which only the path and a further one are used.

    Raises:
        ConfigError: If there is no table, or another column than the path's is named.
    """
    if columns and table is None:
        raise ConfigError("--columns", expected="a --table that has them", found="none")
    if {*(columns or {})} - {"path"}:
        found = ", ".join(columns or {})
        raise ConfigError("--columns", expected="path=HEADER and no other", found=found)


def _ways_to_compare(names: list[str], keys: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield ways to compare the table's paths with the caches', the paths as written first.

    ``featcache split raw split.csv`` writes ``raw/covid/1.png``, which is ``covid/1.png`` in the
    cache of ``raw``, and ``train/covid/1.png`` in the cache of a tree made of ``raw``.

    Yields:
        The leading folders to remove from the table's paths, and whether to remove the split's
        folder from the caches'.
    """
    yield "", False
    folders = [""]
    with contextlib.suppress(ValueError):  # no names, or both absolute and relative ones
        for part in posixpath.commonpath([posixpath.dirname(name) for name in names]).split("/"):
            if part.casefold() in SPLIT_OF_FOLDER:
                break  # test/covid/1.png need not be train/covid/1.png
            folders.append(f"{folders[-1]}{part}/")
    yield from ((folder, False) for folder in folders[1:])
    if len({_without_split(key) for key in keys}) == len(keys):
        yield from ((folder, True) for folder in folders)


def _find_by_name(names: Sequence[str], keys: Iterable[str], file: Path) -> dict[str, str]:
    """Return name -> the one path in the caches whose file is called so, with or without ending.

    Only for names without folders, as ``extract`` finds the files of such a CSV.

    Raises:
        DataError: If several files in the caches have such a name.
    """
    by_name, by_stem = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for key in sorted(keys):
        name = posixpath.basename(key)
        by_name[name].append(key)
        by_stem[posixpath.splitext(name)[0]].append(key)
    alone = [name for name in names if "/" not in name]
    found = {name: by_name.get(name) or by_stem.get(name, []) for name in alone}
    several = [name for name, paths in found.items() if len(paths) > 1]
    if several:
        name = several[0]
        raise DataError(
            "table", expected="paths, or names of one file each", where=file,
            found=f"{name}, which is {' and '.join(found[name][:2])}",
            hint="Write paths as the caches have them",
        )  # fmt: skip
    return {name: paths[0] for name, paths in found.items() if paths}


def _without_split(key: str) -> str:
    first, _, rest = key.partition("/")
    return rest if first.casefold() in SPLIT_OF_FOLDER and rest else key
