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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.data.blobs import Blob, ReadAt, blob_from_json
from featcache.data.folders import SPLIT_OF_FOLDER
from featcache.data.listing import Listing
from featcache.data.parquet_pages import Chunk, Page, Places, Unpack, locate_values
from featcache.data.tables import resembled_column
from featcache.errors import ConfigError, DataError
from featcache.files import child_process
from featcache.untrusted import find_fault, parse_json_object

_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd",
           "LZ4": "lz4_raw"}  # fmt: skip
_TARGETS = ("target", "label", "cls", "class")
_BATCH_ROWS = 256  # few, as a text may have a million characters
_MAX_ROWS = 100_000_000
_MAX_TEXT_BYTES = 1 << 32  # of all names and labels of a file
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


class _Refusal(Exception):  # noqa: N818 (no error of the child's own)
    """What is wrong with a file: the parts of a ``DataError``."""

    def __init__(self, what: str, expected: str, found: object, hint: str = "") -> None:
        super().__init__(what)
        self.parts = [what, expected, f"{found}"[:300], hint]


def _index(file: BinaryIO, num_bytes: int, request: Mapping[str, Any]) -> ParquetRows:
    """Return the rows of an open file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
        num_rows = metadata.num_rows
        if not 0 <= num_rows <= _MAX_ROWS:
            raise _Refusal("Parquet", f"at most {_MAX_ROWS:,} rows", f"{num_rows:,}")
        columns = _choose_columns(schema, request)
        leaf = columns["image"] + ("" if columns["path_in"] is None else ".bytes")

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        codec, places = _locate(parquet, leaf, num_bytes, read)
        path = columns["path"]
        if path is None and columns["path_in"]:
            path = columns["image"] + ".path"
        found = {
            key: _read_texts(parquet, name, num_rows)
            for key, name in (("path", path), ("split", columns["split"]),
                              ("group", columns["group"]), ("target", columns["target"]))
            if name
        }  # fmt: skip
        targets = found.get("target", [])
        if columns["target"]:
            targets = _name_classes(targets, columns["names"], columns["target"])
        if len(places.size) and (places.size < 0).all():
            has_paths = any(found.get("path", []))
            hint = "Write it with the bytes: datasets' to_parquet or push_to_hub embeds them"
            raise _Refusal("images", "bytes", _NO_PATHS if has_paths else "nulls only", hint)
    return ParquetRows(
        [str(text or "") for text in found.get("path", [])], [t or "" for t in targets],
        [str(text or "").strip() for text in found.get("split", [])],
        [str(text or "").strip() for text in found.get("group", [])],
        _describe_target(columns), columns["unused"], codec, places,
    )  # fmt: skip


def _describe_target(columns: Mapping[str, Any]) -> str:
    if not columns["target"]:
        return ""
    return f"column {columns['target']!r}" + (" (ClassLabel)" if columns["names"] else "")


def _locate(parquet: Any, leaf: str, num_bytes: int, read: ReadAt) -> tuple[str, Places]:
    """Return the codec of the column of images, and where they lie in the file."""
    schema, metadata = parquet.schema, parquet.metadata
    number = next((i for i in range(len(schema)) if schema.column(i).path == leaf), None)
    if number is None:
        raise _Refusal("images", "a column of bytes", f"no column {leaf}")
    column = schema.column(number)
    if column.physical_type != "BYTE_ARRAY" or column.max_repetition_level:
        found = f"{column.physical_type}, in lists" if column.max_repetition_level else ""
        raise _Refusal("images", "a column of bytes", found or column.physical_type)
    codec, pages, parts, total = "", list[Page](), [], 0
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(number)
        compression = chunk.compression
        if compression not in {*_CODECS, "UNCOMPRESSED"}:
            raise _Refusal("Parquet", "pages packed by " + ", ".join(_CODECS), compression,
                           "Write it again with zstd, or without compression")  # fmt: skip
        this = _CODECS.get(compression, "")
        if total and this != codec:
            raise _Refusal("Parquet", "one compression of all images", f"{codec} and {this}")
        codec, start = this, chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            start = min(start, chunk.dictionary_page_offset)
        end = start + chunk.total_compressed_size
        rows = metadata.row_group(group).num_rows
        if not rows:
            continue
        if not 0 < start <= end <= num_bytes or chunk.num_values != rows:
            raise _Refusal("Parquet", "a whole file", "a column that leads out of it")
        levels = column.max_definition_level
        try:
            places = locate_values(Chunk(read, start, end, rows, levels, unpacker(codec)))
        except IndexError as error:
            raise ValueError("a page that is damaged") from error
        parts.append((places.page + len(pages), places.offset, places.size))
        pages += places.pages
        total += rows
    if total != metadata.num_rows:
        raise _Refusal("Parquet", f"{metadata.num_rows:,} rows", f"{total:,}")
    none = (np.empty(0, np.int64),) * 3
    columns = [np.concatenate(part) for part in zip(none, *parts, strict=True)]
    return codec, Places(pages, *columns)


def _choose_columns(schema: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return key -> column, of image, path, target, split and group; and what else is known."""
    given, ignore = request["columns"], set(request["ignore_columns"])
    names = list(schema.names)
    if len(set(names)) < len(names):
        raise _Refusal("Parquet", "columns with different names", ", ".join(names[:8]))
    listed = ", ".join(names[:20]) or "none"
    for option, wanted in (("--columns", [*given.values()]), ("--ignore-columns", ignore)):
        if missing := [name for name in wanted if name not in names]:
            raise _Refusal(option, f"columns of the file: {listed}", ", ".join(map(repr, missing)))
    free = [n for n in names if n not in {*given.values(), *ignore} and n[:8] != "__index_"]
    features = _hugging_face(schema)
    found: dict[str, Any] = dict.fromkeys(("image", "path", "target", "split", "group")) | given
    image = found["image"] = found["image"] or _find_image(schema, free, features, listed)
    if image in free:
        free.remove(image)
    kind = schema.field(image).type
    found["path_in"] = None
    inside = [kind.field(i).name for i in range(kind.num_fields)] if _is_struct(kind) else []
    if _is_struct(kind) and "bytes" not in inside:
        raise _Refusal("images", "a column of bytes", f"{image}: {kind}"[:200])
    if inside:
        found["path_in"] = "path" in inside
    labels = {n: f["names"] for n, f in features.items() if f.get("_type") == "ClassLabel"}
    if not found["target"] and not request["no_classes"]:
        found["target"] = _find_target(free, labels)
    for key in ("path", "split", "group"):
        if not found[key] and key in free:
            found[key] = key
    texts = {name for name in free if _is_text(schema.field(name).type)}
    asked = _resembling(found, free, set() if found["path_in"] else texts)
    if request["no_classes"]:
        found["target"] = None
        asked = {name: key for name, key in asked.items() if key != "target"}
    if asked:
        answers = " ".join(f"--columns {key}={name}" for name, key in asked.items())
        raise _Refusal(
            "columns", "path, target, split, group, and others that resemble none of them",
            ", ".join(f"{name!r} ({key}?)" for name, key in asked.items()),
            f"Say what they are with {answers}, or that they are something else with "
            f"--ignore-columns '{','.join(asked)}'",
        )  # fmt: skip
    used = {found[key] for key in ("path", "target", "split", "group")}
    found["unused"] = [name for name in free if name not in used]
    found["names"] = labels.get(found["target"])
    return found


