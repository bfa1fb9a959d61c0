"""The options of listing and grouping in split, select and predict, as commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from command_line import TINY, assert_one_line_error
from sample_folders import write_files
from sample_images import write_image

from featcache.cache.reading import open_cache


def test_split_takes_a_csv_and_its_columns(tmp_path: Path, run: Any) -> None:
    write_files(tmp_path, {f"images/{n}.png": None for n in range(60)})
    lines = [f"images/{n}.png,{'ab'[n % 2]},p{n % 12}" for n in range(60)]
    (tmp_path / "all.csv").write_text("\n".join(["path,finding,patient", *lines]))
    done = run(
        "split", "all.csv", "split.csv", "--columns", "target=finding", "--ignore-columns",
        "patient", "--group-by-path", r"(\d)\.png$", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["num_groups"] == 10
    done = run("split", "all.csv", "x.csv", "--group-by", "(a)", "--group-by-path", "(b)")
    assert_one_line_error(done, "--group-by-path, not both")
    assert run("split", "images", "flat", "--no-classes", "--quiet").code == 0


def test_select_and_predict_take_them(tmp_path: Path, run: Any) -> None:
    for n in range(36):
        write_image(tmp_path / "raw" / "ab"[n % 2] / f"p{n // 3}" / f"{n}.png", n, bright=n % 2 > 0)
    done = run("extract", "raw", "c.h5", *TINY, "--group-by-path", r"^(p\d+)/")
    assert done.code == 0, done.err
    assert "groups: 12; named in 18 of 18 a, 18 of 18 b\n" in done.out
    done = run("extract", "raw", "c.h5", *TINY, "--group-by", r"^(\d*[02468])\.png")
    assert done.code == 0, done.err
    assert "groups: 36; named in 18 of 18 a, 0 of 18 b (each of the others" in done.out
    assert "--group-by matches no file name of b: images of one patient may be in two" in done.err
    done = run("extract", "raw", "c.h5", *TINY, "--group-by-path", r"^(p\d+)/")
    done = run("select", "c.h5", "d.h5", "--fractions", "0.5,0.25,0.25", "--seed", 3, "--json")
    assert done.code == 0, done.err
    assert [*json.loads(done.out)["splits"]] == ["train", "valid", "test"]
    done = run("train", "d.h5", "run", "--hidden", "none", "--epochs", 1, "--quiet")
    assert done.code == 0, done.err
    # a CSV of images to classify, which may have columns of its own
    images = [f"raw/a/p0/{n}.png" for n in (0, 2)]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        header = ["file", "label", "Patient ID", "fold"]
        csv.writer(file).writerows([header, *([path, "b", 7, "test"] for path in images)])
    listing = ["--columns", "path=file"]  # no other column is a question
    done = run("predict", "run", "new.csv", *TINY, *listing, "--json")
    assert done.code == 0, done.err
    assert [p["path"] for p in json.loads(done.out)["predictions"]] == images
    assert_one_line_error(run("predict", "run", "new.csv", *TINY), "file", "--ignore-columns")
    done = run("predict", "run", "raw", *TINY, *listing)
    assert_one_line_error(done, "--columns: expected a CSV of images")
    done = run("predict", "run", "raw", *TINY, "--no-classes", "--json")
    assert len(json.loads(done.out)["predictions"]) == 36
    assert open_cache("d.h5").splits["train"].groups is not None
