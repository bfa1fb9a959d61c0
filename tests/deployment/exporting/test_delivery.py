"""The exported folder: used without torch and featcache, and tested by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_decisions import decide_quietly
from sample_images import write_image, write_tree

import featcache
from featcache.backbones.backbone import Backbone
from featcache.deployment.exporting import delivery, predict_script

QUIET: dict[str, Any] = {"say": lambda _: None}
# What is blocked is not there for the child: importing it is an error.
BLOCKED = """
import runpy, sys
for name in ("torch", "featcache", "onnx", "torchvision", "scipy", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    """Images, a run with a threshold, and its exported folder."""
    folder = tmp_path_factory.mktemp("delivery")
    write_tree(folder / "data")
    featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_backbone, **QUIET)
    options: dict[str, Any] = {"hidden": (8,), "epochs": 4, "learning_rate": 5e-3}
    featcache.train(folder / "c.h5", folder / "run", **options, **QUIET)
    decide_quietly(folder / "run", recall=0.9, refer=0.3)
    featcache.evaluate(folder / "run", **QUIET)
    featcache.export(folder / "run", f"{folder}/out/", backbone=tiny_backbone)
    return folder


def python(script: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a folder's script in a process that has neither torch nor featcache."""
    command = [sys.executable, "-I", "-B", "-c", BLOCKED, script, *arguments]
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False,
        env=environment | {"HOME": str(home)},
    )  # fmt: skip
    assert not [*home.iterdir()]  # ONNX Runtime would keep there what it tells its makers
    return done