def _resembling(
    found: Mapping[str, Any], free: Sequence[str], may_be_paths: set[str]
) -> dict[str, str]:
    """Return column -> which of those that are missing it resembles."""
    missing = {key for key in ("path", "target", "split", "group") if not found[key]}
    alike = {name: resembled_column(name) for name in free}
    return {
        name: key for name, key in alike.items()
        if key in missing and key is not None and (key != "path" or name in may_be_paths)
    }  # fmt: skip


def _hugging_face(schema: Any) -> dict[str, Any]:
    """Return column -> what ``datasets`` says of it."""
    try:
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = parse_json_object(text)["info"]["features"]
        return {str(name): value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


_TEXTS = {"string", "large_string", "string_view"}


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in _TEXTS


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_struct(kind):
        return any(
            kind.field(i).name == "bytes" and _is_bytes(kind.field(i).type)
            for i in range(kind.num_fields)
        )
    tests = [kinds.is_binary, kinds.is_large_binary]
    if hasattr(kinds, "is_binary_view"):
        tests.append(kinds.is_binary_view)
    return any(test(kind) for test in tests)


def _find_image(
    schema: Any, free: Sequence[str], features: Mapping[str, Any], listed: str
) -> str:  # fmt: skip
    images = [n for n in free if features.get(n, {}).get("_type") == "Image"]
    images = images or [n for n in free if _is_bytes(schema.field(n).type)]
    if len(images) == 1:
        return images[0]
    raise _Refusal(
        "images", "one column with the bytes of images",
        f"several: {', '.join(images)}" if images else f"none among {listed}",
        f"Name it: --columns image={images[0] if images else 'COLUMN'}",
    )  # fmt: skip


def _find_target(free: Sequence[str], labels: Mapping[str, Any]) -> str | None:
    for candidates in ([n for n in free if n in labels], [n for n in free if n in _TARGETS]):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise _Refusal(
                "classes", "one column with them", f"several: {', '.join(candidates)}",
                f"Say which: --columns target={candidates[0]}",
            )  # fmt: skip
    return None


def _read_texts(parquet: Any, name: str, num_rows: int) -> list[Any]:
    """Return a column of texts or whole numbers as a list."""
    import pyarrow as pa

    cells: list[Any] = []
    num_bytes = 0
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=[name], use_threads=False):
        column = batch.column(0)
        if pa.types.is_struct(column.type) and name.endswith(".path"):
            column = column.field("path")
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        kind = column.type
        if not (
            pa.types.is_integer(kind) or pa.types.is_null(kind) or str(kind) in _TEXTS
        ):  # fmt: skip
            raise _Refusal(f"column {name!r}", "texts or whole numbers", kind)
        num_bytes += column.nbytes
        if num_bytes > _MAX_TEXT_BYTES:
            raise _Refusal(f"column {name!r}", f"at most {_MAX_TEXT_BYTES:,} bytes", "more")
        cells += column.to_pylist()
    if len(cells) != num_rows:
        raise _Refusal(f"column {name!r}", f"{num_rows:,} rows", f"{len(cells):,}")
    return cells


def _name_classes(values: Sequence[Any], names: Any, column: str) -> list[str]:
    """Return the names of classes; "" for an image without one."""
    if not isinstance(names, list):
        return ["" if value is None else str(value).strip() for value in values]
    made = []
    for value in values:
        if value is None or value == -1:
            made.append("")
        elif isinstance(value, int) and 0 <= value < len(names):
            made.append(str(names[value]).strip())
        else:
            raise _Refusal(f"column {column!r}", f"numbers of {len(names)} classes", value)
    return made


def _answer(request: Mapping[str, Any]) -> tuple[dict[str, Any], list[npt.NDArray[np.int64]]]:
    """Return the facts of a file and its arrays, or what is wrong with it."""
    import pyarrow as pa

    file = blob_from_json(request["file"])
    whole = "a whole Parquet file"
    try:
        with file.open() as opened:
            rows = _index(opened, file.num_bytes, request)
    except _Refusal as refusal:
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
                rows = _receive(child.stdout, file)
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
        if not 0 <= number <= _MAX_ROWS or not 0 <= num_pages <= file.num_bytes:
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
