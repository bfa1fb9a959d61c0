"""Collections as they are downloaded, made small: from raw to evaluate, or one question."""

from __future__ import annotations

import json
import re
import shlex
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, assert_one_line_error
from sample_companions import write_busi, write_radiography
from sample_images import write_image

import featcache
from featcache.backbones.backbone import Backbone
from featcache.errors import DataError, FeatcacheWarning

pytestmark = pytest.mark.usefixtures("children_here")


@pytest.fixture
def evaluated(tmp_path: Path, tiny_backbone: Backbone) -> Any:
    """``evaluated(data, **options)``: extract, train, evaluate; return what was evaluated."""

    def run(data: Path, *, split: str = "test", **options: Any) -> featcache.Evaluation:
        featcache.extract(data, tmp_path / "c.h5", backbone=tiny_backbone, **options)
        featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=2,
                        valid_fraction=None if split == "test" else 0.2)  # fmt: skip
        with warnings.catch_warnings():
            if split == "all":  # evaluate warns that rows were trained on
                warnings.simplefilter("ignore", FeatcacheWarning)
            return featcache.evaluate(tmp_path / "run", split=split)

    return run


def options_of(question: str) -> dict[str, Any]:
    """Return the first answer that a question offers, as keywords."""
    hint = question[question.index("with --") + len("with ") :].partition(", or ")[0]
    words = shlex.split(hint)
    options: dict[str, Any] = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        if name == "--columns":
            options.setdefault("columns", {}).update([value.split("=", 1)])
        else:
            options.setdefault(name.removeprefix("--"), []).append(value)
    return options


@pytest.mark.parametrize("write", [write_radiography, write_busi])
def test_masks_beside_images(tmp_path: Path, evaluated: Any, write: Any) -> None:
    """COVID-19_Radiography and BUSI: split asks, one option answers, no mask is left."""
    write(tmp_path / "raw", 8)
    with pytest.raises(DataError, match="no masks") as question:
        featcache.split(tmp_path / "raw", tmp_path / "data")
    lines: list[str] = []
    featcache.split(tmp_path / "raw", tmp_path / "data", say=lines.append,
                    **options_of(str(question.value)))  # fmt: skip
    assert any(re.fullmatch(r"ignored: 2[47] \(--exclude\)", line) for line in lines)
    result = evaluated(tmp_path / "data")
    assert result.num_samples == 3
    kept = featcache.split(tmp_path / "raw", tmp_path / "kept.csv", companions="keep")
    assert sum(sum(counts.values()) for counts in kept.counts.values()) in {48, 51}


def write_chest(root: Path, folder: str) -> None:
    """Write chest-xray-pneumonia, whose zip holds itself once more and macOS's own files."""
    for split, number in (("train", 6), ("val", 2), ("test", 3)):
        for k, name in enumerate(("NORMAL", "PNEUMONIA")):
            for i in range(number):
                seed = 1000 * k + 100 * len(split) + i
                place = root / folder / split / name
                write_image(place / f"{'IM' if not k else 'person'}{seed}_{split}.jpeg", seed,
                            bright=bool(k))  # fmt: skip
            (place / ".DS_Store").write_bytes(b"\0")
            mac = root / "__MACOSX" / folder / split / name
            mac.mkdir(parents=True, exist_ok=True)
            (mac / f"._IM{split}.jpeg").write_bytes(b"\0\5\x16\7")


