"""Read a DICOM file as 8-bit grey: what a radiologist sees of a CR, DX, DR or MG image.

Stored values become 8 bits in this order, as PS3.3 C.11 and PS3.4 N.2 have it:

1. Modality LUT, or rescale slope and intercept.
2. VOI: the first VOI LUT, else the first window (LINEAR, LINEAR_EXACT or SIGMOID), both to 0..1;
   else the range that the stored bits allow, after step 1, to 0..1. Beyond it values are clipped.
3. MONOCHROME1 is inverted, last and once: ``1 - y``. Presentation LUT Shape INVERSE is what
   MONOCHROME1 has, and inverts nothing beyond it.
4. ``floor(255 y + 0.5 + 2^-30)``: the nearest whole number, halves upwards whatever y's last bits.

A window applies to what step 1 gives, for MR too. Real world value maps, overlays and padding
values are not looked at. Files without ``DICM`` at byte 128 are DICOM if they begin with elements:
see ``dicom_files``.

The only module that uses pydicom (``dicom_display`` gets its data sets). It and its decoders run in
a child process alone, as hostile files crash them (see ``isolation``). No text of a file and no
message of pydicom, which quotes them, gets into an error: they hold names of patients.

Reads: bytes. Writes: nothing. Every failure is a ``DataError`` whose ``found`` is the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.data.dicom_files import INSTALL, is_installed
from featcache.errors import DataError, TransientError
from featcache.pixels.dicom_bombs import CountedReads, codestream_size, inflate
from featcache.pixels.dicom_display import Display, failure, text, whole
from featcache.pixels.dicom_rules import DicomRules

MISSING = f"a DICOM file, which needs pydicom: {INSTALL}"
_is_child_process = False

_NEEDS_WINDOW = {"CT", "MR"}
_MAX_BITS = 32
_MOST_ENTRIES = 1 << 17  # of a table of shades

_Grey: TypeAlias = npt.NDArray[np.uint8]

_IMAGE_TAGS = [
    "SOPClassUID", "Modality", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns",
    "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PlanarConfiguration", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData",
    "DoubleFloatPixelData", "RecognitionCode",
]  # fmt: skip
_ACR_NEMA: dict[str, Any] = {
    "PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1, "PixelRepresentation": 0
}  # fmt: skip
# Transfer syntax -> pydicom's plugins that are tried for it, in this order: one alone where one is
# enough, so that the same file gives the same pixels wherever it is read.
_JPEG_PLUGINS = ("pillow", "gdcm", "pylibjpeg")
_PLUGINS: dict[str, tuple[str, ...]] = {
    "1.2.840.10008.1.2.4.50": _JPEG_PLUGINS,  # JPEG baseline
    "1.2.840.10008.1.2.4.51": _JPEG_PLUGINS,  # JPEG extended: 12 bits by pylibjpeg-libjpeg alone
    "1.2.840.10008.1.2.4.57": ("gdcm",),  # JPEG lossless
    "1.2.840.10008.1.2.4.70": ("gdcm",),  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": ("gdcm",),  # JPEG-LS
    "1.2.840.10008.1.2.4.81": ("gdcm",),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg",),  # JPEG 2000
    "1.2.840.10008.1.2.4.91": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),  # HTJ2K
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),
    "1.2.840.10008.1.2.5": ("pydicom",),  # RLE
    "1.2.840.10008.1.2": ("",),  # uncompressed, and deflated as a whole
    "1.2.840.10008.1.2.1": ("",),
    "1.2.840.10008.1.2.1.99": ("",),
    "1.2.840.10008.1.2.2": ("",),
}
_COLOURS = {
    "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422",
    "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT", "XYB",
}  # fmt: skip


@dataclass(frozen=True)
class DicomPicture:
    """Pixels (H, W) uint8, and whether the file stores more than 8 bits."""

    pixels: _Grey
    is_deep: bool


@contextlib.contextmanager
def child_process() -> Iterator[None]:
    """Tell ``is_child_process`` that this process is a child that decodes."""
    global _is_child_process  # noqa: PLW0603
    _is_child_process = True
    try:
        yield
    finally:
        _is_child_process = False


def is_child_process() -> bool:
    """Return whether this process is a child that decodes, so that DICOM is decoded in it."""
    return _is_child_process


def read_dicom(data: bytes, rules: DicomRules, max_pixels: int) -> DicomPicture:
    """Decode a DICOM file. For child processes only: see ``isolation.decode_dicom``.

    Raises:
        DataError: If it is no picture in grey under these rules, or is broken.
        TransientError: If there was no memory for it.
    """
    if not is_installed():
        raise failure(MISSING)
    try:
        with quiet_pydicom():
            return _read(data, rules, max_pixels)
    except DataError:
        raise
    except MemoryError as error:
        raise failure("a DICOM file too large for the memory", kind=TransientError) from error
    # A damaged file makes pydicom and its decoders raise anything. What they say quotes the file.
    except Exception as error:  # noqa: BLE001  (of any kind)
        raise failure(f"a broken DICOM file ({type(error).__name__})") from None


@contextlib.contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Let pydicom neither warn, nor log, nor judge values that are not asked for."""
    from pydicom import config

    logger, level = logging.getLogger("pydicom"), logging.getLogger("pydicom").level
    mode = config.settings.reading_validation_mode
    logger.setLevel(logging.CRITICAL + 1)
    config.settings.reading_validation_mode = config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        config.settings.reading_validation_mode = mode


