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
from fragile_images import FRAGILE
from sample_images import write_image

from featcache.backbones.engine import build_engine
from featcache.data.dataset import scan
from featcache.errors import ConfigError, DataError
from featcache.extraction import pipeline, view_stream
from featcache.extraction.pipeline import Lane, find_bottleneck, images_under_way, stream_features
from featcache.extraction.recipe import Recipe
from featcache.extraction.view_stream import resolve_workers, stream_views
from featcache.pixels import acceleration
from featcache.pixels.images import PixelRules, decode
from featcache.pixels.isolation import IsolatedDecoder
from featcache.pixels.views import ViewRules, render
from featcache.runtime import Timer

RULES = PixelRules(32)
RECIPE = Recipe(tiny_network.build(), RULES, "float32")
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


def run(dataset, samples, engine, rules, **options):
    lane = Lane(dataclasses.replace(RECIPE, rules=rules), engine)
    return stream_features(dataset, samples, [lane], **options)


def collect(stream):
    """Return {path: features} of what is good, and all outcomes in order."""
    rows, outcomes = {}, []
    for batch in stream:
        for outcome, features in zip(batch.outcomes, batch.features[0], strict=True):
            assert (features is None) == (outcome.reason is not None)
            if features is not None:
                assert (features.shape, features.dtype) == ((1, 24), np.float32)
                rows[outcome.sample.path] = features[0]
        outcomes += batch.outcomes
    return rows, outcomes


def assert_same_rows(found, truth):
    assert found.keys() == truth.keys()
    assert all(np.array_equal(found[path], truth[path]) for path in truth)


def truth_of(dataset, samples, engine):
    """Return features by no pipeline at all: one image after the other."""
    pixels = {s.path: decode(dataset.read(s), RULES).pixels for s in samples}
    return {path: engine.run(image[None])[0] for path, image in pixels.items()}


# ----------------------------------------------------------------------------- the same, in order


@pytest.mark.parametrize("workers", [1, 3, "auto"])
def test_features_are_those_of_each_image_alone_in_order(folder, engine, workers):
    dataset = scan(folder)
    timer = Timer()
    stream = run(dataset, dataset.samples, engine, RULES, workers=workers, timer=timer)
    rows, outcomes = collect(stream)
    assert [outcome.sample for outcome in outcomes] == list(dataset.samples)
    assert_same_rows(rows, truth_of(dataset, dataset.samples, engine))
    for outcome in outcomes:
        assert outcome.reason is None
        assert not outcome.truncated
        data = (folder / outcome.sample.path).read_bytes()
        assert outcome.sha256 == hashlib.sha256(data).digest()
    assert timer.seconds.keys() == {
        "decode",
        "forward",
        "waiting for decode",
        "waiting for forward",
    }
    assert min(timer.seconds.values()) > 0


def test_features_do_not_depend_on_neighbours_or_order(folder, engine):
    dataset = scan(folder)
    truth, _ = collect(run(dataset, dataset.samples, engine, RULES))
    shuffled = random.Random(1).sample(dataset.samples, len(dataset.samples))
    rows, outcomes = collect(run(dataset, shuffled, engine, RULES, workers=4))
    assert [outcome.sample for outcome in outcomes] == shuffled
    assert_same_rows(rows, truth)
    few = shuffled[5:8]
    rows, _ = collect(run(dataset, few, engine, RULES))
    assert_same_rows(rows, {sample.path: truth[sample.path] for sample in few})


def test_an_outcome_says_which_of_the_samples_it_is_of(folder, engine):
    """Asked for some, in an order of their own."""
    dataset = scan(folder)
    asked, positions = [], [7, 3, 3 + 11, 0, 21, 20]
    lane = Lane(RECIPE, engine, lambda position, _: asked.append(position) or position != 3)
    stream = stream_features(dataset, dataset.samples, [lane], positions=positions, workers=3)
    rows = [row for batch in stream for row in zip(batch.outcomes, batch.features[0], strict=True)]
    assert [outcome.position for outcome, _ in rows] == positions
    assert [outcome.sample for outcome, _ in rows] == [dataset.samples[p] for p in positions]
    assert [features is None for _, features in rows] == [p == 3 for p in positions]
    assert sorted(asked) == sorted(positions)


