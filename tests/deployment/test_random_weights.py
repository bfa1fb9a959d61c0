"""Caches of ``--weights random``: the seed is known, so their images can still be classified."""

from __future__ import annotations

import functools
import json
import shutil
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from sample_images import write_tree

import featcache
from featcache.errors import BackboneError
from featcache.files import json_sha256

ALL = ("torchvision:resnet18", "efficientnet-lite0")  # to be downloaded, and at hand


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a folder with images, a cache and a run of a backbone; each is made once."""

    @functools.cache
    def make(backbone: str) -> Path:
        folder = tmp_path_factory.mktemp("made")
        write_tree(folder / "raw", {"train": 4, "valid": 2, "test": 2})
        options = {"backbone": backbone, "image_size": 32, "weights": "random"}
        featcache.extract(folder / "raw", folder / "c.h5", engine="eager", **options)
        featcache.train(folder / "c.h5", folder / "run", hidden=(), epochs=2, device="cpu")
        return folder

    return make


@pytest.fixture(params=ALL)
def run(request: pytest.FixtureRequest, tmp_path: Path, made: Callable[[str], Path]) -> Path:
    """A copy of a run, beside copies of its cache and images."""
    shutil.copytree(made(request.param), tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def edit(run: Path, **cache: Any) -> None:
    """Change the facts of the cache in a run, as if it had been written so."""
    facts = json.loads((run / "run.json").read_text())
    facts["cache"] = {k: v for k, v in (facts["cache"] | cache).items() if v is not None}
    facts["sha256"] = json_sha256(facts, without="sha256")
    (run / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("run", "is_told"),
    [(ALL[0], True), (ALL[0], False), (ALL[1], False)],
    indirect=["run"], ids=["new", "old", "old, with its library's own weights at hand"],
)  # fmt: skip
def test_a_run_on_random_weights_predicts_exports_and_is_verified(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_told: bool
) -> None:
    def download(*_: Any, **__: Any) -> NoReturn:
        assert not is_told, "nothing has to be downloaded"
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    if not is_told:  # as runs were before
        edit(run, weights_source=None)
    with pytest.warns(featcache.FeatcacheWarning, match="was trained on"):
        cached = featcache.predict(run, cache=tmp_path / "c.h5")
    images = featcache.predict(run, [tmp_path / "raw" / path for path in cached.paths])
    np.testing.assert_allclose(images.probs, cached.probs, atol=1e-4)
    summary = featcache.export(run, tmp_path / "x.pt")
    assert summary.path.is_file()
    if is_told:
        found = featcache.verify(tmp_path / "c.h5", data=tmp_path / "raw", samples=4)
        assert found.num_compared == 4


@pytest.mark.parametrize("run", ALL[1:], indirect=True)
def test_other_weights_are_still_refused_by_their_hash(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    identity = facts["cache"]["identity"] | {"weights_sha256": "ab" * 32}
    for source in ("random (seed 0)", None):
        edit(run, identity=identity, weights_source=source)
        with pytest.raises(BackboneError, match="ab" * 32):
            featcache.load_classifier(run)