def open_dataset(file: BinaryIO, tags: list[str], max_bytes: int, *, pixels: bool = True) -> Any:
    """Return the data set of a file, with these elements alone.

    Args:
        file: Open, at its start.
        tags: Keywords of the elements; the others are skipped unread.
        max_bytes: Refuse a deflated file that holds more; without ``pixels``, read so much of it.
        pixels: Go on to the pixels, and what comes after them.

    Raises:
        DataError: If it holds more, or a hostile number of elements.
    """
    import pydicom

    counted: Any = CountedReads(inflate(file, max_bytes, whole=pixels))
    return pydicom.dcmread(
        counted, force=True, specific_tags=[*tags], stop_before_pixels=not pixels
    )  # fmt: skip


def read_stored(data: bytes, max_pixels: int) -> tuple[npt.NDArray[Any], str]:
    """Return the stored values of the first frame, (H, W), and their photometric interpretation.

    Raises:
        DataError: If it is no picture in grey, or is broken.
    """
    try:
        with quiet_pydicom():
            dataset = _open_image(data, max_pixels)
            _refuse_bomb(dataset, max_pixels)
            return _decode(dataset, 0), text(dataset, "PhotometricInterpretation")
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (of any kind)
        raise failure(f"a broken DICOM file ({type(error).__name__})") from None


def _read(data: bytes, rules: DicomRules, max_pixels: int) -> DicomPicture:
    dataset = _open_image(data, max_pixels)
    modality = text(dataset, "Modality")
    if modality in _NEEDS_WINDOW and rules.window is None:
        raise failure(
            f"{modality}, which needs a window: extract --window CENTER,WIDTH, first, voi or none"
        )
    _refuse_bomb(dataset, max_pixels)
    frame = _choose_frame(dataset, rules)
    stored = _decode(dataset, frame)
    bits = whole(dataset, "BitsStored")
    is_signed = whole(dataset, "PixelRepresentation") == 1
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    display = Display.of(dataset, frame, rules.window or "voi", low, high)
    # J2K may hold values beyond the stored bits: of 24 bits a table takes 0.7 GB
    first, last = min(low, int(stored.min())), max(high, int(stored.max()))
    if last - first < _MOST_ENTRIES:  # each of these values once
        table = display.apply(np.arange(first, last + 1, dtype=np.float64))
        return DicomPicture(table[stored.astype(np.int64) - first], bits > 8)
    rows = [display.apply(row.astype(np.float64)) for row in stored]
    return DicomPicture(np.stack(rows), bits > 8)


# ---------------------------------------------------------------------------------- what it may be


