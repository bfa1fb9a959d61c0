"""Decode the bytes of one image file into its stored values, upright.

Pillow reads every header. Pixels of plain JPEG and PNG files come from faster decoders; what those
refuse is decoded by Pillow. So Pillow alone decides which files are images.

Reads: bytes. Writes: nothing. Every failure is a ``DataError`` whose ``found`` is the reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from featcache.errors import DataError, TransientError, printable
from featcache.pixels import acceleration, deep, png
from featcache.pixels.unsupported import foreign_kind, may_wrap, misread_kind, unsupported_kind
from featcache.untrusted import MAX_PIXELS

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

_Values: TypeAlias = np.ndarray[Any, Any]
_Depth: TypeAlias = tuple[int | None, bool, bool]
"""The last three of ``Loaded``."""
_Result = TypeVar("_Result")


class _TiffImageFile(TiffImagePlugin.TiffImageFile):
    """A TIFF that Pillow loads without applying the user's process-wide MAX_IMAGE_PIXELS."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self._tile_size).im
        super().load_prepare()


# The classes are called directly: Image.open would apply the user's process-wide MAX_IMAGE_PIXELS
# (a warning or an error below our own limit) and try every other format. A new format: a line here,
# its ending in data/folders.py; ``deep`` and ``unsupported`` only if it has 16 bits or is misread.
# WebP's signature has a gap, so it is looked for apart.
_READERS: tuple[tuple[str, tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ("JPEG", (b"\xff\xd8\xff",), JpegImageFile),
    ("BMP", (b"BM",), BmpImageFile),
    ("TIFF", tuple(TiffImagePlugin.PREFIXES), _TiffImageFile),
    ("PPM", (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"), PpmImageFile),
)
# Pillow's mode -> libjpeg's colour spaces that it stands for
_JPEG_COLOURS = {"L": {"Gray"}, "RGB": {"YCbCr", "RGB"}}
# EXIF 2.3, tag 0x0112: orientation -> mirror left and right first?, quarter turns against the clock
_TURNS = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1),
    6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """An upright image in memory, and what the file says about its depth."""

    values: _Values  # 8 bits as in Picture; or more: (H, W) grey, (H, W, 3) RGB, (H, W, 4) CMYK
    truncated: bool
    stated_maximum: int | None  # of deep greyscale: the value of white, if the file says it
    white_is_zero: bool  # deep TIFF with inverted values, which Pillow hands out as stored
    deep_colour: bool  # 16 bits per channel; ``values`` are their high bytes, or all of them


def read(
    data: bytes, *, fill: bool, all_bits: bool = False, max_pixels: int = MAX_PIXELS
) -> Loaded:
    """Read the first frame; with ``fill``, fill in the missing part of a cut-off file.

    Args:
        data: The file.
        fill: Fill in what is missing.
        all_bits: Return all 16 bits of deep colour, not the high byte.
        max_pixels: Refuse images of more, unread.

    Raises:
        DataError: If the bytes cannot be decoded.
    """
    with _truncation_gate(fill=fill):
        image, values, depth = _without_large_texts(
            lambda lean: _load(lean, fill=fill, all_bits=all_bits, max_pixels=max_pixels), data
        )
    try:
        values = _to_array(image) if values is None else values
        _refuse_wrapped(image, values)
        return Loaded(_upright(image, values), fill, *depth)
    except (MemoryError, OSError, ValueError) as error:
        raise failure(f"colours of kind {image.mode}", error) from error


def _load(
    data: bytes, *, fill: bool, all_bits: bool, max_pixels: int
) -> tuple[Image.Image, _Values | None, _Depth]:
    """Return a loaded image, its values where it was not Pillow that loaded them, and its depth."""
    name, image = _open(data)
    _refuse_bomb(image, max_pixels)
    depth = _find_depth(name, image)  # loading forgets it
    values = None if fill else _decode_fast(name, image, data)
    if values is None:
        try:
            if all_bits and depth[2]:
                values, image = deep.read_samples(name, lambda: _open(data)[1])
            else:
                image.load()
        except Exception as error:  # of any kind, see _open
            raise _refused(name, data, error) from error
    return image, values, depth


def read_opened(image: Image.Image) -> Loaded:
    """Return an image that the caller has opened with Pillow as ``read`` returns its file.

    Raises:
        DataError: If its pixels cannot be loaded, or are too many.
    """
    name = image.format or "image"
    depth: _Depth = (None, False, False)
    if isinstance(image, ImageFile.ImageFile):
        depth = _find_depth(name, image)
        if (misread := misread_kind(name, image)) is not None:
            raise failure(misread, kind=MisreadError)
    try:
        _mute_pillow()
        values = _upright(image, _to_array(image.copy()))  # a copy: the image is not changed
        _refuse_wrapped(image, values)
    except DataError:
        raise
    except Exception as error:  # of any kind, see open_unread
        raise failure(f"a PIL image of mode {image.mode}", error) from error
    stated_maximum, white_is_zero, deep_colour = depth
    return Loaded(
        values, truncated=False, stated_maximum=stated_maximum, white_is_zero=white_is_zero,
        deep_colour=deep_colour,
    )  # fmt: skip


def _decode_fast(name: str, image: ImageFile.ImageFile, data: bytes) -> _Values | None:
    """Return the same as Pillow for an intact plain JPEG or PNG; None for all others."""
    if len(image.tile) != 1 or image.width * image.height > MAX_PIXELS:  # untried beyond
        return None
    (width, height), (_, _, offset, arguments) = image.size, image.tile[0]
    raw_mode = str(arguments if isinstance(arguments, str) else (arguments or ("",))[0])
    if name == "JPEG" and raw_mode in _JPEG_COLOURS:
        return _decode_jpeg(data, (height, width), raw_mode)
    if name != "PNG" or raw_mode not in png.CHANNELS or image.info.get("interlace"):
        return None
    if getattr(image, "is_animated", False) or not acceleration.is_ready():
        return None
    try:
        return png.decode(data, offset, width, height, raw_mode)
    except MemoryError:
        return None


def _decode_jpeg(data: bytes, shape: tuple[int, int], mode: str) -> _Values | None:
    """Return the same as Pillow, by the same library, but without Pillow's two extra copies.

    torchvision's decoder is no faster and takes 2.3 s to import beyond torch.
    """
    if simplejpeg is None:
        return None
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(data)
        if tuple(size) != shape or colours not in _JPEG_COLOURS[mode]:
            return None
        # strict: files that libjpeg warns about are left to Pillow, which refuses some
        pixels: _Values = simplejpeg.decode_jpeg(
            data, "GRAY" if mode == "L" else "RGB", strict=True
        )
    except (ValueError, MemoryError):
        return None
    return pixels[:, :, 0] if mode == "L" else pixels


def _to_array(image: Image.Image) -> _Values:
    """Return a loaded image as 8-bit grey or RGB, or as deep greyscale."""
    if image.mode[0] in "IF":
        return np.asarray(image)
    image.info.pop("transparency", None)  # alpha is dropped; Pillow would warn about some kinds
    if image.mode == "La":
        image = image.convert("LA")
    # A grey image resized as one channel equals the resized RGB image, in a third of the time.
    wanted = "L" if image.mode in {"1", "L", "LA"} else "RGB"
    return np.array(image if image.mode == wanted else image.convert(wanted))


def open_unread(data: bytes) -> tuple[str, ImageFile.ImageFile]:
    """Return the format's name and the image with its header read.

    Raises:
        DataError: If there is no header of a known format.
    """
    return _without_large_texts(_open, data)


def _without_large_texts(call: Callable[[bytes], _Result], data: bytes) -> _Result:
    """Call with a file; if it is a PNG with larger texts than Pillow reads, without its texts."""
    try:
        return call(data)
    except DataError as error:
        if "MAX_TEXT_" not in str(error.__cause__):
            raise
        lean = png.drop_texts(data)
        if len(lean) == len(data):
            raise
    return call(lean)


def _open(data: bytes) -> tuple[str, ImageFile.ImageFile]:
    name, reader = _find_reader(data)
    _mute_pillow()
    # Damaged files make Pillow raise nearly anything (17 of the 218 bad files of its own corpus
    # raise no OSError), and one file must never stop a run.
    try:
        image = reader(io.BytesIO(data))
        misread = misread_kind(name, image)
    except Exception as error:
        raise _refused(name, data, error) from error
    if misread is not None:
        raise failure(misread, kind=MisreadError)
    return name, image


def _refused(name: str, data: bytes, error: Exception) -> DataError:
    """Return what to raise for a file that Pillow refused: not supported, or broken."""
    kind = None if isinstance(error, MemoryError) else unsupported_kind(name, data, error)
    return failure(kind) if kind else failure(f"a broken {name} file", error)


def _find_reader(data: bytes) -> tuple[str, type[ImageFile.ImageFile]]:
    if not data:
        raise failure("an empty file")
    for name, prefixes, reader in _READERS:
        if data.startswith(prefixes):
            return name, reader
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP", WebPImageFile
    raise failure(foreign_kind(data) or "bytes of no known image format")


class MisreadError(DataError):
    """An image is refused that Pillow reads, but wrongly."""


def failure(
    reason: str, error: Exception | None = None, *, kind: type[DataError] = DataError
) -> DataError:
    """Return the error for an image that cannot be used."""
    if error is not None:  # as one short line, equal for equal files (no object addresses)
        text = " ".join(printable(error).split()).partition(" <_io.")[0]
        reason += f": {text[:200] or type(error).__name__}"
    expected = "a readable JPEG, PNG, BMP, TIFF, WebP or PPM image"
    kind = TransientError if isinstance(error, MemoryError) else kind
    return kind("image", expected=expected, found=reason)


def _refuse_bomb(image: Image.Image, max_pixels: int) -> None:
    for width, height in (image.size, getattr(image, "_tile_size", image.size)):
        if width * height > max_pixels:
            raise failure(f"{width} x {height} pixels, above --max-pixels {max_pixels:,}")


def _find_depth(name: str, image: ImageFile.ImageFile) -> _Depth:
    arguments = image.tile[0].args if image.tile else ""
    raw_mode, *rest = (arguments,) if isinstance(arguments, str) else arguments or ("",)
    deep_grey = image.mode[0] in "IF"
    stated_maximum = 4095 if raw_mode == "I;12" else None
    deep_colour = deep.is_deep_colour(name, image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if name == "PPM" and rest:
        # Pillow has scaled from the range in the header to 16 bits, unless that is 16 bits.
        stated_maximum = None if rest[0] == 65535 else 65535
    return stated_maximum, deep_grey and white_is_zero, deep_colour


def _refuse_wrapped(image: Image.Image, values: _Values) -> None:
    """Refuse values that Pillow has wrapped round: see ``unsupported.may_wrap``."""
    if not may_wrap(image):
        return
    if values.dtype == np.int32 and values.min() < 0:
        largest = int(values.view(np.uint32).max())
        found = f"a value of {largest}, above the {2**31 - 1} that Pillow reads"
        raise failure(found, kind=MisreadError)
    if values.dtype == np.uint8 and values.max() > 127:
        found = "negative values in a TIFF of 8 bits, which Pillow reads as positive ones"
        raise failure(found, kind=MisreadError)


def _upright(image: Image.Image, values: _Values) -> _Values:
    try:  # Image's own method: PNG's loads the image first, for tags behind the pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  (a damaged tag raises anything; the pixels are intact)
        return values
    if not isinstance(orientation, int) or orientation not in _TURNS:
        return values
    mirrored, quarter_turns = _TURNS[orientation]
    values = values[:, ::-1] if mirrored else values
    return np.ascontiguousarray(np.rot90(values, quarter_turns))


class _TruncationGate:
    """Controls ``ImageFile.LOAD_TRUNCATED_IMAGES``, one switch for all threads of the process.

    Strict reads run at the same time, with the switch off, even if the user turned it on. A read
    that fills in runs alone, with the switch on. The last one to leave restores the switch.
    """

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):  # a lock held by another thread would stay locked
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self._changed = threading.Condition()
        self._num_reads = 0
        self._filling = False
        self._users_setting = False

    @contextlib.contextmanager
    def __call__(self, *, fill: bool) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._filling)
            self._filling = fill  # from here on no other read starts
            if fill:
                self._changed.wait_for(lambda: self._num_reads == 0)
            if self._num_reads == 0:
                self._users_setting = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = fill
            self._num_reads += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_reads -= 1
                if fill:
                    self._filling = False
                if self._num_reads == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self._users_setting
                self._changed.notify_all()


_truncation_gate = _TruncationGate()
_filter: object = None


def _mute_pillow() -> None:
    """Keep a warnings filter in front that ignores Pillow's TIFF (= EXIF) and PNG readers.

    ``catch_warnings`` replaces the list of all filters and is not safe in threads. Side effect:
    after the first decoded image, this process shows no UserWarning of these two modules.
    """
    global _filter  # noqa: PLW0603
    if warnings.filters and warnings.filters[0] is _filter:
        return
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Tiff|Png)ImagePlugin")
    _filter = warnings.filters[0]
