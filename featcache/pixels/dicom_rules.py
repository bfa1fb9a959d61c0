"""What is chosen of DICOM files: part of a cache's identity where the data has DICOM.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featcache.errors import ConfigError, DataError
from featcache.pixels.dicom_display import WINDOWS

_ORDER = "modality, voi, inversion; floor(255 y + 0.5 + 2^-30)"


@dataclass(frozen=True)
class DicomRules:
    """What is chosen of a DICOM file: part of a cache's identity where the data has DICOM.

    Args:
        window: ``voi``, ``first``, ``none`` or ``CENTER,WIDTH``, in the units that the modality
            gives (HU); None is ``voi``, but refuses CT and MR, whose windows are many.
        frame: Which frame of a file of several is read, from 1; None refuses such files.

    Raises:
        ConfigError: If a value is none of these.
    """

    window: str | None = None
    frame: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window not in WINDOWS:
            object.__setattr__(self, "window", _plain_window(self.window))
        if self.frame is not None and (type(self.frame) is not int or self.frame < 1):
            raise ConfigError("--frame", expected="1 or more", found=repr(self.frame))

    def as_identity(self) -> dict[str, Any]:
        """Return the rules as JSON values, with the order of the steps and the scale."""
        return {"order": _ORDER, **asdict(self)}

    def describe(self) -> str:
        """Return the rules in a few words."""
        words = {
            None: "VOI LUT, else first window, else stored range",
            "voi": "VOI LUT, else first window, else stored range",
            "first": "first window, else stored range", "none": "stored range",
        }  # fmt: skip
        shown = words.get(self.window, f"window {self.window}")
        frame = "" if self.frame is None else f", frame {self.frame} of several"
        return f"modality, then {shown}; MONOCHROME1 inverted{frame}"

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> DicomRules:
        """Return the rules in the part ``dicom`` of an identity.

        Raises:
            DataError: If it has another order than this version's.
            ConfigError: If this version does not know a value.
        """
        if not isinstance(identity, Mapping) or identity.get("order") != _ORDER:
            raise DataError("pixel rules", expected=f"dicom {_ORDER}", found=repr(identity)[:200])
        return cls(identity.get("window"), identity.get("frame"))


def _plain_window(text: object) -> str:
    """Return ``CENTER,WIDTH`` in its shortest form."""
    parts = str(text).split(",")
    try:
        center, width = (float(part) for part in parts)
    except ValueError:
        center, width = math.nan, math.nan
    if not (math.isfinite(center) and math.isfinite(width) and width >= 1):
        raise ConfigError(
            "--window", expected="CENTER,WIDTH (a width from 1), or one of " + ", ".join(WINDOWS),
            found=repr(text), hint="For example --window 40,400",
        )  # fmt: skip
    return f"{center:.15g},{width:.15g}"
