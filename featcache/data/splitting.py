"""Split images into train, valid and test, by patient: as folders or as a CSV.

Images of one group (also across classes) and byte-identical files stay together. The split depends
only on the seed and the paths, so it is the same on every machine (see ``stratification``).

Reads: a folder of class folders or of images, or a CSV, here or in a store; headers of DICOM files.
Writes: ``DST/{train,valid,test}/{class}/`` with the images' own (nested) names, or ``DST.csv``,
whole or not at all (see ``split_outputs``); with the CSV a salt, if its groups are hashed patients.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache import progress
from featcache.data.dataset import ImageDataset, Samples, scan
from featcache.data.dicom_groups import Salt, identify_and_keep
from featcache.data.folders import SPLITS
from featcache.data.groups import GroupPattern
from featcache.data.hashing import find_copies, warn_of_contradictions
from featcache.data.sources import check_data
from featcache.data.split_outputs import check_destination, check_room, write_manifest, write_tree
from featcache.data.stratification import assign_labelled_units, assign_units, build_units
from featcache.errors import ConfigError, DataError
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, join_few, list_counts
from featcache.renames import beside
from featcache.runtime import Say, log_line

MODES = ("copy", "symlink", "hardlink")

_Counts = dict[str, dict[str, int]]


@dataclass(frozen=True)
class SplitSummary:
    """The result of ``split``.

    Args:
        destination: The folder or CSV that was written.
        classes: Class names, sorted.
        counts: split -> class (or ``unlabelled``) -> number of images; of several labels per image,
            of those that have a yes.
        num_groups: How many groups there are; None without any.
        num_matched: class -> number of names that ``group_by`` or ``group_by_path`` matched; None
            without them.
        num_ignored: Reason -> number of files and folders that were left out.
        ignored_endings: Ending -> number of files that were left out for it.
        num_identical: Number of images that have a byte-identical copy.
        image_bytes: Size of all images, in bytes.
        mode: ``copy``, ``symlink``, ``hardlink``, or ``csv``.
        seed: The seed of the split.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    destination: Path
    classes: tuple[str, ...]
    counts: _Counts
    num_groups: int | None
    num_matched: dict[str, int] | None
    num_ignored: dict[str, int]
    ignored_endings: dict[str, int]
    num_identical: int
    image_bytes: int
    mode: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return result_as_dict(self)


