"""DICOM files become 8-bit grey: in the order of the standard, as highdicom and pydicom show them.

highdicom is no dependency: where it is missing, its comparisons are skipped.
"""

from __future__ import annotations

import io
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from featcache.data.dicom_files import is_dicom
from featcache.errors import DataError
from featcache.pixels.dicom import read_dicom
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.images import PixelRules, load

pydicom = pytest.importorskip("pydicom", reason="pydicom, the extra dicom")
for name in ("gdcm", "openjpeg"):
    pytest.importorskip(name, reason=f"{name}, the extra dicom")

from pydicom.pixels import apply_modality_lut, apply_windowing  # noqa: E402
from sample_dicom import SYNTAXES, make_dicom, ramp, read_back, table  # noqa: E402

VOI = DicomRules("voi", 1)
RULES = PixelRules(64, dicom=DicomRules())
MOST = 2**24
WINDOW = {"WindowCenter": 1000, "WindowWidth": 800}


def shown(data: bytes, rules: DicomRules = VOI) -> npt.NDArray[np.uint8]:
    return read_dicom(data, rules, MOST).pixels


def reason(data: bytes, rules: DicomRules = DicomRules(), most: int = MOST) -> str:  # noqa: B008
    with pytest.raises(DataError) as caught:
        read_dicom(data, rules, most)
    return str(caught.value.found)


