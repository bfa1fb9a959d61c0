"""The part ``decode`` of ``extract.py``: bytes to pixels, against Pillow, torchvision and zlib."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from make_images import KINDS, encode_image
from make_varied import encode_varied, true_pixels
from measuring import as_table, measure_in_turn, median, number, seconds_of
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from featcache.errors import DataError
from featcache.pixels import acceleration
from featcache.pixels.images import PixelRules, decode
from featcache.runtime import available_cores

SIDE = 224
RULES = PixelRules(SIDE)
FEATCACHE, PILLOW = "featcache", "Pillow"
TORCHVISION = "torchvision (not exact)"
NUM_MEGAPIXELS = 6  # different files a kind, in all; at least two files
# Inflating libraries, by import name; each is the bound of a PNG if it is installed.
INFLATERS: dict[str, Callable[[Any, bytes, int], Any]] = {
    "zlib": lambda module, data, _: module.decompress(data),
    "zlib_ng.zlib_ng": lambda module, data, _: module.decompress(data),
    "isal.isal_zlib": lambda module, data, _: module.decompress(data),
    "deflate": lambda module, data, size: module.zlib_decompress(data, size),
}


def measure_decode(args: argparse.Namespace) -> dict[str, Any]:
    """Return times per kind of file and way, one thread and ``--workers``, and pixel checks."""
    workers = args.workers or max(2, available_cores())
    acceleration.start()  # as in a job that is worth it
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # one image, one core: for torchvision's resize too
    try:
        kinds = {
            name: _measure_kind(name, args.rounds, args.seconds, workers)
            for name in args.kinds or KINDS
        }
        return {"workers": workers, "kinds": kinds, "pixels": check_pixels(args.pixel_images)}
    finally:
        torch.set_num_threads(threads_before)


def check_pixels(num_images: int) -> dict[str, Any]:
    """Compare every pixel of images of all kinds and sizes with Pillow's."""
    different, seen = [], set()
    for index in range(num_images):
        what, data = encode_varied(index)
        seen.add(what.rsplit(" ", 1)[0])
        try:
            equal = np.array_equal(decode(data, RULES).pixels, true_pixels(what, data, SIDE))
            fault = "other pixels"
        except DataError as error:
            equal, fault = False, str(error.found)
        if not equal:
            different.append(f"{index}, {what}: {fault}")
    return {"num_images": num_images, "kinds": sorted(seen), "different": different}


def _measure_kind(name: str, rounds: int, seconds: float, workers: int) -> dict[str, Any]:
    kind = KINDS[name]
    num_files = int(np.clip(NUM_MEGAPIXELS / kind.megapixels, 2, 64))
    files = [encode_image(kind, index) for index in range(num_files)]
    ways = _decoders()
    if kind.ending == "png":
        payloads = [_image_data(data) for data in files]
        size = kind.size[1] * (1 + kind.size[0] * (2 if kind.mode == "I;16" else 1))
        ways |= {f"{library}, inflate only": w for library, w in _inflaters(size).items()}
    cases: dict[str, Callable[[], float]] = {}
    shape: dict[str, tuple[str, int, int]] = {}
    for way, work in ways.items():
        inputs = payloads if "inflate" in way else files
        once = max(seconds_of(lambda w=work, i=inputs: w(i[0])) for _ in range(2))
        for num_threads in sorted({1, workers}):
            count = max(
                2 * num_threads, round(seconds * min(num_threads, available_cores()) / once)
            )
            case = f"{way}, {num_threads}"
            cases[case] = _timer(work, inputs, count, num_threads)
            shape[case] = (way, num_threads, count)
    samples = measure_in_turn(cases, rounds)
    rows = [_row(*shape[case], values, kind.megapixels) for case, values in samples.items()]
    return {
        "bytes_per_file": sum(map(len, files)) / num_files,
        "megapixels": kind.megapixels,
        "torchvision_pixels": _differences(files),
        "rows": rows,
    }


def _row(
    way: str, num_threads: int, count: int, values: list[float], megapixels: float
) -> dict[str, Any]:
    cores = min(num_threads, available_cores())
    seconds = median(values) / count
    return {
        "way": way,
        "num_threads": num_threads,
        "num_images": count,
        "images_per_second": 1 / seconds,
        "core_milliseconds_per_image": 1000 * seconds * cores,
        "core_milliseconds_per_megapixel": 1000 * seconds * cores / megapixels,
        "samples_seconds": values,
    }


