"""Features read in shuffled blocks from their file: the same rows, well mixed, within memory."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import CONTEXT

from featcache.cache.reading import Cache, open_cache
from featcache.cache.writing import write_cache
from featcache.errors import CacheError
from featcache.evaluation.evaluation import evaluate
from featcache.heads import passes
from featcache.heads import rows as partition
from featcache.heads.batches import BatchSampler, TrainingData
from featcache.heads.compiled.numpy_kernels import shuffle
from featcache.heads.config import FitResult, HeadJob, TrainingConfig
from featcache.heads.fit import fit_head, fit_heads
from featcache.heads.head import HeadConfig, initial_state
from featcache.heads.prediction import predict_probs
from featcache.heads.rows import choose_rows, read_rows
from featcache.heads.streaming import StoredFeatures
from featcache.heads.training import train
from featcache.memory import available_memory
from featcache.runtime import CPU, log_line
from featcache.sweeps.folds import Pool

WIDTH, NUM_CLASSES = 16, 3


def make_cache(
    path: Path, num_rows: int = 900, *, views: int = 0, dtype: str = "f4", width: int = WIDTH,
    signal: float = 0.5,
) -> Cache:  # fmt: skip
    """Write classes that overlap; as always, rows lie by class."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(NUM_CLASSES, width)) * signal
    arrays: tuple[dict[str, Any], ...] = ({}, {}, {})
    for split, n in (("train", num_rows), ("valid", num_rows // 4)):
        targets = np.sort(rng.integers(0, NUM_CLASSES, n))
        shape = (n, views, width) if views and split == "train" else (n, width)
        x = rng.standard_normal(shape, dtype="f4")
        x += centres[targets].astype("f4").reshape(n, *[1] * (len(shape) - 2), width)
        paths = [f"{split}/{t}/{i:07d}" for i, t in enumerate(targets)]
        for array, value in zip(arrays, (x.astype(dtype), targets, paths), strict=True):
            array[split] = value
    return write_cache(path, *arrays, classes=[str(c) for c in range(NUM_CLASSES)])


def stored(cache: Cache, block_rows: int, split: str = "train") -> StoredFeatures:
    """Return a split's features in blocks of so many rows."""
    features = StoredFeatures(cache.splits[split], np.arange(len(cache.splits[split])))
    return features.in_blocks(block_rows * features.shape[-1] * features.dtype.itemsize)


def sample(features: Any, seed: int = 3) -> BatchSampler:
    targets = np.zeros(len(features), int)
    return BatchSampler(TrainingData.of(features, targets, None, None, None, [], seed), shuffle)


def fit(cache: Cache, train_features: Any, valid_features: Any, **options: Any) -> FitResult:
    settings: dict[str, Any] = {"seed": 0, "data_seed": 0, "epochs": 5} | options
    epochs, targets = settings.pop("epochs"), [cache.splits[s].targets for s in ("train", "valid")]
    return fit_head(
        HeadConfig(cache.num_features, NUM_CLASSES, (8,)),
        TrainingConfig(epochs=epochs, learning_rate=0.003, batch_size=32), train_features,
        targets[0], valid_features, targets[1], device=CPU, **settings,
    )  # fmt: skip


def kept_loss(result: FitResult) -> float:
    """Return the validation loss of the epoch that was kept."""
    loss: float = result.history[result.best_epoch - 1]["valid_loss"]
    return loss


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("views", [0, 4])
def test_one_block_gives_the_batches_of_memory(tmp_path: Path, views: int, dtype: str) -> None:
    cache = make_cache(tmp_path / "c.h5", 333, views=views, dtype=dtype)
    array = np.array(cache.splits["train"].features)
    in_memory, in_blocks = sample(array), sample(stored(cache, 333))
    for _ in range(2):
        wanted = [(rows, features.copy()) for rows, features in in_memory.epoch(32)]
        found = list(in_blocks.epoch(32))
        assert len(wanted) == len(found) == 2  # 256 rows and the rest
        for (rows, features), (other_rows, other) in zip(wanted, found, strict=True):
            assert np.array_equal(rows, other_rows)
            assert np.array_equal(features, other)
    valid = cache.splits["valid"].plain_features
    one, two = fit(cache, array, valid), fit(cache, stored(cache, 333), stored(cache, 40, "valid"))
    assert all(np.array_equal(one.state[name], two.state[name]) for name in one.state)


@pytest.mark.parametrize(("num_rows", "batch_size", "left_out"), [
    (900, 32, 0), (897, 32, 1), (901, 100, 1), (130, 256, 0), (500, 7, 0),
])  # fmt: skip
def test_every_row_once_an_epoch_by_the_seed_and_anew(
    tmp_path: Path, num_rows: int, batch_size: int, left_out: int
) -> None:
    cache = make_cache(tmp_path / "c.h5", num_rows)
    array, features = cache.splits["train"].features, stored(cache, 100)
    one, same, other = sample(features), sample(features), sample(features, seed=4)
    orders, at_once = [], max(1, 256 // batch_size) * batch_size
    for _ in range(2):
        batches = list(one.epoch(batch_size))
        sizes = [len(rows) for rows, _ in batches]
        assert set(sizes[:-1]) <= {at_once}
        assert 0 < sizes[-1] <= at_once
        assert sizes[-1] % batch_size != 1
        for rows, values in batches:
            assert np.array_equal(array[rows], values)
        orders.append(np.concatenate([rows for rows, _ in batches]))
        assert len(orders[-1]) == len(np.unique(orders[-1])) == num_rows - left_out
        assert np.array_equal(
            orders[-1], np.concatenate([rows for rows, _ in same.epoch(batch_size)])
        )
    assert not np.array_equal(*orders) or num_rows < 2
    assert not np.array_equal(
        orders[0], np.concatenate([rows for rows, _ in other.epoch(batch_size)])
    )


def test_selected_and_joined_rows_are_those_of_arrays(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5", 400, views=3)
    parts = choose_rows(cache, None, 0, log_line)
    in_memory = Pool.of(cache, parts)
    joined = StoredFeatures.join([part.features for part in parts]).in_blocks(4096)
    rng = np.random.default_rng(1)
    for share in (1.0, 0.5, 0.02):
        rows = np.flatnonzero(rng.random(len(joined)) < share)
        assert np.array_equal(joined[rows].load(), in_memory.features[rows])
        assert np.array_equal(joined.plain()[rows].load(), in_memory.plain[rows])
        batches = list(sample(joined[rows]).epoch(len(rows)))
        (numbers, values), options = batches[0], in_memory.features[rows]
        views = (options[numbers] == values[:, None]).all(2)
        assert views.any(1).all()
        assert len(set(views.argmax(1))) > 1, "views differ"


def test_blocks_of_a_cache_sorted_by_class_have_all_classes(tmp_path: Path) -> None:
    """64 chunks a block or more, of all stretches of the file."""
    cache = make_cache(tmp_path / "c.h5", 6000)
    targets = np.array(cache.splits["train"].targets)
    shares = np.bincount(targets) / len(targets)
    for batch, _ in sample(stored(cache, 500)).epoch(500):  # a batch is about a block
        found = np.bincount(targets[batch], minlength=NUM_CLASSES) / len(batch)
        assert np.abs(found - shares).max() < 0.05
    together = Counter[bool]()
    for batch, _ in sample(stored(cache, 512)).epoch(32):  # rows that were neighbours in the file
        gaps = np.abs(np.diff(batch))
        together.update((gaps <= 8).tolist())
    assert together[True] / together.total() < 0.1


def test_streamed_heads_are_as_good_as_those_of_memory(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5", 3000)
    arrays = [cache.splits[s].plain_features for s in ("train", "valid")]
    blocks = [stored(cache, 256, s) for s in ("train", "valid")]
    losses = np.array([
        [kept_loss(fit(cache, *x, data_seed=seed)) for seed in range(1, 6)]
        for x in (arrays, blocks)
    ])  # fmt: skip
    spread = np.ptp(losses[0])
    assert abs(losses[0].mean() - losses[1].mean()) < spread
    assert losses.max() < 0.6 < np.log(NUM_CLASSES)


def test_predictions_of_stored_features_are_those_of_arrays(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    config, split = HeadConfig(WIDTH, NUM_CLASSES, ()), cache.splits["train"]
    state = initial_state(config, seed=0)
    wanted = predict_probs(config, state, split.features)
    assert np.array_equal(predict_probs(config, state, stored(cache, 10)), wanted)


def test_a_feature_that_is_not_finite_is_found_in_its_block(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    entry = cache.container.entry("splits/train/features")
    with cache.path.open("r+b") as file:
        file.seek(entry.offset + (700 * WIDTH + 3) * 4)
        file.write(np.float32("nan").tobytes())
    damaged = open_cache(cache.path, verify=False)
    with pytest.raises(CacheError, match="NaN or infinity in row 700, train/2/0000700"):
        fit(damaged, stored(damaged, 100), stored(damaged, 100, "valid"))


def test_a_file_replaced_meanwhile_is_read_on_and_a_shorter_one_told(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    wanted, features = np.array(cache.splits["train"].features), stored(cache, 100)
    make_cache(tmp_path / "new.h5", 90).path.replace(cache.path)
    assert np.array_equal(features.load(), wanted)
    cache = make_cache(tmp_path / "d.h5")
    features = stored(cache, 100)
    os.truncate(cache.path, 8192)
    with pytest.raises(CacheError, match="the file that was opened"):
        features.load()


# --- memory


def test_what_has_no_room_is_streamed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "c.h5")
    parts, said = choose_rows(cache, None, 0, log_line), list[str]()
    assert all(isinstance(x, np.ndarray) for x in read_rows(parts, CPU, said.append))
    assert said == []
    need = (900 + 225) * WIDTH * 4
    for memory, fits in ((need / 0.75 + 1, True), (need / 0.75 - 1, False)):
        monkeypatch.setattr(partition, "available_memory", lambda *_, room=memory: room)
        features = read_rows(parts, CPU, said.append)
        assert all(isinstance(x, np.ndarray) == fits for x in features)
    (line,) = said
    assert line == (
        "features: 7.2e-05 GB, memory for them: 7.2e-05 GB; streaming in blocks of 16,384 rows "
        "from the file"
    )


def test_heads_are_cut_to_memory_and_end_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, said = make_cache(tmp_path / "c.h5", 200), list[str]()
    x, y = cache.splits["train"].features, cache.splits["train"].targets
    training = TrainingConfig(epochs=2, batch_size=32)
    jobs = [HeadJob(HeadConfig(WIDTH, NUM_CLASSES, (8,)), training, seed) for seed in range(6)]
    wanted = fit_heads(jobs, x, y, data_seed=0, device=CPU, say=said.append)
    assert said == []
    monkeypatch.setattr(passes, "available_memory", lambda _: 0)
    found = fit_heads(jobs, x, y, data_seed=0, device=CPU, say=said.append)
    assert said == ["heads: 6, memory for them: 0 GB; training 1 at a time"]
    for one, two in zip(wanted, found, strict=True):
        for name in one.state:
            assert np.array_equal(one.state[name], two.state[name])


def test_rows_that_are_drawn_are_counted() -> None:
    """256 at least, however few are in a batch."""
    features, targets = np.zeros((4, 1280), "f4"), np.zeros(4, int)
    data = TrainingData.of(features, targets, None, None, None, [], 0)
    job = HeadJob(HeadConfig(1280, 2, ()), TrainingConfig(batch_size=2), 0)
    assert passes._count_bytes(job, data, CPU)[1] >= 256 * 1280 * 4


def _limit_memory(more_bytes: int) -> None:
    """Allow this process so much more address space than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assert available_memory(CPU) <= more_bytes


def _train_limited(path: Path, more_bytes: int | None, seed: int, results: Any) -> None:
    """Train, in a process of its own, with so much more address space than it has."""
    torch.set_num_threads(1)
    # What the first training takes anyway: libraries and compiled kernels.
    fit_head(
        HeadConfig(4, 2, (16,)), TrainingConfig(epochs=1, batch_size=256),
        np.ones((512, 4), "f4"), np.arange(512) % 2, seed=0, data_seed=0, device=CPU,
    )  # fmt: skip
    if more_bytes is not None:
        _limit_memory(more_bytes)
    said: list[str] = []
    summary = train(
        path, path.with_name(f"run-{more_bytes}-{seed}"), hidden=(16,), epochs=3, batch_size=256,
        seed=seed, device="cpu", say=said.append,
    )  # fmt: skip
    results.put((summary.valid_loss, [line for line in said if line.startswith("features:")]))


def _evaluate_limited(path: Path, more_bytes: int, run: Path, results: Any) -> None:
    """As ``_train_limited``; what draws the confusion matrix is loaded by the fork server."""

    torch.set_num_threads(1)
    _limit_memory(more_bytes)
    results.put(evaluate(run, cache=path, split="train")["num_samples"])


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_cache_twice_the_memory_trains_to_the_same_loss_and_is_evaluated(
    tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    width, megabytes = 1280, rounds(80, 640)
    num_rows = (megabytes << 20) // (width * 4) * 4 // 5
    cache = make_cache(tmp_path / "c.h5", num_rows, width=width, signal=0.05)
    limit = cache.path.stat().st_size // 2
    losses: dict[bool, list[float]] = {False: [], True: []}

    def call(function: Callable[..., None], *arguments: Any) -> Any:
        results = CONTEXT.SimpleQueue()
        child = CONTEXT.Process(target=function, args=(cache.path, *arguments, results))
        child.start()
        child.join(240)
        assert child.exitcode == 0
        answer = results.get()
        results.close()
        return answer

    for is_limited, found in losses.items():
        for seed in range(3):
            loss, lines = call(_train_limited, limit if is_limited else None, seed)
            found.append(loss)
            assert len(lines) == is_limited
    spread = np.ptp(losses[False])
    assert abs(np.mean(losses[True]) - np.mean(losses[False])) < spread, losses
    assert max(map(max, losses.values())) < 0.9 * np.log(NUM_CLASSES)
    # More than for the training, as libraries take what they take; less than the split alone is.
    room = limit * 3 // 2
    assert room < num_rows * width * 4
    assert call(_evaluate_limited, room, tmp_path / f"run-{limit}-0") == num_rows
