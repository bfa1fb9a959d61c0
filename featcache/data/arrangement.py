"""Give images their splits and classes by the folders they lie in, on the disk or in an archive.

Reads: nothing; of folders without an image, the first bytes of a file without an ending.
Writes: nothing.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from featcache.data.columns import Sample, make_sample, sort_samples
from featcache.data.folders import (
    SPLIT_OF_FOLDER,
    Ignored,
    ImageFile,
    Layout,
    advise_on_endings,
    find_layout,
)
from featcache.data.listing import Listing
from featcache.data.samples import ImageDataset, number_classes
from featcache.errors import DataError, printable, warn_user
from featcache.formatting import count


def choose_images(
    images: Iterable[ImageFile], root: Path, listing: Listing, ignored: Ignored
) -> Sequence[bool] | None:
    """Return which images the globs leave; None for all of them.

    Args:
        images: What to choose from.
        root: Only for messages.
        listing: The globs.
        ignored: What is not used; updated.
    """
    if not (listing.include or listing.exclude):
        return None
    reasons = listing.choose([image.path for image in images], root)
    ignored.update(reason for reason in reasons if reason)
    return [not reason for reason in reasons]


def _folders(images: Iterable[ImageFile], folders_of: Sequence[str] | None) -> Iterable[str]:
    if folders_of is not None:
        return folders_of
    return (image.path.rpartition("/")[0] for image in images)


def _with_parents(folders: Iterable[str]) -> set[str]:
    found = set[str]()
    for folder in folders:
        parts = folder.split("/")
        found.update("/".join(parts[:n]) for n in range(1, len(parts) + 1))
    return found


def arrange(
    root: Path, images: Iterable[ImageFile], folders: set[str], ignored: Ignored, listing: Listing,
    *, folders_of: Sequence[str] | None = None,
) -> ImageDataset:  # fmt: skip
    """Set splits and classes by folder; ignore images outside class folders, with a warning.

    Args:
        root: What was scanned.
        images: The images in it; no iterator, as it is gone through more than once.
        folders: All folders in it that are not ignored.
        ignored: What is not used; updated.
        listing: Which images are taken.
        folders_of: Of each image the folder by which it is arranged. Default: that of its path.

    Raises:
        DataError: If the folders' names are inconsistent, or one has no image.
    """
    emptied = set[str]()
    if (taken := choose_images(images, root, listing, ignored)) is not None:
        before = set(_folders(images, folders_of))
        images = [*itertools.compress(images, taken)]
        folders_of = folders_of and [*itertools.compress(folders_of, taken)]
        emptied = _with_parents(before) - _with_parents(set(_folders(images, folders_of)))
    layout = find_layout(root, folders - emptied, no_classes=listing.no_classes)
    targets = number_classes(layout.classes)
    filled, num_loose = set[str](), 0
    place_of = functools.cache(layout.place_of)  # by folder, of which there are few

    def place_all() -> Iterator[Sample]:
        nonlocal num_loose
        for image, folder in zip(images, _folders(images, folders_of), strict=True):
            place = place_of(folder)
            if place is None:
                num_loose += 1
            else:
                split, name = layout.places[place]
                yield make_sample(image, targets[name], split)
                filled.add(place)

    samples = sort_samples(place_all())
    if ignored.links:
        _warn_of_links(root, ignored.links, layout)
    if not samples and root.is_dir():
        ignored.recognise_dicom(root)
    if num_loose:
        ignored["loose beside folders"] += num_loose
        warn_user(
            f"loose beside folders, and not used: {count(num_loose, 'image')} of {printable(root)}"
        )
    if layout.kind == "classes":
        _warn_of_parts(samples, layout.classes)
    dataset = ImageDataset(
        root, layout.kind, layout.classes, samples, dict(ignored),
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


def top_folder(folders: Iterable[str], paths: Iterable[str]) -> str:
    """Return the one folder that was packed as a whole, with a ``/``; "" if there is no such one.

    Args:
        folders: All folders in an archive.
        paths: The images in it.
    """
    tops = {folder for folder in folders if "/" not in folder}
    if len(tops) != 1 or not SPLIT_OF_FOLDER.keys().isdisjoint(top.casefold() for top in tops):
        return ""
    (top,) = tops
    return top + "/" if all("/" in path for path in paths) else ""
