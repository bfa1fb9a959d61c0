from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sample_containers import same

from featcache.cache.reading import Failure, open_cache
from featcache.cache.writing import SplitRows, os_bytes, write_cache, write_rows
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheError

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)
BASE: dict[str, Any] = {
    "features": FEATURES, "targets": [0, 1, -1, 1], "paths": ["a", "b", "c", "d"],
    "classes": ["covid", "normal"],
}  # fmt: skip


# --- what is written comes back


def test_plain_arrays_become_the_split_all(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c.h5", **BASE, groups=["p", "p", "q", "q"])
    assert list(cache.splits) == ["all"]
    split = open_cache(tmp_path / "c.h5").split("all")
    assert same(split.features.copy(), FEATURES)
    assert split.targets.tolist() == BASE["targets"]
    assert (split.paths, split.groups) == (BASE["paths"], ["p", "p", "q", "q"])
    assert not split.image_sha256.any()
    assert not split.image_bytes.any()
    assert not split.mtime_ns.any()
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]


def test_a_dict_by_split_keeps_its_splits_in_their_order(tmp_path: Path) -> None:
    sizes = {"test": 2, "all": 1, "train": 4, "valid": 3}
    cache = write_cache(
        tmp_path / "c.h5",
        {s: np.full((n, 2), n, np.float16) for s, n in sizes.items()},
        {s: np.zeros(n, np.uint8) for s, n in sizes.items()},
        {s: [f"{s}{i}" for i in range(n)] for s, n in sizes.items()},
        classes=("x",), groups={s: ["g"] * n for s, n in sizes.items() if s != "all"},
    )  # fmt: skip
    assert list(cache.splits) == ["train", "valid", "test", "all"]
    for name, size in sizes.items():
        split = cache.split(name)
        assert (len(split), float(split.features.max())) == (size, size)
        assert split.paths == [f"{name}{i}" for i in range(size)]
        assert split.groups == (None if name == "all" else ["g"] * size)


def test_rows_are_sorted_by_the_bytes_of_their_path(tmp_path: Path) -> None:
    paths = ["b/1", "B/1", "a/10", "a/2", "é", "\udcff", "b", "b.png", "b/", "肺", "z\udc80", ""]
    order = sorted(range(len(paths)), key=lambda i: os.fsencode(paths[i]))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(paths), 2, 3)).astype(np.float32)
    targets, groups = rng.integers(-1, 2, len(paths)), [f"g{i}" for i in range(len(paths))]
    cache = write_cache(
        tmp_path / "c.h5", features, targets, paths, classes=["x", "y"], groups=groups
    )
    split = cache.split("all")
    assert split.paths == [paths[i] for i in order]
    assert same(split.features.copy(), features[order])
    assert split.targets.tolist() == targets[order].tolist()
    assert split.groups == [groups[i] for i in order]
    assert list(map(os_bytes, split.paths)) == sorted(map(os.fsencode, paths))


def test_names_that_are_not_utf8_come_back_as_their_own_bytes(tmp_path: Path) -> None:
    raw = [b"\x80", b"a\xff/\xfe.png", b"caf\xe9", b"\xed\xa0\x80", "é".encode()]
    names = [os.fsdecode(name) for name in raw]
    cache = write_cache(
        tmp_path / "c.h5", np.ones((5, 1), np.float32), [0] * 5, names, classes=["größe", "ä"],
        groups=names[::-1],
    )  # fmt: skip
    split = cache.split("all")
    assert [os.fsencode(path) for path in split.paths] == sorted(raw)
    assert cache.classes == ("größe", "ä")
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["splits/all/paths"][()].tolist() == sorted(raw)
        assert file["classes"].asstr()[()].tolist() == ["größe", "ä"]


@pytest.mark.parametrize("name", [
    "a\nb", "a\tb", "../../etc/passwd", "<script>", "\u202egpj", "=1+1", " ", "a" * 5000, '"', "é",
])  # fmt: skip
def test_any_other_name_is_only_a_name(tmp_path: Path, name: str) -> None:
    cache = write_cache(
        tmp_path / "c.h5", np.ones((1, 1), np.float32), [0], [name], classes=[name], groups=[name]
    )
    assert (cache.split("all").paths, cache.split("all").groups) == ([name], [name])
    assert cache.classes == (name,)


