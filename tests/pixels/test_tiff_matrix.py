"""1,500 kinds of TIFF, written by tifffile: each is read right, or refused; none is wrong.

The truth is the array that was written, which tifffile reads back, through our scaling rule.
"""

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image

from featcache.errors import DataError
from featcache.pixels.images import PixelRules, load

tifffile = pytest.importorskip("tifffile")

HEIGHT, WIDTH = 48, 64
LAYOUTS = {"strip": {}, "strips": {"rowsperstrip": 16}, "tiles": {"tile": (16, 32)}}
CODECS = (None, "lzw", "zlib", "packbits", "zstd", "lzma")
GREY_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8")


def cases():
    """Yield the options of each file: dtype, photometric, planes, alpha, codec, layout, order."""
    orders = "<>"
    for dtype, photometric in itertools.product(GREY_TYPES, ("minisblack", "miniswhite")):
        for codec, layout, order in itertools.product(CODECS, LAYOUTS, orders):
            yield {"dtype": dtype, "photometric": photometric, "codec": codec, "layout": layout,
                   "order": order}  # fmt: skip
    for dtype, codec, order in itertools.product(("u1", "u2", "i2", "f4"), ("lzw", "zlib"), orders):
        for layout, colour in itertools.product(LAYOUTS, ("minisblack", "rgb")):
            yield {"dtype": dtype, "photometric": colour, "codec": codec, "layout": layout,
                   "order": order, "predictor": True}  # fmt: skip
    for dtype, codec, layout in itertools.product(("u1", "u2"), (None, "zlib"), LAYOUTS):
        for alpha in ("unassalpha", "assocalpha", "unspecified"):
            for photometric, planes, order in itertools.product(
                ("minisblack", "rgb"), ("contig", "separate"), orders
            ):
                yield {"dtype": dtype, "photometric": photometric, "planes": planes, "alpha": alpha,
                       "codec": codec, "layout": layout, "order": order}  # fmt: skip
    for dtype, photometric in itertools.product(
        ("u1", "u2", "u4", "f4"), ("rgb", "separated", "cielab")
    ):
        for planes, codec, layout, order in itertools.product(
            ("contig", "separate"), (None, "lzw"), LAYOUTS, orders
        ):
            yield {"dtype": dtype, "photometric": photometric, "planes": planes, "codec": codec,
                   "layout": layout, "order": order}  # fmt: skip
    for dtype, codec, layout, order in itertools.product(
        ("u1", "u2"), (None, "zlib"), LAYOUTS, orders
    ):
        yield {"dtype": dtype, "photometric": "palette", "codec": codec, "layout": layout,
               "order": order}  # fmt: skip
    for photometric, planes, codec, layout, order in itertools.product(
        ("rgb", "ycbcr"), ("contig", "separate"), (None, "lzw", "jpeg"), LAYOUTS, orders
    ):
        yield {"dtype": "u1", "photometric": photometric, "planes": planes, "codec": codec,
               "layout": layout, "order": order}  # fmt: skip
    for photometric, codec, order in itertools.product(
        ("minisblack", "miniswhite"), (None, "packbits", "zlib"), orders
    ):
        yield {"dtype": "?", "photometric": photometric, "codec": codec, "order": order}


def stored(case, seed):
    """Return the array to write: (H, W) or (H, W, samples)."""
    rng, kind = np.random.default_rng(seed), np.dtype(case["dtype"])
    samples = {"rgb": 3, "separated": 4, "cielab": 3, "ycbcr": 3}.get(case["photometric"], 1)
    shape = (HEIGHT, WIDTH, samples + ("alpha" in case))
    if kind == "?":
        values = rng.integers(0, 2, shape).astype(kind)
    elif kind.kind == "f":
        values = rng.normal(size=shape).astype(kind)
    else:
        info = np.iinfo(kind)
        values = rng.integers(info.min, info.max, shape, endpoint=True, dtype=kind)
    if case.get("alpha") == "assocalpha":  # no colour above its alpha
        values = np.minimum(values, values[..., -1:])
    return values if values.shape[2] > 1 else values[:, :, 0]


