"""The model card of an exported folder: what the run's files know, and what a person must fill in.

The head is Hugging Face's ``model-index``. The items are those of CLAIM 2020 (Mongan, Moy and Kahn,
"Checklist for Artificial Intelligence in Medical Imaging", Radiology: Artificial Intelligence 2,
e200029), in our words.

Reads: a run, and its cache if it is at hand. Writes: nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.cache.reading import Cache
from featcache.deployment.classifier import Classifier
from featcache.errors import FeatcacheError, printable
from featcache.files import read_regular
from featcache.formatting import count
from featcache.heads.run import Run
from featcache.heads.run_caches import open_own_caches
from featcache.untrusted import parse_json_object

TO_FILL = "**TO FILL**"
_MAX_BYTES = 1 << 24
_FIGURES = ("accuracy", "balanced_accuracy", "roc_auc", "average_precision")
_ITEMS = (
    "Title says that it is a study of artificial intelligence",
    "Summary of design, methods, results and conclusions",
    "Background, and the intended use in practice",
    "Objectives and hypotheses",
    "Prospective or retrospective",
    "Goal: what the model is to do",
    "Where the data come from: sites, dates, access",
    "Who and what was included and left out",
    "Preprocessing of the images",
    "Selection of parts of the images or data",
    "Definitions of the data elements",
    "De-identification",
    "Missing data",
    "Reference standard: how the truth was defined",
    "Why this reference standard",
    "Who annotated, with which qualification",
    "Tools of annotation",
    "Agreement within and between annotators",
    "Intended sample size, and how it was determined",
    "How the data were split",
    "What splits keep apart: images, patients, sites",
    "The model: inputs, layers, outputs",
    "Software",
    "Initial values of the parameters",
    "Training: augmentation, hyperparameters, number of models",
    "How the final model was chosen",
    "Ensemble",
    "Measures of performance",
    "Statistical uncertainty",
    "Robustness",
    "Explanation of decisions",
    "Test on data of another source",
    "Flow of patients and images",
    "Patients' demographics and findings in each split",
    "Performance on all splits",
    "Accuracy with intervals",
    "Analysis of wrong decisions",
    "Limitations and bias",
    "Implications for practice",
    "Registration",
    "Protocol of the whole study",
    "Funding",
)


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        text: ``README.md``.
        num_answered: Items that the files answer.
        num_items: All items.
    """

    text: str
    num_answered: int
    num_items: int


def write_card(classifier: Classifier, facts: Mapping[str, Any]) -> Card:
    """Return the card of an exported folder.

    Args:
        classifier: The run, with its backbones.
        facts: What ``config.json`` holds.
    """
    run = classifier.run
    figures, environment = _read(run, "evaluation/test.json"), _read(run, "environment.json")
    if figures.get("fingerprint") != run.cache["fingerprint"]:
        figures = {}
    answers = _answers(classifier, facts, figures, environment)
    num_answered = sum(number in answers for number in range(1, len(_ITEMS) + 1))
    title = " + ".join(recipe.backbone.name for recipe in classifier.recipes)
    classes = ", ".join(map(_plain, run.classes))
    num_open, versions = len(_ITEMS) - num_answered, facts["versions"]
    lines = [
        *_yaml(title, figures),
        f"# Image classifier: {classes}",
        "",
        "**Not for diagnosis.** What it may be used for, the open items below must say first.",
        "",
        f"{num_answered} of {len(_ITEMS)} items are answered from the files, {num_open} {TO_FILL}.",
        "",
        "## Use",
        "",
        "```",
        f"pip install 'pillow>={versions['pillow']}' numpy onnxruntime",
        "python predict.py --self-test",
        "python predict.py IMAGE...",
        "```",
        "",
        "What `predict.py` cannot read exactly it refuses by name: save such images as PNG.",
        "`sha256sum -c SHA256SUMS` checks the files by other means.",
        f"Made with Pillow {versions['pillow']} and onnxruntime {versions['onnxruntime']}.",
        "A version of Pillow that resizes otherwise is refused.",
        "",
        "## Figures on test",
        "",
        *_figure_lines(figures),
        "",
        "## Items of CLAIM 2020",
        "",
        "| item | | answer |",
        "| ---: | --- | --- |",
        *(
            f"| {number} | {item} | {answers.get(number, TO_FILL)} |"
            for number, item in enumerate(_ITEMS, 1)
        ),
        "",
    ]
    return Card("\n".join(lines), num_answered, len(_ITEMS))


def _read(run: Run, name: str) -> dict[str, Any]:
    """Return a JSON file of the run that is for people; nothing if it cannot be read."""
    try:
        return parse_json_object(read_regular(run.path / name, max_bytes=_MAX_BYTES))
    except (OSError, ValueError):
        return {}


