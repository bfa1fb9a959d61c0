"""Make 8 bits of the stored values of a DICOM image: modality, VOI, inversion, scale.

The steps are those of module ``dicom``. Data sets come from pydicom, which is not imported here.

Reads: data sets. Writes: nothing. Every failure is a ``DataError`` whose ``found`` is the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError

WINDOWS = ("voi", "first", "none")
"""VOI LUT, else first window, else stored range; the first window, else the range; the range."""

_HALF = 0.5 + 2.0**-30  # so that halves go up, whatever the last bits of the sums before
_Values: TypeAlias = npt.NDArray[np.float64]


def failure(reason: str, *, kind: type[DataError] = DataError) -> DataError:
    """Return the error for a DICOM file that cannot be used."""
    return kind("image", expected="a readable DICOM image in grey", found=reason)


@dataclass(frozen=True)
class _Table:
    """A lookup table: entries for the values from ``first`` on, of ``bits`` bits."""

    first: int
    bits: int
    entries: _Values

    def look_up(self, values: _Values) -> _Values:
        places = np.clip(np.floor(values) - self.first, 0, len(self.entries) - 1)
        found: _Values = self.entries[places.astype(np.int64)]
        return found


@dataclass(frozen=True)
class _Window:
    """A window, and its function: LINEAR, LINEAR_EXACT or SIGMOID."""

    function: str
    center: float
    width: float

    def apply(self, values: _Values) -> _Values:
        """Return values as shares, 0 to 1 and beyond (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
        shifted = values - self.center
        if self.function == "SIGMOID":
            share: _Values = 1.0 / (1.0 + np.exp(np.clip(-4.0 * shifted / self.width, -700, 700)))
            return share
        if self.function == "LINEAR_EXACT":
            return shifted / self.width + 0.5
        if self.width == 1:
            return (shifted > -0.5).astype(np.float64)
        return (shifted + 0.5) / (self.width - 1.0) + 0.5


@dataclass(frozen=True)
class Display:
    """What makes 8 bits of stored values.

    Attributes:
        modality: Slope and intercept, or a table.
        voi: A table or a window; the stored range is a window too.
        is_inverted: MONOCHROME1.
    """

    modality: tuple[float, float] | _Table
    voi: _Table | _Window
    is_inverted: bool

    @classmethod
    def of(cls, dataset: Any, frame: int, window: str, low: int, high: int) -> Display:
        """Return the display of a frame.

        Args:
            dataset: The file's, of pydicom.
            frame: From 0.
            window: One of ``WINDOWS``, or ``CENTER,WIDTH``.
            low: The least that stored values may be by their bits.
            high: The largest.

        Raises:
            DataError: If the file's tables or windows are not possible.
        """
        modality = _find_modality(dataset, frame, (low, high))
        if isinstance(modality, _Table):
            low, high = 0, (1 << modality.bits) - 1
            ends = (0.0, float(high))
        else:
            first, last = (modality[0] * value + modality[1] for value in (low, high))
            ends = (min(first, last), max(first, last))
        voi = _find_voi(dataset, frame, window, ends)
        if voi is None:
            voi = _Window("LINEAR_EXACT", (ends[0] + ends[1]) / 2, ends[1] - ends[0])
        is_inverted = text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
        return cls(modality, voi, is_inverted)

    def apply(self, stored: _Values) -> npt.NDArray[np.uint8]:
        """Return stored values as 8 bits."""
        if isinstance(self.modality, _Table):
            values = self.modality.look_up(stored)
        else:
            values = stored * self.modality[0] + self.modality[1]
        if isinstance(self.voi, _Table):
            share = self.voi.look_up(values) / ((1 << self.voi.bits) - 1)
        else:
            share = self.voi.apply(values)
        share = np.clip(share, 0.0, 1.0)
        if self.is_inverted:
            share = 1.0 - share
        return np.floor(255.0 * share + _HALF).astype(np.uint8)


def _find_modality(
    dataset: Any, frame: int, ends: tuple[float, float]
) -> tuple[float, float] | _Table:
    if items := dataset.get("ModalityLUTSequence"):
        return _read_table(items[0], ends)
    for part in _groups(dataset, frame, "PixelValueTransformationSequence"):
        slope, intercept = _real(part, "RescaleSlope"), _real(part, "RescaleIntercept")
        if slope is not None or intercept is not None:
            if slope == 0:
                raise failure("a DICOM file with a rescale slope of 0")
            return (1.0 if slope is None else slope, intercept or 0.0)
    return (1.0, 0.0)


def _find_voi(
    dataset: Any, frame: int, window: str, ends: tuple[float, float]
) -> _Table | _Window | None:
    """Return the VOI LUT or window that is chosen; None for the stored range."""
    if window == "none":
        return None
    if window not in WINDOWS:
        center, width = map(float, window.split(","))
        return _Window("LINEAR", center, width)
    parts = _groups(dataset, frame, "FrameVOILUTSequence")
    if window == "voi":
        for part in parts:
            if items := part.get("VOILUTSequence"):
                return _read_table(items[0], ends)
    for part in parts:
        found_center, found_width = _real(part, "WindowCenter"), _real(part, "WindowWidth")
        if found_center is None or found_width is None:
            continue
        function = text(part, "VOILUTFunction") or "LINEAR"
        if function not in {"LINEAR", "LINEAR_EXACT", "SIGMOID"}:
            raise failure("a DICOM file with a window of no known function: --window chooses one")
        if found_width < 1 if function == "LINEAR" else found_width <= 0:
            raise failure(
                f"a DICOM file with a window of width {found_width:g}: --window chooses one"
            )
        return _Window(function, found_center, found_width)
    return None


def _groups(dataset: Any, frame: int, sequence: str) -> list[Any]:
    """Return where a frame's values may stand: those of its own, of all frames, of the file."""
    parts = [dataset]
    for groups, number in (
        ("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame),
    ):  # fmt: skip
        items = dataset.get(groups)
        if items and number < len(items) and (found := items[number].get(sequence)):
            parts.insert(0, found[0])
    return parts


def _read_table(item: Any, ends: tuple[float, float]) -> _Table:
    """Return a lookup table (PS3.3, C.11.1.1) for values between two ends.

    Its first value is of 16 bits, and negative where it would lie beyond them otherwise.
    """
    wrong = failure("a DICOM file with a lookup table of wrong sizes: --window none leaves it out")
    descriptor = [int(value) for value in item.LUTDescriptor]
    if len(descriptor) != 3:
        raise wrong
    number, first, bits = descriptor
    number = number % (1 << 16) or 1 << 16  # 0 stands for 65,536; some write it as signed
    first %= 1 << 16
    if first >= 1 << 15 and (ends[0] < 0 or first > ends[1]):
        first -= 1 << 16
    entries: Any = item.LUTData
    if isinstance(entries, bytes | bytearray):
        is_wide = len(entries) >= 2 * number
        order = "<" if getattr(item, "original_encoding", (True, True))[1] in {True, None} else ">"
        entries = np.frombuffer(entries, f"{order}u2" if is_wide else "u1")
    else:
        entries = np.array(entries, np.int64) % (1 << 16)
        if 2 * len(entries) in {number, number + 1} and bits <= 8:  # two of 8 bits in each word
            entries = entries.astype("<u2").view("u1")
    if not 8 <= bits <= 16 or len(entries) < number:
        raise wrong
    return _Table(first, bits, entries[:number].astype(np.float64))


def text(dataset: Any, keyword: str) -> str:
    """Return an element as text, the first of several values; "" without."""
    value = dataset.get(keyword)
    if value is None or isinstance(value, bytes):
        return ""
    if not isinstance(value, str) and hasattr(value, "__getitem__"):
        value = value[0] if len(value) else ""
    return str(value).strip(" \0")


def _real(dataset: Any, keyword: str) -> float | None:
    """Return the first number of an element; None where it is missing or empty."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    if hasattr(value, "__getitem__") and not isinstance(value, str):
        if not len(value):
            return None
        value = value[0]
    number = float(value)
    if not math.isfinite(number):
        raise failure(f"a DICOM file with {keyword} that is not finite")
    return number


def whole(dataset: Any, keyword: str, missing: int | None = None) -> int:
    """Return the first number of an element, or ``missing``.

    Raises:
        DataError: If there is none, and ``missing`` is None.
    """
    number = _real(dataset, keyword)
    if number is None:
        if missing is None:
            raise failure(f"a DICOM file without {keyword}")
        return missing
    return int(number)
