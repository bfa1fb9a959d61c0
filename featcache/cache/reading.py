"""The cache: one file with the features of a data set, and everything needed to trust them.

FORMAT.md describes the file, its data sets and its hashes. It is read as a container (module
``container``: user block and table), and its parts are checked against each other (``contents``).

Reads: caches. Module ``writing`` writes them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.cache.by_url import by_url
from featcache.cache.cache_split import CacheSplit
from featcache.cache.container import Container, check_payload, open_container
from featcache.cache.contents import (
    check_classes,
    check_kinds,
    check_table,
    check_targets,
    damaged,
    read_json,
    read_texts,
)
from featcache.data.folders import SPLITS
from featcache.errors import CacheError, ConfigError, printable, warn_user
from featcache.files import local_path
from featcache.formatting import count, join_few

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why. Every ``extract`` tries it again."""

    __module__ = "featcache"

    path: str
    split: str
    target: int
    reason: str
    image_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Cache:
    """An open cache. Nothing but the user block and the small data sets has been read.

    Attributes:
        path: The file.
        identity: What decides the features' values.
        provenance: How they were made: versions, device, engine, precision, parity.
        classes: Class names; a target is an index into them. Empty when unlabelled.
        task: ``multiclass`` or ``multilabel``.
        splits: The splits in the order train, valid, test, all.
        failures: Images that could not be read.
    """

    __module__ = "featcache"

    path: Path
    identity: dict[str, Any]
    provenance: dict[str, Any]
    classes: tuple[str, ...]
    task: str
    splits: dict[str, CacheSplit]
    failures: tuple[Failure, ...]
    container: Container = field(repr=False)

    def __repr__(self) -> str:
        rows = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        backbone = printable(str(self.identity.get("backbone")))[:60]
        text = f"Cache({printable(self.path.name)}: {rows}; {self.num_features:,} features"
        return f"{text} of {backbone}; classes: {join_few(self.classes) or 'none'})"

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity, 64 hex digits."""
        return self.container.fingerprint

    @property
    def payload_sha256(self) -> str:
        """sha256 of every byte behind the user block."""
        return self.container.payload_sha256

    @property
    def content_sha256(self) -> str:
        """sha256 over identity, classes, features, targets and paths."""
        return self.container.content_sha256

    @property
    def num_features(self) -> int:
        """D, the number of features of a row."""
        return next(iter(self.splits.values())).shape[-1]

    @property
    def parity(self) -> list[float]:
        """Relative L2 errors of stored features on probed images, empty where none are known.

        After many updates only the largest are kept; ``num_probed`` images were measured.
        """
        told = self.provenance.get("parity")
        numbers = told if isinstance(told, list) else []
        numbers = [n for n in numbers if type(n) in {int, float} and 0 <= n < 1e9]
        return [float(number) for number in numbers]

    @property
    def num_probed(self) -> int:
        """How many images were measured: ``parity`` has all of their errors, or the largest."""
        told = self.provenance.get("num_probed")
        return told if type(told) is int and 0 <= told < 2**53 else len(self.parity)

    def to_pandas(self, *, features: bool = True) -> pd.DataFrame:
        """Return all rows as a data frame, split after split, in the order of the splits' arrays.

        Args:
            features: Whether the features are columns too; they are read into memory.

        Returns:
            A data frame of the columns ``split``, ``path``, ``target`` (the class name, None where
            unlabelled), ``group`` (None where the cache has none), and ``f0`` to ``f<D-1>``,
            float32, of the plain view. A ``multilabel`` cache has ``target_<class>`` for each class
            instead of ``target``: 1, 0 or NaN = unknown.

        Raises:
            ConfigError: If pandas is not installed.
            CacheError: If the file was cut short since it was opened.

        Example:
            >>> cache.to_pandas().groupby("split").target.value_counts()  # doctest: +SKIP
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ConfigError(
                "to_pandas", expected="the package pandas", found="none", hint="pip install pandas"
            ) from error
        splits = list(self.splits.values())
        texts: dict[str, list[str | None]] = {
            "split": [name for name, split in self.splits.items() for _ in range(len(split))],
            "path": [path for split in splits for path in split.paths],
            "group": [],
        }
        for split in splits:
            texts["group"] += split.groups or [None] * len(split)
        targets = np.concatenate([split.targets for split in splits])
        if self.task == "multiclass":
            names: list[str | None] = [*self.classes, None]  # the last is -1's
            texts["target"] = [names[target] for target in targets.tolist()]
        # As objects: a path need not be UTF-8.
        columns: dict[str, Any] = {k: pd.Series(v, dtype=object) for k, v in texts.items()}
        if self.task == "multilabel":
            columns |= {f"target_{name}": targets[:, i] for i, name in enumerate(self.classes)}
        order = ["split", "path", *[k for k in columns if k.startswith("target")], "group"]
        table = pd.DataFrame({key: columns[key] for key in order})
        if not features:
            return table
        values = np.empty((len(table), self.num_features), np.float32)
        start = 0
        for split in splits:
            plain = (
                split.read_features() if split.num_views == 1
                else split.read_rows(np.arange(len(split)))
            )  # fmt: skip
            values[start : start + len(split)] = plain.reshape(len(split), -1)
            start += len(split)
        named = pd.DataFrame(values, columns=[f"f{i}" for i in range(self.num_features)])
        return pd.concat([table, named], axis=1)

    def split(self, name: str) -> CacheSplit:
        """Return a split by name.

        Raises:
            CacheError: If the cache has no such split.
        """
        if name not in self.splits:
            raise CacheError(
                "split", expected=f"one of {', '.join(self.splits)}", found=name, where=self.path,
                hint="Name a split of this cache with --split",
            )  # fmt: skip
        return self.splits[name]


