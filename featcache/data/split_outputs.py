"""Write a split: a tree of folders of the images, or a CSV that names them.

Reads: image files. Writes: the tree or the CSV, whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path, PurePosixPath

from featcache.csv_files import csv_text
from featcache.data.folders import SPLITS
from featcache.data.samples import UNKNOWN, ImageDataset
from featcache.errors import DataError
from featcache.files import NO_SPACE, disk_error, make_folder
from featcache.formatting import count, in_bytes
from featcache.output_folders import new_folder
from featcache.outputs import Kind, Output, write_output
from featcache.renames import ignores_case
from featcache.runtime import Say
from featcache.untrusted import is_within

_EXPECTED = "a new or empty folder, or a new .csv"
_TREE = Kind("tree", _EXPECTED, DataError, is_folder=True)
_MANIFEST = Kind("manifest", _EXPECTED, DataError)


def check_destination(source: Path | str, destination: Path) -> Output:
    """Return what will be written, after refusing a place that must not be.

    Args:
        source: Folder, CSV or URL of the images.
        destination: A folder or a CSV.

    Raises:
        DataError: If something is there, or a source that is no folder would become a tree.
    """
    is_csv = destination.suffix.lower() == ".csv"
    kind = _MANIFEST if is_csv else _TREE
    output = Output(destination, "split destination", kind, inputs=[source])
    output.check()
    if isinstance(source, str) and not is_csv:
        raise DataError(
            "split destination", expected="a new .csv for a SOURCE by URL", found="a folder",
            where=destination, hint="Name one that ends in .csv: it names the images by their URLs",
        )  # fmt: skip
    source = Path(source)
    if source.is_file() and source.suffix.lower() == ".csv" and not is_csv:
        raise DataError(
            "split destination", expected="a new .csv for a SOURCE that is a CSV", found="a folder",
            where=destination, hint="Name one that ends in .csv: nothing is copied",
        )  # fmt: skip
    if not is_csv and is_within(destination, source):
        raise DataError(
            "split destination", expected="a folder outside the source", found="one inside it",
            where=destination, hint="It would be read as a class the next time",
        )  # fmt: skip
    return output


def check_room(destination: Path, image_bytes: int, num_images: int, say: Say) -> None:
    """Say how large a copy is, and refuse it if the disk lacks the space."""
    there = destination.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    say(f"copying {count(num_images, 'image')}, {in_bytes(image_bytes)}, to {destination}")
    if image_bytes > free:
        raise DataError(
            "disk", expected=f"{image_bytes:,} bytes free for a copy", found=f"{free:,}",
            where=there, hint="Use --mode symlink or hardlink, or a .csv: they take no space",
        )  # fmt: skip


def write_manifest(dataset: ImageDataset, assigned: list[str], output: Output) -> None:
    """Write path, target, split, group; paths relative to the CSV's folder if possible, or URLs.

    Several labels of an image stand in columns of their own, after group.
    """
    has_labels = dataset.task == "multilabel"
    named = ("path", "split", "group") if has_labels else ("path", "target", "split", "group")
    if has_labels and (clash := {*named, "target"} & {*dataset.classes}):
        raise DataError(
            "labels", expected="other names than the columns of the CSV", found=min(clash),
            where=dataset.root, hint="Rename that label",
        )  # fmt: skip
    root = dataset.root.parent if dataset.layout == "csv" else dataset.root
    folder, root = output.target.parent.resolve(), root.resolve()
    rows = []
    for name, sample in zip(assigned, dataset.samples, strict=True):
        stored = dataset.object_of(sample)
        path = _path_in(folder, root, sample.path) if stored is None else stored.url
        target = () if has_labels else (dataset.class_of(sample),)
        labels = ("" if value == UNKNOWN else str(value) for value in sample.targets or ())
        rows.append((path, *target, name, sample.group or "", *labels))
    place = named.index("split")
    rows.sort(key=lambda row: (SPLITS.index(row[place]), row[0]))
    make_folder(output.target.parent)
    header = (*named, *dataset.classes) if has_labels else named
    write_output(output, csv_text(header, rows).encode())


def _path_in(folder: Path, root: Path, path: str) -> str:
    """Return how a CSV in a folder names the image at a path below a root."""
    text = (root / path).as_posix()
    if not Path(path).is_absolute():
        with contextlib.suppress(ValueError):  # Windows: on another drive
            text = Path(os.path.relpath(root / path, folder)).as_posix()
    if text.lstrip(" \u00a0").startswith(("=", "+", "-", "@", "\t", "\r")):
        return "./" + text  # else csv_text would put an apostrophe before it
    return text


def write_tree(dataset: ImageDataset, assigned: list[str], output: Output, mode: str) -> None:
    """Build the tree and give it its name."""

    def sync(_: Path) -> None:
        if mode == "copy" and hasattr(os, "sync"):
            os.sync()  # once for all: an fsync per file takes minutes for 100,000

    with new_folder(output, sync=sync) as folder:
        if ignores_case(folder):
            _refuse_same_names(dataset, assigned, output.path)
        try:
            for name, sample in zip(assigned, dataset.samples, strict=True):
                target = folder / name / sample.path
                target.parent.mkdir(parents=True, exist_ok=True)
                _place((dataset.root / sample.path).resolve(), target, mode)
        except OSError as error:
            if error.errno in NO_SPACE:
                size = sum(sample.image_bytes for sample in dataset.samples)
                raise disk_error(error, output.target, size) from error
            hint = "Check the folder and its permissions"
            if mode != "copy":
                hint = "Links need one file system that has them; --mode copy always works"
            raise DataError(
                f"split with --mode {mode}", expected="files that can be made",
                found=error.strerror, where=error.filename2 or error.filename or output.path,
                hint=hint,
            ) from error  # fmt: skip


def _refuse_same_names(dataset: ImageDataset, assigned: list[str], destination: Path) -> None:
    """Refuse names that differ in case only: two classes would become one folder.

    Raises:
        DataError: If there are two such names of images or folders in one folder.
    """
    names: dict[str, PurePosixPath] = {}
    for split_name, sample in zip(assigned, dataset.samples, strict=True):
        path = PurePosixPath(split_name, sample.path)
        for one in (path, *path.parents):
            other = names.setdefault(str(one).casefold(), one)
            if other != one:
                raise DataError(
                    "split destination", expected="a file system that tells Covid from covid",
                    found=f"one that takes {other} and {one} for the same", where=destination,
                    hint="Rename one of them, or choose a .csv or another disk as destination",
                )  # fmt: skip


def _place(source: Path, target: Path, mode: str) -> None:
    """Make one file of the tree; never overwrite one, as names may clash on some systems."""
    if mode == "symlink":
        target.symlink_to(source)
    elif mode == "hardlink":
        target.hardlink_to(source)
    else:
        with source.open("rb") as reading, target.open("xb") as writing:
            shutil.copyfileobj(reading, writing, 1 << 20)
        status = source.stat()
        with contextlib.suppress(OSError):  # not every file system keeps times
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
