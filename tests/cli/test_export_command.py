"""``featcache export``: what the command line says of an ONNX file and of a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from command_line import TINY, assert_one_line_error
from sample_images import write_tree

from featcache.cli.wording import export_lines
from featcache.deployment.exporting.delivery import DeliverySummary


def test_file_and_folder_say_what_was_compared(tmp_path: Path, run: Any) -> None:
    write_tree(tmp_path / "data", {"train": 6, "valid": 3, "test": 3})
    assert run("extract", "data", "c.h5", *TINY).code == 0
    assert run("train", "c.h5", "run", "--hidden", "none", "--epochs", 2).code == 0
    done = run("export", "run", "m.onnx", *TINY, "--json")
    facts = json.loads(done.out)
    assert facts["parity"]["batches"] == [1, 2, 7, 64]
    assert facts["decision"]["thresholds"] is None
    done = run("export", "run", "out/", *TINY, "--data", "data", "--golden", "data/test/covid")
    assert done.code == 0, done.err
    (checked,) = [line for line in done.out.splitlines() if line.startswith("checked")]
    assert re.fullmatch(
        r"checked against the run: 8 drawn images in batches of 1, 2, 7 and 64, and 20 images of "
        r"the cache nearest another decision: same decisions, features within \d\.\de-\d\d "
        r"\(allowed 1e-04\)",
        checked,
    )
    assert "threshold" not in done.out
    assert re.search(r"out/README.md: \d+ of 44 items of the CLAIM checklist answered", done.out)
    assert "out/predict.py: self-test passed on 9 images" in done.out
    assert [*(tmp_path / "out" / "golden").glob("real_002.*")]
    assert_one_line_error(run("export", "run", "m.tflite", *TINY), "ending in .pt or .onnx")
    assert_one_line_error(run("export", "run", "n.onnx"), "your word that its code may run")


def test_lines_speak_of_a_threshold_where_there_is_one_and_of_what_is_near_it() -> None:
    parity = {
        "bound": 1.3e-3, "largest_error": 2.46e-6, "num_phantoms": 8, "batches": (1, 64),
        "num_rows": 1, "num_unread": 0, "num_within_bound": 2, "num_changed": 1,
    }  # fmt: skip
    facts: dict[str, Any] = {"parity": parity, "inputs": ({"backbone": "b"},)}
    summary = DeliverySummary(
        Path("m.onnx"), "0" * 64, 1, "multiclass", ("a", "b"), outputs={}, head_sha256="",
        decision={"rule": "", "thresholds": {"a": {}}}, **facts,
    )  # fmt: skip
    assert [*export_lines(summary)][1:] == [
        (
            "checked against the run: 8 drawn images in batches of 1 and 64, and 1 image of the "
            "cache nearest the threshold: same decisions but for 1 image, features within 2.5e-06 "
            "(allowed 1.3e-03)"
        ),
        (
            "2 images so near the threshold that features within what is allowed could change the "
            "decision"
        ),
    ]
