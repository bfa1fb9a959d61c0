"""Tables of rows in files of plain arrays: npz and safetensors. Nothing in them is pickled.

Reads: npz and safetensors files, which anybody may have made. Writes: bytes of such files.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.cache.contents import decode_texts
from featcache.cache.converting.rows import (
    MAX_METADATA_BYTES,
    METADATA,
    TEXT_BYTES,
    TEXTS,
    RowTable,
    check_features,
    is_column,
    require_room,
    wrong,
)
from featcache.errors import DataError
from featcache.untrusted import open_regular

_MAX_HEADER = 10_000  # characters of a header of .npy
_MAX_MEMBERS = 100_000

Arrays = dict[str, npt.NDArray[Any]]


def _text_array(name: str, texts: Sequence[str | None], kind: str) -> npt.NDArray[Any]:
    """Return texts as an array of fixed width: every text takes the room of the longest."""
    values = [text or "" for text in texts]
    if kind == "U":
        width, each = max(map(len, values), default=0), 4
    else:
        encoded = [value.encode() for value in values]
        width, each = max(map(len, encoded), default=0), 1
    if width * each * len(values) > max(1 << 28, 64 * sum(map(len, values))):
        raise DataError(
            name, expected="texts of about one length, as an array takes the longest for all",
            found=f"one of {width:,} characters among {len(values):,}",
            hint="Convert to another format",
        )  # fmt: skip
    if kind == "U":
        return np.array(values, f"U{max(width, 1)}")
    array = np.array(encoded, f"S{max(width, 1)}")
    return array.view(np.uint8).reshape(len(values), max(width, 1))


# --------------------------------------------------------------------------------------------- npz


def write_npz(table: RowTable, file: BinaryIO) -> None:
    """Write a table as npz: texts as arrays of strings, empty where there is none."""
    arrays: Arrays = {"features": table.features}
    arrays |= {name: _text_array(name, texts, "U") for name, texts in table.texts.items()}
    arrays |= table.numbers
    arrays[METADATA] = np.array(table.metadata or "")
    # Not np.savez: a column may be called "file", as may a label.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def read_npz(path: Path, most: float) -> RowTable:
    """Return the table in an npz file.

    Raises:
        DataError: If it is damaged, holds pickles, or takes more than ``most`` bytes.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > _MAX_MEMBERS or len({m.filename for m in members}) < len(members):
                raise wrong("npz", path, "different arrays", "too many, or one twice")
            arrays: Arrays = {}
            left = most
            for member in members:
                name = member.filename.removesuffix(".npy")
                if is_column(name) or name in {"features", "classes", METADATA}:
                    require_room(f"array {name}", member.file_size, left, path)
                    left -= member.file_size
                    with archive.open(member) as stream:
                        arrays[name] = _read_member(name, stream, member.file_size, path)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        # NotImplementedError: a compression or version; RuntimeError: an encrypted member
        raise wrong("npz", path, "a whole file of arrays", f"{error}"[:200]) from error
    return _as_table(arrays, path, most, lambda name: _strings(arrays, name, path))


def _read_member(name: str, stream: Any, size: int, path: Path) -> npt.NDArray[Any]:
    """Return one array; its size is known before memory is taken, and nothing is unpickled."""
    what = f"array {name}"
    try:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise wrong(what, path, "version 1 or 2 of .npy", version)
        shape, is_fortran, dtype = readers[version](stream, max_header_size=_MAX_HEADER)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise wrong(what, path, "a header of .npy", str(error)[:100]) from error
    if dtype.hasobject or dtype.kind not in "fiubUS" or dtype.itemsize == 0:
        raise wrong(
            what, path, "numbers or strings of fixed width", f"{dtype.name}"[:60],
            "Pickled objects are never read: save strings as numpy.array(names, dtype=str)",
        )  # fmt: skip
    if len(shape) > 2 or any(n < 0 for n in shape):
        raise wrong(what, path, "one or two dimensions", str(shape)[:60])
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > size:  # of the member, which fits into memory
        raise wrong(what, path, f"{wanted:,} bytes, as its header says", f"{size:,}")
    data = stream.read(wanted)
    if len(data) != wanted:
        raise wrong(what, path, f"{wanted:,} bytes, as its header says", f"{len(data):,}")
    stream.read(1)  # the checksum is compared at the end
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)


