"""A CSV that names images, and where their files are.

Reads: the CSV, and names, kinds and sizes of files. Writes: nothing.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path

from featcache.data.folders import Ignored, ImageFile, agree_on_classes, walk_folder
from featcache.data.listing import Listing
from featcache.data.samples import (
    ImageDataset,
    make_sample,
    number_classes,
    sort_samples,
)
from featcache.data.tables import read_table
from featcache.errors import ConfigError, DataError


def scan_csv(root: Path, listing: Listing) -> ImageDataset:
    """Return the images that a CSV names. See ``dataset.scan``."""
    if "image" in dict(listing.columns):
        raise ConfigError(
            "--columns", expected="path, target, split or group, for a CSV", found="image"
        )
    table = read_table(
        root, columns=listing.columns, ignore_columns=listing.ignore_columns,
        needs_targets=not listing.no_classes,
    )  # fmt: skip
    reasons = listing.choose([row["path"].strip() for row in table.rows], root)
    rows = [row for row, reason in zip(table.rows, reasons, strict=True) if not reason]
    if listing.no_classes:
        rows = [row | {"target": ""} for row in rows]
    labels = [row["target"] for row in rows]
    splits = [row["split"] or "all" for row in rows]
    classes_by_split: dict[str, set[str]] = {}
    for label, split in zip(labels, splits, strict=True):
        if label:
            classes_by_split.setdefault(split, set()).add(label)
    classes = agree_on_classes(classes_by_split, root)
    targets = number_classes(classes)
    has_groups = any(row["group"] for row in rows)
    files = _Files(root.parent)
    samples, missing, seen = [], [], set[str]()
    for row, label, split in zip(rows, labels, splits, strict=True):
        image = files.find(row["path"])
        if image is None:
            missing.append(row["path"])
            continue
        place = os.path.normpath(root.parent / image.path)
        if place in seen:
            found = f"{image.path} twice"
            raise DataError("CSV", expected="every path once", found=found, where=root)
        seen.add(place)
        group = (row["group"] or image.path) if has_groups else None
        samples.append(make_sample(image, targets[label], split, group))
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
    )  # fmt: skip


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
