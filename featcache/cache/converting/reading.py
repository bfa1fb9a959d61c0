"""Read a table of rows, whatever its format; those of large C libraries in a child process.

libhdf5 and Arrow may hang or crash on a hostile file. The child has limits on memory and time, and
what it says is read as a stranger's word.

Reads: files of rows, which anybody may have made. Writes: nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.cache.converting.arrays import (
    read_npz,
    read_safetensors,
    write_npz,
    write_safetensors,
)
from featcache.cache.converting.h5ad import read_h5ad, write_h5ad
from featcache.cache.converting.rows import (
    MAX_METADATA_BYTES,
    METADATA,
    TEXTS,
    RowTable,
    check_features,
    is_column,
    require_room,
    room,
    wrong,
)
from featcache.cache.converting.tables import (
    read_csv_table,
    read_parquet,
    write_csv_table,
    write_parquet,
)
from featcache.errors import ConfigError, DataError
from featcache.files import child_process
from featcache.untrusted import find_fault, open_regular, parse_json_object, reading_hint

_CHILD_BYTES = 4 << 30  # of libraries and their buffers, beside the table
_CHILD_SECONDS = 120  # of computing, and a second for each so many bytes:
_BYTES_PER_SECOND = 4 << 20


@dataclass(frozen=True)
class Format:
    """How a format is written and read.

    Attributes:
        name: For messages.
        write: Writes a table into a file.
        read: Returns the table in a file that takes at most so many bytes.
        isolated: Whether it is read in a child process.
        package: What has to be installed for it, empty where nothing.
    """

    name: str
    write: Callable[[RowTable, BinaryIO], None]
    read: Callable[[Path, float], RowTable]
    isolated: bool = False
    package: str = ""


FORMATS = {
    ".npz": Format("npz", write_npz, read_npz),
    ".safetensors": Format("safetensors", write_safetensors, read_safetensors),
    ".parquet": Format("Parquet", write_parquet, read_parquet, isolated=True, package="pyarrow"),
    ".h5ad": Format("h5ad", write_h5ad, read_h5ad, isolated=True),
    ".csv": Format("CSV", write_csv_table, read_csv_table),
}


def require_package(made: Format) -> None:
    """Refuse a format whose package is not installed.

    Raises:
        ConfigError: If so.
    """
    if made.package and importlib.util.find_spec(made.package) is None:
        raise ConfigError(
            made.name, expected=f"the package {made.package}", found="none",
            hint="pip install 'featcache[formats]'",
        )  # fmt: skip


def read_table_of_rows(path: Path, ending: str) -> RowTable:
    """Return the table in a file of the format with this ending.

    Raises:
        DataError: If there is none, or it is damaged, or no such table, or larger than memory.
        ConfigError: If a package is not installed.
    """
    made = FORMATS[ending]
    require_package(made)
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
        table = (
            _read_isolated(path, ending, size) if made.isolated else made.read(path, room())
        )  # fmt: skip
    except OSError as error:
        raise wrong(
            made.name, path, "a file that can be read", error.strerror or error,
            reading_hint(error, ""),
        ) from error  # fmt: skip
    except MemoryError as error:
        raise wrong(made.name, path, "enough memory for it", "too little") from error
    _check_lengths(table, path)
    return table


def _check_lengths(table: RowTable, path: Path) -> None:
    num_rows = len(table.features)
    for name, column in (*table.texts.items(), *table.numbers.items()):
        if len(column) != num_rows:
            raise wrong(f"column {name}", path, f"{num_rows:,} rows", f"{len(column):,}")
        if name in TEXTS:
            faults = (find_fault(text) for text in dict.fromkeys(column) if text)
            if fault := next(filter(None, faults), None):
                raise wrong(f"column {name}", path, "names in UTF-8, without NUL", fault)


# --------------------------------------------------------------------------------- a child process


def _read_isolated(path: Path, ending: str, size: int) -> RowTable:
    name, most = FORMATS[ending].name, room()
    command, environment = child_process("featcache.cache.converting.reading")
    environment |= {"HDF5_USE_FILE_LOCKING": "FALSE", "HDF5_PLUGIN_PRELOAD": "::"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    limit = "inf" if math.isinf(most) else str(int(most))
    seconds = str(_CHILD_SECONDS + size // _BYTES_PER_SECOND)
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [*command, str(path.absolute()), ending, limit, seconds], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
        )  # fmt: skip
        try:
            assert child.stdout is not None
            with child.stdout:
                answer = _receive(child.stdout, most, path)
            code = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if answer is not None and code == 0:
            return answer
        complaints.seek(0)
        lines = complaints.read(1 << 20).decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "no message"
    if -code in {getattr(signal, n, None) for n in ("SIGXCPU", "SIGKILL")}:
        reason = f"no answer within {seconds} s of computing"
    found = f"one that its library cannot read (exit {code}): {reason:.160}"
    raise wrong(name, path, f"a whole {name} file", found)


def _receive(stream: IO[bytes], most: float, path: Path) -> RowTable | None:
    """Return the table that the child sends, None if it sends none; raise the error it names."""
    size = int.from_bytes(stream.read(8), "little")
    require_room("texts", 4 * size, most, path)  # a short one takes more as an object
    data = stream.read(size)
    if not data or len(data) < size:
        return None
    try:
        facts = parse_json_object(data)
        if "error" in facts:
            what, expected, found, hint = map(str, facts["error"])
            raise DataError(what, expected=expected, found=found, where=path, hint=hint)
        texts = {str(k): list(v) for k, v in facts["texts"].items() if k in TEXTS}
        features = _take(stream, facts["features"], most, path)
        numbers = {
            str(name): _take(stream, facts["numbers"][name], most, path)
            for name in facts["numbers"] if is_column(name)
        }  # fmt: skip
        pieces = facts["metadata"]
        metadata = None if pieces is None else "".join(map(str, pieces))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise wrong("file", path, "a table of rows", str(error)[:100]) from error
    check_features(features.dtype, features.shape, path)
    if not all(t is None or isinstance(t, str) for column in texts.values() for t in column):
        raise wrong("file", path, "columns of texts", "others")
    return RowTable(features, texts, numbers, metadata)


def _take(stream: IO[bytes], told: Any, most: float, path: Path) -> npt.NDArray[Any]:
    dtype, shape = np.dtype(str(told[0])), tuple(int(n) for n in told[1])
    if dtype.kind not in "fiub" or len(shape) > 2 or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} {shape}")
    size = math.prod(shape) * dtype.itemsize
    require_room("table", size, most, path)
    array: npt.NDArray[Any] = np.empty(shape, dtype)
    view = array.reshape(-1).view(np.uint8).data
    position = 0
    while position < size:
        count = stream.readinto(view[position:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("a child process that ended early")
        position += count
    return array


_PIECE = 1 << 19  # characters of the JSON object in one text, whose length is limited


def _send(path: Path, ending: str, most: float, stream: BinaryIO) -> None:
    """Send the table in a file, or the error it raises."""
    table: RowTable | None = None
    try:
        table = FORMATS[ending].read(path, most)
        if table.metadata is not None and len(table.metadata) > MAX_METADATA_BYTES:
            raise wrong(METADATA, path, f"at most {MAX_METADATA_BYTES:,} bytes", "more")
        arrays = {"features": table.features} | dict(table.numbers)
        facts: dict[str, Any] = {
            "texts": {name: list(texts) for name, texts in table.texts.items()},
            "features": _describe(table.features),
            "numbers": {name: _describe(array) for name, array in table.numbers.items()},
            "metadata": _pieces(table.metadata),
        }
    except (DataError, ConfigError) as error:
        arrays = {}
        facts = {"error": [str(error.what), str(error.expected), str(error.found), error.hint]}
    data = json.dumps(facts).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def _describe(array: npt.NDArray[Any]) -> list[Any]:
    return [array.dtype.str, list(array.shape)]


def _pieces(text: str | None) -> list[str] | None:
    return None if text is None else [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]


def _limit_resources(most: float, seconds: int) -> None:
    with contextlib.suppress(ImportError):
        import resource

        if math.isfinite(most):
            num_bytes = int(2 * most) + _CHILD_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main(path: str, ending: str, most: str, seconds: str) -> None:
    _limit_resources(float(most), int(seconds))
    _send(Path(path), ending, float(most), sys.stdout.buffer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
