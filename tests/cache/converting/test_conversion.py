"""Convert: every format gives back the cache it was made of, or refuses it."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_caches import BAD_NAME, small

import featcache
from featcache.cache.converting.conversion import STATED, convert
from featcache.cache.converting.reading import FORMATS
from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.writing import SplitRows, write_rows
from featcache.errors import ConfigError, DataError

IN_MEMORY = [".npz", ".safetensors", ".csv"]
ENDINGS = [
    pytest.param(
        ending,
        marks=pytest.mark.skipif(
            bool(made.package) and importlib.util.find_spec(made.package or "os") is None,
            reason=f"{made.package} is not installed",
        ),
    )
    for ending, made in FORMATS.items()
]


def quiet(line: str) -> None:
    """Print nothing."""


def full_cache(path: Path, *, dtype: str = "<f4", multilabel: bool = False) -> Cache:
    """Write a cache with all that a file of rows has to hold, in another order than by names."""
    rng = np.random.default_rng(5)
    paths = {
        "train": ["=1+2", "a,\"b\"\n.png", BAD_NAME, "train/\\udcff.png", "ä é.png", "'-x"],
        "test": ["x"], "all": [],
    }  # fmt: skip
    groups = {"train": ["-7", "", "p\udcfe", "0012", "p,q", "0012"], "test": None, "all": []}
    classes = ["covid", "1.0", "unseen"]
    splits = {}
    for name, names in paths.items():
        order = sorted(range(len(names)), key=lambda i: names[i].encode("utf-8", "surrogateescape"))
        features = rng.normal(size=(len(names), 5)).astype(dtype)
        features[:1, :4] = [-0.0, 1e-7, 65504, 0.1]
        targets: Any = rng.integers(-1, 2, len(names)).astype("<i8")
        if multilabel:
            targets = rng.choice([0, 1, np.nan], (len(names), 3)).astype("<f4")
        hashes = rng.integers(0, 256, (len(names), 32)).astype(np.uint8)
        hashes[1:2] = 0
        splits[name] = SplitRows(
            features.shape, features.dtype, lambda features=features: [features], targets,
            [names[i] for i in order], groups[name] and [groups[name][i] for i in order]
            if groups[name] != [] else [], hashes,
            rng.integers(0, 1 << 40, len(names)), rng.integers(0, 1 << 62, len(names)),
        )  # fmt: skip
    dtype_name = np.dtype(dtype).name
    return write_rows(
        path, splits, task="multilabel" if multilabel else "multiclass", classes=classes,
        identity={"backbone": "b0", "num_features": 5, "feature_dtype": dtype_name, "x": [1, "é"]},
        provenance={"precision": "fp16", "parity": [0.001], "date": "2020"},
        failures=[Failure("bad/\udcff.png", "test", 0, "cut off", 7, -3)],
    )  # fmt: skip


def parts(cache: Cache) -> list[Any]:
    """Return all that a round trip must keep."""
    found: list[Any] = [
        cache.content_sha256, cache.fingerprint, cache.identity, cache.classes, cache.task,
        cache.failures, list(cache.splits),
    ]  # fmt: skip
    for split in cache.splits.values():
        arrays = (split.image_sha256, split.image_bytes, split.mtime_ns, split.targets)
        found += [split.paths, split.groups, *((a.dtype, a.tobytes()) for a in arrays)]
    return found


@pytest.mark.parametrize(("dtype", "multilabel"), [("<f4", False), ("<f2", True)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_round_trip_keeps_everything(
    ending: str, dtype: str, multilabel: bool, tmp_path: Path
) -> None:
    cache = full_cache(tmp_path / "c.h5", dtype=dtype, multilabel=multilabel)
    there = convert(cache.path, tmp_path / f"rows{ending}", say=quiet)
    back = convert(there.output, tmp_path / "again.h5", say=quiet)
    again = open_cache(back.output)
    assert parts(again) == parts(cache)
    assert (there.identity, back.identity, back.is_unchanged) == ("as in the cache", STATED, True)
    assert again.provenance["identity"] == STATED
    assert again.provenance["precision"] == "fp16"
    assert again.provenance["converted_from"]["format"] == ending[1:]


def test_the_mark_stays_after_select(tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    convert(tmp_path / "c.h5", tmp_path / "c.npz", say=quiet)
    convert(tmp_path / "c.npz", tmp_path / "again.h5", say=quiet)
    featcache.select([tmp_path / "again.h5"], tmp_path / "new.h5", say=quiet)
    assert open_cache(tmp_path / "new.h5").provenance["identity"] == STATED


def test_numpy_reads_npz_without_pickles(tmp_path: Path) -> None:
    cache = full_cache(tmp_path / "c.h5")
    convert(cache.path, tmp_path / "c.npz", say=quiet)
    with np.load(tmp_path / "c.npz", allow_pickle=False) as arrays:
        train = arrays["split"] == "train"
        np.testing.assert_array_equal(arrays["features"][train], cache.splits["train"].features)
        names = [*cache.classes, ""]
        targets = cache.splits["train"].targets.tolist()
        assert arrays["target"][train].tolist() == [names[target] for target in targets]
        assert "covid" in str(arrays["featcache"])


def test_parquet_is_read_by_pandas_and_polars(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    cache = full_cache(tmp_path / "c.h5", dtype="<f2", multilabel=True)
    convert(cache.path, tmp_path / "c.parquet", say=quiet)
    train = cache.splits["train"]
    for frame in (
        pandas.read_parquet(tmp_path / "c.parquet"),
        polars.read_parquet(tmp_path / "c.parquet").to_pandas(),
    ):
        rows = frame[frame["split"] == "train"]
        features = np.stack(rows["features"].to_list())
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, train.features.astype(np.float32))
        known = np.asarray(rows["target_1.0"], np.float32)
        np.testing.assert_array_equal(known, train.targets[:, 1])
        assert rows["path"].tolist()[0] == train.paths[0]
        assert set(frame["group"].isna()[frame["split"] == "test"]) == {True}


@pytest.mark.filterwarnings("ignore")  # anndata's own
def test_h5ad_is_read_by_anndata_and_what_that_writes_is_read(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    cache = small(tmp_path / "c.h5")
    convert(cache.path, tmp_path / "c.h5ad", say=quiet)
    data = anndata.read_h5ad(tmp_path / "c.h5ad")
    train = data[data.obs["split"] == "train"]
    np.testing.assert_array_equal(train.X, cache.splits["train"].features)
    assert train.obs["target"].isna().sum() == 1
    assert train.obs_names[0] == cache.splits["train"].paths[0]
    anndata.settings.allow_write_nullable_strings = True  # what pandas 3 has for texts
    data.write_h5ad(tmp_path / "theirs.h5ad", compression="gzip")
    convert(tmp_path / "theirs.h5ad", tmp_path / "again.h5", say=quiet)
    assert open_cache(tmp_path / "again.h5").content_sha256 == cache.content_sha256


def test_files_of_others_need_a_backbone_and_little_else(tmp_path: Path) -> None:
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(tmp_path / "theirs.npz", features=features, path=["b", "a", "c"], other=[1, 2])
    with pytest.raises(ConfigError, match="backbone-name"):
        convert(tmp_path / "theirs.npz", tmp_path / "c.h5", say=quiet)
    summary = convert(
        tmp_path / "theirs.npz", tmp_path / "c.h5", backbone_name="dinov2", say=quiet
    )  # fmt: skip
    cache = open_cache(tmp_path / "c.h5")
    assert cache.identity == {"backbone": "dinov2", "feature_dtype": "float32", "num_features": 2}
    assert (summary.is_unchanged, cache.classes, cache.provenance["identity"]) == (None, (), STATED)
    assert cache.splits["all"].paths == ["a", "b", "c"]
    assert cache.splits["all"].features.tolist() == [[2, 3], [0, 1], [4, 5]]
    (tmp_path / "t.csv").write_text("path,target,f1,f0\nx,covid,1.5,-2e-3\ny,,0,1\n", "utf-8")
    convert(tmp_path / "t.csv", tmp_path / "t.h5", backbone_name="dinov2", say=quiet)
    split = open_cache(tmp_path / "t.h5").splits["all"]
    assert split.features.tolist() == [[np.float32(-2e-3), 1.5], [1, 0]]
    assert split.targets.tolist() == [0, -1]


def test_rows_are_about_twice_in_memory(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5_000, 512)).astype(np.float32)
    paths = [f"{i:04d}" for i in range(len(features))]
    featcache.write_cache(
        tmp_path / "c.h5", features, np.zeros(len(features), int), paths, classes=["a"]
    )
    for source, output in (("c.h5", "c.npz"), ("c.npz", "again.h5")):
        tracemalloc.start()
        convert(tmp_path / source, tmp_path / output, say=quiet)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * features.nbytes, (output, peak / features.nbytes)


def test_a_name_is_added_to_an_identity_without_one(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5", identity={"weights": "mine", "backbone": "b7"})
    convert(cache.path, tmp_path / "c.csv", say=quiet)
    text = (tmp_path / "c.csv").read_text("utf-8")
    (tmp_path / "c.csv").write_text(text.replace('""backbone"":""b7"",', ""), "utf-8")
    convert(tmp_path / "c.csv", tmp_path / "again.h5", backbone_name="b8", say=quiet)
    identity = open_cache(tmp_path / "again.h5").identity
    assert (identity["backbone"], identity["weights"]) == ("b8", "mine")


def test_a_changed_file_is_said_to_be_changed(tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    convert(tmp_path / "c.h5", tmp_path / "c.csv", say=quiet)
    lines = (tmp_path / "c.csv").read_text("utf-8").splitlines()
    (tmp_path / "c.csv").write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    said: list[str] = []
    summary = convert(tmp_path / "c.csv", tmp_path / "again.h5", say=said.append)
    assert (summary.num_rows, summary.is_unchanged) == (8, False)
    assert "changed since" in said[-1]
    with pytest.raises(ConfigError, match="b0, which the file states"):
        convert(tmp_path / "c.csv", tmp_path / "x.h5", backbone_name="b1", say=quiet)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("ending", IN_MEMORY)
def test_what_no_file_holds_is_refused_by_name(ending: str, tmp_path: Path) -> None:
    views = np.ones((2, 3, 4), np.float32)
    collision = {"paths": {"train": [*"abcd", BAD_NAME, r"caf\udce9/\udcff.png"], "test": [*"xyz"]}}
    none = np.ones((0, 4), np.float32)
    cases: dict[str, dict[str, Any]] = {
        "views of split train": {
            "features": {"train": views}, "targets": [0, 1], "paths": ["a", "b"], "groups": None,
        },
        "classes": {"classes": ["", "normal"]},
        "twice": collision,
        "rows": {
            "features": {"train": none}, "targets": np.zeros(0, int), "paths": [], "groups": None,
        },
    }  # fmt: skip
    for what, change in cases.items():
        cache = small(tmp_path / "c.h5", **change)
        with pytest.raises(DataError, match=what):
            convert(cache.path, tmp_path / f"rows{ending}", say=quiet)
        assert [file.name for file in tmp_path.iterdir()] == ["c.h5"]


def test_a_format_that_loses_something_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = full_cache(tmp_path / "c.h5")
    made = FORMATS[".npz"]
    for what, change in {
        "features of train": {"features": np.full((7, 5), 0.5, np.float32)},
        "groups of train": {"texts": {"group": ["x"] * 7}},
        "image_sha256 of train": {"texts": {"image_sha256": [None] * 7}},
    }.items():

        def lossy(table: Any, file: Any, change: Any = change) -> None:
            features = change.get("features", table.features)
            texts = {**table.texts, **change.get("texts", {})}
            made.write(type(table)(features, texts, table.numbers, table.metadata), file)

        monkeypatch.setitem(FORMATS, ".npz", type(made)("npz", lossy, made.read))
        with pytest.raises(DataError, match=f"{what}: .* cannot hold it"):
            convert(cache.path, tmp_path / "rows.npz", say=quiet)
        assert not (tmp_path / "rows.npz").exists()


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "c.h5")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'featcache\[formats\]'"):
        convert(tmp_path / "c.h5", tmp_path / "c.parquet", say=quiet)


def test_two_caches_or_two_files_are_no_conversion(tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    convert(tmp_path / "c.h5", tmp_path / "c.npz", say=quiet)
    for source, output in (("c.h5", "d.h5"), ("c.npz", "c.csv"), ("none.npz", "c2.h5")):
        with pytest.raises(ConfigError):
            convert(tmp_path / source, tmp_path / output, say=quiet)
    with pytest.raises(ConfigError, match="--rebuild"):
        convert(tmp_path / "c.h5", tmp_path / "x.npz", rebuild=True, say=quiet)
    assert {file.name for file in tmp_path.iterdir()} == {"c.h5", "c.npz"}
