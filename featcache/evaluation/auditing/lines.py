"""The findings of an audit as one page of text of up to 80 columns, and its verdict.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from featcache.errors import printable
from featcache.evaluation.auditing.labels import label_lines
from featcache.evaluation.auditing.outliers import outlier_lines
from featcache.evaluation.auditing.sources import SENTENCES, source_lines, told_classes
from featcache.evaluation.evidence import SIGNS
from featcache.formatting import count, decimal, join_few, list_counts, percent, shorten

if TYPE_CHECKING:
    from featcache.evaluation.auditing.audit import Audit

_WIDTH = 80
_FACTS = {
    "all together": "facts of the files", "name length": "the length of the file name",
    "digits in name": "the number of digits in the file name",
    "kind of first letter": "the first letter of the file name",
}  # fmt: skip


def audit_lines(found: Audit) -> Iterator[str]:
    """Yield one page of lines, the leaks first and the verdict last."""
    place = shorten(printable(found.cache.as_posix()), 30)
    yield f"audit of {place}: {list_counts(found.splits)}"
    if found.images is not None:
        yield from _image_lines(found.images)
    if found.same is not None or found.near is not None:
        yield f"leaks: {_leaks(found.num_leaks)}"
    if found.same is not None:
        yield from _same_lines(found.same)
    if found.near is not None:
        yield from _near_lines(found.near)
    if found.labels is not None:
        yield from label_lines(found.labels)
    if found.outliers is not None:
        yield from outlier_lines(found.outliers)
    if found.shortcuts is not None:
        yield from _shortcut_lines(found.shortcuts)
    if found.blackout is not None:
        yield from _blackout_lines(found.blackout)
    if found.evidence is not None:
        yield from _evidence_lines(found.evidence)
    if found.sources is not None:
        yield from source_lines(found.sources)
    if found.csv is not None:
        yield f"written to {printable(found.csv.as_posix())}: for select --table"
    yield from _wrapped(f"verdict: {found.verdict}", "")


def _leaks(number: int) -> str:
    what = "of copies across splits or of two classes"
    return f"{count(number, 'set')} {what}" if number else f"no sets {what}"


def _same_lines(facts: dict[str, Any]) -> Iterator[str]:
    if facts["num_unknown"]:
        yield f"hashes of images: {facts['num_unknown']:,} rows have none and are not compared"
    by_pixels = facts["num_by_pixels"]
    if by_pixels:
        yield f"same pixels in different files: {count(by_pixels, 'set')}"
    yield from _set_lines("same file" if by_pixels is None else "same file or pixels", facts)


def _near_lines(near: dict[str, Any]) -> Iterator[str]:
    if near["threshold"] is None:
        yield "near copies: too few different rows to tell what is near"
        return
    more = " or more" if near["is_cut"] else ""
    look = " to check by eye" if near["num_pairs"] else ""
    yield f"near copies: {count(near['num_pairs'], 'pair')}{more}{look}"
    yield (f"  threshold: cosine {near['threshold']:.3f} (median of nearest neighbours: "
           f"{near['median']:.3f})")  # fmt: skip
    if near["pictures"] is not None:
        yield from _picture_lines(near["pictures"])
    for pair in near["pairs"]:
        kinds = [word for word in ("mirrored", "inverted") if pair.get(word)]
        kinds += ["by features only"] if pair.get("confirmed") is False else []
        yield f"  {decimal(pair['similarity'])}{''.join(', ' + kind for kind in kinds)}"
        yield from (f"    {_row_text(row)}" for row in pair["rows"])
    yield from _set_lines("near", near, examples=False)


def _picture_lines(facts: dict[str, Any]) -> Iterator[str]:
    if facts["threshold"] is None:
        yield "  pictures: too few, or too little detail, to compare; by features alone"
        return
    yield (f"  pictures: {count(facts['num_compared'], 'pair')} registered; threshold: agreement "
           f"{facts['threshold']:.3f}")  # fmt: skip
    if facts["num_rejected"]:
        yield f"  alike by features but not by pictures, left out: {facts['num_rejected']:,}"


def _set_lines(name: str, facts: dict[str, Any], *, examples: bool = True) -> Iterator[str]:
    if not facts["num_sets"]:
        if examples:
            yield f"{name}: none"
        return
    rows = count(facts["num_rows"], "row")
    yield f"{name}: {count(facts['num_sets'], 'set')} of copies, {rows}"
    titles = {"across_splits": "across splits", "label_conflicts": "of classes that conflict",
              "across_groups": "across groups"}  # fmt: skip
    for key, title in titles.items():
        number = facts[key]["num_sets"]
        if number:
            yield f"  {title}: {number:,}"
        for example in facts[key]["examples"] if examples else []:
            yield f"    {_row_text(example[0])}"
            for row in example[1:2]:
                yield f"      = {_row_text(row)}"


def _row_text(row: dict[str, Any]) -> str:
    name = f", {shorten(printable(row['class']), 16)}" if row["class"] is not None else ""
    return f"{row['split']}: {shorten(printable(row['path']), 48)}{name}"


def _shortcut_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"shortcuts, {count(found['num_rows'], 'row')} of {' and '.join(found['splits'])}:"
    yield from _wrapped(found["sentence"], "  ")
    if found["head"] is None:
        return
    yield f"  balanced accuracy, mean of {found['num_folds']} folds    logistic    tree"
    yield f"  {'linear head on the features':<38}{decimal(found['head']):>8}"
    for row in found["facts"]:
        name = row["fact"] if row["fact"] == "all together" else f"{row['fact']} alone"
        yield f"  {name:<38}{decimal(row['logistic']):>8}{decimal(row['tree']):>8}"


def _blackout_lines(facts: dict[str, Any]) -> Iterator[str]:
    rows = f"{count(facts['num_rows'], 'row')} of {' and '.join(facts['splits'])}"
    yield f"centre blacked out, {rows}:"
    yield from _wrapped(facts["sentence"], "  ")
    if facts["head"] is None:
        return
    yield f"  balanced accuracy, mean of {facts['num_folds']} folds        head"
    yield f"  {'whole image':<38}{decimal(facts['head']):>8}"
    for row in facts["blacked_out"]:
        name = f"{row['way']}, {row['share']:g} of each side"
        yield f"  {name:<38}{decimal(row['balanced_accuracy']):>8}"


def _evidence_lines(facts: dict[str, Any]) -> Iterator[str]:
    title = f"evidence outside the middle ({facts['middle']:g} of each side)"
    if facts["reason"] is not None:
        yield f"{title}: not measured"
        yield from _wrapped(facts["reason"], "  ")
        return
    yield f"{title}, by a linear head:"
    yield f"  {'images':<34}{'for their class':>20}{'against it':>20}"
    for found in facts["classes"]:
        number = f"{found['num_images']:,}"
        if found["num_images"] < found["num_rows"]:
            number += f" of {found['num_rows']:,}"
        name = f"{shorten(printable(found['class']), 16)} ({number})"
        figures = (f"{_share_text(found['outside'][sign]):>20}" for sign in SIGNS)
        yield f"  {name:<34}{''.join(figures)}"
    evenly = percent(facts["expected"])
    yield f"  {'were it spread evenly':<34}{evenly:>20}{evenly:>20}"


def _share_text(share: dict[str, float | None] | None) -> str:
    if share is None or share["share"] is None:
        return "none"
    if share["low"] is None or share["high"] is None:
        return percent(share["share"])
    return f"{percent(share['share'])} ({share['low']:.0%} to {share['high']:.0%})"


def _image_lines(images: dict[str, Any]) -> Iterator[str]:
    parts = []
    for word in ("missing", "changed", "unreadable"):
        number, paths = images[word]["num_rows"], images[word]["paths"]
        if number:
            more = ", ..." if number > len(paths) else ""
            parts.append(f"{count(number, 'image')} {word} ({join_few(paths)}{more})")
    if parts:
        yield f"not audited by their images: {'; '.join(parts)}"


def _wrapped(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent or "  ")


# -------------------------------------------------------------------------------------- verdict


def judge(found: Audit) -> str:
    """Return one paragraph: what must be settled, what may not be believed, what to look at."""
    return " ".join([*_of_copies(found), *_of_shortcuts(found), *_to_look_at(found)])


def _of_copies(found: Audit) -> Iterator[str]:
    if found.num_leaks:
        sets = count(found.num_leaks, "set")
        yield f"Leaks: {sets} of copies across splits or of two classes."
        yield "Until they are removed (--csv, then select --table) figures are too good."
    elif found.same is not None or found.near is not None:
        yield "No copies across splits or of two classes were found."
    torn = max((facts["across_groups"]["num_sets"] for facts in (found.same, found.near) if facts),
               default=0)  # fmt: skip
    if torn and not found.num_leaks:
        sets = "1 set of copies is" if torn == 1 else f"{torn:,} sets of copies are"
        yield f"{sets} spread over several groups, so folds may separate them: --csv joins them."


def _of_shortcuts(found: Audit) -> Iterator[str]:
    verdict = found.shortcuts and found.shortcuts["verdict"]
    if found.shortcuts and verdict == "not shown to beat":
        best = found.shortcuts["best"]
        yield (f"A shortcut ({best['fact']}: {decimal(best['balanced_accuracy'])}) may separate "
               "the classes as well as a head does: a high accuracy on these data does not show "
               "that a head reads the images.")  # fmt: skip
    elif verdict == "beats":
        yield "The head beats the shortcuts that were tried; there may be others."
    elif verdict:
        yield f"Shortcuts: {verdict}."
    of_sources = found.sources["verdict"] if found.sources else None
    if of_sources == "not separable by design":
        yield ("Each class has one source: whether a head recognises the class or only its source "
               "cannot be found out.")  # fmt: skip
    elif found.sources and of_sources == "told":
        yield (f"Sources can be told apart within {told_classes(found.sources)}: test the head on "
               "a source that it has not seen.")  # fmt: skip
    elif of_sources:
        yield f"Sources: {SENTENCES[of_sources]}."


def _to_look_at(found: Audit) -> Iterator[str]:
    things = []
    if found.near and found.near["num_pairs"]:
        things.append("near copies")
    if found.labels and found.labels["num_suspicious"]:
        things.append("labels that look wrong")
    if found.outliers and found.outliers["per_class"]:
        things.append("outliers")
    if things:
        yield f"Look at the images: {', '.join(things)}."
    yield "An audit finds what it looks for; it does not show that the rest is sound."


# ----------------------------------------------------------------- the verdict, for a report's page


def explain(found: Audit, leaks: Sequence[int], torn: Sequence[int]) -> list[dict[str, Any]]:
    """Return the verdict for people who run no commands: what was found, and what it means.

    Args:
        found: The audit.
        leaks: Number of images of each set of copies across splits or of two classes.
        torn: Likewise of each other set of copies over several groups.

    Returns:
        ``text``, and ``is_warning``: whether it casts doubt on all figures of a head.
    """
    texts = [*_explain_copies(found, leaks, torn), *_explain_shortcuts(found)]
    texts += [(False, text) for text in _explain_others(found)]
    return [{"is_warning": is_warning, "text": text} for is_warning, text in texts]


def _explain_copies(
    found: Audit, leaks: Sequence[int], torn: Sequence[int]
) -> Iterator[tuple[bool, str]]:
    number = count(sum(found.splits.values()), "image")
    if leaks:
        text = f"{sum(leaks):,} of {number} have a copy among the images of another split, or of "
        text += f"another class ({count(len(leaks), 'set')} of copies). A head is then judged by "
        text += "pictures that it has learnt, or by labels that contradict each other: do not "
        text += "trust the figures on this page until the copies are removed."
    else:
        text = "No picture was found twice across training, validation and test, or under two "
        text += f"classes, among {number}: copies do not make the figures better."
    yield bool(leaks), text
    if torn:
        text = f"{count(sum(torn), 'image')} in {count(len(torn), 'set')} of copies count as of "
        text += "different groups (patients, say). In a cross-validation a head may have learnt "
        yield False, text + "one copy and be judged by another: its figures may be too good."


def _explain_shortcuts(found: Audit) -> Iterator[tuple[bool, str]]:
    facts = found.shortcuts
    if facts and facts["verdict"] == "not shown to beat":
        best = facts["best"]
        what = _FACTS.get(best["fact"], f"the {best['fact']}")
        text = f"The classes can be told apart without looking at the picture: by {what} alone, "
        text += f"balanced accuracy is {decimal(best['balanced_accuracy'])} in "
        text += f"{count(facts['num_rows'], 'image')}; that of a simple head is "
        text += f"{decimal(facts['head'])}. So images of the classes differ in where they come "
        text += "from or how they were stored. High figures on this page do not show that the head "
        yield True, text + "recognises the class: on images from elsewhere they may be far lower."
    elif facts and facts["verdict"] == "beats":
        text = "File names, sizes and the like tell the classes of "
        text += f"{count(facts['num_rows'], 'image')} apart less well than the head does. There "
        yield False, text + "may be other shortcuts."
    of_sources = found.sources["verdict"] if found.sources else None
    if of_sources == "not separable by design":
        text = "All images of a class come from one source. Whether the head recognises the class "
        yield True, text + "or only the source cannot be found out with these images."
    elif found.sources and of_sources == "told":
        text = f"Within {told_classes(found.sources)} the source of an image can be told from it. "
        text += "The figures may be of sources rather than of classes: judge the head by a source "
        yield True, text + "that it has not seen."


def _explain_others(found: Audit) -> Iterator[str]:
    if found.near and found.near["num_pairs"]:
        pairs = count(found.near["num_pairs"], "pair")
        yield f"Nearly alike: {pairs} of images. Are they of one patient?"
    if found.labels and found.labels["num_suspicious"]:
        number = count(found.labels["num_suspicious"], "image")
        yield f"The labels of {number} look wrong: someone should look at them."
    yield "An audit finds what it looks for; it does not show that the rest is sound."