def written(case, values):
    """Return the file."""
    options = dict(LAYOUTS[case.get("layout", "strip")])
    if "alpha" in case:
        options["extrasamples"] = [case["alpha"]]
    if values.ndim == 3:
        options["planarconfig"] = case.get("planes", "contig")
        if options["planarconfig"] == "separate":
            values = np.ascontiguousarray(values.transpose(2, 0, 1))
    if case["photometric"] == "palette":
        options["colormap"] = palette(values.dtype)
    if case.get("predictor"):
        options["predictor"] = True
    file = io.BytesIO()
    tifffile.imwrite(
        file, values, photometric=case["photometric"], compression=case["codec"],
        byteorder=case["order"], metadata=None, **options,
    )  # fmt: skip
    return file.getvalue()


def palette(dtype):
    number = 2 ** (8 * dtype.itemsize)
    return np.random.default_rng(9).integers(0, 65536, (3, number)).astype(np.uint16)


def truth(case, values, bit_depth, *, is_rgb=False):
    """Return the 8-bit pixels that the values stand for; None where they stand for none."""
    kind, colour = values.dtype, values.ndim == 3
    if case["photometric"] == "palette":
        return (palette(kind)[:, values] >> 8).transpose(1, 2, 0).astype(np.uint8)
    alpha = values[..., -1] if "alpha" in case else None
    if colour and alpha is not None:
        values = values[..., :-1]
    if kind == "?":
        grey = values.astype(np.uint8) * 255
    elif kind == np.uint8 or (kind == np.int8 and values.min() >= 0):
        grey = values.astype(np.uint8)
    elif colour and kind == np.uint16 and bit_depth == 16:
        grey = (values >> 8).astype(np.uint8)
    elif bit_depth == "minmax" and kind != np.int8:
        low, high = float(values.min()), float(values.max())
        grey = np.rint((values.astype(np.float64) - low) * 255 / (high - low)).astype(np.uint8)
    elif kind.kind in "iu" and values.min() >= 0 and values.max() < 2**bit_depth:
        whole = values.astype(np.uint64)
        grey = ((510 * whole + 2**16 - 1) // (2 * (2**16 - 1))).astype(np.uint8)
    else:
        return None
    if case["photometric"] == "miniswhite":
        grey = 255 - grey
    if case.get("alpha") == "assocalpha":
        high = (alpha >> 8 * (kind.itemsize - 1)).astype(int)[..., None]
        grey = np.where(high > 0, grey.astype(int) * 255 // np.maximum(high, 1), grey)
        grey = np.clip(grey, 0, 255).astype(np.uint8)
    mode = {"separated": "CMYK", "cielab": "LAB", "ycbcr": "YCbCr"}.get(case["photometric"])
    if mode is not None and not is_rgb:
        whole = Image.frombytes(mode, (WIDTH, HEIGHT), np.ascontiguousarray(grey).tobytes())
        grey = np.asarray(whole.convert("RGB"))
    return grey[..., 0] if grey.ndim == 3 and grey.shape[2] == 1 else grey


def judge(case, bit_depth, seed):
    """Return right, refused or wrong, and why."""
    values = stored(case, seed)
    data = written(case, values)
    is_lossy = case["codec"] == "jpeg"
    if is_lossy:
        values = tifffile.imread(io.BytesIO(data))
        values = values.transpose(1, 2, 0) if case["planes"] == "separate" else values
    try:
        found = load(data, PixelRules(64, bit_depth=bit_depth)).pixels
    except DataError as error:
        return "refused", str(error.found)
    # tifffile has made RGB of JPEG's YCbCr, unless the planes are separate
    wanted = truth(case, values, bit_depth, is_rgb=is_lossy and case["planes"] == "contig")
    if wanted is None:
        return "wrong", "there is no right value"
    if found.shape != wanted.shape:
        return "wrong", f"{found.shape} for {wanted.shape}"
    off = np.abs(found.astype(int) - wanted).max()
    may_round = case["photometric"] == "ycbcr"  # libtiff and Pillow round its conversion otherwise
    return ("right", "") if off <= may_round else ("wrong", f"off by up to {off}")


def test_every_kind_of_tiff_is_read_right_or_refused(rounds, tally):
    every = list(cases())
    wrong = []
    for number, case in enumerate(random.Random(0).sample(every, rounds(100, len(every)))):
        for bit_depth in (16, "minmax"):
            verdict, why = judge(case, bit_depth, number)
            tally(f"TIFF files at --bit-depth {bit_depth}", verdict)
            if verdict == "wrong":
                wrong.append((why, bit_depth, case))
    assert not wrong, "\n".join(map(str, wrong[:20]))
