"""``RUN/decision.json``: the thresholds of a run, how they were chosen, and how they are applied.

The file is tied to the head by the sha256 of its weights, and bears its own hash as ``run.json``
does. README.md of this folder has its keys.

Reads and writes: that file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import RunError
from featcache.files import json_sha256, optional_json_object, read_regular, readable_json
from featcache.heads.run import Run
from featcache.metrics.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, apply_temperature
from featcache.metrics.thresholds import MAX_THRESHOLD
from featcache.outputs import Kind, Output, write_output
from featcache.untrusted import parse_json_object, reading_hint

DECISION_NAME, REFER = "decision.json", "refer"

_FORMAT, _FORMAT_VERSION = "featcache-decision", 1
_MAX_BYTES = 1 << 24
_USED = {"threshold", "refer_below", "temperature", "wish", "on", "basis", "unit", "bound"}
_WISHES = {"recall", "specificity", "threshold"}
_AGAIN = "Decide again: featcache decide"


@dataclass(frozen=True)
class Decisions:
    """The thresholds of a head.

    Attributes:
        classes: C names of the head's outputs.
        task: ``multiclass``: of one class; ``multilabel``: of one or more.
        rules: Class -> what ``DecideSummary.as_dict`` says of its threshold, without the run.
    """

    classes: tuple[str, ...]
    task: str
    rules: dict[str, dict[str, Any]]

    def brief(self) -> dict[str, dict[str, Any]]:
        """Return of each class what is needed to apply its threshold, and what it promises."""
        return {
            name: {key: rule[key] for key in rule if key in _USED}
            for name, rule in self.rules.items()
        }  # fmt: skip

    def calibrate(self, probs: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """Return the calibrated probabilities (N,) of the classes that have a temperature.

        One label a row: of all classes, if the threshold came with a temperature.

        Args:
            probs: (N, C)
        """
        calibrated = dict[str, npt.NDArray[np.float64]]()
        for name, rule in self.rules.items():
            if rule["temperature"] is None:
                continue
            if self.task == "multilabel":
                of_class = probs[:, self.classes.index(name)]
                pair = np.stack([1 - of_class, of_class], axis=1)
                calibrated[name] = apply_temperature(pair, rule["temperature"])[:, 1]
            else:
                softened = apply_temperature(probs, rule["temperature"])
                calibrated |= dict(zip(self.classes, softened.T, strict=True))
        return calibrated

    def apply(self, probs: npt.NDArray[np.float64]) -> tuple[Any, ...]:
        """Return the decision of each row.

        The positive class if its probability is >= its threshold, else the most probable other
        class; ``refer`` between two thresholds. With several labels a row, a tuple of the classes
        above their thresholds; of a class without one, above 0.5.

        Args:
            probs: (N, C)
        """
        if self.task == "multilabel":
            says_yes = probs > 0.5
            for name, rule in self.rules.items():
                column = self.classes.index(name)
                says_yes[:, column] = probs[:, column] >= rule["threshold"]
            return tuple(tuple(self.classes[i] for i in np.flatnonzero(row)) for row in says_yes)
        ((name, rule),) = self.rules.items()
        column = self.classes.index(name)
        others = probs.copy()
        others[:, column] = -1
        chosen = [self.classes[i] for i in others.argmax(axis=1).tolist()]
        upper = rule["threshold"] if rule["refer_below"] is None else rule["refer_below"]
        for row, prob in enumerate(probs[:, column].tolist()):
            if prob >= upper:
                chosen[row] = name
            elif prob >= rule["threshold"]:
                chosen[row] = REFER
        return tuple(chosen)


def load_decisions(run: Run) -> Decisions | None:
    """Return the thresholds of a run, None if it has none.

    Raises:
        RunError: If ``decision.json`` is damaged, of another head or of a newer version.
    """
    try:
        facts = parse_json_object(read_regular(run.path / DECISION_NAME, max_bytes=_MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(
            f"run, {DECISION_NAME}", expected="a readable file", found=error.strerror,
            where=run.path, hint=reading_hint(error, _AGAIN),
        ) from error  # fmt: skip
    except ValueError as error:
        raise _damaged(run, "a JSON object", error) from error
    if facts.get("format") != _FORMAT:
        raise _damaged(run, f"format {_FORMAT}", "another")
    if facts.get("format_version") != _FORMAT_VERSION:
        raise RunError(
            f"run, {DECISION_NAME}", expected=f"format version {_FORMAT_VERSION}",
            found=facts.get("format_version"), where=run.path,
            hint="A newer featcache wrote it: upgrade with pip install -U featcache",
        )  # fmt: skip
    if not _is_as_written(facts):
        raise _damaged(run, "its own sha256", "another")
    if facts.get("weights_sha256") != run.weights_sha256:
        other = str(facts.get("weights_sha256"))[:16]
        raise _damaged(
            run, f"thresholds of this head, {run.weights_sha256[:16]}...", f"of head {other}..."
        )
    rules = facts.get("decisions")
    if not isinstance(rules, dict) or not _fit(rules, run):
        raise _damaged(run, "thresholds in [0, 1] of classes of this run", "others")
    return Decisions(run.classes, run.task, rules)


def decision_output(run: Run) -> Output:
    """Return ``RUN/decision.json`` as an output, checked.

    Raises:
        RunError: If a link or another file is there.
    """
    output = Output(run.path / DECISION_NAME, "decision", _KIND)
    output.check()
    return output


def write_decision(output: Output, run: Run, rule: Mapping[str, Any]) -> None:
    """Write the threshold of a class; with several labels a row, those of others are kept.

    Args:
        output: What ``decision_output`` returned.
        run: The run.
        rule: What ``DecideSummary.as_dict`` says, without the run.

    Raises:
        RunError: With several labels, if the thresholds that are there are not of this head.
        CacheError: If the disk is full or the folder cannot be written.
    """
    kept: dict[str, Any] = {}
    if run.task == "multilabel" and (known := load_decisions(run)) is not None:
        kept = known.rules
    facts = {
        "format": _FORMAT, "format_version": _FORMAT_VERSION, "weights_sha256": run.weights_sha256,
        "decisions": kept | {rule["positive"]: dict(rule)},
    }  # fmt: skip
    facts["sha256"] = json_sha256(facts, without="sha256")
    write_output(output, readable_json(facts).encode())


def find_replaced(run: Run, positive: str) -> str | None:
    """Return the other class whose threshold a run has, which one for this class replaces."""
    if run.task == "multilabel":
        return None
    try:
        known = load_decisions(run)
    except RunError:  # of another head, or damaged
        return None
    return next((name for name in (known.rules if known else {}) if name != positive), None)


def _is_decision(path: Path) -> bool:
    return optional_json_object(path, max_bytes=_MAX_BYTES).get("format") == _FORMAT


_KIND = Kind("decision", "a new file, or an earlier decision", RunError, _is_decision,
             may_be_link=False)  # fmt: skip


def _is_as_written(facts: Mapping[str, Any]) -> bool:
    try:
        return json_sha256(facts, without="sha256") == facts.get("sha256")
    except ValueError:  # NaN
        return False


def _fit(rules: Mapping[str, Any], run: Run) -> bool:
    """Return whether rules are of classes of the run, and what is used of them makes sense."""
    if not rules or (run.task != "multilabel" and len(rules) > 1):
        return False
    return all(name in run.classes and _is_rule(rule) for name, rule in rules.items())


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, dict) or not rule.keys() >= _USED:
        return False
    low, high, temperature = rule["threshold"], rule["refer_below"], rule["temperature"]
    high = low if high is None else high
    temperature = 1.0 if temperature is None else temperature
    numbers = (low, high, temperature, rule["bound"])
    if any(type(number) is not float or not math.isfinite(number) for number in numbers):
        return False
    wish = rule["wish"]
    is_wish = isinstance(wish, dict) and len(wish) == 1 and wish.keys() <= _WISHES
    return (
        0 <= low <= high <= MAX_THRESHOLD and MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE
        and 0 <= rule["bound"] <= 1 and is_wish
        and all(type(value) is float for value in wish.values())
        and rule["unit"] in {"group", "image"}
        and all(isinstance(rule[key], str) for key in ("on", "basis"))
    )  # fmt: skip


def _damaged(run: Run, expected: str, found: object) -> RunError:
    return RunError(
        f"run, {DECISION_NAME}", expected=expected, found=found, where=run.path,
        hint=f"{_AGAIN}, after removing it",
    )  # fmt: skip
