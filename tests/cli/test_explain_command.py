"""explain on the command line: exit codes, one object, one line for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, assert_one_line_error
from sample_images import write_tree

import featcache
from featcache.backbones.backbone import Backbone

IMAGE = "data/test/covid/tec000_0.jpg"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_tree(folder / "data", {"train": 6, "valid": 3, "test": 2})
    featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_backbone)
    featcache.train(folder / "c.h5", folder / "run", hidden=(4,), epochs=1)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def test_facts_are_one_object_and_the_folder_holds_them(place: Path, run: Any) -> None:
    result = run("explain", "run", IMAGE, "--out", "out", "--positive", "normal", *TINY, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["folder"] == "out"
    (one,) = facts["explanations"]
    assert (one["positive"], one["against"], one["path"]) == ("normal", "covid", IMAGE)
    assert (place / "out" / one["picture"]).read_bytes().startswith(b"\x89PNG")
    held = json.loads((place / "out" / "explanations.json").read_text("utf-8"))
    assert held["explanations"] == facts["explanations"]
    assert_one_line_error(
        run("explain", "run", IMAGE, "--out", "out", *TINY), "replace it with --overwrite"
    )
    (place / "out" / "letter").write_text("years of work")
    again = run("explain", "run", IMAGE, "--out", "out", *TINY, "--overwrite")
    assert_one_line_error(again, "letter")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((IMAGE, "--positive", "cat"), "one of covid, normal"),
        ((IMAGE, "--positive", "covid", "--against", "covid"), "another class than --positive"),
        (("nowhere.png",), "nowhere.png"),
        (("c.h5",), "none of 1"),
    ],
)
def test_bad_input_gets_one_line(
    place: Path, run: Any, arguments: tuple[object, ...], part: str
) -> None:
    assert_one_line_error(run("explain", "run", *arguments, "--out", "out", *TINY), part)
    assert not (place / "out").exists()


def test_a_picture_shows_any_name_as_text(place: Path, run: Any) -> None:
    name = "$\\frac{\x1b[31m\n__.jpg"
    shutil.copy(place / IMAGE, place / name)
    result = run("explain", "run", name, "--out", "out", *TINY)
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    (picture,) = (place / "out").glob("*.png")
    assert picture.name.isascii()
    assert picture.name.startswith("0001_")
