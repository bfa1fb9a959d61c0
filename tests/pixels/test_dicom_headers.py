"""What is kept of DICOM headers holds no identifier, whatever is damaged."""

from __future__ import annotations

import pytest

pytest.importorskip("pydicom", reason="pydicom, the extra dicom")

from sample_dicom import make_dicom, ramp

from featcache.data.dicom_files import COLUMNS, HeaderFacts
from featcache.pixels.dicom_headers import read_headers

MAKER = COLUMNS.index("manufacturer")


def facts_of(data: bytes) -> HeaderFacts:
    (facts,) = read_headers([("", data)], ["a.dcm"], b"salt")
    assert facts is not None
    return facts


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big endian"])
def test_a_length_that_takes_in_the_patient_s_name_leaves_no_manufacturer(syntax: str) -> None:
    data = make_dicom(
        ramp(8), syntax=syntax, Manufacturer="Maker Ltd.", PatientName="Smith^John",
        PatientID="Q90125", ReferringPhysicianName=None, StudyInstanceUID="1.2",
    )  # fmt: skip
    assert facts_of(data).columns[MAKER] == "Maker Ltd."
    place = data.index(b"Maker Ltd.") - (4 if syntax == "implicit" else 2)
    size = data.index(b"Q90125") - data.index(b"Maker Ltd.")
    length = size.to_bytes(2, "big" if syntax == "big endian" else "little")
    damaged = data[:place] + length + data[place + 2 :]
    assert facts_of(damaged).columns[MAKER] == ""


@pytest.mark.parametrize("value", ["Smith^John", "Maker\x1b[2J"])
def test_what_no_maker_is_called_is_left_out(value: str) -> None:
    assert facts_of(make_dicom(ramp(8), Manufacturer=value)).columns[MAKER] == ""
