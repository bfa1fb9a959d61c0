"""Report: write one page about a run, which needs no network.

Reads: a run, and the caches it was trained on. Writes: one HTML file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.errors import ConfigError, printable
from featcache.files import read_regular, result_as_dict
from featcache.formatting import brief_repr, count, in_bytes
from featcache.heads.run import cache_paths, load_run
from featcache.outputs import Kind, Output, write_output
from featcache.reporting.facts import Facts, gather
from featcache.reporting.page import GENERATOR, render
from featcache.reporting.wording import mistaken_rows
from featcache.runtime import Say, log_line

REPORT_NAME = "report.html"
IMAGES = ("none", "mistakes", "all")
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
        num_valid: Images of valid that it measures; the slider is of these.
        num_test: Images of test, which are folded away.
        is_audited: Whether it shows the verdict of an audit.
        has_paths: Whether it names image files.
        has_images: Whether it contains images.
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

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return result_as_dict(self)


def report(
    run: str | Path,
    file: str | Path | None = None,
    *,
    positive: str | None = None,
    data: str | Path | None = None,
    images: str = "none",
    no_paths: bool = False,
    say: Say = log_line,
) -> ReportSummary:
    """Write one page about a run: how good it is, where to put the threshold, how it was made.

    The page is one file without any request to a network. It is readable without JavaScript and can
    be printed. Figures are computed anew from the run's own cache.

    Args:
        run: The run folder.
        file: The page; None writes ``report.html`` into the run. An earlier report is replaced.
        positive: The class that is looked for; None takes that of ``decide``. Without one, there is
            no threshold to choose, and the recalls of all classes are shown.
        data: The images that the cache was made of, to show some.
        images: ``none``; ``mistakes``: small pictures of the mistakes that are listed, on valid and
            test; ``all``: of all images of both. Those that changed since are left out.
        no_paths: Call images by split and number instead of by their paths.
        say: Receives the lines for people.

    Raises:
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
    if (data is None) != (images == "none"):
        found = "--images without --data" if data is None else "--data without --images"
        raise ConfigError("--images", expected="mistakes or all, with --data", found=found)
    loaded = load_run(run)
    place = loaded.path / REPORT_NAME if file is None else file
    inputs = [data, *cache_paths(loaded), loaded.path / "run.json"]
    output = Output(place, "FILE.html", _KIND, inputs=inputs)
    output.check()
    facts = gather(loaded, positive)
    pictures = dict[tuple[str, str], str]()
    if data is not None:
        from featcache.reporting.pictures import read_pictures  # imports torch

        pictures = read_pictures(facts.cache, data, _wanted(facts, images))
        if not pictures:
            say("no picture is shown: there is none to show, or the images have changed")
    page = render(facts, pictures, has_paths=not no_paths).encode("utf-8")
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
    )  # fmt: skip
    say(f"{printable(output.path)}: one page, {in_bytes(len(page))}, no request to any network")
    if facts.positive is None:
        say("without a threshold: no class is decided on, and --positive names none")
    if not summary.is_audited:
        say("the cache was never audited, and the page says so: featcache audit")
    named = "it names image files (--no-paths: numbers)" if summary.has_paths else "no file names"
    say(f"it shows {count(num_valid, 'image')} of valid; {num_test:,} of test are folded away")
    shown = "no images" if not pictures else count(len(pictures), "small picture")
    say(f"it contains {shown} of patients; {named}")
    return summary


def _wanted(facts: Facts, images: str) -> list[tuple[str, str]]:
    """Return split and path of the images to show."""
    wanted = []
    for split in (facts.valid, facts.test):
        if split is not None:
            rows = range(len(split.rows.paths)) if images == "all" else mistaken_rows(split)
            wanted += [(split.split, split.rows.paths[row]) for row in rows]
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
