from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_rows import CLASSES, array_of, edited, make_cache, rows_of

from featcache.cache.reading import Failure, open_cache
from featcache.cache.writing import SplitRows
from featcache.errors import CacheError, ConfigError, FeatcacheWarning, RunError
from featcache.evaluation.seen_rows import find_all_seen
from featcache.heads.config import TrainingConfig
from featcache.heads.fit import fit_head
from featcache.heads.head import HeadConfig
from featcache.heads.rows import choose_rows
from featcache.heads.run import load_run
from featcache.heads.run_caches import cache_paths
from featcache.heads.training import train
from featcache.runtime import CPU

SMALL: dict[str, Any] = {"hidden": (8,), "epochs": 3, "device": "cpu", "learning_rate": 0.01}
NAMING = "this cache was never audited"  # a line with the cache's whole path


def no_leftovers(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def test_run_holds_the_head_that_fit_head_gives(tmp_path: Path) -> None:
    failures = [Failure("train/x.png", "train", 0, "cut short", 5, 5)]
    cache = make_cache(tmp_path / "c.h5", failures=failures)
    summary = train(cache.path, tmp_path / "runs" / "r", seed=3, data_seed=4, **SMALL)
    config = TrainingConfig(epochs=3, learning_rate=0.01)
    train_rows, valid_rows = cache.split("train"), cache.split("valid")
    wanted = fit_head(
        HeadConfig(10, 2, hidden=(8,)), config, train_rows.features, train_rows.targets,
        valid_rows.features, valid_rows.targets, seed=3, data_seed=4, device=CPU,
        classes=CLASSES,
    )  # fmt: skip
    run = load_run(tmp_path / "runs" / "r")
    assert all(np.array_equal(run.state[name], wanted.state[name]) for name in wanted.state)
    assert (run.classes, run.seed, run.data_seed) == (CLASSES, 3, 4)
    assert run.training["batch_size"] == 32
    assert run.training["best_epoch"] == wanted.best_epoch == summary.best_epoch
    assert run.cache == {
        "path": "../../c.h5", "fingerprint": cache.fingerprint, "identity": cache.identity,
        "payload_sha256": cache.payload_sha256, "num_failed": 1,
    }  # fmt: skip
    assert cache_paths(run) == [cache.path.resolve()]
    with (tmp_path / "runs" / "r" / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    assert [row["valid_loss"] for row in history] == [str(r["valid_loss"]) for r in wanted.history]
    facts = json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())
    assert facts["device"] == "cpu"
    assert no_leftovers(tmp_path / "runs", "r")


def test_failed_images_of_the_cache_are_repeated(tmp_path: Path) -> None:
    failures = [
        Failure("train/x.png", "train", 0, "cut short", 5, 5),
        Failure("train/y.png", "train", 0, "cut short", 5, 5),
        Failure("valid/z.png", "valid", -1, "empty", 0, 5),
    ]
    cache = make_cache(tmp_path / "c.h5", failures=failures)
    said: list[str] = []
    summary = train(cache.path, tmp_path / "r", say=said.append, **SMALL)
    assert summary.num_failed == summary.as_dict()["num_failed"] == 3
    wanted = f"not in this cache: 3 failed images (2 of train/{CLASSES[0]}, 1 of valid)"
    assert [line for line in said if line.startswith("not in")] == [f"{wanted}; see featcache info"]
    none = make_cache(tmp_path / "d.h5")
    said.clear()
    assert train(none.path, tmp_path / "s", say=said.append, **SMALL).num_failed == 0
    assert not any(line.startswith("not in this cache") for line in said)


def test_summary_is_json_and_counts(tmp_path: Path) -> None:
    splits = {"train": [0, 1] * 20 + [-1] * 3, "valid": [0] * 5 + [-1]}
    cache = make_cache(tmp_path / "c.h5", **splits)
    summary = train(str(cache.path), str(tmp_path / "r"), **SMALL)
    facts = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert (facts["num_train"], facts["num_valid"], facts["num_unlabelled"]) == (40, 5, 4)
    assert facts["run"] == (tmp_path / "r").as_posix()
    assert facts["valid_recall"]["normal"] is None
    assert facts["weights_sha256"] == load_run(tmp_path / "r").weights_sha256


def test_repeatable_and_data_seed_follows_seed(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c.h5").path
    runs = {
        name: train(path, tmp_path / name, **SMALL, **seeds).weights_sha256
        for name, seeds in {
            "a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 1, "data_seed": 1},
            "d": {"seed": 2, "data_seed": 1}, "e": {"seed": 1, "data_seed": 2},
        }.items()
    }  # fmt: skip
    assert runs["a"] == runs["b"] == runs["c"]
    assert len(set(runs.values())) == 3


def test_unlabelled_rows_are_as_good_as_absent(tmp_path: Path) -> None:
    rows = rows_of("train", [0, 1] * 20)
    mixed = rows_of("train", np.full(41, -1))
    features = array_of(mixed)
    features[1:] = array_of(rows)
    unlabelled = edited(mixed, features=features, targets=np.array([-1] + [0, 1] * 20))
    make_cache(tmp_path / "a.h5", train=rows, valid=[0, 1] * 5)
    make_cache(tmp_path / "b.h5", train=unlabelled, valid=[0, 1] * 5)
    said: list[str] = []
    a = train(tmp_path / "a.h5", tmp_path / "a", **SMALL)
    b = train(tmp_path / "b.h5", tmp_path / "b", say=said.append, **SMALL)
    assert a.weights_sha256 == b.weights_sha256
    assert any(line.split() == ["(unlabelled,", "left", "out)", "1", "0"] for line in said)


def test_float16_features_train_as_float32(tmp_path: Path) -> None:
    half = {k: rows_of(k, [0, 1] * 20, dtype="<f2") for k in ("train", "valid")}
    make_cache(tmp_path / "half.h5", **half)
    single = {
        k: edited(v, features=array_of(v).astype("<f4"), dtype=np.dtype("<f4"))
        for k, v in half.items()
    }
    make_cache(tmp_path / "single.h5", **single)
    runs = [train(tmp_path / f"{n}.h5", tmp_path / n, **SMALL) for n in ("half", "single")]
    assert runs[0].weights_sha256 == runs[1].weights_sha256


def test_the_test_split_does_not_matter(tmp_path: Path) -> None:
    broken = edited(rows_of("test", [0, 1]), features=np.full((2, 10), np.nan, "<f4"))
    make_cache(tmp_path / "a.h5", train=[0, 1] * 20, valid=[0, 1] * 5, test=broken)
    make_cache(tmp_path / "b.h5", train=[0, 1] * 20, valid=[0, 1] * 5)
    said: list[str] = []
    a = train(tmp_path / "a.h5", tmp_path / "a", say=said.append, **SMALL)
    assert a.weights_sha256 == train(tmp_path / "b.h5", tmp_path / "b", **SMALL).weights_sha256
    assert "test is not touched: 2 rows" in said


def test_lines_say_counts_epochs_and_the_kept_one(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c.h5", train=[0] * 7 + [1] * 36, valid=[0] * 3 + [1] * 9).path
    said: list[str] = []
    summary = train(path, tmp_path / "r", say=said.append, **(SMALL | {"epochs": 5}))
    words = [line.split() for line in said]
    assert ["class", "train", "valid"] in words
    assert ["covid", "7", "3"] in words
    assert ["normal", "36", "9"] in words
    assert ["total", "43", "12"] in words
    assert any("--class-weights balanced" in line and "5.1 times" in line for line in said)
    epochs = [line for line in said if line[:5].strip().isdigit()]
    assert len(epochs) == 5
    assert len({len(line.removesuffix("  *")) for line in epochs}) == 1  # aligned
    marked = [int(line[:5]) for line in epochs if line.endswith("  *")]
    assert marked[-1] == summary.best_epoch
    assert said[-3].startswith(f"kept epoch {summary.best_epoch}: valid loss")
    assert said[-2].startswith("beside it, a linear probe: valid loss ")
    assert " s on cpu, written to " in said[-1]
    assert max(len(line) for line in said[:-1] if not line.startswith(("hint", NAMING))) <= 80


def test_no_hint_within_one_to_five_or_when_balanced(tmp_path: Path) -> None:
    for name, counts, options in (
        ("a", (8, 40), {}), ("b", (7, 40), {"class_weights": "balanced"}),
    ):  # fmt: skip
        targets = [0] * counts[0] + [1] * counts[1]
        make_cache(tmp_path / f"{name}.h5", train=targets, valid=[0, 1] * 5)
        said: list[str] = []
        train(tmp_path / f"{name}.h5", tmp_path / name, say=said.append, **SMALL, **options)
        assert not any("hint:" in line for line in said)


@pytest.mark.parametrize("num_classes", [2, 4, 6, 9])
def test_lines_fit_a_terminal_whatever_the_classes(tmp_path: Path, num_classes: int) -> None:
    classes = [f"\x1b[31m a class with a long name {i}" for i in range(num_classes)]
    targets = list(range(num_classes)) * 6
    make_cache(tmp_path / "c.h5", classes=classes, train=targets, valid=targets)
    said: list[str] = []
    train(tmp_path / "c.h5", tmp_path / "r", say=said.append, **SMALL)
    assert max(len(line) for line in said[:-1] if not line.startswith(NAMING)) <= 100
    assert "\x1b" not in "".join(said)


@pytest.mark.parametrize(
    ("splits", "options", "wanted"),
    [
        ({"train": [0, 1] * 5}, {}, "split valid: .*found only train .*--valid-fraction"),
        ({"all": [0, 1] * 5}, {}, "split valid: .*found only all .*--valid-fraction"),
        ({"test": [0, 1] * 5}, {"valid_fraction": 0.2}, "split train: .*found only test"),
        ({"train": [0] * 5, "valid": [0, 1]}, {}, "split train: .*found 0 of normal"),
        ({"train": [0, 1] * 5, "valid": [-1, -1]}, {}, "split valid: .*found none"),
        ({"train": [0, 0, 0, 1]}, {"valid_fraction": 0.5}, "at least 2 .*found 1 of normal"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, splits: Any, options: Any, wanted: str
) -> None:
    make_cache(tmp_path / "c.h5", **splits)
    with pytest.raises(CacheError, match=wanted):
        train(tmp_path / "c.h5", tmp_path / "r", **SMALL, **options)
    assert no_leftovers(tmp_path, "c.h5")


def test_one_class_or_none_is_refused(tmp_path: Path) -> None:
    for classes, targets, found in ((["covid"], [0, 0], "covid"), ([], [-1, -1], "none")):
        make_cache(tmp_path / "c.h5", classes=classes, train=targets, valid=targets)
        with pytest.raises(CacheError, match=f"classes: expected two or more, found {found}"):
            train(tmp_path / "c.h5", tmp_path / "r", **SMALL)


# --- views


def with_views(name: str, targets: Any, num_views: int = 4) -> SplitRows:
    """Rows whose view 0 is that of ``rows_of``, and whose other views are quite different."""
    rows = rows_of(name, targets)
    plain = array_of(rows)
    others = np.random.default_rng(9).normal(size=(len(plain), num_views - 1, 10)).astype("<f4")
    return edited(rows, features=np.concatenate([plain[:, None], others], axis=1))


def test_views_of_train_are_drawn_and_valid_is_seen_as_it_is(tmp_path: Path) -> None:
    train_rows, lines = with_views("train", [0, 1] * 20), []
    cache = make_cache(
        tmp_path / "c.h5", train=train_rows, valid=[0, 1] * 8, test=[0, 1],
        identity={"backbone": "fake", "views": 4, "augmentation": "xray"},
    )  # fmt: skip
    summary = train(cache.path, tmp_path / "r", seed=3, say=lines.append, **SMALL)
    valid = cache.split("valid")
    wanted = fit_head(
        HeadConfig(10, 2, hidden=(8,)), TrainingConfig(epochs=3, learning_rate=0.01),
        array_of(train_rows), train_rows.targets, valid.features, valid.targets, seed=3,
        data_seed=3, device=CPU,
    )  # fmt: skip
    state = load_run(tmp_path / "r").state
    assert all(np.array_equal(state[name], wanted.state[name]) for name in state)
    assert summary.num_views == summary.as_dict()["num_views"] == 4
    assert "views: 4 of each training image (xray), each epoch draws one of them" in lines


def test_a_held_out_part_of_rows_with_views_is_seen_as_it_is(tmp_path: Path) -> None:
    rows = with_views("all", [0, 1] * 40)
    cache = make_cache(tmp_path / "c.h5", all=rows)
    train_part, valid_part = choose_rows(cache, 0.3, 0, lambda _: None)
    assert np.array_equal(train_part.features.load(), array_of(rows)[train_part.rows])
    assert np.array_equal(valid_part.features.load(), array_of(rows)[valid_part.rows, 0])
    summary = train(cache.path, tmp_path / "r", valid_fraction=0.3, **SMALL)
    assert (summary.num_views, summary.num_train) == (4, len(train_part.rows))


def test_a_bad_view_is_named_by_its_row(tmp_path: Path) -> None:
    rows = with_views("train", [0, 1] * 20)
    features = array_of(rows)
    features[7, 3, 2] = np.nan
    make_cache(tmp_path / "c.h5", train=edited(rows, features=features), valid=[0, 1] * 8)
    with pytest.raises(CacheError, match=r"NaN or infinity in row 7, train/0007\.png"):
        train(tmp_path / "c.h5", tmp_path / "r", **SMALL)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(tmp_path: Path, split: str, value: float) -> None:
    splits = {k: rows_of(k, [-1, 0, 1] * 5) for k in ("train", "valid")}
    features = array_of(splits[split])
    features[[7, 9], 2] = value
    splits[split] = edited(splits[split], features=features)
    make_cache(tmp_path / "c.h5", **splits)
    wanted = f"features of split {split}: expected finite .* in row 7, {split}/0007.png"
    with pytest.raises(CacheError, match=wanted):
        train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    assert no_leftovers(tmp_path, "c.h5")


def test_the_same_image_in_two_splits_is_warned_of_once(tmp_path: Path) -> None:
    train_rows, test_rows = rows_of("train", [0, 1] * 9), rows_of("test", [0, 1] * 4)
    test_rows.image_sha256[[2, 5]] = train_rows.image_sha256[[3, 4]]
    train_rows.image_sha256[7] = train_rows.image_sha256[8]  # within one split: no leak
    train_rows.image_sha256[0] = test_rows.image_sha256[0] = 0  # unknown: no match
    make_cache(tmp_path / "c.h5", train=train_rows, valid=[0, 1] * 4, test=test_rows)
    with pytest.warns(FeatcacheWarning) as caught:
        train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    assert [str(w.message) for w in caught] == [
        (
            "in more than one split: 2 images, for example train: train/0003.png and "
            "test: test/0002.png; results will look better than they are"
        )
    ]
    assert caught[0].filename == __file__


def test_a_group_in_two_splits_is_warned_of(tmp_path: Path) -> None:
    groups = {"train": [f"p{i // 2}" for i in range(18)], "valid": [f"p{i}" for i in range(8, 16)]}
    groups["train"][0] = groups["valid"][-1] = ""  # no group is no group in common
    splits = {k: edited(rows_of(k, [0, 1] * (len(g) // 2)), groups=g) for k, g in groups.items()}
    make_cache(tmp_path / "c.h5", **splits)
    with pytest.warns(
        FeatcacheWarning,
        match="in more than one split: 1 group, .* train: train/0016.png and valid",
    ):
        train(tmp_path / "c.h5", tmp_path / "r", **SMALL)


def held_out(tmp_path: Path, rows: SplitRows, split: str = "train", **options: Any) -> Any:
    """Return the rows (n,) that a training held out, found by watching what fit_head is given."""
    given: dict[str, Any] = {}

    def watch(*arrays: Any, **keywords: Any) -> Any:
        given["features"] = arrays[4]
        return fit_head(*arrays, **keywords)

    make_cache(tmp_path / "c.h5", classes=options.pop("classes", CLASSES), **{split: rows})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.training.fit_head", watch)
        train(tmp_path / "c.h5", tmp_path / "r", overwrite=True, **SMALL, **options)
    known = {row.tobytes(): i for i, row in enumerate(array_of(rows))}
    return np.array([known[row.tobytes()] for row in given["features"]])


def test_numpy_scalars_train_the_same_head(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c.h5").path
    options: dict[str, Any] = {"hidden": (4,), "epochs": 2, "seed": 3, "learning_rate": 0.5}
    plain = train(path, tmp_path / "a", device="cpu", **options)
    options = {name: np.array(value)[()] for name, value in options.items()}
    numpy = train(path, tmp_path / "b", device="cpu", **options)
    assert plain.weights_sha256 == numpy.weights_sha256
    a, b = ((tmp_path / name / "run.json").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("split", ["train", "all"])
def test_hold_out_is_stratified_and_seeded(tmp_path: Path, split: str) -> None:
    targets = np.array([0] * 40 + [1] * 15 + [2] * 5 + [-1] * 6)
    rows = rows_of(split, targets)
    said: list[str] = []
    options: dict[str, Any] = {"valid_fraction": 0.2, "classes": ["a", "b", "c"], "split": split}
    first = held_out(tmp_path, rows, seed=1, say=said.append, **options)
    assert np.bincount(targets[first]).tolist() == [8, 3, 1]
    assert sum("no groups" in line for line in said) == 1
    assert np.array_equal(first, held_out(tmp_path, rows, seed=1, **options))
    assert np.array_equal(first, held_out(tmp_path, rows, seed=2, data_seed=1, **options))
    assert not np.array_equal(first, held_out(tmp_path, rows, seed=2, **options))
    assert load_run(tmp_path / "r").training["valid_fraction"] == 0.2


def test_hold_out_keeps_groups_and_identical_images_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(6):
        patients = rng.integers(0, 30, 120)
        targets = np.where(patients < 20, 0, 1)
        targets[patients == 5] = rng.integers(0, 2, (patients == 5).sum())  # of both classes
        rows = edited(rows_of("train", targets, seed=seed), groups=[f"p{p}" for p in patients])
        twin = np.flatnonzero(patients == 7)[0], np.flatnonzero(patients == 11)[0]
        rows.image_sha256[twin[0]] = rows.image_sha256[twin[1]]
        said: list[str] = []
        chosen = held_out(tmp_path, rows, valid_fraction=0.25, seed=seed, say=said.append)
        kept = np.setdiff1d(np.arange(120), chosen)
        assert not set(patients[chosen]) & set(patients[kept])
        assert ({7, 11} <= set(patients[chosen])) or not ({7, 11} & set(patients[chosen]))
        shares = np.bincount(targets[chosen]) / np.bincount(targets)
        assert shares == pytest.approx([0.25, 0.25], abs=0.12)
        assert not any("no groups" in line for line in said)


def test_a_hold_out_beside_valid_leaves_valid_fresh(tmp_path: Path) -> None:
    """The run is that of the same cache without ``valid``, whatever ``valid`` holds."""
    rows = rows_of("train", [0, 1] * 30)
    make_cache(tmp_path / "alone.h5", train=rows)
    said: list[str] = []
    made = []
    for name, valid in (("a", [0, 1] * 8), ("b", [1] * 5)):
        cache = make_cache(tmp_path / f"{name}.h5", train=rows, valid=valid)
        made.append(
            train(cache.path, tmp_path / name, valid_fraction=0.2, say=said.append, **SMALL)
        )
        seen = find_all_seen(load_run(tmp_path / name), cache)
        assert seen is not None
        assert seen.counts == (48, 12, 0)
        assert not seen.any[60:].any()
    alone = train(tmp_path / "alone.h5", tmp_path / "alone", valid_fraction=0.2, **SMALL)
    assert {s.weights_sha256 for s in (*made, alone)} == {alone.weights_sha256}
    wanted = "split valid is not touched: 16 rows; the hold-out below is of train"
    assert [line for line in said if "16 rows" in line] == [wanted]


def test_hold_out_reaches_every_class_or_says_that_it_cannot(tmp_path: Path) -> None:
    targets = [0] * 8 + [1] * 20
    groups = [f"big{i // 4}" for i in range(8)] + [f"p{i}" for i in range(20)]
    chosen = held_out(
        tmp_path, edited(rows_of("train", targets), groups=groups), valid_fraction=0.1
    )
    assert np.bincount(np.array(targets)[chosen]).tolist() == [4, 2]
    one_patient = edited(rows_of("train", targets), groups=["p"] * 8 + groups[8:])
    make_cache(tmp_path / "c.h5", train=one_patient)
    with pytest.raises(CacheError, match="expected class covid on both sides"):
        train(tmp_path / "c.h5", tmp_path / "r2", valid_fraction=0.3, **SMALL)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"valid_fraction": 0.0}, "--valid-fraction"), ({"valid_fraction": 1}, "--valid-fraction"),
        ({"seed": -1}, "--seed"), ({"data_seed": 1.5}, "--data-seed"),
        ({"dropout": 2}, "--dropout"), ({"hidden": (0,)}, "--hidden"),
        ({"optimizer": "lion"}, "--optimizer"),
        ({"device": "tpu"}, "--device"), ({"epochs": 0}, "--epochs"),
    ],
)  # fmt: skip
def test_options_without_meaning_are_refused(tmp_path: Path, options: Any, wanted: str) -> None:
    make_cache(tmp_path / "c.h5")
    with pytest.raises(ConfigError, match=wanted):
        train(tmp_path / "c.h5", tmp_path / "r", **(SMALL | options))
    assert no_leftovers(tmp_path, "c.h5")


def test_an_existing_run_is_refused_before_any_work_and_kept_if_the_new_one_fails(
    tmp_path: Path,
) -> None:
    make_cache(tmp_path / "c.h5")
    first = train(tmp_path / "c.h5", tmp_path / "r", **SMALL)
    with pytest.raises(RunError, match="--overwrite"):
        train(tmp_path / "no such cache.h5", tmp_path / "r", **SMALL)
    with pytest.raises(ConfigError, match="finite loss"):
        train(
            tmp_path / "c.h5", tmp_path / "r", overwrite=True,
            **(SMALL | {"optimizer": "sgd", "learning_rate": 1e38, "epochs": 50}),
        )  # fmt: skip
    assert load_run(tmp_path / "r").weights_sha256 == first.weights_sha256
    again = train(tmp_path / "c.h5", tmp_path / "r", overwrite=True, **(SMALL | {"seed": 9}))
    assert load_run(tmp_path / "r").weights_sha256 == again.weights_sha256 != first.weights_sha256
    assert no_leftovers(tmp_path, "c.h5", "r")


def test_a_missing_or_damaged_cache_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no such file"):
        train(tmp_path / "none.h5", tmp_path / "r", **SMALL)
    path = make_cache(tmp_path / "c.h5").path
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="payload sha256"):
        train(path, tmp_path / "r", **SMALL)
    assert no_leftovers(tmp_path, "c.h5")


def test_no_warning_on_a_clean_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(cache.path, tmp_path / "r", **SMALL)
    assert open_cache(cache.path).payload_sha256 == cache.payload_sha256
