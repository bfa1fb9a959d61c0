"""A CSV says what it says: no column is passed over in silence, no cell becomes an odd class."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from sample_folders import plant, sheet

from featcache.csv_files import write_csv
from featcache.data.dataset import ImageDataset, scan
from featcache.errors import ConfigError, DataError


def answered(question: str) -> dict[str, Any]:
    """Return the options that the hint of an error offers, as keywords of ``scan``."""
    words = shlex.split(question.partition("Say what they are with ")[2].partition(", or that")[0])
    return {"columns": dict(pair.split("=", 1) for pair in words if pair != "--columns")}


def rows(dataset: ImageDataset) -> list[tuple[str, str, str, str | None]]:
    return [(s.path, dataset.class_of(s), s.split, s.group) for s in dataset.samples]


WANTED = [("i/1.png", "a", "train", "p"), ("i/2.png", "b", "train", "q"),
          ("i/3.png", "a", "test", "r"), ("i/4.png", "b", "test", "s")]  # fmt: skip
BODY = "\n".join(map(",".join, WANTED))


@pytest.mark.parametrize("header", [
    "path,target,Split,patient", "path,label,split,group", "Path,Target,Split,Group",
    "Image Index,Finding Labels,split,Patient ID", "image_id,dx,SET,lesion_id",
    "file name,class,subset,subject", "FilePath,Diagnosis,partition,PatientID",
    "path,target,split,PID",
])  # fmt: skip
def test_headers_that_resemble_missing_columns_are_a_question(tmp_path: Path, header: str) -> None:
    file = sheet(tmp_path, f"{header}\n{BODY}\n")
    with pytest.raises(
        DataError, match="CSV header: expected path, target, split, group"
    ) as caught:
        scan(file)
    unknown = [
        name for name in header.split(",") if name not in {"path", "target", "split", "group"}
    ]
    assert all(f"{name!r} (" in str(caught.value) for name in unknown)
    assert rows(scan(file, **answered(str(caught.value)))) == WANTED
    if header.startswith("path"):
        dataset = scan(file, ignore_columns=unknown)
        assert len(dataset.samples) == 4
        assert dataset.ignored_columns == ()


def test_other_columns_are_told_in_one_line(tmp_path: Path) -> None:
    dataset = scan(sheet(tmp_path, "age,path,target,,patient,group\n7,i/1.png,a,,p,g\n"))
    assert dataset.describe_ignored() == ["ignored columns: age, patient"]
    assert rows(dataset) == [("i/1.png", "a", "all", "g")]
    dataset = scan(sheet(tmp_path, "path,x\x1b,y\ni/1.png,2,3\n"), ignore_columns="y")
    assert dataset.describe_ignored() == [r"ignored columns: x\x1b"]


def test_columns_may_have_any_header(tmp_path: Path) -> None:
    file = sheet(tmp_path, "path,file,target,class\ni/1.png,i/2.png,a,b\n")
    assert rows(scan(file)) == [("i/1.png", "a", "all", None)]
    chosen = scan(file, columns={"path": "file", "target": "class"}, ignore_columns=["path"])
    assert rows(chosen) == [("i/2.png", "b", "all", None)]
    assert chosen.ignored_columns == ("target",)
    for options in ({"columns": {"path": "gone"}}, {"ignore_columns": "gone"}):
        with pytest.raises(DataError, match=r"headers of the CSV: path, file.*found 'gone'"):
            scan(file, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--columns: expected a CSV"):
        scan(plant(tmp_path / "d", "a/1.png"), columns={"path": "x"})


@pytest.mark.parametrize("results", [
    "path,group,target,pred,prob_a,prob_b\ni/1.png,p,a,a,0.9,0.1\n",
    "path,pred,prob,prob_label,failure\ni/1.png,a,0.9,0.1,\n",
    "path,group,targets,unknown,preds,prob_a\ni/1.png,p,a|b,,a,0.9\n",
])  # fmt: skip
def test_our_own_tables_pass_everywhere(tmp_path: Path, results: str) -> None:
    dataset = scan(sheet(tmp_path, results))
    assert (len(dataset.samples), dataset.ignored_columns) == (1, ())


def test_cells_are_stripped_and_blank_rows_skipped(tmp_path: Path) -> None:
    text = "path , target,split ,group\ni/1.png , a ,\tTrain, p\n,,,\n , ,,\ni/2.png,a, val ,p \n\n"
    assert rows(scan(sheet(tmp_path, text))) == [
        ("i/1.png", "a", "train", "p"), ("i/2.png", "a", "valid", "p"),
    ]  # fmt: skip
    assert rows(scan(sheet(tmp_path, "path,target\ni/1.png,a,,\n"))) == [
        ("i/1.png", "a", "all", None)
    ]


def test_blanks_that_belong_to_a_name_stay(tmp_path: Path) -> None:
    plant(tmp_path, " i/1.png")
    assert rows(scan(sheet(tmp_path, "path\n i/1.png\n i/2.png\n"))) == [
        (" i/1.png", "", "all", None), ("i/2.png", "", "all", None),
    ]  # fmt: skip
    write_csv(tmp_path / "own.csv", ("path", "target"), [(" i/1.png", "\tx"), ("i/2.png", "y")])
    assert scan(tmp_path / "own.csv").classes == ("\tx", "y")


@pytest.mark.parametrize(("targets", "message"), [
    (["a", "nan"], r"empty cells.*found 'nan' in 1 row, the first of them in line 3"),
    (["a", "NaN", "NaN"], r"found 'NaN' in 2 rows"), (["<NA>", "a"], "'<NA>'"),
    (["NA", "a"], "'NA'"),
    (["1", "1.0"], "found '1' and '1.0', the same number"), (["01", "1", "2"], "'01' and '1'"),
    (["A|B", "A"], r"several in one cell, 'A\|B' in line 2.*--target-separator '\|'"),
    (["A|B", "B|C"], "several in one cell"),
])  # fmt: skip
def test_targets_that_are_hardly_classes_are_a_question(
    tmp_path: Path, targets: list[str], message: str
) -> None:
    text = "path,target\n" + "".join(f"i/{i + 1}.png,{t}\n" for i, t in enumerate(targets))
    with pytest.raises(DataError, match=f"target column: .*{message}"):
        scan(sheet(tmp_path, text))


def test_classes_that_only_look_odd_are_taken(tmp_path: Path) -> None:
    """A folder may be called so, and ``split`` writes its name into a CSV."""
    names = ["a|b", "None", "1", "2.0"]
    text = "path,target\n" + "".join(f"i/{i + 1}.png,{t}\n" for i, t in enumerate(names))
    assert scan(sheet(tmp_path, text)).classes == tuple(sorted(names))


def test_empty_targets_stay_unlabelled_and_are_counted(tmp_path: Path) -> None:
    dataset = scan(sheet(tmp_path, "path,target\ni/1.png,a\ni/2.png, \ni/3.png,\n"))
    assert dataset.count() == {"all": {"unlabelled": 2, "a": 1}}


def test_columns_of_several_labels_are_named(tmp_path: Path) -> None:
    """As CheXpert's train.csv has them; one of them can be trained on."""
    text = (
        "Path,Sex,Age,No Finding,Edema,Pleural Effusion\n"
        "i/1.png,F,68,1.0,,\ni/2.png,M,7,,-1.0,1.0\ni/3.png,F,9,,0.0,0.0\n"
    )
    file = sheet(tmp_path, text)
    flags = "3 columns of 0 and 1: No Finding, Edema, Pleural.*as labels with --columns path=Path"
    answer = "--columns path=Path --columns 'target=Pleural Effusion'"
    with pytest.raises(DataError, match=f"{flags}.*{answer}"):
        scan(file)
    dataset = scan(file, columns={"path": "Path", "target": "Pleural Effusion"})
    assert [dataset.class_of(s) for s in dataset.samples] == ["", "1.0", "0.0"]
    assert dataset.ignored_columns == ("Sex", "Age", "No Finding", "Edema")