def split(
    source: str | Path,
    destination: str | Path,
    *,
    classes: Sequence[str] | None = None,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    group_by: str | None = None,
    group_by_path: str | None = None,
    group_salt: str | Path | None = None,
    patient_ids: str | None = None,
    mode: str = "copy",
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
    say: Say = log_line,
) -> SplitSummary:
    """Split images into train, valid and test: stratified, seeded, groups kept together.

    Args:
        source: Folder of class folders or of images; or a CSV of path and, if known, target and
            group. By URL too: then the destination is a CSV, which names the images by theirs.
        destination: A new or empty folder, or a new ``.csv``: then no image is moved.
        classes: The classes to use; all if None.
        fractions: Shares of train, valid and test in every class; 0 leaves a split out.
        seed: Seed of the split.
        group_by: Regular expression whose first group, in the file name, is the patient.
        group_by_path: Instead, one that is searched in the path below the class: see ``scan``.
        group_salt: File of the salt that IDs of patients in DICOM headers are hashed with, which
            make the groups where nothing else does. It is made if it is not there. Default: for a
            CSV ``DESTINATION.salt``; in folders nothing of it is written.
        patient_ids: An ID on more than a fifth of the images (and 20) is a question: ``keep`` takes
            it as a patient, ``ignore`` as no ID.
        mode: ``copy``, ``symlink`` or ``hardlink`` (not for a CSV).
        include: As for ``scan``, on the path below ``source``; so are ``exclude``,
            ``companions``, ``no_classes``, ``columns`` and ``ignore_columns``.
        exclude: Globs of files that are left out.
        companions: ``keep`` takes masks and the like as images, in the split of their image.
        no_classes: Folders are no classes: unlabelled images are split.
        columns: Column -> its header in a CSV.
        ignore_columns: Headers of a CSV that are not used.
        target_columns: Headers of a CSV that are a label each: see ``scan``, as for the next three.
            Images are then stratified by the rarest label that they show, and the CSV that is
            written has a column of 1, 0 and, where it is unknown, nothing for each label.
        target_separator: Instead, what stands between the labels in the cells of ``target``.
        uncertain: What -1 means.
        blank: What an empty cell of a label means.
        say: Called with lines of counts and sizes.

    Raises:
        ConfigError: If an option is invalid.
        DataError: If the source is split already or a zip, a class is unknown or has too few
            groups for every split, or the destination exists or lacks the space.
    """
    place, destination = check_data(source), Path(destination)
    assert isinstance(place, str | Path)
    if mode not in MODES:
        raise ConfigError("--mode", expected="one of " + ", ".join(MODES), found=mode)
    shares = name_fractions(fractions)
    output = check_destination(place, destination)
    dataset = scan(
        place, group_by=group_by, group_by_path=group_by_path, include=include, exclude=exclude,
        companions=companions, no_classes=no_classes, columns=columns,
        ignore_columns=ignore_columns, target_columns=target_columns,
        target_separator=target_separator, uncertain=uncertain, blank=blank,
        progress=progress.OF_URLS,
    )  # fmt: skip
    for line in (*dataset.notes, *dataset.describe_ignored()):
        say(line)
    _refuse_layout(dataset, no_classes=no_classes)
    dataset = _take_classes(dataset, classes)
    if dataset.has_dicom:
        dataset = _identify(dataset, destination, group_salt, patient_ids, say)
    samples = dataset.samples
    pattern = GroupPattern.of(group_by, group_by_path)
    num_groups, num_matched = _count_groups(dataset, pattern, say)
    hashes = find_copies(dataset, say)
    warn_of_contradictions(dataset, hashes)
    assigned = _assign(dataset, hashes, shares, seed)
    counts = _count(dataset, assigned)
    if hashes:
        say(f"{len(hashes):,} images have a byte-identical copy and stay with it")
    for name, per_class in counts.items():
        say(f"{name}: {count(assigned.count(name), 'image')} ({list_counts(per_class)})")
    image_bytes = sum(sample.image_bytes for sample in samples)
    if destination.suffix.lower() == ".csv":
        mode = "csv"
        write_manifest(dataset, assigned, output)
        if dataset.task == "multilabel":
            names = shlex.quote(",".join(dataset.classes))
            say(f"its labels are read with --target-columns {names} --blank unknown")
    else:
        if mode == "copy":
            check_room(destination, image_bytes, len(samples), say)
        write_tree(dataset, assigned, output, mode)
    return SplitSummary(
        destination=destination,
        classes=dataset.classes,
        counts=counts,
        num_groups=num_groups,
        num_matched=num_matched,
        num_ignored=dataset.num_ignored,
        ignored_endings=dataset.ignored_endings,
        num_identical=len(hashes),
        image_bytes=image_bytes,
        mode=mode,
        seed=seed,
    )


def _identify(
    dataset: ImageDataset, destination: Path, group_salt: str | Path | None,
    patient_ids: str | None, say: Say,
) -> ImageDataset:  # fmt: skip
    """Return the data set in groups by patient, where it has none, hashed as they are written."""
    place = beside(destination, ".salt") if group_salt is None else Path(group_salt)
    return identify_and_keep(
        dataset, Salt.of(place), patient_ids=patient_ids, path_names=None, say=say,
        writes=destination.suffix.lower() == ".csv",
    )  # fmt: skip


def _count_groups(
    dataset: ImageDataset, pattern: GroupPattern | None, say: Say
) -> tuple[int | None, dict[str, int] | None]:
    """Return and say how many groups there are, and how many names of each class matched."""
    samples = dataset.samples
    num_groups = len({s.group or s.path for s in samples})
    if pattern is not None:
        paths, labels = [s.path for s in samples], [dataset.kind_of(s) for s in samples]
        found = pattern.find(paths, [dataset.class_of(s) for s in samples])
        return num_groups, pattern.count_matches(found, labels, num_groups, say)
    if samples[0].group is None:
        return None, None
    is_by_patient = dataset.dicom is not None and dataset.dicom.salt is not None
    if dataset.layout == "csv" and not is_by_patient:
        say(f"groups: {num_groups:,}, of the CSV")
    return num_groups, None


