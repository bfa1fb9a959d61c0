"""Report: write one page about a run, which needs no network.

Reads: a run, and the caches it was trained on. Writes: one HTML file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.by_url import by_url
from featcache.errors import ConfigError, FeatcacheError, printable
from featcache.files import local_path, read_regular, result_as_dict
from featcache.formatting import brief_repr, count, in_bytes
from featcache.heads.run import is_run, load_run
from featcache.heads.run_caches import cache_paths
from featcache.outputs import Kind, Output, write_output
from featcache.reporting.facts import Facts, folds_of, gather
from featcache.reporting.mistakes import mistaken_rows
from featcache.reporting.names import Shown, count_pictures
from featcache.reporting.page import GENERATOR, render
from featcache.runtime import Say, log_line
from featcache.sweeps.crossval_files import ENSEMBLE_NAME, FACTS_NAME, ROWS_NAME

if TYPE_CHECKING:
    from featcache.deployment.recipes import Backbones, Weights
    from featcache.reporting.evidence import EvidencePart

REPORT_NAME = "report.html"
IMAGES = ("none", "mistakes", "all")
_WHY = {"none": "", "mistakes": "the mistakes that are listed", "all": "all that did not change"}
_HEAD_BYTES = 4096
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class ReportSummary:
    """The page that was written.

    Attributes:
        run: The run folder.
        file: The page.
        num_bytes: Its size.
        positive: The class that is looked for, or None.
        threshold: From which on it is called; None without one.
        num_valid: Images of valid that it measures, of an ensemble those out of fold; the slider is
            of these.
        num_test: Images of test, which are folded away.
        is_audited: Whether it shows the verdict of an audit.
        has_paths: Whether it names image files.
        has_images: Whether it contains images.
        has_evidence: Whether it shows where in the images the evidence lies.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    run: Path
    file: Path
    num_bytes: int
    positive: str | None
    threshold: float | None
    num_valid: int
    num_test: int
    is_audited: bool
    has_paths: bool
    has_images: bool
    has_evidence: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return result_as_dict(self)


@by_url(makes="file", replaces=True)
@by_url(adds_to="run")
def report(
    run: str | Path,
    file: str | Path | None = None,
    *,
    positive: str | None = None,
    data: str | Path | None = None,
    images: str = "none",
    no_paths: bool = False,
    weights: Weights = None,
    backbone: Backbones = None,
    device: str = "auto",
    say: Say = log_line,
) -> ReportSummary:
    """Write one page about a run: how good it is, where to put the threshold, how it was made.

    The page is one file without any request to a network. It is readable without JavaScript and can
    be printed. Figures are computed anew from the run's own cache.

    Args:
        run: The run folder, or that of a cross-validation with an ensemble: its ensemble then.
        file: The page; None writes ``report.html`` into the run. An earlier report is replaced.
        positive: The class that is looked for; None takes that of ``decide``. Without one, there is
            no threshold to choose, and the recalls of all classes are shown.
        data: The images that the cache was made of: to show some, and where the evidence lies in up
            to 200 images of each class. That is left out, and said, where the backbone's weights
            are not at hand or it has no map.
        images: ``none``; ``mistakes``: small pictures of the mistakes that are listed, on valid and
            test; ``all``: of all images of both. Those that changed since are left out. Beside a
            mistake is a map of what spoke for and against the class, where the backbone's weights
            are at hand.
        no_paths: Call images by split and number instead of by their paths.
        weights: For ``data``, the backbone's weights file: see ``predict``.
        backbone: For ``data``, the backbone itself: see ``predict``.
        device: Where the backbone runs.
        say: Receives the lines for people.

    Raises:
        BackboneError: If ``weights`` or ``backbone`` are not the run's.
        RunError: If the run is damaged, or its cache is gone or was rebuilt.
        CacheError: If the cache is damaged, or the disk is full.
        DataError: If ``data`` is no data set.
        ConfigError: If ``positive`` is not a class, ``data`` and ``images`` do not go together, or
            something else is in the page's place.

    Example:
        >>> featcache.report("run", "covid.html").num_bytes  # doctest: +SKIP
    """
    if images not in IMAGES:
        raise ConfigError("--images", expected=" or ".join(IMAGES), found=images)
    if data is None and images != "none":
        raise ConfigError(f"--images {images}", expected="the images, by --data", found="none")
    if data is None and (weights is not None or backbone is not None):
        raise ConfigError("--weights, --backbone", expected="--data beside them", found="none")
    loaded = load_run(_run_of(run, say))
    place = loaded.path / REPORT_NAME if file is None else file
    files = [weights] if weights is None or isinstance(weights, str | Path) else weights
    inputs = [data, *files, *cache_paths(loaded), loaded.path / "run.json"]
    if loaded.members:
        inputs += [folds_of(loaded) / name for name in (FACTS_NAME, ROWS_NAME)]
    output = Output(place, "FILE.html", _KIND, inputs=inputs)
    output.check()
    facts = gather(loaded, positive)
    shown, evidence = Shown(), dict[str, Any]()
    if data is not None:
        shown, evidence = _look(
            facts, data, images, weights=weights, backbone=backbone, device=device, say=say
        )
    pictures = shown.pictures
    page = render(facts, shown, evidence, has_paths=not no_paths).encode("utf-8")
    write_output(output, page)
    num_valid, num_test = (
        0 if split is None else len(split.rows.targets) for split in (facts.valid, facts.test)
    )
    summary = ReportSummary(
        run=loaded.path, file=output.path, num_bytes=len(page),
        positive=None if facts.positive is None else facts.positive.name,
        threshold=None if facts.positive is None else facts.positive.threshold,
        num_valid=num_valid, num_test=num_test,
        is_audited=None not in facts.audits, has_paths=not no_paths, has_images=bool(pictures),
        has_evidence=bool(evidence),
    )  # fmt: skip
    say(f"{printable(output.path)}: one page, {in_bytes(len(page))}, no request to any network")
    if facts.positive is None:
        say("without a threshold: no class is decided on, and --positive names none")
    if not summary.is_audited:
        say("the cache was never audited, and the page says so: featcache audit")
    named = "it names image files (--no-paths: numbers)" if summary.has_paths else "no file names"
    say(_shown_line(facts, num_valid, num_test))
    say(f"it contains {count_pictures(facts, shown)}; {named}")
    return summary


