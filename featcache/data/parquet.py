"""Images in Parquet files, as Hugging Face's ``datasets`` and others write them.

A column of structs {bytes, path}, or of bytes; the class in a column of ClassLabels, texts or whole
numbers, which are names then.

Reads: Parquet files, page by page. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.data.columns import make_sample, sort_samples
from featcache.data.folders import Ignored, ImageFile, agree_on_classes
from featcache.data.listing import Listing
from featcache.data.parquet_index import ParquetRows, index_files, unpacker
from featcache.data.parquet_pages import Page, unpack_page
from featcache.data.samples import MAX_IMAGE_BYTES, ImageDataset, number_classes
from featcache.data.shards import PathIndex, Shard, agree_on_splits, drop_used_globs, stamped
from featcache.errors import DataError
from featcache.untrusted import find_fault

_CACHE_BYTES = 1 << 27
_NUM_LOCKS = 16


class _Pages:
    """The pages that were unpacked last, of one process: threads that read in order share them."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._loading = [threading.Lock() for _ in range(_NUM_LOCKS)]
        self._ahead = set[int]()

    def get(self, number: int, load: Callable[[], bytes]) -> bytes:
        """Return a page; of several threads that want it at once one unpacks it."""
        with self._loading[number % _NUM_LOCKS]:
            with self._lock:
                if number in self._pages:
                    self._pages.move_to_end(number)
                    return self._pages[number]
            data = load()
            with self._lock:
                self._pages[number] = data
                self._num_bytes += len(data)
                # The last two stay, however large: a dictionary and the page that follows it.
                while self._num_bytes > _CACHE_BYTES and len(self._pages) > 2:
                    _, gone = self._pages.popitem(last=False)
                    self._num_bytes -= len(gone)
            return data

    def has(self, number: int) -> bool:
        """Return whether a page is at hand."""
        with self._lock:
            return number in self._pages

    def load_ahead(self, number: int, load: Callable[[], bytes]) -> None:
        """Unpack a page in a thread of its own, unless that is being done."""
        with self._lock:
            if number in self._pages or number in self._ahead:
                return
            self._ahead = {number}  # the last one: pages are read in order

        def run() -> None:
            with contextlib.suppress(OSError, ValueError, MemoryError):  # said to whoever reads it
                self.get(number, load)

        threading.Thread(target=run, name="featcache-page", daemon=True).start()


