"""What the page says of the audit: for people who run no commands, warnings apart."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from sample_decisions import rewrite_json
from sample_rows import array_of, edited, make_cache, rows_of

import featcache

WIDTH = 8


def quiet(_: str) -> None:
    pass


def audited(folder: Path, *, copies: bool, shortcut: bool) -> Path:
    """Make a cache, a run and an audit: with copies, or with a name that tells the class."""
    parts = {}
    for name in ("train", "valid", "test"):
        part = rows_of(name, [0, 1] * 30, width=WIDTH)
        paths = [f"{name}/{'x' * (1 + i % 2) if shortcut else ''}{i:03}.png" for i in range(60)]
        parts[name] = edited(part, paths=paths, groups=[f"{name}{i}" for i in range(60)])
    if copies:
        hashes = {name: part.image_sha256.copy() for name, part in parts.items()}
        features = {name: array_of(part) for name, part in parts.items()}
        for one, other in ((("train", 0), ("test", 2)), (("train", 4), ("train", 5)),
                           (("valid", 6), ("valid", 8))):  # fmt: skip
            hashes[other[0]][other[1]] = hashes[one[0]][one[1]]
            features[other[0]][other[1]] = features[one[0]][one[1]]
        parts = {
            name: edited(part, image_sha256=hashes[name], features=features[name])
            for name, part in parts.items()
        }
    make_cache(folder / "c.h5", **parts)
    featcache.train(
        folder / "c.h5", folder / "run", hidden=(), epochs=2, say=quiet, progress=False
    )  # fmt: skip
    parts_of_audit = "same,near,shortcuts" if shortcut else "same,near"
    featcache.audit(folder / "c.h5", only=parts_of_audit, say=quiet)
    return folder / "run"


def notes_of(run: Path) -> list[tuple[bool, str]]:
    """Return whether each paragraph of the audit is a warning, and its text."""
    page = featcache.report(run, say=quiet).file.read_text("utf-8")
    part = page[page.index('<aside class="audit') : page.index("</aside>")]
    found = re.findall(r"<p( class=\"warn\")?>(.*?)</p>", part, re.DOTALL)
    return [(bool(warn), unescape(text)) for warn, text in found]


@pytest.mark.filterwarnings("ignore:in more than one split")
def test_copies_are_counted_in_images_and_what_they_mean_is_said(tmp_path: Path) -> None:
    notes = notes_of(audited(tmp_path, copies=True, shortcut=False))
    is_warning, text = notes[0]
    assert is_warning
    assert text.startswith("4 of 180 images have a copy among the images of another split, or of")
    assert "do not trust the figures on this page" in text
    assert not notes[1][0]
    assert notes[1][1].startswith("2 images in 1 set of copies")
    assert not any("--" in text for _, text in notes)


def test_a_shortcut_stands_out_as_a_warning(tmp_path: Path) -> None:
    run = audited(tmp_path, copies=False, shortcut=True)
    warnings = [text for is_warning, text in notes_of(run) if is_warning]
    assert len(warnings) == 1
    assert re.match(
        r"The classes can be told apart without looking at the picture: by (the length of the file "
        r"name|facts of the files) alone, balanced accuracy is 1.000 in 120 images;", warnings[0]
    )  # fmt: skip
    # The file of an earlier version has a paragraph only.
    rewrite_json(tmp_path / "c.h5.audit.json", lambda facts: facts.pop("findings"))
    notes = notes_of(run)
    assert [text for is_warning, text in notes if is_warning] == [notes[0][1]]
    assert notes[0][1].startswith("A shortcut (")
    rewrite_json(tmp_path / "c.h5.audit.json", lambda facts: facts.update(findings=[{"text": "x"}]))
    assert "never audited" in notes_of(run)[0][1]


def test_a_sound_audit_warns_of_nothing(tmp_path: Path) -> None:
    notes = notes_of(audited(tmp_path, copies=False, shortcut=False))
    assert not any(is_warning for is_warning, _ in notes)
    assert notes[0][1].startswith("No picture was found twice")
    assert len(notes) == 2