def _strings(arrays: Arrays, name: str, path: Path) -> list[str]:
    array = arrays[name]
    if array.dtype.kind == "S":
        return decode_texts(array.reshape(-1).tolist())
    if array.dtype.kind != "U":
        raise wrong(f"array {name}", path, "strings", array.dtype.name)
    try:
        return [str(text) for text in array.reshape(-1).tolist()]
    except (ValueError, UnicodeError) as error:  # no such characters
        raise wrong(f"array {name}", path, "strings", str(error)[:100]) from error


# ------------------------------------------------------------------------------------- safetensors


def write_safetensors(table: RowTable, file: BinaryIO) -> None:
    """Write a table as safetensors: texts as UTF-8 bytes (N, W), filled up with zeros."""
    from safetensors.numpy import save

    arrays: Arrays = {"features": np.ascontiguousarray(table.features)}
    arrays |= {name: _text_array(name, texts, "S") for name, texts in table.texts.items()}
    arrays |= {name: np.ascontiguousarray(array) for name, array in table.numbers.items()}
    file.write(save(arrays, metadata={METADATA: table.metadata or ""}))


def read_safetensors(path: Path, most: float) -> RowTable:
    """Return the table in a safetensors file.

    Raises:
        DataError: If it is damaged, or takes more than ``most`` bytes.
    """
    from safetensors import SafetensorError, safe_open

    with open_regular(path) as file:
        require_room("file", file.seek(0, io.SEEK_END), most, path)
    arrays: Arrays = {}
    try:
        with safe_open(path, framework="numpy") as opened:  # lengths are checked by the library
            metadata = (opened.metadata() or {}).get(METADATA)
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if is_column(name) or name == "features":
                    arrays[name] = opened.get_tensor(name)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        found = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise wrong("safetensors", path, "a whole file of arrays", found) from error
    if metadata is not None:
        arrays[METADATA] = np.array(metadata)
    return _as_table(arrays, path, most, lambda name: _bytes(arrays, name, path))


def _bytes(arrays: Arrays, name: str, path: Path) -> list[str]:
    array = arrays[name]
    if name == METADATA:
        return [str(array)]
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] == 0:
        found = f"{array.dtype.name} {array.shape}"
        raise wrong(f"array {name}", path, "UTF-8 bytes, uint8 (N, W)", found)
    width = array.shape[1]
    return decode_texts(np.ascontiguousarray(array).view(f"S{width}").reshape(-1).tolist())


# -------------------------------------------------------------------------------------------- both


def _as_table(
    arrays: Arrays, path: Path, most: float, read_texts: Callable[[str], list[str]]
) -> RowTable:  # fmt: skip
    for name in ("features", "path"):
        if name not in arrays:
            found = ", ".join(sorted(arrays)[:5]) or "none of featcache's"
            raise wrong("arrays", path, "features and path", found)
    features = arrays["features"]
    check_features(features.dtype, features.shape, path)
    num_bytes = sum(a.nbytes for a in arrays.values())
    num_bytes += sum(TEXT_BYTES * len(arrays[n]) for n in TEXTS if n in arrays and arrays[n].ndim)
    require_room("table", num_bytes, most, path)
    texts: dict[str, list[str | None]] = {}
    for name in TEXTS:
        array = arrays.get(name)
        if name == "target" and array is not None and array.ndim == 1 and array.dtype.kind in "iu":
            classes = read_texts("classes") if "classes" in arrays else []
            texts[name] = _class_names(array, classes, path)
        elif array is not None:
            texts[name] = [*read_texts(name)]
    numbers = {n: a for n, a in arrays.items() if is_column(n) and n not in TEXTS}
    for name, array in numbers.items():
        if array.ndim != 1 or array.dtype.kind not in "fiub":
            raise wrong(f"array {name}", path, "numbers (N,)", f"{array.dtype.name} {array.shape}")
    metadata = read_texts(METADATA)[0] if METADATA in arrays else None
    if metadata is not None and len(metadata) > MAX_METADATA_BYTES:
        raise wrong(METADATA, path, f"at most {MAX_METADATA_BYTES:,} bytes", f"{len(metadata):,}")
    return RowTable(features, texts, numbers, metadata or None)


def _class_names(
    targets: npt.NDArray[Any], classes: Sequence[str], path: Path
) -> list[str | None]:  # fmt: skip
    """Return the names of numbers in [0, C), None for -1."""
    if targets.ndim != 1 or (
        len(targets) and not -1 <= targets.min() <= targets.max() < len(classes)
    ):
        found = f"numbers {targets.shape} for {len(classes)} names"
        raise wrong("target", path, "names, or numbers into an array classes of names", found)
    names: list[str | None] = [*classes, None]
    return [names[number] for number in targets.tolist()]
