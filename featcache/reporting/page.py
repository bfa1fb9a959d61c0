"""The page: facts in, one HTML file out, which needs no network and allows no request.

Everything that varies goes through jinja2's autoescape, but for three things: plots that ``svg``
made, this folder's style and script, and JSON without ``<``.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from featcache import __version__
from featcache.cache.side_by_side import caches_of
from featcache.errors import printable
from featcache.formatting import decimal, join_few, shorten
from featcache.heads.config import TrainingConfig
from featcache.reporting.audited import describe_audit
from featcache.reporting.charts import Chart, map_chart, sweep_chart
from featcache.reporting.facts import Facts, Positive
from featcache.reporting.losses import loss_chart
from featcache.reporting.names import Names, Shown, as_text, as_word, count_pictures, short
from featcache.reporting.slider import slider_of
from featcache.reporting.wording import describe, rate_card, say_rates

if TYPE_CHECKING:
    from featcache.reporting.evidence import EvidencePart

GENERATOR = b'<meta name="generator" content="featcache report">'
"""By this, in the first bytes of a file, a report is recognised."""

_MOST_FAILURES = 50
_MOST_NAMED = 8  # classes in the first sentence
_MANY_CLASSES = 2  # with more, the matrix of the most probable class is shown beside the threshold


def render(
    facts: Facts, shown: Shown, evidence: Mapping[str, EvidencePart], *, has_paths: bool
) -> str:
    """Return the page.

    Args:
        facts: What it says.
        shown: Pictures of images.
        evidence: Mean maps, by the name of the split.
        has_paths: Whether images are called by their paths, or by numbers.
    """
    names, pictures = Names(has_paths, shown), shown.pictures
    style, script = _read("page.css"), _read("page.js")
    valid = None if facts.valid is None else describe(facts.valid, names)
    test = None if facts.test is None else describe(facts.test, names)
    positive, slider, data = facts.positive, None, None
    if facts.valid is not None and positive is not None:
        command = f"featcache decide {as_word(_run_name(facts))}"
        command += "" if facts.folds is None else f" --on {as_word(facts.folds.name)}"
        command += f" --positive {as_word(positive.name)} --threshold "
        found = slider_of(facts.valid, positive, names, command)
        slider, data = (None, None) if found is None else found
    identities = [cache.identity for cache in caches_of(facts.cache)]
    backbones = " + ".join(short(str(identity.get("backbone"))) for identity in identities)
    classes = join_few([shorten(printable(name), 24) for name in facts.run.classes])
    metric = str(facts.sweep.get("metric", "score"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        loader=jinja2.FunctionLoader(_read),
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=None if data is None else Markup(_as_json(data)),
        title=f"{short(_run_name(facts))}: {classes}",
        lead=_lead(facts, backbones),
        purpose="These figures describe these images only; they say nothing of other hospitals, "
        "devices or patients.",
        has_images=bool(pictures),
        pictures_note=shown.note,
        contains=(
            f"This page contains {count_pictures(facts, shown)}: treat it as "
            "you treat the images. " if pictures else "This page contains no images of patients. "
        )
        + ("It names image files." if has_paths else "Images are called by numbers, not by files."),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        positive=None if positive is None else short(positive.name),
        threshold_text=None if positive is None else as_text(positive.threshold),
        many_classes=len(facts.run.classes) > _MANY_CLASSES,
        decision=_decision(positive),
        decided=_decided(positive) if valid is None else None,
        valid=None if valid is None else _safe(valid),
        test=None if test is None else _safe(test),
        no_valid=facts.no_valid,
        slider=slider,
        no_slider=_no_slider(facts),
        audit=describe_audit(facts),
        loss=_safe_chart(loss_chart(facts.histories)),
        no_loss="There are no losses by epoch to draw: the head was solved for, or history.csv is "
        "not in the run's folder.",
        sweep=_safe_chart(sweep_chart(facts.trials, metric)),
        evidence={name: _safe_evidence(part) for name, part in evidence.items()},
        map=_safe_chart(map_chart(facts.feature_map, facts.cache.classes)),
        made_of=_made_of(facts),
        failures=_failures(facts, has_paths=has_paths),
        commands=_commands(facts),
        size_note="Figures are drawn once; only the threshold and the lists move.",
    )  # fmt: skip


def _lead(facts: Facts, backbones: str) -> str:
    """Return what is classified, and by what."""
    names, shows = facts.run.classes, facts.run.task != "multiclass"
    if len(names) == 2 and not shows:
        what = f"whether an image is {short(names[0])} or {short(names[1])}"
    elif len(names) <= _MOST_NAMED:
        listed = ", ".join(map(short, names))
        what = f"which of these an image {'shows' if shows else 'is'}: {listed}"
    else:
        what = f"which of {len(names):,} classes an image {'shows' if shows else 'is'}"
    number = facts.run.num_members
    head = "A small head" if number == 1 else f"The mean of {number:,} small heads"
    return f"{head} on the features of a frozen network, {backbones}, says {what}."


def _run_name(facts: Facts) -> str:
    """Return what the run is called: its folder, with that of its cross-validation before it."""
    name = facts.run.path.resolve().name
    return name if facts.folds is None else f"{facts.folds.name}/{name}"


def _read(name: str) -> str:
    return resources.files("featcache.reporting").joinpath(name).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    """Return a policy that allows this style and this script, and no request of any kind."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; "
        f"script-src 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'"
    )


