"""Which files are DICOM: by their endings, and where they have none, by their first bytes.

Reads: 132 bytes of files without an ending. Writes: nothing.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from featcache.untrusted import open_regular

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
INSTALL = "pip install 'featcache[dicom]'"
MAGIC_AT, MAGIC = 128, b"DICM"


def is_dicom(data: bytes) -> bool:
    """Return whether the bytes of a file are DICOM by their magic (PS3.10, 7.1)."""
    return data[MAGIC_AT : MAGIC_AT + 4] == MAGIC


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
            return is_dicom(file.read(MAGIC_AT + len(MAGIC)))
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
