"""Source images cut anywhere are listed failures; those with one bit changed never pass unseen."""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bounded import GIB, run_bounded
from PIL import Image

from featcache.cache.reading import open_cache
from featcache.errors import CacheError
from featcache.extraction.extraction import ExtractionSummary, extract
from featcache.extraction.verification import verify
from featcache.pixels.images import PixelRules, decode

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 90}),
    "jpeg": ("JPEG", {"quality": 90, "progressive": True}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "webp": ("WEBP", {"quality": 90}),
}


def encode(ending: str) -> bytes:
    """Return a small picture with structure and noise, as the format packs it."""
    kind, options = FORMATS[ending]
    rows, columns = np.mgrid[0:48, 0:52]
    grey = 120 + 90 * np.sin(columns / 9) * np.cos(rows / 7)
    noise = np.random.default_rng(0).normal(0, 6, (48, 52, 3))
    pixels = np.clip(grey[:, :, None] + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def run_extract(data: Path, cache: Path, rehash: bool = False) -> ExtractionSummary:
    import tiny_network

    backbone = tiny_network.build()
    return extract(
        data, cache, backbone=backbone, max_errors="100%", rehash=rehash, device="cpu"
    )  # fmt: skip


def rows_of(cache: Path) -> dict[str, tuple[bytes, npt.NDArray[Any]]]:
    """Return path -> sha256 of the image and features."""
    (split,) = open_cache(cache).splits.values()
    shas = [bytes(sha) for sha in split.image_sha256]
    return dict(zip(split.paths, zip(shas, split.features, strict=True), strict=True))


def test_a_cut_image_is_a_listed_failure(tmp_path: Path, rounds: Any, tally: Any) -> None:
    number, data = rounds(5, 200), tmp_path / "data"
    for ending in FORMATS:
        whole = encode(ending)
        places = {len(whole) * i // number for i in range(number)}
        places |= {len(whole) - n for n in (1, 2, 4, 12)}  # the end is where doubts begin
        (data / ending).mkdir(parents=True)
        (data / ending / f"whole.{ending}").write_bytes(whole)
        for place in places:
            (data / ending / f"{place:06}.{ending}").write_bytes(whole[:place])
    ended = run_bounded(run_extract, data, tmp_path / "c.h5", seconds=300)
    assert ended.error is None, ended.error
    assert ended.peak_bytes < GIB
    rows, failures = rows_of(tmp_path / "c.h5"), open_cache(tmp_path / "c.h5").failures
    found = sorted([*rows, *(failure.path for failure in failures)])
    assert found == sorted(str(path.relative_to(data)) for path in data.rglob("*.*"))
    assert all(failure.reason for failure in failures)
    for ending in FORMATS:
        whole_pixels = decode(encode(ending), PixelRules(32)).pixels
        for path in (path for path in rows if path.startswith(f"{ending}/")):
            # nothing that counts is missing, or it would be a row that lies
            assert np.array_equal(
                decode((data / path).read_bytes(), PixelRules(32)).pixels, whole_pixels
            ), path
            assert np.array_equal(rows[path][1], rows[f"{ending}/whole.{ending}"][1]), path
            if "whole" not in path:
                tally("cut images", f"rows with every pixel ({ending})")
    tally("cut images", "listed failures", len(failures))
    assert len(failures) >= len(FORMATS) * number


def flip_all(data: Path, number: int) -> set[str]:
    """Change one bit of each image but the first of its format: same size, same time."""
    flipped = set()
    for ending in FORMATS:
        whole = encode(ending)
        places = np.random.default_rng(1).choice(8 * len(whole), number, replace=False)
        for i, place in enumerate(places.tolist()):
            path = data / ending / f"{i:05}.{ending}"
            status, damaged = path.stat(), bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            flipped.add(str(path.relative_to(data)))
    return flipped


def run_verify(data: Path, cache: Path) -> None:
    import tiny_network

    verify(cache, data=data, samples="all", backbone=tiny_network.build(), device="cpu")


def test_no_changed_image_passes_unseen(tmp_path: Path, rounds: Any, tally: Any) -> None:
    number, data, cache = rounds(20, 1500), tmp_path / "data", tmp_path / "c.h5"
    for ending in FORMATS:
        (data / ending).mkdir(parents=True)
        (data / ending / f"whole.{ending}").write_bytes(encode(ending))
        for i in range(number):
            (data / ending / f"{i:05}.{ending}").write_bytes(encode(ending))
    ended = run_bounded(run_extract, data, cache, seconds=300)
    assert ended.value.num_images == len(FORMATS) * (number + 1)
    assert ended.value.num_failed == 0
    assert run_bounded(run_verify, data, cache, seconds=300).error is None
    before = rows_of(cache)

    flipped = flip_all(data, number)
    ended = run_bounded(run_extract, data, cache, seconds=300)
    assert ended.value.status == "up to date"  # size and time say nothing: only content can
    ended = run_bounded(run_verify, data, cache, seconds=300)
    assert isinstance(ended.error, CacheError)
    assert min(flipped) in str(ended.error), ended.error

    ended = run_bounded(run_extract, data, cache, True, seconds=600)
    assert ended.error is None, ended.error
    rows, failed = rows_of(cache), {failure.path for failure in open_cache(cache).failures}
    for path in before:
        sha256 = hashlib.sha256((data / path).read_bytes()).digest()
        assert (sha256 != before[path][0]) == (path in flipped)
        if path in failed:
            assert path in flipped
            tally("flipped bits of images", "noticed, cannot be read any more")
        else:
            assert rows[path][0] == sha256, path
            outcome = "noticed, run again" if path in flipped else "untouched"
            tally("flipped bits of images", outcome)
    assert flipped | {f"{e}/whole.{e}" for e in FORMATS} == rows.keys() | failed
    for ending in FORMATS:
        name = f"{ending}/whole.{ending}"
        assert np.array_equal(rows[name][1], before[name][1])
    assert run_bounded(run_verify, data, cache, seconds=300).error is None


@pytest.mark.parametrize("ending", FORMATS)
def test_verify_names_the_one_that_changed(
    ending: str, tmp_path: Path, rounds: Any, tally: Any
) -> None:
    """Among images that are what they were, whichever bit it is."""
    data, cache = tmp_path / "data", tmp_path / "c.h5"
    (data / ending).mkdir(parents=True)
    paths = [data / ending / f"{i}.{ending}" for i in range(5)]
    for path in paths:
        path.write_bytes(encode(ending))
    assert run_bounded(run_extract, data, cache).error is None
    whole, status = paths[3].read_bytes(), paths[3].stat()
    dice = np.random.default_rng(2)
    for place in dice.choice(8 * len(whole), rounds(1, 20), replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        paths[3].write_bytes(damaged)
        os.utime(paths[3], ns=(status.st_atime_ns, status.st_mtime_ns))
        ended = run_bounded(run_verify, data, cache)
        assert re.search(rf"{ending}/3\.{ending}.*featcache", str(ended.error)), ended.error
        tally("flipped bits of images", "named by verify")
