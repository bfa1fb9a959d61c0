"""Read a CSV of images: which columns it has, what its cells say, and what is odd about them.

A header that is not known is never guessed at, and never passed over in silence: one that resembles
a column that is missing is a question, any other is told.

Reads: CSV files, also separated by ``;`` or tab, and in UTF-16. Writes: nothing.
"""

from __future__ import annotations

import csv
import errno
import io
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from featcache.csv_files import plain_cell
from featcache.data.folders import SPLIT_OF_FOLDER, SPLITS
from featcache.data.labels import NOT_KNOWN, Labels, plain_name, read_flags, read_joined
from featcache.data.listing import COLUMNS, Listing
from featcache.data.remote import refusals, url_of
from featcache.data.stored_files import file_at
from featcache.errors import DataError
from featcache.files import read_regular
from featcache.formatting import count
from featcache.untrusted import reading_hint

MAX_TABLE_BYTES = 2**32
"""Larger files are refused."""

_OTHER_NAMES = {
    "path": """path paths file files filename filenames filepath fname image images img imagepath
        imgpath imagefile imagename imgname imageindex imageid imgid imagefilename relativepath""",
    "target": """target targets label labels labelname class classes classname classid category
        categories diagnosis finding findings findinglabel findinglabels dx groundtruth gt y""",
    "split": "split splits set subset partition usage phase datasplit",
    "group": """group groups patient patients patientid patientname pid subject subjectid case
        caseid person personid participant participantid lesionid""",
}
_COLUMN_OF = {name: key for key, names in _OTHER_NAMES.items() for name in names.split()}
_OWN_HEADERS = {
    "pred",
    "preds",
    "prob",
    "failure",
    "unknown",
    "unlike_training",
}  # of evaluate and predict
_OF_AUDIT = ["path", "group", "copies"]
_FLAGS = {"", "0", "1", "-1", "0.0", "1.0", "-1.0"}
_PLAIN = Listing()
_SHORT = 9  # letters of cells that are kept once, whatever their rows: flags, ages, sexes


class Extra(NamedTuple):
    """One further column of a CSV, of which only the path is used besides.

    Attributes:
        header: Its header.
        option: What named it, for messages.
    """

    header: str
    option: str


@dataclass(frozen=True)
class ImageTable:
    """The rows of a CSV of images.

    Args:
        rows: With the keys path, target, split, group, and ``extra`` where a further column was
            asked for; "" for what is not known.
        unused: Headers that are none of these.
        labels: Several labels of each row, whose target is "" then; None if nobody asked for them.
    """

    rows: list[dict[str, str]]
    unused: tuple[str, ...]
    labels: Labels | None = None