def _plain(value: object) -> str:
    """Return any text as one line that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~$-])", r"\\\1", printable(value))


def _number(value: object) -> float | None:
    is_number = type(value) in {int, float} and np.isfinite(value)  # type: ignore[call-overload]
    return float(value) if is_number else None  # type: ignore[arg-type]


def _yaml(title: str, figures: Mapping[str, Any]) -> list[str]:
    metrics = [
        line for name in _FIGURES if (value := _number(figures.get(name))) is not None
        for line in (f"          - type: {name}", f"            value: {value!r}")
    ]  # fmt: skip
    index = [
        "model-index:",
        f"  - name: {json.dumps(title)}",
        "    results:",
        "      - task:",
        "          type: image-classification",
        "        dataset:",
        "          name: TO FILL",
        "          type: TO FILL",
        "          split: test",
        "        metrics:",
        *metrics,
    ]
    head = ["library_name: onnx", "pipeline_tag: image-classification", "license: other"]
    return ["---", *head, *(index if metrics else []), "---", ""]


def _figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return a table of the run's evaluation, each figure with its 95 % interval."""
    if not figures:
        return [f"{TO_FILL}: `featcache evaluate RUN` was not called, or is of other features."]
    known = figures.get("intervals")
    intervals: Mapping[str, Any] = known if isinstance(known, dict) else {}
    rows = [(name, figures.get(name), intervals.get(name)) for name in _FIGURES]
    of_class = figures.get("per_class")
    in_class = intervals.get("per_class")
    for name, facts in (of_class if isinstance(of_class, dict) else {}).items():
        if isinstance(facts, dict):
            each = in_class.get(name) if isinstance(in_class, dict) else None
            interval = each.get("recall") if isinstance(each, dict) else None
            what = f"recall of {name}, {facts.get('num_samples')} images"
            rows.append((what, facts.get("recall"), interval))
    lines = ["| figure | value | 95 % interval |", "| --- | ---: | --- |"]
    for name, value, interval in rows:
        if (number := _number(value)) is None:
            continue
        ends = [_number(end) for end in interval] if isinstance(interval, list) else []
        said = " to ".join(f"{end:.3f}" for end in ends if end is not None) or "not known"
        lines.append(f"| {_plain(name)} | {number:.3f} | {said} |")
    return lines


def _answers(
    classifier: Classifier, facts: Mapping[str, Any], figures: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[int, str]:  # fmt: skip
    """Return number -> answer of the items that the files answer."""
    run, cache = classifier.run, _open_quietly(classifier.run)
    identity = run.cache["identity"]
    rules = "; ".join(
        f"{each['backbone']}: {_plain(json.dumps(each['preprocessing'], sort_keys=True))}"
        for each in facts["inputs"]
    )
    training = _plain(json.dumps(run.training, sort_keys=True))
    versions = environment.get("versions")
    answers = {
        6: f"Tell apart {', '.join(map(_plain, run.classes))} ({run.task})",
        9: rules,
        13: f"{count(int(run.cache.get('num_failed') or 0), 'image')} could not be read, left out",
        22: f"Frozen {_plain(' + '.join(r.backbone.name for r in classifier.recipes))}, its pooled "
        f"features; then {_plain(facts['head']['layers'])}",
        24: "Backbone: " + "; ".join(
            f"weights with sha256 {each['weights_sha256']}" for each in facts["inputs"]
        ) + f". Head: seed {run.seed}",
        25: f"Views of an image: {_plain(identity.get('views'))}, augmentation "
        f"{_plain(identity.get('augmentation'))}. {training}",
        27: f"Mean of the probabilities of {run.num_members} heads" if run.members else "None",
    }  # fmt: skip
    if (run.path / "trials.csv").exists():
        answers[26] = "A sweep over heads: trials.csv of the run has every trial"
    elif not run.members and run.training.get("optimizer") != "lbfgs":
        answers[26] = "The epoch with the lowest cross-entropy on valid"
    if isinstance(versions, dict):
        answers[23] = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in versions.items())
    if cache is not None:
        answers |= _data_answers(cache)
    if figures:
        answers[28] = "Accuracy, recall of each class, ROC AUC, average precision: see above"
        answers[36] = "See the figures above: accuracy and recalls with intervals"
        method = figures.get("intervals")
        if isinstance(method, dict) and "method" in method:
            answers[29] = f"Two-sided 95 % intervals, {_plain(method['method'])}"
        mistakes = figures.get("mistakes")
        if isinstance(mistakes, list):
            answers[37] = f"{count(len(mistakes), 'wrong image')} of test, listed in the run"
    return answers


def _data_answers(cache: Cache) -> dict[int, str]:
    counts = []
    for name, split in cache.splits.items():
        text = f"{_plain(name)} {len(split):,}"
        if cache.task == "multiclass" and cache.classes:
            each = [
                f"{_plain(label)} {int((split.targets == i).sum()):,}"
                for i, label in enumerate(cache.classes)
            ]
            text += f" ({', '.join(each)})"
        counts.append(text)
    has_groups = any(split.groups for split in cache.splits.values())
    return {
        20: f"Images: {'; '.join(counts)}",
        21: "Groups (as a rule patients) are known to the cache" if has_groups
        else "Images: no groups are known, so a patient may stand in two splits",
        33: f"{count(len(cache.failures), 'image')} could not be read; the others: see item 20",
    }  # fmt: skip


def _open_quietly(run: Run) -> Cache | None:
    try:
        return open_own_caches(run)
    except FeatcacheError:
        return None
