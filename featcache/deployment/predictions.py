"""Predict: classify images, or the rows of a cache, with a trained run.

Reads: a run, and images or a cache. Writes: a CSV where asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.by_url import by_url
from featcache.cache.side_by_side import Caches, list_caches
from featcache.csv_files import csv_text, join_names, prob_columns
from featcache.errors import ConfigError, RunError, printable
from featcache.evaluation.deciding.decision_file import Decisions, load_decisions
from featcache.evaluation.novelty import Novelty
from featcache.evaluation.seen_rows import find_all_seen, warn_of_seen
from featcache.formatting import brief_repr
from featcache.heads.prediction import predict_probs
from featcache.heads.run import load_run
from featcache.heads.run_caches import open_other_caches
from featcache.heads.streaming import StoredFeatures
from featcache.outputs import Output, csv_kind, write_output
from featcache.runtime import resolve_device
from featcache.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from featcache.deployment.recipes import Backbones, Weights

_COLUMNS, _COLUMNS_OF_LABELS, _LAST = ("path", "pred", "prob"), ("path", "preds"), ("failure",)
_DECISION = ("decision",)
_UNLIKE = "unlike_training"  # before the last; older CSVs lack it
_CSV = csv_kind(
    "CSV of featcache predict", (*_COLUMNS, *_DECISION), (*_COLUMNS_OF_LABELS, *_DECISION),
    _COLUMNS, _COLUMNS_OF_LABELS, ends=_LAST, may_have=(_UNLIKE,),
)  # fmt: skip
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Predictions:
    """Predictions of some images, in the order they were asked for.

    Attributes:
        classes: C class names.
        paths: N paths, in the order of ``probs``; of objects of a store their URLs. An image that
            came as an array or as a PIL image has its position as text instead: ``"0"`` for the
            first.
        probs: (N, C) probabilities: the softmax, or with several labels an image the sigmoid.
        failures: (path, reason) of images that could not be read.
        average_views: Whether a row with several views has the mean of their probabilities.
        task: ``multiclass``, or ``multilabel``: several labels an image.
        num_trained_on: Rows of the cache that the head was trained on, here or as an identical
            image in another cache; None of images, or where nothing tells. Likewise the next two.
        num_chosen_by: Rows that its epoch was chosen by.
        num_unclear: Rows of which it cannot be told: see ``Evaluation``.
        decision: What the threshold of ``decide`` makes of each image: the positive class, the most
            probable other class, or ``refer``; with several labels an image, a tuple of the classes
            above their thresholds. None where there is no threshold.
        thresholds: Class -> ``threshold`` and what is known of it; None likewise.
        calibrated: Class -> its calibrated probabilities (N,), of classes that have a temperature:
            of all, or with several labels of some. Empty without.
        unlike_training: N, whether an image is unlike any training image: see ``Novelty``. None
            where the cache that the head was trained on is not at hand.
        novelty: ``threshold`` of the distance to the nearest training image beyond which that is
            so, ``num_rows`` to train on and ``num_compared_with``, all or a sample; None likewise.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    probs: npt.NDArray[np.float64]
    failures: tuple[tuple[str, str], ...]
    average_views: bool = False
    task: str = "multiclass"
    num_trained_on: int | None = None
    num_chosen_by: int | None = None
    num_unclear: int | None = None
    decision: tuple[Any, ...] | None = None
    thresholds: dict[str, dict[str, Any]] | None = None
    calibrated: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    unlike_training: tuple[bool, ...] | None = None
    novelty: dict[str, Any] | None = None

    def with_decisions(self, decisions: Decisions | None) -> Predictions:
        """Return them with what the thresholds of a run make of them."""
        if decisions is None:
            return self
        return replace(
            self, decision=decisions.apply(self.probs), thresholds=decisions.brief(),
            calibrated=decisions.calibrate(self.probs),
        )  # fmt: skip

    @property
    def preds(self) -> tuple[Any, ...]:
        """The most probable class of each image.

        With several labels an image, a tuple of those above 0.5.
        """
        if self.task == "multilabel":
            return tuple(
                tuple(self.classes[i] for i in np.flatnonzero(row > 0.5)) for row in self.probs
            )
        return tuple(self.classes[i] for i in self.probs.argmax(axis=1)) if len(self.probs) else ()

    def as_dict(self) -> dict[str, Any]:
        """Return the predictions as JSON values."""
        has_labels, rows = self.task == "multilabel", []
        for i, (path, pred, row) in enumerate(zip(self.paths, self.preds, self.probs, strict=True)):
            facts: dict[str, Any] = {"preds": [*pred]}
            if not has_labels:
                facts = {"pred": pred, "prob": float(row.max())}
            if self.decision is not None:
                chosen = self.decision[i]
                facts["decision"] = [*chosen] if has_labels else chosen
            if self.calibrated:
                softened = {name: float(of_class[i]) for name, of_class in self.calibrated.items()}
                facts["calibrated"] = softened
            unlike = None if self.unlike_training is None else self.unlike_training[i]
            rows.append({"path": path, **facts, "probs": row.tolist(), _UNLIKE: unlike})
        return {
            "classes": list(self.classes),
            "task": self.task,
            "predictions": rows,
            "failures": [{"path": path, "reason": reason} for path, reason in self.failures],
            "average_views": self.average_views,
            "num_trained_on": self.num_trained_on,
            "num_chosen_by": self.num_chosen_by,
            "num_unclear": self.num_unclear,
            "thresholds": self.thresholds,
            "novelty": self.novelty,
        }

    def write_csv(self, file: str | Path) -> None:
        """Write path, pred, prob, the probability of each class, and whether it is unlike training.

        The last is yes, no, or empty where it cannot be told. Failures come last.

        With several labels an image, ``preds`` holds their names joined by ``|`` and stands in
        place of pred and prob. With thresholds there is a column ``decision`` after these, with a
        temperature ``calibrated_CLASS`` after the other probabilities.

        Raises:
            ConfigError: If there is something that is no such CSV; an older one is replaced.
            CacheError: If the disk is full or the folder cannot be written.
        """
        self._write_csv(Output(file, "CSV", _CSV))

    def _write_csv(self, output: Output) -> None:
        has_labels = self.task == "multilabel"
        columns = _COLUMNS_OF_LABELS if has_labels else _COLUMNS
        header = [
            *columns, *(() if self.decision is None else _DECISION),
            *prob_columns(self.classes), *prob_columns(self.calibrated, "calibrated"),
            _UNLIKE, *_LAST,
        ]  # fmt: skip
        rows: list[list[object]] = []
        words = [("no", "yes")[unlike] for unlike in self.unlike_training or ()]
        words = words or [""] * len(self.paths)
        for i, (path, pred, probs) in enumerate(
            zip(self.paths, self.preds, self.probs, strict=True)
        ):
            cells = [join_names(pred)] if has_labels else [pred, float(probs.max())]
            if self.decision is not None:
                cells.append(join_names(self.decision[i]) if has_labels else self.decision[i])
            softened = [float(of_class[i]) for of_class in self.calibrated.values()]
            rows.append([path, *cells, *map(float, probs), *softened, words[i], ""])
        blank = [""] * (len(header) - 2)
        rows += [[path, *blank, reason] for path, reason in self.failures]
        write_output(output, csv_text(header, rows).encode())


