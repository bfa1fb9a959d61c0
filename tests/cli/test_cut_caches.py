"""A cache that is cut off while a verb reads it is an error in one line, not the end by SIGBUS."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from command_line import TINY, assert_one_line_error
from sample_images import write_tree

from featcache.cache.container import Container
from featcache.cache.reading import open_cache
from featcache.cache.row_reader import RowReader
from featcache.errors import CacheError
from featcache.extraction.extraction import extract
from featcache.heads.training import train

VERBS = {
    "info": ["info", "c.h5"],
    "verify": ["verify", "c.h5"],
    "repair": ["verify", "c.h5", "--repair"],
    "compare": ["verify", "c.h5", "--data", "data", *TINY],
    "select": ["select", "c.h5", "n.h5", "--classes", "covid,normal"],
    "audit": ["audit", "c.h5"],
    "train": ["train", "c.h5", "r2", "--epochs", 1],
    "lbfgs": ["train", "c.h5", "r2", "--hidden", "none", "--optimizer", "lbfgs"],
    "sweep": ["sweep", "c.h5", "r2", "--trials", 2],
    "crossval": ["crossval", "c.h5", "r2", "--folds", 2, "--hidden", "none", "--epochs", 1],
    "decide": ["decide", "run", "--positive", "covid", "--recall", "0.9"],
    "evaluate": ["evaluate", "run"],
    "report": ["report", "run", "n.html"],
    "predict": ["predict", "run", "--cache", "c.h5"],
    "convert": ["convert", "c.h5", "rows.npz"],
    "neighbours": ["neighbours", "c.h5", "train/covid/trc000_0.jpg"],
    "update": ["extract", "data", "c.h5", *TINY, "--device", "cpu"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_tree(folder / "data", {"train": 3, "valid": 3, "test": 2})
    extract(folder / "data", folder / "c.h5", backbone=TINY[1], device="cpu")
    train(folder / "c.h5", folder / "run", epochs=1, hidden=(4,), device="cpu")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("verb", VERBS)
def test_a_cache_cut_at_any_read_is_one_line(
    verb: str, place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = (place / "c.h5").read_bytes(), place / "c.h5"
    times = path.stat()
    fill, left = RowReader._fill, 0

    def cutting(self: RowReader, target: memoryview, start: int) -> None:
        nonlocal left
        left -= 1
        if left == 0 and len(target):
            os.truncate(path, 4096)  # all that is read lies behind
        fill(self, target, start)

    monkeypatch.setattr(RowReader, "_fill", cutting)
    if verb == "update":  # an image more, so that rows of the cache are gathered
        shutil.copy(place / "data/train/covid/trc000_0.jpg", place / "data/valid/covid/new.jpg")
        (place / "data/test/normal/ten000_0.jpg").unlink()
    num_cut = 0
    for number in (1, 2, 3, 5, 9, 14, 20, 30, 45, 70):
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        for name in ("r2", "n.h5"):
            shutil.rmtree(place / name, ignore_errors=True)
            (place / name).unlink(missing_ok=True)
        left = number
        done = run(*VERBS[verb])
        if path.stat().st_size > 4096 or (verb == "select" and done.code == 0):
            assert done.code == 0, done.err  # all was read before; n.h5 is read at the end
            break
        assert_one_line_error(done)
        num_cut += 1
    assert num_cut > 2


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_maps_a_cache(
    verb: str, place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Container, name: str) -> npt.NDArray[Any]:
        raise AssertionError(f"{name} is mapped")

    monkeypatch.setattr(Container, "map", refuse)
    if verb == "update":
        (place / "data/test/normal/ten000_0.jpg").unlink()
    done = run(*VERBS[verb])
    assert done.code == 0, done.err


def test_rows_taken_are_those_that_are_mapped(place: Path) -> None:
    split = open_cache(place / "c.h5").splits["train"]
    wanted, reader = np.array(split.features), split.open_features()
    rng = np.random.default_rng(0)
    for rows in (
        np.arange(6), np.arange(6)[::-1], np.array([3]), np.array([0, 0, 5, 1, 2, 3, 3]),
        np.empty(0, np.int64), rng.integers(0, 6, 40),
    ):  # fmt: skip
        np.testing.assert_array_equal(reader.take(rows), wanted[rows])
        np.testing.assert_array_equal(split.read_rows(rows), wanted[rows])
    for num_rows in (1, 4, 6, 100):
        blocks = list(reader.blocks(num_rows))
        np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), wanted)
        assert all(np.array_equal(wanted[rows], block) for rows, block in blocks)
    assert b"".join(piece.tobytes() for piece in reader.pieces()) == wanted.tobytes()


def test_a_reader_of_a_file_that_became_shorter_says_so(place: Path) -> None:
    split = open_cache(place / "c.h5").splits["train"]
    reader = split.open_features()
    os.truncate(place / "c.h5", 4096)
    for read in (
        lambda: reader.take(np.array([0, 3])), lambda: list(reader.blocks(2)),
        lambda: list(reader.pieces()), lambda: reader.read_into(np.empty((6, 4), "f4")),
        split.read_features, lambda: split.paths, lambda: split.image_sha256,
    ):  # fmt: skip
        with pytest.raises(CacheError, match="expected the file that was opened"):
            read()
