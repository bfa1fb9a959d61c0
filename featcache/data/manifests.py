"""A CSV that names images, and where their files are.

Reads: the CSV, and names, kinds and sizes of files and objects of stores. Writes: nothing.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from featcache.data.columns import make_sample, sort_samples
from featcache.data.folders import Ignored, ImageFile, agree_on_classes, walk_folder
from featcache.data.listing import Listing
from featcache.data.remote import RemoteFile, list_files, url_of
from featcache.data.samples import ImageDataset, number_classes
from featcache.data.stored_files import RemoteStore, find_files
from featcache.data.tables import MAX_TABLE_BYTES, read_table
from featcache.errors import ConfigError, DataError
from featcache.files import read_regular
from featcache.formatting import count


def scan_csv(
    root: Path, listing: Listing, *, paths_only: bool = False, progress: bool | str = False
) -> ImageDataset:
    """Return the images that a CSV names, here or in a store. See ``dataset.scan``.

    With ``paths_only`` no column but the path is a question.
    """
    if "image" in dict(listing.columns):
        raise ConfigError(
            "--columns", expected="path, target, split or group, for a CSV", found="image"
        )
    table = read_table(
        root, columns=listing.columns, ignore_columns=listing.ignore_columns,
        needs_targets=not listing.no_classes, paths_only=paths_only, labelling=listing,
    )  # fmt: skip
    rows = table.rows
    if listing.no_classes:
        rows = [row | {"target": ""} for row in rows]
    reasons = listing.choose([row["path"].strip() for row in rows], root)
    notes = [] if table.labels is None else [*table.labels.notes]
    if listing.split_list:
        unlisted = _apply_split_lists(rows, listing.split_list, root, notes)
        reasons = [reason or other for reason, other in zip(reasons, unlisted, strict=True)]
    several: Sequence[tuple[int, ...] | None] = (
        [None] * len(rows) if table.labels is None else table.labels.targets
    )
    taken = [i for i, reason in enumerate(reasons) if not reason]
    rows, several = [rows[i] for i in taken], [several[i] for i in taken]
    labels = [row["target"] for row in rows]
    splits = [row["split"] or "all" for row in rows]
    classes_by_split: dict[str, set[str]] = {}
    for label, split in zip(labels, splits, strict=True):
        if label:
            classes_by_split.setdefault(split, set()).add(label)
    classes = agree_on_classes(classes_by_split, root)
    targets = number_classes(classes)
    if table.labels is not None:
        classes = table.labels.classes
    has_groups = any(row["group"] for row in rows)
    files = _files_for(root, [row["path"] for row in rows], progress=progress)
    samples, missing, seen = [], [], set[str]()
    for row, label, split, of_row in zip(rows, labels, splits, several, strict=True):
        image = files.find(row["path"])
        if image is None:
            missing.append(row["path"])
            continue
        is_here = isinstance(files, _Files)
        place = os.path.normpath(root.parent / image.path) if is_here else image.path
        if place in seen:
            found = f"{image.path} twice"
            raise DataError("CSV", expected="every path once", found=found, where=root)
        seen.add(place)
        group = (row["group"] or image.path) if has_groups else None
        samples.append(make_sample(image, targets[label], split, group, of_row))
    if missing:
        raise DataError(
            "CSV", expected="files that are there", where=root,
            found=f"{len(missing)} of {len(rows)} missing: {', '.join(missing[:3])}",
            hint=files.advise(missing[0]),
        )  # fmt: skip
    left_out = Counter(reason for reason in reasons if reason)
    return ImageDataset(
        root, "csv", classes, sort_samples(samples), dict(left_out),
        ignored_columns=table.unused, num_found_by_name=files.num_found_by_name,
        task="multiclass" if table.labels is None else "multilabel", notes=tuple(notes),
        _store=None if isinstance(files, _Files) else files.store(),
    )  # fmt: skip


def _apply_split_lists(
    rows: Sequence[dict[str, str]], lists: Iterable[tuple[str, str]], root: Path, notes: list[str]
) -> list[str]:
    """Give rows the splits of files that name them; return why each is left out, "" if it is not.

    A line of such a file is a path as the CSV has it, with or without the name of the CSV's folder
    before it, or the name of one file. Rows in no list are of ``train`` if that has no list.

    Args:
        rows: Of the CSV; none of them may have a split.
        lists: (split, file); the file is looked for as written, then by its name beside the CSV.
        root: The CSV.
        notes: Gets lines about names without a row and rows without a list.

    Raises:
        DataError: If the CSV has splits, a file cannot be read, none of its names is a row's, a
            name is that of several, or a row is in two lists.
    """
    if any(row["split"] for row in rows):
        raise DataError(
            "--split-list", expected="a CSV without splits", found="a column of them", where=root,
            hint="Add --ignore-columns with its header",
        )  # fmt: skip
    split_of = _find_listed([row["path"].strip() for row in rows], lists, root, notes)
    others = "" if "train" in dict(lists) else "train"
    num_others = len(rows) - len(split_of)
    if num_others and others:
        notes.append(f"splits: {count(num_others, 'row')} in no --split-list, taken as train")
    for i, row in enumerate(rows):
        row["split"] = split_of.get(i, others)
    return ["" if row["split"] else "in no --split-list" for row in rows]


def _find_listed(
    paths: Sequence[str], lists: Iterable[tuple[str, str]], root: Path, notes: list[str]
) -> dict[int, str]:
    """Return the split of each path that a list names, by its position."""
    top = root.parent.absolute().name + "/"
    paths = [path.removeprefix(top) for path in paths]
    by_path = {path: i for i, path in enumerate(paths)}
    by_name: dict[str, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        by_name[path.rpartition("/")[2]].append(i)
    split_of: dict[int, str] = {}
    for split, written in lists:
        file = Path(written) if Path(written).is_file() else root.parent / Path(written).name
        names = [name.removeprefix(top) for name in _read_names(file, written)]
        num_unknown = 0
        for name in names:
            found = [by_path[name]] if name in by_path else by_name.get(name, [])
            is_twice = len(found) == 1 and split_of.get(found[0], split) != split
            if len(found) > 1 or is_twice:
                raise DataError(
                    f"--split-list {split}", where=file,
                    expected="each row in one list" if is_twice else "names of one row each",
                    found=f"{name} in two" if is_twice else f"{name}, of {len(found)} rows",
                )  # fmt: skip
            num_unknown += not found
            split_of.update(dict.fromkeys(found, split))
        if num_unknown == len(names):
            raise DataError(
                f"--split-list {split}", expected="paths or file names of the CSV", where=file,
                found=f"none of {len(names):,}" if names else "no lines",
            )  # fmt: skip
        if num_unknown:
            notes.append(f"splits: {num_unknown:,} of {len(names):,} names of {file.name} not in "
                         "the CSV")  # fmt: skip
    return split_of


def _read_names(file: Path, written: str) -> list[str]:
    """Return the lines of a list that are not blank."""
    try:
        text = read_regular(file, max_bytes=MAX_TABLE_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "--split-list", expected="a readable file of one path or name a line",
            found=getattr(error, "strerror", None) or "no UTF-8", where=written,
        ) from error  # fmt: skip
    return [line.strip() for line in text.splitlines() if line.strip()]


def _files_for(
    root: Path, paths: Sequence[str], *, progress: bool | str
) -> _Files | _StoredFiles:  # fmt: skip
    """Return what finds the files of paths of a CSV: here, or in a store.

    Raises:
        DataError: If some are URLs and others are not, or a store cannot be listed.
    """
    urls = [url for path in paths if (url := url_of(path.strip()))]
    if urls and len(urls) < len(paths):
        raise DataError("CSV", expected="paths or URLs in the column path", found="both",
                        where=root)  # fmt: skip
    if urls:
        return _StoredFiles("", find_files(urls, progress=progress))
    if url := url_of(root):
        top = url.rpartition("/")[0]
        return _StoredFiles(top, list_files(top, progress=progress))
    return _Files(root.parent)


class _StoredFiles:
    """Finds the objects of stores that a CSV names.

    Args:
        url: Of the CSV's folder, or "" where the CSV has URLs.
        files: The objects below that folder, or at these URLs.
    """

    num_found_by_name = 0

    def __init__(self, url: str, files: Mapping[str, RemoteFile]) -> None:
        self._url, self._files = url, files
        self._used: dict[str, RemoteFile] = {}

    def find(self, path: str) -> ImageFile | None:
        """Return the object that a path or URL of the CSV stands for; None if there is none."""
        path = path.strip()
        name = (url_of(path) or path) if not self._url else posixpath.normpath(path)
        top = self._url.rpartition("/")[2] + "/"
        for spelling in dict.fromkeys((name, name.removeprefix(top))):
            file = self._files.get(spelling)
            if file is not None:
                self._used[spelling] = file
                return ImageFile(spelling, file.num_bytes, file.mtime_ns)
        return None

    def store(self) -> RemoteStore:
        """Return what reads the objects that were found."""
        return RemoteStore.of(self._url, self._used.items())

    def advise(self, path: str) -> str:
        """Return what may be wrong with a path that leads nowhere."""
        del path
        return "Paths are URLs, or relative to the CSV's folder"


class _Files:
    """Finds the files that a CSV names.

    A path is absolute or relative to the CSV's folder. As collections have it, it may also begin
    with the name of that folder itself, or be the name alone of one file in a folder below.

    Args:
        folder: The CSV's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._top = folder.absolute().name + "/"
        self.num_found_by_name = 0

    def find(self, path: str) -> ImageFile | None:
        """Return the regular file that a path of the CSV stands for; None if there is none."""
        plain = path.strip()
        for spelling in dict.fromkeys((path, plain, plain.removeprefix(self._top))):
            found = self._look(spelling)
            if found is not None:
                return found
        namesakes = self._namesakes(plain)
        if len(namesakes) != 1:
            return None
        self.num_found_by_name += 1
        return self._look(namesakes[0])

    def _look(self, path: str) -> ImageFile | None:
        try:
            status = (self._folder / path).stat()
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return ImageFile(path, status.st_size, status.st_mtime_ns)

    def _namesakes(self, name: str) -> list[str]:
        """Return the images below the folder that have this name, with or without its ending."""
        if "/" in name or "\\" in name:
            return []
        return self._by_name.get(name) or self._by_stem.get(name, [])

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        for image in walk_folder(self._folder, Ignored(), set()):
            names[image.path.rpartition("/")[2]].append(image.path)
        return dict(names)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        stems: dict[str, list[str]] = defaultdict(list)
        for name, paths in self._by_name.items():
            stems[name.rpartition(".")[0]] += paths
        return dict(stems)

    def advise(self, path: str) -> str:
        """Return what may be wrong with a path that leads nowhere."""
        advice = "Paths are absolute or relative to the CSV's folder"
        if "\\" in path:
            return f"{advice}, with / between folders: \\ is Windows' way"
        namesakes = self._namesakes(path.strip())
        if namesakes:
            return f"{advice}. Several files have that name, such as {' and '.join(namesakes[:2])}"
        return advice
