"""Bytes of one image file -> uint8 pixels of one size. The only module that knows Pillow.

Plain 8-bit images come out as ``Image.open(f).convert("RGB").resize((S, S), BILINEAR)`` gives
them, bit for bit: changing 10 % of the pixels by 1 of 255 moves Lite0's features by 11 %. Beyond
that: orientation tags are obeyed, alpha is dropped, deep greyscale is scaled and never clipped
(``convert("RGB")`` turns 16-bit X-rays white, 24 points of accuracy), bombs are refused.

Reads: bytes. Writes: nothing. Every failure is a ``DataError`` whose ``found`` is the reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from featcache.errors import ConfigError, DataError, printable

MAX_PIXELS = 2**28
"""Images above this many pixels are refused unread: a 20 KB PNG can hold 480 MB of pixels."""

CROP_MODES = ("squash", "center", "border")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
BIT_DEPTHS: tuple[int | str, ...] = (12, 14, 16, "minmax")
TRUNCATED_MODES = ("skip", "keep")

_CENTER_SHARE = 0.875  # ImageNet's usual evaluation crop: 224 of 256
_Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_FIXED_IDENTITY = {"orientation": "exif", "alpha": "dropped"}

# The classes are used without Image.open, which would apply the user's process-wide
# MAX_IMAGE_PIXELS (an error below our cap, a warning on the way) and try every other format.
_READERS: tuple[tuple[str, tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ("JPEG", (b"\xff\xd8\xff",), JpegImageFile),
    ("BMP", (b"BM",), BmpImageFile),
    ("TIFF", tuple(TiffImagePlugin.PREFIXES), TiffImagePlugin.TiffImageFile),
    ("PPM", (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf"), PpmImageFile),
)
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer in place of the image (git lfs pull)",
    b"GIF8": "a GIF",
    b"<": "an HTML or XML page",
}
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
# EXIF 2.3, tag 0x0112: orientation 2 to 8 -> what turns the stored pixels upright
_TRANSPOSE = {tag: Image.Transpose[turn] for tag, turn in enumerate(_TURNS.split(), start=2)}


@dataclass(frozen=True)
class PixelRules:
    """What decides the pixels of an image, and so is part of a cache's identity.

    Args:
        image_size: S, the side of the square that comes out, in pixels.
        crop_mode: ``squash`` (resize to S x S), ``center`` (short side to S / 0.875, centre crop)
            or ``border`` (long side to S, black bars on the short sides).
        interpolation: ``bilinear`` or ``bicubic``, both antialiased as Pillow does it.
        bit_depth: How greyscale of more than 8 bits becomes 8 bits: ``round(v * 255 / (2^b - 1))``
            for b = 12, 14 or 16, or ``minmax``: every image's own range.
        truncated: ``skip`` fails cut-off files, ``keep`` fills them in as Pillow can.

    Raises:
        ConfigError: If a value is not one of these.
    """

    image_size: int
    crop_mode: str = "squash"
    interpolation: str = "bilinear"
    bit_depth: int | str = 16
    truncated: str = "skip"

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= 4096:
            raise ConfigError("--image-size", expected="1 to 4096 pixels", found=self.image_size)
        for option, value, choices in (
            ("--crop-mode", self.crop_mode, CROP_MODES),
            ("--interpolation", self.interpolation, tuple(INTERPOLATIONS)),
            ("--bit-depth", self.bit_depth, BIT_DEPTHS),
            ("--truncated", self.truncated, TRUNCATED_MODES),
        ):
            if value not in choices:
                expected = "one of " + ", ".join(map(str, choices))
                raise ConfigError(option, expected=expected, found=repr(value))

    def as_identity(self) -> dict[str, Any]:
        """Return the rules as JSON values, with those that have no option spelled out."""
        return asdict(self) | _FIXED_IDENTITY

    @classmethod
    def from_identity(cls, identity: dict[str, Any]) -> PixelRules:
        """Return the rules of an identity (other keys in it are left alone).

        Raises:
            DataError: If a rule is missing, or orientation or alpha follow another rule.
            ConfigError: If a value is one this version does not know.
        """
        for key in (*cls.__dataclass_fields__, *_FIXED_IDENTITY):
            expected = _FIXED_IDENTITY.get(key, identity.get(key))
            if expected is None or identity.get(key) != expected:
                found = repr(identity.get(key))
                raise DataError("pixel rules", expected=f"{key} {expected}", found=found)
        return cls(**{key: identity[key] for key in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Picture:
    """An upright image in 8 bits at its own size: pixels (H, W) if grey, else (H, W, 3), uint8.

    ``truncated`` tells that a cut-off file was filled in to get them.
    """

    pixels: _Pixels
    truncated: bool


@dataclass(frozen=True)
class DecodedImage:
    """Pixels (S, S, 3) uint8, and whether a cut-off file was filled in to get them."""

    pixels: _Pixels
    truncated: bool


def decode(data: bytes, rules: PixelRules) -> DecodedImage:
    """Turn the bytes of an image file into pixels of one size: ``load``, then ``fit``.

    Raises:
        DataError: As they do.
    """
    picture = load(data, rules)
    pixels = fit(picture.pixels, rules)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return DecodedImage(pixels, picture.truncated)


def load(data: bytes, rules: PixelRules) -> Picture:
    """Turn the bytes of an image file into 8-bit pixels. Safe to call from many threads at once.

    Of files with several frames or pages the first is taken; colour profiles are not applied
    (both as Pillow's ``convert`` does it).

    Raises:
        DataError: If these bytes do not become an image under these rules; ``found`` says why.
    """
    try:
        loaded = _load(data, fill=False)
    except DataError as strict:
        if rules.truncated == "skip":
            raise
        try:
            loaded = _load(data, fill=True)
        except DataError:
            raise strict from None
    try:
        pixels = np.array(_to_8_bits(loaded, rules))  # a copy: Pillow's own memory is read-only
    except (MemoryError, OSError, ValueError) as error:
        raise _failure(f"colours of kind {loaded.image.mode}", error) from error
    return Picture(pixels, loaded.truncated)


def fit(pixels: _Pixels, rules: PixelRules) -> _Pixels:
    """Bring pixels (H, W) or (H, W, 3) to (S, S) or (S, S, 3) by crop mode and interpolation.

    Raises:
        DataError: If the image is too long for the crop mode.
    """
    try:
        return np.array(_resize(Image.fromarray(pixels), rules))
    except (MemoryError, OSError, ValueError) as error:
        raise _failure("an image that cannot be resized", error) from error


def deep_maximum(data: bytes) -> int | None:
    """Return the largest stored value of an integer greyscale image of more than 8 bits.

    None for everything whose range is known or that ``decode`` will fail anyway: 8-bit images,
    files that state their own range (12-bit TIFF, PGM), float images, damaged files.
    """
    try:
        if _open(data)[1].mode[0] != "I":
            return None
        loaded = _load(data, fill=False)
    except DataError:
        return None
    return None if loaded.stated_maximum else int(np.asarray(loaded.image).max())


def check_bit_depth(maxima: Iterable[int]) -> None:
    """Ask for the bit depth when deep images never use the top bit of 16.

    12-bit X-rays in 16-bit files look nearly black when they are scaled as 16 bits.

    Args:
        maxima: ``deep_maximum`` of a sample of the images, without the None.

    Raises:
        DataError: If there are maxima and all are below 2**15.
    """
    largest = max(maxima, default=None)
    if largest is not None and largest < 2**15:
        fitting = next((bits for bits in (12, 14) if largest < 2**bits), 16)
        raise DataError(
            "bit depth of the 16-bit images", expected="values up to 65535",
            found=f"none above {largest} in the sample",
            hint=f"Say what they are: --bit-depth 12, 14, 16 or minmax (they fit into {fitting})",
        )  # fmt: skip


@dataclass(frozen=True)
class _Loaded:
    """An image in memory, upright, in Pillow's own mode, and what the file says of its depth."""

    image: Image.Image
    truncated: bool
    stated_maximum: int | None  # of deep greyscale: what the file itself says white is
    white_is_zero: bool  # deep TIFF with inverted values, which Pillow hands out as stored
    deep_colour: bool  # 16 bits per channel; Pillow keeps the high byte


def _load(data: bytes, *, fill: bool) -> _Loaded:
    """Read the first frame, with nothing missing or, with ``fill``, with what can be had."""
    with _truncation_gate(fill=fill):
        name, image = _open(data)
        _refuse_bomb(name, image)
        depth = _find_depth(name, image)  # loading forgets it
        try:
            image.load()
        except Exception as error:  # of any kind, see _open
            raise _failure(f"a broken {name} file", error) from error
    return _Loaded(_upright(image), fill, *depth)


def _open(data: bytes) -> tuple[str, ImageFile.ImageFile]:
    """Return format name and the unread image."""
    name, reader = _find_reader(data)
    _mute_pillow()
    # Damaged files make Pillow raise nearly anything (17 of the 218 bad files of its own corpus
    # are no OSError), and one file must never stop a run.
    try:
        return name, reader(io.BytesIO(data))
    except Exception as error:
        raise _failure(f"a broken {name} file", error) from error


def _find_reader(data: bytes) -> tuple[str, type[ImageFile.ImageFile]]:
    if not data:
        raise _failure("an empty file")
    for name, prefixes, reader in _READERS:
        if data.startswith(prefixes):
            return name, reader
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP", WebPImageFile
    if data[128:132] == b"DICM":
        raise _failure("a DICOM file (convert it to PNG first)")
    for prefix, kind in _FOREIGN.items():
        if data[:100].lstrip().startswith(prefix):
            raise _failure(kind)
    raise _failure("bytes of no known image format")


def _failure(reason: str, error: Exception | None = None) -> DataError:
    if error is not None:  # as one short line, equal for equal files (no object addresses)
        text = " ".join(printable(error).split()).partition(" <_io.")[0]
        reason += f": {text[:200] or type(error).__name__}"
    expected = "a readable JPEG, PNG, BMP, TIFF, WebP or PPM image"
    return DataError("image", expected=expected, found=reason)


def _refuse_bomb(name: str, image: ImageFile.ImageFile) -> None:
    # Pillow checks TIFF again while loading, against its own limit: stay below it, so that the
    # user's process-wide setting neither warns nor has to be changed.
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS) if name == "TIFF" else MAX_PIXELS
    for width, height in (image.size, getattr(image, "_tile_size", image.size)):
        if width * height > limit:
            raise _failure(f"{width} x {height} pixels, more than {limit:,} in all")


