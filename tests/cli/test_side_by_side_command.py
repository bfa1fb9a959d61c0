"""Several sizes from one decode, side by side, from images to an export: the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import assert_one_line_error
from sample_images import write_tree

from featcache.cache.reading import open_cache
from featcache.errors import ConfigError
from featcache.extraction import view_stream
from featcache.extraction.extraction import extract, plan
from featcache.pixels.views import render

NETWORK = "python:tiny_network:network"  # a module that takes any size
TRUST = ["--backbone", NETWORK]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data", {"train": 4, "valid": 2, "test": 3})


def test_sizes_go_side_by_side_from_images_to_an_export(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counter[bytes]()

    def counting(image: bytes, recipes: Any, sha256: bytes) -> Any:
        counts[sha256] += 1
        return render(image, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", counting)
    made = run("extract", data, "sizes", *TRUST, "--image-size", "32,48", "--json")
    names = ["python-tiny_network-network-32.h5", "python-tiny_network-network-48.h5"]
    assert [Path(c["cache"]).name for c in json.loads(made.out)["caches"]] == names
    assert (len(counts), set(counts.values())) == (18, {1})
    assert sorted(p.name for p in (tmp_path / "sizes").iterdir()) == names
    for side, name in zip((32, 48), names, strict=True):
        assert run("extract", data, f"{side}.h5", *TRUST, "--image-size", side).code == 0
        alone, beside = open_cache(tmp_path / f"{side}.h5"), open_cache(tmp_path / "sizes" / name)
        assert alone.content_sha256 == beside.content_sha256
    again = run("extract", data, "sizes", *TRUST, "--image-size", "32,48")
    assert again.out.count("up to date") == 2
    trained = run("train", "32.h5", "48.h5", "run", "--hidden", "8", "--epochs", "2")
    assert trained.code == 0, trained.err
    folder = run("train", "sizes", "run2", "--hidden", "8", "--epochs", "2")
    assert folder.code == 0, folder.err
    weights = [(tmp_path / r / "head.safetensors").read_bytes() for r in ("run", "run2")]
    assert weights[0] == weights[1]
    told = run("info", "run").out
    assert "side by side" in told
    assert "../32.h5" in told
    assert "../48.h5" in told
    assert "(N, 3, 32, 32)\ninput: (N, 3, 48, 48)" in run("info", "run", "--layers").out
    evaluated = [
        run("evaluate", "run", *options, "--json").out
        for options in ([], ["--cache", "48.h5", "--cache", "32.h5"])
    ]
    assert evaluated[0] == evaluated[1]
    cached = json.loads(run("predict", "run", "--cache", "sizes", "--json").out)["predictions"]
    wanted = {row["path"]: row["probs"] for row in cached}
    found = json.loads(run("predict", "run", data / "test", *TRUST, "--json").out)["predictions"]
    assert len(found) == 6
    for row in found:
        name = Path(row["path"]).relative_to(data).as_posix()
        np.testing.assert_allclose(row["probs"], wanted[name], atol=1e-5)
    exported = run("export", "run", "both.pt", *TRUST)
    assert exported.code == 0, exported.err
    state = torch.load(tmp_path / "both.pt", weights_only=True)
    assert {name.split(".")[0] for name in state} == {"backbones", "head"}


def test_wrong_caches_and_sizes_are_one_line_each(run: Any, data: Path, tmp_path: Path) -> None:
    for side in (32, 48):
        assert run("extract", data, f"{side}.h5", *TRUST, "--image-size", side).code == 0
    assert run("train", "32.h5", "48.h5", "run", "--hidden", "8", "--epochs", "1").code == 0
    twice = run("train", "32.h5", "32.h5", "twice")
    assert_one_line_error(twice, "each of another backbone or preprocessing", "32.h5")
    missing = run("evaluate", "run", "--cache", "48.h5")
    assert_one_line_error(missing, "2 caches", "image_size 32", "found 1 cache")
    assert run("train", "run").code == 2
    assert run("extract", data, "x.h5", *TRUST, "--image-size", "32,large").code == 2
    same = run("extract", data, "more", *TRUST, "--image-size", "32,32")
    assert_one_line_error(same, "different sizes", "32, 32")
    small = run("extract", data, "more", *TRUST, "--image-size", "32,8")
    assert_one_line_error(small, "--image-size", "found 8")
    there = run("extract", data, "32.h5", *TRUST, "--image-size", "32,48")
    assert_one_line_error(there, "a folder", "found a file")
    assert not (tmp_path / "more").exists()


def test_sizes_in_python(data: Path, tmp_path: Path, tiny_backbone: Any) -> None:
    names = [f"{NETWORK}-{side}" for side in (32, 48)]
    options: dict[str, Any] = {"backbone": NETWORK, "image_size": [32, 48]}
    assert list(plan(data, tmp_path / "sizes", **options)) == names
    assert list(extract(data, tmp_path / "sizes", say=lambda _: None, **options)) == names
    with pytest.raises(ConfigError, match=r"that of the ready backbone python:tiny.*found 32, 48"):
        extract(data, tmp_path / "more", backbone=tiny_backbone, image_size=(32, 48))
