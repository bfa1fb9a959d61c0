"""Several labels per image, from the cells of a table: yes, no or unknown for each of the classes.

Two ways of writing them are read: a column of 1, 0, -1 and empty cells for each label, as CheXpert
and MIMIC-CXR have it, and the names of the labels in one cell, joined by a mark, as NIH has it.

``No Finding`` is no class: where it is 1, or stands in the cell, empty cells mean no. Not those of
``Support Devices``, of which CheXpert's ``No Finding`` says nothing (its labeller leaves them out;
so does torchxrayvision, ``CheX_Dataset``).

Reads and writes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featcache.data.folders import agree_on_classes
from featcache.data.listing import Listing
from featcache.data.samples import UNKNOWN
from featcache.errors import DataError, printable, warn_user
from featcache.formatting import count, join_few

_NO_FINDING, _DEVICES = "nofinding", "supportdevices"
_MEANING = {"unknown": UNKNOWN, "no": 0, "yes": 1}
_BLANK = "Say what they mean: --blank unknown leaves them out of training and figures, --blank no "
_BLANK += "takes them as no, as the authors of CheXpert did"
NOT_KNOWN = {"nan", "<na>", "nat", "n/a", "#n/a", "null"}
"""What programs write for a cell without a value, in lower case."""


@dataclass(frozen=True)
class Labels:
    """The labels of the rows of a table.

    Attributes:
        classes: C names, sorted.
        targets: Of each row C of 1 (yes), 0 (no) and ``UNKNOWN``. Equal ones are one object: a
            million rows have few that differ.
        notes: What was made of uncertain and empty cells, in lines for people.
    """

    classes: tuple[str, ...]
    targets: list[tuple[int, ...]]
    notes: tuple[str, ...]


def plain_name(name: str) -> str:
    """Return the letters and digits of a header, in lower case."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\W_]+", "", text)


def read_flags(
    rows: Sequence[tuple[int, Sequence[str]]], places: Mapping[str, int], listing: Listing,
    root: Path,
) -> Labels:  # fmt: skip
    """Return the labels of a table that has a column for each of them.

    Args:
        rows: Line and cells of each row.
        places: Header of a label -> its column.
        listing: What uncertain and empty cells mean.
        root: The table, for messages.

    Raises:
        DataError: If a cell is none of 1, 0, -1 and empty, if nobody said what empty ones mean, or
            if there is no class.
    """
    headers = list(places)
    clear = [i for i, name in enumerate(headers) if plain_name(name) == _NO_FINDING]
    classes = agree_on_classes({"all": {*headers} - {headers[i] for i in clear}}, root)
    if not classes:
        raise DataError(
            "--target-columns", expected="at least one label", found=join_few(headers), where=root,
            hint="No Finding says that all others are no, and is no class itself",
        )  # fmt: skip
    order = [headers.index(name) for name in classes]
    apart = [plain_name(name) == _DEVICES for name in classes]
    found = _Patterns()
    for line, cells in rows:
        found.add(line, tuple(cells[place].strip() for place in places.values()))
    tally, targets = _Tally(), dict[tuple[str, ...], tuple[int, ...]]()
    for cells, line in found.first.items():
        values = _read_cells(cells, headers, line, root)
        is_clear = any(values[i] == 1 for i in clear)
        means = [is_clear and not is_apart for is_apart in apart]
        of_classes = [values[i] for i in order]
        tally.add(found.number[cells], line, of_classes, means, classes)
        targets[cells] = tuple(
            _answer(value, listing, is_no=is_no)
            for value, is_no in zip(of_classes, means, strict=True)
        )
    if listing.blank is None:
        _ask_about_blanks(tally.num_blank, tally.blanks, root)
    return Labels(classes, found.spread(targets), tuple(tally.lines(listing)))


def read_joined(
    cells: Sequence[tuple[int, str]], mark: str, blank: str | None, header: str, root: Path
) -> Labels:
    """Return the labels of a table whose cells join the names of several.

    Args:
        cells: Line and text of each row.
        mark: What stands between two names.
        blank: What an empty cell means: ``unknown`` or ``no``.
        header: Of the column, for messages.
        root: The table, for messages.

    Raises:
        DataError: If a name is empty or is none, ``No Finding`` stands beside another, nobody said
            what empty cells mean, or there is no class.
    """
    found = _Patterns()
    for line, text in cells:
        found.add(line, (text,))
    named: dict[tuple[str, ...], set[str] | None] = {}
    for pattern in found.first:
        (text,) = pattern
        named[pattern] = _split_cell(text, mark, found.first[pattern], header, root)
    empty = [pattern for pattern, names in named.items() if names is None]
    if blank is None:
        number = sum(found.number[p] for p in empty)
        _ask_about_blanks(number, ((found.first[p], header) for p in empty), root)
    every = set[str]().union(*(names or () for names in named.values()))
    classes = agree_on_classes({"all": every}, root)
    if not classes:
        raise DataError(
            f"column {header}", expected="at least one label", where=root,
            found="none" if empty or not named else "No Finding alone",
        )  # fmt: skip
    if not any(mark in text for (text,) in found.first):
        warn_user(f"--target-separator: {mark!r} stands in no cell of {printable(header)}")
    unknown = (_MEANING[blank or "no"],) * len(classes)
    targets = {
        p: unknown if names is None else tuple(int(name in names) for name in classes)
        for p, names in named.items()
    }
    notes = []
    if empty:
        number = sum(found.number[p] for p in empty)
        notes.append(f"labels: {count(number, 'empty cell')}, taken as {blank}")
    return Labels(classes, found.spread(targets), tuple(notes))


