"""The command line: contract of names and exits, one line an error, one JSON object a fact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from command_line import TINY, assert_one_line_error, command
from sample_rows import make_cache

import featcache
from featcache.backbones.backbone import build_backbone
from featcache.backbones.engine import ENGINES
from featcache.cache.reading import open_cache
from featcache.cli import main as cli
from featcache.heads.config import LBFGS, OPTIMIZERS
from featcache.pixels.images import CROP_MODES, INTERPOLATIONS, TRUNCATED_MODES
from featcache.pixels.views import AUGMENTATIONS
from featcache.precision import PARITY_BOUNDS

# --------------------------------------------------------------------------------------- contract


def test_every_command_has_help_with_an_example_and_contract_options(run: Any) -> None:
    assert list(cli.cli.commands) == [
        "demo", "split", "extract", "select", "info", "verify", "audit", "train", "sweep",
        "crossval", "decide", "evaluate", "predict", "explain", "report", "export", "serve",
        "log", "convert", "neighbours",
    ]  # fmt: skip
    for name, made in cli.cli.commands.items():
        result = run(name, "--help")
        assert result.code == 0
        assert f"Example: featcache {name}" in result.out
        options = {option for parameter in made.params for option in parameter.opts}
        assert "--json" in options
        assert all("_" not in option for option in options if option.startswith("--"))


def test_choices_are_those_of_the_library() -> None:
    choices = {
        parameter.name: tuple(parameter.type.choices)
        for parameter in cli.cli.commands["extract"].params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices["crop_mode"] == CROP_MODES
    assert choices["interpolation"] == tuple(INTERPOLATIONS)
    assert choices["truncated"] == TRUNCATED_MODES
    assert choices["precision"] == tuple(PARITY_BOUNDS)
    assert choices["engine"] == ("auto", *ENGINES)
    assert choices["augment"] == tuple(AUGMENTATIONS)
    (optimizer,) = (p for p in cli.cli.commands["train"].params if p.name == "optimizer")
    assert isinstance(optimizer.type, click.Choice)
    assert tuple(optimizer.type.choices) == (*OPTIMIZERS, LBFGS)


def test_version_and_wrong_usage(run: Any) -> None:
    assert run("--version").out.strip() == f"featcache, version {featcache.__version__}"
    for wrong in (
        ["nonsense"],
        ["extract"],
        ["train", "a", "b", "--epochs", "0"],
        ["predict", "r"],
    ):
        result = run(*wrong)
        assert result.code == 2
        assert "Usage:" in result.err
    assert run("extract", "a", "b", *TINY, "--batch-size", "many").code == 2
    assert run("split", "a", "b", "--fractions", "x").code == 2


# ----------------------------------------------------------------------------------- the whole way


def test_the_whole_way_with_json(run: Any, tree: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for name in ("covid", "normal"):
        for file in (tree / "train" / name).iterdir():
            (raw / name).mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, raw / name / file.name)

    def facts(*arguments: object) -> dict[str, Any]:
        result = run(*arguments, "--json")
        assert result.code == 0, result.err
        assert "\\" not in result.out.replace('\\"', "")
        value = json.loads(result.out, parse_constant=pytest.fail)
        assert isinstance(value, dict)
        return value

    facts("split", "raw", "new", "--group-by", r"^(\w+)_", "--fractions", "0.5,0.25,0.25")
    made = facts("extract", "new", "c.h5", *TINY)
    assert made["num_images"] == 24
    assert facts("extract", "new", "c.h5", *TINY)["status"] == "up to date"
    assert facts("info", "c.h5")["fingerprint"] == made["fingerprint"]
    assert facts("verify", "c.h5", "--data", "new", "--samples", "all", *TINY)["num_compared"] == 24
    facts("train", "c.h5", "run", "--epochs", "8", "--hidden", "none", "--learning-rate", "0.01")
    assert facts("info", "run")["head"]["hidden"] == []
    result = facts("evaluate", "run", "--positive", "covid", "--csv", "test.csv")
    contract = (
        "split num_samples classes accuracy balanced_accuracy roc_auc average_precision per_class "
        "confusion_matrix positive sensitivity specificity false_negatives mistakes num_failed "
        "fingerprint"
    )
    assert set(contract.split()) <= set(result)
    predicted = facts("predict", "run", "new/test", *TINY)
    assert len(predicted["predictions"]) == result["num_samples"]
    right = sum(p["pred"] in p["path"] for p in predicted["predictions"])
    assert right / result["num_samples"] == pytest.approx(result["accuracy"])
    assert len(facts("predict", "run", "--cache", "c.h5")["predictions"]) == 24
    exported = facts("export", "run", "out.pt", *TINY)
    assert exported["classes"] == ["covid", "normal"]
    assert (tmp_path / "out.pt.json").is_file()


def test_verify_names_the_damage_and_repairs_it(run: Any, tree: Path) -> None:
    run("extract", "data", "c.h5", *TINY)
    raw = bytearray(Path("c.h5").read_bytes())
    cache = featcache.open_cache("c.h5")
    entry = cache.container.arrays["splits/test/features"]
    for row in (3, 5):
        raw[entry.offset + row * entry.num_bytes // 12] ^= 1
    wrong = cache.splits["test"].paths[3]
    Path("c.h5").write_bytes(raw)
    assert_one_line_error(
        run("verify", "c.h5"), f"row 3 of test, {wrong}", "another row", "c.h5 --repair"
    )
    result = run("verify", "c.h5", "--repair", "--json")
    facts = json.loads(result.out)
    assert result.code == 0
    assert (facts["repaired"], facts["num_rows"], facts["dropped"][0]) == (True, 44, wrong)
    assert "nothing to repair" in run("verify", "c.h5", "--repair").out
    assert json.loads(run("extract", "data", "c.h5", *TINY, "--json").out)["num_new"] == 2
    assert run("verify", "c.h5").code == 0


def test_lines_for_people_and_quiet(run: Any, tree: Path) -> None:
    result = run("extract", "data", "c.h5", *TINY)
    assert result.code == 0
    assert "train: 12 covid, 12 normal" in result.out
    assert "46 images" in result.out
    assert "it/s" not in result.err  # no progress bar where nobody looks
    assert run("extract", "data", "c.h5", *TINY).out.endswith("c.h5: up to date, 46 images.\n")
    for quiet in (
        ["extract", "data", "d.h5", *TINY], ["train", "c.h5", "r"], ["evaluate", "r"],
        ["predict", "r", "data/test", *TINY], ["verify", "c.h5"],
    ):  # fmt: skip
        result = run(*quiet, "--quiet")
        assert (result.code, result.out, result.err) == (0, "", "")
    assert "verify checks that the file is whole" in run("info", "c.h5").out


def test_dry_run_writes_nothing(run: Any, tree: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run("extract", "data", "c.h5", *TINY, "--dry-run")
    assert result.code == 0
    assert "expected: 46 images" in result.out
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads(run("extract", "data", "c.h5", *TINY, "--dry-run", "--json").out)


# ------------------------------------------------------------------------ foreseeable mistakes


def test_mistakes_in_the_data_are_one_line_and_leave_nothing(
    run: Any, tree: Path, tmp_path: Path
) -> None:
    (tree / "test" / "pneumonia").mkdir()
    shutil.copy(next((tree / "test" / "covid").iterdir()), tree / "test" / "pneumonia" / "a.png")
    before = sorted(tmp_path.rglob("*"))
    assert_one_line_error(run("extract", "data", "c.h5", *TINY), "pneumonia", "test")
    assert_one_line_error(run("extract", "nowhere", "c.h5", *TINY), "nowhere")
    assert_one_line_error(run("split", "nowhere", "x"), "nowhere")
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_with_caches_and_runs_are_one_line(
    run: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("extract", "data", "c.h5", *TINY, "--quiet").code == 0
    assert run("train", "c.h5", "run", "--quiet").code == 0
    # a missing split
    shutil.rmtree(tree / "valid")
    assert run("extract", "data", "novalid.h5", *TINY, "--quiet").code == 0
    assert_one_line_error(run("train", "novalid.h5", "r2"), "valid", "--valid-fraction")
    assert_one_line_error(run("evaluate", "run", "--split", "all"), "all", "test")
    # a stale fingerprint
    result = run("extract", "data", "c.h5", *TINY, "--crop-mode", "center")
    assert_one_line_error(result, "crop_mode", "--rebuild")
    assert run("extract", "data", "center.h5", *TINY, "--crop-mode", "center", "--quiet").code == 0
    assert_one_line_error(run("evaluate", "run", "--cache", "center.h5"), "crop_mode")
    # a full output folder
    assert_one_line_error(run("train", "c.h5", "run"), "run", "--overwrite")
    assert run("train", "c.h5", "run", "--overwrite", "--quiet").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert_one_line_error(run("train", "c.h5", "mine", "--overwrite"), "mine")
    assert_one_line_error(run("split", "data/train", "mine"), "mine")
    # an unreadable cache
    data = bytearray((tmp_path / "c.h5").read_bytes())
    data[-100] ^= 1
    (tmp_path / "damaged.h5").write_bytes(data)
    (tmp_path / "letter.h5").write_bytes(b"dear")
    for name in ("damaged.h5", "letter.h5", "nowhere.h5"):
        for verb in (["train", name, "r3"], ["verify", name], ["predict", "run", "--cache", name]):
            assert_one_line_error(run(*verb), name)
    assert_one_line_error(run("evaluate", "mine"), "mine")
    assert_one_line_error(run("info", "mine"), "mine")
    assert_one_line_error(run("evaluate", "run", "--positive", "flu"), "flu", "covid, normal")
    assert {"r2", "r3", "mine.partial"}.isdisjoint(p.name for p in tmp_path.iterdir())


def test_weights_that_do_not_fit_and_no_network_are_one_line(
    run: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import efficientnet_pytorch.utils

    nowhere = {"efficientnet-b0": "http://127.0.0.1:9/efficientnet-b0-355c32eb.pth"}
    monkeypatch.setattr(efficientnet_pytorch.utils, "url_map", nowhere)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    b0 = ["extract", "data", "c.h5", "--backbone", "efficientnet-b0"]
    assert_one_line_error(run(*b0), "efficientnet-b0-355c32eb.pth", "--weights FILE")
    other = build_backbone("torchvision:resnet18", weights="random", image_size=64)
    torch.save(other.network.state_dict(), tmp_path / "resnet.pt")
    assert_one_line_error(run(*b0, "--weights", "resnet.pt"), "resnet.pt", "--backbone")
    (tmp_path / "letter.pt").write_bytes(b"dear")
    assert_one_line_error(run(*b0, "--weights", "letter.pt"), "letter.pt")
    assert_one_line_error(run(*b0[:-1], "efficientnet-b9"), "efficientnet-b9")
    assert not list(tmp_path.glob("c.h5*"))


def test_a_missing_package_names_the_extra(
    run: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run("extract", "data", "c.h5", "--backbone", "timm:resnet10t")
    assert_one_line_error(result, "pip install 'featcache[timm]'")


def test_hostile_names_do_not_reach_the_terminal(run: Any, tree: Path, tmp_path: Path) -> None:
    evil = "\x1b[31mred\u202e.png"
    source = next((tree / "train" / "covid").iterdir())
    shutil.copy(source, tree / "train" / "covid" / evil)
    (tree / "train" / "covid" / ("bad" + evil)).write_bytes(b"broken")
    assert run("extract", "data", "c.h5", *TINY, "--quiet").code == 0
    assert run("train", "c.h5", "r", "--quiet").code == 0
    for verb in (
        ["extract", "data", "d.h5", *TINY], ["info", "c.h5"], ["predict", "r", "data/train", *TINY],
        ["evaluate", "r", "--split", "train"],
    ):  # fmt: skip
        result = run(*verb)
        assert result.code == 0
        assert "\x1b" not in result.out + result.err
        assert "\u202e" not in result.out + result.err
    assert evil in [Path(p).name for p in open_cache(tmp_path / "c.h5").splits["train"].paths]


def test_a_read_only_folder_is_one_line(run: Any, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    for verb in (
        ["extract", "data", "file/c.h5", *TINY], ["split", "data/train", "file/x"],
        ["split", "data/train", "file/x.csv"],
    ):  # fmt: skip
        result = run(*verb)
        assert result.code == 1
        assert len([x for x in result.err.splitlines() if x.startswith("error: ")]) == 1


# ------------------------------------------------------------------------- as its own process


def test_python_m_featcache_and_broken_pipe(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5")
    shell = f"{sys.executable} -m featcache info c.h5 | head -n 1"
    done = subprocess.run(
        shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "c.h5: a featcache cache\n"
    assert "Traceback" not in done.stderr


def test_an_error_while_the_network_runs_exits_1(
    tree: Path, tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    """A thread that is inside the network when the process ends would abort it: 134."""
    (tree / "train" / "covid" / "trc000_0.jpg").write_bytes(b"broken")
    options = ["--backbone", "torchvision:resnet18", "--weights", "random", "--image-size", "64",
               "--max-errors", "0"]  # fmt: skip
    for engine in ("folded", "onnx")[: rounds(1, 2)]:
        done = command("extract", "data", "c.h5", *options, "--engine", engine, cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("error: images: expected at most 0")


def test_json_has_no_nan_where_metrics_are_undefined(run: Any, tree: Path, tmp_path: Path) -> None:
    assert run("extract", "data", "c.h5", *TINY, "--quiet").code == 0
    assert run("train", "c.h5", "r", "--quiet").code == 0
    shutil.rmtree(tree / "train")
    only = tmp_path / "only.h5"
    cache = open_cache(tmp_path / "c.h5")
    split = cache.splits["test"]
    covid = split.targets == 0
    featcache.write_cache(
        only, {"test": np.array(split.features)[covid]}, {"test": split.targets[covid]},
        {"test": [p for p, c in zip(split.paths, covid, strict=True) if c]},
        classes=list(cache.classes), identity=cache.identity,
    )  # fmt: skip
    result = run("evaluate", "r", "--cache", "only.h5", "--positive", "covid", "--json")
    facts = json.loads(result.out, parse_constant=pytest.fail)
    assert facts["roc_auc"] is None
    assert facts["specificity"] is None
    assert facts["sensitivity"] is not None


def test_results_that_could_not_be_written_are_refused_first(run: Any, tree: Path) -> None:
    assert run("extract", "data", "c.h5", *TINY, "--quiet").code == 0
    assert run("train", "c.h5", "r", "--quiet").code == 0
    result = run("predict", "r", "data/test", *TINY, "--csv", "nowhere/x.csv")
    assert_one_line_error(result, "--csv")
    assert result.out == ""
    assert_one_line_error(
        run("extract", "data", "data/c.h5", *TINY), "outside the folder of images"
    )


def test_views_are_extracted_trained_on_and_said(run: Any, tree: Path) -> None:
    made = run("extract", "data", "c.h5", *TINY, "--views", "3", "--augment", "xray")
    assert made.code == 0, made.err
    assert "Views: 3 of every image to train on, xray." in made.out
    assert "train: 24 x 3 x 24 float32, 3 views; 12 covid" in run("info", "c.h5").out
    trained = run("train", "c.h5", "run", "--epochs", "2", "--hidden", "none")
    assert "views: 3 of each training image (xray), each epoch draws one of them" in trained.out
    assert run("evaluate", "run", "--split", "test").code == 0
    assert run("predict", "run", "data/test", *TINY).code == 0


def test_views_that_make_no_sense_are_refused(run: Any, tree: Path) -> None:
    for options, code, wanted in (
        (
            ["--views", "1", "--augment", "crop"],
            1,
            "--views: expected 2 or more with --augment crop",
        ),
        (["--augment", "crop"], 1, "--views: expected 2 or more with --augment crop"),
        (["--views", "5"], 1, "--augment: expected one of flip, crop, xray, to make 4 of 5 views"),
        (["--views", "8", "--augment", "flip"], 1, "--views: expected 2 with --augment flip"),
        (["--views", "0", "--augment", "crop"], 2, "0 is not in the range 1<=x<=64"),
        (["--views", "65", "--augment", "crop"], 2, "65 is not in the range"),
        (["--views", "5", "--augment", "blur"], 2, "'blur' is not one of 'flip', 'crop', 'xray'"),
    ):
        result = run("extract", "data", "c.h5", *TINY, *options)
        assert (result.code, wanted in result.err) == (code, True), result.err


def test_linear_probes_and_warm_up(run: Any, tree: Path) -> None:
    assert run("extract", "data", "c.h5", *TINY).code == 0
    solved = run("train", "c.h5", "run", "--hidden", "none", "--optimizer", "lbfgs", "--json")
    facts = json.loads(solved.out)
    assert (facts["num_epochs"], 1e-6 <= facts["strength"] <= 100) == (65, True)
    assert json.loads(run("evaluate", "run", "--json").out)["num_views"] == 1
    again = run(
        "train", "c.h5", "one", "--hidden", "none", "--optimizer", "lbfgs", "--weight-decay", "0.1"
    )
    assert (again.code, "kept strength 1.00e-01" in again.out) == (0, True)
    assert_one_line_error(run("train", "c.h5", "x", "--optimizer", "lbfgs"), "--hidden none")
    assert_one_line_error(
        run("train", "c.h5", "x", "--hidden", "none", "--optimizer", "lbfgs", "--epochs", "3"),
        "--epochs: expected none with --optimizer lbfgs", "found 3",
    )  # fmt: skip
    warm = run("train", "c.h5", "w", "--warmup", "2", "--epochs", "4", "--schedule", "cosine")
    assert warm.code == 0, warm.err
    assert_one_line_error(run("train", "c.h5", "x", "--warmup", "10"), "--warmup")
    assert run("train", "c.h5", "x", "--warmup", "-1").code == 2
    assert not Path("x").exists()


def test_views_are_averaged_when_asked(run: Any, tree: Path) -> None:
    made = run("extract", "data/test", "v.h5", *TINY, "--views", "2", "--augment", "flip")
    assert made.code == 0, made.err
    assert run("extract", "data", "c.h5", *TINY).code == 0
    assert run("train", "c.h5", "run", "--hidden", "none", "--epochs", "2").code == 0
    on_views = ("evaluate", "run", "--cache", "v.h5", "--split", "all", "--json")
    assert json.loads(run(*on_views, "--average-views").out)["num_views"] == 2
    assert json.loads(run(*on_views).out)["num_views"] == 1
    predicted = run("predict", "run", "--cache", "v.h5", "--average-views", "--json")
    assert json.loads(predicted.out)["average_views"] is True
    said = run("predict", "run", "--cache", "v.h5", "--average-views").out
    assert "12 images, by the mean of their views:" in said
    assert_one_line_error(run("evaluate", "run", "--average-views"), "--average-views")
    assert run("predict", "run", "data/test", *TINY, "--average-views").code == 2
