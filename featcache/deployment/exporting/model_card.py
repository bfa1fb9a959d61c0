"""The model card of an exported folder: what the run's files know, and what a person must fill in.

The head is Hugging Face's ``model-index``. The items are the 44 of the 2024 update of CLAIM (Tejani
and others, "Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 Update",
Radiology: Artificial Intelligence 6, e240300), in our words.

Reads: a run, and its cache and the audit's verdict on it if they are at hand. Writes: nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache
from featcache.cache.side_by_side import caches_of
from featcache.cache.verdict import read_verdict
from featcache.deployment.classifier import Classifier
from featcache.deployment.exporting.card_figures import (
    NOT_EVALUATED,
    TO_FILL,
    decision_lines,
    figure_lines,
    interval_methods,
    measured_decision,
    mistakes_text,
    plain,
    usually,
    yaml_metrics,
)
from featcache.errors import FeatcacheError, printable
from featcache.evaluation.deciding.scored_rows import is_lone
from featcache.files import optional_json_object, read_regular
from featcache.formatting import count
from featcache.heads.run import Run
from featcache.heads.run_caches import open_own_caches
from featcache.pixels.dicom_rules import DicomRules

_MAX_BYTES = 1 << 24
_ITEMS = (
    "Title says that it is a study of artificial intelligence, and of which kind",
    "Summary of design, methods, results and conclusions",
    "Background, and the intended use and role in practice",
    "Aims and hypotheses",
    "Prospective or retrospective",
    "Goal: what the model is to do",
    "Where the data come from",
    "Who and what was included and left out",
    "Preprocessing of the images",
    "Selection of parts of the images or data",
    "De-identification",
    "Missing data",
    "How the images were acquired: devices, protocol",
    "Reference standard: how the truth was defined",
    "Why this reference standard",
    "Who annotated, with which qualification",
    "How the test images were annotated",
    "Agreement within and between annotators",
    "How the data were split",
    "What splits keep apart: images, patients, sites",
    "Intended sample size, and how it was determined",
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
    "Test on data of the same source",
    "Test on data of another source",
    "Registration of the trial",
    "Flow of patients and images: numbers included and left out",
    "Patients' demographics and findings in each split",
    "Performance on all splits and in subgroups",
    "Diagnostic performance with intervals",
    "Analysis of wrong decisions",
    "Limitations, bias, what cannot be generalised",
    "Implications for practice, and the intended use",
    "Protocol of the whole study",
    "Availability of software, model and data",
    "Funding, and the role of the funders",
)


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        text: ``README.md``.
        num_answered: Items that the files answer in full.
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
    figures, environment = (
        optional_json_object(run.path / name, max_bytes=_MAX_BYTES)
        for name in ("evaluation/test.json", "environment.json")
    )
    if figures.get("fingerprint") != run.cache["fingerprint"]:
        figures = {}
    rules = {} if classifier.decisions is None else classifier.decisions.rules
    answers = _answers(classifier, facts, figures, environment)
    num_answered = sum(TO_FILL not in answer for answer in answers.values())
    title = " + ".join(recipe.backbone.name for recipe in classifier.recipes)
    classes = ", ".join(map(plain, run.classes))
    num_open, versions = len(_ITEMS) - num_answered, facts["versions"]
    lines = [
        *_yaml(title, yaml_metrics(figures, rules, run.task)),
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
        "It reads no DICOM: `featcache predict` and `featcache serve` do, from the run.",
        "`sha256sum -c SHA256SUMS` checks the files by other means.",
        f"Made with Pillow {versions['pillow']} and onnxruntime {versions['onnxruntime']}.",
        "A version of Pillow that resizes otherwise is refused.",
        "It does not mark images that are unlike the training images, as `featcache predict` does:",
        "whatever is on an image, it is told apart by these classes.",
        "",
        "## Decision",
        "",
        *decision_lines(rules, run.task),
        "",
        "## Figures on test",
        "",
        *figure_lines(figures, rules, run.task),
        "",
        "## Items of CLAIM, update of 2024",
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


def _yaml(title: str, metrics: Sequence[str]) -> list[str]:
    index = [
        "model-index:",
        f"  - name: {json.dumps(printable(title), ensure_ascii=False)}",
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
    head = ["library_name: onnx", "pipeline_tag: image-classification"]
    head += ["license: other", "license_name: TO FILL"]
    return ["---", *head, *(index if metrics else []), "---", ""]


def _answers(
    classifier: Classifier, facts: Mapping[str, Any], figures: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[int, str]:  # fmt: skip
    """Return number -> answer; what the files answer in part ends with ``TO_FILL``."""
    run, cache = classifier.run, _open_quietly(classifier.run)
    identity = run.cache["identity"]
    versions = environment.get("versions")
    num_failed = count(int(run.cache.get("num_failed") or 0), "image")
    answers = {
        6: f"Tell apart {', '.join(map(plain, run.classes))} ({run.task})",
        9: "; ".join(
            f"{plain(each['backbone'])}: {_listed(each['preprocessing'])}"
            for each in facts["inputs"]
        ),
        12: f"{num_failed} could not be read and were left out",
        22: f"Frozen {plain(' + '.join(r.backbone.name for r in classifier.recipes))}, its pooled "
        f"features; then {', '.join(map(plain, facts['head']['layers']))}",
        24: "Backbone: " + "; ".join(
            f"weights with sha256 {each['weights_sha256']}" for each in facts["inputs"]
        ) + f". Head: seed {run.seed}",
        25: f"Views of an image: {plain(identity.get('views'))}, augmentation "
        f"{plain(identity.get('augmentation'))}. {_listed(run.training)}",
        27: f"Mean of the probabilities of {run.num_members} heads" if run.members else "None",
        43: f"Model: in this folder. Software: featcache {facts['versions']['featcache']}. "
        f"Data: {TO_FILL}",
    }  # fmt: skip
    if how := _how_chosen(run):
        answers[26] = how
    if isinstance(versions, dict):
        answers[23] = _listed(versions)
    if cache is not None:
        answers |= _data_answers(cache, run)
    if figures:
        answers |= _figure_answers(figures, classifier)
    return answers


def _figure_answers(figures: Mapping[str, Any], classifier: Classifier) -> dict[int, str]:
    task = classifier.run.task
    rules = {} if classifier.decisions is None else classifier.decisions.rules
    answers = {
        28: "Accuracy, recall of each class, ROC AUC, average precision: see above",
        32: "Split test of the same data: see the figures above",
        37: f"Test: see the figures above. Other splits and subgroups: {TO_FILL}",
        38: "See the figures above: accuracy and recalls with intervals",
    }
    if rules:
        answers[28] = (
            f"Of the decision recall and specificity; by {usually(task)} accuracy and recalls; "
            "of the probabilities ROC AUC and average precision: see above"
        )
        answers[38] = f"See the figures above: accuracy and recalls by {usually(task)}; "
        if all(measured_decision(figures, name, rule) for name, rule in rules.items()):
            answers[38] += "recall and specificity of the decision; with intervals"
        else:
            answers[38] += f"the decision was {NOT_EVALUATED}. {TO_FILL}"
    if methods := interval_methods(figures, rules):
        answers[29] = methods
    if mistakes := mistakes_text(figures, rules, task):
        answers[39] = f"{mistakes}. Why they are wrong: {TO_FILL}"
    return answers


def _listed(values: Mapping[str, Any]) -> str:
    described = {
        key: DicomRules.from_identity(value).describe() if key == "dicom" else value
        for key, value in sorted(values.items())
    }
    return ", ".join(f"{plain(key)} {plain(value)}" for key, value in described.items())


def _how_chosen(run: Run) -> str | None:
    if (run.path / "trials.csv").exists():
        return "A sweep over heads: trials.csv of the run has every trial"
    if run.members:
        return None
    try:
        columns = read_regular(run.path / "history.csv", max_bytes=_MAX_BYTES).splitlines()[0]
    except (OSError, ValueError, IndexError):
        return None
    is_solved = run.training.get("optimizer") == "lbfgs"
    if b"valid_loss" not in columns:
        return None if is_solved else "The last epoch: there were no images of valid"
    what = "strength of regularisation" if is_solved else "epoch"
    return f"The {what} with the lowest cross-entropy on valid"


def _data_answers(cache: Cache, run: Run) -> dict[int, str]:
    counts = []
    for name, split in cache.splits.items():
        text = f"{plain(name)} {len(split):,}"
        if cache.task == "multiclass" and cache.classes:
            each = [
                f"{plain(label)} {int((split.targets == i).sum()):,}"
                for i, label in enumerate(cache.classes)
            ]
            text += f" ({', '.join(each)})"
        counts.append(text)
    held_out = run.training.get("valid_fraction")
    drawn = f". Of train a share of {held_out} became valid" if held_out is not None else ""
    num_rows = sum(map(len, cache.splits.values()))
    return {
        19: f"Images: {'; '.join(counts)}{drawn}",
        20: _kept_apart(cache),
        35: f"{count(num_rows, 'image')}; {count(len(cache.failures), 'other')} could not be read. "
        f"Those left out before: {TO_FILL}",
        40: _limits(cache),
    }


def _kept_apart(cache: Cache) -> str:
    """Return of how many images of each class a group is named, and whether groups are split."""
    splits_of, named, total = Counter[str](), Counter[str](), Counter[str]()
    for split in cache.splits.values():
        groups = split.groups or [""] * len(split)
        is_named = [
            not is_lone(group, path) for group, path in zip(groups, split.paths, strict=True)
        ]
        splits_of.update({group for group, yes in zip(groups, is_named, strict=True) if yes})
        kinds = _class_names(cache, split)
        total.update(kinds)
        named.update(kind for kind, yes in zip(kinds, is_named, strict=True) if yes)
    if not splits_of:
        return f"Images: no groups are known, so a patient may stand in two splits. {TO_FILL}"
    num_shared = sum(number > 1 for number in splits_of.values())
    said = f"{num_shared:,} are in two splits or more" if num_shared else "none is in two splits"
    said = f"of {count(len(splits_of), 'named group')} {said}"
    if named.total() == total.total():
        return f"Groups, as a rule patients, named for all {count(total.total(), 'image')}: {said}"
    shares = ", ".join(f"{named[kind]:,} of {total[kind]:,} {plain(kind)}" for kind in total)
    return (
        f"A group, as a rule a patient, is named for {shares}: {said}. The other images are groups "
        f"of their own, so a patient of theirs may stand in two splits: {TO_FILL}"
    )


def _class_names(cache: Cache, split: CacheSplit) -> list[str]:
    """Return the class of each row; ``images`` where a row has several, or none are known."""
    if cache.task != "multiclass" or not cache.classes:
        return ["images"] * len(split)
    return ["unlabelled" if i < 0 else cache.classes[i] for i in split.targets.tolist()]


def _limits(cache: Cache) -> str:
    """Return the verdict of the audit: of caches side by side the worst, as for training."""
    verdicts = [read for each in caches_of(cache) if (read := read_verdict(each))]
    found = max(verdicts, key=lambda verdict: int(verdict["num_leaks"]), default=None)
    if found is None:
        return f"These data were never audited (`featcache audit`). {TO_FILL}"
    parts, images = ", ".join(map(plain, found["parts"])), count(found["num_images"], "image")
    verdict = " ".join(map(plain, found["verdict"].split()))  # a long text would be cut
    return f"Audit ({parts}; {images} read): {verdict} Others: {TO_FILL}"


def _open_quietly(run: Run) -> Cache | None:
    try:
        return open_own_caches(run)
    except FeatcacheError:
        return None