def name_fractions(fractions: Sequence[float]) -> dict[str, float]:
    """Return split -> fraction, without splits of fraction 0.

    Raises:
        ConfigError: If they are not three shares that add up to 1.
    """
    fitting = len(fractions) == 3 and all(0 <= fraction <= 1 for fraction in fractions)
    if not fitting or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            "--fractions", expected="three shares of train, valid, test that add up to 1",
            found=",".join(map(str, fractions)), hint="For example 0.7,0.15,0.15",
        )  # fmt: skip
    return {name: share for name, share in zip(SPLITS[:3], fractions, strict=True) if share > 0}


def _refuse_layout(dataset: ImageDataset, *, no_classes: bool) -> None:
    if dataset.layout == "csv":
        if dataset.splits != ("all",):
            raise DataError(
                "source", expected="a CSV, not yet split", where=dataset.root,
                found="rows of " + ", ".join(dataset.splits),
                hint="To split it anew, add --ignore-columns with the header of its splits",
            )  # fmt: skip
    elif dataset.layout != ("images" if no_classes else "classes"):
        # A CSV cannot name what is in a tar, and nothing is copied out of one.
        later = "Extract it, then split its rows by featcache select CACHE NEW --fractions F,F,F"
        hints = dict.fromkeys(("zip", "tar", "parquet"), later)
        hints |= {"images": "To split unlabelled images: --no-classes"}
        raise DataError(
            "source", expected="a folder of class folders, or a CSV, not yet split",
            found=f"layout {dataset.layout}", where=dataset.root,
            hint=hints.get(dataset.layout, ""),
        )  # fmt: skip


def _take_classes(dataset: ImageDataset, wanted: Sequence[str] | None) -> ImageDataset:
    """Return the data set with the wanted classes only, and targets to match."""
    if wanted is None:
        return dataset
    if dataset.task == "multilabel":
        raise ConfigError(
            "--classes", expected="one class per image", found="several labels", where=dataset.root,
            hint="Leave it out: the labels to use are chosen by extract --target-columns",
        )  # fmt: skip
    unknown = sorted(set(wanted) - set(dataset.classes))
    if unknown or not wanted:
        raise DataError(
            "--classes", expected="some of " + join_few(dataset.classes),
            found=join_few(map(repr, unknown)) or "none", where=dataset.root,
        )  # fmt: skip
    classes = tuple(name for name in dataset.classes if name in wanted)
    index = {dataset.classes.index(name): target for target, name in enumerate(classes)}
    samples = (s for s in dataset.samples if s.target in index)
    taken = Samples(s._replace(target=index[s.target]) for s in samples)
    return replace(dataset, classes=classes, samples=taken)


def _assign(
    dataset: ImageDataset, hashes: dict[int, bytes], shares: dict[str, float], seed: int
) -> list[str]:
    """Return the split of each sample."""
    samples = dataset.samples
    groups = [sample.group for sample in samples]
    units = build_units(groups, [hashes.get(index) for index in range(len(samples))])
    paths = [sample.path for sample in samples]
    try:
        if dataset.task == "multilabel":
            is_yes = np.array([sample.targets for sample in samples]) == 1
            return assign_labelled_units(units, is_yes, paths, shares, seed=seed)
        labels = [dataset.kind_of(sample) for sample in samples]
        return assign_units(units, labels, paths, shares, seed=seed)
    except DataError as error:
        raise DataError(
            error.what, expected=error.expected, found=error.found, where=dataset.root, hint=TOO_FEW
        ) from error  # fmt: skip


TOO_FEW = "Leave the class out with --classes, or a split with a fraction of 0"


def _count(dataset: ImageDataset, assigned: list[str]) -> _Counts:
    if dataset.task == "multilabel":
        placed = zip(dataset.samples, assigned, strict=True)
        samples = Samples(sample._replace(split=name) for sample, name in placed)
        return replace(dataset, samples=samples).count()
    labels = [dataset.kind_of(sample) for sample in dataset.samples]
    counted = Counter(zip(assigned, labels, strict=True))
    known = list(dataset.classes)
    known += {*labels} - {*known}  # unlabelled
    return {
        name: {label: counted[name, label] for label in known}
        for name in SPLITS
        if any(split == name for split, _ in counted)
    }
