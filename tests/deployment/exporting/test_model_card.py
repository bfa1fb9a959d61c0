"""The model card: the decision that ``predict.py`` applies, its figures, groups and the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_decisions import decide_quietly
from sample_images import write_tree

import featcache
from featcache.backbones.backbone import Backbone
from featcache.deployment.exporting.card_figures import (
    decision_lines,
    figure_lines,
    mistakes_text,
    yaml_metrics,
)
from featcache.files import readable_json

QUIET: dict[str, Any] = {"say": lambda _: None}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """A cache that names groups for a class alone, audited, and a run with a threshold."""
    folder = tmp_path_factory.mktemp("card")
    write_tree(folder / "data")
    for number, path in enumerate(sorted(folder.glob("data/*/normal/*"))):
        path.rename(path.with_name(f"P{number}_{path.name}"))
    options: dict[str, Any] = {"group_by": r"^(P\d+)_", "backbone": tiny_backbone}
    with pytest.warns(featcache.FeatcacheWarning, match="matches no file name of covid"):
        featcache.extract(folder / "data", folder / "c.h5", **options, **QUIET)
    featcache.audit(folder / "c.h5", **QUIET)
    heads: dict[str, Any] = {"hidden": (8,), "epochs": 4, "learning_rate": 5e-3}
    featcache.train(folder / "c.h5", folder / "run", **heads, **QUIET)
    return folder


class Card:
    """A card, exported."""

    def __init__(self, place: Path, out: Path, backbone: Backbone) -> None:
        featcache.export(place / "run", f"{out}/", backbone=backbone)
        self.text = (out / "README.md").read_text("utf-8").replace("\\", "")
        lines = self.text.splitlines()
        rows = [line.split(" | ") for line in lines if line.startswith("| ")]
        self.items = {int(row[0][2:]): row[2] for row in rows if row[0][2:].isdigit()}


def test_card_gives_the_decision_and_what_it_does(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    featcache.evaluate(place / "run", **QUIET)
    card = Card(place, tmp_path / "none", tiny_backbone)
    assert "No threshold was chosen" in card.text
    assert "decision |" not in card.text

    decided = decide_quietly(place / "run", recall=0.9, refer=0.3)
    card = Card(place, tmp_path / "before", tiny_backbone)
    assert f"**covid if its probability is >= {decided.threshold:.6g}**" in card.text
    assert f"to below {decided.refer_below:.6g} the decision is `refer`" in card.text
    assert "Asked for: recall 0.9;" in card.text
    (bound,) = [line for line in card.text.splitlines() if line.startswith("- Bound: ")]
    assert f"at least {decided.bound:.3f} per {decided.unit} (one-sided 95 %" in bound
    assert bound.endswith(f"**{decided.basis}, no guarantee**: {decided.reason}.")
    assert f"cannot be promised**: that needs at least {decided.num_needed} image" in card.text
    # evaluated before it was decided
    assert card.text.count("not evaluated since it was made") == 3
    assert "TO FILL" in card.items[38]
    assert "not evaluated since" in card.items[39]

    figures = featcache.evaluate(place / "run", **QUIET)
    card = Card(place, tmp_path / "after", tiny_backbone)
    assert "not evaluated" not in card.text
    assert figures.decision is not None
    facts = figures.decision["covid"]
    for name, what in (("recall", "sensitivity: recall of covid"), ("specificity", "specificity")):
        cells = []
        for rates in (facts["image"], facts["argmax"]):
            rate = rates[name]
            low, high = rate["interval"]
            share = rate["hits"] / rate["total"]
            cells.append(
                f"{share:.3f} ({low:.3f} to {high:.3f}), {rate['hits']} of {rate['total']}"
            )
        assert f"| {what} | {' | '.join(cells)} |" in card.text
    missed = facts["image"]["recall"]["total"] - facts["image"]["recall"]["hits"]
    assert card.items[39].startswith(f"By the decision {missed} of 6 covid missed, ")
    assert f"{facts['refer']['num_referred']} image" in card.text
    assert f'"specificity of the decision: covid if >= {decided.threshold:.6g}"' in card.text

    decide_quietly(place / "run", threshold=0.25)
    card = Card(place, tmp_path / "again", tiny_backbone)
    assert "covid if its probability is >= 0.25**" in card.text
    assert card.text.count("not evaluated since it was made") == 3
    (place / "run" / "decision.json").unlink()


def test_damaged_figures_count_as_none(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    decide_quietly(place / "run", recall=0.9)
    featcache.evaluate(place / "run", **QUIET)
    path = place / "run" / "evaluation" / "test.json"
    facts = json.loads(path.read_text("utf-8"))
    facts["decision"]["covid"]["image"]["recall"]["hits"] = "<b>"
    path.write_bytes(readable_json(facts).encode())
    card = Card(place, tmp_path / "out", tiny_backbone)
    assert card.text.count("not evaluated since it was made") == 3
    (place / "run" / "decision.json").unlink()


def test_each_kind_of_interval_has_its_method(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    figures = featcache.evaluate(place / "run", **QUIET)
    assert figures.intervals["num_groups"] == figures.num_samples
    path = place / "run" / "evaluation" / "test.json"
    facts = json.loads(path.read_text("utf-8"))
    expected = (
        "Two-sided 95 % intervals. Rates: Wilson. Balanced accuracy: from the recalls' intervals, "
        "MOVER (Zou and Donner). ROC AUC: DeLong, "
    )
    assert Card(place, tmp_path / "new", tiny_backbone).items[29].startswith(expected)
    facts["intervals"]["method"] = "Clopper and Pearson, as an earlier version said"
    path.write_bytes(readable_json(facts).encode())
    assert Card(place, tmp_path / "old", tiny_backbone).items[29].startswith(expected)
    facts["intervals"]["num_groups"] = 5
    path.write_bytes(readable_json(facts).encode())
    shared = Card(place, tmp_path / "shared", tiny_backbone).items[29]
    assert "Rates: Clopper and Pearson" in shared
    assert "ROC AUC: Obuchowski" in shared


def test_groups_are_counted_by_class_and_the_audit_is_quoted(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    card = Card(place, tmp_path / "out", tiny_backbone)
    assert card.items[20].startswith(
        "A group, as a rule a patient, is named for 0 of 23 covid, 23 of 23 normal: of 23 named "
        "groups none is in two splits. The other images"
    )
    assert "TO FILL" in card.items[20]
    verdict = featcache.info(place / "c.h5").audit["verdict"]
    assert verdict in card.items[40]
    assert "TO FILL" in card.items[40]
    (place / "c.h5.audit.json").rename(place / "away.json")
    card = Card(place, tmp_path / "without", tiny_backbone)
    assert card.items[40].startswith("These data were never audited")
    (place / "away.json").rename(place / "c.h5.audit.json")


def test_groups_of_all_images_answer_the_item(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_tree(tmp_path / "data", {"train": 4, "valid": 2, "test": 4})
    options: dict[str, Any] = {"group_by": r"^(\w+)_", "backbone": tiny_backbone}
    featcache.extract(tmp_path / "data", tmp_path / "c.h5", **options, **QUIET)
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=1, **QUIET)
    card = Card(tmp_path, tmp_path / "out", tiny_backbone)
    assert card.items[20].startswith(
        "Groups, as a rule patients, named for all 20 images: of 10 named groups none is in two"
    )
    assert "TO FILL" not in card.items[20]
    assert card.items[40].startswith("These data were never audited")


def test_labels_have_a_rule_each_and_a_label_without_known_rows_is_undefined() -> None:
    rule: dict[str, Any] = {
        "threshold": 0.2, "refer_below": None, "wish": {"threshold": 0.2}, "on": "valid",
        "basis": "guarantee", "reason": "the head was not trained on these rows", "unit": "group",
        "bound": 0.0, "num_units": 3, "num_right": 0,
    }  # fmt: skip
    rate = {"hits": 3, "total": 4, "bound": 0.2, "interval": [0.3, 0.95]}
    rates = {"recall": rate, "specificity": {**rate, "hits": 0, "total": 0}, "share_positive": 0.5}
    unknown = {**rule, "image": None, "argmax": None, "refer": None}
    rules = {"a|b": rule, "c": rule}
    figures = {
        "decision": {"a|b": {**unknown, "image": rates, "argmax": rates}, "c": unknown},
        "mistakes": [{}],
    }
    text = "\n".join(decision_lines(rules, "multilabel"))
    assert text.count("else not, whatever other classes have") == 2
    assert r"**a\|b if its probability is >= 0.2**" in text
    assert "Bound: none" in text
    assert "Asked for: threshold 0.2; measured on the split valid." in text
    text = "\n".join(figure_lines(figures, rules, "multilabel"))
    assert "| figure | decision | above 0.5 |" in text
    assert "| specificity | undefined | undefined |" in text
    assert "undefined, no such images" in text
    metrics = [line.strip() for line in yaml_metrics(figures, rules, "multilabel")]
    assert metrics == [
        "- type: recall", 'name: "recall of the decision: a|b if >= 0.2"', "value: 0.750000"
    ]  # fmt: skip
    assert mistakes_text(figures, rules, "multilabel") == (
        r"By the decision 1 of 4 a\|b missed, 0 of 0 others called a\|b. "
        "Without it (by a probability above 0.5) 1 wrong label of test, listed in the run"
    )
