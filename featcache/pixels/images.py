"""Decode the bytes of one image file into uint8 pixels of one size.

Plain 8-bit images come out as ``Image.open(f).convert("RGB").resize((S, S), BILINEAR)`` gives
them, bit for bit: changing 10 % of the pixels by 1 of 255 moves Lite0's features by 11 %. Beyond
that, orientation tags are obeyed, alpha is dropped, and decompression bombs are refused. Deep
greyscale is scaled and never clipped: ``convert("RGB")`` turns 16-bit X-rays white, which cost 24
points of accuracy.

Reads: bytes. Writes: nothing. Every failure is a ``DataError`` whose ``found`` is the reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from featcache.data.dicom_files import is_dicom
from featcache.errors import ConfigError, DataError, TransientError
from featcache.pixels import acceleration
from featcache.pixels.decoding import Loaded, failure, read, read_opened
from featcache.pixels.deep import cmyk_to_rgb
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.resampling import INTERPOLATIONS, resize
from featcache.untrusted import MAX_PIXELS

CROP_MODES = ("squash", "center", "border")
BIT_DEPTHS: tuple[int | str, ...] = (12, 14, 16, "minmax")
TRUNCATED_MODES = ("skip", "keep")

_CENTER_SHARE = 0.875  # ImageNet's usual evaluation crop: 224 of 256
_Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_FIXED_IDENTITY = {"orientation": "exif", "alpha": "dropped"}


@dataclass(frozen=True)
class PixelRules:
    """The rules that decide the pixels of an image: part of a cache's identity.

    Args:
        image_size: S, the side of the square result, in pixels.
        crop_mode: ``squash`` (resize to S x S), ``center`` (short side to S / 0.875, centre crop)
            or ``border`` (long side to S, black bars on the short sides).
        interpolation: ``bilinear`` or ``bicubic``, both antialiased as Pillow does it.
        bit_depth: How images of more than 8 bits become 8 bits: ``round(v * 255 / (2^b - 1))``
            for b = 12, 14 or 16 (of 16-bit colour the high byte, as Pillow reads it), or
            ``minmax``: every image's own range, of all its channels together.
        truncated: ``skip`` fails cut-off files, ``keep`` fills them in as Pillow can.
        resize_size: Of ``squash`` and ``center``, the size in pixels to resize to before the
            centre crop of S x S, as the backbone's library documents it; None for the above.
        dicom: What is chosen of DICOM files, where the data has such files. Without it they fail.
        max_pixels: Images of more pixels are refused unread. The only one that is not part of the
            identity: it decides which images there are, and none of their pixels.

    Raises:
        ConfigError: If a value is not one of these.
    """

    image_size: int
    crop_mode: str = "squash"
    interpolation: str = "bilinear"
    bit_depth: int | str = 16
    truncated: str = "skip"
    resize_size: int | None = None
    dicom: DicomRules | None = None
    max_pixels: int = field(default=MAX_PIXELS, compare=False)

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= 4096:
            raise ConfigError("--image-size", expected="1 to 4096 pixels", found=self.image_size)
        for option, value, choices in (
            ("--crop-mode", self.crop_mode, CROP_MODES),
            ("--interpolation", self.interpolation, INTERPOLATIONS),
            ("--bit-depth", self.bit_depth, BIT_DEPTHS),
            ("--truncated", self.truncated, TRUNCATED_MODES),
        ):
            if value not in choices:
                expected = "one of " + ", ".join(map(str, choices))
                raise ConfigError(option, expected=expected, found=repr(value))
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise ConfigError("--max-pixels", expected="1 or more", found=repr(self.max_pixels))
        size = self.resize_size
        if size is not None and (
            type(size) is not int or not 1 <= size <= 8192 or self.crop_mode == "border"
        ):
            expected = "1 to 8192 pixels, and --crop-mode squash or center"
            raise ConfigError("resize_size", expected=expected, found=size)

    def as_identity(self) -> dict[str, Any]:
        """Return the rules as JSON values, including the fixed ones."""
        values = asdict(self) | _FIXED_IDENTITY
        del values["max_pixels"]
        del values["dicom"]
        if self.dicom is not None:  # so that other identities stay what they were
            values["dicom"] = self.dicom.as_identity()
        if self.resize_size is None:
            del values["resize_size"]
        return values

    def with_dicom(self) -> PixelRules:
        """Return these rules; where they say nothing of DICOM, with what is done by default."""
        return self if self.dicom is not None else replace(self, dicom=DicomRules())

    @classmethod
    def from_identity(cls, identity: dict[str, Any]) -> PixelRules:
        """Return the rules in an identity; other keys are ignored.

        Raises:
            DataError: If a rule is missing, or a fixed rule has another value.
            ConfigError: If this version does not know a value.
        """
        optional = {"resize_size", "dicom", "max_pixels"}
        keys = [key for key in cls.__dataclass_fields__ if key not in optional]
        for key in (*keys, *_FIXED_IDENTITY):
            expected = _FIXED_IDENTITY.get(key, identity.get(key))
            if expected is None or identity.get(key) != expected:
                found = repr(identity.get(key))
                raise DataError("pixel rules", expected=f"{key} {expected}", found=found)
        chosen = DicomRules.from_identity(identity["dicom"]) if "dicom" in identity else None
        return cls(
            **{key: identity[key] for key in keys}, resize_size=identity.get("resize_size"),
            dicom=chosen,
        )  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An upright 8-bit image at its own size.

    Args:
        pixels: (H, W) if grey, else (H, W, 3), uint8.
        truncated: Whether the file was cut off and has been filled in.
        dicom_is_deep: Of a DICOM file, whether it stores more than 8 bits; None of others.
    """

    pixels: _Pixels
    truncated: bool
    dicom_is_deep: bool | None = None