def read_table(
    root: Path, *, columns: Iterable[tuple[str, str]] = (), ignore_columns: Collection[str] = (),
    needs_targets: bool = False, paths_only: bool = False, extra: Extra | None = None,
    labelling: Listing = _PLAIN,
) -> ImageTable:  # fmt: skip
    """Read a CSV of images.

    Blanks around a target, split or group are removed; those around a path stay, as a name may have
    them. ``val`` and ``validation`` become ``valid``. The escapes of ``csv_text`` are undone.

    Args:
        root: The CSV.
        columns: (key, header) of columns with other headers than path, target, split, group.
        ignore_columns: Headers that are not used.
        needs_targets: Ask about columns that look like several labels of an image.
        paths_only: Ask about no other column than the path.
        extra: One further column. Of the others only the path is read then.
        labelling: Which columns or cells hold several labels of an image, if any do.

    Raises:
        DataError: If it is not a CSV with such a header, or a header or a target is a question.
    """
    header, lines = _read_lines(root)
    names = [name.strip() for name in header]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice or not any(names):
        raise DataError(
            "CSV header", expected="path and, if known, target, split, group, once each",
            found=", ".join(names) or "nothing", where=root,
        )  # fmt: skip
    flags = labelling.target_columns
    used = _find_columns(names, dict(columns), ignore_columns, flags, root)
    if extra is not None:
        used = _only_path_and(extra, used, names, root)
    others = [
        name for name in names
        if name and name not in {*used.values(), *ignore_columns, *flags}
        and not _is_our_own(name, names)
    ]  # fmt: skip
    is_labelled = bool(flags) or labelling.no_classes  # so that no column target is missing
    wanted = [c for c in COLUMNS if c != "target" or not is_labelled]
    if extra or paths_only:
        wanted = ["path"]
    asked = _resembling(used, others, wanted)
    asks = needs_targets and not labelling.has_labels
    if asks and "target" not in used and "target" not in asked.values():
        _refuse_flags(names, others, lines, _answers(asked), root)
    if asked:
        otherwise = ", or that they are something else with --ignore-columns "
        otherwise = otherwise + shlex.quote(",".join(asked)) if extra is None else ""
        answers = f"Say what they are with {_answers(asked)}{otherwise}"
        raise DataError(
            "CSV header", where=root,
            expected="path, target, split, group, and others that resemble none of them",
            found=", ".join(f"{name!r} ({key}?)" for name, key in asked.items()),
            hint=answers,
        )  # fmt: skip
    if "path" not in used:
        raise DataError(
            "CSV header", expected="path and, if known, target, split, group, once each",
            found=", ".join(names), where=root,
            hint="Name its column: --columns path=HEADER",
        )  # fmt: skip
    places = {key: names.index(name) for key, name in used.items()}
    rows = [_read_row(line, cells, places, len(names), root) for line, cells in lines]
    _check_splits(rows, root)
    numbers = [line for line, _ in lines]
    labels = None
    if flags:
        labels = read_flags(lines, {name: names.index(name) for name in flags}, labelling, root)
    elif labelling.target_separator:
        labels = _read_joined(rows, numbers, labelling, used.get("target"), root)
    _check_targets(rows, numbers, root, several_allowed=needs_targets)
    return ImageTable(rows, tuple(others), labels)


def _read_joined(
    rows: Sequence[dict[str, str]], lines: Sequence[int], labelling: Listing, header: str | None,
    root: Path,
) -> Labels:  # fmt: skip
    """Return the labels in the targets of rows, which become empty."""
    mark = labelling.target_separator
    if header is None or mark is None:
        raise DataError(
            "--target-separator", expected="a column of labels", found="none", where=root,
            hint="Name it: --columns target=HEADER",
        )  # fmt: skip
    cells = [(line, row["target"]) for line, row in zip(lines, rows, strict=True)]
    for row in rows:
        row["target"] = ""
    return read_joined(cells, mark, labelling.blank, header, root)


