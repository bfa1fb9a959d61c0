"""List the images of Parquet files: their names, classes, splits, groups, and where they lie.

Arrow is a large library of C++ and may crash on a hostile file. So a child process reads the files'
descriptions and texts, and what it says is checked like a stranger's word.

Reads: Parquet files: of images their sizes, and what has to be unpacked to find them. Writes:
nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.data.blobs import Blob, ReadAt, blob_from_json
from featcache.data.folders import SPLIT_OF_FOLDER
from featcache.data.listing import Listing
from featcache.data.parquet_columns import Refusal, choose_columns, name_classes, read_texts
from featcache.data.parquet_pages import Chunk, Page, Places, Unpack, locate_values
from featcache.errors import ConfigError, DataError
from featcache.files import child_process
from featcache.untrusted import find_fault, parse_json_object

_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd",
           "LZ4": "lz4_raw"}  # fmt: skip
_MAX_ROWS = 100_000_000
_FREE_ROWS, _ROW_BYTES = 1 << 16, 16  # a file may have so many rows, and one more for such bytes
_LEAST_SECONDS, _SLOW_BYTES = 120.0, 1e6  # for a file, and how many of its bytes take a second more
_PIECE = 1 << 19  # characters of the JSON in one text, whose length is limited
_NO_PATHS = "every image has a path and no bytes"


@dataclass(frozen=True)
class ParquetRows:
    """The rows of a Parquet file.

    Args:
        names: Of each row the path beside its bytes, "" for none.
        targets: Of each row its class, "" if it is unlabelled; empty where no column has classes.
        splits: Of each row, as written there; empty where no column has them.
        groups: Of each row; empty where no column has them.
        labelled_by: The column of the classes, "" for none.
        unused: Columns that are not used.
        codec: What pages are packed by, as Arrow calls it; "" for nothing.
        places: Where the images lie.
    """

    names: Sequence[str]
    targets: Sequence[str]
    splits: Sequence[str]
    groups: Sequence[str]
    labelled_by: str
    unused: Sequence[str]
    codec: str
    places: Places


def unpacker(codec: str) -> Unpack | None:
    """Return what unpacks the pages of a codec, as Arrow calls it; None for ""."""
    if not codec:
        return None
    import pyarrow as pa

    made = pa.Codec(codec)

    def unpack(data: bytes, num_bytes: int) -> bytes:
        try:
            return bytes(made.decompress(data, num_bytes, asbytes=True))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"a damaged page: {error!s:.80}") from error

    return unpack


# -------------------------------------------------------------------------------- the child process


def _index(file: BinaryIO, num_bytes: int, request: Mapping[str, Any]) -> ParquetRows:
    """Return the rows of an open file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        num_rows = metadata.num_rows
        if not 0 <= num_rows <= (most := _most_rows(num_bytes)):
            raise Refusal(
                "Parquet", f"at most {most:,} rows in {num_bytes:,} bytes", f"{num_rows:,}",
                "Rows of no image, or of one image again and again, are no data set: leave it out",
            )  # fmt: skip
        columns = choose_columns(schema, request)
        leaf = columns["image"] + ("" if columns["path_in"] is None else ".bytes")

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        codec, places = _locate(parquet, leaf, num_bytes, read)
        path = columns["path"]
        if path is None and columns["path_in"]:
            path = columns["image"] + ".path"
        found = {
            key: read_texts(parquet, name, num_rows, num_bytes)
            for key, name in (("path", path), ("split", columns["split"]),
                              ("group", columns["group"]), ("target", columns["target"]))
            if name
        }  # fmt: skip
        targets = found.get("target", [])
        if columns["target"]:
            targets = name_classes(targets, columns["names"], columns["target"])
        if len(places.size) and (places.size < 0).all():
            has_paths = any(found.get("path", []))
            hint = "Write it with the bytes: datasets' to_parquet or push_to_hub embeds them"
            raise Refusal("images", "bytes", _NO_PATHS if has_paths else "nulls only", hint)
    return ParquetRows(
        [str(text or "") for text in found.get("path", [])], [t or "" for t in targets],
        [str(text or "").strip() for text in found.get("split", [])],
        [str(text or "").strip() for text in found.get("group", [])],
        _describe_target(columns), columns["unused"], codec, places,
    )  # fmt: skip