def to_8_bits(shares: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.floor(255 * np.clip(shares, 0, 1) + 0.5 + 2.0**-30).astype(np.uint8)


def stored_range(dataset: Any) -> tuple[float, float]:
    bits, signed = dataset.BitsStored, dataset.PixelRepresentation
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    low, high = sorted(slope * end + float(dataset.get("RescaleIntercept", 0) or 0) for end in ends)
    return low, high


def by_highdicom(data: bytes) -> npt.NDArray[np.uint8]:
    highdicom = pytest.importorskip("highdicom", reason="highdicom, as an oracle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = highdicom.imread(io.BytesIO(data))
        frame = image.get_frame(
            1, apply_real_world_transform=False, apply_voi_transform=None,
            voi_output_range=(0.0, 1.0), dtype=np.float64,
        )  # fmt: skip
    if "VOILUTSequence" not in image and "WindowCenter" not in image:
        low, high = stored_range(image)
        if "ModalityLUTSequence" in image:
            low, high = 0, 2 ** image.ModalityLUTSequence[0].LUTDescriptor[2] - 1
        frame = (frame - low) / (high - low)
    return to_8_bits(frame)


def by_pydicom(data: bytes) -> npt.NDArray[np.uint8]:
    """Return what pydicom makes of a single frame with a window, without tables."""
    dataset = read_back(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    # whose range runs backwards where the slope is negative
    low, high = stored_range(dataset)[:: 1 if dataset.RescaleSlope > 0 else -1]
    share = (frame - low) / (high - low)
    return to_8_bits(1 - share if dataset.PhotometricInterpretation == "MONOCHROME1" else share)


# ----------------------------------------------------------------------------------------- oracles

DEPTHS = [(8, False), (12, False), (12, True), (16, True)]
MADE = {
    f"{syntax}, {bits} bits{', signed' * signed}": (syntax, bits, signed)
    for syntax in SYNTAXES
    for bits, signed in (DEPTHS if syntax not in {"JPEG", "JPEG extended"} else DEPTHS[:1])
}


@pytest.mark.parametrize("kind", MADE)
def test_every_syntax_and_depth_is_shown_as_highdicom_shows_it(kind: str) -> None:
    syntax, bits, signed = MADE[kind]
    window = {"WindowCenter": 2**bits / 5, "WindowWidth": 2**bits / 4}
    hows: list[dict[str, Any]] = [{}, window, {"photometric": "MONOCHROME1", **window}]
    how = hows[list(MADE).index(kind) % 3]
    data = make_dicom(ramp(bits, signed=signed), bits=bits, syntax=syntax, **how)
    plain = data
    if syntax == "big endian":  # highdicom reads little endian alone
        plain = make_dicom(ramp(bits, signed=signed), bits=bits, **how)
    np.testing.assert_array_equal(shown(data), by_highdicom(plain))
    assert len(np.unique(shown(data))) > 1


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", ["explicit", "big endian"])
def test_bits_beyond_the_stored_ones_are_not_seen(syntax: str, *, signed: bool) -> None:
    # where old files keep overlays; highdicom sees them
    values = ramp(12, signed=signed)
    other = (values.view("u2") & 0x0FFF) | (np.arange(values.size).reshape(values.shape) % 16 << 12)
    for high in (values.view("u2") & 0x0FFF, other.astype("u2")):
        data = make_dicom(high.view(values.dtype), bits=12, syntax=syntax)
        np.testing.assert_array_equal(shown(data), shown(make_dicom(values, bits=12)))


TRANSFORMS: dict[str, dict[str, Any]] = {
    "slope": {"RescaleSlope": 2, "RescaleIntercept": -1024},
    "negative slope": {"RescaleSlope": -1, "RescaleIntercept": 4095},
    "negative slope, inverted": {"RescaleSlope": -1, "RescaleIntercept": 4095,
                                 "photometric": "MONOCHROME1"},
    "inverted": {"photometric": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    "first of windows": {"WindowCenter": [1000, 2000], "WindowWidth": [400, 300]},
    "exact": {**WINDOW, "VOILUTFunction": "LINEAR_EXACT", "RescaleSlope": 0.5},
    "exact, negative slope": {**WINDOW, "VOILUTFunction": "LINEAR_EXACT", "RescaleSlope": -10,
                              "RescaleIntercept": 20000, "photometric": "MONOCHROME1"},
    "sigmoid": {**WINDOW, "VOILUTFunction": "SIGMOID", "photometric": "MONOCHROME1"},
    "VOI LUT": {"VOILUTSequence": [table(np.linspace(0, 65535, 2048), 500, 16)], **WINDOW},
    "VOI LUT, inverted": {"VOILUTSequence": [table(np.arange(4096)[::-1] // 16, 0, 8)],
                          "photometric": "MONOCHROME1"},
    "modality LUT": {"ModalityLUTSequence": [table(np.arange(4096) ** 2 // 256, 0, 16)]},
    "modality LUT and window": {"ModalityLUTSequence": [table(np.arange(4096) // 2, 0, 16)],
                                **WINDOW, "photometric": "MONOCHROME1"},
}  # fmt: skip


@pytest.mark.parametrize("syntax", ["explicit", "implicit"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_applied_as_highdicom_applies_them(name: str, syntax: str) -> None:
    how = {**TRANSFORMS[name]}
    if "RescaleSlope" in how:
        how = {"RescaleIntercept": 0, **how}
    data = make_dicom(ramp(12), bits=12, syntax=syntax, **how)
    np.testing.assert_array_equal(shown(data), by_highdicom(data))


def test_monochrome1_is_inverted_once_whatever_the_presentation_lut_shape() -> None:
    plain = shown(make_dicom(ramp(12), bits=12))
    for shape in (None, "IDENTITY", "INVERSE"):
        how = {"photometric": "MONOCHROME1", "PresentationLUTShape": shape}
        np.testing.assert_array_equal(shown(make_dicom(ramp(12), bits=12, **how)), 255 - plain)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big endian"])
def test_tables_are_scaled_by_their_bits_whatever_their_values(syntax: str) -> None:
    # highdicom reads tables of 8 and 16 bits alone, and stretches those that leave values out
    for bits, values in ((12, np.arange(4096)[::-1]), (12, np.arange(4096) // 2), (8, [7, 9] * 30)):
        data = make_dicom(ramp(12), bits=12, VOILUTSequence=[table(values, 0, bits)], syntax=syntax)
        entries = np.array(values)[np.minimum(ramp(12), len(values) - 1)]
        np.testing.assert_array_equal(shown(data), to_8_bits(entries / (2**bits - 1)))


def test_a_table_may_begin_below_zero() -> None:
    values = np.arange(4096) * 16
    for signed in (False, True):  # as old files have it, and as the standard does
        item = table(values, -1024 if signed else 65536 - 1024, 16, signed=signed)
        for intercept in (-1024, 0):
            data = make_dicom(
                ramp(12), bits=12, VOILUTSequence=[item], RescaleIntercept=intercept,
                RescaleSlope=1,
            )  # fmt: skip
            places = np.minimum(ramp(12).astype(int) + intercept + 1024, 4095)
            np.testing.assert_array_equal(shown(data), to_8_bits(values[places] / 65535))


@pytest.mark.parametrize("slope", [1, 0.684, -0.684, -10, 0.00122])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_windows_apply_after_the_modality_as_pydicom_has_it(
    slope: float, function: str, photometric: str
) -> None:
    # highdicom takes 1 from a LINEAR width that it has divided by the slope: 1 of 255 elsewhere
    data = make_dicom(
        ramp(12), bits=12, photometric=photometric, RescaleSlope=slope, RescaleIntercept=100,
        WindowCenter=slope * 2000 + 100, WindowWidth=abs(slope) * 1500, VOILUTFunction=function,
    )  # fmt: skip
    np.testing.assert_array_equal(shown(data), by_pydicom(data))


def test_the_files_of_pydicom_are_shown_as_highdicom_does_or_fail_with_a_reason() -> None:
    root = Path(pydicom.__file__).parent / "data" / "test_files"
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    equal, refused = 0, list[str]()
    for path in files:
        data = path.read_bytes()
        if not is_dicom(data):
            continue
        try:
            pixels = shown(data)
        except DataError as error:
            refused.append(f"{path.name}: {error.found}")
            continue
        dataset = read_back(data)
        if "expb" in path.name or "bigend" in path.name:
            little = path.with_name(path.name.replace("_expb", "").replace("_bigendian", ""))
            np.testing.assert_array_equal(pixels, by_highdicom(little.read_bytes()), str(path))
        elif "WindowCenter" in dataset and float(dataset.get("RescaleSlope", 1) or 1) != 1:
            np.testing.assert_array_equal(pixels, by_pydicom(data), str(path))
        else:
            np.testing.assert_array_equal(pixels, by_highdicom(data), str(path))
        equal += 1
    assert equal >= 50, refused
    known = ("a DICOM file without pixels", "a DICOM file in colour", "a DICOM file of masks",
             "a DICOM file without a known", "JPEG of 12 bits", "a broken DICOM file",
             "a compressed image of", "a DICOM file of 8,130 of 8,192 bytes of pixels")  # fmt: skip
    assert all(line.partition(": ")[2].startswith(known) for line in refused), refused
    broken = [line for line in refused if "a broken" in line or "a compressed" in line]
    assert [line.partition(":")[0] for line in broken] == [
        "JPEG2000-embedded-sequence-delimiter.dcm", "badVR.dcm"
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- what is chosen


def test_a_window_is_chosen_or_left_out() -> None:
    plain, window = make_dicom(ramp(12), bits=12), make_dicom(ramp(12), bits=12, **WINDOW)
    tables = {"VOILUTSequence": [table(np.arange(4096)[::-1], 0, 12)]}
    both = make_dicom(ramp(12), bits=12, **WINDOW, **tables)
    np.testing.assert_array_equal(shown(both, DicomRules("first")), shown(window))
    np.testing.assert_array_equal(shown(both, DicomRules("none")), shown(plain))
    np.testing.assert_array_equal(shown(both, DicomRules("1000,800")), shown(window))
    np.testing.assert_array_equal(shown(both), 255 - shown(plain))
    assert DicomRules("1000.0, 8e2") == DicomRules("1000,800")


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_ct_and_mr_need_a_window(modality: str) -> None:
    data = make_dicom(ramp(12), bits=12, Modality=modality, **WINDOW)
    assert f"{modality}, which needs a window" in reason(data)
    assert shown(data, DicomRules("first")).any()


def test_frames_are_chosen() -> None:
    frames = np.stack([ramp(8), ramp(8)[::-1], ramp(8)[:, ::-1]])
    for syntax in ("explicit", "RLE", "JPEG 2000 lossless"):
        data = make_dicom(frames, syntax=syntax)
        assert reason(data) == "a DICOM file of 3 frames, of which --frame N chooses one"
        assert reason(data, DicomRules(frame=4)) == "a DICOM file of 3 frames, without frame 4"
        np.testing.assert_array_equal(shown(data, DicomRules(frame=2)), frames[1])
    np.testing.assert_array_equal(shown(make_dicom(ramp(8)), DicomRules(frame=2)), ramp(8))


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "RLE"])
def test_each_frame_has_the_window_and_slope_of_its_own(syntax: str) -> None:
    def groups(center: int, slope: str | None) -> Any:
        item, window, values = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        window.WindowCenter, window.WindowWidth = center, 100
        item.FrameVOILUTSequence = [window]
        if slope is not None:
            values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, "-10", "US"
            item.PixelValueTransformationSequence = [values]
        return item

    frames = np.stack([ramp(12), ramp(12)[::-1], ramp(12)[:, ::-1]])
    data = make_dicom(
        frames, bits=12, syntax=syntax, SharedFunctionalGroupsSequence=[groups(99, "0.5")],
        PerFrameFunctionalGroupsSequence=[groups(500, "1.25"), groups(3000, None), groups(9, "2")],
    )  # fmt: skip
    for number, (center, slope) in enumerate([(500, "1.25"), (3000, "0.5"), (9, "2")]):
        how = {"WindowCenter": center, "WindowWidth": 100, "RescaleSlope": slope}
        single = make_dicom(frames[number], bits=12, RescaleIntercept="-10", **how)
        np.testing.assert_array_equal(shown(data, DicomRules(frame=number + 1)), shown(single))


# ------------------------------------------------------------------------------ without a preamble


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big endian", "RLE"])
def test_files_without_preamble_or_meta_information_are_read(syntax: str) -> None:
    data = make_dicom(ramp(12), bits=12, syntax=syntax, **WINDOW)
    bare = data[132:]
    group = 12 + read_back(data).file_meta.FileMetaInformationGroupLength
    assert is_dicom(bare)
    np.testing.assert_array_equal(shown(bare), shown(data))
    assert is_dicom(bare[group:])
    if syntax == "RLE":
        assert reason(bare[group:]).startswith("a compressed DICOM file without a transfer syntax")
    else:
        np.testing.assert_array_equal(shown(bare[group:]), shown(data))


def test_acr_nema_files_are_read() -> None:
    """Those of 1985 and 1988: implicit VR, no UIDs, no photometric interpretation."""
    values = ramp(12)
    elements = [
        (0x00080000, bytes(4)), (0x00080001, bytes(4)), (0x00080010, b"ACR-NEMA 2.0"),
        (0x00280005, b"\2\0"), (0x00280010, b"\x40\0"), (0x00280011, b"\x48\0"),
        (0x00280100, b"\x10\0"), (0x00280101, b"\x0c\0"), (0x00280102, b"\x0b\0"),
        (0x00280103, b"\0\0"), (0x7FE00010, values.tobytes()),
    ]  # fmt: skip
    data = b"".join(
        (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
        + len(value).to_bytes(4, "little") + value
        for tag, value in elements
    )  # fmt: skip
    assert is_dicom(data)
    np.testing.assert_array_equal(shown(data), shown(make_dicom(values, bits=12)))


def test_other_bytes_are_no_dicom() -> None:
    data = make_dicom(ramp(8))
    chance = random.Random(0)
    others = [bytes(2000), b"\x08\0" * 500, b"\x89PNG\r\n\x1a\n" + bytes(999), data[2:],
              *(b"\x08\0\x05\0" + chance.randbytes(999) for _ in range(999))]  # fmt: skip
    assert not any(map(is_dicom, others))
    wrong = data[:128] + b"DICN" + data[132:]
    with pytest.raises(DataError, match="damaged DICOM file: not DICM at byte 128"):
        load(wrong, RULES)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"PixelData": None}, "a DICOM file without pixels (Digital X-Ray Image)"),
        ({"PixelData": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "(Basic Text SR)"),
        ({"PixelData": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"},
         "(Grayscale Softcopy Presentation State)"),
        ({"photometric": "RGB"}, "in colour (RGB)"),
        ({"photometric": "SMITH"}, "without a known PhotometricInterpretation"),
        ({"PresentationLUTShape": "INVERSE"}, "contradict each other"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "a window of width 0"),
        ({**WINDOW, "VOILUTFunction": "SMITH"}, "no known function"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "a rescale slope of 0"),
        ({"HighBit": 15}, "12 bits whose highest is bit 15"),
        ({"BitsStored": 99}, "99 bits stored in 16"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, above --max-pixels"),
        ({"Rows": 0}, "no rows"),
        ({"VOILUTSequence": [table(np.arange(9), 0, 99)]}, "lookup table of wrong sizes"),
    ],
)  # fmt: skip
def test_what_is_no_grey_picture_fails_with_its_reason(changes: dict[str, Any], found: str) -> None:
    text = reason(make_dicom(ramp(12), bits=12, **changes))
    assert found in text
    assert "SMITH" not in text


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_file_that_is_cut_off_is_said_to_be(syntax: str) -> None:
    data = make_dicom(ramp(8), syntax=syntax)
    for size in (len(data) * 4 // 5, len(data) - 100):
        found = re.search(
            "DICOM file (that is|of .* of 4,608 bytes .* as if) cut off", reason(data[:size])
        )
        assert found


def test_a_file_is_decoded_in_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_dicom(ramp(12), bits=12, **WINDOW)
    monkeypatch.setattr("featcache.pixels.isolation.read_dicom", None)
    picture = load(data, RULES)
    assert picture.dicom_is_deep
    np.testing.assert_array_equal(picture.pixels, shown(data))
    with pytest.raises(DataError, match="without pixels"):
        load(make_dicom(ramp(8), PixelData=None), RULES)


def test_where_nothing_says_how_dicom_is_read_it_is_refused() -> None:
    with pytest.raises(DataError, match="a DICOM file by another name"):
        load(make_dicom(ramp(8)), PixelRules(64))


def test_without_pydicom_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.data.dicom_files.is_installed", lambda: False)
    with pytest.raises(DataError, match=r"needs pydicom: pip install 'featcache\[dicom\]'"):
        load(make_dicom(ramp(8)), RULES)