def test_chest_xray_pneumonia(tmp_path: Path, evaluated: Any) -> None:
    write_chest(tmp_path / "raw", "chest_xray")
    write_chest(tmp_path / "raw", "chest_xray/chest_xray")
    with zipfile.ZipFile(tmp_path / "chest.zip", "w") as archive:
        for file in sorted((tmp_path / "raw").rglob("*")):
            archive.write(file, file.relative_to(tmp_path / "raw").as_posix())
    counts = []
    for data in (tmp_path / "raw" / "chest_xray", tmp_path / "chest.zip"):
        with pytest.raises(DataError, match="split folders") as question:
            evaluated(data)
        result = evaluated(data, **options_of(str(question.value).replace("; class", ", or ")))
        counts.append((result.num_samples, result.classes))
        (tmp_path / "c.h5").unlink()
        for file in sorted((tmp_path / "run").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    assert counts == [(6, ("NORMAL", "PNEUMONIA"))] * 2


def write_nih(root: Path, labels: list[str]) -> Path:
    """Write NIH ChestX-ray14: images_001/images, and Data_Entry_2017.csv with its headers."""
    lines = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,"]
    for i, label in enumerate(labels):
        name = f"{i // 2:08}_{i % 2:03}.png"
        write_image(root / f"images_{i // 8 + 1:03}/images/{name}", i, bright=label == "Effusion")
        lines.append(f"{name},{label},{i % 2},{i // 2},058,")
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    return root / "Data_Entry_2017.csv"


def test_nih_with_its_csv(tmp_path: Path, evaluated: Any, tiny_backbone: Backbone) -> None:
    table = write_nih(tmp_path / "nih", ["No Finding", "Effusion"] * 8)
    with pytest.raises(DataError, match="CSV header") as question:
        evaluated(table)
    assert "--columns 'path=Image Index' --columns 'target=Finding Labels'" in str(question.value)
    options = options_of(str(question.value))
    assert options["columns"]["group"] == "Patient ID"
    assert evaluated(table, split="all", **options).num_samples == 16
    again = featcache.extract(table, tmp_path / "c.h5", backbone=tiny_backbone)  # remembers
    assert again.status == "up to date"
    write_nih(tmp_path / "labels", ["Effusion|Mass", "Mass", "Effusion", "No Finding"])
    with pytest.raises(DataError, match=r"'Effusion\|Mass' in line 2.*--target-separator '\|'"):
        evaluated(tmp_path / "labels/Data_Entry_2017.csv", **options)


def test_nih_without_its_csv(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_nih(tmp_path / "nih", ["x"] * 16)
    with pytest.warns(FeatcacheWarning, match=r"images_001 to images_002 .*--no-classes"):
        featcache.scan(tmp_path / "nih")
    summary = featcache.extract(
        tmp_path / "nih", tmp_path / "c.h5", backbone=tiny_backbone, no_classes=True
    )
    assert summary.splits == {"all": {"unlabelled": 16}}
    assert summary.ignored_endings == {".csv": 1}


def test_chexpert(tmp_path: Path, evaluated: Any) -> None:
    root = tmp_path / "CheXpert-v1.0-small"
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly,Edema,Pleural Effusion"
    lines = [header]
    for i in range(16):
        path = f"train/patient{i // 2:05}/study1/view{i % 2 + 1}_frontal.jpg"
        write_image(root / path, i, bright=i % 4 < 2)
        flag = ("1.0", "1.0", "0.0", "")[i % 4]
        lines.append(f"CheXpert-v1.0-small/{path},Male,{50 + i},Frontal,AP,,-1.0,0.0,{flag}")
    (root / "train.csv").write_text("\n".join(lines))
    message = "as labels with .*or train on one of them with --columns path=Path --columns 'target="
    with pytest.raises(DataError, match=message) as question:
        evaluated(root / "train.csv")
    options = options_of("with" + str(question.value).partition("one of them with")[2])
    result = evaluated(root / "train.csv", split="all", **options)
    assert result.classes == ("0.0", "1.0")


def test_every_command_asks_the_same_question_before_it_writes(tmp_path: Path, run: Any) -> None:
    write_radiography(tmp_path / "raw", 4)
    for arguments in (
        ["extract", "raw", "c.h5", *TINY],
        ["extract", "raw", "c.h5", *TINY, "--dry-run"],
        ["split", "raw", "data"],
    ):
        done = run(*arguments)
        assert_one_line_error(
            done, "COVID/masks/COVID-1.png of COVID/images/COVID-1.png", "*/masks/**"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    done = run("extract", "raw", "c.h5", *TINY, "--exclude", "*/masks/**", "--json")
    assert json.loads(done.out)["num_images"] == 12
    done = run("train", "c.h5", "run", "--hidden", "none", "--epochs", 1,
               "--valid-fraction", 0.3)  # fmt: skip
    assert done.code == 0, done.err
    done = run("predict", "run", "raw/COVID", *TINY)
    assert_one_line_error(done, "masks/COVID-1.png of images/COVID-1.png", "'masks/**'")
    for option, number in ((["--exclude", "masks/**"], 4), (["--companions", "keep"], 8)):
        done = run("predict", "run", "raw/COVID", *TINY, *option, "--json")
        assert len(json.loads(done.out)["predictions"]) == number
