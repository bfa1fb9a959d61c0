"""``featcache export``: what the command line says of an ONNX file and of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import TINY, assert_one_line_error
from sample_images import write_tree


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
    assert "8 drawn images at batches of 1, 2, 7, 64, and 20 images nearest" in done.out
    assert "out/predict.py: self-test passed on 9 images" in done.out
    assert [*(tmp_path / "out" / "golden").glob("real_002.*")]
    assert_one_line_error(run("export", "run", "m.tflite", *TINY), "ending in .pt or .onnx")
    assert_one_line_error(run("export", "run", "n.onnx"), "your word that its code may run")
