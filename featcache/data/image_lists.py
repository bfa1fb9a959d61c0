"""Find images to look at one by one: files, folders, globs, CSVs, and objects of stores by URL.

``scan`` finds the images of a data set, to learn from. Here nothing has a class or a split, and
images stand in the order in which they were named.

Reads: names, sizes and times; CSVs. Writes: nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache.data.arrangement import choose_images
from featcache.data.columns import Sample, Samples, make_sample, sort_samples
from featcache.data.companions import settle_companions
from featcache.data.dataset import scan
from featcache.data.folders import (
    SHARD_ENDINGS,
    Ignored,
    ImageFile,
    advise_on_endings,
    has_image_ending,
    is_hidden,
    walk_folder,
)
from featcache.data.listing import Listing
from featcache.data.manifests import scan_csv
from featcache.data.remote import RemoteFile
from featcache.data.samples import UNLABELLED, ImageDataset
from featcache.data.shards import kind_of
from featcache.data.sources import check_data, files_of_glob, is_one_path, urls_of
from featcache.data.stored_files import RemoteStore, list_each, walk_objects
from featcache.errors import ConfigError, DataError
from featcache.untrusted import why_no_file

_Place = Path | str  # a path of this machine, or a URL
_Objects = Mapping[str, Mapping[str, RemoteFile]]
"""Of each URL: path below it -> object."""


def list_images(paths: Sequence[str | Path], **listing: Any) -> ImageDataset:
    """Return the images of paths or URLs, once each: see ``list_in_order``; none that are packed.

    Args:
        paths: Files, folders, CSVs and globs.
        **listing: The keywords of ``Listing.of``.
    """
    return list_in_order(paths, Listing.of(**listing), may_be_packed=False)[0]


def list_in_order(
    data: Sequence[str | Path], listing: Listing, *, may_be_packed: bool = True,
    progress: bool | str = False,
) -> tuple[ImageDataset, list[Sequence[Sample]]]:  # fmt: skip
    """Return the images of paths or URLs, unlabelled and once each; and those of each of them.

    A file given by name is used whatever its ending. Paths are relative to the current folder,
    objects have their URLs as paths. In zips, tars and Parquet files images are named as ``scan``
    names them, and all stand as those of the first path.

    Args:
        data: Files, folders (with all folders in them), CSVs that name images, or globs of these;
            or a zip, or tars, Parquet files, or folders or globs of them. All paths, or all URLs.
        listing: As for ``scan``; its globs are on the path below each folder, in a CSV, or on the
            name of a file.
        may_be_packed: Whether images may be in a zip, in tars or in Parquet files.
        progress: How the listing of a store is shown: see ``progress.Progress``.

    Raises:
        DataError: If a path leads nowhere, a folder has no image, or companions of images; if a CSV
            is none, or names files that are not there; or if a store refuses or has nothing there.
        ConfigError: If there are both paths and URLs.
    """
    listing = replace(listing, no_classes=True)
    places = check_data(list(data))
    assert isinstance(places, list)
    objects = list_each(urls_of(places), progress=progress)
    found = [_expand(place) for place in places]
    if may_be_packed and _are_packed([*itertools.chain(*found)], objects):
        given = listing.as_json() | {"companions": listing.companions}
        dataset = scan(places if len(places) > 1 else places[0], **given, progress=progress)
        return dataset, [dataset.samples, *[()] * (len(places) - 1)]
    finder = _Finder(listing, objects)
    of_each: list[Sequence[Sample]] = [
        [*dict.fromkeys(sample for one in ones for sample in finder.find(one))] for ones in found
    ]
    return finder.dataset(), of_each


def _expand(place: _Place) -> list[_Place]:
    """Return what a glob of this machine matches; anything else as it is."""
    if isinstance(place, str) or is_one_path(place):
        return [place]
    return [*files_of_glob(place)]


def _are_packed(places: Sequence[_Place], objects: _Objects) -> bool:
    """Return whether places are files of many images, or folders of such files and of no images.

    Raises:
        DataError: If some are and others are not, or there are several of which one is a zip.
    """
    packed = [
        place for place in places
        if (_is_packed(place) if isinstance(place, Path) else _has_packed(place, objects[place]))
    ]  # fmt: skip
    if not packed:
        return False
    has_zip = len(packed) > 1 and any(str(place).lower().endswith(".zip") for place in packed)
    if len(packed) < len(places) or has_zip:
        raise DataError(
            "images", expected="images and folders of them, or tars, or Parquet files, or a zip",
            found="several kinds", where=packed[0], hint="Name one kind at a time",
        )  # fmt: skip
    return True


def _is_packed(path: Path) -> bool:
    if path.is_dir():
        ignored = Ignored()
        has_images = any(True for _ in walk_folder(path, ignored, set()))
        return not has_images and bool(ignored.shards)
    return path.suffix.lower() in _PACKED and path.is_file()


def _has_packed(url: str, files: Mapping[str, RemoteFile]) -> bool:
    if "" in files:
        return Path(url).suffix.lower() in _PACKED
    shown = (path for path in files if not any(map(is_hidden, path.split("/"))))
    has_shards = False
    for path in shown:
        if has_image_ending(path):
            return False
        has_shards = has_shards or bool(kind_of(path))
    return has_shards


_PACKED = {".zip", *SHARD_ENDINGS}


class _Finder:
    """Finds the images of files, folders and CSVs, here or in a store.

    Args:
        listing: What is taken.
        objects: What lies at each URL.
    """

    def __init__(self, listing: Listing, objects: _Objects) -> None:
        self._listing, self._objects = listing, objects
        self._ignored = Ignored()
        self._samples: dict[str, Sample] = {}
        self._stored: dict[str, RemoteFile] = {}

    def dataset(self) -> ImageDataset:
        """Return all images that were found, once each.

        Raises:
            ConfigError: If some are in stores and others are not.
        """
        if self._stored and len(self._stored) < len(self._samples):
            raise ConfigError("images", expected="paths or URLs", found="both")
        store = RemoteStore.of("", self._stored.items()) if self._stored else None
        return ImageDataset(
            Path(), "images", (), sort_samples(self._samples.values()), dict(self._ignored),
            ignored_endings=dict(self._ignored.endings), _store=store,
        )  # fmt: skip

    def find(self, place: _Place) -> list[Sample]:
        """Return the images of a path or a URL, sorted by path.

        Raises:
            DataError: See ``list_in_order``.
        """
        images = (
            self._find_here(place) if isinstance(place, Path) else self._find_stored(place)
        )  # fmt: skip
        made = [make_sample(image, UNLABELLED, "all") for image in images]
        return [self._samples.setdefault(sample.path, sample) for sample in sort_samples(made)]

    def _find_here(self, path: Path) -> Iterable[ImageFile]:
        if path.is_dir():
            images = self._choose([*walk_folder(path, self._ignored, set())], path)
            prefix = "" if path == Path() else path.as_posix().rstrip("/") + "/"
            return [image._replace(path=prefix + image.path) for image in images]
        if not path.is_file():
            found_there = why_no_file(path, "nothing there")
            raise DataError(
                "image", expected="a file or folder", found=found_there, where=path
            )  # fmt: skip
        if path.suffix.lower() == ".csv":
            return self._find_named(path)
        status = path.stat()
        image = ImageFile(path.as_posix(), status.st_size, status.st_mtime_ns)
        return self._take_one(image, path)

    def _find_stored(self, url: str) -> Iterable[ImageFile]:
        files = self._objects[url]
        if (file := files.get("")) is not None:
            if url.lower().endswith(".csv"):
                return self._find_named(Path(url))
            found = self._take_one(ImageFile(url, file.num_bytes, file.mtime_ns), Path(url))
            self._stored.update((image.path, file) for image in found)
            return found
        images = walk_objects(files, self._ignored, set())
        path, file = next(iter(files.items()))
        store = RemoteStore.of(file.url[: -len(path) - 1], files.items())
        found = []
        for image in self._choose(images, Path(url), store):
            file = files[image.path]
            self._stored[file.url] = file
            found.append(image._replace(path=file.url))
        return found

    def _find_named(self, table: Path) -> Iterable[ImageFile]:
        """Yield the images that a CSV names."""
        named = scan_csv(table, self._listing, paths_only=True)
        self._ignored.update(named.num_ignored)
        for sample in named.samples:
            file = named.object_of(sample)
            if file is not None:
                self._stored[file.url] = file
            path = (table.parent / sample.path).as_posix() if file is None else file.url
            yield ImageFile(path, sample.image_bytes, sample.mtime_ns)

    def _take_one(self, image: ImageFile, path: Path) -> list[ImageFile]:
        """Return a file given by name, unless its name is left out."""
        if path.suffix.lower() in {".tgz", *_PACKED}:
            raise DataError(
                "image", expected="a file or folder", where=path,
                found=f"a {path.suffix.lower()} file", hint="Name the images, or unpack them. "
                "Or extract them, and predict by --cache",
            )  # fmt: skip
        (reason,) = self._listing.choose([path.name], path)
        if not reason:
            return [image]
        self._ignored[reason] += 1
        return []

    def _choose(
        self, images: list[ImageFile], root: Path, store: RemoteStore | None = None
    ) -> list[ImageFile]:
        """Return the images of a folder that are taken.

        Raises:
            DataError: If there are none, or some look like companions of others.
        """
        ignored = self._ignored
        if (taken := choose_images(images, root, self._listing, ignored)) is not None:
            images = [*itertools.compress(images, taken)]
        if not images and store is None:
            ignored.recognise_dicom(root)
        samples = Samples(make_sample(image, UNLABELLED, "all") for image in images)
        dataset = ImageDataset(
            root, "images", (), samples, dict(ignored), ignored_endings=dict(ignored.endings),
            _store=store,
        )  # fmt: skip
        if not images:
            hint = advise_on_endings(ignored.endings, "")
            raise DataError(
                "folder", expected="images", found=dataset.reasons_text(), where=root, hint=hint
            )  # fmt: skip
        if self._listing.companions is None:
            settle_companions(dataset, is_kept=False)
        return images