def test_views_are_those_of_each_image_and_nothing_where_there_is_none(folder):
    dataset = scan(folder)
    bad = dataset.samples[1]
    (folder / bad.path).write_bytes(b"not an image")
    larger = dataclasses.replace(RECIPE, rules=PixelRules(48))
    chunks = list(stream_views(dataset, dataset.samples, [RECIPE, larger, RECIPE], BATCH))
    assert [len(outcomes) for outcomes, _ in chunks] == [4, 4, 4, 4, 4, 2]
    for outcomes, views in chunks:
        for outcome, of_image in zip(outcomes, views, strict=True):
            if outcome.sample == bad:
                assert of_image is None
                continue
            data = dataset.read(outcome.sample)
            assert of_image[0] is of_image[2]  # made once for both
            for found, side in ((of_image[0], 32), (of_image[1], 48)):
                assert (found.shape, found.dtype) == ((1, side, side), np.uint8)  # these are grey
                assert np.array_equal(found[0], decode(data, PixelRules(side)).pixels[:, :, 0])


def test_equal_pixels_of_copies_are_run_once_as_far_as_memory_was_set_aside(
    folder, engine, monkeypatch
):  # fmt: skip
    """By bytes, as 64 views of 2,048 features are 100 times what an image has alone."""
    first = next(folder.rglob("*.png"))
    for number in range(20):
        (first.parent / f"copy{number:02d}.png").write_bytes(first.read_bytes())
    dataset = scan(folder)
    dataset = dataclasses.replace(dataset, copies=frozenset(s.path for s in dataset.samples))
    truth = truth_of(dataset, dataset.samples, engine)
    counted = []

    def forward(batch):
        counted.append(len(batch))
        return engine.forward(batch)

    numbers = {}
    for room in (1 << 20, 24 * 4 - 1):  # the last one has none for a row
        monkeypatch.setattr(pipeline, "_KNOWN_BYTES", room)
        counted.clear()
        counting = dataclasses.replace(engine, forward=forward)
        assert_same_rows(collect(run(dataset, dataset.samples, counting, RULES))[0], truth)
        numbers[room] = sum(counted)
    assert numbers[1 << 20] < numbers[24 * 4 - 1]


def test_chunks_are_filled_by_views_so_that_plain_splits_travel_in_full_batches(tmp_path):
    for split, number in (("train", 5), ("valid", 9)):
        for i in range(number):
            write_image(tmp_path / split / "covid" / f"{i}.png", i)
    dataset = scan(tmp_path)
    recipe = dataclasses.replace(RECIPE, view_rules=ViewRules(3, "crop"))
    chunks = [outcomes for outcomes, _ in stream_views(dataset, dataset.samples, [recipe], 7)]
    # two images of three views, then one of three with four plain ones, then five plain ones
    assert [len(outcomes) for outcomes in chunks] == [2, 2, 5, 5]
    assert [o.sample for outcomes in chunks for o in outcomes] == list(dataset.samples)
    (alone, *_) = stream_views(dataset, dataset.samples, [recipe], 1)
    assert len(alone[0]) == 1  # an image of more views than a batch travels alone


def test_lanes_get_what_they_want_of_one_decoding(folder, engine, monkeypatch):
    """Two engines of other batch sizes, one wanting every third image only."""
    num_decoded = Counter()

    def counting(data, recipes, sha256):
        num_decoded[sha256] += 1
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", counting)
    dataset = scan(folder)
    (folder / dataset.samples[3].path).write_bytes(b"")
    some = frozenset(dataset.samples[::3])
    other = build_engine(tiny_network.build(), torch.device("cpu"), [], batch_size=3, name="onnx")
    lanes = [
        Lane(RECIPE, engine),
        Lane(
            dataclasses.replace(RECIPE, rules=PixelRules(32, "border")),
            other,
            claim=lambda position, sha256: position % 3 == 0,
        ),
    ]
    found = [{}, {}]
    for batch in stream_features(dataset, dataset.samples, lanes):
        for rows, features in zip(found, batch.features, strict=True):
            pairs = zip(batch.outcomes, features, strict=True)
            rows.update({o.sample.path: f[0] for o, f in pairs if f is not None})
    assert max(num_decoded.values()) == 1
    good = [sample for i, sample in enumerate(dataset.samples) if i != 3]
    assert_same_rows(found[0], truth_of(dataset, good, engine))
    assert found[1].keys() == {sample.path for sample in good if sample in some}
    for path, row in found[1].items():
        data = (folder / path).read_bytes()
        truth = other.run([decode(data, PixelRules(32, "border")).pixels])[0]
        assert np.array_equal(row, truth)


