"""Images of every kind that trips readers: each becomes a row or a listed failure, never a crash.

Our own are made here; Pillow's, with the ones that once crashed it, come with its source package
(``--long`` fetches it by pip).
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from bounded import GIB, run_bounded
from PIL import Image, PngImagePlugin

from featcache.cache.reading import open_cache
from featcache.data.dataset import IMAGE_SUFFIXES
from featcache.extraction.extraction import extract

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 44), np.uint8)
COLOUR = RNG.integers(0, 256, (40, 44, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (40, 44), np.uint16)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(mode: str = "L") -> Image.Image:
    return Image.fromarray(GREY).convert(mode)


def colour(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(COLOUR).convert(mode)


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(
    width: int, height: int, depth: int, colour_type: int, raw: bytes, *between: bytes,
    interlaced: int = 0,
) -> bytes:  # fmt: skip
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *between,
         chunk(b"IDAT", zlib.compress(raw, 9)), chunk(b"IEND", b"")]
    )  # fmt: skip


def interlaced_png() -> bytes:
    """Return the grey picture, Adam7."""
    raw = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):  # fmt: skip
        raw += b"".join(b"\0" + row.tobytes() for row in GREY[y::dy, x::dx])
    return png(44, 40, 8, 0, raw, interlaced=1)


def rows(values: npt.NDArray[Any]) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in values)


def bmp(width: int, height: int, bits: int, compression: int, body: bytes) -> bytes:
    palette = bytes(range(256)) * 4 if bits <= 8 else b""
    start = 14 + 40 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0
    )
    return head + info + palette + body


def tiff(tags: dict[int, tuple[int, int]], body: bytes = b"") -> bytes:
    """Return a TIFF of one directory: tag -> type and value; 0 as the value of 273 is the body."""
    num = len(tags)
    start = 8 + 2 + 12 * num + 4
    out = struct.pack("<2sHIH", b"II", 42, 8, num)
    for tag, (kind, value) in sorted(tags.items()):
        out += struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value)
    return out + bytes(4) + body


def tiff_12_bit() -> bytes:
    pairs = (DEEP >> 4).reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    body = b"".join(int(value).to_bytes(3, "big") for value in packed)
    return tiff(
        {256: (4, 44), 257: (4, 40), 258: (3, 12), 259: (3, 1), 262: (3, 1), 273: (4, 0),
         277: (3, 1), 278: (4, 40), 279: (4, len(body))}, body,
    )  # fmt: skip


def jpeg_with(marker: int, body: bytes, image: bytes | None = None) -> bytes:
    """Put a segment behind the start of a JPEG."""
    data = image or encode(grey(), "JPEG")
    return data[:2] + struct.pack(">BBH", 255, marker, len(body) + 2) + body + data[2:]


def reframed(marker: int) -> bytes:
    """Call the frame of a baseline JPEG another kind: arithmetic, lossless, 12 bits."""
    data = bytearray(encode(colour(), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 1] = marker
    return bytes(data)


def frame(**fields: int) -> bytes:
    """Change precision, height or width in a JPEG's frame."""
    data = bytearray(encode(grey(), "JPEG"))
    place = data.index(b"\xff\xc0")
    if "bits" in fields:
        data[place + 4] = fields["bits"]
    for name, offset in (("height", 5), ("width", 7)):
        if name in fields:
            data[place + offset : place + offset + 2] = struct.pack(">H", fields[name])
    return bytes(data)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags.tobytes()


