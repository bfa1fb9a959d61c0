"""evaluate on the command line: subgroups of a table, a second run, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from command_line import assert_one_line_error

from featcache.cache.writing import write_cache
from featcache.heads.training import train


def test_subgroups_and_a_second_run_on_the_command_line(tmp_path: Path, run: Any) -> None:
    rng = np.random.default_rng(0)
    targets = {"train": np.arange(30) % 2, "valid": np.arange(20) % 2, "test": np.arange(50) % 2}
    write_cache(
        tmp_path / "c.h5",
        {n: (rng.normal(size=(len(t), 3)) + t[:, None]).astype("<f4") for n, t in targets.items()},
        targets, {n: [f"{n}/{i:02d}.png" for i in range(len(t))] for n, t in targets.items()},
        classes=["covid", "normal"], identity={"backbone": "fake"},
    )  # fmt: skip
    for name, seed in (("r", 0), ("s", 1)):
        train(tmp_path / "c.h5", tmp_path / name, hidden=(), epochs=1, seed=seed, device="cpu")
    lines = [f"test/{i:02d}.png,{'FM'[i >= 30]},{i}" for i in range(50)]
    (tmp_path / "t.csv").write_text("\n".join(["image,sex,patient", *lines]))
    command = ["evaluate", "r", "--by", "sex", "--table", "t.csv", "--positive", "covid"]
    assert_one_line_error(run(*command), "--columns path=image")
    command += ["--columns", "path=image", "--against", "s"]
    shown = run(*command)
    assert shown.code == 0
    assert shown.err == ""
    assert "by sex (95 % intervals, each by itself; too few: below 10 images)" in shown.out
    assert "this run against s, on the same 50 images\n" in shown.out
    facts = json.loads(run(*command, "--json").out)
    sizes = {part["value"]: part["num_samples"] for part in facts["by"]["subgroups"]}
    assert sizes == {"F": 30, "M": 20}
    assert facts["against"]["run"] == "s"
    kept = json.loads((tmp_path / "r/evaluation/test.json").read_text("utf-8"))
    assert {key: kept[key] for key in ("by", "against", "calibration")} == {
        key: facts[key] for key in ("by", "against", "calibration")
    }
    for arguments, part in (
        (["--by", "sex"], "--by: expected group"),
        (["--table", "t.csv"], "--table: expected --by"),
        (["--by", "age", "--table", "t.csv"], "found 'age'"),
        (["--by", "sex", "--table", "gone.csv"], "gone.csv"),
        (["--by", "group"], "groups in the cache"),
        (["--against", "gone"], "gone"),
    ):
        assert_one_line_error(run("evaluate", "r", *arguments), part)
