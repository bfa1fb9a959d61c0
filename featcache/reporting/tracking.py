"""Log: replay a finished run, sweep or cross-validation into MLflow or TensorBoard.

A tracker's run is recognised by the hash of the head's weights, a part of it (the training, an
evaluation, the decision) by the hash of its content: what is there is not logged again, and what is
new comes to the same run.

Reads: the folder. Writes: the tracker's database or folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from featcache.cache.by_url import by_url
from featcache.errors import ConfigError, printable
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count
from featcache.reporting.tracked import Part, Tracked, read_tracked
from featcache.runtime import Say, log_line

TRACKERS = ("mlflow", "tensorboard")


class Tracker(Protocol):
    """Where runs are logged.

    Attributes:
        place: Its address, for people.
        command: What opens it in a browser; "" where a server shows it.
    """

    place: str
    command: str

    def open_run(self, tracked: Tracked, parent: str | None) -> tuple[str, dict[str, str]]:
        """Return the tracker's name of a run, made if it is not there, and sha256 by part."""

    def write(self, run: str, part: Part) -> None:
        """Log a part, and that it is logged."""

    def finish(self, run: str) -> None:
        """Mark a run as ended."""


@dataclass(frozen=True)
class LogSummary:
    """What was logged.

    Attributes:
        run: The folder.
        to: ``mlflow`` or ``tensorboard``.
        place: The tracking URI, or the folder of the event files.
        tracker_run: MLflow's id of the run, or the run's folder in ``place``.
        num_runs: Runs in the tracker: this one and its trials or folds.
        num_new: Parts that were logged now: training, losses, evaluations, decision, audit, model.
        num_known: Parts that were there.
        has_paths: Whether paths of images were logged.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    run: Path
    to: str
    place: str
    tracker_run: str
    num_runs: int
    num_new: int
    num_known: int
    has_paths: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return result_as_dict(self)


@by_url("run")
def log(
    run: str | Path,
    *,
    to: str,
    uri: str | None = None,
    out: str | Path | None = None,
    model: str | Path | None = None,
    paths: bool = False,
    say: Say = log_line,
) -> LogSummary:
    """Log a finished run, sweep or cross-validation to MLflow or TensorBoard.

    Parameters, curves by epoch, the figures of each evaluation with the ends of their intervals,
    pictures, decision, the audit's verdict, and the files of the run, none of which is a pickle.
    Trials, folds and heads of an ensemble are runs of their own below it. A second call logs only
    what is new.

    Args:
        run: The folder of a run or of a cross-validation.
        to: ``mlflow`` or ``tensorboard``.
        uri: MLflow's tracking URI; None takes the environment variable ``MLFLOW_TRACKING_URI``
            or, without one, ``sqlite:///mlflow.db``.
        out: TensorBoard's folder; None is ``tensorboard``.
        model: What ``export`` made of the run, ``FILE.onnx`` or ``FOLDER/`` with its model card.
        paths: Log paths of images too: mistakes, out-of-fold predictions, the page of ``report``.
        say: Receives the lines for people.

    Raises:
        ConfigError: If the tracker is unknown, not installed or cannot be written, an option does
            not go with it, or ``model`` is of another run.
        RunError: If the folder is neither a run nor a cross-validation, or damaged.
        CacheError: If the disk is full.

    Example:
        >>> featcache.log("run", to="mlflow").num_new  # doctest: +SKIP
    """
    if to not in TRACKERS:
        raise ConfigError("--to", expected=" or ".join(TRACKERS), found=to)
    for name, value, goes_with in (("--uri", uri, "mlflow"), ("--out", out, "tensorboard")):
        if value is not None and to != goes_with:
            raise ConfigError(name, expected=f"--to {goes_with}", found=f"--to {to}")
    tracked = read_tracked(run, model, has_paths=paths)
    tracker = _open_mlflow(uri) if to == "mlflow" else _open_tensorboard(out or "tensorboard")
    counts = [0, 0, 0]
    tracker_run = _replay(tracker, tracked, None, counts)
    num_runs, num_new, num_known = counts
    summary = LogSummary(
        run=Path(run), to=to, place=tracker.place, tracker_run=tracker_run, num_runs=num_runs,
        num_new=num_new, num_known=num_known, has_paths=paths,
    )  # fmt: skip
    below = f" and {count(num_runs - 1, 'run')} below it" if num_runs > 1 else ""
    say(f"{printable(tracker.place)}: {printable(tracked.name)}{below}, run {tracker_run}")
    say(f"{count(num_new, 'part')} logged, {num_known:,} were there already")
    say("paths of images are logged too" if paths else "no path of an image is logged (--paths)")
    if tracker.command:
        say(f"to look at it: {tracker.command}")
    return summary


def _replay(tracker: Tracker, tracked: Tracked, parent: str | None, counts: list[int]) -> str:
    run, known = tracker.open_run(tracked, parent)
    counts[0] += 1
    for part in tracked.parts:
        is_new = known.get(part.name) != part.sha256
        if is_new:
            tracker.write(run, part)
        counts[1 if is_new else 2] += 1
    for child in tracked.children:
        _replay(tracker, child, run, counts)
    tracker.finish(run)
    return run


def _open_mlflow(uri: str | None) -> Tracker:
    from featcache.reporting.mlflow_tracker import MlflowTracker

    return _installed("mlflow", lambda: MlflowTracker(uri))


def _open_tensorboard(out: str | Path) -> Tracker:
    from featcache.reporting.tensorboard_tracker import TensorboardTracker

    return _installed("tensorboard", lambda: TensorboardTracker(out))


def _installed(name: str, make: Callable[[], Tracker]) -> Tracker:
    try:
        return make()
    except ImportError as error:
        raise ConfigError(
            f"--to {name}", expected=f"the package {name}", found=str(error),
            hint='Install it: pip install "featcache[tracking]"',
        ) from error  # fmt: skip