def text_bomb(kind: bytes) -> bytes:
    """Return a PNG with 20 MB of text packed into 20 kB."""
    packed = zlib.compress(bytes(2 * 10**7), 9)
    body = {
        b"zTXt": b"k\0\0" + packed,
        b"iTXt": b"k\0\1\0\0\0" + packed,
        b"iCCP": b"k\0\0" + packed,
    }
    return png(44, 40, 8, 0, rows(GREY), chunk(kind, body[kind]))


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (44, 40), (value, 0, 0)) for value in (50, 100)]
    return encode(colour(), kind, save_all=True, append_images=frames)


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(100)
ROW, FAILED = "row", "failed"
Make = Callable[[], bytes]
# name -> how it is made, and whether it is a row; "" where libraries may differ
OWN: dict[str, tuple[Make, str]] = {
    "mode-1.png": (lambda: encode(grey("1"), "PNG"), ROW),
    "mode-1.pbm.ppm": (lambda: encode(grey("1"), "PPM"), ROW),
    "bits-2.png": (lambda: png(44, 40, 2, 0, rows(GREY[:, :11])), ROW),
    "bits-4.png": (lambda: png(44, 40, 4, 0, rows(GREY[:, :22])), ROW),
    "mode-la.png": (lambda: encode(grey("LA"), "PNG"), ROW),
    "mode-pa.tif": (lambda: encode(colour("P").convert("PA"), "TIFF"), ""),
    "mode-p.png": (lambda: encode(colour("P"), "PNG"), ROW),
    "mode-p-no-palette.png": (lambda: png(44, 40, 8, 3, rows(GREY)), ""),
    "mode-p-beyond.png": (
        lambda: png(44, 40, 8, 3, rows(GREY), chunk(b"PLTE", b"\1\2\3")), ""),
    "mode-rgba.webp": (lambda: encode(colour("RGBA"), "WEBP"), ROW),
    "mode-i16b.tif": (
        lambda: tiff({256: (4, 44), 257: (4, 40), 258: (3, 16), 259: (3, 1), 262: (3, 1),
                      273: (4, 0), 277: (3, 1), 278: (4, 40), 279: (4, 3520)},
                     DEEP.astype("<u2").tobytes()), ROW),
    "mode-i16b-big-endian.tif": (
        lambda: encode(Image.fromarray(DEEP.astype(">u2")), "TIFF"), ""),
    "mode-i32.tif": (lambda: encode(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), ROW),
    "mode-f.tif": (lambda: encode(Image.fromarray(GREY / np.float32(255)), "TIFF"), FAILED),
    "mode-f-nan.tif": (
        lambda: encode(Image.fromarray(np.full((40, 44), np.nan, np.float32)), "TIFF"), FAILED),
    "mode-cmyk.tif": (lambda: encode(colour("CMYK"), "TIFF"), ROW),
    "mode-lab.tif": (lambda: encode(colour("LAB"), "TIFF"), ""),
    "bits-12.tif": (tiff_12_bit, ""),
    "bits-16.png": (lambda: encode(Image.fromarray(DEEP), "PNG"), ROW),
    "bits-16-rgb.png": (
        lambda: png(44, 40, 16, 2, rows(RNG.integers(0, 256, (40, 264), np.uint8))), ROW),
    "bits-16-rgba.png": (
        lambda: png(44, 40, 16, 6, rows(RNG.integers(0, 256, (40, 352), np.uint8))), ROW),
    "bits-16.pgm": (
        lambda: b"P5 44 40 65535\n" + DEEP.astype(">u2").tobytes(), ROW),
    "pages.tif": (lambda: animated("TIFF"), ROW),
    "animated.png": (lambda: animated("PNG"), ROW),
    "animated.webp": (lambda: animated("WEBP"), ROW),
    "animated.gif.png": (lambda: animated("GIF"), FAILED),
    "interlaced.png": (interlaced_png, ROW),
    "progressive.jpg": (lambda: encode(colour(), "JPEG", progressive=True), ROW),
    "cmyk.jpg": (lambda: encode(colour("CMYK"), "JPEG"), ROW),
    "ycck-adobe.jpg": (
        lambda: jpeg_with(0xEE, b"Adobe\0\x64\0\0\0\0\2", encode(colour("CMYK"), "JPEG")), ""),
    "rgb-adobe.jpg": (
        lambda: jpeg_with(0xEE, b"Adobe\0\x64\0\0\0\0\0", encode(colour(), "JPEG")), ROW),
    "subsampled.jpg": (lambda: encode(colour(), "JPEG", subsampling=2), ROW),
    "arithmetic.jpg": (lambda: reframed(0xC9), ""),
    "lossless.jpg": (lambda: reframed(0xC3), FAILED),
    "bits-12.jpg": (lambda: frame(bits=12), FAILED),
    "jpeg-2000.jpg": (lambda: encode(colour(), "JPEG2000"), FAILED),
    "mpo.jpg": (lambda: encode(colour(), "MPO", save_all=True, append_images=[colour()]), ROW),
    "rle-8.bmp": (lambda: bmp(4, 2, 8, 1, bytes([4, 7, 0, 0, 4, 9, 0, 1])), ROW),
    "rle-8-beyond.bmp": (lambda: bmp(4, 2, 8, 1, bytes([255, 7] * 500)), ""),
    "rle-4.bmp": (lambda: bmp(4, 2, 4, 2, bytes([4, 0x78, 0, 0, 4, 0x12, 0, 1])), ""),
    "upside-down.bmp": (lambda: bmp(4, -2, 24, 0, bytes(24)), ROW),
    "exif-truncated.jpg": (lambda: jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), ROW),
    "exif-loop.jpg": (
        lambda: jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"
                                b"\x08\0\0\0"), ROW),
    "icc-broken.png": (
        lambda: png(44, 40, 8, 0, rows(GREY), chunk(b"iCCP", b"k\0\0not zlib")), ""),
    "icc-broken.jpg": (
        lambda: jpeg_with(0xE2, b"ICC_PROFILE\0\7\1" + bytes(100)), ROW),
    "icc-noise.webp": (lambda: encode(colour(), "WEBP", icc_profile=RNG.bytes(500)), ROW),
    "bomb.png": (lambda: png(20000, 20000, 1, 0, bytes(20000 * 2501)), FAILED),
    "bomb-declared.png": (lambda: png(2**31 - 1, 2**31 - 1, 8, 2, bytes(10)), FAILED),
    "bomb-rows.png": (lambda: png(44, 40, 8, 0, bytes(2 * 10**7)), ""),
    "bomb-text.png": (lambda: text_bomb(b"zTXt"), ""),
    "bomb-international.png": (lambda: text_bomb(b"iTXt"), ""),
    "bomb-profile.png": (lambda: text_bomb(b"iCCP"), ""),
    "bomb-declared.jpg": (lambda: frame(height=65535, width=65535), FAILED),
    "bomb-declared.bmp": (lambda: bmp(2**30, 2**30, 24, 0, b""), FAILED),
    "bomb-declared.tif": (
        lambda: tiff({256: (4, 2**31 - 1), 257: (4, 2**31 - 1), 258: (3, 8), 259: (3, 1),
                      262: (3, 1), 273: (4, 0), 277: (3, 1), 278: (4, 2**31 - 1),
                      279: (4, 10)}, bytes(10)), FAILED),
    "bomb-tags.tif": (
        lambda: struct.pack("<2sHIH", b"II", 42, 8, 1)
        + struct.pack("<HHII", 256, 4, 2**31 - 1, 8) + bytes(4), FAILED),
    "bomb-directory-loop.tif": (
        lambda: struct.pack("<2sHIHI", b"II", 42, 8, 0, 8), FAILED),
    "bomb-declared.ppm": (lambda: b"P6 1000000 1000000 255\n" + bytes(100), FAILED),
    "bomb-declared.webp": (
        lambda: b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
        + b"\xff" * 6, FAILED),
    "long-thin.png": (lambda: png(1, 10**6, 8, 0, bytes(2 * 10**6)), ROW),
    "wide-thin.png": (lambda: png(10**6, 1, 8, 0, bytes(10**6 + 1)), ROW),
    "one-pixel.png": (lambda: png(1, 1, 8, 0, b"\0\7"), ROW),
    "zero-width.png": (lambda: png(0, 40, 8, 0, b""), FAILED),
    "zero-height.jpg": (lambda: frame(height=0), FAILED),
    "zero-size.bmp": (lambda: bmp(0, 0, 24, 0, b""), FAILED),
    "zero-size.ppm": (lambda: b"P6 0 0 255\n", FAILED),
    "empty.png": (lambda: b"", FAILED),
    "one-byte.jpg": (lambda: b"\xff", FAILED),
    "jpeg.png": (lambda: encode(colour(), "JPEG"), ROW),
    "webp.jpg": (lambda: encode(colour(), "WEBP"), ROW),
    "html.png": (lambda: HTML, FAILED),
    "pointer.png": (lambda: LFS, FAILED),
    "apple-double.png": (lambda: APPLE, FAILED),
    "dicom.png": (lambda: bytes(128) + b"DICM" + bytes(300), FAILED),
    "pickle.png": (lambda: b"\x80\4cos\nsystem\n(S'true'\ntR.", FAILED),
    "header-cut.png": (lambda: encode(grey(), "PNG")[:20], FAILED),
    "body-cut.png": (lambda: encode(grey(), "PNG")[:900], FAILED),
    "header-cut.jpg": (lambda: encode(grey(), "JPEG")[:50], FAILED),
    "body-cut.jpg": (lambda: encode(grey(), "JPEG")[:-200], FAILED),
    "body-cut.tif": (lambda: encode(grey(), "TIFF")[:500], FAILED),
    "body-cut.webp": (lambda: encode(colour(), "WEBP")[:200], FAILED),
    "crc-broken.png": (lambda: encode(grey(), "PNG").replace(b"IHDR\0", b"IHDR\1"), FAILED),
    "rubbish-behind.png": (lambda: encode(grey(), "PNG") + RNG.bytes(5000), ROW),
    "rubbish-behind.jpg": (lambda: encode(grey(), "JPEG") + RNG.bytes(5000), ROW),
    **{f"exif-{n}.jpg": (lambda n=n: encode(grey(), "JPEG", exif=exif(n)), ROW)
       for n in (*range(1, 9), 0, 9, 255)},
}  # fmt: skip


