"""Integrity: a checksum of each row, by zlib alone; damage is found where it is."""

from __future__ import annotations

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from sample_containers import edit_block

from featcache.cache.container import open_container
from featcache.cache.integrity import METADATA, Damage, find_damage, find_infinite, rows_crc32
from featcache.cache.reading import open_cache
from featcache.cache.writing import SplitRows, write_cache, write_rows
from featcache.errors import CacheError

GOLDEN = Path(__file__).parents[1] / "data" / "format_v1.h5"


def write_some(path: Path, *, groups: bool = True, views: int = 0, dtype: str = "<f4") -> Path:
    """Write two splits, the second with groups and views where asked."""
    rng = np.random.default_rng(3)
    shapes = {"train": (7, *([views] if views else []), 5), "test": (3, 5)}
    features = {s: rng.normal(size=shape).astype(dtype) for s, shape in shapes.items()}
    write_cache(
        path, features,
        {s: rng.integers(-1, 2, len(rows)) for s, rows in features.items()},
        {s: [f"{s}/{'x' * i}{i}.png" for i in range(len(rows))] for s, rows in features.items()},
        classes=["covid", "no"], identity={"backbone": "b"},
        groups={"train": [f"g{i}" for i in range(7)]} if groups else None, overwrite=True,
    )  # fmt: skip
    return path


def crc32_by_hand(file: h5py.File, split: str, row: int) -> int:
    """The definition in ``integrity``'s docstring, by h5py and zlib alone."""
    pieces = [file[name][()].tobytes() for name in ("identity", "classes", "task")]
    group = file["splits"][split]
    columns = ("features", "targets", "paths", "groups", "image_sha256", "image_bytes", "mtime_ns")
    for name in columns:
        if name in group:
            value = np.ascontiguousarray(group[name][row : row + 1])
            pieces.append(value.tobytes().ljust(value.dtype.itemsize, b"\0"))
    return zlib.crc32(b"".join(pieces))


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("groups", [True, False])
def test_checksums_are_zlib_s_of_what_h5py_reads(
    tmp_path: Path, views: int, dtype: str, groups: bool
) -> None:
    path = write_some(tmp_path / "c.h5", groups=groups, views=views, dtype=dtype)
    with h5py.File(path) as file:
        # numpy drops the zeros behind a scalar's text; identity and task are as long as their text
        for split, cached in open_cache(path).splits.items():
            wanted = [crc32_by_hand(file, split, row) for row in range(len(cached))]
            assert cached.row_crc32 is not None
            assert cached.row_crc32.tolist() == wanted
            assert len(set(wanted)) == len(wanted)


def test_blocks_of_any_size_give_the_same(tmp_path: Path) -> None:
    cache = open_cache(write_some(tmp_path / "a.h5"))
    split = cache.splits["train"]
    for size in (1, 3):
        rows = SplitRows(
            split.features.shape, split.features.dtype,
            lambda size=size: (split.features[i : i + size] for i in range(0, 7, size)),
            np.array(split.targets), split.paths, split.groups, np.array(split.image_sha256),
            np.array(split.image_bytes), np.array(split.mtime_ns),
        )  # fmt: skip
        again = write_rows(
            tmp_path / "b.h5", {"train": rows}, identity=cache.identity, provenance={},
            classes=cache.classes, task=cache.task,
        )  # fmt: skip
        assert again.splits["train"].row_crc32.tolist() == split.row_crc32.tolist()


def test_no_rows_have_no_checksums() -> None:
    assert rows_crc32(7, np.empty((0, 3), np.float32), {}).tolist() == []