@by_url(makes="csv", replaces=True)
@by_url("run", "cache")
def predict(
    run: str | Path,
    images: Any = None,
    *,
    cache: Caches | None = None,
    average_views: bool = False,
    weights: Weights = None,
    backbone: Backbones = None,
    batch_size: int | str = "auto",
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    companions: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: str | Iterable[str] = (),
    csv: str | Path | None = None,
) -> Predictions:
    """Classify images, or every row of a cache, with the head of a run.

    For more than one call with images, ``load_classifier`` builds the network once. A cache needs
    neither images nor the backbone.

    Args:
        run: The run folder.
        images: Files, folders, PIL images or uint8 arrays, one or many, or URLs: see
            ``Classifier.predict``.
        cache: A cache to classify instead, by view 0 of each row. Rows that the head was trained
            on or chosen by are warned of, as by ``evaluate``. Of a run of several caches, as many,
            in any order.
        average_views: With ``cache``, take the mean of the probabilities of a row's views.
        weights: The backbone's weights file, where the library's own were not used. Of a run of
            several caches, a file for all of them or a list in their order.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it. Of a run of several caches, a list in any order.
        batch_size: Images a batch, or ``auto``.
        device: Where the backbone runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        max_pixels: Image files of more pixels are refused, and listed as failures.
        include: Globs of the files to use: see ``Classifier.predict``.
        exclude: Globs of files that are left out.
        companions: ``keep`` takes masks and the like in a folder as images; they are an error.
        columns: Column -> its header in a CSV of images.
        ignore_columns: Headers of a CSV of images that are not used.
        csv: A file for a line per image.

    Raises:
        ConfigError: Unless images or a cache are given, and not both; if views are to be averaged
            and there are none; or if ``csv`` cannot be written.
        DataError: If a path leads nowhere, a folder holds no image, or companions of images.
        RunError: If the run is not whole, its ``decision.json`` is damaged or of another head, or
            the cache's features were made otherwise.
        CacheError: If the cache is not whole.
        BackboneError: If the backbone's weights are not at hand.

    Example:
        >>> featcache.predict("run", "new.png").preds  # doctest: +SKIP
        ('covid',)
    """
    if (images is None) == (cache is None):
        found = "neither" if cache is None else "both"
        raise ConfigError("predict", expected="images or a cache", found=found)
    if average_views and cache is None:
        raise ConfigError(
            "--average-views", expected="a cache, whose rows have views", found="images"
        )
    output = None
    if csv is not None:
        given = images if isinstance(images, list | tuple) else [images]
        caches = [] if cache is None else list_caches(cache)
        files = [weights] if weights is None or isinstance(weights, str | Path) else weights
        inputs = [*caches, *files, *(i for i in given if isinstance(i, str | Path))]
        output = Output(csv, "--csv", _CSV, inputs=inputs)
        output.check()
    if cache is not None:
        predictions = _predict_cache(run, cache, device, average_views=average_views)
    else:
        from featcache.deployment.classifier import load_classifier

        predictions = load_classifier(
            run, weights=weights, backbone=backbone, device=device, batch_size=batch_size,
            max_pixels=max_pixels,
        ).predict(
            images, include=include, exclude=exclude, companions=companions, columns=columns,
            ignore_columns=ignore_columns,
        )  # fmt: skip
    if output is not None:
        predictions._write_csv(output)
    return predictions


