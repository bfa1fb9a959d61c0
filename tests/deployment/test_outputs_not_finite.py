"""A run whose head gives NaN or infinity: one line in every verb, never the first class."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Result, assert_one_line_error
from sample_images import write_tree

from featcache import load_classifier, open_cache, predict, write_cache
from featcache.backbones.backbone import Backbone
from featcache.errors import RunError
from featcache.extraction.extraction import extract
from featcache.heads.run import load_run
from featcache.heads.run_writing import write_run
from featcache.heads.training import train


@pytest.fixture
def broken(tmp_path: Path, tiny_backbone: Backbone) -> Path:
    """As a stranger may write it: finite weights that are too large."""
    extract(write_tree(tmp_path / "data"), tmp_path / "c.h5", backbone=tiny_backbone)
    train(tmp_path / "c.h5", tmp_path / "good", hidden=(8,), epochs=1, device="cpu")
    good = load_run(tmp_path / "good")
    too_large = np.full_like(good.state["5.weight"], 3e38)
    state: dict[str, Any] = dict(good.state) | {"5.weight": too_large}
    (tmp_path / "run").mkdir()
    write_run(
        tmp_path / "run", head=good.head, state=state, training=good.training, seed=0, data_seed=0,
        classes=good.classes, cache=good.cache, history=[{"epoch": 1}], environment={},
    )  # fmt: skip
    return tmp_path / "run"


def test_every_verb_says_so_in_one_line(
    broken: Path, run: Callable[..., Result], tiny_backbone: Backbone
) -> None:
    place = broken.parent
    first = open_cache(place / "c.h5").splits["test"].paths[0]
    for arguments, where in (
        (["evaluate", broken], first),
        (["predict", broken, "--cache", "c.h5"], "covid"),
        (["predict", broken, "--cache", "c.h5", "--json", "--csv", "p.csv"], "covid"),
    ):
        result = run(*arguments)
        assert_one_line_error(result, "outputs of the head: expected finite numbers", where)
    assert not (place / "p.csv").exists()
    classifier = load_classifier(broken, backbone=tiny_backbone)
    with pytest.raises(RunError, match="outputs of the head"):
        classifier.predict([place / "data" / "test"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RunError, match="outputs of the head"):
            classifier.export(place / "out.pt")
    assert not list(place.glob("out.pt*"))


@pytest.mark.usefixtures("broken")
def test_features_out_of_range_of_a_good_head(tmp_path: Path) -> None:
    """Numbers that float32 holds, but that a head cannot compute with."""
    cache = open_cache(tmp_path / "c.h5")
    split = cache.splits["test"]
    features = np.array(split.features)
    features[3] = 3e38
    write_cache(
        tmp_path / "far.h5", features, split.targets, split.paths, classes=cache.classes,
        identity=cache.identity,
    )  # fmt: skip
    with pytest.raises(RunError, match="outputs of the head") as caught:
        predict(tmp_path / "good", cache=tmp_path / "far.h5")
    assert split.paths[3] in str(caught.value)