class _Patterns:
    """The different rows of some columns: their first lines and how often they occur."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, ...], int] = {}
        self.number = Counter[tuple[str, ...]]()
        self.rows: list[tuple[str, ...]] = []
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}

    def add(self, line: int, cells: tuple[str, ...]) -> None:
        cells = self._same.setdefault(cells, cells)  # kept once
        self.first.setdefault(cells, line)
        self.number[cells] += 1
        self.rows.append(cells)

    def spread(self, targets: Mapping[tuple[str, ...], tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the targets of all rows from those of the different ones."""
        same: dict[tuple[int, ...], tuple[int, ...]] = {}
        once = {cells: same.setdefault(each, each) for cells, each in targets.items()}
        return [once[cells] for cells in self.rows]


def _read_cells(
    cells: Iterable[str], headers: Sequence[str], line: int, root: Path
) -> list[int | None]:  # fmt: skip
    """Return 1, 0, -1 and None for the cells of one row."""
    values: list[int | None] = []
    for name, cell in zip(headers, cells, strict=True):
        try:
            value = float(cell) if cell else None
        except ValueError:
            value = float("nan")
        if value not in {None, 1, 0, -1}:
            raise DataError(
                f"CSV line {line}, column {name}", expected="1, 0, -1 or nothing",
                found=repr(cell), where=root,
            )  # fmt: skip
        values.append(None if value is None else int(value))
    return values


def _split_cell(text: str, mark: str, line: int, header: str, root: Path) -> set[str] | None:
    """Return the names in a cell; none where it says No Finding; None where it is empty."""
    if not text:
        return None
    names = [name.strip() for name in text.split(mark)]
    is_clear = [plain_name(name) == _NO_FINDING for name in names]
    odd = [name for name in names if not name or name.casefold() in NOT_KNOWN]
    if odd or (any(is_clear) and not all(is_clear)):
        expected = f"labels with {mark!r} between them" if odd else "No Finding, or labels"
        raise DataError(
            f"CSV line {line}, column {header}", expected=expected, found=repr(text), where=root
        )
    return set() if any(is_clear) else set(names)


def _ask_about_blanks(number: int, places: Iterable[tuple[int, str]], root: Path) -> None:
    """Ask what empty cells mean, if there are any."""
    if number:
        line, header = min(places)
        raise DataError(
            "CSV", expected="--blank unknown or --blank no, as there are empty cells", where=root,
            found=f"{number:,}, the first of them in line {line}, column {header}", hint=_BLANK,
        )  # fmt: skip


def _answer(value: int | None, listing: Listing, *, is_no: bool) -> int:
    """Return what a cell means: 1, 0 or ``UNKNOWN``."""
    if value is None:
        return 0 if is_no else _MEANING[listing.blank or "unknown"]
    return _MEANING[listing.uncertain or "unknown"] if value < 0 else value


class _Tally:
    """How many cells of labels were not plainly 1 or 0."""

    def __init__(self) -> None:
        self.num_uncertain = self.num_blank = self.num_cleared = 0
        self.blanks: list[tuple[int, str]] = []  # line and class
        self.beside = Counter[str]()  # class -> rows that contradict No Finding

    def add(
        self, number: int, line: int, values: Sequence[int | None], means_no: Sequence[bool],
        classes: Sequence[str],
    ) -> None:  # fmt: skip
        """Count the cells of a row that occurs so often, first in this line."""
        for value, is_no, name in zip(values, means_no, classes, strict=True):
            if value is None and is_no:
                self.num_cleared += number
            elif value is None:
                self.num_blank += number
                self.blanks.append((line, name))
            elif value and is_no:
                self.beside[name] += number
            self.num_uncertain += number * (value == -1)

    def lines(self, listing: Listing) -> Iterator[str]:
        """Yield what these cells were taken as."""
        if self.num_uncertain:
            choice = listing.uncertain or "unknown (--uncertain)"
            yield f"labels: {count(self.num_uncertain, 'uncertain answer')} (-1), taken as {choice}"
        if self.num_blank:
            yield f"labels: {count(self.num_blank, 'empty cell')}, taken as {listing.blank}"
        if self.num_cleared:
            yield f"labels: {count(self.num_cleared, 'empty cell')} beside No Finding, taken as no"
        if self.beside:
            listed = join_few(f"{number:,} {name}" for name, number in self.beside.most_common())
            yield f"labels: No Finding beside 1 or -1 of another, which stand as written: {listed}"