def _open_image(data: bytes, max_pixels: int) -> Any:
    """Return the data set of a picture in grey; raise DataError for all others."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # pydicom drops what is cut off, and warns
        dataset = open_dataset(io.BytesIO(data), _IMAGE_TAGS, 4 * max_pixels + (1 << 26))
    if "PixelData" not in dataset and any("End of file" in f"{one.message}" for one in told):
        raise failure("a DICOM file that is cut off in its pixels")
    if text(dataset, "RecognitionCode").startswith("ACR-NEMA"):  # which knows no other pictures
        for keyword, value in _ACR_NEMA.items():
            if keyword not in dataset:
                setattr(dataset, keyword, value)
    _refuse_kind(dataset)
    return dataset


def _refuse_kind(dataset: Any) -> None:
    """Refuse what is no picture in grey, with the reason."""
    from pydicom.uid import UID

    meta = getattr(dataset, "file_meta", {})
    uid = UID(text(dataset, "SOPClassUID") or text(meta, "MediaStorageSOPClassUID"))
    known = str(uid.name) if uid.is_valid and uid.name != str(uid) else ""
    kind = re.sub(r" Storage( - .*)?$", "", known)
    named = f" ({kind})" if kind else ""
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise failure(f"a DICOM file of float pixels{named}, which is not read")
    if "PixelData" not in dataset:
        raise failure(f"a DICOM file without pixels{named}")
    if "Segmentation" in kind:
        raise failure(f"a DICOM file of masks{named}")
    photometric = text(dataset, "PhotometricInterpretation")
    if photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        if photometric not in _COLOURS:
            raise failure("a DICOM file without a known PhotometricInterpretation")
        raise failure(f"a DICOM file in colour ({photometric}), which is not read")
    if whole(dataset, "SamplesPerPixel", 1) != 1:
        raise failure("a DICOM file of several values a pixel, which is not read")
    if photometric == "MONOCHROME2" and text(dataset, "PresentationLUTShape") == "INVERSE":
        raise failure(
            "MONOCHROME2 with Presentation LUT Shape INVERSE, which contradict each other"
        )


def _refuse_bomb(dataset: Any, max_pixels: int) -> None:
    rows, columns = whole(dataset, "Rows"), whole(dataset, "Columns")
    frames = _num_frames(dataset)
    allocated, bits = whole(dataset, "BitsAllocated"), whole(dataset, "BitsStored")
    if min(rows, columns, frames) < 1:
        raise failure("a DICOM file of no rows, columns or frames")
    if rows * columns * frames > max_pixels:
        several = f" x {frames} frames" if frames > 1 else ""
        raise failure(f"{columns} x {rows} pixels{several}, above --max-pixels {max_pixels:,}")
    if not 1 <= bits <= allocated <= _MAX_BITS:
        raise failure(f"{bits} bits stored in {allocated}, which is not read")
    if whole(dataset, "HighBit", bits - 1) != bits - 1:
        raise failure(f"{bits} bits whose highest is bit {whole(dataset, 'HighBit')}")
    if allocated == 1:
        raise failure("a DICOM file of 1 bit a pixel")


def _choose_frame(dataset: Any, rules: DicomRules) -> int:
    frames = _num_frames(dataset)
    if frames == 1:
        return 0
    if rules.frame is None:
        raise failure(f"a DICOM file of {frames} frames, of which --frame N chooses one")
    if rules.frame > frames:
        raise failure(f"a DICOM file of {frames} frames, without frame {rules.frame}")
    return rules.frame - 1


def _num_frames(dataset: Any) -> int:
    return whole(dataset, "NumberOfFrames", 1)


# ----------------------------------------------------------------------------------- stored values


def _decode(dataset: Any, frame: int) -> npt.NDArray[Any]:
    """Return the stored values (H, W) of a frame."""
    from pydicom.pixels.decoders.base import get_decoder

    syntax = _find_syntax(dataset)
    plugins = _PLUGINS.get(str(syntax))
    if plugins is None:
        name = syntax.name if syntax.name != str(syntax) else "a private transfer syntax"
        raise failure(f"a DICOM file in {name}, which is not read")
    if syntax.is_encapsulated:
        _check_codestream(dataset, frame)
    decoder = get_decoder(syntax)
    able = [name for name in plugins if not name or name in decoder.available_plugins]
    if not able:
        raise failure(f"a DICOM file in {syntax.name}, whose decoder is missing: {INSTALL}")
    _mute_decoders()
    error: Exception | None = None
    for plugin in able:
        try:
            values, _ = decoder.as_array(dataset, index=frame, raw=True, decoding_plugin=plugin)
        except (MemoryError, DataError):
            raise
        except Exception as refused:  # noqa: BLE001  (of any kind, see read_dicom)
            error = refused
            continue
        if values.ndim != 2:
            raise failure("a DICOM file of several values a pixel, which is not read")
        return values
    if str(syntax).endswith(".4.51") and whole(dataset, "BitsStored") > 8:
        raise failure("JPEG of 12 bits, which no free decoder here reads (pylibjpeg-libjpeg does)")
    needed = _num_frames(dataset) * whole(dataset, "Rows") * whole(dataset, "Columns")
    needed, found = needed * whole(dataset, "BitsAllocated") // 8, len(dataset.PixelData)
    if not syntax.is_encapsulated and found < needed:
        raise failure(f"a DICOM file of {found:,} of {needed:,} bytes of pixels, as if cut off")
    raise failure(f"a broken DICOM file ({type(error).__name__} of its decoder)")


def _find_syntax(dataset: Any) -> Any:
    """Return the transfer syntax of a data set; of one without, that of its elements."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if (syntax := dataset.file_meta.get("TransferSyntaxUID")) is not None:
        return syntax
    if dataset["PixelData"].is_undefined_length:
        raise failure("a compressed DICOM file without a transfer syntax, which says how")
    is_implicit, is_little = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset.file_meta.TransferSyntaxUID


def _check_codestream(dataset: Any, frame: int) -> None:
    """Refuse a compressed frame of other sizes than the header says, before memory is taken."""
    from pydicom.encaps import get_frame

    extended = None
    if "ExtendedOffsetTable" in dataset:
        extended = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    stream = get_frame(
        dataset.PixelData, frame, number_of_frames=_num_frames(dataset), extended_offsets=extended
    )
    found = codestream_size(stream)
    wanted = (whole(dataset, "Columns"), whole(dataset, "Rows"))
    if found is not None and found != (*wanted, 1):
        width, height, channels = found
        raise failure(
            f"a compressed image of {width} x {height} x {channels} in a DICOM file of "
            f"{wanted[0]} x {wanted[1]}"
        )


def _mute_decoders() -> None:
    """Let GDCM, which writes to standard error, say nothing."""
    with contextlib.suppress(ImportError):
        import gdcm

        for switch in ("DebugOff", "WarningOff", "ErrorOff"):
            getattr(gdcm.Trace, switch)()