def _as_json(value: Any) -> str:
    """Return JSON that ends no script block."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _safe_chart(chart: Chart | None) -> Chart | None:
    """Return a chart whose plots are not escaped again."""
    if chart is None:
        return None
    keys = [(Markup(key), name) for key, name in chart.legend]
    return replace(chart, svg=Markup(chart.svg), legend=keys)  # type: ignore[arg-type]


def _safe_evidence(part: EvidencePart) -> dict[str, Any]:
    return {"text": part.text, "charts": [_safe_chart(chart) for chart in part.charts]}


def _safe(split: dict[str, Any]) -> dict[str, Any]:
    cards = [card | {"bar": Markup(card["bar"])} for card in split["cards"]]
    return split | {"cards": cards, "charts": [_safe_chart(chart) for chart in split["charts"]]}


def _decision(positive: Positive | None) -> str:
    """Return what the threshold promises."""
    if positive is None:
        return ""
    name, at = short(positive.name), as_text(positive.threshold)
    if positive.rule is None:
        return (
            f"Nobody has decided on a threshold for {name} yet, so {at} is taken: featcache decide "
            "chooses one and says what it promises."
        )
    rule = positive.rule
    ((wish, value),) = rule["wish"].items()
    asked = f"for a {wish} of {value:g}, " if wish != "threshold" else ""
    rate = "specificity" if wish == "specificity" else "recall"
    return (
        f"The threshold, {at}, was decided {asked}{_on(rule)}. What can be said of "
        f"new images: {rate} at least {decimal(rule['bound'])} per {rule['unit']} (one-sided 95 %; "
        f"{printable(rule['basis'])}: {printable(rule.get('reason', ''))})."
    )


def _on(rule: Mapping[str, Any]) -> str:
    """Return which rows a threshold was decided on."""
    if rule["on"] != "crossval":
        return f"on {printable(rule['on'])}"
    number = rule.get("num_repeats") or 1
    repeat = "" if number == 1 else f" (repeat {rule.get('repeat')} of {number})"
    return f"on out-of-fold images of a cross-validation{repeat}"


def _decided(positive: Positive | None) -> dict[str, Any] | None:
    """Return the figures that the decision itself has, where no rows are left to measure."""
    if positive is None or positive.rule is None:
        return None
    name, rates = short(positive.name), positive.rule["image"]
    cards = [
        rate_card(label, rates[key], word)
        for key, label, word in (
            ("recall", f"recall of {name}", "found"), ("specificity", "specificity", "left alone"),
        )
    ]  # fmt: skip
    return {
        "lead": f"Figures of the decision, {_on(positive.rule)}:",
        "in_short": say_rates(positive, rates),
        "cards": [card | {"bar": Markup(card["bar"])} for card in cards],
    }


def _no_slider(facts: Facts) -> str:
    if facts.positive is None:
        return (
            "No class was named as the one to find, and none is guessed: "
            "featcache decide RUN --positive CLASS, or featcache report RUN --positive CLASS."
        )
    return "There are no images of both sides: no threshold can be judged by them."


def _failures(facts: Facts, *, has_paths: bool) -> dict[str, Any]:
    rows = [
        [printable(failure.path) if has_paths else f"{i + 1}", printable(failure.split),
         printable(failure.reason) if has_paths else "not shown: it may name the file"]
        for i, failure in enumerate(facts.cache.failures[:_MOST_FAILURES])
    ]  # fmt: skip
    number = len(facts.cache.failures)
    more = f", the first {_MOST_FAILURES} below" if number > _MOST_FAILURES else ""
    return {"count": f"{number:,}{more}", "rows": rows}


def _made_of(facts: Facts) -> list[dict[str, Any]]:
    """Return everything that decides the figures, part by part."""
    parts = []
    run, caches = facts.run, caches_of(facts.cache)
    for cache in caches:
        made = cache.provenance
        parity = cache.parity
        shown: dict[str, Any] = dict(sorted(cache.identity.items()))
        how = {key: made.get(key) for key in ("date", "engine", "precision", "device", "platform")}
        parts.append({
            "title": f"Features: {short(cache.path.name)}",
            "text": f"Fingerprint {cache.fingerprint}, content {cache.content_sha256}.",
            "facts": _listed(shown | how | {
                "parity with eager fp32 (largest relative difference)":
                    f"{max(parity):.2g}" if parity else "not recorded",
                "versions": made.get("versions"),
                "images": {name: len(split) for name, split in cache.splits.items()},
            }),
        })  # fmt: skip
    hidden = ", ".join(map(str, run.head.hidden)) or "none"
    head = {"hidden": hidden, "dropout": run.head.dropout, "heads": run.num_members}
    seeds = {"seed": run.seed, "data_seed": run.data_seed, "weights_sha256": run.weights_sha256}
    parts.append({
        "title": "Head", "text": "",
        "facts": _listed(head | dict(run.training) | seeds),
    })  # fmt: skip
    if facts.environment:
        parts.append({"title": "Trained on", "text": "", "facts": _listed(facts.environment)})
    if facts.positive is not None and facts.positive.rule is not None:
        rule = facts.positive.rule
        keys = ("wish", "threshold", "refer_below", "temperature", "on", "basis", "reason", "unit",
                "bound", "num_units", "num_right", "num_allowed", "num_needed")  # fmt: skip
        parts.append({
            "title": f"Decision for {short(facts.positive.name)}", "text": "",
            "facts": _listed({key: rule.get(key) for key in keys}),
        })  # fmt: skip
    return parts


def _listed(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(printable(key), _value(value)) for key, value in facts.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(key)} {_value(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return printable(", ".join(map(_value, value[:20])))
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value)


def _commands(facts: Facts) -> list[str]:
    """Return the commands that make the run again; DATA stands for the images."""
    run, lines, cache_names = facts.run, [], []
    for cache in caches_of(facts.cache):
        name = as_word(cache.path.name)
        cache_names.append(name)
        lines.append(" ".join(["featcache extract DATA", name, *_extract_options(cache.identity)]))
    caches, run_name = " ".join(cache_names), as_word(_run_name(facts))
    folds = "FOLDS" if facts.folds is None else as_word(facts.folds.name)
    lines += [f"featcache audit {name}" for name in cache_names]
    options = _train_options(facts)
    if run.members:
        lines.append(f"featcache crossval {caches} {folds} --keep-ensemble {options}".rstrip())
    elif facts.trials is not None:
        lines.append(f"featcache sweep {caches} {run_name}  # its options: sweep.json in the run")
    else:
        lines.append(f"featcache train {caches} {run_name} {options}".rstrip())
    if facts.positive is not None:
        name = as_word(facts.positive.name)
        if (rule := facts.positive.rule) is not None:
            ((wish, value),) = rule["wish"].items()
            on = "" if rule["on"] == "valid" else f" --on {folds}"
            lines.append(f"featcache decide {run_name} --positive {name} --{wish} {value:g}{on}")
        lines.append(f"featcache evaluate {run_name} --positive {name}")
    else:
        lines.append(f"featcache evaluate {run_name}")
    return [*lines, f"featcache report {run_name}"]


def _extract_options(identity: Mapping[str, Any]) -> list[str]:
    options = []
    for key in ("backbone", "image_size", "crop_mode", "interpolation", "bit_depth", "truncated",
                "views", "augmentation", "feature_dtype"):  # fmt: skip
        value = identity.get(key)
        if value is None or (key == "views" and value == 1):
            continue
        name = "augment" if key == "augmentation" else key.replace("_", "-")
        options.append(f"--{name} {as_word(str(value))}")
    return options + [
        f"--{key} {as_word(','.join(map(str, identity[key])))}"
        for key in ("mean", "std") if isinstance(identity.get(key), list)
    ]  # fmt: skip


def _train_options(facts: Facts) -> str:
    """Return the options of ``train`` that differ from its defaults."""
    run, training = facts.run, facts.run.training
    usual = {field.name: field.default for field in fields(TrainingConfig)}
    options = []
    if list(run.head.hidden) != [512, 128]:
        options.append(f"--hidden {','.join(map(str, run.head.hidden)) or 'none'}")
    if run.head.dropout != 0.4:
        options.append(f"--dropout {run.head.dropout:g}")
    for name, default in usual.items():
        value = training.get(name, default)
        if value != default and isinstance(value, str | int | float) and name != "batch_size":
            text = f"{value:g}" if isinstance(value, float) else str(value)
            options.append(f"--{name.replace('_', '-')} {as_word(text)}")
    if (fraction := training.get("valid_fraction")) is not None:
        options.append(f"--valid-fraction {fraction:g}")
    options += [f"--seed {run.seed}"] * bool(run.seed)
    options += [f"--data-seed {run.data_seed}"] * (run.data_seed != run.seed)
    return " ".join(options)
