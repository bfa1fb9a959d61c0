"""Names of classes, files, groups, columns and folders are text in the page, whatever they are."""

from __future__ import annotations

import csv
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headless_browser import CHROMIUM, Browser
from sample_pages import Parser
from sample_rows import edited, make_cache, rows_of

import featcache

HOSTILE = (
    # markup
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<img src=x onerror=a()>",
    "</style><script>a()</script>", "</title><svg onload=a()>", "<!--", "-->", "]]><![CDATA[",
    "<svg><animate onbegin=a()>", "<iframe srcdoc=x>", "<base href=//x>", "<b>bold", "</table>",
    "<details open ontoggle=a()>", "<a href=javascript:a()>x", "<meta http-equiv=refresh>",
    "<link rel=stylesheet href=//x>", "<style>*{display:none}", "<textarea>", "<plaintext>",
    # attributes, entities
    "\" onmouseover=\"a()", "' onfocus='a()", "\"onmouseover='a()'", "`onclick=a()`", "&lt;b&gt;",
    "&#60;b&#62;", "&quot;&amp;", "a=b c", "\">", "'>",
    # templates, formats, replacement patterns, code
    "{{ 7 * 7 }}", "{% include 'x' %}", "{# gone #}", "${7*7}", "#{7*7}", "<%= 7*7 %>", "%s%n%(a)s",
    "{}{0.__class__}", "$&$`$'$1", "\\u003cscript\\u003e", "'; alert(3) //", "*/alert(4)/*",
    "javascript:alert(5)", "data:text/html,<b>", "__proto__", "constructor",
    # characters
    "a\u202egnp.exe", "\u200f\u200erl", "\u2028\u2029", "caf\udce9", "\x1b[31m", "\x01\x7f",
    "x\ufeff",
    "\U0001f9a0\U0001f468\u200d\u2695\ufe0f", "n" * 180, "Z\u0351\u0351\u0351a\u0301lgo",
)  # fmt: skip


CLASSES = tuple(name.replace("\udce9", "\xe9") for name in HOSTILE)  # classes are UTF-8

USED = {
    "html", "head", "meta", "title", "link", "style", "body", "a", "header", "main", "footer", "p",
    "h1", "h2", "h3", "section", "aside", "div", "dl", "dt", "dd", "b", "strong", "span", "ul",
    "li", "table", "caption", "thead", "tbody", "tr", "th", "td", "button", "details", "summary",
    "figure", "figcaption", "svg", "path", "polyline", "text", "g", "circle", "code", "pre",
    "script", "label", "input", "output",
}  # fmt: skip
"""Tags of the page itself; titles of plots are text of SVG."""


def quiet(_: str) -> None:
    pass


QUIET: dict[str, Any] = {"say": quiet, "progress": False}


def write_run(folder: Path, names: tuple[str, ...]) -> Path:
    """Train on classes, files and groups of such names, in a folder that has one, and evaluate."""
    splits, number = {}, max(60, 2 * len(names))
    for split in ("train", "valid", "test"):
        rows = rows_of(split, np.arange(number) % len(names), width=len(names))
        paths = [f"{split}/{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(number)]
        features = np.random.default_rng(0).normal(size=(number, 60)).astype("f4")
        groups = [f"{split}{HOSTILE[i // 2 % len(HOSTILE)]}" for i in range(number)]
        paths.sort(key=lambda path: path.encode("utf-8", "surrogateescape"))
        splits[split] = edited(rows, features=features, paths=paths, groups=groups)
    folder = folder / "{{ x }}<b>'$&"
    folder.mkdir()
    identity = {"backbone": HOSTILE[1], "image_size": 32}
    make_cache(folder / "<i>c.h5", classes=names, identity=identity, **splits)
    run = folder / "<u>run"
    featcache.train(folder / "<i>c.h5", run, hidden=(), epochs=2, **QUIET)
    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of three such classes without one to find, and one of all with subgroups."""
    few = write_run(tmp_path_factory.mktemp("few"), CLASSES[:3])
    many = write_run(tmp_path_factory.mktemp("many"), CLASSES)
    table, column = many.parent / "t.csv", "<em>{{ 7*7 }}"
    paths = featcache.open_cache(many.parent / "<i>c.h5").split("valid").paths
    with table.open("w", newline="", encoding="utf-8") as file:
        values = [(path, CLASSES[i // 12]) for i, path in enumerate(paths) if path.isprintable()]
        csv.writer(file).writerows([("path", column), *values])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", featcache.FeatcacheWarning)
        featcache.evaluate(
            many, split="valid", positive=HOSTILE[1], by=column, table=table, say=quiet
        )
    featcache.report(few, say=quiet)
    featcache.report(many, positive=HOSTILE[1], say=quiet)
    return {"few": few / "report.html", "many": many / "report.html"}


def test_there_are_56_of_them_and_all_are_classes(pages: dict[str, Path]) -> None:
    assert len(set(HOSTILE)) == 56
    cache = featcache.open_cache(pages["many"].parent.parent / "<i>c.h5")
    assert cache.classes == CLASSES


@pytest.mark.parametrize("name", ["few", "many"])
def test_hostile_names_are_text(pages: dict[str, Path], name: str) -> None:
    page = pages[name].read_text("utf-8")
    parser = Parser(page)
    tags = [tag for tag, _ in parser.tags]
    assert tags.count("script") == (2 if name == "many" else 1)
    assert {*tags} <= USED
    assert not [key for _, attributes in parser.tags for key in attributes if key[:2] == "on"]
    for char in "\u202e\u200f\u2028\u2029\x1b\x01\x7f\ufeff":
        assert char not in page
    assert "<script>alert(1)</script>" in parser.text
    if name == "many":
        for text in ("<u>run", "<i>c.h5", "By <em>{{ 7*7 }}", "</script><script>alert(2)</script>"):
            assert text in parser.text


def test_every_name_of_a_file_and_of_a_class_is_shown_as_it_is(pages: dict[str, Path]) -> None:
    page = pages["many"].read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    assert not {*"<>&"} & {*found[1]}
    data = json.loads(found[1])
    names = [row[0] for row in data["rows"]]
    for number, name in enumerate(HOSTILE):
        assert data["classes"][number]
        if name.isprintable() and len(name) < 40:
            assert data["classes"][number] == name
            assert any(shown.startswith(f"valid/{name}") for shown in names), name
    assert any("caf\\udce9" in shown for shown in names)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_takes_them_for_text_and_asks_for_nothing(
    pages: dict[str, Path], tmp_path: Path
) -> None:
    with Browser(tmp_path / "profile") as browser:
        for name, path in pages.items():
            for anchor in ("", "threshold=0&cell=fp", "threshold=2&cell=fn", HOSTILE[0]):
                browser.open(path, anchor)
                tags = browser.run(
                    "[...document.querySelectorAll('*')].map((part) => part.localName)"
                )
                assert tags.count("script") == (2 if name == "many" else 1)
                assert {*tags} <= USED
                bold = browser.run(
                    "[...document.querySelectorAll('b')].map((part) => part.textContent).join('')"
                )
                assert not {*bold} - {*"0123456789.,<>"}
                assert (browser.messages, browser.requests) == ([], [])
            if name == "few":
                browser.run("document.querySelector('button[data-pair]').click()")
            else:
                listed = browser.run(
                    "[...document.querySelectorAll('#mistakes tbody tr')].map((r) => r.innerText)"
                )
                assert len(listed) == 2
            assert browser.run("document.documentElement.scrollWidth") <= 1280
            browser.open(path, width=390)
            assert browser.run("document.documentElement.scrollWidth") <= 390
