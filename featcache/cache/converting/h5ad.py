"""Tables of rows as h5ad, the files of AnnData: X, obs, and the JSON object in uns.

Written and read by h5py alone, after AnnData's published layout, so that neither needs AnnData.

Reads: h5ad files, which anybody may have made. Writes: bytes of such files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.cache.converting.rows import (
    METADATA,
    TEXTS,
    RowTable,
    check_features,
    is_column,
    require_room,
    wrong,
)
from featcache.errors import DataError

_CATEGORIES = ("split", "target", "group")
_ARRAY, _STRINGS = ("array", "0.2.0"), ("string-array", "0.2.0")
_EMPTY_GROUPS = ("layers", "obsm", "obsp", "varm", "varp")


def write_h5ad(table: RowTable, file: BinaryIO) -> None:
    """Write a table as h5ad; float16 becomes float32, which holds it exactly.

    The file is made in memory: libhdf5 must not be the one to meet a full disk.

    Raises:
        DataError: If a label has a / in its name.
    """
    import h5py

    odd = next((name for name in table.numbers if "/" in name), None)
    if odd is not None:
        raise DataError(
            f"column {odd}", expected="a name without /, which parts paths in HDF5", found="one",
            hint="Convert to another format",
        )  # fmt: skip
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as made:
        _mark(made, "anndata", "0.1.0")
        features = table.features.astype(np.float32, copy=False)
        _mark(made.create_dataset("X", data=features), *_ARRAY)
        columns = [name for name in (*table.texts, *table.numbers) if name != "path"]
        obs = _new_frame(made, "obs", "path", columns)
        _put_strings(obs, "path", table.texts["path"])
        for name, texts in table.texts.items():
            if name in _CATEGORIES:
                _put_categories(obs, name, texts)
            elif name != "path":
                _put_strings(obs, name, texts)
        for name, numbers in table.numbers.items():
            _mark(obs.create_dataset(name, data=numbers), *_ARRAY)
        var = _new_frame(made, "var", "_index", [])
        _put_strings(var, "_index", [f"f{i}" for i in range(features.shape[1])])
        for name in (*_EMPTY_GROUPS, "uns"):
            _mark(made.create_group(name), "dict", "0.1.0")
        text = made["uns"].create_dataset(METADATA, data=table.metadata or "", dtype=_text())
        _mark(text, "string", "0.2.0")
    file.write(buffer.getbuffer())


def _text() -> Any:
    import h5py

    return h5py.string_dtype()


def _mark(part: Any, kind: str, version: str) -> None:
    part.attrs["encoding-type"], part.attrs["encoding-version"] = kind, version


def _new_frame(made: Any, name: str, index: str, columns: Sequence[str]) -> Any:
    frame = made.create_group(name)
    _mark(frame, "dataframe", "0.2.0")
    frame.attrs["_index"] = index
    frame.attrs.create("column-order", np.array(columns, object), (len(columns),), _text())
    return frame


def _put_strings(frame: Any, name: str, texts: Sequence[str | None]) -> None:
    values = np.array([*(text or "" for text in texts), None], object)[:-1]
    _mark(frame.create_dataset(name, data=values, dtype=_text()), *_STRINGS)


def _put_categories(frame: Any, name: str, texts: Sequence[str | None]) -> None:
    categories = sorted({text for text in texts if text})
    numbers: dict[str | None, int] = {text: i for i, text in enumerate(categories)}
    group = frame.create_group(name)
    _mark(group, "categorical", "0.2.0")
    group.attrs["ordered"] = False
    codes = np.array([numbers.get(text, -1) for text in texts], np.int32)
    _mark(group.create_dataset("codes", data=codes), *_ARRAY)
    _put_strings(group, "categories", categories)


# -------------------------------------------------------------------------------------------- read


def read_h5ad(path: Path, most: float) -> RowTable:
    """Return the table in an h5ad file.

    To be called in a child process with limits: hostile HDF5 hangs or crashes libhdf5. No link is
    followed, and no data of other files.

    Raises:
        DataError: If it is no such table, or takes more than ``most`` bytes.
    """
    import h5py

    with h5py.File(path, "r") as file:
        reader = _Reader(h5py, path, most)
        features = reader.data(file, "X")
        check_features(features.dtype, features.shape, path)
        obs = reader.group(file, "obs")
        index = obs.attrs.get("_index", "_index")
        names = {name: name for name in obs if is_column(name)}
        names.setdefault("path", index if isinstance(index, str) else "_index")
        texts: dict[str, list[str | None]] = {}
        numbers: dict[str, npt.NDArray[Any]] = {}
        for name, key in names.items():
            if name in TEXTS:
                texts[name] = reader.texts(obs, key)
            else:
                numbers[name] = reader.numbers(obs, key)
        metadata = None
        if "uns" in file and METADATA in reader.group(file, "uns"):
            metadata = str(reader.strings(file["uns"], METADATA))
    return RowTable(features, texts, numbers, metadata or None)


class _Reader:
    """Reads data sets that lie in the file itself, and are no larger than memory is."""

    def __init__(self, h5py: Any, path: Path, most: float) -> None:
        self._h5py, self._path, self._left = h5py, path, most

    def _get(self, parent: Any, name: str, kind: Any, wanted: str) -> Any:
        if name not in parent:
            raise wrong("h5ad", self._path, f"{wanted} {name}", "none")
        is_here = isinstance(parent.get(name, getlink=True), self._h5py.HardLink)
        if not is_here or parent.get(name, getclass=True) is not kind:
            found = "another kind of part" if is_here else "a link"
            raise wrong(f"h5ad, {name}", self._path, wanted, found)
        return parent[name]

    def group(self, parent: Any, name: str) -> Any:
        """Return a group."""
        return self._get(parent, name, self._h5py.Group, "a group")

    def _open(self, parent: Any, name: str) -> Any:
        data = self._get(parent, name, self._h5py.Dataset, "a dense array")
        layout = data.id.get_create_plist()
        if data.is_virtual or layout.get_external_count():
            raise wrong(f"h5ad, {name}", self._path, "data in the file itself", "in other files")
        if data.shape is None:
            raise wrong(f"h5ad, {name}", self._path, "an array", "nothing")
        size = math.prod(data.shape) * data.dtype.itemsize
        require_room(f"h5ad, {name}", size, self._left, self._path)
        self._left -= size
        return data

    def data(self, parent: Any, name: str) -> npt.NDArray[Any]:
        """Return an array of numbers."""
        data = self._open(parent, name)
        if data.dtype.kind not in "fiub":
            raise wrong(f"h5ad, {name}", self._path, "numbers", data.dtype.name)
        array: npt.NDArray[Any] = data[()]
        return array

    def numbers(self, parent: Any, name: str) -> npt.NDArray[Any]:
        """Return a column of numbers; NaN where a nullable one has none."""
        if parent.get(name, getclass=True) is not self._h5py.Group:
            return self.data(parent, name)
        group = self.group(parent, name)
        values, mask = self.data(group, "values"), self.data(group, "mask")
        return np.where(mask.astype(bool), np.nan, values).astype("<f4")

    def strings(self, parent: Any, name: str) -> Any:
        """Return an array of strings, or one."""
        data = self._open(parent, name)
        if self._h5py.check_string_dtype(data.dtype) is None:
            raise wrong(f"h5ad, {name}", self._path, "strings", data.dtype.name)
        return data.asstr(errors="surrogateescape")[()]

    def texts(self, parent: Any, name: str) -> list[str | None]:
        """Return a column of strings or categories."""
        if parent.get(name, getclass=True) is not self._h5py.Group:
            return [str(text) for text in self._column(parent, name)]
        group = self.group(parent, name)
        if "codes" in group:
            codes = self.data(group, "codes").reshape(-1)
            names: list[str | None] = [*map(str, self._column(group, "categories")), None]
            if len(codes) and not -1 <= codes.min() <= codes.max() < len(names) - 1:
                raise wrong(f"h5ad, {name}", self._path, "codes of categories", "others")
            return [names[code] for code in codes.tolist()]
        mask = self.data(group, "mask").reshape(-1).tolist()
        values = self._column(group, "values")
        return [None if no else str(text) for text, no in zip(values, mask, strict=False)]

    def _column(self, parent: Any, name: str) -> list[Any]:
        texts = self.strings(parent, name)
        return list(texts) if getattr(texts, "ndim", 0) == 1 else [texts]
