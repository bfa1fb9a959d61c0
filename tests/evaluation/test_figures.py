from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from featcache.evaluation.figures import draw_confusion

pytestmark = pytest.mark.usefixtures("drawn")


def draw(path: Path, confusion: Any, classes: list[str], title: str = "a run on test") -> Any:
    path.write_bytes(draw_confusion(np.array(confusion), classes, title))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def blues(pixels: Any) -> set[tuple[int, ...]]:
    """Return the shades that fill large areas, the white paper left out."""
    shades, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return {
        tuple(s) for s, n in zip(shades.tolist(), counts, strict=True) if n > 2000 and min(s) < 255
    }


def test_cells_are_shaded_by_their_share_of_the_row(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "a.png", [[9, 1], [100, 900]], ["covid", "normal"])
    assert len(blues(pixels)) == 2  # the same shares give the same two shades
    assert len(blues(draw(tmp_path / "b.png", [[9, 1], [500, 500]], ["covid", "normal"]))) == 3


def test_the_same_matrix_gives_the_same_bytes_and_no_temporary_file_stays(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, [[3, 1], [0, 5]], ["covid", "normal"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("num_classes", [2, 3, 7, 15])
def test_every_number_of_classes_is_drawn(tmp_path: Path, num_classes: int) -> None:
    confusion = np.eye(num_classes, dtype=int) * 1000 + 1
    classes = [f"a class with quite a long name {i}" for i in range(num_classes)]
    pixels = draw(tmp_path / "a.png", confusion, classes)
    assert min(pixels.shape[:2]) > 130 * num_classes
    assert len(np.unique(pixels)) > 50


@pytest.mark.parametrize(
    "name",
    ["$\\frac{1}", "a$b", "\\undefined$$", "\x1b[31mred\x07", "a\nb\tc", "\udcff\ud800", "肺炎",
     "", "x" * 5000, "\u202eabc", "%s{0}", "_hidden"],
)  # fmt: skip
def test_hostile_names_are_text(tmp_path: Path, name: str) -> None:
    pixels = draw(tmp_path / "a.png", [[1, 0], [0, 0]], [name, "normal"], title=name)
    assert max(pixels.shape[:2]) < 1500


def test_callers_matplotlib_settings_neither_break_it_nor_change(tmp_path: Path) -> None:
    with mpl.rc_context({"text.usetex": True, "backend": "svg"}):
        before = dict(mpl.rcParams)
        draw(tmp_path / "a.png", [[1, 0], [0, 1]], ["covid", "normal"])
        assert dict(mpl.rcParams) == before