def _find_depth(name: str, image: ImageFile.ImageFile) -> tuple[int | None, bool, bool]:
    arguments = image.tile[0].args if image.tile else ""
    raw_mode, *rest = (arguments,) if isinstance(arguments, str) else arguments or ("",)
    deep_grey = image.mode[0] in "IF"
    stated_maximum = 4095 if raw_mode == "I;12" else None
    deep_colour = name in {"PNG", "TIFF"} and ";16" in str(raw_mode)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if name == "PPM" and rest:
        deep_colour = rest[0] == 65535
        # Pillow has scaled from the range in the header to 16 bits, unless that is 16 bits.
        stated_maximum = None if deep_colour else 65535
    return stated_maximum, deep_grey and white_is_zero, deep_colour and not deep_grey


def _upright(image: ImageFile.ImageFile) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  (a damaged tag, of as many kinds: the pixels are whole)
        return image
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


class _TruncationGate:
    """Owns ``ImageFile.LOAD_TRUNCATED_IMAGES``, one switch for all threads of the process.

    Strict reads share the gate with the switch off, also when the user turned it on; a read
    that fills in has the gate for itself with the switch on. The last one out restores it.
    """

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):  # a lock another thread holds would stay held
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
            self._filling = fill  # from here no further read starts
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
    """Keep one filter in front that ignores what Pillow's TIFF (= EXIF) and PNG readers remark.

    ``catch_warnings`` swaps the list of all filters and is not safe in threads. Side effect:
    from the first decoded image on, this process sees no UserWarning of these two modules.
    """
    global _filter  # noqa: PLW0603
    if warnings.filters and warnings.filters[0] is _filter:
        return
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Tiff|Png)ImagePlugin")
    _filter = warnings.filters[0]


