"""DICOM files for tests, by pydicom and its encoders. Import it only where pydicom is there."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

DX = "1.2.840.10008.5.1.4.1.1.1.1"
SYNTAXES = {
    "implicit": ImplicitVRLittleEndian, "explicit": ExplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian, "big endian": ExplicitVRBigEndian,
    "RLE": RLELossless, "JPEG 2000": JPEG2000, "JPEG 2000 lossless": JPEG2000Lossless,
    "JPEG lossless": JPEGLossless, "JPEG lossless SV1": JPEGLosslessSV1,
    "JPEG-LS": JPEGLSLossless, "JPEG": JPEGBaseline8Bit, "JPEG extended": JPEGExtended12Bit,
}  # fmt: skip
_BY_GDCM = {
    "JPEG lossless": "JPEGLosslessProcess14", "JPEG lossless SV1": "JPEGLosslessProcess14_1",
    "JPEG-LS": "JPEGLSLossless",
}  # fmt: skip


def ramp(bits: int, *, signed: bool = False, shape: tuple[int, int] = (64, 72)) -> npt.NDArray[Any]:
    """Return values that run over the whole range of some stored bits, (H, W)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    kind = "i" if signed else "u"
    values = np.linspace(low, high, shape[0] * shape[1]).round().reshape(shape)
    return values.astype(f"<{kind}{1 if bits <= 8 else 2 if bits <= 16 else 4}")


def table(entries: npt.ArrayLike, first: int, bits: int, *, signed: bool = False) -> Dataset:
    """Return an item of a Modality LUT Sequence or VOI LUT Sequence."""
    item, values = Dataset(), np.asarray(entries, np.uint16)
    item.add_new("LUTDescriptor", "SS" if signed else "US", [len(values) % 65536, first, bits])
    item.add_new("ModalityLUTType", "LO", "US")
    if bits == 8:
        item.add_new("LUTData", "OW", values.astype("u1").tobytes())
    else:
        item.add_new("LUTData", "US", values.tolist())
    return item


def make_dicom(
    values: npt.NDArray[Any], *, bits: int | None = None, syntax: str = "explicit",
    photometric: str = "MONOCHROME2", **elements: Any,
) -> bytes:  # fmt: skip
    """Return a DX image as a file.

    Args:
        values: (H, W), or (frames, H, W), uint8, uint16, int8 or int16, ...
        bits: Stored ones; those of the dtype by default.
        syntax: Of ``SYNTAXES``.
        photometric: Photometric interpretation.
        **elements: Keyword -> value; None leaves the element out.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    allocated = 8 * values.dtype.itemsize
    bits = bits or allocated
    facts: dict[str, Any] = {
        "SOPClassUID": DX, "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.1", "Modality": "DX",
        "StudyInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.4.5",
        "PatientID": "", "PatientName": "", "PatientBirthDate": "", "PatientSex": "",
        "StudyDate": "", "StudyTime": "", "AccessionNumber": "", "ReferringPhysicianName": "",
        "StudyID": "", "SeriesNumber": 1, "InstanceNumber": 1, "Manufacturer": "",
        "SamplesPerPixel": 1, "PhotometricInterpretation": photometric,
        "Rows": values.shape[-2], "Columns": values.shape[-1], "BitsAllocated": allocated,
        "BitsStored": bits, "HighBit": bits - 1,
        "PixelRepresentation": int(values.dtype.kind == "i"),
        **({"NumberOfFrames": len(values)} if values.ndim == 3 else {}),
    }  # fmt: skip
    for keyword, value in (facts | elements).items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", DX)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID", "1.2.3")
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if elements.get("PixelData", b"") is not None:
        _set_pixels(dataset, values, syntax)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return (
        _by_gdcm(buffer.getvalue(), _BY_GDCM[syntax]) if syntax in _BY_GDCM else buffer.getvalue()
    )


def _set_pixels(dataset: Dataset, values: npt.NDArray[Any], syntax: str) -> None:
    order = ">" if syntax == "big endian" else "<"
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if syntax in {"implicit", "explicit", "deflated", "big endian"} or syntax in _BY_GDCM:
        dataset.PixelData = raw + b"\0" * (len(raw) % 2)
        dataset["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
        if syntax not in _BY_GDCM:
            dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    elif syntax in {"JPEG", "JPEG extended"}:
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, "JPEG", quality=95)
        dataset.PixelData = encapsulate([stream.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    else:
        dataset.PixelData = values.tobytes()
        more = {"j2k_cr": [4]} if syntax == "JPEG 2000" else {}
        dataset.compress(SYNTAXES[syntax], generate_instance_uid=False, **more)


def _by_gdcm(data: bytes, syntax: str) -> bytes:
    import tempfile
    from pathlib import Path

    import gdcm

    with tempfile.TemporaryDirectory() as folder:
        source, made = (Path(folder) / name for name in ("a.dcm", "b.dcm"))
        source.write_bytes(data)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(made))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return made.read_bytes()


def read_back(data: bytes) -> pydicom.FileDataset:
    """Return a file as pydicom reads it."""
    return pydicom.dcmread(io.BytesIO(data))
