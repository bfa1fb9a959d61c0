"""Public results: dataclasses with ``as_dict()``, and pickles that survive moves of the code."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from sample_trackers import MemoryTracker

import featcache
from featcache.backbones.backbone import Backbone

RESULTS = {
    "SplitSummary", "ExtractionSummary", "Projection", "CacheInfo", "RunInfo", "UnfinishedInfo",
    "Verification", "SelectionSummary", "Audit", "TrainSummary", "SweepSummary",
    "CrossvalSummary", "CrossvalInfo", "DecideSummary", "Evaluation", "Predictions",
    "ExplainSummary", "ReportSummary", "ExportSummary", "DeliverySummary", "ConversionSummary",
    "Neighbours", "LogSummary",
}  # fmt: skip
ERRORS = [
    name for name in featcache.__all__
    if name.endswith("Error") and name != "FeatcacheError"
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> dict[str, Any]:
    """A result of every verb, by the name of its class."""
    from sample_images import write_tree

    folder = tmp_path_factory.mktemp("results")
    tree, cache, run = write_tree(folder / "data"), folder / "c.h5", folder / "run"

    def made() -> Iterator[Any]:
        yield featcache.split(tree / "train", folder / "split.csv")
        yield featcache.plan(tree, tree.parent / "none.h5", backbone=tiny_backbone)
        yield featcache.extract(tree, cache, backbone=tiny_backbone)
        yield featcache.info(cache)
        yield featcache.verify(cache)
        yield featcache.select(cache, folder / "selected.h5")
        yield featcache.audit(cache)
        yield featcache.train(cache, run, hidden=(), epochs=2)
        yield featcache.sweep(cache, folder / "sweep", trials=2, repeats=2)
        yield featcache.crossval(cache, folder / "folds", folds=2, hidden=(), epochs=1)
        yield featcache.info(folder / "folds")
        with pytest.warns(featcache.FeatcacheWarning, match="cannot be promised"):
            yield featcache.decide(run, positive="covid", recall=0.9, prevalence=0.1)
        yield featcache.evaluate(run, positive="covid")
        yield featcache.info(run)
        yield featcache.info(Path(__file__).parent / "data" / "partial_v2")
        with pytest.warns(featcache.FeatcacheWarning, match="trained on"):
            predictions = featcache.predict(run, cache=cache)
        yield predictions
        image = tree / "test/covid/tec000_0.jpg"
        yield featcache.explain(run, image, folder / "explained", backbone=tiny_backbone)
        yield featcache.report(run)
        with patch("featcache.reporting.tracking._open_tensorboard", MemoryTracker):
            yield featcache.log(run, to="tensorboard", out=folder / "tb")
        yield featcache.export(run, folder / "out.pt", backbone=tiny_backbone)
        yield featcache.export(run, folder / "out.onnx", backbone=tiny_backbone)
        yield featcache.convert(cache, folder / "rows.npz")
        path = featcache.open_cache(cache).splits["test"].paths[0]
        yield featcache.neighbours(cache, path, k=2)

    return {type(result).__name__: result for result in made()}


def test_every_verb_gives_a_public_frozen_dataclass(results: dict[str, Any]) -> None:
    assert set(results) == RESULTS <= {*featcache.__all__}
    for result in results.values():
        assert dataclasses.is_dataclass(result)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, dataclasses.fields(result)[0].name, None)


def test_as_dict_gives_json_values(results: dict[str, Any]) -> None:
    for name, result in results.items():
        facts = result.as_dict()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts, name
        for field in dataclasses.fields(result):
            if isinstance(getattr(result, field.name), Path) and name != "ExportSummary":
                assert facts[field.name] == getattr(result, field.name).as_posix()
    assert isinstance(results["ExtractionSummary"].cache, Path)


def test_an_evaluation_is_read_by_key_too(results: dict[str, Any]) -> None:
    evaluation = results["Evaluation"]
    assert evaluation["accuracy"] == evaluation.accuracy
    assert dict(evaluation)["mistakes"] == evaluation.mistakes
    with pytest.raises(KeyError):
        evaluation["as_dict"]


def test_results_survive_pickling_under_their_public_names(results: dict[str, Any]) -> None:
    for name, result in results.items():
        data = pickle.dumps(result)
        assert b"featcache." not in data.replace(b"featcache.errors", b""), name
        again = pickle.loads(data)
        assert type(again) is type(result)
        for field in dataclasses.fields(result):
            np.testing.assert_equal(getattr(again, field.name), getattr(result, field.name))


@pytest.mark.parametrize("name", ERRORS)
def test_errors_survive_pickling_under_their_public_names(name: str) -> None:
    error = getattr(featcache, name)("x", expected="a", found=1, where=Path("/f"), hint="Do")
    data = pickle.dumps(error)
    assert b"featcache." not in data
    assert (type(pickle.loads(data)), str(pickle.loads(data))) == (type(error), str(error))


def test_public_classes_name_the_package_as_their_module() -> None:
    classes = [
        value for value in (getattr(featcache, name) for name in featcache.__all__)
        if inspect.isclass(value)
    ]  # fmt: skip
    assert len(classes) > 20
    assert {value.__module__ for value in classes} == {"featcache"}


def test_completion_shows_public_names_only_and_the_verbs_come_first() -> None:
    importlib.import_module("featcache.cli.main")
    assert dir(featcache) == sorted([*featcache.__all__, "__version__"])
    assert featcache.__all__[:3] == ["split", "extract", "plan"]


def test_what_a_notebook_shows_of_a_result_is_short(
    results: dict[str, Any], tiny_backbone: Backbone
) -> None:
    path = results["CacheInfo"].path
    cache = featcache.open_cache(path)
    run = featcache.load_run(results["TrainSummary"].run)
    classifier = featcache.load_classifier(run.path, backbone=tiny_backbone)
    shown = [*results.values(), cache, cache.splits["train"], run, classifier, tiny_backbone]
    for value in shown:
        text = repr(value)
        assert text.startswith(type(value).__name__ + "("), text
        assert len(text) < 1200, text
        assert "\n" not in text
    assert "24 train" in repr(cache)
    assert "covid, normal" in repr(run)


def test_a_repr_is_as_short_for_many_classes_and_rows() -> None:
    names = tuple(f"a class of a long name, number {i}" for i in range(3000))
    value = featcache.Predictions(names, names * 3, np.ones((9000, 3000)), (("a", "b"),) * 500)
    assert len(repr(value)) < 600
    assert "<float64 (9000, 3000)>" in repr(value)
