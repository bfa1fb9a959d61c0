"""CSV files whose cells no spreadsheet takes for a formula.

Reads: nothing. Writes: CSV files, whole or not at all.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from featcache.errors import escaped
from featcache.files import write_bytes


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    r"""Return a CSV text whose cells no spreadsheet takes for a formula.

    Cells that begin with one of ``= + - @`` TAB or CR get a leading apostrophe (OWASP, CSV
    injection); numbers are left alone. Undecodable bytes of file names become ``\udcNN``.
    ``plain_cell`` undoes this.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer)  # CR LF ends a row (RFC 4180), so cells that hold either are quoted
    writer.writerow(header)
    for row in rows:
        writer.writerow([_safe_cell(cell) for cell in row])
    return buffer.getvalue()


def join_names(names: Iterable[str]) -> str:
    r"""Return names as one cell, joined by ``|``.

    A ``|`` or ``\`` in a name gets a ``\`` before it.
    """
    return "|".join(re.sub(r"([\\|])", r"\\\1", name) for name in names)


def prob_columns(classes: Iterable[str], kind: str = "prob") -> list[str]:
    """Return the headers of a CSV's columns of probabilities: ``prob_NAME`` of each class."""
    return [f"{kind}_{escaped(name)}" for name in classes]


_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
# an undecodable byte, or text that looks like an escaped one, and the backslashes before it
_BYTE = re.compile("(\\\\*)([\udc80-\udcff])|(\\\\+)(?=udc[89a-f][0-9a-f])")
_WRITTEN_BYTE = re.compile(r"(\\+)udc([89a-f][0-9a-f])")


def _safe_cell(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    # backslashes before such a byte or text are doubled, so that reading can tell them apart
    text = _BYTE.sub(lambda m: (m[1] or m[3] or "") * 2 + (m[2] or ""), cell)
    text = text.encode("utf-8", "backslashreplace").decode()
    return "'" + text if _is_formula(text) else text


def _is_formula(text: str) -> bool:
    """Return whether a cell, without leading apostrophes, would be read as a formula.

    Apostrophes are skipped so that an added one can be told from those of the name.
    """
    return text.lstrip("'").lstrip(" \u00a0").startswith(_FORMULA_STARTS)


def plain_cell(cell: str) -> str:
    """Return the text that ``csv_text`` escaped into this cell."""

    def undo(match: re.Match[str]) -> str:
        backslashes, odd = divmod(len(match[1]), 2)
        return "\\" * backslashes + (chr(0xDC00 + int(match[2], 16)) if odd else match[0][-5:])

    cell = cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell
    return _WRITTEN_BYTE.sub(undo, cell)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a UTF-8 CSV file (see ``csv_text``), whole or not at all."""
    write_bytes(path, csv_text(header, rows).encode())
