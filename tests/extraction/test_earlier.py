"""Caches and runs of earlier versions that read images or built networks wrongly: all say so."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import tiny_network
from sample_images import write_image

from featcache import evaluate, extract, load_classifier, open_cache, predict, train, verify
from featcache.errors import CacheError, DataError, FeatcacheError
from featcache.extraction import earlier, recipe
from featcache.pixels import decoding

pytestmark = pytest.mark.usefixtures("children_here")


def colour_png(path, bits, seed):
    """Write RGB of so many bits in a PNG of 16, which Pillow cannot write."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    values = np.random.default_rng(seed).integers(0, 2**bits, (40, 40, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def planes_tiff(path, seed):
    """Write 16-bit RGB in separate planes, which Pillow mixes up."""
    values = np.random.default_rng(seed).integers(0, 65536, (3, 40, 40)).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", planarconfig="separate", metadata=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())


def write_data(root, write):
    for i in range(8):
        write(root / "covid" / f"{i}.{'tif' if write is planes_tiff else 'png'}", i)
        write_image(root / "normal" / f"{i}.png", 50 + i)
    return root


def make_as_before(data, folder, backbone, valid_fraction=0.25):
    """Return a cache and a run of it, made as earlier versions made them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "check_bit_depth", lambda _: None)
        patch.setattr(decoding, "misread_kind", lambda *_: None)
        extract(data, folder / "c.h5", backbone=backbone)
    train(folder / "c.h5", folder / "run", epochs=1, valid_fraction=valid_fraction)
    return folder / "c.h5", folder / "run"


# ------------------------------------------------------------------------------- 12 bits in colour


@pytest.fixture
def dark(tmp_path):
    return write_data(tmp_path / "data", lambda path, seed: colour_png(path, 12, seed))


def test_dark_colour_is_asked_for_and_then_works(dark, tmp_path, tiny_backbone):
    with pytest.raises(DataError, match=r"none above 4095 .*--bit-depth 12, 14, 16 or minmax"):
        extract(dark, tmp_path / "c.h5", backbone=tiny_backbone)
    for bit_depth in (12, 14, 16, "minmax"):
        path = tmp_path / f"{bit_depth}.h5"
        made = extract(dark, path, backbone=tiny_backbone, bit_depth=bit_depth)
        assert (made.num_images, made.num_failed) == (16, 0)
        assert verify(path, data=dark, backbone=tiny_backbone).num_compared == 16
        again = extract(dark, path, backbone=tiny_backbone, bit_depth=bit_depth)
        assert again.status == "up to date"
    assert open_cache(tmp_path / "16.h5").identity["dark_colour"] == "as stored"
    train(tmp_path / "16.h5", tmp_path / "run", epochs=1, valid_fraction=0.25)
    assert len(predict(tmp_path / "run", dark, backbone=tiny_backbone).preds) == 16


def test_full_range_beside_dark_colour_is_no_excuse(dark, tmp_path, tiny_backbone):
    """Grey that uses all its bits does not speak for colour that does not."""
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 65536, (40, 40)).astype(np.uint16)
    for i in range(8):
        Image.fromarray(values + np.uint16(i)).save(dark / "normal" / f"grey{i}.png")
    with pytest.raises(DataError, match="none above 4095"):
        extract(dark, tmp_path / "c.h5", backbone=tiny_backbone)


def test_bright_colour_has_the_identity_it_had(tmp_path, tiny_backbone):
    data = write_data(tmp_path / "data", lambda path, seed: colour_png(path, 16, seed))
    cache, run = make_as_before(data, tmp_path, tiny_backbone)
    assert extract(data, cache, backbone=tiny_backbone).status == "up to date"
    assert extract(data, cache, backbone=tiny_backbone, bit_depth=16).status == "up to date"
    assert verify(cache, data=data, backbone=tiny_backbone).num_compared == 16
    assert len(predict(run, data, backbone=tiny_backbone).preds) == 16
    assert not {"dark_colour", "built_as"} & open_cache(cache).identity.keys()


def test_earlier_caches_and_runs_of_dark_colour_are_stopped(dark, tmp_path, tiny_backbone):
    cache, run = make_as_before(dark, tmp_path, tiny_backbone)
    assert open_cache(cache).num_features == tiny_network.NUM_FEATURES
    for bit_depth, says in (("auto", "none above"), (12, "bit_depth"), (16, "dark_colour")):
        with pytest.raises(FeatcacheError, match=says):
            extract(dark, cache, backbone=tiny_backbone, bit_depth=bit_depth)
    with pytest.raises(DataError, match="nearly black"):
        verify(cache, data=dark, backbone=tiny_backbone)
    with pytest.raises(DataError, match="nearly black"):
        predict(run, dark, backbone=tiny_backbone)
    assert len(predict(run, dark / "normal", backbone=tiny_backbone).preds) == 8


# ------------------------------------------------------------------------------------ misread TIFF


def test_earlier_caches_with_misread_rows_are_stopped(tmp_path, tiny_backbone):
    data = write_data(tmp_path / "data", planes_tiff)
    cache, run = make_as_before(data, tmp_path, tiny_backbone)
    assert len(open_cache(cache).splits["all"]) == 16  # it opens for reading
    write_image(data / "normal" / "new.png", 99)
    for call in (
        lambda: extract(data, cache, backbone=tiny_backbone),
        lambda: verify(cache, data=data, backbone=tiny_backbone),
    ):
        with pytest.raises(CacheError, match=r"row of covid/\d.tif: .*separate planes .*--rebuild"):
            call()
    predictions = predict(run, data, backbone=tiny_backbone)
    assert len(predictions.failures) == 8
    assert all("separate planes" in reason for _, reason in predictions.failures)
    with pytest.raises(DataError, match="5%"):
        extract(data, cache, backbone=tiny_backbone, rebuild=True)
    for path in (data / "covid").iterdir():
        planes_tiff(path, 1000)  # another file is no longer the one that was misread
        path.write_bytes(path.read_bytes() + b"\0")
    earlier.refuse_misread(open_cache(cache), recipe_dataset(data))


def recipe_dataset(data):
    from featcache.data.dataset import scan

    return scan(data)


# --------------------------------------------------------------------------------- other networks


@pytest.mark.parametrize("name", ["torchvision:inception_v3", "timm:fbnetc_100.rmsp_in1k"])
def test_earlier_caches_and_runs_of_other_networks_are_stopped(name, tree, tmp_path, tiny_backbone):
    """A stand-in of that name: what matters is what the identity says."""
    before = replace(tiny_backbone, name=name)
    cache, run = make_as_before(tree, tmp_path, before, None)
    assert open_cache(cache).identity["backbone"] == name
    now = replace(before, built_as="library")
    for call in (
        lambda: extract(tree, cache, backbone=now),
        lambda: verify(cache, data=tree),
        lambda: predict(run, tree),
        lambda: predict(run, cache=cache),
        lambda: load_classifier(run),
        lambda: evaluate(run),
        lambda: evaluate(run, cache=cache),
    ):
        with pytest.raises(CacheError, match=r"its library builds .*--rebuild, and train again"):
            call()
    extract(tree, tmp_path / "new.h5", backbone=now)
    assert open_cache(tmp_path / "new.h5").identity["built_as"] == "library"
    train(tmp_path / "new.h5", tmp_path / "new", epochs=1)
    assert evaluate(tmp_path / "new").num_samples == 12
    assert len(predict(tmp_path / "new", tree, backbone=now).preds) == 46
    with pytest.raises(CacheError, match="its library builds"):
        evaluate(run, cache=tmp_path / "new.h5")