def run_extract(data: Path, cache: Path) -> None:
    import tiny_network

    extract(data, cache, backbone=tiny_network.build(), bit_depth=16, max_errors="100%")


def judge(data: Path, tmp_path: Path) -> tuple[set[str], dict[str, str]]:
    """Extract all images in one go, in a child of bounded memory; return rows and failures."""
    ended = run_bounded(run_extract, data, tmp_path / "c.h5", seconds=500, gib=4)
    assert ended.error is None, ended.error
    assert ended.peak_bytes < GIB, f"{ended.peak_bytes:,}"
    cache = open_cache(tmp_path / "c.h5")
    (split,) = cache.splits.values()
    assert np.isfinite(split.features).all()
    assert len(split.paths) == len(set(split.paths))
    failures = {failure.path: failure.reason for failure in cache.failures}
    assert not failures.keys() & set(split.paths)
    assert all(reason and len(reason) < 400 for reason in failures.values())
    return set(split.paths), failures


def test_our_own_difficult_images(tmp_path: Path, tally: Any) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, (make, _) in OWN.items():
        (data / name).write_bytes(make())
    (data / "._hidden.png").write_bytes(APPLE)
    found, failures = judge(data, tmp_path)
    assert found | failures.keys() == OWN.keys()
    expected = {name: outcome for name, (_, outcome) in OWN.items() if outcome}
    really = {name: ROW if name in found else FAILED for name in expected}
    wrong = {n: failures.get(n, "a row") for n in expected if really[n] != expected[n]}
    assert not wrong
    tally("own difficult images", "rows", len(found))
    tally("own difficult images", "listed failures", len(failures))


