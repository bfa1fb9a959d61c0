"""Masks among the images are one question that one option answers; ordinary data ask nothing."""

from __future__ import annotations

import re
import subprocess
import zipfile
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children_here import run_here
from PIL import Image
from sample_companions import write_busi, write_mask, write_pair, write_radiography
from sample_images import write_image

from featcache.data.dataset import scan
from featcache.data.image_lists import list_images
from featcache.data.splitting import split
from featcache.errors import DataError, FeatcacheWarning


def asked(root: Path, **options: Any) -> tuple[str, list[str]]:
    """Return the question that a data set raises, and the globs that it offers."""
    with pytest.raises(DataError, match="expected no masks or other companions") as caught:
        scan(root, **options)
    return str(caught.value), re.findall(r"--exclude '([^']+)'", str(caught.value))


def paths(dataset: Any) -> list[str]:
    return [sample.path for sample in dataset.samples]


def of_radiography(root: Path) -> set[str]:
    write_radiography(root)
    return {p.relative_to(root).as_posix() for p in root.glob("*/images/*.png")}


def of_busi(root: Path) -> set[str]:
    write_busi(root)
    return {p.relative_to(root).as_posix() for p in root.glob("*/*).png")}


def pairs(image: str, mask: str, **options: Any) -> Any:
    """Make images of classes a and b and their masks, by patterns with {c}, {i} and {p}."""

    def build(root: Path) -> set[str]:
        made = set()
        for c in "ab":
            for i in range(5):
                names = {"c": c, "i": i, "p": f"{c}xyz{i}"}
                file = image.format(**names)
                write_pair(root / file, root / mask.format(**names), 10 * i + ord(c),
                           bright=c == "a", **options)  # fmt: skip
                made.add(file)
        return made

    return build


LAYOUTS = {
    "COVID-19_Radiography": of_radiography,
    "BUSI": of_busi,
    "images and masks at the top": pairs("images/{c}/{i}.jpg", "masks/{c}/{i}.png"),
    "ISIC": pairs("{c}/img/ISIC_00{i}.jpg", "{c}/gt/ISIC_00{i}_segmentation.png"),
    "Carvana": pairs("{c}/pictures/{i}.jpg", "{c}/pictures_masks/{i}_mask.png"),
    "below the images": pairs("{c}/{i}.png", "{c}/lungs/{i}.png"),
    "another ending": pairs("{c}/{i}.jpg", "{c}/{i}.png"),
    "a word in front": pairs("{c}/{i}.png", "{c}/lung_{i}.png"),
    "no separator": pairs("{c}/{i}.png", "{c}/{i}seg.png"),
    "a word for another": pairs("{c}/image_{i}.png", "{c}/outline_{i}.png"),
    "a folder per patient": pairs("{c}/{p}/image/1.png", "{c}/{p}/mask/1.png"),
    "two folders per patient": pairs("{c}/{p}_x/1.png", "{c}/{p}_m/1.png"),
    "JPEG masks": pairs("{c}/images/{i}.jpg", "{c}/masks/{i}.jpg"),
    "uncompressed": pairs("{c}/images/{i}.jpg", "{c}/masks/{i}.bmp"),
}


