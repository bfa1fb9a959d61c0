"""The work of a server: what waits is run together, and rows equal those of the classifier."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sample_images import write_tree

import featcache
from featcache.backbones.backbone import Backbone
from featcache.deployment.classifier import Classifier
from featcache.deployment.server import work_queue
from featcache.deployment.server.work_queue import WorkQueue


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Classifier:
    folder = tmp_path_factory.mktemp("queue")
    write_tree(folder / "data")
    featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_backbone)
    featcache.train(folder / "c.h5", folder / "run", hidden=(4,), epochs=1, device="cpu")
    return featcache.load_classifier(
        folder / "run", backbone=tiny_backbone, device="cpu", batch_size=3
    )


@pytest.fixture(scope="module")
def work(classifier: Classifier) -> Iterator[WorkQueue]:
    with WorkQueue(classifier, num_decoders=1, decode_seconds=20) as made:
        yield made


def encoded(*pixels: Any, kind: str = "PNG") -> list[bytes]:
    files = []
    for values in pixels:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


def noise(count: int) -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40, 37, 3), np.uint8) for _ in range(count)]


def test_rows_are_those_of_the_classifier_bit_for_bit(
    classifier: Classifier, work: WorkQueue
) -> None:
    pictures = noise(8)
    rows = [work.compute(file) for file in encoded(*pictures)]
    found = np.stack([row.result() for row in rows])
    np.testing.assert_array_equal(found, classifier.transform(pictures))
    served = work.predict([str(i) for i in range(8)], [*found]).result()
    assert served.as_dict() == classifier.predict(pictures).as_dict()


def test_images_that_come_while_the_network_is_busy_are_run_together(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkQueue(classifier, num_decoders=1, decode_seconds=20) as work:
        (engine,) = work.engines
        is_busy, may_go, sizes = threading.Event(), threading.Event(), []

        class Slow:
            concurrency, batch_size = engine.concurrency, engine.batch_size

            def run_here(self, images: Any) -> Any:
                sizes.append(len(images))
                is_busy.set()
                may_go.wait()
                return engine.run_here(images)

        monkeypatch.setattr(work, "engines", [Slow()])
        files = encoded(*noise(1 + engine.concurrency + 7))
        first = [work.compute(file) for file in files[: engine.concurrency]]
        while len(sizes) < engine.concurrency:
            is_busy.wait()
        others = [work.compute(file) for file in files[engine.concurrency :]]
        while work._waiting.qsize() < len(others):
            pass  # they are being decoded
        others[-1].cancel()
        may_go.set()
        rows = [future.result() for future in (*first, *others[:-1])]
    assert len(rows) == engine.concurrency + 7
    assert sizes[: engine.concurrency] == [1] * engine.concurrency
    assert sorted(sizes[engine.concurrency :], reverse=True)[:2] == [3, 3]
    assert sum(sizes) == engine.concurrency + 7
    with pytest.raises(CancelledError):
        others[-1].result()


def test_colour_of_12_bits_is_refused_as_predict_does(
    classifier: Classifier, work: WorkQueue, tmp_path: Path
) -> None:
    import imagecodecs

    dark = np.random.default_rng(0).integers(0, 4096, (40, 40, 3), np.uint16)
    data = imagecodecs.png_encode(dark)
    (tmp_path / "dark.png").write_bytes(data)
    with pytest.raises(featcache.DataError, match="16-bit colour"):
        classifier.predict(tmp_path / "dark.png")
    assert "16-bit colour" in str(work.compute(data).result())
    bright = imagecodecs.png_encode(dark * 16)
    assert isinstance(work.compute(bright).result(), np.ndarray)


def test_a_fault_of_the_network_reaches_whoever_waits(
    work: WorkQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = work.engines

    def fail(batch: torch.Tensor) -> Any:
        raise MemoryError

    (file,) = encoded(*noise(1))
    with monkeypatch.context() as patch:
        patch.setattr(work, "engines", [dataclasses.replace(engine, forward=fail)])
        with pytest.raises(MemoryError):
            work.compute(file).result()
    assert isinstance(work.compute(file).result(), np.ndarray)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff\xd8\xff\xe0", False),
        (b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x08", False),
        (b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10", True),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"II*\0", True),
        (b"P6 1 1 65535", True),
    ],
)
def test_only_files_that_may_be_deep_are_looked_at_twice(data: bytes, expected: bool) -> None:
    assert work_queue._may_be_deep(data) == expected
