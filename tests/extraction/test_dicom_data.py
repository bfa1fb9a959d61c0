"""DICOM data goes the whole way: the features, and the answers, are those of the same PNG files."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from PIL import Image

pytest.importorskip("pydicom", reason="pydicom, the extra dicom")

from sample_dicom import make_dicom, ramp

import featcache
from featcache.cache.reading import open_cache
from featcache.data.dataset import scan
from featcache.data.image_lists import list_images
from featcache.data.splitting import split
from featcache.deployment.server.work_queue import WorkQueue
from featcache.errors import CacheError, ConfigError, FeatcacheWarning
from featcache.extraction.comparison import find_images
from featcache.pixels.dicom import read_dicom
from featcache.pixels.dicom_rules import DicomRules

QUIET: dict[str, Any] = {"say": lambda _: None}
NAMES = ["{}.dcm", "IM{:04}", "{}.IMA", "1.2.826.0.{}"]
HOW: list[dict[str, Any]] = [
    {"syntax": "RLE"}, {"photometric": "MONOCHROME1"}, {"WindowCenter": 1500, "WindowWidth": 900},
    {"syntax": "JPEG-LS"},
]  # fmt: skip


def write_both(root: Path) -> None:
    """Write DICOM files ``dicom/SPLIT/CLASS/...``, and what is seen of them, ``png/...``."""
    noise = np.random.default_rng(3)
    for number in range(40):
        place = f"{('train', 'valid', 'test')[number % 3]}/{('covid', 'normal')[number % 2]}"
        values = noise.integers(0, 2000 + 2000 * (number % 2), (40, 48)).astype("<u2")
        data = make_dicom(
            values, bits=12, **HOW[number // 2 % 4], SOPInstanceUID=f"1.2.3.{number + 1}"
        )
        for kind in ("dicom", "png"):
            (root / kind / place).mkdir(parents=True, exist_ok=True)
        # a number in front, so that the order of names is the same
        name = f"{number:02}" + NAMES[number // 2 % 4].format(number)
        (root / "dicom" / place / name).write_bytes(data)
        pixels = read_dicom(data, DicomRules(), 10**6).pixels
        Image.fromarray(pixels).save(root / "png" / place / f"{number:02}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    write_both(folder)
    for kind in ("dicom", "png"):
        cache = folder / f"{kind}.h5"
        featcache.extract(folder / kind, cache, backbone=tiny_network.build(), **QUIET)
        featcache.train(cache, folder / f"{kind}-run", hidden=(4,), epochs=3, **QUIET)
    return folder


@pytest.fixture(scope="module")
def classifier(place: Path) -> featcache.Classifier:
    return featcache.load_classifier(place / "dicom-run", backbone=tiny_network.build())


def test_features_are_those_of_the_same_pixels_in_png(place: Path) -> None:
    made, same = open_cache(place / "dicom.h5"), open_cache(place / "png.h5")
    for name, rows in same.splits.items():
        np.testing.assert_array_equal(made.splits[name].features, rows.features)
    assert made.identity["dicom"]["window"] is None
    assert {k: v for k, v in made.identity.items() if k != "dicom"} == same.identity


def test_verify_and_update_read_dicom_again(place: Path, tmp_path: Path) -> None:
    backbone = tiny_network.build()
    result = featcache.verify(
        place / "dicom.h5", data=place / "dicom", samples="all", backbone=backbone, **QUIET
    )
    assert result.num_compared == 40
    cache = tmp_path / "c.h5"
    shutil.copy(place / "dicom.h5", cache)
    summary = featcache.extract(place / "dicom", cache, backbone=backbone, **QUIET)
    assert summary.status == "up to date"
    with pytest.raises(CacheError, match=r"cache identity: .*dicom"):
        featcache.extract(place / "dicom", cache, backbone=backbone, window="first", **QUIET)
    assert len(find_images(open_cache(cache), place / "dicom")[1]) == 40


def test_a_run_that_has_seen_no_dicom_says_so_once(place: Path) -> None:
    classifier = featcache.load_classifier(place / "png-run", backbone=tiny_network.build())
    by_png = classifier.predict(place / "png")
    with pytest.warns(FeatcacheWarning, match="was trained without DICOM files") as caught:
        by_dicom = classifier.predict(place / "dicom")
    assert len(caught) == 1
    np.testing.assert_array_equal(by_dicom.probs, by_png.probs)
    classifier.predict(place / "dicom")  # warnings are errors
    classifier.preprocess(place / "dicom")


def test_predict_explain_and_serve_read_dicom(
    place: Path, tmp_path: Path, classifier: featcache.Classifier
) -> None:
    files = [path for path in sorted(place.glob("dicom/test/*/*")) if path.is_file()]
    found = classifier.predict(files)
    assert not found.failures
    np.testing.assert_array_equal(found.probs, classifier.predict(place / "dicom/test").probs)
    explained = featcache.explain(
        place / "dicom-run", files[0], tmp_path / "out", backbone=tiny_network.build(), **QUIET
    )
    assert not explained.failures
    with WorkQueue(classifier, num_decoders=1, decode_seconds=20) as work:
        rows = [work.compute(file.read_bytes()).result() for file in files[:4]]
        broken = work.compute(make_dicom(ramp(8), PixelData=None)).result()
    assert broken == "a DICOM file without pixels (Digital X-Ray Image)"
    served = classifier.predict_rows([str(n) for n in range(4)], rows)
    np.testing.assert_allclose(served.probs, found.probs[:4], atol=1e-6)


def test_what_cannot_be_shown_is_a_listed_failure(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(place / "dicom" / "train", data)
    ct = make_dicom(ramp(12), bits=12, Modality="CT", SOPInstanceUID="2.25.4711.1")
    (data / "covid" / "ct.dcm").write_bytes(ct)
    (data / "covid" / "no.dcm").write_bytes(b"\x08\0\x05\0CS" + bytes(200))
    named = make_dicom(ramp(8), SOPInstanceUID="2.25.4711.2")
    (data / "normal" / "named.png").write_bytes(named)
    cache, how = tmp_path / "c.h5", {"backbone": tiny_network.build(), "max_errors": 5, **QUIET}
    with (
        pytest.warns(FeatcacheWarning, match="2 images could not be read"),
        pytest.warns(FeatcacheWarning, match="headers of 1 DICOM file could not be read"),
    ):
        featcache.extract(data, cache, **how)
    reasons = {f.path: f.reason for f in open_cache(cache).failures}
    assert reasons == {
        "covid/ct.dcm": "CT, which needs a window: extract --window CENTER,WIDTH, first, voi or "
        "none",
        "covid/no.dcm": "perhaps a damaged DICOM file: DICM is not at byte 128, nor elements at "
        "its start",
    }
    with (
        pytest.warns(FeatcacheWarning, match="1 image could not be read"),
        pytest.warns(FeatcacheWarning, match="headers of 1 DICOM file could not be read"),
    ):
        featcache.extract(data, tmp_path / "d.h5", window="2000, 4000", **how)
    assert open_cache(tmp_path / "d.h5").identity["dicom"]["window"] == "2000,4000"


def test_misnamed_dicom_fails_where_the_identity_does_not_state_how(
    place: Path, tmp_path: Path
) -> None:
    data, how = tmp_path / "data", {"backbone": tiny_network.build(), **QUIET}
    shutil.copytree(place / "png" / "train", data)
    (data / "covid" / "named.png").write_bytes(make_dicom(ramp(8)))
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        featcache.extract(data, tmp_path / "c.h5", max_errors=5, **how)
    cache = open_cache(tmp_path / "c.h5")
    assert [f.reason for f in cache.failures] == [
        "a DICOM file by another name: let it end in .dcm (of a Parquet file, its path)"
    ]
    assert "dicom" not in cache.identity
    with pytest.raises(ConfigError, match=r"--window: expected DICOM files, found none"):
        featcache.extract(data, tmp_path / "d.h5", window="first", **how)


def test_dicom_is_split_zipped_and_listed(place: Path, tmp_path: Path) -> None:
    source = place / "dicom" / "train"
    split(source, tmp_path / "split", **QUIET)
    files = sorted(p.read_bytes() for p in tmp_path.glob("split/*/*/*"))
    assert files == sorted(p.read_bytes() for p in source.glob("*/*"))
    split(source, tmp_path / "split.csv", **QUIET)
    assert scan(tmp_path / "split.csv").has_dicom
    assert len(list_images([source]).samples) == len(files)
    shutil.make_archive(str(tmp_path / "d"), "zip", source)
    zipped = scan(tmp_path / "d.zip")  # by their endings alone
    assert len(zipped.samples) == sum(p.suffix in {".dcm", ".IMA"} for p in source.glob("*/*"))
    assert zipped.has_dicom


def test_without_pydicom_dicom_is_left_out_in_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.data.dicom_files.is_installed", lambda: False)
    with warnings.catch_warnings(), pytest.raises(featcache.DataError) as caught:
        scan(place / "dicom")
    assert "pip install 'featcache[dicom]'" in str(caught.value)
