"""Name files that cannot be read, and TIFF files that Pillow reads wrongly without a word.

Reads: bytes, and headers that Pillow has read. Writes: nothing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFile, TiffImagePlugin

_CONVERT = "convert it to PNG or JPEG first"
# first bytes -> what such a file is
_FIRST_BYTES = {
    b"version https://git-lfs": "a Git LFS pointer in place of the image (git lfs pull)",
    b"GIF8": "a GIF",
    b"<": "an HTML or XML page",
    b"\0\0\0\x0cjP  \r\n\x87\n": f"a JPEG 2000 image ({_CONVERT})",
    b"\xff\x4f\xff\x51": f"a JPEG 2000 image ({_CONVERT})",
    b"\0\0\0\x0cJXL \r\n\x87\n": f"a JPEG XL image ({_CONVERT})",
    b"\xff\x0a": f"a JPEG XL image ({_CONVERT})",
    # one element alone; what begins with three is read (see dicom_files)
    **dict.fromkeys(
        (
            b"\x08\0\x05\0",
            b"\x08\0\0\0",
            b"\x08\0\x01\0",
            b"\x08\0\x08\0",
            b"\x08\0\x16\0",
            b"\x02\0\0\0",
        ),
        "perhaps a damaged DICOM file: DICM is not at byte 128, nor elements at its start",
    ),
    b"8BPS": f"a Photoshop document ({_CONVERT})",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
}
# brand in the first box of an ISO base media file (ISO 14496-12) -> what it is
_BRANDS = {
    b"avif": "an AVIF image", b"avis": "an AVIF image",
    b"heic": "an iPhone photo (HEIC)", b"heix": "an iPhone photo (HEIC)",
    b"hevc": "an iPhone photo (HEIC)", b"mif1": "a HEIF image", b"msf1": "a HEIF image",
    b"crx ": "a raw photo (CR3)", b"qt  ": "a video", b"isom": "a video", b"mp42": "a video",
}  # fmt: skip
# JPEG's frame markers (ITU-T T.81, table B.1; T.87 for JPEG-LS)
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_WITHOUT_BODY = {0x01, *range(0xD0, 0xD9)}
# tag 259 of TIFF, where Pillow knows none
_COMPRESSIONS = {
    33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
    34887: "LERC", 34933: "PNG", 34934: "JPEG XR", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
# What Pillow says of samples that it cannot read; anything else is damage.
_NO_SUCH_SAMPLES = {
    "unknown pixel mode", "unknown raw mode for given image mode", "string index out of range",
    "Invalid value for samples per pixel",
}  # fmt: skip
# Compressions that Pillow knows, but that libtiff in its wheels does not.
_OPTIONAL = {34661: "JBIG", 50001: "WebP"}
_NUMBERS = {1: "unsigned", 2: "signed", 3: "float", 5: "complex", 6: "complex"}
_SEPARATE = 2  # tag 284: each colour in a plane of its own
_GREY, _YCBCR, _LAB = {0, 1}, 6, 8  # tag 262


def foreign_kind(data: bytes) -> str | None:
    """Return what a file is by its first bytes, if it is no image that is read here."""
    if data[128:132] == b"DICM":
        return "a DICOM file"
    if data[132:136] == b"\2\0\0\0":
        return "a damaged DICOM file: not DICM at byte 128, and elements behind it"
    if data[344:348] in {b"n+1\0", b"ni1\0"}:
        return "a NIfTI file (convert its slices to PNG first)"
    if data[4:8] == b"ftyp":
        brands = [data[8:12], *(data[i : i + 4] for i in range(16, 64, 4))]
        known = next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "a media file")
        avif = {b"avif", b"avis"}.intersection(brands)
        return f"{'an AVIF image' if avif else known} ({_CONVERT})"
    start = data[:100].lstrip()
    for prefix, kind in _FIRST_BYTES.items():
        if data.startswith(prefix) or start.startswith(prefix):
            return kind
    return None


def unsupported_kind(name: str, data: bytes, error: Exception) -> str | None:
    """Return why an image that Pillow refused is not supported; None if it may be broken.

    Args:
        name: Its format.
        data: The file.
        error: What Pillow raised.
    """
    try:
        if name == "JPEG":
            return _unsupported_jpeg(data)
        return _unsupported_tiff(data, str(error)) if name == "TIFF" else None
    except Exception:  # noqa: BLE001  (a damaged header raises anything: it is broken)
        return None


def _unsupported_jpeg(data: bytes) -> str | None:
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            precision = data[place + 4]
            if marker == 0xF7:
                return "a JPEG-LS image, which is not supported"
            if marker in _LOSSLESS:
                return f"a lossless JPEG of {precision} bits, which is not supported"
            return f"a {precision}-bit JPEG, which is not supported" if precision != 8 else None
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        place += 1 if marker == 0xFF else 2 if marker in _WITHOUT_BODY else 2 + length
    return None


def _unsupported_tiff(data: bytes, reason: str) -> str | None:
    if data.startswith(b"MM\0\x2b"):
        return "a big-endian BigTIFF, which is not supported"
    file = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
    file.seek(tags.next)
    tags.load(file)
    if not {256, 257} <= tags.keys():  # width and height
        return None
    compression = tags.get(259, 1)
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        how = _COMPRESSIONS.get(compression, f"method {compression}")
        return f"a TIFF compressed by {how}, which is not supported"
    if compression in _OPTIONAL and reason.startswith("decoder error"):
        return f"a TIFF compressed by {_OPTIONAL[compression]}, which Pillow has no decoder for"
    is_known = reason in _NO_SUCH_SAMPLES
    return f"a TIFF of {_describe_samples(tags)}, which is not supported" if is_known else None


def _describe_samples(tags: Mapping[int, Any]) -> str:
    """Return such as "4 bands of 16-bit unsigned values in separate planes"."""
    bits, numbers, bands = (
        tags.get(tag, default) for tag, default in ((258, 1), (339, 1), (277, 1))
    )
    bits, numbers = ({*_as_tuple(value)} for value in (bits, numbers))
    kind = "/".join(_NUMBERS.get(number, "unknown") for number in sorted(numbers))
    text = f"{bands} {'band' if bands == 1 else 'bands'} of {'/'.join(map(str, sorted(bits)))}-bit"
    text += f" {kind} values"
    text += " in separate planes" if tags.get(284) == _SEPARATE and bands != 1 else ""
    photometric = int(tags.get(262, 0))
    names = {0: "white is zero", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
    return f"{text} ({names.get(photometric, f'photometric {photometric}')})"


def misread_kind(name: str, image: ImageFile.ImageFile) -> str | None:
    """Return what a file is that Pillow reads wrongly; None for all others.

    Found by comparing 1,500 kinds of TIFF with tifffile (tests/pixels/test_tiff_matrix.py),
    with Pillow 13.0. Signed bytes and unsigned 32 bits are read right up to half of their
    range: see ``images``.

    Args:
        name: Its format.
        image: The file as Pillow has opened it.
    """
    if name == "JPEG":
        # Pillow inverts every CMYK JPEG, as Adobe writes them; others store inks as they are.
        no_marker = image.mode == "CMYK" and "adobe" not in image.info
        return "a CMYK JPEG without Adobe's marker, which Pillow inverts" if no_marker else None
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    tags = image.tag_v2  # which stay when the pixels are read
    by_libtiff = tags.get(259, 1) != 1 or TiffImagePlugin.READ_LIBTIFF
    depth, number = (max(_as_tuple(tags.get(tag, 1))) for tag in (258, 339))
    is_swapped = by_libtiff and tags.prefix == b"MM" and number in {2, 3} and depth > 8
    if is_swapped:
        return (
            f"a compressed big-endian TIFF of {_describe_samples(tags)}, whose bytes Pillow swaps"
        )
    if tags.get(262) == _YCBCR and not by_libtiff and _has_fewer_colours(tags):
        return "a TIFF of YCbCr with fewer colours than pixels, which Pillow mixes up"
    if tags.get(284) != _SEPARATE or tags.get(277, 1) == 1:
        return None
    photometric, alpha = tags.get(262), tags.get(338, ())
    if (
        (depth > 8 and not by_libtiff)
        or photometric == _LAB
        or (photometric in _GREY and by_libtiff and (depth > 8 or 1 in alpha))
    ):
        return f"a TIFF of {_describe_samples(tags)}, which Pillow mixes up"
    return None


def _has_fewer_colours(tags: Mapping[int, Any]) -> bool:
    """Return whether uncompressed YCbCr is subsampled: tag 530 (TIFF 6.0, section 21) and size."""
    num_bytes = sum(_as_tuple(tags.get(279, tags.get(325, 0))))
    is_subsampled = bool(tags.get(530, (2, 2)) != (1, 1))
    return is_subsampled and 0 < num_bytes < 3 * int(tags[256]) * int(tags[257])


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def may_wrap(image: Image.Image) -> bool:
    """Return whether Pillow may wrap values round: signed bytes and unsigned 32 bits of TIFF.

    They are right up to half of their range.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    bits, numbers = image.tag_v2.get(258, (1,)), image.tag_v2.get(339, (1,))
    return (bits, numbers) in {((8,), (2,)), ((32,), (1,))}