@dataclass(frozen=True)
class DecodedImage:
    """Pixels (S, S, 3) uint8, and whether the file was cut off and has been filled in."""

    pixels: _Pixels
    truncated: bool


def decode(data: bytes, rules: PixelRules) -> DecodedImage:
    """Decode an image file into pixels of one size: ``load``, then ``resize_to_square``.

    Raises:
        DataError: As ``load`` and ``resize_to_square``.
    """
    picture = load(data, rules)
    pixels = resize_to_square(picture.pixels, rules)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return DecodedImage(pixels, picture.truncated)


def load(data: bytes, rules: PixelRules) -> Picture:
    """Decode an image file into 8-bit pixels of its own size. Safe to call from many threads.

    The first frame or page is used, and colour profiles are not applied, as in Pillow's
    ``convert``. DICOM files are decoded in a child process: see ``isolation.decode_dicom``.

    Raises:
        DataError: If the bytes cannot be decoded under these rules; ``found`` says why.
    """
    if is_dicom(data):
        from featcache.pixels.isolation import decode_dicom  # which imports this module

        if rules.dicom is None:
            raise failure(
                "a DICOM file by another name: let it end in .dcm (of a Parquet file, its path)"
            )
        picture = decode_dicom(data, rules.dicom, rules.max_pixels)
        return Picture(picture.pixels, truncated=False, dicom_is_deep=picture.is_deep)
    all_bits = rules.bit_depth != 16  # else the high byte, as Pillow reads it
    try:
        loaded = read(data, fill=False, all_bits=all_bits, max_pixels=rules.max_pixels)
    except DataError as strict:
        if rules.truncated == "skip" or isinstance(strict, TransientError):
            raise
        try:
            loaded = read(data, fill=True, all_bits=all_bits, max_pixels=rules.max_pixels)
        except DataError:
            raise strict from None
    return _to_8_bits(loaded, rules)


def load_opened(image: Any, rules: PixelRules) -> Picture:
    """Turn an image that is open in memory into 8-bit pixels, as ``load`` does with its file.

    Args:
        image: A PIL image, or uint8 pixels (H, W) or (H, W, 3), upright and RGB.
        rules: How deep greyscale becomes 8 bits.

    Raises:
        DataError: If it is neither, or has pixels that these rules refuse.
    """
    if isinstance(image, np.ndarray):
        return Picture(np.ascontiguousarray(image), truncated=False)
    if not hasattr(image, "getexif"):
        raise DataError("image", expected="a path, a PIL image or an array", found=repr(image)[:80])
    return _to_8_bits(read_opened(image), rules)


def _to_8_bits(loaded: Loaded, rules: PixelRules) -> Picture:
    if loaded.values.dtype == np.uint8:
        if loaded.deep_colour and rules.bit_depth != 16:
            raise failure("16-bit colour in memory, of which Pillow keeps 8 bits: give its path")
        return Picture(loaded.values, loaded.truncated)
    try:
        pixels = _scale_deep(loaded.values, rules.bit_depth, loaded.stated_maximum)
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            pixels = cmyk_to_rgb(pixels)
    except MemoryError as error:
        raise failure("values of 16 bits", error) from error
    return Picture(255 - pixels if loaded.white_is_zero else pixels, loaded.truncated)


