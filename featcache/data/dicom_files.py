"""Which files are DICOM: by their endings, and where they have none, by their first bytes.

Reads: the first bytes of files without an ending. Writes: nothing.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from featcache.untrusted import open_regular

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
INSTALL = "pip install 'featcache[dicom]'"
MAGIC_AT, MAGIC = 128, b"DICM"
LONG = frozenset({
    b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV",
})  # fmt: skip
"""Value representations whose lengths have four bytes (PS3.5, 7.1.2)."""
_SHORT = frozenset({
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN",
    b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US",
})  # fmt: skip
HEAD_BYTES = 1024
_FIRST_GROUPS = (0x0002, 0x0008)
_ENOUGH = 3  # elements


def is_dicom(data: bytes) -> bool:
    """Return whether the bytes of a file, the first ``HEAD_BYTES`` at least, are DICOM."""
    return has_magic(data) or begins_with_elements(data)


def has_magic(data: bytes) -> bool:
    """Return whether a file has the magic of PS3.10, 7.1."""
    return data[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def begins_with_elements(data: bytes) -> bool:
    """Return whether bytes begin as data sets do that were stored without preamble and magic.

    Archives hold many, and all files of ACR-NEMA are such. They begin with elements of group 2 or
    8, with rising numbers, in implicit VR or explicit VR: nothing else begins with three of them.
    """
    order: Literal["little", "big"] = "big" if data[:1] == b"\0" else "little"
    is_implicit, place, last = data[4:6] not in LONG | _SHORT, 0, -1
    if is_implicit and order == "big":
        return False
    for _ in range(_ENOUGH):
        head = data[place : place + 12]
        group, number = (int.from_bytes(head[at : at + 2], order) for at in (0, 2))
        representation = b"UN" if is_implicit else head[4:6]
        if group not in _FIRST_GROUPS or (group << 16) + number <= last or len(head) < 12:
            return False
        if not is_implicit and representation not in LONG | _SHORT:
            return False
        last = (group << 16) + number
        first, end = (4, 8) if is_implicit else (8, 12) if representation in LONG else (6, 8)
        place += end + int.from_bytes(head[first:end], order)
    return True


@functools.cache
def is_installed() -> bool:
    """Return whether pydicom is there. Imports nothing."""
    return importlib.util.find_spec("pydicom") is not None


def has_dicom_ending(name: str) -> bool:
    """Return whether a file name ends like a DICOM file's."""
    _, dot, ending = name.rpartition(".")
    return dot + ending.lower() in DICOM_SUFFIXES


def may_be_unnamed(name: str) -> bool:
    """Return whether a file name has no ending, or a number for one, as UIDs have."""
    stem, dot, ending = name.rpartition(".")
    return not dot or not stem or ending.isdecimal() or not ending.isalnum() or len(ending) > 10


def sniff(path: str | Path) -> bool:
    """Return whether a file is DICOM; False where it cannot be read."""
    try:
        with open_regular(Path(path)) as file:
            return is_dicom(file.read(HEAD_BYTES))
    except OSError:
        return False


COLUMNS = (
    "modality", "view_position", "manufacturer", "sex", "age_decade", "intent", "burned_in"
)  # fmt: skip
"""What the columns of ``HeaderFacts`` are."""


class HeaderFacts(NamedTuple):
    """What is kept of the header of a DICOM file: nothing that names a patient.

    Attributes:
        patient: Hash of PatientID and IssuerOfPatientID, with a salt; None where there is no ID.
        instance: Hash of SOPInstanceUID; None where there is none.
        is_named: Whether the path holds an ID, a part of the name, or a UID of the file.
        columns: In the order of ``COLUMNS``; "" where nothing, or nothing allowed, is there.
    """

    patient: str | None
    instance: str | None
    is_named: bool
    columns: tuple[str, ...]


@dataclass(frozen=True)
class DicomFacts:
    """What the headers of a data set say, without any that names a patient.

    Attributes:
        salt: Of the hashes in the data set, as ``salt_id`` gives it; None where none is kept.
        columns: Path of each DICOM image -> values of ``COLUMNS``.
    """

    salt: str | None
    columns: dict[str, tuple[str, ...]] = field(repr=False)

    def number_of(self, column: str, value: str) -> int:
        """Return how many images have a value in a column."""
        place = COLUMNS.index(column)
        return sum(values[place] == value for values in self.columns.values())
