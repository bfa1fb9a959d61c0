"""Classify images with the model of this folder. Needs Pillow, NumPy and onnxruntime, nothing else.

    python predict.py IMAGE...           a line for each image
    python predict.py --json IMAGE...    one JSON object
    python predict.py --self-test        are files, pixels and probabilities what they were?

An image gets the pixels that the model was trained with, bit for bit. What cannot be read exactly
is refused by name, and the exit code is then 1. Images that are unlike those the model was trained
with are not marked: it tells any image apart by its classes.

Not for diagnosis.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin
from PIL import __version__ as pillow_version
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

SUMS = "SHA256SUMS"
OWN_FILES = ("README.md", "config.json", "head.safetensors", "model.onnx", "predict.py")
MAX_RESIZED_PIXELS = 2**28

Pixels = Any  # NumPy array, uint8: (H, W) grey or (H, W, 3) RGB

READERS: tuple[tuple[str, tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ("JPEG", (b"\xff\xd8\xff",), JpegImageFile),
    ("BMP", (b"BM",), BmpImageFile),
    ("TIFF", (b"II*\0", b"MM\0*"), TiffImagePlugin.TiffImageFile),
    ("PPM", (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), PpmImageFile),
)
# EXIF 2.3, tag 0x0112: orientation -> mirror left and right first?, quarter turns against the clock
TURNS = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1),
    6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


class RefusedError(Exception):
    """An image is refused; the message says what it is."""


class SelfTestError(Exception):
    """The folder is not what it was, or computes otherwise here; the message says where."""


# ------------------------------------------------------------------------------------------ pixels


def read_pixels(data: bytes, rules: Mapping[str, Any], max_pixels: int) -> Pixels:
    """Return the pixels (S, S, 3) uint8 that the model sees of an image file.

    Args:
        data: The file.
        rules: ``preprocessing`` of an input in ``config.json``.
        max_pixels: Images of more are refused.

    Raises:
        RefusedError: If it cannot be read exactly.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name, image = open_image(data, max_pixels)
        try:
            image.load()
            values = to_array(image)
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            raise RefusedError(f"a broken {name} file: {one_line(error)}") from error
        if values.dtype != np.uint8:
            values = scale_deep(values, rules["bit_depth"])
        pixels = resize(upright(image, values), rules)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def open_image(data: bytes, max_pixels: int) -> tuple[str, ImageFile.ImageFile]:
    """Return the format's name and the image with its header read."""
    found = [(name, reader) for name, starts, reader in READERS if data.startswith(starts)]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = [("WebP", WebPImageFile)]
    if data[128:132] == b"DICM":
        raise RefusedError("a DICOM file, which this script does not read: see README.md")
    if not found:
        raise RefusedError("not a PNG, JPEG, BMP, TIFF, WebP or PPM file" if data else "empty")
    name, reader = found[0]
    try:
        image = reader(io.BytesIO(data))
    except Exception as error:  # as above
        raise RefusedError(f"a broken or unknown {name} file: {one_line(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise RefusedError(f"{width} x {height} pixels, above {max_pixels:,}")
    if reason := why_not_exact(name, image, data):
        raise RefusedError(f"{reason}: save it as a PNG of 8 bits, or of 16 bits of grey")
    return name, image


def why_not_exact(name: str, image: ImageFile.ImageFile, data: bytes) -> str | None:
    """Return what an image is that is not known to be read exactly; None for all others."""
    if name == "PNG" and data[24] == 16 and data[25] != 0:  # bit depth and colour type of IHDR
        return "a PNG of 16-bit colour"
    if name == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        return "a CMYK JPEG without Adobe's marker"
    if name == "PPM":
        arguments = image.tile[0].args if image.tile else ()
        numbers = [a for a in arguments if isinstance(a, int)] if arguments else []
        if image.mode not in {"1", "L", "RGB"} or max(numbers, default=0) > 255:
            return "a PPM of more than 8 bits"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return why_not_exact_tiff(image)
    if image.mode[0] in "IF" and image.mode != "I;16":
        return f"pixels of kind {image.mode}"
    return None


def why_not_exact_tiff(image: TiffImagePlugin.TiffImageFile) -> str | None:
    """Return what a TIFF is, unless it is plain grey or RGB: Pillow reads some kinds wrongly."""
    tags = image.tag_v2

    def values(tag: int, default: int) -> set[int]:
        value = tags.get(tag, default)
        return set(value) if isinstance(value, tuple) else {value}

    bits, photometric = values(258, 1), tags.get(262)
    is_plain = (
        photometric in {1, 2}  # black is zero, RGB
        and values(284, 1) == {1}  # colours beside each other
        and values(339, 1) == {1}  # unsigned
        and values(338, 2) == {2}  # no alpha, or one that colours are not multiplied by
        and values(259, 1) <= {1, 5, 8, 32773, 32946}  # none, LZW, deflate, PackBits
        and (bits == {8} or (bits == {16} and photometric == 1 and values(277, 1) == {1}))
    )
    if is_plain:
        return None
    depth = "/".join(map(str, sorted(bits)))
    compression = tags.get(259, 1)
    return f"a TIFF of {depth} bits, photometric {photometric}, compression {compression}"


def to_array(image: Image.Image) -> Any:
    """Return a loaded image as 8-bit grey or RGB, or as 16-bit grey; alpha is dropped."""
    if image.mode[0] == "I":
        return np.asarray(image).astype(np.uint16)
    image.info.pop("transparency", None)
    if image.mode == "La":
        image = image.convert("LA")
    wanted = "L" if image.mode in {"1", "L", "LA"} else "RGB"
    return np.array(image if image.mode == wanted else image.convert(wanted))


def scale_deep(values: Any, bit_depth: int | str) -> Pixels:
    """Return uint16 as uint8, ``round(v * 255 / maximum)``; nothing is clipped."""
    low, high = int(values.min()), int(values.max())
    if bit_depth == "minmax":
        span = high - low or 1
        return np.rint((values.astype(np.float64) - low) * 255 / span).astype(np.uint8)
    maximum = 2 ** int(bit_depth) - 1
    if high > maximum:
        raise RefusedError(f"a value of {high}, above the {maximum} of {bit_depth} bits")
    return ((values.astype(np.uint32) * 510 + maximum) // (2 * maximum)).astype(np.uint8)


def upright(image: Image.Image, values: Any) -> Any:
    """Turn pixels as the file's EXIF tag says."""
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001  (a damaged tag raises anything; the pixels are intact)
        return values
    if not isinstance(orientation, int) or orientation not in TURNS:
        return values
    mirrored, quarter_turns = TURNS[orientation]
    values = values[:, ::-1] if mirrored else values
    return np.ascontiguousarray(np.rot90(values, quarter_turns))


def resize(pixels: Pixels, rules: Mapping[str, Any]) -> Pixels:
    """Return pixels (H, W) or (H, W, 3) as (S, S) or (S, S, 3)."""
    side, mode, size = rules["image_size"], rules["crop_mode"], rules.get("resize_size")
    old_height, old_width = pixels.shape[:2]
    short, long = sorted((old_height, old_width))
    if mode == "squash":
        new_short = new_long = size or side
    elif mode == "center":
        new_short = size or round(side / 0.875)
        new_long = int(new_short * long / short)
    elif mode == "border":
        new_short, new_long = max(1, round(side * short / long)), side
    else:
        raise ValueError(f"config.json: unknown crop_mode {mode}")
    if new_short * new_long > MAX_RESIZED_PIXELS:
        raise RefusedError(f"{old_width} x {old_height} pixels, too long to be cropped")
    is_wide = old_width > old_height
    width, height = (new_long, new_short) if is_wide else (new_short, new_long)
    method = Image.Resampling[rules["interpolation"].upper()]
    try:
        scaled = np.array(Image.fromarray(pixels).resize((width, height), method))
    except (MemoryError, OSError, ValueError) as error:
        raise RefusedError(f"an image that cannot be resized: {one_line(error)}") from error
    if mode != "border":
        return crop_center(scaled, side)
    padded = np.zeros((side, side, *pixels.shape[2:]), np.uint8)
    left, top = (side - width) // 2, (side - height) // 2
    padded[top : top + height, left : left + width] = scaled
    return padded


def crop_center(pixels: Pixels, side: int) -> Pixels:
    """Return the middle (S, S) or (S, S, 3); black beyond the edges."""
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        over, beside = max(0, side - height), max(0, side - width)
        edges = [(over // 2, (over + 1) // 2), (beside // 2, (beside + 1) // 2)]
        pixels = np.pad(pixels, edges + [(0, 0)] * (pixels.ndim - 2))
        height, width = pixels.shape[:2]
    left, top = round((width - side) / 2), round((height - side) / 2)
    return pixels[top : top + side, left : left + side]


def one_line(error: BaseException) -> str:
    """Return an error's text as one short line."""
    text = " ".join(str(error).split()).partition(" <_io.")[0]
    return text[:200] or type(error).__name__


# ------------------------------------------------------------------------------------------- model


class Model:
    """The model of a folder.

    Args:
        folder: With ``config.json`` and ``model.onnx``.

    Raises:
        SelfTestError: If one of them is damaged or missing.
    """

    def __init__(self, folder: Path) -> None:
        # From 1.32 on it would write what runs where into the home folder, and send it.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort

        self.folder = folder
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
            self.classes: list[str] = self.config["classes"]
            self._session = ort.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own errors have no common class
            raise SelfTestError(f"the model cannot be loaded: {one_line(error)}") from error

    def read(self, data: bytes) -> dict[str, Pixels]:
        """Return the pixels of an image file for each input of the model.

        Raises:
            RefusedError: If it cannot be read exactly.
        """
        return {
            each["name"]: read_pixels(data, each["preprocessing"], self.config["max_pixels"])
            for each in self.config["inputs"]
        }

    def predict(self, pixels: Mapping[str, Pixels]) -> dict[str, Any]:
        """Return ``decision``, ``probs`` and ``calibrated`` of one image."""
        batch = {name: np.ascontiguousarray(image[None]) for name, image in pixels.items()}
        names = ["probabilities", "calibrated", "decision"]
        probs, calibrated, decision = (rows[0] for rows in self._session.run(names, batch))
        return {
            "decision": self.name_decision(decision),
            "probs": probs.tolist(),
            "calibrated": calibrated.tolist(),
        }

    def name_decision(self, decision: Any) -> str | list[str]:
        """Return the name of a class, ``refer``, or with several labels the names of classes."""
        if decision.ndim:
            return [name for name, yes in zip(self.classes, decision.tolist(), strict=True) if yes]
        return self.classes[int(decision)] if decision >= 0 else "refer"


def self_test(folder: Path) -> int:
    """Check files, then pixels, then outputs of the golden examples; return their number.

    Raises:
        SelfTestError: At the first that is not what it was.
    """
    test_files(folder)
    model = Model(folder)
    for example, pixels in test_pixels(model):
        found = model.predict(pixels)
        for key in ("probs", "calibrated"):
            worst = float(np.abs(np.subtract(found[key], example[key])).max())
            if not worst <= example["tolerance"]:
                raise SelfTestError(f"{key} of {example['file']}: off by {worst:.1e}")
        if example["decision"] is not None and found["decision"] != example["decision"]:
            raise SelfTestError(f"decision of {example['file']}: {found['decision']}")
    return len(model.config["golden"])


def test_pixels(model: Model) -> list[tuple[dict[str, Any], dict[str, Pixels]]]:
    """Return the golden examples and their pixels, which are what they were.

    Raises:
        SelfTestError: If they are not: versions of Pillow may differ.
    """
    read = []
    for example in model.config["golden"]:
        pixels = model.read((model.folder / example["file"]).read_bytes())
        hashes = {name: hashlib.sha256(p.tobytes()).hexdigest() for name, p in pixels.items()}
        if hashes != example["pixels_sha256"]:
            made = model.config["versions"]["pillow"]
            raise SelfTestError(
                f"pixels of {example['file']}: other ones than Pillow {made} made; this is Pillow "
                f"{pillow_version}"
            )
        read.append((example, pixels))
    if not read:
        raise SelfTestError("config.json has no golden examples")
    return read


def test_files(folder: Path) -> None:
    """Compare the files of the folder with ``SHA256SUMS``.

    Raises:
        SelfTestError: If one has changed, is missing or was added.
    """
    try:
        text, found = (folder / SUMS).read_bytes(), sums_of(folder)
    except OSError as error:
        raise SelfTestError(f"files of the folder: {one_line(error)}") from error
    expected, actual = by_name(text), by_name(found)
    for name in sorted(expected.keys() | actual.keys() | set(OWN_FILES)):
        if name not in actual:
            raise SelfTestError(f"{printable(name)}: missing")
        if name not in expected:
            raise SelfTestError(f"{printable(name)}: not in {SUMS}, so it was added")
        if expected[name] != actual[name]:
            raise SelfTestError(f"{printable(name)}: another sha256 than {SUMS} has")
    if text != found:
        raise SelfTestError(f"{SUMS}: not as it was written")


def sums_of(folder: Path) -> bytes:
    """Return what ``SHA256SUMS`` should be: lines of all files, as ``sha256sum -c`` reads them.

    Hidden files and Python's own ``__pycache__`` are left out.
    """
    names = sorted(
        name.as_posix()
        for name in (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        if name.as_posix() != SUMS
        and not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    )
    return b"".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  ".encode()
        + os.fsencode(name) + b"\n" for name in names
    )  # fmt: skip


def by_name(sums: bytes) -> dict[str, bytes]:
    """Return the lines of ``SHA256SUMS`` as name -> sha256."""
    return {os.fsdecode(line[66:]): line[:64] for line in sums.split(b"\n")[:-1]}


# ------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    Image.MAX_IMAGE_PIXELS = None  # the folder has its own limit
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    folder = Path(__file__).resolve().parent
    names = [argument for argument in arguments if argument != "--json"]
    if names != ["--self-test"] and (not names or names[0].startswith("-")):
        say(sys.stderr, (__doc__ or "").strip())
        return 0 if names and names[0] in {"-h", "--help"} else 2
    try:
        if names == ["--self-test"]:
            number = self_test(folder)
            say(sys.stdout, f"self-test passed: files, pixels and outputs of {number} images")
            return 0
        model = Model(folder)
        test_pixels(model)  # every time: another Pillow would change predictions without a word
    except (SelfTestError, RefusedError) as error:
        say(sys.stderr, f"self-test failed: {error}")
        return 1
    return classify(model, names, as_json="--json" in arguments)


def classify(model: Model, names: Sequence[str], *, as_json: bool) -> int:
    """Print what the model makes of image files; return the exit code."""
    rows, failures = [], []
    for name in names:
        try:
            if Path(name).is_dir():
                raise RefusedError("a folder: name the images in it")
            found = model.predict(model.read(Path(name).read_bytes()))
        except (RefusedError, OSError) as error:
            failures.append({"path": name, "reason": one_line(error)})
            say(sys.stderr, f"{printable(name)}: refused: {one_line(error)}")
            continue
        rows.append({"path": name, **found})
        if not as_json:
            pairs = zip(model.classes, found["probs"], strict=True)
            probs = "  ".join(f"{each} {prob:.4f}" for each, prob in pairs)
            said = decision_text(model.config, found["decision"], found["probs"])
            say(sys.stdout, f"{printable(name)}: {said}  ({probs})")
    if as_json:
        facts = {"classes": model.classes, "predictions": rows, "failures": failures}
        say(sys.stdout, json.dumps(facts))
    return 1 if failures else 0


def decision_text(
    config: Mapping[str, Any], decision: str | list[str], probs: Sequence[float]
) -> str:
    """Return a decision in words; with the rule, where it is not what is most probable."""
    classes, said = config["classes"], list_names(decision)
    if isinstance(decision, str):
        name, usual = "most probable", classes[int(np.argmax(probs))]
    else:
        pairs = zip(classes, probs, strict=True)
        name, usual = "above 0.5", list_names([each for each, prob in pairs if prob > 0.5])
    if said == usual:
        return said
    limits = []
    for each, rule in (config["decision"]["thresholds"] or {}).items():
        low, high = rule["threshold"], rule["refer_below"]
        refer = "" if high is None else f"refer from {low:.6g}, "
        limits.append(f"{refer}{each} if >= {low if high is None else high:.6g}")
    return f"{said} by the decision ({', '.join(limits)}); {name} {usual}"


def list_names(decision: str | list[str]) -> str:
    """Return the decision's classes as one text."""
    return decision if isinstance(decision, str) else "|".join(decision) or "none"


def printable(name: str) -> str:
    """Return a file's name with what a terminal would act on escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def say(stream: Any, text: str) -> None:
    """Print a line."""
    stream.write(text + "\n")


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has had enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
