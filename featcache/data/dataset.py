"""Find the images of a data set, with targets, splits and groups. Reads no pixels.

Reads: split folders, class folders, folders of images, CSV manifests, zip files of folders.
Writes: nothing.

Files that are not used (see ``folders``) are counted in ``num_ignored``. So are images beside class
folders and linked class folders, with a warning. Masks among the images are a question (see
``companions``), answered by options (see ``listing``).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from featcache.data.archive import list_entries, locate_members
from featcache.data.companions import settle_companions
from featcache.data.folders import (
    IMAGE_SUFFIXES,
    OTHER_ENDING,
    SPLIT_OF_FOLDER,
    SPLITS,
    Ignored,
    ImageFile,
    Layout,
    advise_on_endings,
    ending_of,
    find_layout,
    has_image_ending,
    is_hidden,
    walk_folder,
)
from featcache.data.groups import GroupPattern
from featcache.data.listing import Listing
from featcache.data.manifests import scan_csv
from featcache.data.samples import (
    MAX_IMAGE_BYTES,
    UNLABELLED,
    ImageDataset,
    Sample,
    make_sample,
    number_classes,
    sort_samples,
)
from featcache.errors import ConfigError, DataError, printable, warn_user
from featcache.files import local_path
from featcache.formatting import count
from featcache.untrusted import why_no_file

__all__ = [
    "IMAGE_SUFFIXES", "MAX_IMAGE_BYTES", "SPLITS", "UNLABELLED", "ImageDataset", "Sample",
    "list_images", "scan",
]  # fmt: skip


def scan(
    data: str | Path,
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
) -> ImageDataset:
    """Find the images of a data set, their targets, splits and groups.

    Args:
        data: A folder of split folders of class folders; a folder of class folders (split
            ``all``); a folder of images; a ``.csv`` with the columns path and optionally target,
            split, group; a ``.zip`` of such folders (one top folder is skipped).
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
        columns: Column (path, target, split, group) -> its header in a CSV.
        ignore_columns: Headers of a CSV that are not used.
        target_columns: Headers of a CSV that are a label each, with 1 (yes), 0 (no), -1
            (uncertain) and empty cells. ``No Finding`` is no class: where it is 1, empty cells of
            the others mean no.
        target_separator: Instead, what stands between the labels in the cells of ``target``; a cell
            ``No Finding`` has none.
        uncertain: What -1 means: ``unknown`` (so does None), ``yes`` or ``no``.
        blank: What an empty cell of a label means: ``unknown`` or ``no``; None asks.
        split_list: Split (train, valid, test) -> file with a path or a file name of a CSV a line.
            Rows in no list are of ``train`` if that has no list, else they are left out.

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
    root = local_path(data, "data")
    if root.is_dir():
        dataset = _scan_folder(root, listing)
    elif root.is_file() and root.suffix.lower() == ".csv":
        dataset = scan_csv(root, listing)
    elif root.is_file() and root.suffix.lower() == ".zip":
        dataset = _scan_zip(root, listing)
    else:
        found_there = why_no_file(root, "nothing there") or "another kind of file"
        raise DataError(
            "data", expected="a folder, .csv or .zip", found=found_there, where=root,
            hint=advise_on_endings({ending_of(root.name): 1}, "") if root.is_file() else "",
        )  # fmt: skip
    if listing != listing.for_data("") and dataset.layout != "csv":
        given = {"columns", "ignore_columns", "target_columns", "target_separator", "split_list"}
        option = "--" + min(given & {*listing.as_json()}).replace("_", "-")
        raise ConfigError(option, expected="a CSV", found=f"layout {dataset.layout}", where=root)
    if not dataset.samples:
        raise DataError(
            "data", expected="at least one image", found=dataset.reasons_text(), where=root,
            hint=advise_on_endings(
                dataset.ignored_endings, "Images end in " + ", ".join(sorted(IMAGE_SUFFIXES))
            ),
        )  # fmt: skip
    groups: dict[str, str | None] = {}
    if pattern is not None:
        paths = [sample.path for sample in dataset.samples]
        found = pattern.find(paths, [dataset.class_of(sample) for sample in dataset.samples])
        groups = dict(zip(paths, found, strict=True))
    if any(groups.values()):
        grouped = (replace(s, group=groups[s.path] or s.path) for s in dataset.samples)
        dataset = replace(dataset, samples=tuple(grouped))
    if companions != "ignore" and dataset.layout != "csv":  # a CSV names every file on purpose
        dataset = settle_companions(dataset, is_kept=companions == "keep")
    samples = _spread(dataset.samples, limit)
    if pattern is None:
        return replace(dataset, samples=samples)
    of_class = dict.fromkeys(map(dataset.kind_of, samples), 0)
    for sample in samples:
        of_class[dataset.kind_of(sample)] += groups[sample.path] is not None
    return replace(dataset, samples=samples, grouped=of_class)


