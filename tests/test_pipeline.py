"""Samples to features with real files, threads and children: order, failures, ends, memory."""

import dataclasses
import functools
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import tiny_network
import torch
from conftest import write_image
from test_isolation import FRAGILE

from featcache import pipeline
from featcache.dataset import scan
from featcache.engine import build_engine, run_padded
from featcache.errors import ConfigError, DataError
from featcache.images import PixelRules, decode
from featcache.isolation import IsolatedDecoder
from featcache.pipeline import resolve_workers, stream_features, stream_pixels
from featcache.runtime import Timer

RULES = PixelRules(32)
BATCH = 4
TIMEOUT = 60


@pytest.fixture(scope="module")
def engine():
    return build_engine(
        tiny_network.build(), torch.device("cpu"), np.zeros((0, 32, 32, 3), np.uint8),
        batch_size=BATCH,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """22 images of two classes: five full batches and a tail of two."""
    for i in range(22):
        name = ("covid", "normal")[i % 2]
        write_image(tmp_path / "data" / name / f"{i:02d}.{'png' if i % 3 else 'jpg'}", i)
    return tmp_path / "data"


_threads_of_before = set()


@pytest.fixture(autouse=True)
def threads_of_before():
    """Let a test that fails and leaves threads behind fail alone."""
    _threads_of_before.clear()
    _threads_of_before.update(threading.enumerate())
    yield
    assert wait_until(lambda: not decoding_threads()), decoding_threads()


def decoding_threads():
    started = set(threading.enumerate()) - _threads_of_before
    return [thread for thread in started if thread.name.startswith("featcache")]


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def collect(stream):
    """Return {path: features} of what is good, and all outcomes in order."""
    rows, outcomes = {}, []
    for batch in stream:
        good = [outcome for outcome in batch.outcomes if outcome.reason is None]
        assert batch.features.shape == (len(good), 24)
        assert batch.features.dtype == np.float32
        rows.update(zip((o.sample.path for o in good), batch.features, strict=True))
        outcomes += batch.outcomes
    return rows, outcomes


def assert_same_rows(found, truth):
    assert found.keys() == truth.keys()
    assert all(np.array_equal(found[path], truth[path]) for path in truth)


def truth_of(dataset, samples, engine):
    """Return features by no pipeline at all: one image after the other."""
    pixels = {s.path: decode(dataset.read(s), RULES).pixels for s in samples}
    return {path: run_padded(engine, image[None])[0] for path, image in pixels.items()}


# ----------------------------------------------------------------------------- the same, in order


@pytest.mark.parametrize("workers", [1, 3, "auto"])
def test_features_are_those_of_each_image_alone_in_order(folder, engine, workers):
    dataset = scan(folder)
    timer = Timer()
    stream = stream_features(dataset, dataset.samples, engine, RULES, workers=workers, timer=timer)
    rows, outcomes = collect(stream)
    assert [outcome.sample for outcome in outcomes] == list(dataset.samples)
    assert_same_rows(rows, truth_of(dataset, dataset.samples, engine))
    for outcome in outcomes:
        assert outcome.reason is None
        assert not outcome.truncated
        data = (folder / outcome.sample.path).read_bytes()
        assert outcome.sha256 == hashlib.sha256(data).digest()
    assert timer.seconds.keys() == {"waiting", "forward"}
    assert min(timer.seconds.values()) > 0


def test_features_do_not_depend_on_neighbours_or_order(folder, engine):
    dataset = scan(folder)
    truth, _ = collect(stream_features(dataset, dataset.samples, engine, RULES))
    shuffled = random.Random(1).sample(dataset.samples, len(dataset.samples))
    rows, outcomes = collect(stream_features(dataset, shuffled, engine, RULES, workers=4))
    assert [outcome.sample for outcome in outcomes] == shuffled
    assert_same_rows(rows, truth)
    few = shuffled[5:8]
    rows, _ = collect(stream_features(dataset, few, engine, RULES))
    assert_same_rows(rows, {sample.path: truth[sample.path] for sample in few})


def test_batches_have_one_shape_and_zeros_where_there_is_no_image(folder):
    dataset = scan(folder)
    bad = dataset.samples[1]
    (folder / bad.path).write_bytes(b"not an image")
    batches = list(stream_pixels(dataset, dataset.samples, RULES, BATCH))
    assert [len(outcomes) for outcomes, _ in batches] == [4, 4, 4, 4, 4, 2]
    for outcomes, pixels in batches:
        assert (pixels.shape, pixels.dtype) == ((BATCH, 32, 32, 3), np.uint8)
        for slot in range(BATCH):
            if slot < len(outcomes) and outcomes[slot].sample != bad:
                data = dataset.read(outcomes[slot].sample)
                assert np.array_equal(pixels[slot], decode(data, RULES).pixels)
            else:
                assert not pixels[slot].any()


@pytest.mark.parametrize("isolate", [False, True])
def test_nothing_in_nothing_out(folder, engine, isolate):
    dataset = scan(folder)
    assert list(stream_features(dataset, [], engine, RULES, isolate=isolate)) == []


def test_workers_are_counted():
    assert resolve_workers("auto") >= 2
    assert resolve_workers(1) == 1
    for wrong in (0, -1, 257, 1.5, "2", None):
        with pytest.raises(ConfigError, match="--workers"):
            resolve_workers(wrong)


# --------------------------------------------------------------------------------------- failures


def test_failed_images_are_listed_with_their_reasons_and_cost_only_themselves(folder, engine):
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    page, cut, gone, *_ = bad = [dataset.samples[i] for i in (0, 5, 10, 12, 13, 14, 15)]
    (folder / page.path).write_bytes(b"<html>log in</html>")
    whole = (folder / cut.path).read_bytes()
    (folder / cut.path).write_bytes(whole[: len(whole) // 2])
    (folder / gone.path).unlink()
    for sample in bad[3:]:  # all four of one batch
        (folder / sample.path).write_bytes(b"")
    shapes = set()

    def forward(pixels):
        shapes.add(pixels.shape)
        return engine.forward(pixels)

    spied = dataclasses.replace(engine, forward=forward)
    rows, outcomes = collect(stream_features(dataset, dataset.samples, spied, RULES))
    assert [outcome.sample for outcome in outcomes] == list(dataset.samples)
    assert shapes == {(BATCH, 32, 32, 3)}  # also where images are missing, or rows would change
    failed = {outcome.sample: outcome for outcome in outcomes if outcome.reason is not None}
    assert failed.keys() == set(bad)
    for sample, outcome in failed.items():
        with pytest.raises(DataError) as caught:
            decode(dataset.read(sample), RULES)
        assert outcome.reason == str(caught.value.found)
        assert "\n" not in outcome.reason
    assert failed[page].sha256 == hashlib.sha256(b"<html>log in</html>").digest()
    assert failed[gone].sha256 == bytes(32)
    assert_same_rows(rows, {k: v for k, v in truth.items() if k not in {s.path for s in bad}})


@pytest.mark.parametrize("error", [OSError("stale file\nhandle"), MemoryError()])
def test_errors_of_the_system_fail_the_image_with_a_line(folder, engine, error, monkeypatch):
    dataset = scan(folder)
    bad = dataset.samples[6]

    def read(self, sample):
        if sample == bad:
            raise error
        return real_read(self, sample)

    real_read = type(dataset).read
    monkeypatch.setattr(type(dataset), "read", read)
    rows, outcomes = collect(stream_features(dataset, dataset.samples, engine, RULES))
    assert len(rows) == 21
    assert outcomes[6].reason
    assert "\n" not in outcomes[6].reason


def test_images_that_were_filled_in_are_marked(folder, engine):
    dataset = scan(folder)
    cut = next(s for s in dataset.samples if s.path.endswith("jpg"))
    whole = (folder / cut.path).read_bytes()
    (folder / cut.path).write_bytes(whole[: len(whole) * 2 // 3])
    rules = PixelRules(32, truncated="keep")
    rows, outcomes = collect(stream_features(dataset, dataset.samples, engine, rules))
    assert len(rows) == 22
    assert [o.sample for o in outcomes if o.truncated] == [cut]


# ----------------------------------------------------------------------------------- what hangs


def marked(folder, dataset, index, marker):
    """Append a marker to an image, which stays the same image; returns the sample."""
    sample = dataset.samples[index]
    with (folder / sample.path).open("ab") as file:
        file.write(marker)
    return sample


@pytest.fixture
def hanging_threads(monkeypatch):
    """Make decode hang in threads, on marked images, until the test ends."""
    released = threading.Event()

    def hanging(data, rules):
        if data.endswith(b"HANG"):
            released.wait(TIMEOUT)
        return decode(data, rules)

    monkeypatch.setattr(pipeline, "decode", hanging)
    monkeypatch.setattr(pipeline, "DECODE_SECONDS", 1.0)
    yield released
    released.set()


@pytest.fixture
def fragile_children(tmp_path, monkeypatch):
    """Make decode hang or crash in children, on marked images; hangs end after 3 s."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FRAGILE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setattr(pipeline, "IsolatedDecoder", functools.partial(IsolatedDecoder, 3.0))


def test_images_that_only_seem_to_hang_are_had_from_the_child(
    folder, engine, hanging_threads, monkeypatch
):
    """More of them than there are threads: each is replaced."""
    num_in_child = Counter()

    class Counting(IsolatedDecoder):
        def decode(self, data, rules):
            num_in_child["images"] += 1
            return super().decode(data, rules)

    monkeypatch.setattr(pipeline, "IsolatedDecoder", Counting)
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    for index in (2, 3, 9):
        marked(folder, dataset, index, b"HANG")
    stream = stream_features(dataset, dataset.samples, engine, RULES, workers=2)
    rows, outcomes = collect(stream)
    assert [outcome.sample for outcome in outcomes] == list(dataset.samples)
    assert_same_rows(rows, truth)
    assert 3 <= num_in_child["images"] < 8  # not all the 19 others, if some on a busy machine
    hanging_threads.set()
    # Threads that come back late find that they are no longer needed, and end like the others.
    assert wait_until(lambda: not decoding_threads()), decoding_threads()


def test_an_image_that_hangs_everywhere_costs_only_itself(
    folder, engine, hanging_threads, fragile_children
):
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    bad = marked(folder, dataset, 7, b"HANG")
    rows, outcomes = collect(stream_features(dataset, dataset.samples, engine, RULES, workers=1))
    assert [(o.sample, o.reason) for o in outcomes if o.reason] == [(bad, "it hung for 3 s")]
    del truth[bad.path]
    assert_same_rows(rows, truth)


def test_the_process_can_end_though_a_thread_hangs(folder):
    code = f"""
import sys, time
from featcache import pipeline
from featcache.dataset import scan
from featcache.images import PixelRules, decode

def hanging(data, rules):
    if data.endswith(b"HANG"):
        time.sleep(600)
    return decode(data, rules)

pipeline.decode, pipeline.DECODE_SECONDS = hanging, 0.5
dataset = scan({str(folder)!r})
stream = pipeline.stream_pixels(dataset, dataset.samples, PixelRules(32), {BATCH}, workers=2)
print(sum(outcome.reason is None for outcomes, _ in stream for outcome in outcomes))
"""
    marked(folder, scan(folder), 3, b"HANG")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (result.stdout, result.returncode) == ("22\n", 0), result.stderr


# --------------------------------------------------------------------------------------- isolation


def test_isolated_decoding_gives_the_same_features(folder, engine):
    dataset = scan(folder)
    (folder / dataset.samples[4].path).write_bytes(b"GIF89a")
    rows, outcomes = collect(stream_features(dataset, dataset.samples, engine, RULES))
    isolated = stream_features(dataset, dataset.samples, engine, RULES, isolate=True)
    isolated_rows, isolated_outcomes = collect(isolated)
    assert_same_rows(isolated_rows, rows)
    assert isolated_outcomes == outcomes


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSEGV to send")
def test_images_that_crash_an_isolated_decoder_cost_only_themselves(
    folder, engine, fragile_children
):
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    bad = [marked(folder, dataset, index, b"CRASH") for index in (0, 8, 9)]
    stream = stream_features(dataset, dataset.samples, engine, RULES, isolate=True)
    rows, outcomes = collect(stream)
    failed = [(o.sample, o.reason) for o in outcomes if o.reason]
    assert failed == [(sample, "it crashed") for sample in bad]
    for sample in bad:
        del truth[sample.path]
    assert_same_rows(rows, truth)


def test_an_image_that_hangs_an_isolated_decoder_costs_only_itself(
    folder, engine, fragile_children, monkeypatch
):
    """The child's own clock counts here, not that of the threads."""
    monkeypatch.setattr(pipeline, "DECODE_SECONDS", 0.5)
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    bad = marked(folder, dataset, 1, b"HANG")
    stream = stream_features(dataset, dataset.samples, engine, RULES, isolate=True)
    rows, outcomes = collect(stream)
    assert [(o.sample, o.reason) for o in outcomes if o.reason] == [(bad, "it hung for 3 s")]
    del truth[bad.path]
    assert_same_rows(rows, truth)


# ----------------------------------------------------------------------------- ends and limits


@pytest.mark.parametrize("isolate", [False, True])
def test_a_consumer_may_stop_early(folder, engine, isolate):
    dataset = scan(folder)
    many = dataset.samples * 10
    children = []
    for num_batches in (0, 1, 3):
        stream = stream_features(dataset, many, engine, RULES, workers=3, isolate=isolate)
        for _ in range(num_batches):
            next(stream)
        children += [t for t in decoding_threads() if t not in children]
        stream.close()
        assert wait_until(lambda: not decoding_threads())
    assert len(children) == (2 if isolate else 6)  # none before the first batch is asked for


def test_an_error_of_the_network_ends_everything(folder, engine):
    dataset = scan(folder)
    calls = Counter()

    def forward(pixels):
        calls["forward"] += 1
        if calls["forward"] == 3:
            raise RuntimeError("out of memory")
        return engine.forward(pixels)

    broken = dataclasses.replace(engine, forward=forward)
    stream = stream_features(dataset, dataset.samples, broken, RULES)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    assert wait_until(lambda: not decoding_threads())


def test_a_bug_in_a_decoder_is_not_taken_for_a_bad_image(folder, engine, monkeypatch):
    dataset = scan(folder)
    marked(folder, dataset, 9, b"BUG")

    def buggy(data, rules):
        if data.endswith(b"BUG"):
            raise IndexError("a bug")
        return decode(data, rules)

    monkeypatch.setattr(pipeline, "decode", buggy)
    stream = stream_features(dataset, dataset.samples, engine, RULES)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(IndexError, match="a bug"):
        next(stream)
    assert wait_until(lambda: not decoding_threads())


def test_no_more_than_the_stated_images_are_under_way(folder, monkeypatch):
    """And no fewer: the next ones are decoded while the consumer works."""
    dataset = scan(folder)
    samples = dataset.samples * 8
    num_decoded = Counter()

    def counting(data, rules):
        image = decode(data, rules)
        num_decoded["images"] += 1
        return image

    monkeypatch.setattr(pipeline, "decode", counting)
    stream = stream_pixels(dataset, samples, RULES, BATCH, workers=1)
    for given, _batch in enumerate(stream, start=1):
        ahead = max(3, 32 // BATCH)  # batches: the bound of the module's docstring
        limit = min(len(samples), (given + ahead) * BATCH)
        assert wait_until(lambda limit=limit: num_decoded["images"] >= limit)
        time.sleep(0.02)  # time to do too much
        assert num_decoded["images"] == limit
    assert num_decoded["images"] == len(samples)


def test_decoding_goes_on_while_the_network_runs(folder, engine, monkeypatch):
    """Twelve waits of 0.1 s by three threads, while the network takes its own 0.1 s a batch."""
    dataset = scan(folder)
    samples = dataset.samples[:12]

    def slow(data, rules):
        time.sleep(0.1)
        return decode(data, rules)

    monkeypatch.setattr(pipeline, "decode", slow)
    together = Counter()

    def forward(pixels):
        time.sleep(0.1)
        together["forward"] += 1
        return engine.forward(pixels)

    slow_engine = dataclasses.replace(engine, forward=forward)
    start = time.monotonic()
    collect(stream_features(dataset, samples, slow_engine, RULES, workers=3))
    assert together["forward"] == 3
    assert time.monotonic() - start < 1.2  # one after the other it takes 1.5 s
