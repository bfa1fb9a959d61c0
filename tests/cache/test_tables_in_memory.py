"""Caches and pandas: ``to_pandas``, and targets that are names of classes."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
TRAIN, TEST = (RNG.normal(size=size).astype("f4") for size in ((4, 3), (2, 2, 3)))
PATHS = {"train": ["d", "b", "a", "c"], "test": ["n", "m"]}
TARGETS = {"train": ["ill", "well", None, "ill"], "test": ["well", "odd"]}


def write(folder: Path, targets: Any = TARGETS, **options: Any) -> featcache.Cache:
    features = {"train": TRAIN, "test": TEST}
    return featcache.write_cache(folder / "c.h5", features, targets, PATHS, **options)


def test_rows_of_a_cache_are_rows_of_a_data_frame(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    cache = write(tmp_path, groups={"train": list("1123"), "test": list("44")})
    table = cache.to_pandas()
    assert [*table] == ["split", "path", "target", "group", "f0", "f1", "f2"]
    assert table.split.tolist() == ["train"] * 4 + ["test"] * 2
    assert table.path.tolist() == ["a", "b", "c", "d", "m", "n"]
    assert table.target.tolist() == [None, "well", "ill", "ill", "odd", "well"]
    assert table.group.tolist() == ["2", "1", "3", "1", "4", "4"]
    values = table[["f0", "f1", "f2"]].to_numpy()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[:4], TRAIN[[2, 1, 3, 0]])
    np.testing.assert_array_equal(values[4:], TEST[[1, 0], 0])  # the plain view
    assert [*cache.to_pandas(features=False)] == ["split", "path", "target", "group"]


def test_caches_without_groups_of_float16_and_of_odd_paths(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    odd = "\udcff.png"  # a name that is not UTF-8
    cache = featcache.write_cache(
        tmp_path / "c.h5", TRAIN[:2].astype("f2"), np.array([0, -1]), ["a", odd], classes=["x", "y"]
    )
    table = cache.to_pandas()
    assert table.path.tolist() == ["a", odd]
    assert table.target.tolist() == ["x", None]
    assert table.group.tolist() == [None, None]
    assert {str(dtype) for dtype in table.dtypes[4:]} == {"float32"}


def test_several_labels_have_a_column_each(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    targets = np.array([[1, 0], [np.nan, 1]], "f4")
    cache = featcache.write_cache(tmp_path / "c.h5", TRAIN[:2], targets, "ab", classes=["u", "v"])
    table = cache.to_pandas(features=False)
    assert [*table] == ["split", "path", "target_u", "target_v", "group"]
    np.testing.assert_array_equal(table[["target_u", "target_v"]].to_numpy(), targets)


def test_without_pandas_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = write(tmp_path), builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"the package pandas, found none\. pip install pandas"):
        cache.to_pandas()


# --- names of classes as targets


def test_names_become_the_sorted_classes_of_all_splits(tmp_path: Path) -> None:
    cache = write(tmp_path)
    assert cache.classes == ("ill", "odd", "well")
    assert cache.splits["train"].targets.tolist() == [-1, 2, 0, 0]  # by their paths
    assert cache.splits["test"].targets.tolist() == [1, 2]


def test_classes_that_are_given_keep_their_order(tmp_path: Path) -> None:
    cache = write(tmp_path, classes=["well", "none of them", "odd", "ill"])
    assert cache.classes == ("well", "none of them", "odd", "ill")
    assert cache.splits["train"].targets.tolist() == [-1, 0, 3, 3]


def test_what_numpy_and_pandas_hold_names_in(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    names = ["b", "a", "b", "c"]
    forms = [
        np.array(names), np.array(names, object), tuple(names), pd.Series(names),
        pd.Categorical(names), pd.Series(names, dtype="string"),
    ]  # fmt: skip
    for form in forms:
        cache = featcache.write_cache(tmp_path / "c.h5", TRAIN, form, "pqrs", overwrite=True)
        assert cache.classes == ("a", "b", "c")
        assert cache.splits["all"].targets.tolist() == [1, 0, 1, 2]
    unknown = [None, float("nan"), pd.NA]
    for none in unknown:
        form = ["b", none, "b", "c"]
        cache = featcache.write_cache(tmp_path / "c.h5", TRAIN, form, "pqrs", overwrite=True)
        assert cache.splits["all"].targets.tolist() == [0, -1, 0, 1]
    numbers = pd.array([0, 1, 1, 0], dtype="Int64")
    cache = featcache.write_cache(
        tmp_path / "c.h5", TRAIN, numbers, "pqrs", classes=["x", "y"], overwrite=True
    )
    assert cache.splits["all"].targets.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (TARGETS, {"classes": ["ill", "well"]}, "names of classes: ill, well, found 'odd'"),
        ({"train": ["a", 3, "a", "b"], "test": ["a", "b"]}, {}, "found 3 among names"),
        ({"train": [0, 1, 0, 1], "test": [0, 1]}, {}, r"found none.*class names as targets"),
        ({"train": ["a", "b", "a", "b"]}, {}, "targets of split test: expected one per row, found"),
        ({"train": [0.5] * 4, "test": [1.0] * 2}, {"classes": ["x"]}, "integers or class names"),
        ({"train": [["a"]] * 4, "test": ["a"] * 2}, {"classes": ["a"]}, "integers or class names"),
    ],
)  # fmt: skip
def test_targets_that_are_no_classes_are_refused(
    tmp_path: Path, targets: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, targets, **options)
    assert not (tmp_path / "c.h5").exists()
