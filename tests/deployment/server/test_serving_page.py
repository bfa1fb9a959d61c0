"""The page of a server, used in headless Chromium as a person would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from headless_browser import AXE, CHROMIUM, Browser
from PIL import Image
from sample_servers import Server, make_run

import featcache

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

HOSTILE = "<img src=x onerror=alert(1)>'\"&amp;"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run whose second class has a hostile name."""
    made = make_run(tmp_path_factory.mktemp("page"))
    featcache.select(made / "c.h5", made / "renamed.h5", rename={"normal": HOSTILE})
    featcache.train(
        made / "renamed.h5", made / "run", hidden=(4,), epochs=3, device="cpu", overwrite=True
    )
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(folder, file_bytes=1 << 16) as made:
        yield made


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as made:
        yield made


@pytest.fixture
def browser(server: Server, started: Browser) -> Browser:
    """A browser that has just opened the page."""
    started.open(server.url)
    return started


def test_a_person_chooses_images_and_reads_what_they_are(
    folder: Path, server: Server, browser: Browser, tmp_path: Path
) -> None:
    image = next(folder.glob("data/test/covid/*.png"))
    hostile = tmp_path / "<b>name&.png"
    hostile.write_bytes(image.read_bytes())
    wide = tmp_path / "unlike.png"  # features that no training image has
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(wide)
    wanted = server.send((hostile.name, image.read_bytes())).facts["predictions"][0]
    unlike = server.send((wide.name, wide.read_bytes())).facts["predictions"][0]
    assert unlike["unlike_training"]
    browser.choose_files("#files", hostile, wide)
    browser.wait_until("document.querySelectorAll('.answer').length === 2")
    browser.wait_until("document.getElementById('status').textContent.includes('unlike.png:')")
    texts = browser.run("[...document.querySelectorAll('.answer')].map((a) => a.innerText)")
    first, second = (text.replace("\n", " ") for text in reversed(texts))
    assert hostile.name in first
    assert wanted["pred"] in first
    for prob in wanted["probs"]:
        assert f"{100 * prob:.1f} %" in first
    assert HOSTILE in first
    assert "Unlike any training image" not in first
    assert "Unlike any training image" in second
    # A stranger's name is no element; its own server alone was asked; nobody complained.
    assert browser.run("document.querySelectorAll('b, img[onerror]').length") == 0
    assert browser.messages == []
    own = (server.url, f"blob:{server.url}")
    assert [url for url in browser.requests if not url.startswith(own)] == []

    browser.run("document.querySelector('.why').focus()")
    browser.press("Enter", 13, "\r")
    browser.wait_until("document.querySelector('.explanation img')?.naturalWidth > 0")
    said = browser.run("document.querySelector('.explanation').innerText")
    assert "not where disease is" in said
    assert "Nearest training images" in said
    for width in (1280, 390):  # nothing is wider than the window
        browser.resize(width)
        assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390)])
@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here: see tests/README.md")
def test_axe_finds_nothing_on_the_page_with_answers(
    folder: Path, server: Server, started: Browser, tmp_path: Path, *, dark: bool, width: int
) -> None:
    image = next(folder.glob("data/test/covid/*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nonsense")
    started.open(server.url, dark=dark, width=width)
    assert started.violations() == []
    started.choose_files("#files", image, broken)
    started.wait_until("document.querySelectorAll('.answer, .failed').length >= 2")
    started.run("document.querySelector('.why').click()")
    started.wait_until("document.querySelector('.explanation img')?.naturalWidth > 0")
    assert started.violations() == []


def test_what_is_refused_is_said(browser: Browser, tmp_path: Path) -> None:
    broken, large = tmp_path / "broken.png", tmp_path / "large.png"
    broken.write_bytes(b"nonsense")
    large.write_bytes(bytes((1 << 16) + 1))
    browser.choose_files("#files", broken, large)
    browser.wait_until("document.querySelectorAll('.failed').length === 2")
    said = browser.run("[...document.querySelectorAll('.failed')].map((p) => p.textContent)")
    assert said == [
        "Not classified: The file is too large.",
        "Not classified: bytes of no known image format",
    ]


def test_the_page_is_usable_by_keyboard_and_screen_reader(browser: Browser) -> None:
    names = []
    for _ in range(2):
        browser.press("Tab", 9)
        names.append(browser.run("document.activeElement.id || document.activeElement.pathname"))
    assert names == ["files", "/card"]
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    found = {
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree
        if not node.get("ignored") and "role" in node
    }  # fmt: skip
    assert ("heading", "Classify images") in found
    assert any(role == "status" for role, _ in found)
    assert any(role == "button" and "Choose images" in name for role, name in found)
    assert browser.run("document.documentElement.lang") == "en"
