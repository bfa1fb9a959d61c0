"""The page in a browser: what the slider shows, filters, JavaScript off, axe-core, no request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headless_browser import AXE, CHROMIUM, Browser
from sample_decisions import copy_run, decide_quietly, make_work
from sample_rows import edited, make_cache, rows_of
from sklearn.metrics import confusion_matrix, precision_score, recall_score

import featcache
from featcache.evaluation.deciding.scored_rows import ScoredRows, read_valid
from featcache.heads.run import load_run
from featcache.metrics.rates import grouped_rate_interval
from featcache.metrics.thresholds import (
    measure_recall,
    measure_specificity,
    predictive_value_intervals,
    predictive_values,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

READ = """(() => {
  const number = (text) => text === "" || text === undefined ? null : Number(text);
  const read = (cell, key) => number(cell.dataset[key]);
  const rates = {};
  document.querySelectorAll("[data-rate]").forEach((row) => {
    const [value, range, of] = row.querySelectorAll("td");
    rates[row.dataset.rate] = [read(value, "value"), read(range, "low"), read(range, "high"),
                               value.textContent, range.textContent, of.textContent];
  });
  const counts = {};
  document.querySelectorAll("[data-count]").forEach((cell) => {
    counts[cell.dataset.count] = Number(cell.textContent.replaceAll(",", ""));
  });
  const at = document.querySelector('[data-mark="valid-roc"]').getAttribute("transform");
  const value = document.getElementById("threshold-value");
  return {rates, counts, at, threshold: Number(value.dataset.value),
          said: document.getElementById("slider-says").textContent,
          ppv: document.getElementById("ppv").textContent,
          npv: document.getElementById("npv").textContent,
          command: document.getElementById("command").textContent};
})()"""


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as made:
        yield made


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with groups of two images, its decision, and pages with and without a class to find."""
    folder = make_work(tmp_path_factory.mktemp("chromium"))
    featcache.report(folder / "run", folder / "none.html", say=quiet)
    decide_quietly(folder / "run", recall=0.8, refer=0.1)
    featcache.report(folder / "run", folder / "page.html", say=quiet)
    (folder / "at_a_score").mkdir()
    copy = copy_run(folder, folder / "at_a_score")
    scores = np.sort(rows_of_valid(folder).scores)
    decide_quietly(copy, threshold=float(scores[len(scores) // 2]))
    featcache.report(copy, folder / "score.html", say=quiet)
    return folder


def rows_of_valid(work: Path) -> ScoredRows:
    (rows,) = read_valid(load_run(work / "run"), "covid")
    return rows


def move(browser: Browser, place: int) -> Any:
    browser.run(f"slider.value = {place}; slider.dispatchEvent(new Event('input'))")
    return browser.run(READ)


def test_at_20_thresholds_all_that_the_slider_shows_is_right(work: Path, browser: Browser) -> None:
    rows = rows_of_valid(work)
    scores, is_yes, groups = rows.scores, rows.is_positive, rows.groups
    assert groups is not None
    assert len(set(groups)) < len(groups) * 0.6
    browser.open(work / "page.html")
    last = int(browser.run("slider.max"))
    seen = set()
    for place in np.linspace(0, last, 20).round().astype(int).tolist():
        page = move(browser, place)
        threshold = page["threshold"]
        seen.add(threshold)
        called = scores >= threshold
        (tn, fp), (fn, tp) = confusion_matrix(is_yes, called, labels=[False, True]).tolist()
        assert page["counts"] == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
        values = {
            "recall": recall_score(is_yes, called, zero_division=np.nan),
            "specificity": recall_score(~is_yes, ~called, zero_division=np.nan),
            "ppv": precision_score(is_yes, called, zero_division=np.nan),
            "npv": precision_score(~is_yes, ~called, zero_division=np.nan),
        }
        intervals: dict[str, Any] = {
            "recall": measure_recall(scores, is_yes, threshold, groups).interval,
            "specificity": measure_specificity(scores, is_yes, threshold, groups).interval,
        }
        for name, which, hits in (("ppv", called, is_yes), ("npv", ~called, ~is_yes)):
            of = [groups[i] for i in np.flatnonzero(which)]
            intervals[name] = grouped_rate_interval(hits[which], of) if of else None
        for name, (value, low, high, text, limits, _) in page["rates"].items():
            if np.isnan(values[name]):
                assert (value, text, limits) == (None, "undefined", "")
                continue
            np.testing.assert_allclose([value, low, high], [values[name], *intervals[name]],
                                       atol=1e-6)  # fmt: skip
            for shown, number in zip(
                (text, *limits.split(" to ")), (value, low, high), strict=True
            ):
                assert shown in {f"{number:.3f}", ">0.999", "<0.001"}
        # Of the mixture in valid, what Bayes makes of the rates is what was counted.
        assert page["ppv"] == page["rates"]["ppv"][3]
        assert page["npv"] == page["rates"]["npv"][3]
        assert f"{tp} of 80 found, {fp} of 80 false alarms" in page["said"]
        x, y = (float(part) for part in page["at"][10:-1].split(","))
        np.testing.assert_allclose([x, y], [54 + 372 * fp / 80, 284 - 270 * tp / 80], atol=0.01)
        assert page["command"].startswith("featcache decide run --positive covid --threshold ")
        assert float(page["command"].split()[-1]) == min(threshold, 1)
    assert len(seen) == 20
    assert (browser.messages, browser.requests) == ([], [])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_another_prevalence_gives_the_values_and_intervals_of_metrics(
    work: Path, browser: Browser, share: float
) -> None:
    browser.open(work / "page.html")
    last = int(browser.run("slider.max"))
    browser.run(
        f"prevalence.value = '{100 * share:g}'; prevalence.dispatchEvent(new Event('input'))"
    )
    for place in (0, last // 3, last // 2, last):
        page = move(browser, place)
        (recall, *of_recall, _, _, _), (specificity, *of_specificity, _, _, _) = (
            page["rates"][name] for name in ("recall", "specificity")
        )
        values = predictive_values(recall, specificity, share)
        intervals = predictive_value_intervals(
            recall, specificity, (tuple(of_recall), tuple(of_specificity)), share
        )
        for name, value, interval in zip(("ppv", "npv"), values, intervals, strict=True):
            if value is None:
                assert page[name] == "undefined"
                continue
            assert interval is not None
            shown = [float(part.strip("<>")) for part in re.findall(r"[<>]?\d\.\d+", page[name])]
            np.testing.assert_allclose(shown, [value, *interval], atol=1.01e-3)
    assert (browser.messages, browser.requests) == ([], [])


@pytest.mark.parametrize(("name", "anchor"), [("page", "threshold=0.35&"), ("score", "")])
def test_a_cell_lists_its_images_the_worst_first(
    work: Path, browser: Browser, name: str, anchor: str
) -> None:
    rows = rows_of_valid(work)
    browser.open(work / f"{name}.html", f"{anchor}cell=fp")
    threshold = browser.run("Number(document.getElementById('threshold-value').dataset.value)")
    assert (threshold in rows.scores) == (name == "score")
    called = rows.scores >= threshold
    which = {
        "fp": called & ~rows.is_positive, "fn": ~called & rows.is_positive,
        "tp": called & rows.is_positive, "tn": ~called & ~rows.is_positive,
    }  # fmt: skip
    for cell, chosen in which.items():
        if cell != "fp":  # which the address asked for
            browser.run(f"document.querySelector('[data-cell={cell}]').click()")
        listed = browser.run(
            "[...document.querySelectorAll('#mistakes tbody th')].map((th) => th.textContent)"
        )
        places = np.flatnonzero(chosen)
        sign = 1 if cell in {"fn", "tp"} else -1
        order = places[np.argsort(sign * rows.scores[places], kind="stable")]
        assert {*listed} == {rows.paths[i] for i in places}
        assert [rows.scores[rows.paths.index(name)] for name in listed] == rows.scores[
            order
        ].tolist()
        pressed = browser.run("[...document.querySelectorAll('[aria-pressed=true]')].map("
                              "(button) => button.dataset.cell)")  # fmt: skip
        assert pressed == [cell]
    browser.run("document.getElementById('all-mistakes').click()")
    assert browser.run("document.querySelectorAll('#mistakes tbody tr').length") == sum(
        which[cell].sum() for cell in ("fp", "fn")
    )


def test_the_slider_is_moved_by_keys(work: Path, browser: Browser) -> None:
    browser.open(work / "page.html")
    before = browser.run(READ)["threshold"]
    browser.run("document.getElementById('slider').focus()")
    browser.press("ArrowRight", 39)
    assert browser.run(READ)["threshold"] > before


def test_who_opens_test_is_told_so_until_the_page_is_loaded_again(
    work: Path, browser: Browser
) -> None:
    shown = ("[...document.querySelectorAll('.looked')].filter((line) =>"
             " getComputedStyle(line).display !== 'none').length")  # fmt: skip
    browser.open(work / "page.html")
    assert browser.run(shown) == 0
    browser.run("document.querySelector('#test summary').click()")
    assert browser.run("new Promise((done) => setTimeout(() => done(" + shown + "), 0))") == 2
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run(shown) == 2
    browser.run("document.querySelector('#test summary').click()")
    assert browser.run("new Promise((done) => setTimeout(() => done(" + shown + "), 0))") == 2
    browser.open(work / "page.html", script=False)
    assert browser.run(shown) == 0
    browser.run("document.querySelector('#test').open = true")
    assert browser.run(shown) == 2


def test_without_javascript_all_numbers_are_there(work: Path, browser: Browser) -> None:
    browser.open(work / "page.html", "threshold=0.01", script=False)
    with_script_off = browser.run("document.body.innerText")
    rows = rows_of_valid(work)
    decision = load_run(work / "run").path / "decision.json"
    assert decision.is_file()
    for name in ("tp", "fn", "fp", "tn"):
        assert browser.run(f"document.querySelector('[data-count={name}]').offsetHeight") > 0
    missed = browser.run("Number(document.querySelector('[data-count=fn]').textContent)")
    assert f"Missed: {missed} of {rows.is_positive.sum()} images of covid" in with_script_off
    assert browser.run(
        "[...document.querySelectorAll('.live')].every((part) => part.offsetHeight === 0)"
    )
    assert browser.run("[...document.querySelectorAll('button')].every((button) => "
                       "button.disabled || button.offsetHeight === 0)")  # fmt: skip
    assert "Not for diagnosis." in with_script_off
    threshold = json.loads(decision.read_text("utf-8"))["decisions"]["covid"]["threshold"]
    assert f"--positive covid --threshold {threshold!r}" in with_script_off


def test_a_cell_of_three_classes_lists_its_mistakes(tmp_path: Path, browser: Browser) -> None:
    rng = np.random.default_rng(0)
    splits = {}
    for split, number in (("train", 60), ("valid", 600)):
        rows = rows_of(split, np.arange(number) % 3)
        splits[split] = edited(rows, features=rng.normal(size=(number, 10)).astype("f4"))
    make_cache(tmp_path / "c.h5", classes=("a", "b", "c"), **splits)
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=1, say=quiet,
                    progress=False)  # fmt: skip
    featcache.report(tmp_path / "run", tmp_path / "p.html", say=quiet)
    browser.open(tmp_path / "p.html")
    visible = ("[...document.querySelectorAll('#mistakes tbody tr')].filter((row) => !row.hidden)"
               ".map((row) => row.innerText)")  # fmt: skip
    assert len(browser.run(visible)) == 100
    for button in range(6):
        number = int(browser.run(
            f"(() => {{ const b = document.querySelectorAll('[data-pair]:is(button)')[{button}];"
            " b.click(); return b.textContent; })()"
        ))  # fmt: skip
        listed = browser.run(visible)
        assert min(number, 20) <= len(listed) <= number
        assert len({tuple(line.split("\t")[1:3]) for line in listed}) == 1
    browser.run("document.getElementById('all-mistakes').click()")
    assert len(browser.run(visible)) == 100


@pytest.mark.parametrize(("name", "dark", "width"), [
    ("page", False, 1280), ("page", True, 390), ("none", False, 390),
])  # fmt: skip
@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here: see tests/README.md")
def test_axe_finds_nothing(
    work: Path, browser: Browser, name: str, *, dark: bool, width: int
) -> None:
    browser.open(work / f"{name}.html", dark=dark, width=width)
    browser.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.violations() == []
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_a_page_of_many_rows_is_small(tmp_path: Path, browser: Browser) -> None:
    rng = np.random.default_rng(0)
    splits = {}
    for split, number in (("train", 40), ("valid", 5000), ("test", 20000)):
        rows = rows_of(split, np.arange(number) % 2, width=4)
        features = rng.normal(size=(number, 4)).astype("f4") + rows.targets[:, None]
        groups = [f"{split}{i // 2}" for i in range(number)]
        splits[split] = edited(rows, features=features.astype("f4"), groups=groups)
    make_cache(tmp_path / "c.h5", **splits)
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=1, say=quiet,
                    progress=False)  # fmt: skip
    summary = featcache.report(tmp_path / "run", tmp_path / "p.html", positive="covid", say=quiet)
    assert (summary.num_valid, summary.num_test) == (5000, 20000)
    assert summary.num_bytes < 2e6
    browser.open(tmp_path / "p.html", "threshold=0.5&cell=tp")
    assert browser.run("document.querySelectorAll('#mistakes tbody tr').length") == 100
    assert browser.messages == []


def test_without_a_class_to_find_all_cells_of_the_matrix_are_alike(
    work: Path, browser: Browser
) -> None:
    """Numbers of right answers stand where those of wrong ones do."""
    browser.open(work / "none.html")
    places = browser.run("""[...document.querySelectorAll("#how-good .matrix td.cell")].map(
      (cell) => {
        const range = document.createRange(), frame = cell.getBoundingClientRect();
        range.selectNodeContents(cell.querySelector("button") || cell);
        const text = range.getBoundingClientRect();
        return [text.left - frame.left, text.top - frame.top, frame.bottom - text.bottom];
      })""")
    assert len(places) == 4
    left, above, below = np.array(places).T
    assert np.ptp(left) < 1.5
    np.testing.assert_allclose(above, below, atol=1.5)
