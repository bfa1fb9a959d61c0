"""What is chosen of DICOM files is checked, and kept in the identity."""

from __future__ import annotations

import pytest

from featcache.errors import ConfigError, DataError
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.images import PixelRules


@pytest.mark.parametrize("text", ["lung", "40", "40,0", "40,nan", "1,2,3", ""])
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--window"):
        DicomRules(text)


def test_identity_keeps_the_rules() -> None:
    for rules in (None, DicomRules(), DicomRules("40,400", 3)):
        made = PixelRules(64, dicom=rules)
        assert PixelRules.from_identity(made.as_identity()) == made
    assert "dicom" not in PixelRules(64).as_identity()
    with pytest.raises(DataError, match="pixel rules"):
        PixelRules.from_identity(
            PixelRules(64, dicom=DicomRules()).as_identity() | {"dicom": {"order": "other"}}
        )