def _timer(
    work: Callable[[bytes], object], inputs: Sequence[bytes], count: int, num_threads: int
) -> Callable[[], float]:
    tasks = [inputs[index % len(inputs)] for index in range(count)]

    def in_one() -> float:
        start = time.perf_counter()
        for data in tasks:
            work(data)
        return time.perf_counter() - start

    def in_several() -> float:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda _: None, range(num_threads)))  # threads are there before the clock
            return seconds_of(lambda: list(pool.map(work, tasks)))

    return in_one if num_threads == 1 else in_several


def _decoders() -> dict[str, Callable[[bytes], object]]:
    def by_pillow(data: bytes) -> object:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))

    def only_torchvision(data: bytes) -> torch.Tensor:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    return {
        FEATCACHE: lambda data: decode(data, RULES),
        PILLOW: by_pillow,
        TORCHVISION: torchvision_pixels,
        "torchvision, decode only": only_torchvision,
    }


def torchvision_pixels(data: bytes) -> torch.Tensor:
    """Return (3, S, S) uint8 by torchvision's decoder and its antialiased resize of bytes."""
    image = decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED
    )
    if image.dtype != torch.uint8:
        image = functional.to_dtype(image, torch.uint8, scale=True)
    image = functional.resize(image, [SIDE, SIDE], antialias=True)
    return image.expand(3, -1, -1)


def _differences(files: Sequence[bytes]) -> dict[str, float]:
    """Return how torchvision's pixels differ from featcache's."""
    largest, unequal, total = 0, 0, 0
    for data in files:
        theirs = torchvision_pixels(data).permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(theirs - decode(data, RULES).pixels)
        largest = max(largest, int(difference.max()))
        unequal += int((difference > 0).sum())
        total += difference.size
    return {"largest_difference": largest, "share_different": unequal / total}


def _image_data(png: bytes) -> bytes:
    """Return the zlib stream of a PNG: its IDAT chunks joined."""
    position, parts = 8, []
    while position < len(png):
        length, chunk = struct.unpack(">I4s", png[position : position + 8])
        if chunk == b"IDAT":
            parts.append(png[position + 8 : position + 8 + length])
        position += length + 12
    return b"".join(parts)


def _inflaters(size: int) -> dict[str, Callable[[bytes], object]]:
    found: dict[str, Callable[[bytes], object]] = {}
    data = zlib.compress(bytes(size))
    for name, call in INFLATERS.items():
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            if bytes(call(module, data, size)) == bytes(size):
                found[name.split(".")[-1]] = lambda d, m=module, c=call: c(m, d, size)
    return found


def describe_decode(part: dict[str, Any]) -> list[str]:
    """Return the Markdown lines."""
    rows = []
    for name, kind in part["kinds"].items():
        pillow = {
            r["num_threads"]: r["images_per_second"] for r in kind["rows"] if r["way"] == PILLOW
        }
        rows += [
            (
                name, row["way"], row["num_threads"],
                number(row["core_milliseconds_per_image"]),
                number(row["core_milliseconds_per_megapixel"]),
                number(row["images_per_second"]),
                number(row["images_per_second"] / pillow[row["num_threads"]]),
            )
            for row in kind["rows"]
        ]  # fmt: skip
    header = ("file", "way", "threads", "ms / image / core", "ms / MP / core", "images/s",
              "times Pillow")  # fmt: skip
    pixels = part["pixels"]
    lines = ["### Decode and resize to 224", "", *as_table(header, rows, 2), ""]
    lines.append(
        f"featcache gives Pillow's pixels, every one, in "
        f"{pixels['num_images'] - len(pixels['different'])} of {pixels['num_images']} images of "
        f"{len(pixels['kinds'])} kinds."
    )
    lines += [f"DIFFERENT: {line}." for line in pixels["different"]]
    for name, kind in part["kinds"].items():
        found = kind["torchvision_pixels"]
        lines.append(
            f"torchvision's resize on {name}: {100 * found['share_different']:.1f} % of the values "
            f"differ, by {found['largest_difference']} of 255 at most."
        )
    return lines