def list_images(
    paths: Iterable[str | Path],
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    companions: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: str | Iterable[str] = (),
) -> ImageDataset:
    """Find the images of files, folders (with all folders in them) and CSVs, unlabelled, once each.

    A file given by name is used whatever its ending. Paths are relative to the current folder.

    Args:
        paths: Files, folders, and CSVs that name images.
        include: As for ``scan``, on the path below each folder, in a CSV, or the name of a file.
        exclude: As for ``scan``.
        companions: As for ``scan``, in each folder.
        columns: As for ``scan``, in each CSV.
        ignore_columns: As for ``scan``, in each CSV.

    Raises:
        DataError: If a path does not exist, a folder has no image, or companions of images; or if
            a CSV is none, or names files that are not there.
    """
    listing = Listing.of(
        include=include, exclude=exclude, companions=companions, no_classes=True,
        columns=columns, ignore_columns=ignore_columns,
    )  # fmt: skip
    ignored = Ignored()
    samples: dict[str, Sample] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = _list_folder(path, listing, ignored)
            prefix = "" if path == Path() else path.as_posix().rstrip("/") + "/"
            images = [image._replace(path=prefix + image.path) for image in found]
        elif path.is_file() and path.suffix.lower() == ".csv":
            named = scan_csv(path, listing)
            ignored.update(named.num_ignored)
            images = [
                ImageFile((path.parent / s.path).as_posix(), s.image_bytes, s.mtime_ns)
                for s in named.samples
            ]
        elif path.is_file():
            if path.suffix.lower() in {".zip", ".tar", ".tgz"}:
                raise DataError(
                    "image", expected="a file or folder", where=path,
                    found=f"a {path.suffix.lower()} file", hint="Name the images, or unpack them. "
                    "Or extract them, and predict by --cache",
                )  # fmt: skip
            status = path.stat()
            images = [ImageFile(path.as_posix(), status.st_size, status.st_mtime_ns)]
            (reason,) = listing.choose([path.name], path)
            if reason:
                ignored[reason] += 1
                continue
        else:
            found_there = why_no_file(path, "nothing there")
            raise DataError(
                "image", expected="a file or folder", found=found_there, where=path
            )  # fmt: skip
        samples.update((i.path, make_sample(i, UNLABELLED, "all")) for i in images)
    return ImageDataset(
        Path(), "images", (), sort_samples(samples.values()), dict(ignored),
        ignored_endings=dict(ignored.endings),
    )  # fmt: skip


def _list_folder(root: Path, listing: Listing, ignored: Ignored) -> list[ImageFile]:
    """Return the images of a folder to classify."""
    images = _choose(list(walk_folder(root, ignored, set())), root, listing, ignored)[0]
    if not images:
        ignored.recognise_dicom(root)
    samples = tuple(make_sample(image, UNLABELLED, "all") for image in images)
    dataset = ImageDataset(
        root, "images", (), samples, dict(ignored), ignored_endings=dict(ignored.endings)
    )
    if not images:
        hint = advise_on_endings(ignored.endings, "")
        raise DataError(
            "folder", expected="images", found=dataset.reasons_text(), where=root, hint=hint
        )  # fmt: skip
    if listing.companions is None:
        settle_companions(dataset, is_kept=False)
    return images


def _scan_folder(root: Path, listing: Listing) -> ImageDataset:
    ignored, folders = Ignored(), set[str]()
    images = list(walk_folder(root, ignored, folders))
    return _arrange(root, images, folders, ignored, listing)


def _choose(
    images: list[ImageFile], root: Path, listing: Listing, ignored: Ignored
) -> tuple[list[ImageFile], set[str]]:
    """Return the images that the globs leave, and the folders that lost all of theirs."""
    reasons = listing.choose([image.path for image in images], root)
    ignored.update(reason for reason in reasons if reason)
    left = [image for image, reason in zip(images, reasons, strict=True) if not reason]
    if len(left) == len(images):
        return images, set()
    return left, _folders_of(images) - _folders_of(left)


def _folders_of(images: Iterable[ImageFile]) -> set[str]:
    folders = set[str]()
    for folder in {image.path.rpartition("/")[0] for image in images}:
        parts = folder.split("/")
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + 1))
    return folders


