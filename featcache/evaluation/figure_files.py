"""What ``evaluate`` keeps in a run: ``evaluation/SPLIT.json``, pictures, and the losses' picture.

Reads: the run's history. Writes: these files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from featcache.errors import RunError, printable
from featcache.evaluation.confusions import Confusion, to_matrix
from featcache.evaluation.confusions import as_csv as cells_as_csv
from featcache.evaluation.curve_figures import draw_losses, draw_reliability, draw_roc
from featcache.evaluation.curves import measure_reliability, roc_curves
from featcache.evaluation.deciding.decision_file import Decisions
from featcache.evaluation.figures import DPI, draw_confusion
from featcache.evaluation.history import read_histories
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.files import optional_json_object, read_regular
from featcache.formatting import decimal
from featcache.heads.run import Run
from featcache.outputs import Kind, Output, write_outputs
from featcache.runtime import Say

LOSSES_NAME = "loss_curves.png"


def _is_evaluation(path: Path) -> bool:
    """Return whether a file is one of ``RUN/evaluation/SPLIT.json``."""
    facts = optional_json_object(path, max_bytes=_MAX_FIGURES_BYTES)
    return {"split", "accuracy", "fingerprint"} <= facts.keys()


def _is_picture(path: Path) -> bool:
    """Return whether a file is a PNG of the resolution that ours have."""
    try:
        data = read_regular(path, max_bytes=_MAX_FIGURES_BYTES)
    except OSError:
        return False
    return data.startswith(b"\x89PNG\r\n\x1a\n") and _RESOLUTION in data[:200]


def _is_cells(path: Path) -> bool:
    """Return whether a file is a CSV of the cells of a confusion matrix."""
    try:
        data = read_regular(path, max_bytes=_MAX_FIGURES_BYTES)
    except OSError:
        return False
    return data.startswith(cells_as_csv([]).encode())


_MAX_FIGURES_BYTES = 1 << 28
_RESOLUTION = b"pHYs" + 2 * round(DPI / 0.0254).to_bytes(4) + b"\x01"  # dots per metre
_JSON = Kind("evaluation", "a new file, or an earlier evaluation", RunError, _is_evaluation,
             may_be_link=False)  # fmt: skip
_PICTURE = replace(_JSON, is_own=_is_picture)
_CELLS = replace(_JSON, is_own=_is_cells)


class FigureFiles:
    """Where a run keeps the figures of a split.

    Args:
        run: The run.
        split: The split.

    Raises:
        RunError: If one of them is a link or another file: a stranger's run must not lead
            elsewhere.
    """

    def __init__(self, run: Run, split: str) -> None:
        self._run, self._split = run, split
        self._folder = run.path / "evaluation"
        self._facts = Output(self._folder / f"{split}.json", "evaluation", _JSON)
        self._confusion, self._roc, self._reliability = (
            Output(self._folder / f"{split}_{name}.png", "evaluation", _PICTURE)
            for name in ("confusion", "roc", "reliability")
        )
        self._cells = Output(self._folder / f"{split}_confusion.csv", "evaluation", _CELLS)
        self._losses = Output(run.path / LOSSES_NAME, "evaluation", _PICTURE)
        self._check()

    @property
    def _outputs(self) -> tuple[Output, ...]:
        return self._facts, self._confusion, self._roc, self._reliability, self._cells

    def _check(self) -> None:
        if self._folder.is_symlink() or (self._folder.exists() and not self._folder.is_dir()):
            raise RunError(
                "evaluation", expected="a folder in the run", found="a link or a file",
                where=self._folder, hint="Remove it",
            )  # fmt: skip
        for output in self._outputs:
            output.check()

    def write(
        self, facts: bytes, rows: PredictedRows, *, accuracy: float,
        confusions: Sequence[Confusion] | None, decisions: Decisions | None, positive: str | None,
        has_cells: bool, others: Mapping[Output, bytes], say: Say,
    ) -> None:  # fmt: skip
        """Write what an evaluation found, and the picture of the losses if there is none.

        Args:
            facts: ``SPLIT.json``.
            rows: What was measured.
            accuracy: For a title.
            confusions: None with several labels.
            decisions: The thresholds of the run, or None.
            positive: The class that is looked for, or None.
            has_cells: Whether the confusion matrix is also kept as a CSV.
            others: Further files, written with these or not at all.
            say: Receives a line for people.
        """
        run = self._run
        name = f"{run.path.resolve().name} on {self._split}"
        contents = {**others, self._facts: facts}
        if confusions is not None:
            title = f"{name}, accuracy {decimal(accuracy)}"
            matrix = to_matrix(confusions, run.classes)
            contents[self._confusion] = draw_confusion(matrix, run.classes, title)
        if curves := roc_curves(rows, positive, decisions):
            contents[self._roc] = draw_roc(curves, name, len(rows.targets), len(run.classes))
        reliability = measure_reliability(rows, positive, decisions)
        contents[self._reliability] = draw_reliability(reliability, name, run.task)
        if has_cells:
            contents[self._cells] = cells_as_csv(confusions or []).encode()
        if not os.path.lexists(self._losses.path):
            losses = draw_losses(read_histories(run), run.path.resolve().name)
            if losses is not None:
                contents[self._losses] = losses
        is_new = not self._folder.exists()
        self._folder.mkdir(exist_ok=True)
        self._check()  # again: it may be a link by now
        try:
            write_outputs(contents)
        except BaseException:
            if is_new:
                self._folder.rmdir()
            raise
        if self._roc not in contents:  # an earlier one would pass for that of these rows
            self._roc.path.unlink(missing_ok=True)
        kept = [output.path.name for output in self._outputs if output in contents]
        say(f"written to {printable(self._folder.as_posix())}/: {', '.join(kept)}")
        if self._losses in contents:
            say(f"written to {printable(self._losses.path.as_posix())}")
