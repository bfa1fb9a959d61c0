"""What a user names as data: one path, a glob of files, or a list of these.

Reads: names. Writes: nothing.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from featcache.data.folders import SHARD_ENDINGS, Ignored, walk_folder
from featcache.data.listing import Listing
from featcache.data.remote import url_of
from featcache.errors import ConfigError, DataError
from featcache.files import local_path

Data = str | Path | Sequence[str | Path]
"""A path, a glob of tars or Parquet files such as ``shards/*.tar``, or a list of such paths."""

_MAGIC = re.compile(r"[*?[]")


def check_data(data: Data) -> Data:
    """Return data as given: paths as ``Path``, URLs as text.

    Raises:
        ConfigError: If a list has both paths and URLs.
    """
    if isinstance(data, str | os.PathLike):
        return _place(data)
    places = [_place(one) for one in data]
    if len({isinstance(place, str) for place in places}) > 1:
        raise ConfigError("data", expected="paths or URLs", found="both", where=named(data))
    return places


def _place(one: str | Path) -> str | Path:
    if url := url_of(one):
        return url
    text = os.fspath(one)
    return local_path(re.sub("^file:/+", "/", text, flags=re.IGNORECASE), "data")


def urls_of(data: Data) -> list[str]:
    """Return the URLs that data are; none for paths."""
    listed = [data] if isinstance(data, str | os.PathLike) else data
    return [url for url in map(url_of, listed) if url]


def is_one_path(data: Data) -> bool:
    """Return whether it is a path, no glob and no list."""
    if not isinstance(data, str | os.PathLike):
        return False
    return not _MAGIC.search(os.fspath(data)) or os.path.lexists(data)


def folders_of(data: Data) -> list[Path]:
    """Return the folders among the data."""
    listed = [data] if isinstance(data, str | os.PathLike) else data
    return [path for path in map(Path, listed) if path.is_dir()]


def endings_of(data: Data) -> set[str]:
    """Return the endings of the files that are named, and in folders of shards those of these."""
    endings: set[str] = set()
    for path in [data] if isinstance(data, str | os.PathLike) else data:
        ending = Path(path).suffix.lower()
        # What is open, a glob or a store's folder, is not listed for that.
        is_open = bool(url_of(path)) or not is_one_path(path)
        endings.add(".parquet" if is_open and ending not in {".csv", ".zip"} else ending)
        if Path(path).is_dir():
            found = (name.rpartition(".")[2].lower() for name in _shards_in(Path(path)))
            endings.update(f".{ending}" for ending in found)
    return endings


def listing_for(data: Data, listing: Listing) -> Listing:
    """Return the options of a listing that are of use for the data."""
    if listing.for_endings(()) == listing:
        return listing  # else its folder is walked for that
    return listing.for_endings(endings_of(data))


def _shards_in(folder: Path) -> list[str]:
    ignored = Ignored()
    for _ in walk_folder(folder, ignored, set()):
        pass
    return ignored.shards


def find_sources(data: Data) -> tuple[Path, list[str]]:
    """Return the folder that all files of a glob or a list lie in, and their paths below it.

    Of a glob that is the folder before its first special character: so rows are named alike
    whether a folder, a glob of it, or a list of its files is the data.

    Raises:
        DataError: If a path leads nowhere, a glob matches nothing, or something is no tar and no
            Parquet file and no folder of them.
    """
    roots: list[Path] = []
    files: list[Path] = []
    for one in [data] if isinstance(data, str | os.PathLike) else data:
        root, found = _files_of(one)
        roots.append(root)
        files += found
    if not files:
        raise DataError("data", expected="a path or more", found="an empty list")
    absolute = [os.path.abspath(root) for root in roots]  # noqa: PTH100 (no link is followed)
    common = os.path.commonpath(absolute)
    root = roots[0] if os.path.abspath(roots[0]) == common else Path(common)  # noqa: PTH100
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file in files]
    return root, list(dict.fromkeys(names))


def _files_of(one: str | Path) -> tuple[Path, list[Path]]:
    """Return where the names of a path's or a glob's files begin, and the files."""
    path = Path(one)
    if not is_one_path(one):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        start = Path(*parts[:first])
        found = [file for match in files_of_glob(path) for file in _files_in(match)]
    else:
        start, found = path if path.is_dir() else path.parent, _files_in(path)
    if not found:
        raise _not_in_a_list(path)
    return start, found


def files_of_glob(pattern: Path) -> list[Path]:
    """Return the files and folders that a glob matches, sorted.

    Raises:
        DataError: If there are none.
    """
    matched = sorted(map(Path, glob.glob(os.fspath(pattern), recursive=True)))  # noqa: PTH207
    if not matched:
        raise DataError(
            "data", expected="a glob that matches files", found="no match", where=pattern
        )
    return matched


def _files_in(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / name for name in sorted(_shards_in(path))]
    if path.suffix.lower() in SHARD_ENDINGS:
        return [path]
    raise _not_in_a_list(path)


def _not_in_a_list(path: Path) -> DataError:
    return DataError(
        "data", expected="tars, Parquet files, or folders of them, where several are named",
        found="nothing there" if not path.exists() else "something else", where=path,
        hint="Folders of images and CSVs are extracted one by one: join their caches by select",
    )  # fmt: skip


def named(data: Data) -> str:
    """Return data as text, for messages."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    return ", ".join(os.fspath(one) for one in data)