def _most_rows(num_bytes: int) -> int:
    """Return the most rows that a file of so many bytes may have: each takes memory, 900 bytes.

    No image is as small as 16 bytes, but a null, or one of a dictionary, takes less than a bit.
    """
    return min(_MAX_ROWS, max(_FREE_ROWS, num_bytes // _ROW_BYTES))


def _describe_target(columns: Mapping[str, Any]) -> str:
    if not columns["target"]:
        return ""
    return f"column {columns['target']!r}" + (" (ClassLabel)" if columns["names"] else "")


def _locate(parquet: Any, leaf: str, num_bytes: int, read: ReadAt) -> tuple[str, Places]:
    """Return the codec of the column of images, and where they lie in the file."""
    schema, metadata = parquet.schema, parquet.metadata
    number = next((i for i in range(len(schema)) if schema.column(i).path == leaf), None)
    if number is None:
        raise Refusal("images", "a column of bytes", f"no column {leaf}")
    column = schema.column(number)
    if column.physical_type != "BYTE_ARRAY" or column.max_repetition_level:
        found = f"{column.physical_type}, in lists" if column.max_repetition_level else ""
        raise Refusal("images", "a column of bytes", found or column.physical_type)
    codec, pages, parts, total = "", list[Page](), [], 0
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(number)
        compression = chunk.compression
        if compression not in {*_CODECS, "UNCOMPRESSED"}:
            raise Refusal("Parquet", "pages packed by " + ", ".join(_CODECS), compression,
                           "Write it again with zstd, or without compression")  # fmt: skip
        this = _CODECS.get(compression, "")
        if total and this != codec:
            raise Refusal("Parquet", "one compression of all images", f"{codec} and {this}")
        codec, start = this, chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            start = min(start, chunk.dictionary_page_offset)
        end = start + chunk.total_compressed_size
        rows = metadata.row_group(group).num_rows
        if not rows:
            continue
        if not 0 < start <= end <= num_bytes or chunk.num_values != rows:
            raise Refusal("Parquet", "a whole file", "a column that leads out of it")
        levels = column.max_definition_level
        try:
            places = locate_values(Chunk(read, start, end, rows, levels, unpacker(codec)))
        except IndexError as error:
            raise ValueError("a page that is damaged") from error
        parts.append((places.page + len(pages), places.offset, places.size))
        pages += places.pages
        total += rows
    if total != metadata.num_rows:
        raise Refusal("Parquet", f"{metadata.num_rows:,} rows", f"{total:,}")
    none = (np.empty(0, np.int64),) * 3
    columns = [np.concatenate(part) for part in zip(none, *parts, strict=True)]
    return codec, Places(pages, *columns)


def _answer(request: Mapping[str, Any]) -> tuple[dict[str, Any], list[npt.NDArray[np.int64]]]:
    """Return the facts of a file and its arrays, or what is wrong with it."""
    import pyarrow as pa

    file = blob_from_json(request["file"])
    whole = "a whole Parquet file"
    try:
        with file.open() as opened:
            rows = _index(opened, file.num_bytes, request)
    except Refusal as refusal:
        return {"error": refusal.parts}, []
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        # of corrupt bytes Arrow's messages have several lines
        reason = str(getattr(error, "strerror", None) or error).splitlines() or [""]
        return {"error": ["Parquet", whole, f"{reason[0]:.200}", "Copy or download it again"]}, []
    except MemoryError:
        return {"error": ["Parquet", whole, "one that takes more memory than there is", ""]}, []
    places = rows.places
    texts = (rows.names, rows.targets, rows.splits, rows.groups)
    facts = {
        "texts": [_pieces(json.dumps(list(column))) for column in texts],
        "labelled_by": rows.labelled_by, "unused": list(rows.unused), "codec": rows.codec,
        "num_pages": len(places.pages), "num_rows": len(places.size),
    }  # fmt: skip
    pages = np.array([*places.pages], np.int64).reshape(-1, 3)
    return facts, [pages, places.page, places.offset, places.size]


def _pieces(text: str) -> list[str]:
    return [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    for line in requests:
        facts, arrays = _answer(parse_json_object(line))
        data = json.dumps(facts).encode()
        answers.write(len(data).to_bytes(8, "little") + data)
        for array in arrays:
            answers.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        answers.flush()


# ------------------------------------------------------------------------------------- its parent


def index_files(files: Sequence[Blob], listing: Listing) -> Iterator[ParquetRows]:
    """Yield the rows of each file.

    Raises:
        DataError: If one is no whole Parquet file with images.
        ConfigError: If pyarrow is not installed.
    """
    require_pyarrow()
    command, environment = child_process("featcache.data.parquet_index")
    environment |= {"OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
    options = {
        "columns": dict(listing.columns), "ignore_columns": list(listing.ignore_columns),
        "no_classes": listing.no_classes,
    }  # fmt: skip
    if any(file.place.startswith("memory:") for file in files):  # of this process alone
        yield from _index_here(files, options)
        return
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=complaints,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for file in files:
                request = {"file": file.as_json()} | options
                with contextlib.suppress(BrokenPipeError):  # it has died: said below
                    child.stdin.write(json.dumps(request).encode() + b"\n")
                    child.stdin.flush()
                seconds = _LEAST_SECONDS + file.num_bytes / _SLOW_BYTES
                timer = threading.Timer(seconds, child.kill)
                timer.start()
                try:
                    rows = _receive(child.stdout, file)
                finally:
                    is_late = not timer.is_alive()
                    timer.cancel()
                if rows is None and is_late:
                    raise DataError(
                        "Parquet", expected=f"a file whose rows are listed in {seconds:,.0f} s",
                        found="no answer by then", where=file.place,
                        hint="Copy it to a faster disk, write it again in row groups of 1,000 "
                        "rows, or leave it out with --exclude",
                    )  # fmt: skip
                if rows is None:
                    child.kill()
                    complaints.seek(0)
                    lines = complaints.read(1 << 20).decode(errors="replace").strip().splitlines()
                    found = f"one that its library cannot read (exit {child.wait()})"
                    found += f": {lines[-1]:.160}" if lines else ""
                    raise DataError(
                        "Parquet", expected="a whole Parquet file", found=found, where=file.place
                    )
                yield rows
        finally:
            child.kill()
            child.wait()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            child.stdout.close()


def _index_here(files: Sequence[Blob], options: Mapping[str, Any]) -> Iterator[ParquetRows]:
    for file in files:
        requests = io.BytesIO(json.dumps({"file": file.as_json(), **options}).encode())
        answers = io.BytesIO()
        _serve(requests, answers)
        answers.seek(0)
        rows = _receive(answers, file)
        assert rows is not None
        yield rows


def require_pyarrow() -> None:
    """Refuse to read Parquet where pyarrow is not installed.

    Raises:
        ConfigError: If so.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "Parquet", expected="the package pyarrow", found="none",
            hint="pip install 'featcache[parquet]'",
        )  # fmt: skip


def _receive(stream: IO[bytes], file: Blob) -> ParquetRows | None:
    """Return what the child sends of a file; None if it sends nothing."""
    size = int.from_bytes(stream.read(8), "little")
    data = stream.read(size) if size else b""
    if not data or len(data) < size:
        return None
    try:
        facts = parse_json_object(data)
        if "error" in facts:
            what, expected, found, hint = map(str, facts["error"])
            raise DataError(what, expected=expected, found=found, where=file.place, hint=hint)
        number, num_pages = int(facts["num_rows"]), int(facts["num_pages"])
        if not 0 <= number <= _most_rows(file.num_bytes) or not 0 <= num_pages <= file.num_bytes:
            raise ValueError("numbers out of range")
        pages, page, offset, length = (
            _take(stream, count) for count in (3 * num_pages, number, number, number)
        )
        texts = [_texts(pieces) for pieces in facts["texts"]]
        if any(column and len(column) != number for column in texts):
            raise ValueError("columns of other lengths")
        names, targets, splits, groups = texts
        splits = [SPLIT_OF_FOLDER.get(split.casefold(), split) for split in splits]
        made = [Page(*map(int, row)) for row in pages.reshape(-1, 3)]
        if number and (page.min() < 0 or page.max() >= max(num_pages, 1)):
            raise ValueError("a page that is not there")
        places = Places(made, page, offset, length)
        return ParquetRows(
            names, targets, splits, groups, str(facts["labelled_by"]),
            [str(name) for name in facts["unused"]], str(facts["codec"]), places,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            "Parquet", expected="rows of images", found=str(error)[:100], where=file.place
        ) from error


def _take(stream: IO[bytes], number: int) -> npt.NDArray[np.int64]:
    data = stream.read(8 * number)
    if len(data) < 8 * number:
        raise ValueError("a child process that ended early")
    return np.frombuffer(data, np.int64)


def _texts(pieces: Sequence[str]) -> list[str]:
    column = json.loads("".join(map(str, pieces)))
    if not isinstance(column, list) or not all(isinstance(text, str) for text in column):
        raise TypeError("columns of texts")
    if fault := next(filter(None, map(find_fault, dict.fromkeys(column))), None):
        raise ValueError(fault)
    return column


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