def test_every_flipped_bit_is_located(tmp_path: Path) -> None:
    """In each data set, the first and last byte of each row or of the whole; and between them."""
    path = write_some(tmp_path / "c.h5", views=2)
    raw, container = path.read_bytes(), open_container(path)
    assert not find_damage(container)
    outside = set(range(container.user_block_bytes, len(raw)))
    for name, entry in container.arrays.items():
        outside -= set(range(entry.offset, entry.offset + entry.num_bytes))
        in_split = name.startswith("splits/")
        num_items = entry.shape[0] if in_split else 1
        size = entry.num_bytes // num_items
        for row in {0, num_items - 1} if entry.num_bytes else ():
            for place in {0, size - 1}:
                damage = damage_by_a_bit(path, raw, entry.offset + row * size + place)
                if in_split:
                    found = [(bad.split, bad.row) for bad in damage.rows]
                    assert found == [(name.split("/")[1], row)]
                    assert damage.parts == ()
                else:
                    assert (damage.rows, damage.parts) == ((), (name,))
                    assert damage.is_meaning_lost == (name in {"identity", "classes", "task"})
    for place in sorted(outside)[:: len(outside) // 40]:
        damage = damage_by_a_bit(path, raw, place)
        assert (damage.rows, damage.parts) == ((), (METADATA,))


def damage_by_a_bit(path: Path, raw: bytes, place: int) -> Damage:
    data = bytearray(raw)
    data[place] ^= 16
    path.write_bytes(data)
    return find_damage(open_container(path, verify=False))


def test_a_row_is_bound_to_what_it_means(tmp_path: Path) -> None:
    """The rows of one cache under another's classes or identity bear out nowhere."""
    facts = (np.ones((2, 3), np.float32), [0, 1], ["a", "b"])
    seen = set()
    for classes in (["p", "q"], ["q", "p"], ["p", "q", "r"]):
        for name in ("b0", "b1"):
            cache = write_cache(
                tmp_path / "c.h5", *facts, classes=classes, identity={"backbone": name},
                overwrite=True,
            )  # fmt: skip
            seen |= set(cache.splits["all"].row_crc32.tolist())
    assert len(seen) == 12


def test_a_cache_without_checksums_opens_and_its_damage_has_no_place(tmp_path: Path) -> None:
    container = open_container(GOLDEN)
    assert not any("row_crc32" in name for name in container.arrays)
    assert all(split.row_crc32 is None for split in open_cache(GOLDEN).splits.values())
    assert not find_damage(container)
    raw = bytearray(GOLDEN.read_bytes())
    raw[container.arrays["splits/train/features"].offset] ^= 1
    (tmp_path / "c.h5").write_bytes(raw)
    damage = find_damage(open_container(tmp_path / "c.h5", verify=False))
    assert damage.rows == ()
    assert "splits/train" in damage.parts
    assert set(damage.unlocated) == set(open_cache(GOLDEN).splits)


def test_a_checksum_of_the_table_is_a_number_of_32_bits(tmp_path: Path) -> None:
    path = write_some(tmp_path / "c.h5")
    block = path.read_bytes()[:4096].split(b"\0")[0].decode()
    assert '"crc32":' in block
    for wrong in (-1, 1 << 32, "1", 1.5, True):
        edit_block(path, lambda b, wrong=wrong: b["arrays"][0].update(crc32=wrong))
        with pytest.raises(CacheError, match="table of arrays"):
            open_cache(path)


def test_rows_that_are_not_finite_are_found(tmp_path: Path) -> None:
    cache = open_cache(write_some(tmp_path / "a.h5", views=2))
    features = np.array(cache.splits["train"].features)
    features[2, 1, 4], features[5, 0, 0] = np.inf, np.nan
    split = cache.splits["train"]
    rows = SplitRows(
        features.shape, features.dtype, lambda: [features], np.array(split.targets), split.paths,
        split.groups, np.array(split.image_sha256), np.array(split.image_bytes),
        np.array(split.mtime_ns),
    )  # fmt: skip
    again = write_rows(
        tmp_path / "b.h5", {"train": rows}, identity={}, provenance={}, classes=cache.classes,
        task=cache.task,
    )  # fmt: skip
    bad = find_infinite(again.container)
    assert [(row.split, row.row, row.path) for row in bad] == [
        ("train", 2, split.paths[2]), ("train", 5, split.paths[5]),
    ]  # fmt: skip
