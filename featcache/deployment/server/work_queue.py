"""The work of a server: files of any number of requests -> features, in batches.

Files are decoded in child processes, and whatever has been decoded while the network was busy goes
through it together.

Reads and writes: nothing.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.backbones.engine import Engine
from featcache.data.dicom_files import is_dicom
from featcache.deployment.classifier import Classifier
from featcache.deployment.explainer import Explainer, Explanation
from featcache.deployment.explanation_picture import draw_explanation
from featcache.deployment.exporting.parity import draw_phantoms
from featcache.deployment.predictions import Predictions
from featcache.errors import DataError
from featcache.extraction.recipe import NUM_PROBES, is_dark
from featcache.heads.compiled.team import one_blas_thread
from featcache.pixels.isolation import IsolatedDecoder
from featcache.pixels.views import PLAIN
from featcache.threads import Threads

Row: TypeAlias = npt.NDArray[np.float32] | str
"""The features (D,) of an image, or why it could not be read."""

_PNG, _PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # the 25th byte is the bit depth
_SHALLOW = (b"\xff\xd8\xff", b"GIF8", b"BM")  # JPEG, GIF, BMP: 8 bits a channel
_DARK = (
    "16-bit colour whose values fit into 14 bits, nearly black as --bit-depth 16 takes them: "
    "extract again with the --bit-depth that is meant, and train again"
)


_Pixels: TypeAlias = list[npt.NDArray[np.uint8]]
"""What each backbone sees of an image: (S, S) if it is grey, else (S, S, 3)."""


class _Decoded(NamedTuple):
    """An image on its way through the networks, and what will be its features."""

    pixels: _Pixels
    future: Future[Row]


class WorkQueue:
    """Decodes files and computes their features, as ``Classifier.predict`` would.

    Use as a context manager: its threads and child processes end with it.

    Args:
        classifier: The run, with its backbones.
        num_decoders: Child processes to decode in.
        decode_seconds: An image that takes longer fails.
    """

    def __init__(
        self, classifier: Classifier, *, num_decoders: int, decode_seconds: float
    ) -> None:  # fmt: skip
        self._classifier = classifier
        self.engines: Sequence[Engine] = classifier.choose_engines(
            lambda side: draw_phantoms(side, NUM_PROBES)
        )
        self._batch_size = max(engine.batch_size for engine in self.engines)
        self._waiting: queue.SimpleQueue[_Decoded | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[IsolatedDecoder] = queue.SimpleQueue()
        self._decoders = [IsolatedDecoder(decode_seconds) for _ in range(num_decoders)]
        for decoder in self._decoders:
            self._free.put(decoder)
        self._num_networks = max(engine.concurrency for engine in self.engines)
        self._decoding = Threads("decode", num_decoders)
        self._networks = Threads("forward", self._num_networks, wait=True)
        self._heads = Threads("head", 1, wait=True)
        self._explaining = Threads("explain", 1, wait=True)
        self._limits = contextlib.ExitStack()

    def __enter__(self) -> WorkQueue:
        # The head and the novelty of one image took 16 ms of two cores that waited for each other,
        # 1.4 of one.
        self._limits.enter_context(one_blas_thread())
        for _ in range(self._num_networks):
            self._networks.submit(self._run_networks)
        self._warm()
        return self

    def __exit__(self, *details: Any) -> None:
        for decoder in self._decoders:
            decoder.__exit__(None, None, None)
        for _ in range(self._num_networks):
            self._waiting.put(None)
        for threads in (self._decoding, self._networks, self._heads, self._explaining):
            threads.__exit__(*details)
        self._limits.close()

    def _warm(self) -> None:
        """Let every process and network work once, so that no request waits for their start."""
        side = self._classifier.recipe.backbone.image_size
        (phantom,) = draw_phantoms(side, 1)
        file = f"P6 {side} {side} 255\n".encode() + phantom.tobytes()
        warm = [self.compute(file) for _ in range(max(len(self._decoders), self._num_networks))]
        self.predict(["warm"], [warm[0].result()]).result()
        for future in warm:
            future.result()

    def compute(self, data: bytes) -> Future[Row]:
        """Return what will be the features of an image file, or why it could not be read."""
        future: Future[Row] = Future()
        self._decoding.submit(self._decode, data, future)
        return future

    def predict(self, names: Sequence[str], rows: Sequence[Row]) -> Future[Predictions]:
        """Return what will be ``Classifier.predict_rows``."""
        return self._heads.submit(self._classifier.predict_rows, names, rows)

    def explain(self, name: str, data: bytes) -> Future[tuple[Explanation, bytes]]:
        """Return what will be the explanation of an image file, and its picture, a PNG.

        One at a time. The future raises a ``DataError`` if the image cannot be read.
        """
        return self._explaining.submit(self._explain, name, data)

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self._classifier)

    def _explain(self, name: str, data: bytes) -> tuple[Explanation, bytes]:
        pixels = self._render(data)
        explanation = self._explainer.explain(pixels, name)
        return explanation, draw_explanation(explanation.as_dict(), pixels)

    def _decode(self, data: bytes, future: Future[Row]) -> None:
        if future.cancelled():
            return
        try:
            self._waiting.put(_Decoded(self._render(data), future))
        except DataError as error:
            _answer(future, str(error.found))
        except BaseException as error:  # noqa: BLE001 (raised by future.result())
            _fail(future, error)
        finally:
            del data, future  # else an error, which has this frame, and its future hold each other

    def _render(self, data: bytes) -> _Pixels:
        """Return what each backbone sees of a file, decoded by the next child that is free.

        Raises:
            DataError: If it cannot be read.
        """
        decoder = self._free.get()
        try:
            return self._render_by(decoder, data)
        finally:
            self._free.put(decoder)

    def _render_by(self, decoder: IsolatedDecoder, data: bytes) -> _Pixels:
        recipes = self._classifier.recipes
        pixels: dict[int, npt.NDArray[np.uint8]] = {}
        for numbers in self._classifier.decoded_alike():
            rules = recipes[numbers[0]].rules
            may_be_dark = rules.bit_depth == 16 and not recipes[numbers[0]].has_dark_colour
            if may_be_dark and _may_be_deep(data) and decoder.deep_kind(data) == "colour":
                maximum = decoder.deep_maximum(data, rules.max_pixels)
                if maximum is not None and is_dark([maximum]):
                    raise DataError("image", expected="values up to 65535", found=_DARK)
            if is_dicom(data):
                self._classifier.note_dicom()
            wanted = [(recipes[number].rules.with_dicom(), PLAIN) for number in numbers]
            views = decoder.render(data, wanted, b"").views
            pixels |= {n: of_one[0] for n, of_one in zip(numbers, views, strict=True)}
        return [pixels[number] for number in range(len(recipes))]

    def _run_networks(self) -> None:
        while batch := self._take():
            wanted = [image for image in batch if image.future.set_running_or_notify_cancel()]
            try:
                if wanted:
                    self._run_batch(wanted)
            except BaseException as error:  # noqa: BLE001 (raised by future.result())
                for image in wanted:
                    _fail(image.future, error)
            del batch, wanted  # else the last images stay in memory until the next come

    def _take(self) -> list[_Decoded]:
        """Wait for an image; return it with those that wait behind it, up to a batch."""
        batch = list[_Decoded]()
        image = self._waiting.get()
        while image is not None:
            batch.append(image)
            if len(batch) == self._batch_size:
                break
            try:
                image = self._waiting.get_nowait()
            except queue.Empty:
                break
            if image is None:
                self._waiting.put(None)  # the end, after this batch
        return batch

    def _run_batch(self, batch: Sequence[_Decoded]) -> None:
        made = [
            engine.run_here([image.pixels[number] for image in batch])
            for number, engine in enumerate(self.engines)
        ]
        features = made[0] if len(made) == 1 else np.concatenate(made, axis=1)
        for image, row in zip(batch, features, strict=True):
            image.future.set_result(row)


def _may_be_deep(data: bytes) -> bool:
    """Return whether a file may have 16 bits a channel, of formats that most files have."""
    if data.startswith(_PNG):
        return data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10"
    return not data.startswith(_SHALLOW)


def _answer(future: Future[Row], reason: str) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(reason)


def _fail(future: Future[Row], error: BaseException) -> None:
    if future.running() or future.set_running_or_notify_cancel():
        future.set_exception(error)