def test_no_rows_and_no_classes_are_fine(tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "c.h5", np.empty((0, 3), np.float32), np.empty(0, int), [], classes=[]
    )
    assert (len(cache.split("all")), cache.split("all").paths, cache.classes) == (0, [], ())
    cache = write_cache(tmp_path / "d.h5", FEATURES, [-1] * 4, list("abcd"), classes=[])
    assert cache.split("all").targets.tolist() == [-1] * 4


def test_integers_of_any_width_and_layouts_of_any_kind_are_taken(tmp_path: Path) -> None:
    base = write_cache(tmp_path / "a", **BASE).content_sha256
    for dtype in (np.int8, np.int32, np.int64, ">i8"):
        for features in (
            np.asfortranarray(FEATURES),
            FEATURES.repeat(2, 1)[:, ::2],
            FEATURES.tolist(),
        ):
            array = np.asarray(features, np.float32)
            targets = np.array(BASE["targets"], dtype)
            cache = write_cache(
                tmp_path / "a", array, targets, BASE["paths"], classes=BASE["classes"],
                overwrite=True,
            )  # fmt: skip
            assert cache.content_sha256 == base


def test_the_identity_says_what_the_arrays_are(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c.h5", **BASE)
    assert cache.identity == {"backbone": "unknown", "num_features": 3, "feature_dtype": "float32"}
    cache = write_cache(
        tmp_path / "c.h5", **BASE, identity={"backbone": "mine", "n": 1}, overwrite=True
    )
    assert cache.identity["backbone"] == "mine"
    assert cache.provenance == {}
    cache = write_cache(tmp_path / "c.h5", **BASE, provenance={"gpu": "H200"}, overwrite=True)
    assert cache.provenance == {"gpu": "H200"}


def test_failures_are_kept_sorted(tmp_path: Path) -> None:
    rows = SplitRows(
        (1, 2), np.dtype("<f4"), lambda: [np.ones((1, 2), "<f4")], np.array([0]), ["a"], None,
        np.ones((1, 32), np.uint8), np.array([7]), np.array([8]),
    )  # fmt: skip
    failures = [
        Failure("z", "test", 1, "cut short", 5, 6), Failure("\udcff", "train", -1, "", 0, -1),
        Failure("b", "train", 0, "not an image: ä", 1 << 40, 2),
    ]  # fmt: skip
    cache = write_rows(
        tmp_path / "c.h5", {"train": rows}, identity={}, provenance={}, classes=["x", "y"],
        task="multiclass", failures=failures,
    )  # fmt: skip
    assert open_cache(tmp_path / "c.h5").failures == (failures[2], failures[1], failures[0])
    assert cache.split("train").image_bytes.tolist() == [7]
    assert cache.split("train").mtime_ns.tolist() == [8]


# --- what is refused, before anything is written

NAN = FEATURES.copy()
NAN[2, 1] = np.nan
INFINITE = FEATURES.copy()
INFINITE[3, 0] = -np.inf
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"features": FEATURES.astype(float)}, r"features of split all: .*found float64"),
    "integers": ({"features": FEATURES.astype(int)}, r"float32 or float16, found int64 \(4, 3\)"),
    "flat features": ({"features": FEATURES[0]}, r"expected \(N, D\) or \(N, V, D\)"),
    "four dimensions": ({"features": FEATURES.reshape(1, 1, 4, 3)}, r"\(1, 1, 4, 3\)"),
    "no columns": ({"features": FEATURES[:, :0]}, "features of split all"),
    "NaN": ({"features": NAN}, "finite values, found NaN or infinity in row 2"),
    "infinity": ({"features": INFINITE}, "finite values, found NaN or infinity in row 3"),
    "NaN in float16": ({"features": NAN.astype(np.float16)}, "NaN or infinity in row 2"),
    "too few paths": ({"paths": ["a"]}, "paths of split all: expected 4 different paths, found 1"),
    "a path twice": ({"paths": list("abca")}, "found 4 paths, 3 different"),
    "no paths": ({"paths": None}, "found 0 paths"),
    "a path that a trailing NUL makes twice": ({"paths": ["a", "a\0", "b", "c"]}, "paths"),
    "a NUL in a path": ({"paths": ["a", "b\0", "c", "d"]}, "paths"),
    "a lone surrogate": ({"paths": ["a", "\ud800", "c", "d"]}, "paths"),
    "too few targets": ({"targets": [0, 1]}, "targets of split all: expected 4 integers"),
    "targets floats": (
        {"targets": [0.0, 1.0, 0.0, 1.0]},
        "4 integers or class names, found float64",
    ),
    "targets names": ({"targets": [["covid"]] * 4}, "4 integers"),
    "targets true": ({"targets": [True, False] * 2}, "4 integers or class names, found bool"),
    "a target too high": ({"targets": [0, 1, 2, 0]}, "expected -1 to 1, found 0 to 2"),
    "a target too low": ({"targets": [0, 1, -2, 0]}, "expected -1 to 1, found -2 to 1"),
    "a target that wraps": ({"targets": np.array([2**64 - 1, 0, 0, 0], np.uint64)}, "-1 to 1"),
    "no targets": ({"targets": None}, "4 integers"),
    "labels of a wrong width": ({"targets": np.zeros((4, 3))}, r"0, 1 or NaN"),
    "labels of a wrong value": ({"targets": np.full((4, 2), 0.5)}, r"0, 1 or NaN.*0\.5"),
    "too few groups": ({"groups": ["a"]}, "groups of split all: expected 4 groups, found 1"),
    "a class twice": ({"classes": ["covid", "covid"]}, "classes"),
    "a NUL in a class": ({"classes": ["covid", "covid\0"]}, "classes"),
    "an unknown split": ({"features": {"val": FEATURES}}, "expected train or valid or test or all"),
    "no split": ({"features": {}}, "splits"),
    "identity NaN": ({"identity": {"mean": float("nan")}}, "identity"),
    "identity of another width": ({"identity": {"num_features": 4}}, "identity, num_features"),
    "identity of another dtype": ({"identity": {"feature_dtype": "float16"}}, "feature_dtype"),
    "identity of other views": ({"identity": {"views": 2}}, "identity, views"),
    "identity of no backbone": ({"identity": {"backbone": ["b0"]}}, "identity, backbone"),
    "identity a path": ({"identity": {"weights": Path("w.pt")}}, "identity"),
    "provenance NaN": ({"provenance": {"speed": float("inf")}}, "provenance"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("exists", [False, True])
def test_what_does_not_fit_is_refused_and_the_old_file_stays(
    tmp_path: Path, name: str, exists: bool
) -> None:
    path = tmp_path / "c.h5"
    if exists:
        write_cache(path, **BASE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    change, message = REFUSED[name]
    with pytest.raises(FeatcacheError) as caught:
        write_cache(path, **(BASE | change))
    assert isinstance(caught.value, DataError)
    assert caught.match(message)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def two(train: Any, test: Any) -> dict[str, Any]:
    return {"train": train, "test": test}


@pytest.mark.parametrize(("change", "message"), [
    ({"features": two(FEATURES, FEATURES[:, :2])}, "one D and dtype"),
    ({"features": two(FEATURES, FEATURES.astype(np.float16))}, "one D and dtype"),
    ({"features": two(FEATURES, FEATURES[:, None, :2])}, "one D and dtype"),
    ({"targets": two([0] * 4, np.zeros((4, 2)))}, "targets of one rank"),
    ({"targets": {"train": [0] * 4}}, "targets of split test"),
    ({"paths": {"train": list("abcd")}}, "paths of split test: expected 4 different paths"),
    ({"targets": {**two([0] * 4, [0] * 4), "valid": [0]}}, "valid"),
    ({"paths": {**two(list("abcd"), list("efgh")), "tset": ["x"]}}, "tset"),
])  # fmt: skip
def test_splits_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base: dict[str, Any] = {
        "features": two(FEATURES, FEATURES), "targets": two([0] * 4, [1] * 4),
        "paths": two(list("abcd"), list("efgh")), "classes": ["x", "y"],
    }  # fmt: skip
    write_cache(tmp_path / "fine", **base)
    with pytest.raises(DataError, match=message):
        write_cache(tmp_path / "c.h5", **(base | change))
    assert [p.name for p in tmp_path.iterdir()] == ["fine"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        CacheError, match=r"^write_cache: expected a new file, found no such folder"
    ):
        write_cache(tmp_path / "no" / "c.h5", **BASE)
    assert list(tmp_path.iterdir()) == []


def test_the_callers_arrays_are_not_touched(tmp_path: Path) -> None:
    features, targets = FEATURES[::-1].copy(), np.array([1, -1, 1, 0])
    before = features.copy(), targets.copy()
    features.flags.writeable = targets.flags.writeable = False
    write_cache(tmp_path / "c.h5", features, targets, list("dcba"), classes=["x", "y"])
    assert same(features, before[0])
    assert same(targets, before[1])


# --- whole or absent

WRITE_FOR_EVER = """
import itertools, sys
import numpy as np
from featcache import write_cache
paths = [f"{i:05d}" for i in range(2000)]
for version in itertools.count():
    rows = np.full((2000, 64), version, np.float32)
    write_cache(sys.argv[1], rows, np.zeros(2000, int), paths, classes=["x"],
                identity={"version": version}, overwrite=True)
    print(version, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")
def test_a_kill_leaves_the_old_or_the_new_cache(tmp_path: Path) -> None:
    path, rng = tmp_path / "c.h5", random.Random(0)
    for _ in range(2):
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            done = -1
            for _ in range(rng.randint(1, 4)):
                done = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.03))
            child.kill()
            done = max([done, *map(int, child.stdout.read().split())])
            assert child.wait() == -signal.SIGKILL
        cache = open_cache(path)
        version = cache.identity["version"]
        assert version in (done, done + 1), "a cache that was reported written was lost"
        assert np.unique(cache.split("all").features).tolist() == [version]


def test_a_cache_that_is_there_is_replaced_when_asked_and_other_files_never(tmp_path: Path) -> None:
    path, letter = tmp_path / "c.h5", tmp_path / "letter.h5"
    letter.write_text("dear")
    before = write_cache(path, **BASE).payload_sha256
    with pytest.raises(CacheError, match=r"a cache that is there already.*overwrite=True"):
        write_cache(path, **BASE, provenance={"n": 2})
    assert open_cache(path).payload_sha256 == before
    assert write_cache(path, **BASE, provenance={"n": 2}, overwrite=True).payload_sha256 != before
    with pytest.raises(CacheError, match="something that is no cache"):
        write_cache(letter, **BASE, overwrite=True)
    with pytest.raises(ConfigError, match=r"found a URL, s3://bucket/c\.h5"):
        write_cache("s3://bucket/c.h5", **BASE)
    assert letter.read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "letter.h5"]


def test_a_writer_that_fails_half_way_leaves_the_old_cache(tmp_path: Path) -> None:
    old = write_cache(tmp_path / "c.h5", **BASE).payload_sha256

    def blocks() -> Any:
        yield np.ones((1, 2), "<f4")
        raise KeyboardInterrupt

    rows = SplitRows(
        (2, 2), np.dtype("<f4"), blocks, np.zeros(2, "<i8"), ["a", "b"], None,
        np.zeros((2, 32), np.uint8), np.zeros(2, "<i8"), np.zeros(2, "<i8"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        write_rows(
            tmp_path / "c.h5", {"all": rows}, identity={}, provenance={}, classes=["x"],
            task="multiclass",
        )  # fmt: skip
    assert open_cache(tmp_path / "c.h5").payload_sha256 == old
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]