@dataclass
class ParquetStore:
    """Reads images of Parquet files. Picklable; keeps nothing open, and a few pages unpacked.

    44 bytes an image.

    Args:
        shards: The files.
        codecs: Of each what its pages are packed by, "" for nothing.
        pages: The pages of all of them.
        shard_of: Number of the file of each page.
        numbers: Path of an image -> its number in the arrays.
        page_of: Number of the page of each image.
        offsets: Where it begins in the unpacked page.
        sizes: How many bytes it has; -1 for a null.
    """

    shards: Sequence[Shard]
    codecs: list[str] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    shard_of: array[int] = field(default_factory=lambda: array("l"))
    numbers: PathIndex = field(default_factory=PathIndex)
    page_of: array[int] = field(default_factory=lambda: array("l"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    _unpacked: _Pages = field(default_factory=_Pages, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_unpacked"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unpacked = _Pages()

    def read(self, path: str) -> bytes:
        """Return the bytes of an image: see ``samples.Store``."""
        number = self.numbers[path]
        offset, size, of_page = self.offsets[number], self.sizes[number], self.page_of[number]
        if size < 0:
            raise ValueError("no bytes, a null")
        page, shard = self.pages[of_page], self.shard_of[of_page]
        if not page.unpacked_bytes:
            return self.shards[shard].file.read(page.offset + offset, size)
        is_in_order = self._unpacked.has(of_page)
        data = self._unpacked.get(of_page, lambda: self._unpack(page, shard))
        if is_in_order and 2 * offset > len(data):
            self._unpack_next(of_page)
        image = data[offset : offset + size]
        if len(image) != size:
            raise ValueError("a page that ends before its values")
        return image

    def _unpack_next(self, of_page: int) -> None:
        """Unpack the page behind one whose second half is being read.

        A page of pyarrow's has 1,024 images, 75 MB, and takes 0.13 s, while no thread could decode.
        """
        number = of_page + 1
        if number < len(self.pages) and self.pages[number].unpacked_bytes:
            page, shard = self.pages[number], self.shard_of[number]
            self._unpacked.load_ahead(number, lambda: self._unpack(page, shard))

    def _unpack(self, page: Page, shard: int) -> bytes:
        data = self.shards[shard].file.read(page.offset, page.num_bytes)
        unpack = unpacker(self.codecs[shard])
        return data if unpack is None else unpack_page(data, page.unpacked_bytes, unpack)

    def place_of(self, path: str) -> tuple[int, int]:
        """Return the number of its page, and its offset there."""
        number = self.numbers[path]
        return self.page_of[number], self.offsets[number]

    def path_inside(self, path: str) -> str:
        """Return the path beside the bytes, or the row's number."""
        shard = self.shards[self.shard_of[self.page_of[self.numbers[path]]]]
        return path[len(shard.prefix) :]


def scan_parquet(
    root: Path, shards: Sequence[Shard], listing: Listing, ignored: Ignored,
    left_out: Sequence[str] = (),
) -> ImageDataset:  # fmt: skip
    """Return the images of Parquet files. See ``dataset.scan``.

    Args:
        root: The file, or the folder of files.
        shards: The files.
        listing: Which images are taken, and which columns are what.
        ignored: What is not used; updated.
        left_out: Files that a glob left out.

    Raises:
        DataError: If a file is no whole Parquet file with images, a column is missing or a
            question, or classes or splits are inconsistent.
        ConfigError: If pyarrow is not installed.
    """
    store = ParquetStore([shard.absolute() for shard in shards])
    names: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    groups: list[str] = []
    stamps: list[int] = []
    described, unused = dict[str, None](), dict[str, None]()
    for number, rows in enumerate(index_files([shard.file for shard in shards], listing)):
        shard, places, num_rows = shards[number], rows.places, len(rows.places.size)
        if num_rows and places.size.max() > MAX_IMAGE_BYTES:
            raise DataError(
                "image", expected=f"at most {MAX_IMAGE_BYTES:,} bytes",
                found=f"{places.size.max():,}", where=shard.file.place,
            )  # fmt: skip
        names += [shard.prefix + name for name in _name_rows(rows)]
        labels += rows.targets or [""] * num_rows
        splits += rows.splits or [shard.split] * num_rows
        groups += rows.groups or [""] * num_rows
        stamps += [stamped(shard.file.mtime_ns, b"", shard.file)] * num_rows
        store.codecs.append(rows.codec)
        store.page_of.extend((places.page + len(store.pages)).tolist())
        store.offsets.extend(places.offset.tolist())
        store.sizes.extend(places.size.tolist())
        store.pages += places.pages
        store.shard_of.extend([number] * len(places.pages))
        described[rows.labelled_by] = None
        unused |= dict.fromkeys(rows.unused)
    listing = drop_used_globs(listing, left_out, names)
    reasons = listing.choose(names, root)
    ignored.update(reason for reason in reasons if reason)
    kept = [number for number, reason in enumerate(reasons) if not reason]
    agreed = agree_on_splits([splits[n] for n in kept], [names[n] for n in kept], root)
    classes_by_split: dict[str, set[str]] = {}
    for number, split in zip(kept, agreed, strict=True):
        if labels[number]:
            classes_by_split.setdefault(split, set()).add(labels[number])
    classes = agree_on_classes(classes_by_split, root)
    targets = number_classes(classes)
    has_groups = any(groups[number] for number in kept)
    samples = (
        make_sample(
            ImageFile(names[n], max(store.sizes[n], 0), stamps[n]), targets[labels[n]], split,
            (groups[n] or names[n]) if has_groups else None,
        )
        for n, split in zip(kept, agreed, strict=True)
    )  # fmt: skip
    store.numbers = PathIndex(names)
    notes = tuple(f"classes: {source}" for source in described if source)
    return ImageDataset(
        root, "parquet", classes, sort_samples(samples), dict(ignored),
        ignored_endings=dict(ignored.endings), ignored_columns=tuple(unused),
        notes=notes, _store=store,
    )  # fmt: skip


def _name_rows(rows: ParquetRows) -> list[str]:
    """Return the name of each row: its path, or its number if not all have one of their own."""
    names = [name.replace("\\", "/").strip("/") for name in rows.names]
    if not names or not all(names) or len(set(names)) < len(names) or any(map(find_fault, names)):
        return [str(number) for number in range(len(rows.places.size))]
    return names
