"""Read what is kept of DICOM headers, and compare pixels, in a child process.

Identifiers do not leave the child but as hashes with a salt.

Reads: DICOM files. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.data.dicom_files import HEAD_BYTES, HeaderFacts, is_dicom, is_installed
from featcache.errors import DataError
from featcache.pixels.dicom import open_dataset, quiet_pydicom, read_stored
from featcache.pixels.dicom_display import text
from featcache.untrusted import MAX_PIXELS, open_regular

_IDENTIFIERS = (
    "PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "PatientName",
    "PatientBirthName", "PatientBirthDate",
)  # fmt: skip
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_TAGS = [
    *_IDENTIFIERS, *_UIDS, "IssuerOfPatientID", "Modality", "ViewPosition", "Manufacturer",
    "PatientSex", "PatientAge", "StudyDate", "PresentationIntentType", "BurnedInAnnotation",
]  # fmt: skip
_MOST_BYTES = 1 << 24  # of a deflated file
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")
_SPELT_OUT = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ø": "oe", "æ": "ae",
     "å": "aa", "Ø": "Oe", "Æ": "Ae", "Å": "Aa"}
)  # fmt: skip
_MOST_CHARS = 64  # of the value representation LO (PS3.5, 6.2)
_OLDEST = 90  # ages from here on are one: they may name a person

File = tuple[str, bytes | None]
"""Where a file lies, or "", and its bytes where it lies in no file of its own."""


def read_headers(
    files: Sequence[File], names: Sequence[str], salt: bytes
) -> list[HeaderFacts | None]:
    """Return what is kept of the headers of some files; None of those that cannot be read.

    Args:
        files: The files.
        names: Of each the path that will be shown, in which identifiers are looked for.
        salt: Of the hashes.
    """
    if not is_installed():
        return [None] * len(files)
    with quiet_pydicom():
        return [_read(file, name, salt) for file, name in zip(files, names, strict=True)]


def hash_pixels(file: File) -> bytes | None:
    """Return the sha256 of a file's stored values, of its first frame; None if it is not read."""
    path, data = file
    try:
        if data is None:
            with open_regular(Path(path)) as opened:
                data = opened.read()
        values, kind = read_stored(data, MAX_PIXELS)
    except (DataError, OSError):
        return None
    digest = hashlib.sha256(repr((values.shape, kind)).encode())
    digest.update(values.astype("<i8").tobytes())
    return digest.digest()


def _read(file: File, name: str, salt: bytes) -> HeaderFacts | None:
    path, data = file
    try:
        if data is not None:
            return _facts(_open(io.BytesIO(data)), name, salt)
        with open_regular(Path(path)) as opened:
            return _facts(_open(opened), name, salt)
    except Exception:  # noqa: BLE001  (a damaged file makes pydicom raise anything)
        return None


def _open(file: Any) -> Any:
    if not is_dicom(file.read(HEAD_BYTES)):
        raise ValueError
    file.seek(0)
    return open_dataset(file, _TAGS, _MOST_BYTES, pixels=False)


def _facts(dataset: Any, name: str, salt: bytes) -> HeaderFacts:
    patient, instance = text(dataset, "PatientID"), text(dataset, "SOPInstanceUID")
    issuer = text(dataset, "IssuerOfPatientID")
    return HeaderFacts(
        hash_text(salt, "patient", issuer, patient) if patient else None,
        hash_text(salt, "instance", instance) if instance else None,
        _is_named(dataset, name),
        (
            _code(dataset, "Modality"), _code(dataset, "ViewPosition"),
            _maker(text(dataset, "Manufacturer")),
            sex if (sex := text(dataset, "PatientSex")) in {"M", "F", "O"} else "",
            _age_decade(dataset), _code(dataset, "PresentationIntentType"),
            _code(dataset, "BurnedInAnnotation"),
        ),
    )  # fmt: skip


def hash_text(salt: bytes, *texts: str) -> str:
    """Return 32 hex digits that nobody can tell the texts from without the salt."""
    return hmac.new(salt, json.dumps(texts).encode(), hashlib.sha256).hexdigest()[:32]


def _code(dataset: Any, keyword: str) -> str:
    value = text(dataset, keyword)
    return value if _CODE.fullmatch(value) else ""


def _maker(value: str) -> str:
    """Return a manufacturer; "" for what may be more than its name.

    A damaged length lets an element take in those behind it, the patient's name say: then it has
    unprintable characters, as every element begins with some.
    """
    shown = " ".join(value.split())
    return shown if shown.isprintable() and "^" not in shown and len(shown) <= _MOST_CHARS else ""


def _age_decade(dataset: Any) -> str:
    """Return such as ``40-49``, of PatientAge, else of the dates of birth and of the study."""
    age, years = text(dataset, "PatientAge"), None
    if found := re.fullmatch(r"(\d{3})([DWMY])", age):
        years = int(found[1]) if found[2] == "Y" else 0 if found[2] != "M" else int(found[1]) // 12
    else:
        dates = [text(dataset, keyword) for keyword in ("PatientBirthDate", "StudyDate")]
        if all(re.fullmatch(r"\d{8}", date) for date in dates):
            years = (int(dates[1]) - int(dates[0])) // 10_000
    if years is None or not 0 <= years < 130:
        return ""
    start = years // 10 * 10
    return f"{_OLDEST}+" if start >= _OLDEST else f"{start}-{start + 9}"


def _is_named(dataset: Any, name: str) -> bool:
    """Return whether a path holds an identifier of the file.

    Texts of four characters and more are looked for anywhere, shorter ones as a word of their own.
    """
    plain = _fold(name)
    words = set(re.split(r"[\W_]+", plain))
    joined = re.sub(r"[\W_]+", "", plain)
    for keyword in (*_IDENTIFIERS, *_UIDS):
        value = dataset.get(keyword)
        values = value if isinstance(value, list) or hasattr(value, "append") else [value]
        texts = ["" if one is None else str(one) for one in values]
        for whole in {_fold(spelt) for one in texts for spelt in (one, one.translate(_SPELT_OUT))}:
            parts = re.split(r"[\W_]+", whole) if keyword.endswith("Name") else [whole]
            for part in parts:
                solid = re.sub(r"[\W_]+", "", part)
                if (len(solid) >= 4 and solid in joined) or (len(solid) > 1 and solid in words):
                    return True
    return False


def _fold(value: str) -> str:
    folded = unicodedata.normalize("NFKD", value).casefold()
    return "".join(char for char in folded if not unicodedata.combining(char))
