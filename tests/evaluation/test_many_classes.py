"""Many classes: text that can be read, files that are small, a picture in which one sees something.

Every line has at most 80 columns, but for those that name a path.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import on_terminal
from PIL import Image

import featcache
from featcache.evaluation.confusions import count_confusions, to_matrix
from featcache.evaluation.figures import draw_confusion
from featcache.metrics.scores import compute_metrics


def write_classes(folder: Path, number: int, *, spread: float = 1.5) -> None:
    """Write a cache of so many classes, two rows each in test, named as ImageNet's."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(number, 16))
    rows = {"train": 3, "valid": 1, "test": 2}
    targets = {name: np.repeat(np.arange(number), n) for name, n in rows.items()}
    features = {
        name: (centres[t] + spread * rng.normal(size=(len(t), 16))).astype("f4")
        for name, t in targets.items()
    }
    paths = {name: [f"{name}/{i:05d}.png" for i in range(len(t))] for name, t in targets.items()}
    featcache.write_cache(
        folder / "c.h5", features, targets, paths, classes=[f"n{i:08d}" for i in range(number)]
    )


@pytest.fixture(scope="module", params=[20, 300])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("classes")
    write_classes(place, request.param)
    featcache.train(place / "c.h5", place / "run", hidden=(), epochs=2)
    return place, request.param


LINES = [
    "evaluate run --positive n00000003", "train c.h5 other --hidden none --epochs 2 --overwrite",
    "info c.h5", "select c.h5 new.h5 --rebuild", "predict run --cache c.h5",
    "sweep c.h5 best --trials 2 --repeats 2 --overwrite",
]  # fmt: skip


ALL = """
import contextlib, sys
from blank_pictures import save_blank
from matplotlib.figure import Figure
from featcache.cli.main import main
Figure.savefig = save_blank
for line in sys.argv[1:]:
    print("LINE", flush=True)
    with contextlib.suppress(SystemExit):
        main(line.split())
"""


def test_every_verb_fits_80_columns(folder: Any, rounds: Callable[[int, int], int]) -> None:
    """All in one process, of a second and a half; of 20 classes what differs."""
    place, number = folder
    asked = LINES[: rounds(1 if number == 20 else 6, 6)]
    said = on_terminal(["-c", ALL, *asked], place, 80).split("LINE\r\n")[1:]
    for line, shown in zip(asked, said, strict=True):
        assert shown.strip()
        assert "error" not in shown
        lines = [x.rsplit("\r", 1)[-1] for x in shown.split("\r\n")]
        assert not [x for x in lines if len(x) > 80 and ".png" not in x]
        if not line.startswith("predict"):  # a line an image
            assert len(lines) < 120
        assert len(shown) < 200_000


@pytest.fixture(scope="module")
def evaluated(folder: Any) -> Any:
    """The result of an evaluation, and what it said: the picture takes a second."""
    said = list[str]()
    return featcache.evaluate(folder[0] / "run", say=said.append), said


def test_few_classes_have_a_matrix_and_more_their_worst(folder: Any, evaluated: Any) -> None:
    (_, number), (result, said) = folder, evaluated
    matrix = [i for i, line in enumerate(said) if line.startswith("target \\ pred")]
    if number == 20:  # numbered, so that it fits
        assert result.confusion_matrix is not None
        shown = [line.split()[2:] for line in said[matrix[0] + 1 : matrix[0] + 21]]
        assert shown == [[str(n) for n in row] for row in result.confusion_matrix]
        return
    assert not matrix
    start = said.index(f"the 10 of {number} classes with the lowest f1:")
    worst = [line.split()[0] for line in said[start + 2 : start + 12]]
    known = {name: row["f1"] for name, row in result.per_class.items() if row["f1"] is not None}
    assert worst == sorted(known, key=lambda name: (known[name], name))[:10]
    start = said.index("most confused classes:")
    pairs = [line.split() for line in said[start + 1 : start + 11]]
    counted = [int(pair[0]) for pair in pairs]
    assert counted == sorted(counted, reverse=True)
    for number_wrong, _, total, target, *_, pred in pairs:
        mistaken = [
            row for row in result.mistakes if (row["target"], row["pred"]) == (target, pred)
        ]
        assert int(number_wrong) == len(mistaken)
        assert int(total) == result.per_class[target]["num_samples"]


