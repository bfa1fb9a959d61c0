"""Folders -> the images in them; names -> the splits, classes and groups they stand for.

Reads: names, kinds, sizes and times; never what is in a file. Writes: nothing.

Taken are regular files of image endings, also through links (``split --mode symlink`` makes
such). Hidden names, system folders, linked folders, other endings, pipes and devices are counted
under the reason they are not taken.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from featcache.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test", "all")
SPLIT_OF_FOLDER = {
    "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test",
}  # fmt: skip
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)

_SPLIT_LOOKALIKES = {"training", "testing", "dev", "eval", "evaluation", "holdout"}
_SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found"}


class ImageFile(NamedTuple):
    """A regular file of image ending, not yet a sample: its ``/``-separated path under a root."""

    path: str
    image_bytes: int
    mtime_ns: int


def walk_folder(root: Path, ignored: Counter[str], folders: set[str]) -> Iterator[ImageFile]:
    """Yield the images under ``root``; count the rest by reason, add the visible folders.

    Raises:
        DataError: If a folder cannot be read.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    reason = _why_not(entry)
                    path = prefix + entry.name
                    if reason == "folder":
                        folders.add(path)
                        waiting.append(path + "/")
                    elif reason:
                        ignored[reason] += 1
                    else:
                        status = entry.stat()
                        yield ImageFile(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise DataError(
                "folder", expected="a readable one", found=error.strerror, where=root / prefix
            ) from error


def _why_not(entry: os.DirEntry[str]) -> str:
    """Return why this is no image, ``folder`` for a folder to look into, "" for an image."""
    if is_hidden(entry.name):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return "folder" if _is_utf8(entry.name) else "folder name not UTF-8"
    try:
        if entry.is_symlink() and not stat.S_ISREG(entry.stat().st_mode):
            return "link to a folder" if entry.is_dir() else "link to no regular file"
        if not has_image_ending(entry.name):
            return "not an image ending"
        if not stat.S_ISREG(entry.stat().st_mode):
            return "not a regular file"
        entry.name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, only on Windows
        return "name not UTF-8"
    except OSError:
        return "link to nothing"
    return ""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is none of the user's images."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_image_ending(name: str) -> bool:
    """Return whether a file of this name should be an image."""
    _, dot, ending = name.rpartition(".")
    return dot + ending.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Layout:
    """What the folders of a data set stand for.

    Args:
        kind: ``splits``, ``classes`` or ``images``.
        classes: Class names, sorted as strings.
        places: What the paths of a place start with (``train/covid/``) -> its split and its
            class, "" for the class where nothing is labelled. No place is inside another.
    """

    kind: str
    classes: tuple[str, ...]
    places: dict[str, tuple[str, str]]

    def place_of(self, path: str) -> str | None:
        """Return the place an image lies in; None for one that lies loose beside folders."""
        folders = path.split("/")[:-1]
        prefixes = ("".join(f"{name}/" for name in folders[:depth]) for depth in range(3))
        return next((prefix for prefix in prefixes if prefix in self.places), None)


def find_layout(root: Path, folders: set[str]) -> Layout:
    """Tell splits and classes from the names of the folders.

    Args:
        root: Only for messages.
        folders: All visible folders, so that empty ones are noticed too.

    Raises:
        DataError: If the names contradict each other.
    """
    tops = _split_folders(root, {folder for folder in folders if "/" not in folder})
    classes_of = {
        split: {
            folder[len(prefix) :]
            for folder in folders
            if folder.startswith(prefix) and "/" not in folder[len(prefix) :]
        }
        for prefix, split in tops.items()
    }
    classes = agree_on_classes({s: names for s, names in classes_of.items() if names}, root)
    places = {
        f"{prefix}{name}/" if name else prefix: (split, name)
        for prefix, split in tops.items()
        for name in sorted(classes_of[split]) or [""]
    }
    kind = "splits" if "" not in tops else "classes" if classes else "images"
    return Layout(kind, classes, places)


def _split_folders(root: Path, tops: set[str]) -> dict[str, str]:
    """Return the prefix of every split's paths -> split; {"": "all"} where nothing is split."""
    found: dict[str, str] = {}
    for name in sorted(tops):
        split = SPLIT_OF_FOLDER.get(name.casefold())
        if split in found.values():
            both = " and ".join([*(f[:-1] for f in found if found[f] == split), name])
            raise DataError("split folders", expected=f"one {split}", found=both, where=root)
        if split:
            found[name + "/"] = split
    others = sorted(name for name in tops if name + "/" not in found)
    lookalikes = [name for name in others if name.casefold() in _SPLIT_LOOKALIKES]
    if (found and others) or (lookalikes and lookalikes == others):
        raise DataError(
            "split folders", expected="train, valid (or val, validation), test and no others",
            found=", ".join(map(repr, others)), where=root,
            hint="Rename or move it; class folders belong into each split",
        )  # fmt: skip
    return found or {"": "all"}


def agree_on_classes(classes_of: dict[str, set[str]], where: Path) -> tuple[str, ...]:
    """Return the classes of all splits, sorted, as all splits must have them.

    Args:
        classes_of: Split -> its classes, without the splits that are not labelled.
        where: Only for messages.

    Raises:
        DataError: If a split lacks a class, or two classes are hard to tell apart.
    """
    classes = tuple(sorted(set().union(*classes_of.values())))
    for name in classes:
        have = [split for split in SPLITS if name in classes_of.get(split, ())]
        lack = [split for split in classes_of if split not in have]
        if lack:
            raise DataError(
                "classes", expected="the same in every split",
                found=f"{name!r} in {' and '.join(have)} but not in {' and '.join(lack)}",
                where=where, hint="Rename or remove the class, or add its images",
            )  # fmt: skip
    plain: dict[str, str] = {}
    for name in classes:
        twin = plain.setdefault(" ".join(name.casefold().split()), name)
        if twin != name:
            raise DataError(
                "classes", expected="names that differ by more than case and blanks",
                found=f"{twin!r} and {name!r}", where=where, hint="Rename or merge them",
            )  # fmt: skip
    return classes


def compile_group(group_by: str | None) -> re.Pattern[str] | None:
    """Return what finds the group in a file name; None for None.

    Raises:
        ConfigError: If it is no regular expression, or one without a group.
    """
    if group_by is None:
        return None
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        found = f"{group_by!r}: {error}"
        raise ConfigError("--group-by", expected="a regular expression", found=found) from error
    if pattern.groups < 1:
        raise ConfigError(
            "--group-by", expected="a regular expression with a group in parentheses",
            found=repr(group_by), hint=r"For example '^(\d{8})_'",
        )  # fmt: skip
    return pattern


def find_group(pattern: re.Pattern[str], path: str) -> str | None:
    """Return the group in the file name; None if nothing, or nothing between the parentheses."""
    match = pattern.search(path.rpartition("/")[2])
    return (match[1] or None) if match else None


def training_split(splits: Iterable[str]) -> str | None:
    """Return the split that heads are trained on: ``train``, or ``all`` where there is none."""
    present = set(splits)
    return next((name for name in ("train", "all") if name in present), None)
