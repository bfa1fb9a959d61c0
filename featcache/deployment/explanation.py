"""Explain: what in an image spoke for and against a class, and the training images nearest to it.

Reads: a run, images, and the cache of the run where it is at hand. Writes: a folder with a picture
of each image and ``explanations.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.by_url import by_url
from featcache.deployment.classifier import Classifier, load_classifier
from featcache.deployment.explainer import Explainer, Explanation
from featcache.deployment.explanation_lines import explanation_lines, last_lines
from featcache.deployment.explanation_picture import draw_explanation
from featcache.deployment.inputs import list_inputs
from featcache.errors import ConfigError, DataError
from featcache.evaluation.evidence import MIDDLE
from featcache.extraction.earlier import refuse_dark_colour
from featcache.files import local_path, optional_json_object, write_bytes, write_json
from featcache.formatting import brief_repr
from featcache.output_folders import check_folder, new_folder
from featcache.outputs import Kind, Output
from featcache.runtime import Say, log_line
from featcache.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from featcache.deployment.recipes import Backbones, Weights

FORMAT, FORMAT_VERSION = "featcache-explanations", 1
FACTS_NAME = "explanations.json"
_MAX_JSON_BYTES = 1 << 30
_PICTURE_NAME = re.compile(r"\d{4,}_[A-Za-z0-9._-]{0,80}\.png")
_HOW = (
    "log_odds = baseline + sum of every map + unlocated of backbones without one; baseline is the "
    "log-odds at the mean of the training images; occlusion is what the log-odds lose where a cell "
    "is blurred"
)


@dataclass(frozen=True)
class ExplainSummary:
    """The explanations of some images, in the order they were asked for.

    Attributes:
        folder: The folder with the pictures and ``explanations.json``, which holds the rest.
        explanations: One for each image that could be read.
        failures: (path, reason) of the others.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    folder: Path
    explanations: tuple[Explanation, ...]
    failures: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the explanations as JSON values."""
        return {
            "folder": self.folder.as_posix(),
            "explanations": [explanation.as_dict() for explanation in self.explanations],
            "failures": [{"path": path, "reason": reason} for path, reason in self.failures],
        }


@by_url("run")
def explain(
    run: str | Path,
    images: Any,
    out: str | Path,
    *,
    positive: str | None = None,
    against: str | None = None,
    weights: Weights = None,
    backbone: Backbones = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    companions: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: str | Iterable[str] = (),
    overwrite: bool = False,
    say: Say = log_line,
) -> ExplainSummary:
    """Explain what in images spoke for and against a class, and draw it into a folder.

    A map adds up to the log-odds; it shows what the network used, not where disease is. Beside it
    stands what the log-odds lose where a part of the image is blurred, which knows nothing of the
    network's inside.

    Args:
        run: The run folder.
        images: Files, folders, PIL images or uint8 arrays, one or many, or URLs: see
            ``Classifier.predict``.
        out: A new or empty folder.
        positive: The class to explain; by default the most probable one of each image.
        against: Of three classes or more, the class to hold it against; by default the most
            probable other one.
        weights: The backbone's weights file: see ``predict``.
        backbone: The backbone itself: see ``predict``.
        device: Where the backbone runs: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        max_pixels: Image files of more pixels are refused, and listed as failures.
        include: Globs of the files to use: see ``Classifier.predict``.
        exclude: Globs of files that are left out.
        companions: ``keep`` takes masks and the like in a folder as images; they are an error.
        columns: Column -> its header in a CSV of images.
        ignore_columns: Headers of a CSV of images that are not used.
        overwrite: Whether an earlier folder of explanations is replaced.
        say: Gets lines for people.

    Raises:
        ConfigError: If there is no such class, or the folder must not be written to.
        DataError: If a path leads nowhere, a folder holds no image, or companions of images; or if
            no image can be read.
        RunError: If the run is not whole.
        BackboneError: If the backbone's weights are not at hand.

    Example:
        >>> featcache.explain("run", "new.png", "explained")  # doctest: +SKIP
    """
    given = images if isinstance(images, list | tuple) else [images]
    files = [weights] if weights is None or isinstance(weights, str | Path) else weights
    inputs = [run, *files, *(i for i in given if isinstance(i, str | Path))]
    output = Output(
        local_path(out, "--out"), "--out", EXPLANATIONS, replace=overwrite, inputs=inputs
    )
    check_folder(output)
    found = list_inputs(
        images, include=include, exclude=exclude, companions=companions, columns=columns,
        ignore_columns=ignore_columns,
    )  # fmt: skip
    classifier = load_classifier(
        run, weights=weights, backbone=backbone, device=device, max_pixels=max_pixels
    )
    explainer = Explainer(classifier, positive, against)
    if found.dataset.has_dicom:
        classifier.note_dicom()
    for recipe in classifier.recipes:
        refuse_dark_colour(recipe, found.dataset, classifier.run.path)
    explanations, failures = list[Explanation](), list[tuple[str, str]]()
    with new_folder(output) as new:
        for name, image in zip(found.names, found.images, strict=True):
            try:
                pixels = explainer.read(image, found.dataset)
            except DataError as error:
                failures.append((name, str(error.found)))
                continue
            picture = _picture_name(len(explanations) + 1, name)
            explanation = replace(explainer.explain(pixels, name), picture=picture)
            write_bytes(new / picture, draw_explanation(explanation.as_dict(), pixels))
            explanations.append(explanation)
            for line in explanation_lines(explanation.as_dict(), MIDDLE):
                say(line)
        if not explanations:
            path, reason = failures[0]
            raise DataError(
                "images", expected="one or more that can be read", where=path,
                found=f"none of {len(failures):,}, the first being {reason}",
            )  # fmt: skip
        summary = ExplainSummary(Path(output.path), tuple(explanations), tuple(failures))
        write_json(new / FACTS_NAME, _file_facts(classifier, summary))
    for line in last_lines(summary.as_dict()):
        say(line)
    return summary


def _file_facts(classifier: Classifier, summary: ExplainSummary) -> dict[str, Any]:
    """Return what ``explanations.json`` holds."""
    run = classifier.run
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION, "how": _HOW,
        "not_for": "diagnosis: a map shows what the network used, not where disease is",
        "middle": MIDDLE, "head_sha256": run.weights_sha256,
        "fingerprints": [cache["fingerprint"] for cache in run.caches],
        **{key: value for key, value in summary.as_dict().items() if key != "folder"},
    }  # fmt: skip


def _picture_name(number: int, path: str) -> str:
    """Return a name for a picture that every system takes, after the image's."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(path).stem)[:60]
    return f"{number:04d}_{stem}.png"


def _is_explanations(path: Path) -> bool:
    facts = optional_json_object(path / FACTS_NAME, max_bytes=_MAX_JSON_BYTES)
    return facts.get("format") == FORMAT


def _list_others(folder: Path) -> list[str]:
    return [
        path.name for path in sorted(folder.iterdir())
        if not (path.name == FACTS_NAME or _PICTURE_NAME.fullmatch(path.name))
        or path.is_symlink() or not path.is_file()
    ]  # fmt: skip


EXPLANATIONS = Kind(
    "folder of explanations", "a new or empty folder", ConfigError, _is_explanations,
    switch="--overwrite", is_folder=True, list_others=_list_others,
)  # fmt: skip
