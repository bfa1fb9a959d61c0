"""The page about a run: its numbers are those of the metrics, and strangers' names are text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_decisions import copy_run, decide_quietly, make_work
from sample_images import write_tree
from sample_pages import Parser

import featcache
from featcache.backbones.backbone import Backbone
from featcache.errors import ConfigError
from featcache.evaluation.deciding.scored_rows import read_valid
from featcache.heads.run import load_run
from featcache.metrics.rates import grouped_rate_interval
from featcache.metrics.thresholds import (
    measure_recall,
    measure_specificity,
    predictive_value_intervals,
)
from featcache.reporting.threshold_table import MAX_STEPS, threshold_table


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with groups of two images, a run and its decision, audited."""
    folder = make_work(tmp_path_factory.mktemp("report"))
    decide_quietly(folder / "run", recall=0.8, refer=0.1)
    featcache.audit(folder / "c.h5", only="same,near", say=quiet)
    return folder


@pytest.fixture(scope="module")
def page(work: Path) -> str:
    featcache.report(work / "run", work / "page.html", say=quiet)
    return (work / "page.html").read_text("utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_every_threshold_has_the_counts_and_intervals_of_the_metrics(work: Path, page: str) -> None:
    (rows,) = read_valid(load_run(work / "run"), "covid")
    data, scores, is_yes, groups = data_of(page), rows.scores, rows.is_positive, rows.groups
    assert groups is not None
    assert [data["num_yes"], data["num_no"]] == [80, 80]
    assert len(data["steps"]) == len(np.unique(scores)) + 1
    for threshold, true, false, *intervals in data["steps"]:
        recall = measure_recall(scores, is_yes, threshold, groups)
        specificity = measure_specificity(scores, is_yes, threshold, groups)
        assert (true, false) == (recall.hits, specificity.total - specificity.hits)
        wanted = [recall.interval, specificity.interval]
        called = scores >= threshold
        for which, hits in ((called, is_yes), (~called, ~is_yes)):
            chosen = [groups[i] for i in np.flatnonzero(which)]
            wanted.append(grouped_rate_interval(hits[which], chosen) if chosen else None)
        of_both = (recall.interval, specificity.interval)
        wanted += predictive_value_intervals(true / 80, 1 - false / 80, of_both, 0.5)
        for found, expected in zip(intervals, wanted, strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_threshold_in_use_is_that_of_the_decision(work: Path, page: str) -> None:
    decision = json.loads((work / "run" / "decision.json").read_text())["decisions"]["covid"]
    data = data_of(page)
    threshold, true, false, *_ = data["steps"][data["chosen"]]
    assert threshold == decision["threshold"]
    assert true == decision["image"]["recall"]["hits"]
    assert data["num_no"] - false == decision["image"]["specificity"]["hits"]


@pytest.mark.parametrize("chosen", [0.0, 0.31, 1.0])
def test_of_many_scores_some_thresholds_are_kept_with_the_chosen_one(chosen: float) -> None:
    rng = np.random.default_rng(0)
    scores, is_yes = rng.random(3000), rng.random(3000) < 0.5
    steps, place = threshold_table(scores, is_yes, None, chosen)
    limits = [step.threshold for step in steps]
    assert limits == sorted(set(limits))
    assert limits[place] == chosen
    assert len(steps) <= MAX_STEPS + 1
    assert (steps[0].false_positives, steps[-1].true_positives) == ((~is_yes).sum(), 0)


def test_the_page_asks_nothing_of_a_network_and_runs_only_its_own_script(page: str) -> None:
    parser = Parser(page)
    (policy,) = [
        attributes["content"] for tag, attributes in parser.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]  # fmt: skip
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    links = [
        value for _, attributes in parser.tags for key, value in attributes.items()
        if key in {"src", "href", "action", "srcset", "data"}
    ]  # fmt: skip
    assert {*links} <= {"data:,", "#how-good", "#test"}
    assert not [key for _, attributes in parser.tags for key in attributes if key[:2] == "on"]
    assert "url(" not in page
    assert "style" not in {key for _, attributes in parser.tags for key in attributes}


def test_what_is_said_without_javascript(work: Path, page: str) -> None:
    text = Parser(page).text
    evaluation = featcache.evaluate(work / "run", split="valid", positive="covid", say=quiet)
    assert evaluation.decision is not None
    decided = evaluation.decision["covid"]
    recall = decided["image"]["recall"]
    low, high = recall["interval"]
    assert f"{low:.3f} to {high:.3f}" in text
    assert f"{recall['hits']} of {recall['total']} found" in text
    assert decided["false_negatives"]
    for path in decided["false_negatives"]:
        assert path in text
    for sentence in (
        "Not for diagnosis.", "contains no images of patients",
        *(finding["text"] for finding in json.loads(
            (work / "c.h5.audit.json").read_text("utf-8"))["findings"]),
        "Chosen after looking at test", "90 images of test are folded away", "are referred",
        "The head was neither trained on these images", "featcache train c.h5 run --hidden 8",
    ):  # fmt: skip
        assert sentence in text, sentence
    assert "never audited" not in text


def test_every_figure_has_a_name_and_its_numbers_in_a_table(page: str) -> None:
    tags = [tag for tag, _ in Parser(page).tags]
    names = {attributes.get("id") for _, attributes in Parser(page).tags}
    figures = [a["id"] for tag, a in Parser(page).tags if tag == "figure"]
    assert {"valid-roc", "valid-pr", "valid-benefit", "valid-reliability", "loss", "map"} <= {
        *figures
    }
    plots = [a for tag, a in Parser(page).tags if tag == "svg" and a.get("role") == "img"]
    assert len(plots) == len(figures) == page.count("<summary>The numbers")
    assert {a["aria-labelledby"] for a in plots} <= names
    assert tags.count("h1") == 1


def test_figures_of_test_are_folded_away(page: str) -> None:
    start = page.index('<details id="test">')
    end = page.index("Curves on valid")
    assert page.count("test-roc") == page[start:end].count("test-roc") > 0


def test_without_paths_no_file_is_named(work: Path) -> None:
    summary = featcache.report(work / "run", work / "numbers.html", no_paths=True, say=quiet)
    page = (work / "numbers.html").read_text("utf-8")
    assert not summary.has_paths
    assert not re.search(r"(train|valid|test)/\d{4}\.png", page)
    assert re.search(r'\["valid \d+",', page)


def test_without_a_positive_class_none_is_guessed(work: Path, tmp_path: Path) -> None:
    run = copy_run(work, tmp_path, "chosen")
    summary = featcache.report(run, say=quiet)
    text = Parser(page := (run / "report.html").read_text("utf-8")).text
    assert (summary.positive, summary.is_audited) == (None, False)
    assert "none is guessed" in text
    assert "recall of covid" in text
    assert "recall of normal" in text
    assert "was never audited" in text
    assert "chose the epoch" in text
    assert 'id="data"' not in page
    with pytest.raises(ConfigError, match="one of covid, normal"):
        featcache.report(run, positive="flu", say=quiet)
    again = featcache.report(run, positive="normal", say=quiet)
    assert (again.positive, again.threshold) == ("normal", 0.5)


# -------------------------------------------------------------------------------------- pictures


def test_pictures_are_shown_only_when_asked_for(tmp_path: Path, tiny_backbone: Backbone) -> None:
    tree = write_tree(tmp_path / "data", {"train": 6, "valid": 6, "test": 6})
    featcache.extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, say=quiet, progress=False)
    run = tmp_path / "run"
    featcache.train(tmp_path / "c.h5", run, hidden=(), epochs=1, say=quiet, progress=False)
    paths = featcache.open_cache(tmp_path / "c.h5").split("valid").paths
    (tree / paths[0]).write_bytes((tree / paths[1]).read_bytes())

    summary = featcache.report(run, positive="covid", data=tree, images="all", say=quiet)
    page = (run / "report.html").read_text("utf-8")
    pictures = [a["src"] for tag, a in Parser(page).tags if tag == "img"]
    assert (
        len(pictures) == len(paths) + len(featcache.open_cache(tmp_path / "c.h5").split("test")) - 1
    )
    assert all(str(url).startswith("data:image/jpeg;base64,") for url in pictures)
    assert summary.has_images
    assert f"contains {len(pictures)} small pictures of patients" in Parser(page).text
    for options in ({"weights": "w.pt"}, {"images": "all"}, {"images": "some", "data": tree}):
        with pytest.raises(ConfigError, match=r"--images|--data beside"):
            featcache.report(run, say=quiet, **options)
    assert not featcache.report(run, say=quiet).has_images
    assert "<img" not in (run / "report.html").read_text("utf-8")


def test_mistakes_have_maps_where_the_backbone_can_be_had(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    tree = write_tree(tmp_path / "data", {"train": 6, "valid": 6, "test": 6})
    featcache.extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, say=quiet, progress=False)
    run, said = tmp_path / "run", list[str]()
    featcache.train(tmp_path / "c.h5", run, hidden=(), epochs=1, say=quiet, progress=False)
    options: dict[str, Any] = {"positive": "covid", "data": tree, "images": "mistakes"}
    decide_quietly(run, positive="covid", threshold=0.0)  # all are called: half are mistakes

    featcache.report(run, say=said.append, **options)
    page = (run / "report.html").read_text("utf-8")
    num_pictures = page.count("<img")
    assert num_pictures > 0
    assert any("no maps of what the network used" in line for line in said)
    assert "pictures have no maps" in page

    featcache.report(run, say=quiet, backbone=tiny_backbone, **options)
    parser = Parser((run / "report.html").read_text("utf-8"))
    pictures = [a for tag, a in parser.tags if tag == "img"]
    maps = [a for a in pictures if a["alt"]]
    explained = featcache.explain(
        run, tree / featcache.open_cache(tmp_path / "c.h5").split("valid").paths[-1],
        tmp_path / "out", positive="covid", backbone=tiny_backbone, say=quiet,
    ).explanations[0]  # fmt: skip
    assert f"for covid: log-odds {explained.log_odds:+.2f}" in parser.text
    assert len(pictures) == num_pictures + len(maps)
    if explained.maps[0]["map"] is None:
        assert "this network has no map" in parser.text
    else:
        assert len(maps) == num_pictures
        assert all(str(a["alt"]).startswith("map for covid: log-odds") for a in maps)
        assert "not where disease is" in parser.text