@by_url("path")
def open_cache(path: str | Path, *, verify: bool = True) -> Cache:
    """Open a cache for reading.

    Args:
        path: The file.
        verify: Check the whole file against its sha256 first (about 1 GB a second).

    Returns:
        The cache; its arrays are read on use.

    Raises:
        CacheError: If the file is missing, not a cache, of a newer version, cut or damaged.

    Example:
        >>> cache = open_cache("covid.h5")  # doctest: +SKIP
        >>> cache.splits["train"].features.shape  # doctest: +SKIP
        (198, 1280)
    """
    for num_tries_left in range(9, -1, -1):
        container = open_container(local_path(path, "cache"), verify=False)
        try:
            if verify:
                check_payload(container)
            return read_cache(container)
        except CacheError:
            # An update may have renamed a new file into its place: what was read is of two then.
            if container.is_current() or not num_tries_left:
                raise
    raise AssertionError


def read_cache(container: Container) -> Cache:
    """Return the cache in an open container.

    Raises:
        CacheError: If its small data sets or its table are not those of a cache.
    """
    check_kinds(container)
    identity = read_json(container, "identity")
    text = container.read("identity").item()
    if hashlib.sha256(text).hexdigest() != container.fingerprint:
        raise damaged(container, "identity", "the fingerprint's", "another")
    task = str(container.read("task").item().decode("utf-8", "replace"))
    check_table(container, task)
    classes = tuple(read_texts(container, "classes"))
    check_classes(container, classes)
    cache = Cache(
        path=container.path,
        identity=identity,
        provenance=read_json(container, "provenance"),
        classes=classes,
        task=task,
        splits={
            s: CacheSplit(container, s)
            for s in SPLITS
            if f"splits/{s}/features" in container.arrays
        },
        failures=read_failures(container, len(classes)),
        container=container,
    )
    for name, split in cache.splits.items():
        check_targets(container, name, split.targets, len(classes))
    return cache


def is_content(name: str) -> bool:
    """Whether ``content_sha256`` covers the array of this name."""
    return name in {"identity", "classes"} or (
        name.startswith("splits/") and name.endswith(("/features", "/targets", "/paths"))
    )


def read_failures(container: Container, num_classes: int) -> tuple[Failure, ...]:
    """Return the failures in a container, or raise ``CacheError``."""
    texts = [read_texts(container, f"failures/{k}") for k in ("paths", "splits", "reasons")]
    numbers = [
        [int(n) for n in container.read(f"failures/{k}")]
        for k in ("targets", "image_bytes", "mtime_ns")
    ]
    if len({*map(len, texts), *map(len, numbers)}) > 1:
        raise damaged(container, "failures", "arrays of one length", "several")
    failures = tuple(
        Failure(path, split, target, reason, size, time)
        for path, split, reason, target, size, time in zip(*texts, *numbers, strict=True)
    )
    for failure in failures:
        if failure.split not in SPLITS or not -1 <= failure.target < num_classes:
            wanted = f"a split, and a target from -1 to {num_classes - 1}"
            found = f"{failure.split!r:.40} and {failure.target}"
            raise damaged(container, "failures", wanted, found)
    return failures


def warn_of_leaks(cache: Cache) -> None:
    """Warn when an image or a group stands in two splits: the figures would flatter the head."""
    images = {
        name: [row.tobytes() if row.any() else None for row in split.image_sha256]
        for name, split in cache.splits.items()
    }
    groups = {
        name: [group or None for group in split.groups or []]
        for name, split in cache.splits.items()
    }
    for what, keys_by_split in (("image", images), ("group", groups)):
        seen: dict[object, tuple[str, str]] = {}
        shared: dict[object, str] = {}
        for name, keys in keys_by_split.items():
            for key, path in zip(keys, cache.splits[name].paths, strict=False):
                other, other_path = seen.setdefault(key, (name, path))
                if other != name and key is not None:
                    shared.setdefault(key, f"{other}: {other_path} and {name}: {path}")
        if shared:
            message = (
                f"in more than one split: {count(len(shared), what)}, for example "
                f"{next(iter(shared.values()))}; results will look better than they are"
            )
            warn_user(printable(message))