def test_above_100_classes_the_matrix_is_a_file(folder: Any, evaluated: Any) -> None:
    (place, number), (result, _) = folder, evaluated
    written = json.loads((place / "run" / "evaluation" / "test.json").read_text("utf-8"))
    assert written == result.as_dict()
    assert {*result.per_class} == {f"n{i:08d}" for i in range(number)}
    if number <= 100:
        assert result.confusion_matrix_file is None
        assert np.array(result.confusion_matrix).shape == (number, number)
        # a row of the matrix is a line
        text = (place / "run" / "evaluation" / "test.json").read_text("utf-8")
        assert len(text.splitlines()) < 40 + 12 * number + 8 * len(result.mistakes)
        return
    assert result.confusion_matrix is None
    assert result.confusion_matrix_file == "evaluation/test_confusion.csv"
    with (place / "run" / result.confusion_matrix_file).open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert sum(int(cell["num_samples"]) for cell in cells) == result.num_samples
    right = sum(int(c["num_samples"]) for c in cells if c["target"] == c["pred"])
    assert right / result.num_samples == result.accuracy
    mistakes = [(row["target"], row["pred"]) for row in result.mistakes]
    for cell in cells:
        if cell["target"] != cell["pred"]:
            pair = cell["target"], cell["pred"]
            assert int(cell["num_samples"]) == mistakes.count(pair)
    # again, over its own files, and as a part of the run that is replaced
    assert featcache.evaluate(place / "run") == result


@pytest.mark.parametrize("number", [100, 101])
def test_100_classes_are_the_most_that_have_a_matrix(number: int) -> None:
    targets = np.arange(number)
    found = compute_metrics(targets, np.eye(number), [str(i) for i in range(number)])
    assert found["accuracy"] == found["roc_auc"] == 1
    wanted = np.eye(number, dtype=int).tolist() if number == 100 else None
    assert found["confusion_matrix"] == wanted


@pytest.mark.parametrize("folder", [300], indirect=True)
def test_a_run_with_that_file_may_be_replaced(folder: Any, tmp_path: Path) -> None:
    place, _ = folder
    featcache.train(place / "c.h5", tmp_path / "r", hidden=(), epochs=1)
    featcache.evaluate(tmp_path / "r")
    featcache.train(place / "c.h5", tmp_path / "r", hidden=(), epochs=1, overwrite=True)


def test_confusions_are_the_cells_of_the_matrix() -> None:
    rng = np.random.default_rng(1)
    classes = [f"c{i}" for i in range(7)]
    targets, preds = rng.integers(0, 7, (2, 500))
    found = count_confusions(targets, preds, classes)
    wanted = np.zeros((7, 7), int)
    np.add.at(wanted, (targets, preds), 1)
    assert to_matrix(found, classes).tolist() == wanted.tolist()
    assert [c.number for c in found] == sorted(wanted[wanted > 0].tolist(), reverse=True)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("number", [41, 300, 1000])
def test_the_picture_of_many_classes_shows_diagonal_and_confusions(
    tmp_path: Path, number: int
) -> None:
    confusion = 9 * np.eye(number, dtype=int)
    confusion[number // 2, number // 4] = 30
    names = [f"n{i:08d}" for i in range(number)]
    (tmp_path / "a.png").write_bytes(draw_confusion(confusion, names, "a run"))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    assert max(pixels.shape) < 2000
    # Dark pixels of the diagonal: along most of the matrix' rows of pixels.
    dark = (pixels[:, : pixels.shape[1] // 2] < 120).any(1)
    assert dark.mean() > 0.6