def _run_of(folder: str | Path, say: Say) -> Path:
    """Return the run that is meant by a folder: of a cross-validation with an ensemble, that."""
    path = local_path(folder, "run")
    ensemble = path / ENSEMBLE_NAME
    if is_run(path) or not (path / FACTS_NAME).is_file() or not is_run(ensemble):
        return path
    say(f"of this cross-validation, its ensemble: {printable(ensemble.as_posix())}")
    return ensemble


def _shown_line(facts: Facts, num_valid: int, num_test: int) -> str:
    """Return which images the figures are of, and why there are none at the top."""
    folded = f"{num_test:,} of test {'is' if num_test == 1 else 'are'} folded away"
    if facts.valid is not None:
        return f"its figures are of {count(num_valid, 'image')} {facts.valid.of}; {folded}"
    why = "it has no labelled rows"
    if facts.run.members:
        why = "its rows trained the heads, and the cross-validation is not at hand"
    elif "valid" not in facts.cache.splits:
        why = "there is no such split, and the cache has changed since the training"
    return f"it has no figures of valid, as {why}; {folded}"


def _look(
    facts: Facts, data: str | Path, images: str, *, weights: Weights, backbone: Backbones,
    device: str, say: Say,
) -> tuple[Shown, dict[str, EvidencePart]]:  # fmt: skip
    """Return pictures of images, with maps of those that are mistakes, and the mean maps.

    Without maps, after a line that says why, where the backbone is not at hand.
    """
    from featcache.deployment.classifier import load_classifier  # these import torch
    from featcache.reporting.evidence import measure_evidence
    from featcache.reporting.explained import NO_MAPS, explain_images
    from featcache.reporting.pictures import FoundImages, read_pictures

    found = FoundImages.of(facts.cache, data)
    pictures = {} if images == "none" else read_pictures(found, _wanted(facts, images))
    if images != "none" and not pictures:
        say("no picture is shown: there is none to show, or the images have changed")
    try:
        classifier = load_classifier(
            facts.run.path, weights=weights, backbone=backbone, device=device
        )
    except FeatcacheError as error:
        if weights is not None or backbone is not None:
            raise
        say(f"no maps of what the network used: {printable(' '.join(str(error).split()))}")
        return Shown(pictures, note=NO_MAPS if pictures else "", why=_WHY[images]), {}
    evidence = measure_evidence(facts, classifier, found, say)
    mistakes = [key for key in _wanted(facts, "mistakes") if key in pictures]
    positive = None if facts.positive is None else facts.positive.name
    maps = explain_images(classifier, found, mistakes, positive, say)
    return Shown(pictures, maps.by_image, maps.note, _WHY[images]), evidence


def _wanted(facts: Facts, images: str) -> list[tuple[str, str]]:
    """Return split and path of the images to show."""
    wanted = []
    for split in (facts.valid, facts.test):
        if split is not None:
            rows = range(len(split.rows.paths)) if images == "all" else mistaken_rows(split)
            wanted += [split.key(row) for row in rows]
    return wanted


def _is_report(path: Path) -> bool:
    """Return whether a file is a page that ``report`` wrote."""
    try:
        return GENERATOR in read_regular(path, max_bytes=_MAX_BYTES)[:_HEAD_BYTES]
    except OSError:
        return False


_KIND = Kind(
    "featcache report", "a new file in an existing folder, or an earlier report", ConfigError,
    _is_report, needs_folder=True,
)  # fmt: skip
