"""Groups by a pattern in the path: patients that are folders, in every layout."""

import pytest
from sample_folders import plant, sheet, write_files

from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import ConfigError, FeatcacheWarning

BELOW = r"^(\w+)/"
"""The first folder below the class."""


def groups_of(dataset):
    return {sample.path: sample.group for sample in dataset.samples}


@pytest.mark.parametrize("top", ["", "train/", "Val/"])
def test_the_path_below_the_class_is_searched(tmp_path, top):
    plant(tmp_path, f"{top}p1/p7/study1/9.png", f"{top}p1/p8/9.png", f"{top}b/p7/3.png",
          f"{top}b/p5.png")  # fmt: skip
    dataset = scan(tmp_path, group_by_path=BELOW)
    assert groups_of(dataset) == {
        f"{top}p1/p7/study1/9.png": "p7", f"{top}p1/p8/9.png": "p8", f"{top}b/p7/3.png": "p7",
        f"{top}b/p5.png": f"{top}b/p5.png",
    }  # fmt: skip
    assert dataset.num_grouped == 3
    # the class p1 is no patient; the file's own name belongs to the path
    assert groups_of(scan(tmp_path, group_by_path=r"(p\d+)"))[f"{top}b/p5.png"] == "p5"
    # names that match leave the folders alone: why there is the other option
    assert groups_of(scan(tmp_path, group_by=r"(\d)"))[f"{top}p1/p7/study1/9.png"] == "9"


def test_without_classes_and_in_a_csv_the_whole_path_is_searched(tmp_path):
    plant(tmp_path / "flat", "p1/a.png", "p1/b/c.png", "p2/d.png")
    groups = groups_of(scan(tmp_path / "flat", no_classes=True, group_by_path=BELOW))
    assert [*groups.values()] == ["p1", "p1", "p2"]
    file = sheet(tmp_path, "path,target,group\ni/1.png,a,x\nj/2.png,b,x\n", "i/1.png", "j/2.png")
    assert groups_of(scan(file, group_by_path=BELOW)) == {"i/1.png": "i", "j/2.png": "j"}


def test_both_options_and_what_is_no_pattern_are_refused(tmp_path):
    plant(tmp_path / "raw", "a/1.png")
    with pytest.raises(ConfigError, match="--group-by: expected it or --group-by-path, not both"):
        scan(tmp_path / "raw", group_by="(a)", group_by_path="(b)")
    for pattern in ("([", r"\d+"):
        with pytest.raises(ConfigError, match=r"^--group-by-path: expected a regular expression"):
            scan(tmp_path / "raw", group_by_path=pattern)


def test_of_many_classes_those_where_least_was_found_are_printed(tmp_path):
    paths = [f"c{n % 20:02}/{'p' if n % 20 < 13 else 'x'}{n // 20}.png" for n in range(400)]
    write_files(tmp_path / "raw", dict.fromkeys(paths))
    said = []
    with pytest.warns(FeatcacheWarning, match="no file name of c13, c14, c15, c16, c17, c18, c19:"):
        split(tmp_path / "raw", tmp_path / "m.csv", group_by=r"^(p\d+)", say=said.append)
    assert said[0].startswith("groups: 160; named in 0 of 20 c13, 0 of 20 c14,")
    assert "and 14 more (each of the others" in said[0]


def test_split_keeps_patients_that_are_folders_together(tmp_path):
    paths = [f"{c}/p{n % 12}/s{n % 3}/{n}.png" for c in "ab" for n in range(40)]
    write_files(tmp_path / "raw", dict.fromkeys(paths))
    said = []
    summary = split(tmp_path / "raw", tmp_path / "dst", group_by_path=BELOW, say=said.append)
    assert (summary.num_groups, summary.num_matched) == (12, {"a": 40, "b": 40})
    assert any(line.startswith("groups: 12; named in 40 of 40 a, 40 of 40 b") for line in said)
    splits = {}
    for sample in scan(tmp_path / "dst", group_by_path=BELOW).samples:
        splits.setdefault(sample.group, set()).add(sample.split)
    assert len(splits) == 12
    assert all(len(found) == 1 for found in splits.values())
    with pytest.warns(FeatcacheWarning, match="--group-by-path matches no path of a, b"):
        split(tmp_path / "raw", tmp_path / "m.csv", group_by_path=r"(patient\d+)")