def _predict_cache(
    run: str | Path, cache: Caches, device: str, *, average_views: bool
) -> Predictions:
    """Classify every row of a cache; the head is computed on the CPU, on any device."""
    loaded = load_run(run)
    decisions = load_decisions(loaded)
    opened = open_other_caches(loaded, cache)
    if average_views and all(split.num_views == 1 for split in opened.splits.values()):
        raise ConfigError(
            "--average-views", expected="several views of a row", found="one in every split",
            where=opened.path, hint="Extract the images with --views",
        )  # fmt: skip
    if opened.num_features != loaded.head.num_features:
        raise RunError(
            "features", expected=f"{loaded.head.num_features} a row", found=opened.num_features,
            where=opened.path, hint="Use the cache it was trained on",
        )  # fmt: skip
    if device != "auto":
        resolve_device(device)  # one that is not there is refused, as ever
    paths, probs = [], [np.empty((0, len(loaded.classes)))]
    novelty, unlike = Novelty.of(loaded), list[bool]()
    for split in opened.splits.values():
        features = StoredFeatures(split, np.arange(len(split)), plain=not average_views)
        probs.append(predict_probs(loaded.head, loaded.state, features, loaded.task))
        paths += split.paths
        for i in range(0, len(split) if novelty else 0, _BLOCK_ROWS):
            rows = np.arange(i, min(i + _BLOCK_ROWS, len(split)))
            assert novelty is not None
            unlike += novelty.find_unlike(split.read_rows(rows))
    seen = find_all_seen(loaded, opened)
    consequence = "these predictions are better than those of new images"
    warn_of_seen(seen, printable(opened.path.name), consequence)
    trained, chosen, unclear = (None, None, None) if seen is None else seen.counts
    failures = tuple((f.path, f.reason) for f in opened.failures)
    return Predictions(
        loaded.classes, tuple(paths), np.concatenate(probs), failures, average_views, loaded.task,
        trained, chosen, unclear, unlike_training=None if novelty is None else tuple(unlike),
        novelty=None if novelty is None else novelty.facts,
    ).with_decisions(decisions)  # fmt: skip