def _to_8_bits(loaded: _Loaded, rules: PixelRules) -> Image.Image:
    """Return the image in mode L or RGB."""
    image = loaded.image
    if loaded.deep_colour and rules.bit_depth != 16:
        raise _failure("16-bit colour, which is read with --bit-depth 16 only")
    if image.mode[0] in "IF":
        pixels = _scale_deep(np.asarray(image), rules.bit_depth, loaded.stated_maximum)
        return Image.fromarray(255 - pixels if loaded.white_is_zero else pixels)
    image.info.pop("transparency", None)  # alpha is dropped; Pillow would warn about some kinds
    if image.mode == "La":
        image = image.convert("LA")
    # A grey image resized as one channel equals the resized RGB image, in a third of the time.
    wanted = "L" if image.mode in {"1", "L", "LA"} else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _scale_deep(values: np.ndarray[Any, Any], bit_depth: int | str, stated: int | None) -> _Pixels:
    """Map (H, W) uint16, int32 or float32 to uint8 by ``round(v * 255 / maximum)``."""
    low, high = values.min().item(), values.max().item()
    if bit_depth == "minmax":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise _failure("values that are not finite")
        span = high - low or 1  # an image of one value becomes black
        stretched: _Pixels = np.rint((values.astype(np.float64) - low) * 255 / span).astype("u1")
        return stretched
    if values.dtype.kind == "f":
        raise _failure("float pixels, whose range only --bit-depth minmax can tell")
    maximum = stated or 2 ** int(bit_depth) - 1
    if low < 0 or high > maximum:
        odd = low if low < 0 else high
        raise _failure(f"a value of {odd} outside the 0 to {maximum} of --bit-depth {bit_depth}")
    # Twice the value plus the maximum over twice the maximum: exact rounding in integers.
    scaled = values.astype(np.uint32)
    scaled *= 510
    scaled += np.uint32(maximum)
    scaled //= np.uint32(2 * maximum)
    return scaled.astype(np.uint8)