def resize_to_square(pixels: _Pixels, rules: PixelRules) -> _Pixels:
    """Resize pixels (H, W) or (H, W, 3) to (S, S) or (S, S, 3) by crop mode and interpolation.

    Raises:
        DataError: If the image is too elongated for the crop mode.
    """
    try:
        return _resize(pixels, rules)
    except (MemoryError, OSError, ValueError) as error:
        raise failure("an image that cannot be resized", error) from error


def _scale_deep(values: np.ndarray[Any, Any], bit_depth: int | str, stated: int | None) -> _Pixels:
    """Map uint16, int32 or float32, of any shape, to uint8 by ``round(v * 255 / maximum)``."""
    low, high = values.min().item(), values.max().item()
    maximum = 0 if bit_depth == "minmax" else stated or 2 ** int(bit_depth) - 1
    if not maximum and not (np.isfinite(low) and np.isfinite(high)):
        raise failure("values that are not finite")
    if maximum and values.dtype.kind == "f":
        raise failure("float pixels, whose range only --bit-depth minmax can tell")
    if maximum and (low < 0 or high > maximum):
        odd = low if low < 0 else high
        raise failure(f"a value of {odd} outside the 0 to {maximum} of --bit-depth {bit_depth}")
    if values.dtype != np.uint16:
        return _scale_values(values, maximum, low, high)
    # compute each of at most 65,536 values once: 3000 x 2500 pixels in 7 ms instead of 14, and
    # without arrays of float64, which take 48 bytes a pixel of colour
    table = np.zeros(2**16, np.uint8)
    every = np.arange(low, high + 1, dtype=np.uint16)
    table[low : high + 1] = _scale_values(every, maximum, low, high)
    scaled = np.empty(values.shape, np.uint8)
    if acceleration.is_ready():
        from featcache.pixels import kernels

        kernels.look_up(values.reshape(-1), table, scaled.reshape(-1))
    else:
        for row, scaled_row in zip(values, scaled, strict=True):
            scaled_row[:] = table[row]
    return scaled


def _scale_values(values: np.ndarray[Any, Any], maximum: int, low: float, high: float) -> _Pixels:
    if not maximum:
        span = high - low or 1  # an image with a single value becomes black
        stretched: _Pixels = np.rint((values.astype(np.float64) - low) * 255 / span).astype("u1")
        return stretched
    # round(v * 255 / m) = (510 v + m) // (2 m): exact rounding in integers.
    scaled = values.astype(np.uint32)
    scaled *= 510
    scaled += np.uint32(maximum)
    scaled //= np.uint32(2 * maximum)
    return scaled.astype(np.uint8)


def _resize(pixels: _Pixels, rules: PixelRules) -> _Pixels:
    """Return pixels (H, W) or (H, W, 3) as (S, S) or (S, S, 3)."""
    side = rules.image_size
    if rules.crop_mode == "squash":
        size = rules.resize_size or side
        return _crop_center(resize(pixels, size, size, rules.interpolation), side)
    old_height, old_width = pixels.shape[:2]
    short, long = sorted((old_height, old_width))
    if rules.crop_mode == "center":  # torchvision: Resize(size), CenterCrop(S)
        new_short = rules.resize_size or round(side / _CENTER_SHARE)
        new_long = int(new_short * long / short)
    else:
        new_short, new_long = max(1, round(side * short / long)), side
    if new_short * new_long > MAX_PIXELS:
        raise failure(f"{old_width} x {old_height} pixels, too long for this crop mode")
    wide = old_width > old_height
    width, height = (new_long, new_short) if wide else (new_short, new_long)
    scaled = resize(pixels, width, height, rules.interpolation)
    if rules.crop_mode == "center":
        return _crop_center(scaled, side)
    padded = np.zeros((side, side, *pixels.shape[2:]), np.uint8)
    left, top = (side - width) // 2, (side - height) // 2
    padded[top : top + height, left : left + width] = scaled
    return padded


def _crop_center(pixels: _Pixels, side: int) -> _Pixels:
    """Return the middle (S, S) or (S, S, 3) as torchvision's ``CenterCrop``; black beyond edges."""
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    if min(height, width) < side:
        over, beside = max(0, side - height), max(0, side - width)
        edges = [(over // 2, (over + 1) // 2), (beside // 2, (beside + 1) // 2)]
        pixels = np.pad(pixels, edges + [(0, 0)] * (pixels.ndim - 2))
        height, width = pixels.shape[:2]
    left, top = round((width - side) / 2), round((height - side) / 2)
    return pixels[top : top + side, left : left + side].copy()
