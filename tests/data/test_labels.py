"""Several labels per image in a CSV: what the cells mean, and what is asked or refused."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from sample_folders import plant, sheet

import featcache
from featcache.data.dataset import scan
from featcache.data.listing import Listing
from featcache.data.samples import labels_text
from featcache.errors import ConfigError, DataError, FeatcacheWarning

FLAGS = ["Edema", "No Finding", "Cardiomegaly", "Support Devices"]
HEADER = ",".join(["path", *FLAGS])


def flags(tmp_path: Path, *rows: str) -> Path:
    lines = (f"i/{i}.png,{row}\n" for i, row in enumerate(rows, 1))
    return sheet(tmp_path, f"{HEADER}\n{''.join(lines)}", *(f"i/{i}.png" for i in range(1, 9)))


def targets(data: Path, **options: Any) -> list[tuple[int, ...] | None]:
    return [s.targets for s in scan(data, **({"target_columns": FLAGS} | options)).samples]


def test_columns_become_sorted_classes_without_no_finding(tmp_path: Path) -> None:
    file = flags(tmp_path, "1,0,0.0,1.0", "0,,1,0", "-1.0,,-1,1.00")
    dataset = scan(file, target_columns=FLAGS)
    assert dataset.classes == ("Cardiomegaly", "Edema", "Support Devices")
    assert dataset.task == "multilabel"
    assert targets(file) == [(0, 1, 1), (1, 0, 0), (-1, -1, 1)]
    assert [s.target for s in dataset.samples] == [-1] * 3
    assert dataset.count() == {"all": {"Cardiomegaly": 1, "Edema": 1, "Support Devices": 2}}
    assert dataset.notes == ("labels: 2 uncertain answers (-1), taken as unknown (--uncertain)",)
    assert scan(file, target_columns="Edema").classes == ("Edema",)


@pytest.mark.parametrize(("uncertain", "value"), [("unknown", -1), ("yes", 1), ("no", 0)])
@pytest.mark.parametrize(("blank", "empty"), [("unknown", -1), ("no", 0)])
def test_uncertain_and_empty_cells(
    tmp_path: Path, uncertain: str, value: int, blank: str, empty: int
) -> None:
    """Against the rule written down once more, of all rows of three cells."""
    cells = {"1": 1, "0.0": 0, "-1": value, "": empty}
    rows = [(a, n, b) for a in cells for n in ("", "0", "1", "-1") for b in cells]
    file = sheet(
        tmp_path, "path,A,No finding,B\n"
        + "".join(f"{i:02}.png,{','.join(row)}\n" for i, row in enumerate(rows)),
        *(f"{i:02}.png" for i in range(len(rows))),
    )  # fmt: skip
    found = targets(file, target_columns=["A", "No finding", "B"], uncertain=uncertain,
                    blank=blank)  # fmt: skip
    truth = []
    for a, n, b in rows:
        means = cells | ({"": 0} if n == "1" else {})
        truth.append((means[a], means[b]))
    assert found == truth
    assert len({id(each) for each in found}) == len(set(truth))  # kept once


def test_empty_cells_are_asked_about_unless_no_finding_answers(tmp_path: Path) -> None:
    assert targets(flags(tmp_path, ",1,,0", "0,,1,0")) == [(0, 0, 0), (1, 0, 0)]
    file = flags(tmp_path, "1,,0,1", ",1,,", ",,1,0")
    with pytest.raises(DataError) as asked:
        targets(file)
    message = str(asked.value)
    assert "found 2, the first of them in line 3, column Support Devices" in message
    assert "--blank unknown leaves them out" in message
    assert "--blank no takes them as no" in message
    assert targets(file, blank="no") == [(0, 1, 1), (0, 0, 0), (1, 0, 0)]
    assert targets(file, blank="unknown") == [(0, 1, 1), (0, 0, -1), (1, -1, 0)]
    assert scan(file, target_columns=FLAGS, blank="unknown").notes == (
        "labels: 2 empty cells, taken as unknown",
        "labels: 2 empty cells beside No Finding, taken as no",
    )


def test_a_contradiction_stands_as_written_and_is_told(tmp_path: Path) -> None:
    """CheXpert writes No Finding beside Support Devices, and means it."""
    file = flags(tmp_path, "1,1,0,1", "-1,1,,0", ",1,0,1")
    assert targets(file) == [(0, 1, 1), (0, -1, 0), (0, 0, 1)]
    notes = scan(file, target_columns=FLAGS).notes
    told = "labels: No Finding beside 1 or -1 of another, which stand as written: 2 Edema"
    assert notes[-1] == told


@pytest.mark.parametrize("cell", ["2", "yes", "nan", "0.5", "1 1", "inf"])
def test_other_cells_are_named_by_line_and_column(tmp_path: Path, cell: str) -> None:
    file = flags(tmp_path, "1,0,1,0", f"1,0,{cell},0")
    with pytest.raises(DataError, match=f"CSV line 3, column Cardiomegaly: .*found '{cell}'"):
        targets(file)


@pytest.mark.parametrize(("options", "message"), [
    ({"target_columns": ["Edema", "Edema"]}, "--target-columns: expected headers, once each"),
    ({"target_columns": "Edema", "ignore_columns": "Edema"}, "not used otherwise, found Edema"),
    ({"target_columns": "Edema", "columns": {"target": "Cardiomegaly"}}, "--columns target="),
    ({"target_columns": "Edema", "target_separator": "|"}, "--target-separator: .*found both"),
    ({"target_columns": "Edema", "no_classes": True}, "--no-classes"),
    ({"target_columns": "Edema", "uncertain": "maybe"}, "--uncertain: expected unknown or yes or"),
    ({"target_columns": "Edema", "blank": "yes"}, "--blank: expected unknown or no, found yes"),
    ({"uncertain": "yes"}, "--uncertain: expected --target-columns"),
    ({"target_separator": "|", "uncertain": "yes", "columns": {"target": "Edema"}}, "--uncertain"),
    ({"blank": "no"}, "--blank: expected --target-columns or --target-separator"),
    ({"target_columns": "gone"}, "--target-columns: expected headers of the CSV.*found 'gone'"),
    ({"target_columns": "No Finding"}, "at least one label.*no class itself"),
    ({"target_separator": "|"}, "--target-separator: expected a column of labels"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    file = flags(tmp_path, "1,0,1,0")
    with pytest.raises((ConfigError, DataError), match=message):
        scan(file, **options)


def test_only_a_csv_has_labels(tmp_path: Path) -> None:
    plant(tmp_path / "d", "a/1.png")
    for option in ({"target_columns": "a"}, {"split_list": {"test": "x.txt"}}):
        with pytest.raises(ConfigError, match=r"--(target-columns|split-list): expected a CSV"):
            scan(tmp_path / "d", **option)  # type: ignore[arg-type]


def joined(tmp_path: Path, *cells: str, options: Any = {}) -> Any:  # noqa: B006
    text = "path,target\n" + "".join(f"i/{i}.png,{c}\n" for i, c in enumerate(cells, 1))
    return scan(sheet(tmp_path, text), **({"target_separator": "|"} | options))


def test_cells_join_names(tmp_path: Path) -> None:
    dataset = joined(tmp_path, "Mass|Effusion", "No Finding", " Effusion ", "Effusion|Effusion")
    assert dataset.classes == ("Effusion", "Mass")
    assert [s.targets for s in dataset.samples] == [(1, 1), (0, 0), (1, 0), (1, 0)]
    commas = joined(tmp_path, '"a, b"', "a", options={"target_separator": ","})
    assert [s.targets for s in commas.samples] == [(1, 1), (1, 0)]


@pytest.mark.parametrize(("blank", "value"), [("no", 0), ("unknown", -1)])
def test_an_empty_cell_is_a_question(tmp_path: Path, blank: str, value: int) -> None:
    with pytest.raises(DataError, match=r"--blank no.*found 1, the first of them in line 3"):
        joined(tmp_path, "a|b", "")
    dataset = joined(tmp_path, "a|b", "", options={"blank": blank})
    assert dataset.samples[1].targets == (value, value)
    assert dataset.notes == (f"labels: 1 empty cell, taken as {blank}",)


@pytest.mark.parametrize(("cells", "message"), [
    (["a|b", "a||b"], r"CSV line 3, column target: .*found 'a\|\|b'"),
    (["a|b", "nan"], "found 'nan'"),
    (["a|b", "No Finding|a"], r"expected No Finding, or labels, found 'No Finding\|a'"),
    (["No Finding"], "at least one label, found No Finding alone"),
    (["Mass|mass"], "classes"),
])  # fmt: skip
def test_odd_cells_are_refused(tmp_path: Path, cells: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        joined(tmp_path, *cells)


def test_a_separator_that_stands_nowhere_is_told(tmp_path: Path) -> None:
    with pytest.warns(FeatcacheWarning, match="--target-separator: ';' stands in no cell"):
        joined(tmp_path, "a|b", "c", options={"target_separator": ";"})


def test_options_of_labels_survive_their_json_and_give_way(tmp_path: Path) -> None:
    stored = Listing.of(target_columns=["A", "B"], uncertain="yes", blank="no",
                        columns={"path": "x"}, split_list={"test": tmp_path / "t"})  # fmt: skip
    assert Listing.from_json(stored.as_json(), tmp_path) == stored
    assert Listing.of(blank="unknown").over(stored).as_json() == stored.as_json() | {
        "blank": "unknown"
    }
    other = Listing.of(target_separator="|", columns={"target": "y"}).over(stored)
    assert (other.target_columns, other.uncertain, other.blank) == ((), None, "no")
    assert not Listing.of(no_classes=True).over(stored).has_labels
    assert not Listing.of(columns={"target": "y"}).over(stored).has_labels
    back = Listing.of(target_columns=["A"]).over(other)
    assert (back.target_separator, dict(back.columns)) == (None, {})
    assert Listing.of(target_columns="A").for_endings([""]) == Listing()
    for odd in ({"target_columns": "A"}, {"blank": 1}, {"split_list": {"all": "x"}}):
        with pytest.raises(ConfigError, match="listing options in the cache"):
            Listing.from_json(odd, tmp_path)


def test_labels_as_text_leave_out_what_is_unknown() -> None:
    assert labels_text("abc", (1, 0, -1)) == labels_text("abc", (1.0, 0.0, math.nan)) == "a=1, b=0"


def test_split_writes_the_labels_that_it_read(tmp_path: Path) -> None:
    """Rows of one patient together, each label in every split, and read back as they were."""
    labels = ["1,,0,1", "0,,1,-1", ",1,,0", "1,0,,1"] * 10
    text = HEADER + ",group\n"
    text += "".join(f"i/{i:02}.png,{row},p{i // 2}\n" for i, row in enumerate(labels))
    file = sheet(tmp_path, text, *(f"i/{i:02}.png" for i in range(40)))
    options: dict[str, Any] = {"target_columns": FLAGS, "blank": "unknown"}
    lines: list[str] = []
    summary = featcache.split(file, tmp_path / "s.csv", say=lines.append, **options)
    assert {k: sum(v.values()) > 0 for k, v in summary.counts.items()} == {
        "train": True, "valid": True, "test": True,
    }  # fmt: skip
    names = "'Cardiomegaly,Edema,Support Devices'"
    assert lines[-1] == f"its labels are read with --target-columns {names} --blank unknown"
    before, after = scan(file, **options), scan(
        tmp_path / "s.csv", target_columns=["Cardiomegaly", "Edema", "Support Devices"],
        blank="unknown",
    )  # fmt: skip
    assert after.count() == summary.counts
    of_path = {s.path: (s.targets, s.group) for s in before.samples}
    assert {s.path: (s.targets, s.group) for s in after.samples} == of_path
    splits: dict[str | None, set[str]] = {}
    for sample in after.samples:
        splits.setdefault(sample.group, set()).add(sample.split)
    assert all(len(names) == 1 for names in splits.values())
    with (tmp_path / "s.csv").open() as opened:
        assert next(csv.reader(opened)) == [
            "path", "split", "group", "Cardiomegaly", "Edema", "Support Devices",
        ]  # fmt: skip
    with pytest.raises(ConfigError, match="--classes: expected one class per image"):
        featcache.split(file, tmp_path / "t.csv", classes=["Edema"], **options)
