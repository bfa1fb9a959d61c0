"""The whole path on phantom X-rays: no data, no patient and no download needed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache import files
from featcache.cli.phantoms import CLASSES, GROUP_BY, NUM_PER_CLASS, make_phantoms
from featcache.data import splitting
from featcache.errors import RunError
from featcache.evaluation import evaluation
from featcache.extraction import extraction
from featcache.formatting import decimal
from featcache.heads import training
from featcache.reporting import report
from featcache.runtime import Say, Timer, device_name, log_line, resolve_device

BACKBONE = "efficientnet-lite0"  # its weights are a package: the demo needs no download
_OUTPUTS = ("raw", "split", "features.h5", "features.h5.partial", "run", "run.partial")
_CLASS = "(covid|normal)"
_FOLDERS = re.compile(
    rf"raw(/{_CLASS})?|split(/(train|valid|test)(/{_CLASS})?)?"
    r"|features\.h5\.partial|run(\.partial(/new)?)?(/evaluation)?"
)
_FILES = re.compile(
    rf"(raw|split/(train|valid|test))/{_CLASS}/P\d{{4}}_\d\.(png|jpg)"
    r"|features\.h5|features\.h5\.partial/(lock|probing|manifest\.json|shard\.\d+|\..*\.tmp)"
    r"|run\.partial/(lock|training\.safetensors)|run(\.partial/new)?/(\..*\.tmp|run\.json|environment\.json"
    r"|report\.html|history\.csv|head\.safetensors|rows\.bin|loss_curves\.png"
    r"|evaluation/test(\.json|_(confusion|roc|reliability)\.png))"
)
_MARKER = "demo.json"  # with this text in it a folder is ours to write in again
_MARKER_TEXT = files.readable_json({"format": "featcache-demo", "made_anew": _OUTPUTS}).encode()


@dataclass(frozen=True)
class DemoSummary:
    """What the demo did. Times in seconds of wall clock; the three shares on split ``test``."""

    folder: str
    num_images: int
    num_test: int
    accuracy: float
    sensitivity: float | None  # covid found, share of all covid
    specificity: float | None  # normal left alone, share of all normal
    draw_seconds: float
    split_seconds: float
    extract_seconds: float
    train_seconds: float
    evaluate_seconds: float
    report_seconds: float
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as a JSON object."""
        return asdict(self)


def run_demo(folder: Path | str, *, device: str = "auto", say: Say = log_line) -> DemoSummary:
    """Go the whole way on phantoms: draw, split, extract, train, evaluate, report.

    Args:
        folder: A new or empty folder, or one of an earlier demo: then ``raw``, ``split``,
            ``features.h5`` and ``run`` in it are made anew and all else is left alone.
        device: As for ``extract`` and ``train``.
        say: Gets the stages' lines, and at the end the summary and what to try next.

    Raises:
        RunError: If ``folder`` holds other people's files.
    """
    folder = Path(folder)
    resolve_device(device)  # a wrong name should not cost ten seconds of drawing
    _prepare_folder(folder)
    timer = Timer()
    say(f"Drawing {2 * NUM_PER_CLASS} phantom X-rays into {folder / 'raw'}")
    with timer("draw"):
        num_images = make_phantoms(folder / "raw", num_per_class=NUM_PER_CLASS)
    with timer("split"):
        splitting.split(folder / "raw", folder / "split", group_by=GROUP_BY, say=say)
    with timer("extract"):
        extraction.extract(
            folder / "split", folder / "features.h5",
            backbone=BACKBONE, group_by=GROUP_BY, device=device, say=say,
        )  # fmt: skip
    with timer("train"):
        training.train(folder / "features.h5", folder / "run", device=device, say=say)
    with timer("evaluate"):
        result = evaluation.evaluate(folder / "run", positive=CLASSES[0], say=say)
    with timer("report"):
        report.report(folder / "run", positive=CLASSES[0], say=lambda _: None)
    summary = DemoSummary(
        folder=folder.as_posix(),
        num_images=num_images,
        num_test=result.num_samples,
        accuracy=result.accuracy,
        sensitivity=result.sensitivity,
        specificity=result.specificity,
        device=device_name(resolve_device(device)),
        **{f"{stage}_seconds": round(seconds, 3) for stage, seconds in timer.seconds.items()},
    )
    for line in _describe(summary).split("\n"):
        say(line)
    return summary


def _prepare_folder(folder: Path) -> None:
    """Make the folder, or clear what an earlier demo wrote into it; refuse anything else."""
    marker = folder / _MARKER
    ours = marker.is_file() and marker.read_bytes() == _MARKER_TEXT
    if not ours and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(
            "demo folder", expected="a new or empty folder, or an earlier demo's",
            found="other files", where=folder, hint="Choose another name",
        )  # fmt: skip
    # Whoever works on in a demo's folder must not lose what the demo did not write.
    paths = [path for name in _OUTPUTS for path in (folder / name, *(folder / name).rglob("*"))]
    found = {path.relative_to(folder).as_posix(): path for path in paths if os.path.lexists(path)}
    others = [
        name for name, path in found.items()
        if path.is_symlink() or not (_FOLDERS if path.is_dir() else _FILES).fullmatch(name)
    ]  # fmt: skip
    if others:
        raise RunError(
            "demo folder", expected="what the demo writes, and nothing else, in its folders",
            found=", ".join(others[:3]), where=folder, hint="Move it away, or choose another name",
        )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(marker, _MARKER_TEXT)
    except OSError as error:
        raise files.disk_error(error, folder, len(_MARKER_TEXT)) from error
    for name in _OUTPUTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _describe(summary: DemoSummary) -> str:
    """Return the lines that end the demo."""
    total = sum(v for k, v in summary.as_dict().items() if k.endswith("_seconds"))
    rate = summary.num_images / summary.extract_seconds
    figures = (summary.accuracy, summary.sensitivity, summary.specificity)
    right, found, spared = (decimal(figure or 0) for figure in figures)
    names = ("features.h5", "run-linear", "run", "split/test/covid", "run/report.html")
    cache, new_run, run, pictures, page = (
        shlex.quote(f"{summary.folder}/{name}") for name in names
    )
    return f"""
The whole path took {total:.0f} s on this machine ({summary.device}):
  draw      {summary.draw_seconds:6.1f} s  {summary.num_images} phantom X-rays
  split     {summary.split_seconds:6.1f} s  no patient in two splits
  extract   {summary.extract_seconds:6.1f} s  {BACKBONE}, {rate:.0f} images/s, once
  train     {summary.train_seconds:6.1f} s  a head on the kept features
  evaluate  {summary.evaluate_seconds:6.1f} s  {summary.num_test} unseen phantoms
  report    {summary.report_seconds:6.1f} s  one page, also for who has no featcache
On those: accuracy {right}; of covid {found} found, of normal {spared} left alone.
Phantoms are drawings: this shows that the path works, and nothing about medicine.

All of it on one page, for any browser: {page}

Next, another head on the same features; no image is read again:
  featcache train {cache} {new_run} --hidden none --epochs 30
or what the first head says about single pictures:
  featcache predict {run} {pictures}"""