def _resize(image: Image.Image, rules: PixelRules) -> Image.Image:
    """Return the image as S x S pixels, in its own mode (L or RGB)."""
    side = rules.image_size
    resample = INTERPOLATIONS[rules.interpolation]
    if rules.crop_mode == "squash":
        return image.resize((side, side), resample)
    short, long = sorted(image.size)
    if rules.crop_mode == "center":  # torchvision: Resize(round(S / 0.875)), CenterCrop(S)
        new_short = round(side / _CENTER_SHARE)
        new_long = int(new_short * long / short)
    else:
        new_short, new_long = max(1, round(side * short / long)), side
    if new_short * new_long > MAX_PIXELS:
        raise _failure(f"{image.width} x {image.height} pixels, too long for this crop mode")
    width, height = (new_long, new_short) if image.width > image.height else (new_short, new_long)
    image = image.resize((width, height), resample)
    if rules.crop_mode == "center":
        left, top = round((width - side) / 2), round((height - side) / 2)
        return image.crop((left, top, left + side, top + side))
    padded = Image.new(image.mode, (side, side))
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded


def warp(pixels: _Pixels, placing: tuple[float, ...], side: int) -> _Pixels:
    """Return (side, side) or (side, side, 3) fetched bilinearly from (H, W) or (H, W, 3).

    With ``placing`` a, b, c, d, e, f, what stands at (x, y) comes from (ax + by + c, dx + ey + f);
    pixel i covers i to i + 1, and outside is black.
    """
    how = Image.Transform.AFFINE, placing, Image.Resampling.BILINEAR
    return np.array(Image.fromarray(pixels).transform((side, side), *how))