def test_folder_decides_as_the_run_without_torch_and_featcache(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    paths = sorted(p for p in (place / "data").rglob("*.*"))
    write_image(tmp_path / "new.png", 99)
    (tmp_path / "torn.jpg").write_bytes(paths[0].read_bytes()[:-200])
    paths += [tmp_path / "new.png", tmp_path / "torn.jpg"]
    done = python(place / "out" / "predict.py", "--json", *paths, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert done.returncode == 1
    wanted = featcache.predict(place / "run", paths, backbone=tiny_backbone)
    assert [row["path"] for row in facts["predictions"]] == [*map(str, paths[:-1])]
    assert [row["decision"] for row in facts["predictions"]] == [*wanted.decision]
    assert len({*wanted.decision}) == 3  # refer among them
    found = np.array([row["probs"] for row in facts["predictions"]])
    np.testing.assert_allclose(found, wanted.probs, atol=1e-6)
    (failure,) = facts["failures"]
    assert failure["path"] == str(tmp_path / "torn.jpg")
    assert failure["reason"].startswith("a broken JPEG file: ")
    shown = python(place / "out" / "predict.py", tmp_path / "new.png", cwd=tmp_path)
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"{tmp_path / 'new.png'}: {wanted.decision[-1]}")
    assert "  (covid 0." in shown.stdout


def test_lines_give_the_rule_where_another_class_is_most_probable(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    run = Path(shutil.copytree(place / "run", place / "copied"))
    paths = sorted((place / "data" / "test").rglob("*.*"))
    for threshold, refer in ((0.02, False), (0.4, True), (0.5, False)):
        decide_quietly(run, threshold=threshold, **({"refer": 0.4} if refer else {}))
        out = tmp_path / f"{threshold}"
        featcache.export(run, f"{out}/", backbone=tiny_backbone)
        wanted = featcache.predict(run, paths, backbone=tiny_backbone)
        assert wanted.decision is not None
        assert wanted.thresholds is not None
        rule = wanted.thresholds["covid"]
        text = f"covid if >= {threshold:.6g}"
        if rule["refer_below"] is not None:
            text = f"refer from {threshold:.6g}, covid if >= {rule['refer_below']:.6g}"
        done = python(out / "predict.py", *paths, cwd=tmp_path)
        lines = done.stdout.splitlines()
        differ = 0
        for line, path, decision, pred in zip(
            lines, paths, wanted.decision, wanted.preds, strict=True
        ):
            said = decision
            if decision != pred:
                said, differ = (
                    f"{decision} by the decision ({text}); most probable {pred}",
                    differ + 1,
                )
            assert line.startswith(f"{path}: {said}  (covid ")
        assert (differ > 0) is (threshold != 0.5)


def test_several_labels_and_none_are_named() -> None:
    config = {
        "classes": ["a", "b", "c"],
        "decision": {"thresholds": {"b": {"threshold": 0.2, "refer_below": None}}},
    }
    for decision, probs, expected in (
        (["a"], [0.6, 0.1, 0.1], "a"),
        ([], [0.1, 0.1, 0.1], "none"),
        (["a", "b"], [0.6, 0.3, 0.1], "a|b by the decision (b if >= 0.2); above 0.5 a"),
        (["b"], [0.5, 0.3, 0.1], "b by the decision (b if >= 0.2); above 0.5 none"),
    ):
        assert predict_script.decision_text(config, decision, probs) == expected


def test_a_folder_is_told_from_an_image(place: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    done = python(place / "out" / "predict.py", tmp_path / "images", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path / 'images'}: refused: a folder: name the images in it\n"


def test_a_reader_that_stops_early_sees_no_traceback(place: Path) -> None:
    to_read, to_write = os.pipe()
    os.close(to_read)  # as `predict.py ... | head -0` does
    done = subprocess.run(
        [sys.executable, place / "out" / "predict.py", place / "out" / "golden" / "grey.png"],
        stdout=to_write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(to_write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_card_and_script_say_that_unlike_images_are_not_marked(place: Path) -> None:
    assert "It does not mark images that are unlike" in (place / "out" / "README.md").read_text()
    usage = " ".join((predict_script.__doc__ or "").split())
    assert "unlike those the model was trained with are not marked" in usage


def test_self_test_passes_and_a_changed_byte_in_any_file_fails_it(
    place: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(place / "out", tmp_path / "moved"))
    passed = python(out / "predict.py", "--self-test", cwd=tmp_path)
    assert (passed.returncode, passed.stderr) == (0, "")
    assert passed.stdout == "self-test passed: files, pixels and outputs of 6 images\n"
    files = sorted(p for p in out.rglob("*") if p.is_file())
    assert {p.name for p in files} >= {*predict_script.OWN_FILES, "SHA256SUMS", "grey.png"}
    rng = np.random.default_rng(0)
    for path in files:
        data = path.read_bytes()
        for place_of_byte in (0, len(data) - 1, *rng.integers(0, len(data), 3).tolist()):
            changed = bytearray(data)
            changed[place_of_byte] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with pytest.raises(predict_script.SelfTestError, match=r"sha256|SHA256SUMS"):
                predict_script.self_test(out)
        path.write_bytes(data)
    for name in ("predict.py", "model.onnx"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1] + b" ")
        failed = python(out / "predict.py", "--self-test", cwd=tmp_path)
        assert failed.returncode == 1
        assert f"{name}: another sha256" in failed.stderr
        (out / name).write_bytes(data)
    assert predict_script.self_test(out) == 6


def test_missing_added_and_misnamed_files_fail_the_self_test(place: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(place / "out", tmp_path / "moved"))
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(predict_script.SelfTestError, match=r"missing|No such file"):
            predict_script.self_test(out)
        path.write_bytes(data)
    for name in ("numpy.py", "golden/more.png", "golden/deep/x", "\udcff.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"")
        with pytest.raises(predict_script.SelfTestError, match="so it was added"):
            predict_script.self_test(out)
        (out / name).unlink()
    sums = (out / "SHA256SUMS").read_bytes()
    for place_of_line in (sums.index(b"\n"), len(sums) - 1):
        for other in (b"\v", b"\r", b"\x1c", b"\0", b"x"):  # what some take for an end of line
            changed = sums[:place_of_line] + other + sums[place_of_line + 1 :]
            (out / "SHA256SUMS").write_bytes(changed)
            with pytest.raises(predict_script.SelfTestError):
                predict_script.self_test(out)
    (out / "SHA256SUMS").write_bytes(sums)
    for name in (".gitattributes", "__pycache__/predict.cpython-311.pyc"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"")
    assert predict_script.self_test(out) == 6


def test_a_model_that_cannot_be_loaded_is_one_line(place: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "config.json"):
        out = Path(shutil.copytree(place / "out", tmp_path / name))
        (out / name).write_bytes(b"{}")
        failed = python(out / "predict.py", out / "golden" / "grey.png", cwd=tmp_path)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.count("\n") == 1
        assert "the model cannot be loaded" in failed.stderr


def rewrite_sums(out: Path) -> None:
    (out / "SHA256SUMS").write_bytes(predict_script.sums_of(out))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pixels_sha256", {"pixels": "0" * 64}, "pixels of golden/.*: other ones than Pillow"),
        ("probs", [0.5, 0.5], "probs of golden/.*: off by"),
        ("calibrated", [0.5, 0.5], "calibrated of golden/.*: off by"),
        ("decision", "other", "decision of golden/"),
    ],
)
def test_self_test_looks_at_pixels_and_outputs_too(
    place: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    out = Path(shutil.copytree(place / "out", tmp_path / "moved"))
    facts = json.loads((out / "config.json").read_text("utf-8"))
    next(e for e in facts["golden"] if e["decision"] is not None)[key] = value
    (out / "config.json").write_text(json.dumps(facts), "utf-8")
    rewrite_sums(out)
    with pytest.raises(predict_script.SelfTestError, match=message):
        predict_script.self_test(out)
    if key == "pixels_sha256":
        refused = python(out / "predict.py", out / "golden" / "grey.png", cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "other ones than Pillow" in refused.stderr


def test_card_says_what_the_files_know_and_counts_what_is_open(place: Path) -> None:
    text = (place / "out" / "README.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    num_open = sum("**TO FILL**" in row for row in rows)
    assert len(rows) == 44
    said = f"{44 - num_open} of 44 items are answered from the files, {num_open} **TO FILL**."
    assert said in text
    figures = json.loads((place / "run" / "evaluation" / "test.json").read_text("utf-8"))
    head = pytest.importorskip("yaml").safe_load(text.split("---")[1])
    (result,) = head["model-index"][0]["results"]
    values = {
        m["type"]: m["value"] for m in result["metrics"] if "decision" not in m.get("name", "")
    }
    assert values == {name: pytest.approx(figures[name], abs=1e-6) for name in values}
    assert {"accuracy", "roc_auc"} <= set(values)
    low, high = figures["intervals"]["accuracy"]
    assert f"| accuracy | {figures['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in text
    assert "train 24 (covid 12, normal 12)" in text
    assert "no groups are known" in rows[19]
    (linear,) = [row for row in rows if "Linear" in row]
    assert linear.count("eps=1e") == 2  # the layers are not cut
    assert str(place) not in text


def test_names_of_classes_are_text_in_the_card(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_tree(tmp_path / "data", {"train": 6, "valid": 3, "test": 3})
    hostile = "<img src=x> | `a` **b**"
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / split / "normal").rename(tmp_path / "data" / split / hostile)
    featcache.extract(tmp_path / "data", tmp_path / "c.h5", backbone=tiny_backbone, **QUIET)
    featcache.train(tmp_path / "c.h5", tmp_path / "run", hidden=(), epochs=1, **QUIET)
    featcache.evaluate(tmp_path / "run", **QUIET)
    write_image(tmp_path / "real" / "P12.png", 1)
    made = featcache.export(
        tmp_path / "run", f"{tmp_path}/out/", backbone=tiny_backbone, golden=tmp_path / "real"
    )
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert hostile not in text
    assert r"\<img src=x\> \| \`a\` \*\*b\*\*" in text
    copied = tmp_path / "out" / "golden" / "real_000.png"
    assert copied.read_bytes() == (tmp_path / "real" / "P12.png").read_bytes()
    assert made.num_golden == 7
    assert not [p for p in (tmp_path / "out").rglob("*.*") if b"P12" in p.read_bytes()]


def test_a_real_example_that_the_script_refuses_is_an_error(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "real").mkdir()
    Image.new("CMYK", (40, 40)).save(tmp_path / "real" / "ink.tif")
    with pytest.raises(featcache.ConfigError, match="a TIFF of 8 bits, photometric 5"):
        featcache.export(
            place / "run", f"{tmp_path}/out/", backbone=tiny_backbone, golden=tmp_path / "real"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["check_model", "golden_facts", "_test_folder"])
def test_whatever_fails_no_folder_is_left(
    place: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise featcache.RunError("x", expected="a", found="b")

    monkeypatch.setattr(delivery, step, fail)
    (tmp_path / "out").mkdir()  # an empty one may be filled
    with pytest.raises(featcache.RunError):
        featcache.export(place / "run", tmp_path / "out", backbone=tiny_backbone)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_options_and_endings_that_do_not_go_together_are_refused(
    place: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for name, options in (
        ("m.pt", {"data": place / "data"}),
        ("m.onnx", {"golden": place / "data"}),
        ("m.tflite", {}),
        ("m", {}),
    ):
        with pytest.raises(featcache.ConfigError, match="FOLDER/"):
            featcache.export(place / "run", tmp_path / name, backbone=tiny_backbone, **options)
    for taken in (f"{place}/data/", f"{place}/c.h5/"):
        with pytest.raises(featcache.RunError, match="a new or an empty folder"):
            featcache.export(place / "run", taken, backbone=tiny_backbone)