@pytest.mark.parametrize(("mark", "encoding"), [
    (";", "utf-8"), ("\t", "utf-8"), (",", "utf-8-sig"), (";", "utf-8-sig"), ("\t", "utf-16"),
    (",", "utf-16"),
])  # fmt: skip
def test_separators_and_encodings_of_spreadsheets(tmp_path: Path, mark: str, encoding: str) -> None:
    plant(tmp_path, "i/é.png")
    text = "path,target\r\ni/1.png,a\r\ni/é.png,b\r\n".replace(",", mark)
    assert [r[:2] for r in rows(scan(sheet(tmp_path, text, encoding=encoding)))] == [
        ("i/1.png", "a"), ("i/é.png", "b"),
    ]  # fmt: skip
    if encoding == "utf-8":
        assert len(scan(sheet(tmp_path, f"sep={mark}\r\n{text}")).samples) == 2


@pytest.mark.parametrize(("encoding", "message"), [
    ("cp1252", r"found another encoding \(byte 0xe9 in line 2\), such as cp1252.*CSV UTF-8"),
    ("utf-16-le", "found UTF-16 without"), ("utf-16-be", "found UTF-16 without"),
])  # fmt: skip
def test_other_encodings_are_named(tmp_path: Path, encoding: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan(sheet(tmp_path, "path,target\ni/é.png,a\n", encoding=encoding))


@pytest.mark.parametrize(("path", "advice"), [
    ("i\\1.png", "Windows' way"), ("C:\\x\\1.png", "Windows' way"), ("j/1.png", "CSV's folder."),
    ("1.png", "Several files have that name, such as "), ("5.png", "relative to the CSV's folder."),
])  # fmt: skip
def test_paths_that_lead_nowhere_are_explained(tmp_path: Path, path: str, advice: str) -> None:
    with pytest.raises(DataError, match=f"1 of 1 missing.*{re.escape(advice)}"):
        scan(sheet(tmp_path, f"path\n{path}\n", "i/1.png", "k/1.png"))


def test_files_may_be_named_as_collections_name_them(tmp_path: Path) -> None:
    """By the name alone (NIH), without its ending (HAM10000), below the own folder (CheXpert)."""
    plant(tmp_path, "set/a/x.png", "set/b/y.jpg", "set/b/z.png")
    (tmp_path / "set/t.csv").write_text("path,target\nx.png,p\ny,q\nset/b/z.png,p\n")
    dataset = scan(tmp_path / "set/t.csv")
    assert [row[:2] for row in rows(dataset)] == [
        ("a/x.png", "p"), ("b/y.jpg", "q"), ("b/z.png", "p")
    ]  # fmt: skip
    assert dataset.num_found_by_name == 2
    assert [dataset.read(s) for s in dataset.samples][1] == b"set/b/y.jpg"
    (tmp_path / "set/t.csv").write_text("path\nx.png\na/x.png\n")
    with pytest.raises(DataError, match=r"every path once, found a/x\.png twice"):
        scan(tmp_path / "set/t.csv")


def test_globs_and_no_classes_go_with_a_csv_too(tmp_path: Path) -> None:
    file = sheet(tmp_path, "path,target\ni/1.png,a\ni/2.png,b\n")
    assert rows(scan(file, exclude="i/2*")) == [("i/1.png", "a", "all", None)]
    assert scan(file, no_classes=True).classes == ()
