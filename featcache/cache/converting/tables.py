"""Tables of rows as CSV and Parquet.

Reads: CSV and Parquet files, which anybody may have made. Writes: such files.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.cache.converting.rows import (
    LABEL,
    MAX_METADATA_BYTES,
    METADATA,
    TEXT_BYTES,
    TEXTS,
    RowTable,
    check_features,
    is_column,
    list_feature_columns,
    require_room,
    wrong,
)
from featcache.csv_files import csv_text, plain_cell
from featcache.errors import DataError
from featcache.untrusted import open_regular

_BLOCK_ROWS = 1024
_BATCH_ROWS = 256  # few, as a text may have a million characters
_INTEGER = re.compile(r"-?[0-9]{1,19}")

# --------------------------------------------------------------------------------------------- CSV


def write_csv_table(table: RowTable, file: BinaryIO) -> None:
    """Write a table as CSV: the columns f0 to f<D-1>, and the JSON object in the first row.

    Features have as many digits as tell them apart from every other float32.

    Raises:
        DataError: If there are no rows: nothing could hold the JSON object.
    """
    num_rows, num_features = table.features.shape
    if num_rows == 0:
        raise DataError(
            "rows", expected="one or more, as a CSV has no other place for the identity",
            found="none", hint="Convert to another format",
        )  # fmt: skip
    header = [*table.texts, *table.numbers, *(f"f{i}" for i in range(num_features)), METADATA]
    file.write(csv_text(header, []).encode())
    for start in range(0, num_rows, _BLOCK_ROWS):
        rows = range(start, min(start + _BLOCK_ROWS, num_rows))
        text = csv_text([], (_cells(table, row) for row in rows)).removeprefix("\r\n")
        file.write(text.encode())


def _cells(table: RowTable, row: int) -> Iterator[object]:
    for texts in table.texts.values():
        yield texts[row]
    for name, numbers in table.numbers.items():
        value = numbers[row].item()
        if name.startswith(LABEL):
            yield "" if math.isnan(value) else int(value)
        else:
            yield value
    # str() of NumPy's numbers has the fewest digits; those of float16 would be another float32
    yield from table.features[row].astype(np.float32, copy=False)
    yield table.metadata if row == 0 else ""


def read_csv_table(path: Path, most: float) -> RowTable:
    """Return the table in a CSV file; features are rounded to float32.

    Raises:
        DataError: If it is no such table, or takes more than ``most`` bytes.
    """
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open_regular(path))
        require_room("file", 2 * raw.seek(0, io.SEEK_END), most, path)
        raw.seek(0)
        text = io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8-sig", newline="")
        stack.callback(csv.field_size_limit, csv.field_size_limit(MAX_METADATA_BYTES))
        try:
            return _read_lines(csv.reader(stack.enter_context(text), strict=True), path, most)
        except (UnicodeDecodeError, csv.Error) as error:
            found = "another encoding" if isinstance(error, UnicodeDecodeError) else error
            raise wrong("CSV", path, "a whole table in UTF-8", found) from error


def _read_lines(lines: Any, path: Path, most: float) -> RowTable:
    header: list[str] = next(lines, [])
    if len(set(header)) < len(header) or "path" not in header:
        raise wrong("CSV", path, "a header with path, each column once", ", ".join(header[:8]))
    wide = [header.index(name) for name in list_feature_columns(header, path)]
    if not wide:
        raise wrong("CSV", path, "columns f0, f1, ... of features", ", ".join(header[:8]))
    others = {name: i for i, name in enumerate(header) if is_column(name) or name == METADATA}
    is_run = wide == [*range(wide[0], wide[0] + len(wide))]
    blocks: list[npt.NDArray[Any]] = []
    rows: list[npt.NDArray[Any]] = []
    columns: dict[str, list[str]] = {name: [] for name in others}
    num_bytes = 0
    for cells in lines:
        if not cells:
            continue
        what = f"line {lines.line_num}"
        if len(cells) != len(header):
            raise wrong(what, path, f"{len(header)} cells", len(cells))
        numbers = cells[wide[0] : wide[0] + len(wide)] if is_run else [cells[i] for i in wide]
        try:
            with np.errstate(over="ignore"):  # infinity: refused with its row
                rows.append(np.array(numbers, np.float32))
        except ValueError as error:
            raise wrong(what, path, "numbers in f0, f1, ...", str(error)[:80]) from error
        for name, i in others.items():
            columns[name].append(cells[i])
        num_bytes += 4 * len(wide) + sum(TEXT_BYTES + len(cells[i]) for i in others.values())
        if len(rows) == _BLOCK_ROWS:
            require_room("table", num_bytes, most, path)
            blocks.append(np.stack(rows))
            rows.clear()
    if rows:
        blocks.append(np.stack(rows))
    if not blocks:
        raise wrong("CSV", path, "one or more rows", "none")
    metadata = columns.pop(METADATA, [""])[0] or None
    texts = {n: [plain_cell(c) for c in columns[n]] for n in TEXTS if n in columns}
    numbers_of = {n: _parse_numbers(n, c, path) for n, c in columns.items() if n not in TEXTS}
    plain = None if metadata is None else plain_cell(metadata)
    return RowTable(np.concatenate(blocks), texts, numbers_of, plain)


def _parse_numbers(name: str, cells: Sequence[str], path: Path) -> npt.NDArray[Any]:
    try:
        if name.startswith(LABEL):
            return np.array([float(cell) if cell.strip() else math.nan for cell in cells], "<f4")
        if not all(map(_INTEGER.fullmatch, cells)):
            raise ValueError("something else")
        return np.array([int(cell) for cell in cells], np.int64)
    except (ValueError, OverflowError) as error:
        raise wrong(f"column {name}", path, "numbers", str(error)[:80]) from error


# ----------------------------------------------------------------------------------------- Parquet


def write_parquet(table: RowTable, file: BinaryIO) -> None:
    """Write a table as Parquet: features as fixed-size lists of float32, labels as int8 or null.

    float16 becomes float32, which holds it exactly and which every reader has.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array([t or None for t in x], pa.string()) for name, x in table.texts.items()
    }
    for name, numbers in table.numbers.items():
        if name.startswith(LABEL):
            unknown = np.isnan(numbers)
            values = np.where(unknown, 0, numbers).astype(np.int8)
            arrays[name] = pa.array(values, pa.int8(), mask=unknown)
        else:
            arrays[name] = pa.array(numbers)
    flat = pa.array(table.features.astype(np.float32, copy=False).reshape(-1))
    width = table.features.shape[1]
    arrays["features"] = pa.FixedSizeListArray.from_arrays(flat, width)
    named = pa.table(arrays).replace_schema_metadata({METADATA: table.metadata})
    rows = max(1, (64 << 20) // (4 * width))
    pq.write_table(named, file, row_group_size=rows, use_dictionary=False, compression="none")


def read_parquet(path: Path, most: float) -> RowTable:
    """Return the table in a Parquet file.

    To be called in a child process, as Arrow is a large library of C++.

    Raises:
        DataError: If it is no such table, or takes more than ``most`` bytes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
        names = list(schema.names)
        if len(set(names)) < len(names) or "path" not in names:
            raise wrong("Parquet", path, "columns with path, each once", ", ".join(names[:8]))
        wide = [] if "features" in names else list_feature_columns(names, path)
        if not wide and "features" not in names:
            raise wrong("Parquet", path, "features, or f0, f1, ...", ", ".join(names[:8]))
        chosen = [name for name in names if is_column(name)] + (wide or ["features"])
        features: npt.NDArray[Any] | None = None
        columns: dict[str, list[Any]] = {name: [] for name in names if is_column(name)}
        position = text_bytes = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=chosen):
            block = _batch_features(pa, batch, wide, path)
            if features is None:
                check_features(block.dtype, block.shape, path)
                row_bytes = block.shape[1] * block.dtype.itemsize + TEXT_BYTES * len(columns)
                require_room("table", num_rows * row_bytes, most, path)
                features = np.empty((num_rows, block.shape[1]), block.dtype)
            if block.shape[1:] != features.shape[1:] or position + len(block) > num_rows:
                raise wrong("features", path, f"{features.shape}", "rows of another length")
            features[position : position + len(block)] = block
            position += len(block)
            for name, cells in columns.items():
                cells.append(_batch_column(pa, name, batch.column(name), path))
                if name in TEXTS:
                    text_bytes += sum(len(text) for text in cells[-1] if text)
            require_room("texts", 4 * text_bytes, most, path)
        if features is None or position != num_rows:
            raise wrong("Parquet", path, f"one or more rows ({num_rows:,} by its header)", position)
        metadata = (schema.metadata or {}).get(METADATA.encode())
    texts = {n: [t for cells in c for t in cells] for n, c in columns.items() if n in TEXTS}
    numbers = {n: np.concatenate(c) for n, c in columns.items() if n not in TEXTS}
    return RowTable(features, texts, numbers, metadata.decode() if metadata else None)


def _batch_features(pa: Any, batch: Any, wide: Sequence[str], path: Path) -> npt.NDArray[Any]:
    """Return the features (n, D) of a batch, as its dtype is."""
    if wide:
        parts = [batch.column(name) for name in wide]
        flat, width = parts, len(wide)
    else:
        column = batch.column("features")
        kinds = pa.types
        if not any(
            test(column.type)
            for test in (kinds.is_fixed_size_list, kinds.is_list, kinds.is_large_list)
        ):
            raise wrong("features", path, "lists of float32 or float16", column.type)
        parts, values = [column], column.flatten()
        width = len(values) // max(len(column), 1)
        lengths = column.value_lengths() if hasattr(column, "value_lengths") else None
        if len(values) != width * len(column) or (
            lengths is not None and len(column) and set(lengths.unique().to_pylist()) != {width}
        ):
            raise wrong("features", path, "lists of one length", "several lengths")
        flat = [values]
    if any(array.null_count for array in (*parts, *flat)):
        raise wrong("features", path, "numbers", "null")
    types = {array.type for array in flat}
    if not types <= {pa.float32(), pa.float16()} or len(types) > 1:
        found = ", ".join(sorted(map(str, types)))
        hint = "Save them as float32 yourself: that may round"
        raise wrong("features", path, "float32 or float16", found, hint)
    arrays = [array.to_numpy(zero_copy_only=False) for array in flat]
    return np.stack(arrays, axis=1) if wide else arrays[0].reshape(len(batch), width)


def _batch_column(pa: Any, name: str, column: Any, path: Path) -> Any:
    """Return a batch's texts as a list, or its numbers (n,)."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if name in TEXTS:
        if pa.types.is_null(kind):
            return [None] * len(column)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            column = column.cast(pa.large_string()) if "string" in str(kind) else None
        if column is None:
            raise wrong(f"column {name}", path, "strings", kind)
        return column.to_pylist()
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not is_number or (column.null_count and not name.startswith(LABEL)):
        raise wrong(f"column {name}", path, "numbers", "null" if is_number else kind)
    if name.startswith(LABEL):
        return np.array([math.nan if v is None else v for v in column.to_pylist()], "<f4")
    return column.to_numpy(zero_copy_only=False)
