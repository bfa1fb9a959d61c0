"""One split of an open cache: its features, targets, paths and the rest, read on use.

Reads: open caches. Module ``reading`` opens them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.container import ArrayReader, Container, open_container
from featcache.cache.contents import read_texts
from featcache.errors import CacheError

if TYPE_CHECKING:
    import torch


class CacheSplit:
    """One split of an open cache: a map-style data set that also gives its arrays whole.

    A torch ``DataLoader`` takes it as it is. Only taking rows as tensors imports torch.

    Survives pickling, fork and spawn: a copy reopens the file by name and insists that it is
    still the same one.
    """

    __module__ = "featcache"

    def __init__(self, container: Container, name: str) -> None:
        self.name = name
        self._container = container

    def __repr__(self) -> str:
        return f"CacheSplit({self.name} of {self._container.path.name}: {self.dtype} {self.shape})"

    def _read(self, name: str) -> npt.NDArray[Any]:
        array = self._container.read(f"splits/{self.name}/{name}")
        array.flags.writeable = False
        return array

    @cached_property
    def features(self) -> npt.NDArray[Any]:
        """(N, D) or (N, V, D) float32 or float16, a read-only view of the file.

        The file is mapped into memory: if somebody cuts it off while rows are read from here, the
        system ends the process (SIGBUS). ``read_features`` and ``open_features`` raise an error
        then, and so does all that featcache itself does with a cache.
        """
        return self._container.map(f"splits/{self.name}/features")

    @property
    def plain_features(self) -> npt.NDArray[Any]:
        """(N, D), view 0 of every row: the image as it is. A read-only view of the file."""
        return self.features if self.features.ndim == 2 else self.features[:, 0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D) or (N, V, D), of the features."""
        return self._container.arrays[f"splits/{self.name}/features"].shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float16, of the features."""
        return self._container.arrays[f"splits/{self.name}/features"].dtype

    @property
    def num_views(self) -> int:
        """V, 1 where every row is one vector."""
        return 1 if len(self.shape) == 2 else self.shape[1]

    @cached_property
    def targets(self) -> npt.NDArray[Any]:
        """(N,) int64, -1 = unlabelled; (N, C) float32 for ``multilabel``, NaN = unknown."""
        return self._read("targets")

    @cached_property
    def paths(self) -> list[str]:
        """N strings, ``/``-separated; bytes that are not UTF-8 are surrogate-escaped."""
        return read_texts(self._container, f"splits/{self.name}/paths")

    @cached_property
    def groups(self) -> list[str] | None:
        """N strings, or None when the cache has no groups."""
        name = f"splits/{self.name}/groups"
        return read_texts(self._container, name) if name in self._container.arrays else None

    @cached_property
    def image_sha256(self) -> npt.NDArray[np.uint8]:
        """(N, 32) uint8, zeros where unknown."""
        return self._read("image_sha256")

    @cached_property
    def image_bytes(self) -> npt.NDArray[np.int64]:
        """(N,) int64, sizes of the image files."""
        return self._read("image_bytes")

    @cached_property
    def mtime_ns(self) -> npt.NDArray[np.int64]:
        """(N,) int64, modification times of the image files."""
        return self._read("mtime_ns")

    @cached_property
    def row_crc32(self) -> npt.NDArray[np.int64] | None:
        """(N,) int64, a checksum of each row, or None when the cache has none."""
        has_checksums = f"splits/{self.name}/row_crc32" in self._container.arrays
        return self._read("row_crc32") if has_checksums else None

    def read_features(self) -> npt.NDArray[Any]:
        """Return the features as an array in memory, read at the speed of the disk."""
        return self._container.read(f"splits/{self.name}/features")

    def read_rows(self, rows: npt.NDArray[np.int64], num_views: int = 1) -> npt.NDArray[Any]:
        """Return the features of some rows (n,), in memory: (n, num_views, D) of the first views.

        Of one view (n, D).
        """
        numbers = rows[:, None] * self.num_views + np.arange(num_views)
        vectors = self.open_features(as_vectors=True).take(numbers.reshape(-1))
        return vectors if num_views == 1 else vectors.reshape(len(rows), num_views, -1)

    def open_features(self, *, as_vectors: bool = False) -> ArrayReader:
        """Return what reads the features row by row, for those larger than memory.

        Args:
            as_vectors: Read (N, V, D) as (N * V, D).
        """
        name = f"splits/{self.name}/features"
        return ArrayReader(self._container, name, as_vectors=as_vectors)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        """Return (features (D,) or (V, D) float32, target) of one row."""
        import torch

        target = self.targets[index]
        return torch.from_numpy(self.features[index].astype(np.float32)), (
            int(target) if target.ndim == 0 else torch.from_numpy(target.copy())
        )

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, Any]]:
        """Return several rows with one gather: what a torch ``DataLoader`` calls."""
        import torch

        features = torch.from_numpy(self.features[list(indices)].astype(np.float32, copy=False))
        targets = torch.from_numpy(self.targets[list(indices)])
        return [
            (row, int(target) if target.ndim == 0 else target)
            for row, target in zip(features, targets, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "container": self._container}

    def __setstate__(self, state: dict[str, Any]) -> None:
        container: Container = state["container"]
        again = open_container(container.path, verify=False)
        if again.payload_sha256 != container.payload_sha256:
            raise CacheError(
                "cache", expected=f"payload sha256 {container.payload_sha256[:16]}...",
                found=f"{again.payload_sha256[:16]}...", where=container.path,
                hint="It was replaced while in use: open it again",
            )  # fmt: skip
        self.__init__(again, state["name"])  # type: ignore[misc]
