"""The page of an ensemble: the out-of-fold figures of its cross-validation, or what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_labels
from headless_browser import CHROMIUM, Browser
from sample_decisions import SMALL, decide_quietly, read_csv
from sample_images import write_tree
from sample_rows import make_cache
from sklearn.metrics import roc_auc_score

import featcache
from featcache.backbones.backbone import Backbone


def quiet(_: str) -> None:
    pass


def crossval(cache: Path, folds: Path, **options: Any) -> Path:
    """Cross-validate and return the ensemble."""
    given = {"folds": 2, "repeats": 2, "keep_ensemble": True, "say": quiet, "progress": False}
    featcache.crossval(cache, folds, **(SMALL | given | options))
    return folds / "ensemble"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, two repeats of two folds with their ensemble, a decision by them."""
    folder = tmp_path_factory.mktemp("ensemble")
    make_cache(folder / "c.h5", train=[0, 1] * 30, valid=[0, 1, 1] * 10, test=[0, 1] * 9)
    ensemble = crossval(folder / "c.h5", folder / "folds")
    decide_quietly(ensemble, recall=0.8, on=folder / "folds")
    return folder


def page_of(run: Path, **options: Any) -> tuple[str, list[str]]:
    """Return the page and the lines that were said."""
    said = list[str]()
    summary = featcache.report(run, say=said.append, **options)
    return summary.file.read_text("utf-8"), said


def rule_of(work: Path) -> dict[str, Any]:
    path = work / "folds" / "ensemble" / "decision.json"
    return json.loads(path.read_text("utf-8"))["decisions"]["covid"]


def top_of(page: str) -> str:
    """Return the first section."""
    return page[page.index('<section id="how-good">') : page.index("</section>")]


def test_the_top_has_the_out_of_fold_figures_of_the_repeat_that_was_decided_on(work: Path) -> None:
    page, said = page_of(work / "folds" / "ensemble")
    top, rule = top_of(page), rule_of(work)
    assert "out of fold, by heads that had not seen the image" in top
    assert f"repeat {rule['repeat']} is shown: the one that the threshold was decided on" in top
    assert "cross-validated bound, not a guarantee" in top
    rows = read_csv(work / "folds" / "predictions.csv")
    rows = [row for row in rows if row["repeat"] == str(rule["repeat"])]
    is_yes = np.array([row["target"] == "covid" for row in rows])
    scores = np.array([float(row["prob_covid"]) for row in rows])
    found = int((scores[is_yes] >= rule["threshold"]).sum())
    assert f"{found} of {is_yes.sum()} found" in top
    assert f"<b>{roc_auc_score(is_yes, scores):.3f}</b>" in top
    assert f"its figures are of {len(rows)} images out of fold; 18 of test are folded away" in said
    assert "A small head" not in page
    assert "The mean of 4 small heads" in page


def test_the_slider_is_over_the_out_of_fold_rows(work: Path) -> None:
    page, _ = page_of(work / "folds" / "ensemble")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)[0])
    rule = rule_of(work)
    threshold, true, false, *_ = data["steps"][data["chosen"]]
    assert threshold == rule["threshold"]
    assert true == rule["image"]["recall"]["hits"]
    assert data["num_no"] - false == rule["image"]["specificity"]["hits"]
    assert (data["num_yes"], data["num_no"]) == (40, 50)
    command = "featcache decide folds/ensemble --on folds --positive covid --threshold"
    assert command in page
    assert "Curves out of fold" in page
    assert "on valid" not in page


def test_the_losses_of_all_heads_are_drawn(work: Path) -> None:
    page, _ = page_of(work / "folds" / "ensemble")
    assert "Loss of 3 epochs of each of 4 heads" in page
    assert "repeat 2, fold 1" in page
    assert "no losses by epoch" not in page