# ------------------------------------------------------------------------------- Pillow's own

PILLOW = "pillow==13.0.0"
SHA256 = "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510"


@pytest.fixture
def source_package(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Pillow's source package, fetched once into pytest's cache by the user's own pip."""
    if not request.config.getoption("--long"):
        pytest.skip("Pillow's difficult images are fetched with --long")
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir("pillow-source")
    file = folder / f"{PILLOW.replace('==', '-')}.tar.gz"
    if not file.exists():
        (tmp_path / "wanted.txt").write_text(f"{PILLOW} --hash=sha256:{SHA256}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "pillow",
             "--require-hashes", "-r", str(tmp_path / "wanted.txt"), "-d", str(folder)],
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        if done.returncode != 0 or not file.exists():
            pytest.skip(f"pip cannot fetch Pillow's source: {done.stderr.strip()[-300:]}")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    return file


def test_pillows_difficult_images(source_package: Path, tmp_path: Path, tally: Any) -> None:
    """Each under its name, and those of other endings once more as a .png, as people rename."""
    data, kinds = tmp_path / "data", Counter[str]()
    data.mkdir()
    with tarfile.open(source_package) as archive:
        for member in archive:
            _, _, name = member.name.partition("/Tests/images/")
            if not name or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            kind = os.path.splitext(name)[1].lower()  # noqa: PTH122
            plain = name.replace("/", "~")
            if plain.startswith("."):
                plain = f"dot{plain}"
            place = data / (plain if kind in IMAGE_SUFFIXES else f"{plain}.png")
            place.write_bytes(file.read())
            kinds[kind] += 1
    assert kinds.total() > 1000
    found, failures = judge(data, tmp_path)
    assert found | failures.keys() == {path.name for path in data.iterdir()}
    tally("Pillow's difficult images", "rows", len(found))
    tally("Pillow's difficult images", "listed failures", len(failures))
    assert len(found) > 500


def test_the_list_is_long_enough() -> None:
    assert len(OWN) >= 40
    assert PngImagePlugin.MAX_TEXT_CHUNK < 10**7  # or the text bombs were none
