"""Globs mean what they say, options are remembered, and what is odd is one error."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from sample_folders import plant

from featcache.data.dataset import scan
from featcache.data.listing import Listing, compile_glob, escape_glob
from featcache.errors import ConfigError, DataError, FeatcacheWarning


@pytest.mark.parametrize(
    ("glob", "matching", "others"),
    [
        ("*.png", ["1.png", ".png"], ["a/1.png", "1.jpg", "1.pngx"]),
        ("**/*.png", ["1.png", "a/1.png", "a/b/1.png"], ["a/1.jpg"]),
        ("*/masks/**", ["a/masks/1.png", "a/masks/b/1.png"], ["masks/1.png", "a/b/masks/1.png"]),
        ("*/masks", ["a/masks/1.png", "a/masks/b/1.png", "a/masks"], ["a/masks2/1.png"]),
        ("a/", ["a/1.png"], ["b/a/1.png", "ab/1.png"]),
        ("**/masks/**", ["masks/1.png", "a/b/masks/1.png"], ["a/masksx/1.png", "masks"]),
        ("**", ["1.png", "a/1.png"], []),
        ("a?.png", ["ab.png"], ["a/.png", "a.png", "abc.png"]),
        ("[ab].png", ["a.png", "b.png"], ["c.png"]),
        ("[!ab].png", ["c.png"], ["a.png", "/.png"]),
        ("x[[]1].png", ["x[1].png"], ["x1.png"]),
        ("benign (1)*", ["benign (1).png", "benign (1)_mask.png"], ["benign (2).png"]),
        ("./a/*.png", ["a/1.png"], ["1.png"]),
        ("a.b", ["a.b"], ["axb"]),
        ("**x", ["x", "ax"], ["xa"]),
        ("a\n*", ["a\nb"], ["a"]),
    ],
)
def test_globs(glob: str, matching: list[str], others: list[str]) -> None:
    pattern = compile_glob(glob)
    assert [path for path in matching if not pattern.fullmatch(path)] == []
    assert [path for path in others if pattern.fullmatch(path)] == []


@pytest.mark.parametrize("glob", ["*a" * 40 + "b", "**/a*/" * 12 + "b", "**/" * 40 + "b"])
def test_no_glob_takes_for_ever(glob: str) -> None:
    """In a process of its own a regular expression that backtracks would take years."""
    assert compile_glob(glob).fullmatch("a" * 200 + "/" + "/".join(["aa"] * 60) + "/c") is None


@pytest.mark.parametrize("seed", range(20))
def test_globs_match_as_a_plain_search_does(seed: int) -> None:
    random = Random(seed)

    def matches(glob: str, path: str) -> bool:
        """Try every way: ``**/`` is any number of folders, ``*`` any letters of one name."""
        if not glob:
            return not path or path.startswith("/")
        if glob.startswith("**/"):
            rest = path.partition("/")
            return matches(glob[3:], path) or bool(rest[1] and matches(glob, rest[2]))
        if glob[0] == "*":
            here = path[:1] not in {"", "/"} and matches(glob, path[1:])
            return here or matches(glob[1:], path)
        return bool(path) and glob[0] == path[0] and matches(glob[1:], path[1:])

    for _ in range(60):
        parts = ["".join(random.choices("ab*", k=random.randint(1, 4))) for _ in range(3)]
        parts = ["**" if random.random() < 0.3 else p.replace("**", "*") for p in parts]
        glob = "/".join(part.replace("**a", "*a") for part in [*parts, random.choice(["a", "*b"])])
        path = "/".join("".join(random.choices("ab", k=random.randint(1, 3))) for _ in range(4))
        assert bool(compile_glob(glob).fullmatch(path)) == matches(glob, path), (glob, path)


@pytest.mark.parametrize("name", ["a[1]*?.png", "benign (1)", "x]y[", "\\d+", "a^b"])
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    pattern = compile_glob(escape_glob(name))
    assert pattern.fullmatch(name)
    assert not pattern.fullmatch(name + "x")


@pytest.mark.parametrize("glob", ["", "/", "/a", "../a", "[z-a]"])
def test_globs_that_are_none(tmp_path: Path, glob: str) -> None:
    with pytest.raises(ConfigError, match="--exclude: expected a glob"):
        scan(plant(tmp_path, "a/1.png"), exclude=glob)


def test_include_and_exclude_leave_files_and_their_folders_out(tmp_path: Path) -> None:
    plant(tmp_path, "a/x/1.png", "a/y/1.png", "b/x/1.png", "c/y/1.png", "overview.txt")
    dataset = scan(tmp_path, include=["*/x", "a/**"], exclude="a/y/**")
    assert [sample.path for sample in dataset.samples] == ["a/x/1.png", "b/x/1.png"]
    assert dataset.classes == ("a", "b")  # c has lost all of its images
    assert dataset.num_ignored == {"--include": 1, "--exclude": 1, "not an image ending": 1}
    with pytest.raises(DataError, match="2 x --exclude"):
        scan(plant(tmp_path / "two", "a/1.png", "b/2.png"), exclude="**")
    with pytest.raises(DataError, match=r"at least one image.*\(.*d\)"):  # empty all along
        scan(plant(tmp_path, "d/"), exclude="c/**")


def test_a_glob_that_matches_nothing_is_warned_of(tmp_path: Path) -> None:
    plant(tmp_path, "a/1.png", "a/1_mask.png")
    with pytest.warns(FeatcacheWarning, match=r"'\*_mask\.png' matches nothing .*'\*\*/\*_mask"):
        assert len(scan(tmp_path, exclude="*_mask.png").samples) == 2


def test_a_folder_beside_split_folders_is_left_out_by_the_option_the_error_names(
    tmp_path: Path,
) -> None:
    """As in the zip of chest-xray-pneumonia, which holds itself once more."""
    tree = ("train/a/1.png", "val/a/2.png", "test/a/3.png")
    plant(tmp_path, *tree, *(f"chest_xray/{path}" for path in tree))
    with pytest.raises(DataError, match="leave it out with --exclude 'chest_xray'"):
        scan(tmp_path)
    assert [s.path for s in scan(tmp_path, exclude="chest_xray").samples] == [*tree]


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    plant(tmp_path / "nih", "images_001/images/1.png", "images_002/images/2.png", "3.png")
    dataset = scan(tmp_path / "nih", no_classes=True)
    assert (dataset.classes, dataset.splits, len(dataset.samples)) == ((), ("all",), 3)
    plant(tmp_path / "split", "train/day1/1.png", "test/day2/2.png", "test/3.png")
    dataset = scan(tmp_path / "split", no_classes=True)
    assert [(s.split, s.target) for s in dataset.samples] == [
        ("train", -1),
        ("test", -1),
        ("test", -1),
    ]


def test_classes_that_look_like_parts_of_a_collection_are_warned_of(tmp_path: Path) -> None:
    parts = [f"images_00{n // 4 + 1}/images/0000{n}_000.png" for n in range(8)]
    with pytest.warns(FeatcacheWarning, match="images_001 to images_002 look .*--no-classes"):
        scan(plant(tmp_path / "nih", *parts))
    scan(tmp_path / "nih", no_classes=True)
    scan(plant(tmp_path / "grades", *(f"grade_0{n % 3}/0000{n}_left.png" for n in range(9))))
    scan(plant(tmp_path / "digits", *(f"{n // 3}/{n}.png" for n in range(9))))


def test_options_survive_their_json(tmp_path: Path) -> None:
    listing = Listing.of(
        include="a", exclude=["b", "c"], companions="keep", no_classes=True,
        columns={"target": "label"}, ignore_columns=["x"],
    )  # fmt: skip
    assert Listing.from_json(listing.as_json(), tmp_path) == listing
    assert Listing().as_json() == {}
    later = Listing.of(exclude="d")
    assert later.over(listing).as_json() == listing.as_json() | {"exclude": ["d"]}
    for odd in ([], {"exclude": "b"}, {"exclude": [1]}, {"columns": {"x": "y"}}, {"new": True}, 3):
        with pytest.raises(ConfigError, match="listing options in the cache"):
            Listing.from_json(odd, tmp_path)
    for options in ({"companions": "drop"}, {"columns": {"label": "x"}},
                    {"columns": {"path": "x", "group": "x"}}):  # fmt: skip
        with pytest.raises(ConfigError):
            Listing.of(**options)  # type: ignore[arg-type]