def test_a_report_of_the_folder_is_that_of_its_ensemble(work: Path) -> None:
    page, said = page_of(work / "folds", file=work / "folds.html")
    assert "folds/ensemble: covid" in page
    assert any("its ensemble" in line for line in said)
    with pytest.raises(featcache.ConfigError, match=r"FILE\.html"):
        featcache.report(work / "folds", work / "folds" / "predictions.csv", say=quiet)


def test_without_the_folder_the_decision_has_the_figures(work: Path, tmp_path: Path) -> None:
    shutil.copy(work / "c.h5", tmp_path)
    (tmp_path / "other").mkdir()
    run = shutil.copytree(work / "folds" / "ensemble", tmp_path / "other" / "ensemble")
    page, said = page_of(run)
    top, recall = top_of(page), rule_of(work)["image"]["recall"]
    assert f"{recall['hits']} of {recall['total']} found" in top
    assert "cross-validated bound, not a guarantee" in top
    assert "which is not at hand: crossval.json and predictions.csv" in top
    assert "slider" not in page[: page.index("<script")].replace(page_style(page), "")
    assert any("the cross-validation is not at hand" in line for line in said)
    # Of other heads: nothing of it is shown as of this run.
    crossval(tmp_path / "c.h5", tmp_path / "again", seed=1)
    shutil.copy(tmp_path / "again" / "crossval.json", run.parent)
    shutil.copy(tmp_path / "again" / "predictions.csv", run.parent)
    assert "is of other heads" in top_of(page_of(run)[0])
    (run / "decision.json").unlink()
    assert "<b>" not in top_of(page_of(run)[0])


def page_style(page: str) -> str:
    return page[page.index("<style>") : page.index("</style>")]


def test_without_a_decision_the_first_repeat_is_shown(work: Path, tmp_path: Path) -> None:
    shutil.copy(work / "c.h5", tmp_path)
    run = Path(shutil.copytree(work / "folds", tmp_path / "folds")) / "ensemble"
    (run / "decision.json").unlink()
    assert "Of 2 repeats, repeat 1 is shown: the first." in top_of(page_of(run)[0])


def test_several_labels_an_image(tmp_path: Path) -> None:
    cache = sample_labels.make_cache(tmp_path / "c.h5")
    ensemble = crossval(cache.path, tmp_path / "folds", repeats=1, **sample_labels.SMALL)
    name = featcache.load_run(ensemble).classes[0]
    top = top_of(page_of(ensemble, positive=name)[0])
    assert "out of fold, by heads that had not seen the image" in top
    rows = read_csv(tmp_path / "folds" / "predictions.csv")
    known = [row for row in rows if name not in row["unknown"].split("|")]
    number = sum(name in row["targets"].split("|") for row in known)
    assert f"of {number} found" in top


def test_pictures_are_said_to_be_of_which_rows_and_why(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    tree = write_tree(tmp_path / "data", {"train": 6, "valid": 6, "test": 6})
    featcache.extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, say=quiet, progress=False)
    ensemble = crossval(tmp_path / "c.h5", tmp_path / "folds", repeats=1)
    rows = read_csv(tmp_path / "folds" / "predictions.csv")
    page, said = page_of(ensemble, positive="covid", data=tree, images="all")
    test = len(featcache.open_cache(tmp_path / "c.h5").split("test"))
    number = len(rows) + test
    assert page.count("<img") == number
    assert f"contains {number} small pictures of patients ({len(rows)} out of fold, " in page
    assert (
        f"it contains {number} small pictures of patients ({len(rows)} out of fold, {test} of "
        "test: all that did not change); it names image files (--no-paths: numbers)"
    ) in said


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_slider_moves_in_a_browser(work: Path, tmp_path: Path) -> None:
    page_of(work / "folds", file=tmp_path / "page.html")
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html", "threshold=0")
        assert browser.run("document.querySelector('[data-count=tp]').textContent") == "40"
        assert (browser.messages, browser.requests) == ([], [])
