"""A head on caches side by side is the head on one cache of all their features, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_sides import images, write_side

from featcache.cache.reading import Failure
from featcache.deployment.predictions import predict
from featcache.errors import CacheError, FeatcacheWarning, RunError
from featcache.evaluation.evaluation import evaluate
from featcache.evaluation.info import info
from featcache.files import json_sha256
from featcache.heads import rows as rows_module
from featcache.heads.run import load_run
from featcache.heads.training import train
from featcache.sweeps.crossval import crossval
from featcache.sweeps.sweeping import sweep

SMALL: dict[str, Any] = {
    "hidden": (8,), "epochs": 3, "device": "cpu", "learning_rate": 0.02, "say": lambda _: None
}  # fmt: skip


def labels() -> dict[str, list[dict[str, Any]]]:
    """Two labels an image; of every fifth the second is unknown."""
    made = images()
    for rows in made.values():
        for i, row in enumerate(rows):
            row["target"] = [float(row["target"]), np.nan if i % 5 == 0 else float(i % 3 == 0)]
    return made


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.h5 and b.h5 of the same images, and both.h5 with the features of both."""
    folder = tmp_path_factory.mktemp("sides")
    for kind, change in {
        "": {}, "views": {"views": 3}, "labels": {"rows": labels(), "task": "multilabel"}
    }.items():  # fmt: skip
        options: dict[str, Any] = change
        write_side(folder / f"a{kind}.h5", 6, **options)
        write_side(folder / f"b{kind}.h5", 10, seed=1, **options)
        write_side(folder / f"both{kind}.h5", [6, 10], identity={"backbone": "both"}, **options)
    return folder


@pytest.fixture(scope="module")
def run(sides: Path) -> Path:
    train([sides / "a.h5", sides / "b.h5"], sides / "run", **SMALL)
    return sides / "run"