@pytest.fixture
def looked_at_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts are what matters, not the child that looks: other tests of this file have one."""
    run_here(monkeypatch)


@pytest.mark.usefixtures("looked_at_here")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_companions_are_one_question_and_its_option_answers_it(layout: str, tmp_path: Path) -> None:
    wanted = LAYOUTS[layout](tmp_path)
    question, globs = asked(tmp_path)
    companions = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*g")} - wanted
    companions |= {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.bmp")}
    examples = re.search(r"look like some: (.*?) \(", question)
    assert examples is not None or layout == "BUSI"  # whose names have brackets
    assert sum(f"{path} of " in question for path in companions) == 2
    assert "--companions keep" in question
    # Without the masks the sole class folder left is "images": that is warned of, rightly.
    is_at_top = layout == "images and masks at the top"
    with pytest.warns(FeatcacheWarning, match="only class folder") if is_at_top else nullcontext():
        dataset = scan(tmp_path, exclude=globs)
    assert set(paths(dataset)) == wanted
    assert dataset.num_ignored["--exclude"] == len(companions)
    kept = scan(tmp_path, companions="keep")
    assert set(paths(kept)) == wanted | companions
    groups = defaultdict(set)
    for sample in kept.samples:
        groups[sample.group].add(sample.path)
    assert all(len(group & wanted) >= 1 and group & companions for group in groups.values())


def test_kept_companions_stay_in_the_split_of_their_image(tmp_path: Path) -> None:
    write_radiography(tmp_path / "raw", 12)
    with pytest.raises(DataError, match="--companions keep"):
        split(tmp_path / "raw", tmp_path / "asked")
    assert not (tmp_path / "asked").exists()
    split(tmp_path / "raw", tmp_path / "kept", companions="keep")
    places = defaultdict(set)
    for file in (tmp_path / "kept").glob("*/*/*/*.png"):
        places[file.name].add(file.relative_to(tmp_path / "kept").parts[0])
    assert len(places) == 36
    assert all(len(splits) == 1 for splits in places.values())
    split(tmp_path / "raw", tmp_path / "m.csv", exclude="*/masks/**")
    dataset = scan(tmp_path / "m.csv")
    assert len(dataset.samples) == 36
    assert not any("masks" in path for path in paths(dataset))


@pytest.mark.usefixtures("looked_at_here")
def test_kept_companions_join_the_patient_of_their_image(tmp_path: Path) -> None:
    for i in range(8):
        write_pair(tmp_path / f"a/p{i // 2}_{i}.png", tmp_path / f"a/masks/{i}.png", i, bright=True)
        (tmp_path / f"a/masks/{i}.png").rename(tmp_path / f"a/p{i // 2}_{i}_mask.png")
        write_image(tmp_path / f"b/p{9 + i}_{i}.png", 50 + i)
    dataset = scan(tmp_path, companions="keep", group_by=r"^(p\d+)_\d\.")
    groups = {sample.path: sample.group for sample in dataset.samples}
    assert groups["a/p1_3_mask.png"] == groups["a/p1_3.png"] == groups["a/p1_2.png"] == "p1"
    assert dataset.num_grouped == 16


def ordinary(name: str) -> Any:
    def build(root: Path) -> None:
        seed = iter(range(10**6))
        for c in "ab":
            for i in range(6):
                files = {
                    "patients": [f"patient{i}{c}/view{v}.jpg" for v in (1, 2)],
                    "patients by letters": [f"{'klmnop'[i]}{c}q/view{v}.jpg" for v in (1, 2)],
                    "cameras": [f"{camera}/IMG_000{i}.jpg" for camera in ("north", "south")],
                    "days": [f"2021-0{d}-01/IMG_000{i}.jpg" for d in (1, 2)],
                    "scans": [f"scan{i}.png", f"scan{i}_2.png"],
                    "numbers": [f"img_{i}.png", f"img_{i}0.png"],
                    "sides": [f"{i}_left.png", f"{i}_right.png"],
                    "views": [f"{i}.png", f"{i}_lateral.png"],
                    "one name in all classes": [f"{i}.png"],
                    "edited": [f"IMG_{i}.jpg", f"IMG_{i}(1).jpg", f"IMG_{i}-edited.jpg"],
                }[name]
                for file in files:
                    write_image(root / c / file, next(seed))

    return build


@pytest.mark.usefixtures("looked_at_here")
@pytest.mark.parametrize("name", [
    "patients", "patients by letters", "cameras", "days", "scans", "numbers", "sides", "views",
    "one name in all classes", "edited",
])  # fmt: skip
def test_ordinary_data_ask_nothing(name: str, tmp_path: Path) -> None:
    ordinary(name)(tmp_path)
    dataset = scan(tmp_path)
    assert len(dataset.samples) == sum(file.is_file() for file in tmp_path.rglob("*"))
    assert {sample.group for sample in scan(tmp_path, companions="keep").samples} == {None}


@pytest.mark.usefixtures("looked_at_here")
def test_drawings_of_two_colours_are_no_masks_of_each_other(tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / "p.png", i)
        for c, size in (("a", 1), ("b", 3)):
            write_mask(tmp_path / c / f"{i}.bmp", tmp_path / "p.png", share=size)
    (tmp_path / "p.png").unlink()
    assert len(scan(tmp_path).samples) == 12


@pytest.mark.usefixtures("looked_at_here")
def test_one_blank_image_among_patients_is_no_companion(tmp_path: Path) -> None:
    for i in range(12):
        for view in (1, 2, 3):
            write_image(
                tmp_path / "ab"[i % 2] / "hijklmnopqrs"[i] / f"view{view}.png", 3 * i + view
            )
    Image.fromarray(np.zeros((40, 45), np.uint8)).save(tmp_path / "a/h/view2.png")
    assert len(scan(tmp_path).samples) == 36


def test_names_alone_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose sizes say nothing are not looked at: listing 50,000 must stay quick."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process"))
    for i in range(40):
        for c in "ab":
            write_image(tmp_path / c / f"x{i}.png", i)
    scan(tmp_path)


def test_files_that_hang_or_crash_the_decoder_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs("{c}/images/{i}.png", "{c}/masks/{i}.png")(tmp_path)
    whole = subprocess.run

    def late(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("decoder", 60, output=None)

    def cut(*arguments: Any, **options: Any) -> Any:
        done = whole(*arguments, **options)
        done.stdout = done.stdout[:40]
        return done

    for stand_in in (late, cut):
        monkeypatch.setattr(subprocess, "run", stand_in)
        assert len(scan(tmp_path).samples) == 20


def test_a_limit_does_not_hide_companions(tmp_path: Path) -> None:
    asked(write_radiography(tmp_path), limit=3)


@pytest.mark.usefixtures("looked_at_here")
def test_the_glob_that_is_offered_leaves_ordinary_images_alone(tmp_path: Path) -> None:
    """Masks that are PNG beside JPEG in one class must not cost another class its PNGs."""
    for i in range(5):
        write_pair(tmp_path / f"a/{i}.jpg", tmp_path / f"a/{i}.png", i, bright=True)
        write_image(tmp_path / f"b/{i}.png", 50 + i)
    _, globs = asked(tmp_path)
    dataset = scan(tmp_path, exclude=globs)
    assert dataset.count() == {"all": {"a": 5, "b": 5}}


def test_companions_in_a_zip(tmp_path: Path) -> None:
    write_radiography(tmp_path / "raw")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for file in sorted(p for p in (tmp_path / "raw").rglob("*") if p.is_file()):
            archive.write(
                file, "COVID-19_Radiography/" + file.relative_to(tmp_path / "raw").as_posix()
            )
    _, globs = asked(tmp_path / "d.zip")
    assert len(scan(tmp_path / "d.zip", exclude=globs).samples) == 18


def test_predict_asks_of_a_folder_and_not_of_named_files(tmp_path: Path) -> None:
    write_busi(tmp_path)
    with pytest.raises(DataError, match=r"\(1\)_mask\.png of .*--companions keep"):
        list_images([tmp_path / "benign"])
    assert len(list_images([tmp_path / "benign"], exclude="*_mask*").samples) == 6
    assert len(list_images([tmp_path / "benign"], companions="keep").samples) == 13
    named = sorted((tmp_path / "benign").iterdir())
    assert len(list_images(named).samples) == 13
    with pytest.warns(FeatcacheWarning, match="matches nothing"):
        assert len(list_images(named, exclude="*_mask*").samples) == 6
