"""``--transform library`` and ``--max-pixels`` from ``extract`` to ``predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from PIL import Image

from featcache.cache.reading import open_cache
from featcache.deployment.classifier import load_classifier
from featcache.deployment.predictions import predict
from featcache.errors import BackboneError, CacheError, ConfigError, FeatcacheWarning
from featcache.extraction.extraction import extract
from featcache.extraction.recipe import make_recipe, recipe_from_identity
from featcache.extraction.verification import verify
from featcache.heads.training import train

NAME = "torchvision:shufflenet_v2_x1_5"  # resized to 232, which no --crop-mode does


def write_images(folder: Path, size: tuple[int, int] = (60, 90), number: int = 6) -> Path:
    dice = np.random.default_rng(0)
    for split in ("train", "valid"):
        for target in ("a", "b"):
            (folder / split / target).mkdir(parents=True)
            for i in range(number):
                pixels = dice.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / target / f"{i}.png")
    return folder


def test_the_librarys_transform_is_in_the_identity_and_kept(tmp_path: Path) -> None:
    data, cache = write_images(tmp_path / "data", number=2), tmp_path / "c.h5"
    lines: list[str] = []
    how: dict[str, Any] = {"backbone": NAME, "weights": "random", "say": lines.append}
    extract(data, cache, transform="library", **how)
    assert any("224 x 224 center of 232, bilinear" in line for line in lines)
    identity = open_cache(cache).identity
    assert identity["resize_size"] == 232
    assert (identity["crop_mode"], identity["interpolation"]) == ("center", "bilinear")
    recipe = recipe_from_identity(identity, weights="random")
    assert recipe.identity == identity
    assert recipe.rules.resize_size == 232
    assert verify(cache, data=data, samples="all", weights="random").num_compared == 8
    again = extract(data, cache, transform="library", interpolation="bilinear", **how)
    assert again.status == "up to date"
    with pytest.raises(CacheError, match="resize_size"):
        extract(data, cache, crop_mode="center", **how)
    for option, value in (("crop_mode", "squash"), ("interpolation", "bicubic")):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} with --transform"):
            extract(data, tmp_path / "d.h5", transform="library", **{**how, option: value})


def test_other_transforms_and_other_backbones_are_refused(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", number=1)
    for backbone in (tiny_network.build(), "python:tiny_network:build"):
        with pytest.raises(BackboneError, match="whose library documents no transform"):
            extract(data, tmp_path / "c.h5", backbone=backbone, transform="library")
    with pytest.raises(ConfigError, match="--transform"):
        extract(data, tmp_path / "c.h5", backbone=tiny_network.build(), transform="mine")
    assert not (tmp_path / "c.h5").exists()
    default = make_recipe(tiny_network.build(), _dataset(data))
    assert "resize_size" not in default.identity
    assert "max_pixels" not in default.identity


def _dataset(data: Path) -> Any:
    from featcache.data.dataset import scan

    return scan(data)


def test_max_pixels_reaches_extract_verify_and_predict(tmp_path: Path) -> None:
    data, cache = write_images(tmp_path / "data"), tmp_path / "c.h5"
    large = data / "train" / "a" / "large.png"
    Image.fromarray(np.zeros((90, 91), np.uint8)).save(large)
    backbone = tiny_network.build()
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        extract(data, cache, backbone=backbone, max_pixels=90 * 90, max_errors=1)
    (failure,) = open_cache(cache).failures
    assert failure.reason == "91 x 90 pixels, above --max-pixels 8,100"
    fingerprint = open_cache(cache).fingerprint
    assert extract(data, cache, backbone=backbone).num_new == 1  # it is tried again
    assert open_cache(cache).fingerprint == fingerprint
    how: dict[str, Any] = {"data": data, "samples": "all", "backbone": backbone}
    assert verify(cache, **how).num_compared == 25
    with pytest.raises(CacheError, match="above --max-pixels 8,100"):
        verify(cache, max_pixels=90 * 90, **how)
    train(cache, tmp_path / "run", epochs=1)
    assert not predict(tmp_path / "run", large, backbone=backbone).failures
    found = predict(tmp_path / "run", large, backbone=backbone, max_pixels=90 * 90).failures
    assert "above --max-pixels 8,100" in found[0][1]
    classifier = load_classifier(tmp_path / "run", backbone=backbone, max_pixels=90 * 90)
    assert classifier.predict(large).failures == found
    with pytest.raises(ConfigError, match="--max-pixels"):
        extract(data, tmp_path / "d.h5", backbone=backbone, max_pixels=0)