def _read_lines(root: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and (line, cells) of the rows that are not blank."""
    try:
        if url := url_of(root):
            file = file_at(url)
            if file.num_bytes > MAX_TABLE_BYTES:
                raise OSError(errno.EFBIG, f"{file.num_bytes:,} bytes")
            with refusals(url):
                data = file.read(0, file.num_bytes)
        else:
            data = read_regular(root, max_bytes=MAX_TABLE_BYTES)
    except OSError as error:
        found = error.strerror or str(error)
        raise DataError(
            "CSV", expected="a readable file", found=found, where=root,
            hint=reading_hint(error, ""),
        ) from error  # fmt: skip
    text = _decode(data, root)
    delimiter, start = ",", text.split("\n", 1)[0].rstrip("\r")
    if start.lower().startswith("sep=") and len(start) == 5:  # written by Excel, for Excel
        delimiter, text = start[4], text.partition("\n")[2]
    elif "," not in start:
        delimiter = next((mark for mark in (";", "\t") if mark in start), ",")
    # Not a StringIO, which takes four bytes a character.
    encoded = io.BytesIO(text.encode())
    del text
    reader = csv.reader(io.TextIOWrapper(encoded, "utf-8", newline=""), delimiter=delimiter)
    same: dict[str, str] = {}  # a million rows have few different short cells
    try:
        lines = [
            (reader.line_num, [same.setdefault(c, c) if len(c) < _SHORT else c for c in cells])
            for cells in reader if any(map(str.strip, cells))
        ]  # fmt: skip
    except csv.Error as error:
        raise DataError("CSV", expected="a whole table", found=error, where=root) from error
    return (lines[0][1], lines[1:]) if lines else ([], [])


def _decode(data: bytes, root: Path) -> str:
    marks = (b"\xff\xfe", b"\xfe\xff")
    is_wide = data.startswith(marks)
    if not is_wide and data[:32].count(0) >= min(len(data), 32) // 3 > 2:
        found = "UTF-16 without a byte order mark"
    else:
        try:
            return data.decode("utf-16" if is_wide else "utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            found = f"another encoding (byte 0x{data[error.start]:02x} in line {line})"
            if not is_wide:
                found += ", such as cp1252"
    raise DataError(
        "CSV", expected="UTF-8 text", found=found, where=root,
        hint="Save it as UTF-8: Excel calls that 'CSV UTF-8'",
    )  # fmt: skip


def _find_columns(
    names: Sequence[str], columns: Mapping[str, str], ignore: Collection[str],
    flags: Collection[str], root: Path,
) -> dict[str, str]:  # fmt: skip
    """Return column -> header."""
    for option, wanted in (
        ("--columns", columns.values()), ("--ignore-columns", ignore), ("--target-columns", flags),
    ):  # fmt: skip
        missing = [name for name in wanted if name not in names]
        if missing:
            raise DataError(
                option, expected="headers of the CSV: " + ", ".join(filter(None, names)),
                found=", ".join(map(repr, missing)), where=root,
            )  # fmt: skip
    taken = {*columns.values(), *ignore, *flags, *(["target"] if flags else [])}
    plain = {key: key for key in COLUMNS if key in names and key not in taken}
    return plain | dict(columns)


def _only_path_and(
    extra: Extra, used: Mapping[str, str], names: Sequence[str], root: Path
) -> dict[str, str]:
    """Return column -> header of the path and of a further column."""
    if extra.header not in names:
        raise DataError(
            extra.option, expected="a header of the CSV: " + ", ".join(filter(None, names)),
            found=repr(extra.header), where=root,
        )  # fmt: skip
    return {key: name for key, name in used.items() if key == "path"} | {"extra": extra.header}


def _is_our_own(name: str, names: Sequence[str]) -> bool:
    """Return whether a header is one that ``evaluate``, ``predict`` or ``audit`` writes."""
    if [*names] == _OF_AUDIT:
        return name == "copies"
    is_result = not {"pred", "preds"}.isdisjoint(names)
    return is_result and (
        name in _OWN_HEADERS
        or name.startswith("prob_")
        or (name == "targets" and "preds" in names)
    )  # fmt: skip


def _resembling(
    used: Mapping[str, str], others: Sequence[str], columns: Sequence[str]
) -> dict[str, str]:
    """Return header -> which of some columns it resembles, if that one is missing."""
    alike = {name: _COLUMN_OF.get(plain_name(name)) for name in others}
    missing = set(columns) - set(used)
    return {name: key for name, key in alike.items() if key is not None and key in missing}


def _answers(asked: Mapping[str, str]) -> str:
    """Return the options that take headers for the columns they resemble, the first of each."""
    first = {key: name for name, key in reversed([*asked.items()])}
    found = (f"--columns {shlex.quote(f'{k}={first[k]}')}" for k in COLUMNS if k in first)
    return " ".join(found)


def _refuse_flags(
    names: Sequence[str], others: Sequence[str], lines: Sequence[tuple[int, list[str]]],
    answers: str, root: Path,
) -> None:  # fmt: skip
    """Refuse a table with a column of 0 and 1 for each of several labels."""
    flags = []
    for name in others:
        place = names.index(name)
        cells = {cells[place].strip() for _, cells in lines if len(cells) > place}
        if cells <= _FLAGS and any(cells):
            flags.append(name)
    if len(flags) > 1:
        target = shlex.quote("target=" + flags[-1])
        listed = ", ".join(flags[:4]) + (", ..." if len(flags) > 4 else "")
        raise DataError(
            "CSV", expected="one class per image", where=root,
            found=f"{len(flags)} columns of 0 and 1: {listed}",
            hint="Read them all as labels with "
            f"{answers and answers + ' '}--target-columns {shlex.quote(','.join(flags))}, or train "
            f"on one of them with {answers and answers + ' '}--columns {target}, or leave them "
            f"with --ignore-columns {shlex.quote(','.join(flags))}",
        )  # fmt: skip


def _read_row(
    line: int, cells: list[str], places: Mapping[str, int], width: int, root: Path
) -> dict[str, str]:
    while len(cells) > width and not cells[-1].strip():
        cells = cells[:-1]
    row = dict.fromkeys(COLUMNS, "")
    if len(cells) == width:
        for key, place in places.items():
            row[key] = plain_cell(cells[place] if key == "path" else cells[place].strip())
    if not row["path"].strip() or "\0" in "".join(cells):
        raise DataError(
            f"CSV line {line}", expected=f"{width} cells without NUL, the path not empty",
            found=",".join(cells), where=root,
        )  # fmt: skip
    row["split"] = SPLIT_OF_FOLDER.get(row["split"].casefold(), row["split"])
    return row


def _check_splits(rows: Sequence[dict[str, str]], root: Path) -> None:
    unknown = sorted({row["split"] for row in rows} - {*SPLITS, ""})
    if unknown:
        found = ", ".join(map(repr, unknown[:3]))
        raise DataError("split column", expected="train, valid or test", found=found, where=root)


def _check_targets(
    rows: Sequence[dict[str, str]], lines: Sequence[int], root: Path, *, several_allowed: bool
) -> None:
    """Ask about targets that are hardly meant as the classes they would become."""
    first: dict[str, int] = {}
    for row, line in zip(rows, lines, strict=True):
        first.setdefault(row["target"], line)
    targets = [target for target in first if target]

    def ask(expected: str, found: str, hint: str) -> DataError:
        return DataError("target column", expected=expected, found=found, where=root, hint=hint)

    empty = [t for t in targets if t.casefold() in NOT_KNOWN or t == "NA"]
    if empty:
        number = sum(row["target"] in empty for row in rows)
        raise ask(
            "class names, and empty cells where the class is not known",
            f"{empty[0]!r} in {count(number, 'row')}, the first of them in line {first[empty[0]]}",
            "Empty these cells, or rename the class",
        )
    numbers: dict[float, str] = {}
    for target in targets:
        try:
            number_of = float(target)
        except ValueError:
            continue
        if numbers.setdefault(number_of, target) != target:
            raise ask(
                "each class written in one way",
                f"{numbers[number_of]!r} and {target!r}, the same number", "Write them alike",
            )  # fmt: skip
    parts = Counter(part for t in targets for part in {*t.split("|")})
    joined = [t for t in targets if "|" in t and any(parts[part] > 1 for part in t.split("|"))]
    if joined:
        raise ask(
            "one class per image",
            f"several in one cell, {joined[0]!r} in line {first[joined[0]]}",
            (
                "Read them all as labels with --target-separator '|', or k"
                if several_allowed
                else "K"
            )
            + "eep the rows of one label, or write one class into each cell",
        )


def resembled_column(header: str) -> str | None:
    """Return which of path, target, split and group a header resembles; None for none of them."""
    return _COLUMN_OF.get(plain_name(header))
