"""Texts in a cache are typed as what they are: UTF-8 where every value is, else bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sample_caches import BAD_NAME, small, snapshot
from sample_containers import some_arrays, write
from sample_golden import GOLDEN

from featcache.cache import hdf5
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.extraction.verification import verify

TEXTS = ["größe", "x", "日本", "\U0001f600"]


def encoding(file: h5py.File, name: str) -> str:
    return str(h5py.check_string_dtype(file[name].dtype).encoding)


def test_h5py_reads_texts_as_strings(tmp_path: Path) -> None:
    cache = small(
        tmp_path / "c.h5", classes=TEXTS, provenance={"für": "größe"},
        paths={"train": ["ä", "b", "c", "d", "e", "f"], "test": ["日", "y", "z"]},
        groups={"train": [*TEXTS, "", "p"], "test": ["q", "é", "r"]},
    )  # fmt: skip
    with h5py.File(cache.path) as file:
        assert file["classes"].asstr()[:].tolist() == TEXTS
        for name, split in cache.splits.items():
            assert file[f"splits/{name}/paths"].asstr()[:].tolist() == split.paths
            assert file[f"splits/{name}/groups"].asstr()[:].tolist() == split.groups
        assert file["task"].asstr()[()] == "multiclass"
        for name in ("identity", "provenance", "task", "failures/paths", "failures/reasons"):
            assert encoding(file, name) == "utf-8"
        assert file["classes"][0] == "größe".encode()  # as ever
    assert verify(cache.path).num_rows == 9


def test_texts_of_which_one_is_not_utf8_stay_bytes(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    assert BAD_NAME in cache.splits["train"].paths
    with h5py.File(cache.path) as file:
        assert encoding(file, "splits/train/paths") == "ascii"
        assert encoding(file, "splits/test/paths") == "utf-8"
        assert file["splits/train/paths"][:].tolist() == [
            path.encode("utf-8", "surrogateescape") for path in cache.splits["train"].paths
        ]


@pytest.mark.parametrize(("values", "wanted"), [
    ([b"a\xc3", b"\xa9b"], "ascii"),  # one after the other they make a character
    ([b"\xc3\xa9", b"\xa9"], "ascii"), ([b"\xed\xa0\x80"], "ascii"), ([b""], "utf-8"),
    ([b"a\xc3\xa9", b"a"], "utf-8"), ([b"\xf0\x9f\x98\x80"], "utf-8"),
])  # fmt: skip
def test_each_value_is_looked_at(values: list[bytes], wanted: str, tmp_path: Path) -> None:
    array = np.array(values, dtype=f"S{max(1, *map(len, values))}")
    write(tmp_path / "c.h5", {"a": array})
    with h5py.File(tmp_path / "c.h5") as file:
        assert encoding(file, "a") == wanted
        assert file["a"][:].tolist() == values


def test_the_mark_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same offsets, bytes of arrays and hashes of content as without it."""
    small(tmp_path / "new.h5")
    monkeypatch.setattr(hdf5, "_is_utf8", lambda array: False)
    small(tmp_path / "old.h5")
    old, new = open_cache(tmp_path / "old.h5"), open_cache(tmp_path / "new.h5")
    assert old.container.arrays == new.container.arrays
    assert (old.fingerprint, old.content_sha256) == (new.fingerprint, new.content_sha256)
    seen: list[Any] = snapshot(old)
    assert [a for a in seen if a != old.payload_sha256] == [
        a for a in snapshot(new) if a != new.payload_sha256
    ]
    assert old.payload_sha256 != new.payload_sha256


def test_an_older_cache_opens_and_one_selected_from_it_has_its_content(tmp_path: Path) -> None:
    old = open_cache(GOLDEN / "images.h5")
    with h5py.File(old.path) as file:
        assert encoding(file, "classes") == "ascii"
    summary = select(old.path, tmp_path / "new.h5")
    assert summary.content_sha256 == old.content_sha256
    with h5py.File(tmp_path / "new.h5") as file:
        assert encoding(file, "classes") == "utf-8"


def test_a_container_of_numbers_has_no_texts(tmp_path: Path) -> None:
    write(tmp_path / "c.h5", some_arrays())
    with h5py.File(tmp_path / "c.h5") as file:
        assert h5py.check_string_dtype(file["number"].dtype) is None
        assert encoding(file, "splits/train/paths") == "ascii"
