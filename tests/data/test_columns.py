"""Samples and texts in columns: the same as tuples of them, in a fraction of the memory."""

from __future__ import annotations

import os
import pickle
import sys

import numpy as np
import pytest

from featcache.data.columns import Sample, Samples, Texts, as_int64, sort_samples
from featcache.data.shards import PathIndex

ODD = os.fsdecode(b"caf\xe9.png")  # bytes that are not UTF-8
SAMPLES = (
    Sample("b/é.png", 1, "train", "p1", 10, 2**63 - 1),
    Sample("a/" + ODD, -1, "test", None, 0, -(2**63)),
    Sample("", 0, "train", "p1", 2**40, 5, (1, 0)),
    Sample("a/" + "x" * 300, 2, "valid", "", 7, 0, (0, -1)),
)


def test_columns_give_back_their_samples() -> None:
    samples = Samples(iter(SAMPLES))
    assert tuple(samples) == SAMPLES
    assert len(samples) == 4
    assert [samples[n] for n in range(-4, 4)] == [*SAMPLES, *SAMPLES]
    assert all(map(isinstance, samples, [Sample] * 4))
    for place in (4, -5, 10**6):
        with pytest.raises(IndexError):
            samples[place]
    assert list(samples.paths) == [s.path for s in SAMPLES]
    assert list(samples.splits) == [s.split for s in SAMPLES]
    assert list(samples.groups) == [s.group for s in SAMPLES]
    assert [samples.group_of(3), samples.split_of(3)] == ["", "valid"]
    assert pickle.loads(pickle.dumps(samples)) == samples
    assert samples != Samples(SAMPLES[:3])
    assert samples != SAMPLES
    assert list(Samples()) == []
    assert SAMPLES[1] in samples
    assert samples.index(SAMPLES[2]) == 2


@pytest.mark.parametrize("part", [slice(1, 3), slice(None, None, -1), slice(0, 0), slice(-1, None)])
def test_a_slice_has_samples_of_its_own(part: slice) -> None:
    samples = Samples(SAMPLES)
    assert tuple(samples[part]) == SAMPLES[part]
    assert len(pickle.dumps(samples[part]._groups)) <= len(pickle.dumps(samples._groups))
    assert isinstance(samples[part], Samples)
    assert tuple(samples.paths[part]) == tuple(s.path for s in SAMPLES[part])
    assert tuple(samples) == SAMPLES  # untouched


def test_samples_of_a_split() -> None:
    samples = Samples(SAMPLES)
    assert samples.numbers_of("train").tolist() == [0, 2]
    assert samples.numbers_of("all").tolist() == Samples().numbers_of("all").tolist() == []
    assert tuple(samples.taken(np.array([2, 0]))) == (SAMPLES[2], SAMPLES[0])


def test_samples_are_sorted_by_split_and_by_the_bytes_of_their_path() -> None:
    paths = ["b", "a", "z", "é", ODD, "a/b", "a.b", "", "\U0001f600", "\uffff"]
    splits = ("all", "test", "train", "valid")
    given = [Sample(p, n, splits[n % 4], None, n, n) for n, p in enumerate(paths * 4)]
    order = ("train", "valid", "test", "all")
    wanted = sorted(given, key=lambda s: (order.index(s.split), os.fsencode(s.path)))
    assert list(sort_samples(iter(given))) == wanted
    assert list(sort_samples([])) == []


def test_texts_are_found_by_number() -> None:
    texts = Texts(["a", "", ODD, "é"])
    texts.append("last")
    assert (texts[1], texts[2], texts[-1], len(texts)) == ("", ODD, "last", 5)
    assert texts.bytes_of(2) == b"caf\xe9.png"
    assert list(texts.taken([3, 3, 0])) == ["é", "é", "a"]
    assert texts.longest(np.array([0, 3])) == 2
    assert texts.longest(np.empty(0, np.int64)) == 0
    with pytest.raises(IndexError):
        texts[5]


def test_times_beyond_int64_stay_different() -> None:
    assert [as_int64(t) for t in (0, -1, 2**63 - 1, -(2**63))] == [0, -1, 2**63 - 1, -(2**63)]
    assert as_int64(2**63) == -(2**63)
    assert as_int64(2**64 + 5) == 5


def test_an_index_finds_the_number_of_each_path() -> None:
    paths = [f"{n * 7919 % 1000}/{n}.png" for n in range(1000)] + [ODD, "", "é"]
    index = pickle.loads(pickle.dumps(PathIndex(paths)))
    assert [index[path] for path in paths] == list(range(len(paths)))
    assert index.repeated(paths) == set()
    for path in ("1/1", "no", "é/"):
        with pytest.raises(KeyError):
            index[path]
    twice = [*paths, ODD, "0/0.png", ODD]
    assert PathIndex(twice).repeated(twice) == {ODD, "0/0.png"}
    with pytest.raises(KeyError):
        PathIndex([])["a"]


def test_a_sample_takes_40_bytes_beside_its_path() -> None:
    """Objects take 250: see also ``test_tars``."""
    made = (Sample(f"folder/{n:08}.png", n % 2, "all", None, n, n) for n in range(10_000))
    samples = Samples(made)
    path = len("folder/00000000.png")
    columns = [*vars(samples).values(), *vars(samples.paths).values()]
    assert sum(map(sys.getsizeof, columns)) < 10_000 * (40 + path) * 1.15  # they have room to grow
