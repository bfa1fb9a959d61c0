"""decide on the command line: exit codes, one object, and what the other verbs then print."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_one_line_error
from sample_decisions import SMALL
from sample_rows import make_cache

from featcache.heads.training import train


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_cache(tmp_path / "c.h5")
    train(tmp_path / "c.h5", tmp_path / "run", valid_fraction=0.25, **SMALL)
    return tmp_path


def test_a_decision_is_printed_and_then_shown_by_the_others(place: Path, run: Any) -> None:
    result = run("decide", "run", "--positive", "covid", "--recall", 0.5, "--prevalence", 0.05)
    assert result.code == 0, result.err
    assert "recall guaranteed to be at least 0." in result.out
    assert "at a prevalence of 0.05, per image:\n  PPV " in result.out
    assert re.search(r"  NPV  +>?[01]\.\d{3}, 95 % interval 0\.\d+ to >?[01]\.", result.out)
    assert "written to run/decision.json" in result.out
    again = run("decide", "run", "--positive", "covid", "--threshold", 1, "--json")
    facts = json.loads(again.out)
    assert (facts["threshold"], facts["wish"]) == (1.0, {"threshold": 1.0})
    shown = run("info", "run").out
    assert "decision:\n  covid: threshold 1," in shown
    assert json.loads(run("info", "run", "--json").out)["decision"]["covid"]["threshold"] == 1
    predicted = run("predict", "run", "--cache", "c.h5").out
    assert "  decision: normal\n" in predicted
    assert "by the decision (covid if >= 1): 74 normal\n" in predicted
    evaluated = run("evaluate", "run").out
    assert "decision: covid if its probability is >= 1\n" in evaluated
    assert "bound from valid: none\n" in evaluated


def test_a_wish_too_high_is_exit_0_with_a_warning_and_1_with_strict(place: Path, run: Any) -> None:
    wish = ("decide", "run", "--positive", "covid", "--recall", 0.95)
    result = run(*wish)
    assert result.code == 0
    assert "warning: recall 0.95 cannot be promised: it needs 59 images" in result.err
    (place / "run" / "decision.json").unlink()
    assert_one_line_error(run(*wish, "--strict"), "expected 59 or more images, found 8")
    assert not (place / "run" / "decision.json").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--recall", 1.2), "--recall"),
        ((), "--recall, --specificity, --threshold"),
        (("--recall", 0.9, "--on", "nowhere"), "a folder with crossval.json"),
        (("--recall", 0.9, "--on", "c.h5"), "a folder with crossval.json"),
        (("--recall", 0.9, "--on", "test"), "could not be tested"),
    ],
)
def test_bad_input_gets_one_line(
    place: Path, run: Any, arguments: tuple[object, ...], part: str
) -> None:
    assert_one_line_error(run("decide", "run", "--positive", "covid", *arguments), part)


def test_a_decision_of_other_weights_stops_those_that_would_use_it(place: Path, run: Any) -> None:
    run("decide", "run", "--positive", "covid", "--recall", 0.5)
    kept = (place / "run" / "decision.json").read_bytes()
    train(place / "c.h5", place / "run", overwrite=True, seed=1, **SMALL)
    (place / "run" / "decision.json").write_bytes(kept)
    for verb in (
        ("evaluate", "run"), ("predict", "run", "--cache", "c.h5"), ("info", "run"),
        ("predict", "run", "x.png"), ("export", "run", "x.pt"),
    ):  # fmt: skip
        assert_one_line_error(run(*verb), "thresholds of this head", "featcache decide")
    assert run("decide", "run", "--positive", "covid", "--recall", 0.5).code == 0  # replaces it
    assert run("evaluate", "run").code == 0
