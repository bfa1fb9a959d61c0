"""Damage: bytes, cuts and swapped blocks of every file we read. Refused, or read equal.

Caches, runs, shards and the manifest, each damaged in a seeded way and read again. What must never
stand in the table is ``silent``.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_tree

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.cache.writing import partial_folder, write_cache
from featcache.deployment.predictions import predict
from featcache.errors import CacheError, DataError, FeatcacheError, FeatcacheWarning
from featcache.evaluation.evaluation import evaluate
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify
from featcache.heads.run import load_run
from featcache.heads.training import train

BLOCK_BYTES = 4096
GOLDEN = Path(__file__).parents[1] / "data" / "format_v1.h5"


def damage(raw: bytes, rng: random.Random) -> bytes:
    """Return other bytes: 1 to 8 of them changed, a cut, or two blocks in each other's place.

    Half of the changes are single bits, half of them in the text before the first zero, if there is
    one: a user block of which a digit is another one is the damage that is hardest to see.
    """
    data, kind = bytearray(raw), rng.random()
    if kind < 0.1:
        return bytes(data[: rng.randrange(len(data))])
    if kind < 0.2 and len(data) > 2 * BLOCK_BYTES:
        first, second = (BLOCK_BYTES * n for n in rng.sample(range(len(data) // BLOCK_BYTES), 2))
        one, two = data[first : first + BLOCK_BYTES], data[second : second + BLOCK_BYTES]
        data[first : first + BLOCK_BYTES], data[second : second + BLOCK_BYTES] = two, one
        return bytes(data)
    text = raw.find(b"\0") if raw.startswith(b"{") else -1
    reach = text if text > 0 and rng.random() < 0.5 else len(data)
    one_bit = rng.random() < 0.5
    for _ in range(1 if one_bit else rng.randint(1, 8)):
        place = rng.randrange(reach)
        data[place] = data[place] ^ 1 << rng.randrange(8) if one_bit else rng.randrange(256)
    return bytes(data)


def content(cache: Cache) -> list[Any]:
    """All that a cache says, the very bytes."""
    arrays = {name: np.array(cache.container.map(name)) for name in cache.container.arrays}
    return [
        cache.identity, cache.provenance, cache.classes, cache.task, cache.failures,
        *[(name, a.shape, a.dtype.str, a.tobytes()) for name, a in sorted(arrays.items())],
    ]  # fmt: skip


Tally = Callable[..., None]
Rounds = Callable[[int, int], int]


def judge(read: Callable[[], Any], wanted: Any) -> str:
    """Return what a read of a damaged file came to; anything but a refusal is a crash."""
    try:
        found = read()
    except FeatcacheError:
        return "refused"
    return "read equal" if found == wanted else "silent"


# --- caches


def test_damaged_caches_are_refused_or_read_equal(
    tmp_path: Path, rounds: Rounds, tally: Tally
) -> None:
    rng, numbers = random.Random(1), np.random.default_rng(1)
    features = {s: numbers.normal(size=(40, 3, 24)).astype("f4") for s in ("train", "valid")}
    write_cache(
        tmp_path / "made.h5", features,
        [0, 1] * 20, {s: [f"{s}/{i:03d}.png" for i in range(40)] for s in ("train", "valid")},
        classes=["covid", "normal"], groups=[f"g{i}" for i in range(40)],
    )  # fmt: skip
    path = tmp_path / "c.h5"
    for source in (tmp_path / "made.h5", GOLDEN):
        raw, wanted = source.read_bytes(), content(open_cache(source))
        for number in range(rounds(130, 3000)):
            path.write_bytes(damage(raw, rng))
            outcome = judge(lambda: content(open_cache(path)), wanted)
            assert outcome != "silent", f"round {number} of {source.name}"
            tally("damaged caches", outcome)


def test_repair_of_damaged_caches_keeps_only_true_rows(
    tmp_path: Path, rounds: Rounds, tally: Tally
) -> None:
    """Whatever the damage: the rows left are rows of the original, or the file is refused."""
    rng, numbers = random.Random(2), np.random.default_rng(2)
    raw = write_cache(
        tmp_path / "c.h5", numbers.normal(size=(60, 40)).astype("f4"), [0, 1] * 30,
        [f"{i:03d}.png" for i in range(60)], classes=["a", "b"], groups=["g"] * 60,
    ).path.read_bytes()  # fmt: skip
    path = tmp_path / "c.h5"
    true = rows_of(open_cache(path))
    for number in range(rounds(12, 200)):
        damaged = damage(raw, rng)
        path.write_bytes(damaged)
        try:
            result = verify(path, repair=True)
        except FeatcacheError:
            assert path.read_bytes() == damaged
            tally("repaired caches", "refused")
            continue
        cache = open_cache(path)
        left = rows_of(cache)
        assert left.items() <= true.items(), f"round {number}"
        assert len(left) + len(result.dropped) == len(true)
        assert len(left) + len(cache.failures) == len(true)
        assert (cache.classes, cache.identity) == (("a", "b"), open_cache(path).identity)
        tally("repaired caches", "of true rows, the others listed")


def rows_of(cache: Cache) -> dict[str, Any]:
    split = cache.splits["all"]
    assert split.groups is not None
    columns = (split.features, split.targets, split.image_sha256, split.image_bytes, split.mtime_ns)
    return {
        path: (split.groups[i], *(column[i].tobytes() for column in columns))
        for i, path in enumerate(split.paths)
    }


# --- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rng, splits = np.random.default_rng(0), ("train", "valid", "test")
    write_cache(
        folder / "c.h5", {s: rng.normal(size=(20, 6)).astype("f4") for s in splits},
        [0, 1] * 10, {s: [f"{s}/{i:03d}" for i in range(20)] for s in splits},
        classes=["covid", "normal"],
    )  # fmt: skip
    train(folder / "c.h5", folder / "run", epochs=2, hidden=(8,), device="cpu")
    return folder / "run"


def facts_of(folder: Path) -> list[Any]:
    """All that is read of a run."""
    run = load_run(folder)
    state = {name: value.tobytes() for name, value in run.state.items()}
    return [
        run.head, run.training, run.seed, run.data_seed, run.classes, run.cache, run.weights_sha256,
        state,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["run.json", "head.safetensors"])
def test_damaged_runs_are_refused_or_read_equal(
    run: Path, name: str, rounds: Rounds, tally: Tally
) -> None:
    rng, file, wanted = random.Random(name), run / name, facts_of(run)
    raw = file.read_bytes()
    try:
        for number in range(rounds(100, 2000)):
            file.write_bytes(damage(raw, rng))
            outcome = judge(lambda: facts_of(run), wanted)
            assert outcome != "silent", f"round {number}"
            tally(f"damaged {name}", outcome)
        file.write_bytes(raw[: len(raw) // 2])
        for use in (
            lambda: evaluate(run), lambda: predict(run, cache=run.parent / "c.h5"),
            lambda: evaluate(run, cache=run.parent / "c.h5"),
        ):  # fmt: skip
            assert judge(use, None) == "refused"
    finally:
        file.write_bytes(raw)


def preds_of(run: Path) -> tuple[str, ...]:
    with pytest.warns(FeatcacheWarning, match="was trained on"):
        return predict(run, cache=run.parent / "c.h5").preds


@pytest.mark.parametrize("name", ["history.csv", "environment.json"])
def test_files_for_people_only_are_not_relied_on(run: Path, name: str, tally: Tally) -> None:
    """Nobody reads these two: however damaged, figures and predictions are the same."""
    rng, file = random.Random(name), run / name
    raw, wanted = file.read_bytes(), (facts_of(run), preds_of(run))
    try:
        for _ in range(10):
            file.write_bytes(damage(raw, rng))
            assert (facts_of(run), preds_of(run)) == wanted
            tally(f"damaged {name}", "read by nobody")
    finally:
        file.write_bytes(raw)


# --- shards and the manifest


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """Images, an unfinished extraction of them, and what an uninterrupted one comes to."""
    folder = tmp_path_factory.mktemp("unfinished")
    data = write_tree(folder / "data", {"train": 4, "valid": 2, "test": 2})
    extract(data, folder / "whole.h5", backbone=tiny_backbone, engine="eager", batch_size=4)
    broken = {data / "valid" / "covid" / "vac000_0.jpg", data / "valid" / "covid" / "vac000_1.png"}
    kept = {path: (path.read_bytes(), path.stat()) for path in broken}
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="at most 0"):  # the last split fails: the others are done
        extract(
            data, folder / "c.h5", backbone=tiny_backbone, engine="eager", batch_size=4,
            max_errors=0,
        )  # fmt: skip
    for path, (raw, status) in kept.items():
        path.write_bytes(raw)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    shutil.copytree(partial_folder(folder / "c.h5"), folder / "kept")
    return folder


def arrays_of(cache: Cache) -> list[Any]:
    names = sorted(name for name in cache.container.arrays if name.startswith("splits/"))
    return [(name, np.array(cache.container.map(name)).tobytes()) for name in names]


def test_resuming_from_damage_gives_the_same_arrays_or_a_refusal(
    unfinished: Path, tiny_backbone: Backbone, rounds: Rounds, tally: Tally
) -> None:
    rng, path = random.Random(3), unfinished / "c.h5"
    wanted = arrays_of(open_cache(unfinished / "whole.h5"))
    names = sorted(p.name for p in (unfinished / "kept").iterdir() if p.name != "lock")
    assert names[0] == "manifest.json"
    assert len(names) > 1, "a shard to damage"
    for number in range(rounds(24, 1000)):
        name = names[number % len(names)]
        path.unlink(missing_ok=True)
        shutil.rmtree(partial_folder(path), ignore_errors=True)
        shutil.copytree(unfinished / "kept", partial_folder(path))
        file = partial_folder(path) / name
        file.write_bytes(damage(file.read_bytes(), rng))
        try:
            extract(unfinished / "data", path, backbone=tiny_backbone, engine="eager", batch_size=4)
        except CacheError as error:
            refusal = str(error)
            if name != "manifest.json" or "--rebuild" not in refusal:
                raise  # a damaged shard is made again
            tally("damaged manifest", "refused, --rebuild")
            continue
        assert arrays_of(open_cache(path)) == wanted, f"round {number}, {name}"
        tally(f"damaged {name.split('.')[0]}", "the arrays of an uninterrupted run")


def test_verify_says_how_far_an_extraction_is(unfinished: Path) -> None:
    path = unfinished / "d.h5"
    shutil.copytree(unfinished / "kept", partial_folder(path))
    with pytest.raises(
        FeatcacheError, match=r"unfinished extraction, \d+ images? in \d+ shards? \("
    ):
        verify(path)
    (shard, *_) = sorted(partial_folder(path).glob("shard.*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"~")
    with pytest.raises(FeatcacheError, match=rf"1 of them damaged: {shard.name} .*makes damaged"):
        verify(path)
    (partial_folder(path) / "manifest.json").write_bytes(b"{")
    with pytest.raises(FeatcacheError, match="manifest cannot be read"):
        verify(path)


# --- the golden cache


def test_the_golden_cache_verifies_whole(tally: Tally) -> None:
    """Of format 1, from before rows had checksums: opens and verifies for ever."""
    assert verify(GOLDEN).num_rows == sum(len(s) for s in open_cache(GOLDEN).splits.values())
    tally("golden cache of format 1", "whole")