def _spread(samples: tuple[Sample, ...], limit: int | None) -> tuple[Sample, ...]:
    """Return at most ``limit`` samples: the first of every split and class, the second, ..."""
    if limit is None:
        return samples
    seen: Counter[tuple[str, int]] = Counter()
    ranks = []
    for position, sample in enumerate(samples):
        cell = (sample.split, sample.target)
        ranks.append((seen[cell], position))
        seen[cell] += 1
    return tuple(samples[position] for position in sorted(p for _, p in sorted(ranks)[:limit]))


def _arrange(
    root: Path, images: list[ImageFile], folders: set[str], ignored: Ignored, listing: Listing
) -> ImageDataset:
    """Set splits and classes by folder; ignore images outside class folders, with a warning."""
    images, emptied = _choose(images, root, listing, ignored)
    layout = find_layout(root, folders - emptied, no_classes=listing.no_classes)
    targets = number_classes(layout.classes)
    samples, filled, num_loose = [], set(), 0
    for image in images:
        place = layout.place_of(image.path)
        if place is None:
            num_loose += 1
        else:
            split, name = layout.places[place]
            samples.append(make_sample(image, targets[name], split))
            filled.add(place)
    if ignored.links:
        _warn_of_links(root, ignored.links, layout)
    if not samples and root.is_dir():
        ignored.recognise_dicom(root)
    if num_loose:
        ignored["loose beside folders"] += num_loose
        warn_user(f"loose beside folders, and not used: {count(num_loose, 'image')} of {root}")
    if layout.kind == "classes":
        _warn_of_parts(samples, layout.classes)
    dataset = ImageDataset(
        root, layout.kind, layout.classes, sort_samples(samples), dict(ignored),
        ignored_endings=dict(ignored.endings),
    )  # fmt: skip
    for place in layout.places:
        if place and place not in filled:
            raise DataError(
                "folder", expected="at least one image", found=dataset.reasons_text(),
                where=root / place,
                hint=advise_on_endings(ignored.endings, "Remove it, or put its images in"),
            )  # fmt: skip
    return dataset


def _warn_of_parts(samples: Iterable[Sample], classes: Sequence[str]) -> None:
    """Warn of classes that look like parts of one collection: ``images_001``, ``images_002``.

    Their names differ by their number alone, and the numbers of the files go on from each to the
    next.
    """
    shapes = {re.sub(r"\d", "0", name) for name in classes}
    if len(classes) < 2 or len(shapes) > 1 or "00" not in shapes.pop():
        return
    names: dict[int, list[str]] = {}
    for sample in samples:
        names.setdefault(sample.target, []).append(sample.path.rpartition("/")[2])
    ends = [(min(names[t]), max(names[t])) for t in sorted(names)]
    alike = {re.sub(r"\d", "0", end) for pair in ends for end in pair}
    if len(alike) == 1 and all(a[1] < b[0] for a, b in itertools.pairwise(ends)):
        warn_user(
            f"classes {printable(classes[0])} to {printable(classes[-1])} look like parts of one "
            "collection: if they are no classes, use --no-classes"
        )


def _warn_of_links(root: Path, links: Iterable[str], layout: Layout) -> None:
    """Warn of linked folders that stand where a split or a class would.

    Links into ``root``, or to what it is in, lose nothing.
    """
    depth, here = 1 if layout.kind == "splits" else 0, root.resolve()

    def leads_away(link: str) -> bool:
        target = (root / link).resolve()
        return not (target.is_relative_to(here) or here.is_relative_to(target))

    named = [link for link in sorted(links) if link.count("/") <= depth and leads_away(link)]
    if named:
        shown = ", ".join(map(printable, named[:5])) + (", ..." if len(named) > 5 else "")
        warn_user(
            f"linked folders of {printable(root)} are not followed, and their images are not used: "
            f"{shown}. Put the folder itself there, or links to its files"
        )


def _scan_zip(root: Path, listing: Listing) -> ImageDataset:
    ignored, folders = Ignored(), set[str]()
    wanted = []
    for entry in list_entries(root):
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
    members = locate_members(root, wanted, max_bytes=MAX_IMAGE_BYTES)
    tops = {folder for folder in folders if "/" not in folder}
    if (
        len(tops) == 1
        and not {top.casefold() for top in tops} & SPLIT_OF_FOLDER.keys()
        and all("/" in path for path in members)
    ):
        skip = len(tops.pop()) + 1
        members = {path[skip:]: member for path, member in members.items()}
        folders = {folder[skip:] for folder in folders if len(folder) > skip}
    images = [
        ImageFile(path, member.num_bytes, member.mtime_ns) for path, member in members.items()
    ]
    return replace(
        _arrange(root, images, folders, ignored, listing), layout="zip", _members=members
    )