def test_a_bottleneck_is_what_is_waited_for():
    waits = {"waiting for decode": 3.0, "waiting for forward": 1.0, "write": 2.0, "forward": 99.0}
    assert find_bottleneck(waits) == "decode"
    assert find_bottleneck(waits | {"write": 4.0}) == "write"
    assert find_bottleneck({"waiting for forward": 0.1}) == "forward"


@pytest.mark.parametrize("isolate", [False, True])
def test_nothing_in_nothing_out(folder, engine, isolate):
    dataset = scan(folder)
    assert list(run(dataset, [], engine, RULES, isolate=isolate)) == []


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
    rows, outcomes = collect(run(dataset, dataset.samples, spied, RULES))
    assert [outcome.sample for outcome in outcomes] == list(dataset.samples)
    assert shapes == {(BATCH, 32, 32, 1)}  # also where images are missing, or rows would change
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
    rows, outcomes = collect(run(dataset, dataset.samples, engine, RULES))
    assert len(rows) == 21
    assert outcomes[6].reason
    assert "\n" not in outcomes[6].reason


def test_images_that_were_filled_in_are_marked(folder, engine):
    dataset = scan(folder)
    cut = next(s for s in dataset.samples if s.path.endswith("jpg"))
    whole = (folder / cut.path).read_bytes()
    (folder / cut.path).write_bytes(whole[: len(whole) * 2 // 3])
    rules = PixelRules(32, truncated="keep")
    rows, outcomes = collect(run(dataset, dataset.samples, engine, rules))
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

    def hanging(data, recipes, sha256):
        if data.endswith(b"HANG"):
            released.wait(TIMEOUT)
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", hanging)
    monkeypatch.setattr(view_stream, "DECODE_SECONDS", 1.0)
    yield released
    released.set()


@pytest.fixture
def fragile_children(tmp_path, monkeypatch):
    """Make decode hang or crash in children, on marked images; hangs end after 3 s."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FRAGILE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setattr(view_stream, "IsolatedDecoder", functools.partial(IsolatedDecoder, 3.0))


def test_images_that_only_seem_to_hang_are_had_from_the_child(
    folder, engine, hanging_threads, monkeypatch
):
    """More of them than there are threads: each is replaced."""
    num_in_child = Counter()

    class Counting(IsolatedDecoder):
        def render(self, data, recipes, sha256):
            num_in_child["images"] += 1
            return super().render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "IsolatedDecoder", Counting)
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    for index in (2, 3, 9):
        marked(folder, dataset, index, b"HANG")
    stream = run(dataset, dataset.samples, engine, RULES, workers=2)
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
    rows, outcomes = collect(run(dataset, dataset.samples, engine, RULES, workers=1))
    assert [(o.sample, o.reason) for o in outcomes if o.reason] == [(bad, "it hung for 3 s")]
    del truth[bad.path]
    assert_same_rows(rows, truth)


def test_the_process_can_end_though_a_thread_hangs(folder):
    code = f"""
import sys, time
from featcache.pixels import acceleration
from featcache.extraction import view_stream
from featcache.data.dataset import scan
from featcache.pixels.images import PixelRules
from featcache.extraction.recipe import Recipe
from featcache.pixels.views import ViewRules, render

def hanging(data, recipes, sha256):
    if data.endswith(b"HANG"):
        time.sleep(600)
    return render(data, recipes, sha256)

view_stream.render, view_stream.DECODE_SECONDS = hanging, 0.5
dataset = scan({str(folder)!r})
recipe = Recipe(None, PixelRules(32), "float32")
stream = view_stream.stream_views(dataset, dataset.samples, [recipe], {BATCH}, workers=2)
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
    rows, outcomes = collect(run(dataset, dataset.samples, engine, RULES))
    isolated = run(dataset, dataset.samples, engine, RULES, isolate=True)
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
    stream = run(dataset, dataset.samples, engine, RULES, isolate=True)
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
    monkeypatch.setattr(view_stream, "DECODE_SECONDS", 0.5)
    dataset = scan(folder)
    truth = truth_of(dataset, dataset.samples, engine)
    bad = marked(folder, dataset, 1, b"HANG")
    stream = run(dataset, dataset.samples, engine, RULES, isolate=True)
    rows, outcomes = collect(stream)
    assert [(o.sample, o.reason) for o in outcomes if o.reason] == [(bad, "it hung for 3 s")]
    del truth[bad.path]
    assert_same_rows(rows, truth)


# ----------------------------------------------------------------------------- ends and limits


@pytest.mark.parametrize("isolate", [False, True])
def test_a_consumer_may_stop_early(folder, engine, isolate):
    dataset = scan(folder)
    many = [*dataset.samples] * 10
    children = []
    for num_batches in (0, 1, 3):
        stream = run(dataset, many, engine, RULES, workers=3, isolate=isolate)
        for _ in range(num_batches):
            next(stream)
        decoders = [t for t in decoding_threads() if t.name == "featcache-decode"]
        children += [t for t in decoders if t not in children]
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

    broken = dataclasses.replace(engine, forward=forward, concurrency=1)
    stream = run(dataset, dataset.samples, broken, RULES)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream)
    assert wait_until(lambda: not decoding_threads())


def test_a_bug_in_a_decoder_is_not_taken_for_a_bad_image(folder, engine, monkeypatch):
    dataset = scan(folder)
    marked(folder, dataset, 9, b"BUG")

    def buggy(data, recipes, sha256):
        if data.endswith(b"BUG"):
            raise IndexError("a bug")
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", buggy)
    stream = run(dataset, dataset.samples, engine, RULES)
    with pytest.raises(IndexError, match="a bug"):
        list(stream)
    assert wait_until(lambda: not decoding_threads())


def test_no_more_than_the_stated_images_are_under_way(folder, monkeypatch):
    """And no fewer: the next ones are decoded while the consumer works."""
    dataset = scan(folder)
    samples = [*dataset.samples] * 8
    num_decoded = Counter()

    def counting(data, recipes, sha256):
        rendering = render(data, recipes, sha256)
        num_decoded["images"] += 1
        return rendering

    monkeypatch.setattr(view_stream, "render", counting)
    stream = stream_views(dataset, samples, [RECIPE], BATCH, workers=1)
    for given, _batch in enumerate(stream, start=1):
        ahead = max(3, 32 // BATCH)  # batches: the bound of the module's docstring
        limit = min(len(samples), (given + ahead) * BATCH)
        assert wait_until(lambda limit=limit: num_decoded["images"] >= limit)
        time.sleep(0.02)  # time to do too much
        assert num_decoded["images"] == limit
    assert num_decoded["images"] == len(samples)


def test_no_more_images_are_read_than_the_stated_number_under_way(folder, engine, monkeypatch):
    """With a consumer that stands still; memory does not grow with the data set."""
    dataset = scan(folder)
    num_decoded = Counter()

    def counting(data, recipes, sha256):
        num_decoded["images"] += 1
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", counting)
    many = [*dataset.samples] * 20
    lane = Lane(RECIPE, engine)
    stream = stream_features(dataset, many, [lane], workers=4)
    taken = len(next(stream).outcomes)
    limit = taken + images_under_way([lane])
    wait_until(lambda: num_decoded["images"] >= limit, seconds=2)
    time.sleep(0.2)  # time to do too much
    assert BATCH < num_decoded["images"] <= limit < len(many)
    stream.close()


def test_a_large_job_starts_the_kernels_and_its_features_stay_the_same(folder, engine, monkeypatch):
    """Ready from the first image or not at all: the rows are equal, bit for bit."""
    dataset = scan(folder)
    num_bytes = sum(sample.image_bytes for sample in dataset.samples)
    monkeypatch.setattr(acceleration, "_ready", None)
    monkeypatch.setattr(acceleration, "WORTH_BYTES", num_bytes + 1)
    plain, _ = collect(run(dataset, dataset.samples, engine, RULES))
    assert acceleration._ready is None
    monkeypatch.setattr(acceleration, "WORTH_BYTES", num_bytes)
    collect(run(dataset, dataset.samples, engine, RULES))
    assert wait_until(acceleration.is_ready)
    fast, _ = collect(run(dataset, dataset.samples, engine, RULES))
    assert_same_rows(fast, plain)


def test_decoding_goes_on_while_the_network_runs(folder, engine, monkeypatch):
    """Twelve waits of 0.1 s by three threads, while the network takes its own 0.1 s a batch."""
    dataset = scan(folder)
    samples = dataset.samples[:12]

    def slow(data, recipes, sha256):
        time.sleep(0.1)
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", slow)
    together = Counter()

    def forward(pixels):
        time.sleep(0.1)
        together["forward"] += 1
        return engine.forward(pixels)

    slow_engine = dataclasses.replace(engine, forward=forward)
    start = time.monotonic()
    collect(run(dataset, samples, slow_engine, RULES, workers=3))
    assert together["forward"] == 3
    assert time.monotonic() - start < 1.2  # one after the other it takes 1.5 s
