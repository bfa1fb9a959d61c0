"""Find the images of a data set, with targets, splits and groups. Reads no pixels.

Reads: split folders, class folders, folders of images, CSV manifests, zip files of folders, tars
and Parquet files.
Writes: nothing.

Files that are not used (see ``folders``) are counted in ``num_ignored``. So are images beside class
folders and linked class folders, with a warning. Masks among the images are a question (see
``companions``), answered by options (see ``listing``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from featcache.data.archive import ZipStore, list_entries, locate_members
from featcache.data.arrangement import arrange, top_folder
from featcache.data.columns import ImageFiles, Sample, Samples
from featcache.data.companions import settle_companions
from featcache.data.folders import (
    IMAGE_SUFFIXES,
    OTHER_ENDING,
    SHARD_ENDINGS,
    SPLITS,
    Ignored,
    ImageFile,
    advise_on_endings,
    ending_of,
    has_image_ending,
    is_hidden,
    walk_folder,
)
from featcache.data.groups import GroupPattern
from featcache.data.listing import Listing
from featcache.data.manifests import scan_csv
from featcache.data.parquet import scan_parquet
from featcache.data.remote import RemoteFile, list_files
from featcache.data.samples import MAX_IMAGE_BYTES, UNLABELLED, ImageDataset
from featcache.data.shards import (
    Shard,
    describe_kinds,
    kind_of,
    list_shards,
    open_shard,
    split_of_name,
)
from featcache.data.sources import Data, check_data, find_sources, is_one_path, urls_of
from featcache.data.stored_files import RemoteStore, file_at, list_all, walk_objects
from featcache.data.tars import scan_tars
from featcache.errors import ConfigError, DataError, printable, warn_user
from featcache.formatting import count
from featcache.untrusted import why_no_file

__all__ = [
    "IMAGE_SUFFIXES", "MAX_IMAGE_BYTES", "SPLITS", "UNLABELLED", "ImageDataset", "Sample",
    "Samples", "scan",
]  # fmt: skip

_COLUMNS_OF = {"tar": {"columns"}, "parquet": {"columns", "ignore_columns"}}


def scan(
    data: Data,
    *,
    group_by: str | None = None,
    group_by_path: str | None = None,
    limit: int | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    companions: str | None = None,
    no_classes: bool = False,
    columns: Mapping[str, str] | None = None,
    ignore_columns: str | Iterable[str] = (),
    target_columns: str | Iterable[str] = (),
    target_separator: str | None = None,
    uncertain: str | None = None,
    blank: str | None = None,
    split_list: Mapping[str, str | Path] | None = None,
    progress: bool | str = False,
) -> ImageDataset:
    """Find the images of a data set, their targets, splits and groups.

    Args:
        data: A folder of split folders of class folders; a folder of class folders (split
            ``all``); a folder of images; a ``.csv`` with the columns path and optionally target,
            split, group; a ``.zip`` of such folders (one top folder is skipped); a ``.tar`` of such
            folders or of WebDataset's samples, a Parquet file with the bytes of images, or a folder
            of either; a glob of these files (``shards/*.tar``), or a list of files, folders and
            globs of them. Any of these by URL too.
        group_by: Regular expression searched in every file name; its first group is the sample's
            group. A name without a match is a group of its own. Overrides a CSV's group column. If
            it matches no name at all, it is searched in the folders below the class; if it matches
            nothing there either, it changes nothing.
        group_by_path: Instead, one that is searched in the path below the class (in a CSV, in the
            path without leading folders of its split and class): for patients that are folders.
        limit: Use at most this many images, spread evenly over splits and classes.
        include: Globs on the path below ``data``; if there are any, only files that match one are
            used. ``*`` does not cross ``/``, ``**`` does; a folder's match is that of its files.
        exclude: Globs; files that match one are not used.
        companions: Masks and the like that lie among the images are an error. ``keep`` takes them
            as images, in the group of the image they belong to; ``ignore`` does not look for them.
        no_classes: Folders are no classes: images are unlabelled.
        columns: Column (path, target, split, group) -> its header in a CSV or a Parquet file, where
            ``image`` names the bytes; in a tar, what has it beside an image: ``txt`` for a file of
            that ending, or a key of the JSON.
        ignore_columns: Headers of a CSV or a Parquet file that are not used.
        target_columns: Headers of a CSV that are a label each, with 1 (yes), 0 (no), -1
            (uncertain) and empty cells. ``No Finding`` is no class: where it is 1, empty cells of
            the others mean no.
        target_separator: Instead, what stands between the labels in the cells of ``target``; a cell
            ``No Finding`` has none.
        uncertain: What -1 means: ``unknown`` (so does None), ``yes`` or ``no``.
        blank: What an empty cell of a label means: ``unknown`` or ``no``; None asks.
        split_list: Split (train, valid, test) -> file with a path or a file name of a CSV a line.
            Rows in no list are of ``train`` if that has no list, else they are left out.
        progress: How the listing of a store is shown: see ``progress.Progress``.

    Raises:
        DataError: If the data is missing or empty, its classes and splits are inconsistent, or
            there are companions of images.
        ConfigError: If ``group_by`` is no regular expression with a group, ``limit`` < 1, or
            another option is invalid.
    """
    pattern = GroupPattern.of(group_by, group_by_path)
    if limit is not None and limit < 1:
        raise ConfigError("--limit", expected="at least 1", found=limit)
    listing = Listing.of(
        include=include, exclude=exclude, companions=companions, no_classes=no_classes,
        columns=columns, ignore_columns=ignore_columns, target_columns=target_columns,
        target_separator=target_separator, uncertain=uncertain, blank=blank, split_list=split_list,
    )  # fmt: skip
    listing.check_labels_named()
    dataset = _scan_by_kind(check_data(data), listing, progress=progress)
    root = dataset.root
    given = {"columns", "ignore_columns", "target_columns", "target_separator", "split_list"}
    given = given & {*listing.as_json()} - _COLUMNS_OF.get(dataset.layout, set())
    if given and dataset.layout != "csv":
        option, found = "--" + min(given).replace("_", "-"), f"layout {dataset.layout}"
        raise ConfigError(option, expected="a CSV", found=found, where=root)
    if not dataset.samples:
        raise DataError(
            "data", expected="at least one image", found=dataset.reasons_text(), where=root,
            hint=advise_on_endings(
                dataset.ignored_endings, "Images end in " + ", ".join(sorted(IMAGE_SUFFIXES))
            ),
        )  # fmt: skip
    groups: dict[str, str | None] = {}
    if pattern is not None:
        paths = [*dataset.samples.paths]
        inside = [dataset.path_inside(sample) for sample in dataset.samples]
        matched = pattern.find(inside, [dataset.class_of(sample) for sample in dataset.samples])
        groups = dict(zip(paths, matched, strict=True))
    if any(groups.values()):
        grouped = (s._replace(group=groups[s.path] or s.path) for s in dataset.samples)
        dataset = replace(dataset, samples=Samples(grouped))
    if companions != "ignore" and dataset.layout != "csv":  # a CSV names every file on purpose
        dataset = settle_companions(dataset, is_kept=companions == "keep")
    samples = _spread(dataset.samples, limit)
    if pattern is None:
        return replace(dataset, samples=samples)
    of_class = dict.fromkeys(map(dataset.kind_of, samples), 0)
    for sample in samples:
        of_class[dataset.kind_of(sample)] += groups[sample.path] is not None
    return replace(dataset, samples=samples, grouped=of_class)


def _scan_by_kind(data: Data, listing: Listing, *, progress: bool | str) -> ImageDataset:
    if urls := urls_of(data):
        return _scan_urls(urls, listing, progress=progress)
    if not is_one_path(data):
        root, names = find_sources(data)
        return _scan_shards(root, names, listing, Ignored())
    assert isinstance(data, Path)
    root = data
    if root.is_dir():
        return _scan_folder(root, listing)
    ending = root.suffix.lower() if root.is_file() else ""
    if ending == ".csv":
        return scan_csv(root, listing, progress=progress)
    if ending == ".zip":
        return _scan_zip(root, listing)
    if ending in SHARD_ENDINGS:
        alone = Shard(root.name, open_shard(root), split_of_name(root.name), is_alone=True)
        return _scan_opened(root, [alone], listing, Ignored())
    raise DataError(
        "data", expected="a folder, or a .csv, .zip, .tar or .parquet file", where=root,
        found=why_no_file(root, "nothing there") or "another kind of file",
        hint=advise_on_endings({ending_of(root.name): 1}, "") if root.is_file() else "",
    )  # fmt: skip


def _scan_folder(root: Path, listing: Listing) -> ImageDataset:
    ignored, folders = Ignored(), set[str]()
    images = ImageFiles(walk_folder(root, ignored, folders))
    if not ignored.shards:
        return arrange(root, images, folders, ignored, listing)
    if images:
        named = describe_kinds(ignored.shards)
        warn_user(f"images of {printable(root)} are used, {named} beside them are not")
        return arrange(root, images, folders, ignored, listing)
    names, ignored.shards = ignored.shards, []
    ignored.take_back(names)
    return _scan_shards(root, names, listing, ignored)


def _scan_urls(urls: Sequence[str], listing: Listing, *, progress: bool | str) -> ImageDataset:
    """Return the images of a store: files of their own, or in tars or Parquet files."""
    start, url = time.perf_counter(), urls[0] if len(urls) == 1 else ""
    if url.lower().endswith(".csv"):
        return scan_csv(Path(url), listing, progress=progress)
    if url.lower().endswith(".zip"):
        return _scan_zip(Path(url), listing, file_at(url))
    if kind_of(url) and "*" not in url and (only := list_files(url).get("")) is not None:
        name = url.rpartition("/")[2]  # else it is a folder of that name
        alone = Shard(name, only, split_of_name(name), is_alone=True)
        return _scan_opened(Path(url), [alone], listing, Ignored())
    top, files = list_all(urls, progress=progress)
    listed = f"listed {count(len(files), 'object')} in {time.perf_counter() - start:.1f} s"
    ignored, folders = Ignored(), set[str]()
    images = walk_objects(files, ignored, folders)
    root = Path(top)
    if images or not ignored.shards:
        dataset = arrange(root, images, folders, ignored, listing)
        store = RemoteStore.of(top, ((image.path, files[image.path]) for image in images))
        return replace(dataset, notes=(listed,), _store=store)
    names, ignored.shards = ignored.shards, []
    ignored.take_back(names)
    shards, left_out = list_shards(root, names, listing, ignored, files)
    dataset = _scan_opened(root, shards, listing, ignored, left_out)
    return replace(dataset, notes=(listed, *dataset.notes))


def _scan_shards(
    root: Path, names: Sequence[str], listing: Listing, ignored: Ignored
) -> ImageDataset:
    """Return the images of tars or Parquet files, given by their paths below a folder."""
    shards, left_out = list_shards(root, names, listing, ignored)
    return _scan_opened(root, shards, listing, ignored, left_out)


def _scan_opened(
    root: Path, shards: Sequence[Shard], listing: Listing, ignored: Ignored,
    left_out: Sequence[str] = (),
) -> ImageDataset:  # fmt: skip
    if not shards:
        return ImageDataset(root, "images", (), Samples(), dict(ignored))
    scan_kind = scan_tars if kind_of(shards[0].name) == "tar" else scan_parquet
    return scan_kind(root, shards, listing, ignored, left_out)


def _spread(samples: Samples, limit: int | None) -> Samples:
    """Return at most ``limit`` samples: the first of every split and class, the second, ..."""
    if limit is None:
        return samples
    seen: Counter[tuple[str, int]] = Counter()
    ranks = []
    for position, cell in enumerate(zip(samples.splits, samples.targets, strict=True)):
        ranks.append((seen[cell], position))
        seen[cell] += 1
    return samples.taken(np.array(sorted(p for _, p in sorted(ranks)[:limit]), np.int64))


def _scan_zip(root: Path, listing: Listing, file: RemoteFile | None = None) -> ImageDataset:
    """Return the images of a zip, here or in a store."""
    ignored, folders = Ignored(), set[str]()
    wanted = []
    for entry in list_entries(root, file):
        parts = entry.path.split("/")
        is_folder = entry.kind == "folder"
        if any(map(is_hidden, parts)):
            ignored["hidden"] += 1
            continue
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + is_folder))
        if is_folder:
            continue
        if entry.kind != "file":
            ignored["link" if entry.kind == "link" else "not a regular file"] += 1
        elif not has_image_ending(parts[-1]):
            ignored.add(OTHER_ENDING, entry.path)
        else:
            wanted.append(entry)
    members = locate_members(root, wanted, max_bytes=MAX_IMAGE_BYTES, file=file)
    if skip := len(top_folder(folders, members)):
        members = {path[skip:]: member for path, member in members.items()}
        folders = {folder[skip:] for folder in folders if len(folder) > skip}
    images = [
        ImageFile(path, member.num_bytes, member.mtime_ns) for path, member in members.items()
    ]
    return replace(
        arrange(root, images, folders, ignored, listing), layout="zip",
        _store=ZipStore(file or root.absolute(), members),
    )  # fmt: skip