@pytest.mark.parametrize("kind", ["", "views", "labels"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_head_equals_that_of_one_cache_with_all_features(
    sides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, streamed: bool
) -> None:
    if streamed:
        monkeypatch.setattr(rows_module, "available_memory", lambda *_: 1)
    several = [sides / f"a{kind}.h5", sides / f"b{kind}.h5"]
    options = SMALL | {"valid_fraction": 0.3}
    one = train(several, tmp_path / "one", **options)
    other = train(sides / f"both{kind}.h5", tmp_path / "other", **options)
    assert one.weights_sha256 == other.weights_sha256
    assert one.linear_probe == other.linear_probe
    found, wanted = (
        evaluate(tmp_path / name, say=lambda _: None).as_dict() | {"fingerprint": ""}
        for name in ("one", "other")
    )
    assert found == wanted


def test_lbfgs_sweep_and_crossval_equal_those_of_one_cache_too(sides: Path, tmp_path: Path) -> None:
    several, both = [sides / "a.h5", sides / "b.h5"], sides / "both.h5"
    linear = {"hidden": (), "optimizer": "lbfgs", "say": lambda _: None}
    results: list[list[Any]] = []
    for cache in (several, both):
        place = tmp_path / str(len(results))
        results.append([
            train(cache, place / "run", **linear).weights_sha256,
            sweep(cache, place / "best", trials=2, repeats=2, say=lambda _: None).weights_sha256,
            crossval(cache, place / "folds", folds=2, **SMALL).predictions_sha256,
        ])  # fmt: skip
    assert results[0] == results[1]
    facts = json.loads((tmp_path / "0" / "folds" / "crossval.json").read_text())
    assert [Path(cache["path"]).name for cache in facts["caches"]] == ["a.h5", "b.h5"]
    assert facts["cache"] == facts["caches"][0]
    assert info(tmp_path / "0" / "folds").as_dict()["caches"] == facts["caches"]
    assert "caches" not in info(tmp_path / "1" / "folds").as_dict()
    facts = json.loads((tmp_path / "1" / "folds" / "crossval.json").read_text())
    assert "caches" not in facts


def test_a_run_names_all_caches_and_an_earlier_featcache_refuses_it(sides: Path, run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    assert facts["format_version"] == 3  # an earlier one: "expected format version 1, found 3"
    assert [cache["path"] for cache in facts["caches"]] == ["../a.h5", "../b.h5"]
    assert [cache["num_features"] for cache in facts["caches"]] == [6, 10]
    assert facts["cache"] | {"num_features": 6} == facts["caches"][0]
    loaded = load_run(run)
    assert loaded.cache["identity"]["backbone"] == "b0"
    assert [cache["identity"]["backbone"] for cache in loaded.caches] == ["b0", "b1"]
    assert "16 features of b0 + b1" in repr(loaded)
    assert [cache["path"] for cache in info(run).as_dict()["caches"]] == ["../a.h5", "../b.h5"]
    train([sides / "a.h5"], sides / "alone", **SMALL)
    train(sides / "a.h5", sides / "alone2", **SMALL)
    texts = [(sides / name / "run.json").read_bytes() for name in ("alone", "alone2")]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["format_version"] == 1
    assert "caches" not in json.loads(texts[0])
    assert "caches" not in info(sides / "alone").as_dict()


def test_other_images_compare_a_run_of_one_cache_with_one_of_several(
    sides: Path, run: Path, tmp_path: Path
) -> None:
    train(sides / "b.h5", tmp_path / "alone", **SMALL)
    train([sides / "b.h5", sides / "a.h5"], tmp_path / "turned", **SMALL)
    others = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for seed, (other, width) in enumerate(zip(others, (6, 10), strict=True)):
        write_side(other, width, seed=seed, rows=images({"test": 50}))
    for second, caches in (("alone", others[1]), ("turned", others)):
        found = evaluate(run, cache=others, against=tmp_path / second, say=lambda _: None)
        wanted = evaluate(tmp_path / second, cache=caches, say=lambda _: None)
        assert found.against is not None
        assert found.against["num_samples"] == 50
        assert found.against["accuracy"]["second"] == wanted.accuracy
        assert found.against["roc_auc"]["second"] == pytest.approx(wanted.roc_auc)
    with pytest.raises(RunError, match="--against: expected the same 50 images"):
        evaluate(tmp_path / "alone", cache=others[1], against=run, say=lambda _: None)


def test_caches_are_taken_in_any_order_and_are_known_as_its_own(sides: Path, run: Path) -> None:
    wanted = evaluate(run, say=lambda _: None)
    (run / "evaluation" / "test.json").unlink()
    assert evaluate(run, cache=[sides / "b.h5", sides / "a.h5"], say=lambda _: None) == wanted
    assert (run / "evaluation" / "test.json").exists()  # of its own caches
    with pytest.warns(FeatcacheWarning, match="trained on 60 and was chosen by 24 of the 114"):
        found = [predict(run, cache=[sides / n for n in pair]) for pair in (ORDER, ORDER[::-1])]
    np.testing.assert_array_equal(found[0].probs, found[1].probs)
    assert found[0].paths == found[1].paths
    (run / "rows.bin").rename(run / "kept")
    try:  # an older run: its rows are chosen again from its caches
        with pytest.warns(FeatcacheWarning, match="trained on 60 and was chosen by 24 of the 114"):
            predict(run, cache=[sides / "b.h5", sides / "a.h5"])
    finally:
        (run / "kept").rename(run / "rows.bin")


ORDER = ["a.h5", "b.h5"]


@pytest.mark.parametrize(
    ("caches", "said"),
    [
        (
            ["a.h5"],
            "--cache: expected 2 caches, .*: b0 image_size 32 and b1 image_size 48, found 1",
        ),
        (["a.h5", "b.h5", "both.h5"], "--cache: expected 2 caches.*found 3 caches"),
        (["a.h5", "both.h5"], "expected those the head was trained on, b1 image_size 48, found ot"),
        (["a.h5", "a.h5"], "those the head was trained on, b1 image_size 48, found others in a.h5"),
        (["a.h5", "wide.h5"], r"features: expected 10 per image, as trained on, found 11 \(.*wide"),
        (["a.h5", "few.h5"], "split train, train/059.png: expected the same image in each cache"),
    ],
)
def test_other_caches_than_a_run_has_are_refused(
    sides: Path, run: Path, caches: list[str], said: str
) -> None:
    write_side(sides / "wide.h5", 11, seed=1)
    write_side(sides / "few.h5", 10, seed=1, rows=images({"train": 59, "valid": 24, "test": 30}))
    for verb in (evaluate, predict):
        with pytest.raises((RunError, CacheError), match=said):
            verb(run, cache=[sides / name for name in caches])


def test_a_run_of_one_cache_takes_no_second(sides: Path, tmp_path: Path) -> None:
    train(sides / "a.h5", tmp_path / "alone", **SMALL)
    with pytest.raises(RunError, match=r"--cache: expected 1 cache.*: b0, found 2 caches"):
        evaluate(tmp_path / "alone", cache=[sides / "a.h5", sides / "b.h5"])


def test_a_second_cache_that_is_gone_rebuilt_or_changed_is_told(
    sides: Path, tmp_path: Path
) -> None:
    for name in ORDER:
        shutil.copy(sides / name, tmp_path / name)
    train(tmp_path, tmp_path / "run", **SMALL)  # the folder's caches
    assert len(load_run(tmp_path / "run").caches) == 2
    write_side(tmp_path / "b.h5", 10, seed=1, identity={"image_size": 64})
    with pytest.raises(RunError, match="rebuilt since the training: expected image_size 48, found"):
        evaluate(tmp_path / "run")
    failed = Failure("x.png", "test", 0, "cut off", 1, 1)  # one more image could not be read
    write_side(tmp_path / "b.h5", 10, seed=1, failures=[failed])
    with pytest.warns(FeatcacheWarning, match=r"b\.h5 has changed since the training"):
        assert evaluate(tmp_path / "run").num_failed == 1
    (tmp_path / "b.h5").unlink()
    with pytest.raises(RunError, match=r"the run's cache.*no such file \(.*b\.h5"):
        evaluate(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"caches": None}, "run, caches: expected two or more, found None"),
        ({"caches": [{}, {}]}, r"run, caches\.0\.path"),
        ({"num_features": 7}, "run, caches: expected 16 features together, found 17"),
        ({"num_features": -1}, r"caches\.0\.num_features: expected a whole number"),
        ({"fingerprint": "0" * 64}, "run, caches: expected the cache first, found another"),
        ({"format_version": 2}, "run, members: expected a JSON object for each"),
        ({"format_version": 1}, "run, caches: expected format version 3, found version 1"),
    ],
)
def test_a_damaged_list_of_caches_is_refused(
    run: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    facts = json.loads(file.read_text())
    if change.keys() & {"caches", "format_version"}:
        facts |= change
    else:
        facts["caches"][0] |= change
    file.write_text(json.dumps(facts | {"sha256": json_sha256(facts, without="sha256")}))
    with pytest.raises(RunError, match=said):
        load_run(tmp_path / "run")


def test_caches_that_do_not_fit_lose_nothing(sides: Path, run: Path, tmp_path: Path) -> None:
    rows = images()
    rows["train"][5]["target"] = 0
    write_side(tmp_path / "c.h5", 4, seed=2, rows=rows)
    before = (run / "run.json").read_bytes()
    for verb in (train, crossval):
        with pytest.raises(CacheError, match=r"target of train/005\.png: expected normal"):
            verb([sides / "a.h5", tmp_path / "c.h5"], tmp_path / "new", say=lambda _: None)
    with pytest.raises(CacheError, match=r"target of train/005\.png: expected normal"):
        sweep([sides / "a.h5", tmp_path / "c.h5"], tmp_path / "new", trials=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5"]
    with pytest.raises(CacheError):
        train([sides / "a.h5", tmp_path / "c.h5"], run, overwrite=True, say=lambda _: None)
    assert (run / "run.json").read_bytes() == before
