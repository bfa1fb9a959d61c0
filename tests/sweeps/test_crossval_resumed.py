"""Cross-validations that were stopped, and those that are refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_crossval import LBFGS, SMALL, crossval_small, grouped_cache
from sample_rows import edited, make_cache, rows_of

import featcache
from featcache.errors import CacheError, ConfigError, RunError
from featcache.files import json_sha256
from featcache.heads.fit import fit_head
from featcache.sweeps.crossval import CrossvalSummary, crossval


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., CrossvalSummary]:
    """Cross-validate a small cache in four folds."""
    grouped_cache(tmp_path / "c.h5")
    return functools.partial(crossval_small, tmp_path)


def stop_after(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Stop the program when so many heads are trained; the list grows with each."""
    done: list[int] = []

    def fit(*arguments: Any, **options: Any) -> Any:
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(len(done))
        return fit_head(*arguments, **options)

    patch.setattr("featcache.sweeps.fold_heads.fit_head", fit)
    return done


# --- stopped and gone on


def test_a_killed_one_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    go("whole", repeats=2)
    for number in (0, 1, 5):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, number)
            with pytest.raises(KeyboardInterrupt):
                go(repeats=2)
        assert not (tmp_path / "f").exists()
        assert (tmp_path / "f.partial").exists() == (number > 0)
        if number:
            facts = featcache.info(tmp_path / "f.partial").as_dict()
            assert facts["kept"] == {"num_folds_done": number, "num_folds": 4, "num_repeats": 2}
            assert facts["output"] == (tmp_path / "f").as_posix()
            assert featcache.info(tmp_path / "f").as_dict() == facts, "by the name it will have"
            with (tmp_path / "f.partial" / "journal.jsonl").open("ab") as file:
                file.write(b'{"repeat": 0')  # torn by a power cut
        with pytest.MonkeyPatch.context() as patch:
            done = stop_after(patch, 99)
            said: list[str] = []
            go(repeats=2, say=said.append)
        assert len(done) == 8 - number
        assert any("going on after" in line for line in said) == (number > 0)
        for name in ("crossval.json", "predictions.csv"):
            assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "f", "whole"]
        for file in (tmp_path / "f").iterdir():
            file.unlink()
        (tmp_path / "f").rmdir()


def test_an_unfinished_one_of_other_arguments_is_refused(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            go()
    for options, found in (
        ({"folds": 3}, "folds 4, found folds 3"), ({"seed": 1}, "seed 0, found data_seed 1, seed"),
        ({"dropout": 0.1}, "head .* found head"), ({"valid_fraction": 0.5}, "found valid_fraction"),
    ):  # fmt: skip
        with pytest.raises(
            ConfigError, match=f"unfinished cross-validation: .*that began it: .*{found}"
        ):
            go(**options)
    journal = tmp_path / "f.partial" / "journal.jsonl"
    lines = journal.read_text("utf-8").splitlines()
    journal.write_text("\n".join([lines[0], lines[2], lines[1], ""]), "utf-8")
    with pytest.raises(ConfigError, match="unfinished cross-validation: expected its journal"):
        go()
    assert go(folds=3, overwrite=True).num_folds == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "f"]


# --- looked at


def test_what_a_finished_one_holds_and_a_damaged_one_is_one_line(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    made = go(repeats=2)
    facts = featcache.info(tmp_path / "f")
    assert isinstance(facts, featcache.CrossvalInfo)
    assert (facts.num_rows, facts.num_folds, facts.num_repeats) == (80, 4, 2)
    assert (facts.head["hidden"], facts.training["epochs"]) == ([8], 3)
    assert facts.cache["fingerprint"] == made.fingerprint
    assert (facts.mean, facts.ensemble) == (made.mean, None)
    assert facts.as_dict()["kind"] == "cross-validation"
    json_file, csv_file = tmp_path / "f" / "crossval.json", tmp_path / "f" / "predictions.csv"
    whole, rows = json_file.read_text("utf-8"), csv_file.read_bytes()
    known = json.loads(whole)

    def signed(**change: Any) -> str:
        edited = known | change
        return json.dumps(edited | {"sha256": json_sha256(edited, without="sha256")})

    for text, found in (
        ("[", "text that is not JSON"), ("{}", "expected format featcache-crossval"),
        (whole.replace('"folds": 4', '"folds": 5'), "its own sha256"),
        (signed(format_version=9), "found version 9 .* A newer featcache"),
        (signed(format_version=[2]), "expected format version 1"),
        (signed(caches=[1]), "caches, JSON objects"),
        (signed(mean={}), "figures with their intervals"), (signed(head=None), "head, a JSON dict"),
        (signed(mean=known["mean"] | {"accuracy": {"mean": "high"}}), "with their intervals"),
        (signed(predictions_sha256="0" * 64), "predictions.csv that crossval.json names"),
    ):  # fmt: skip
        json_file.write_text(text, "utf-8")
        with pytest.raises(RunError, match=f"cross-validation: .*{found}"):
            featcache.info(tmp_path / "f")
    json_file.write_text(whole, "utf-8")
    csv_file.unlink()
    with pytest.raises(RunError, match=r"expected a folder with predictions\.csv, found No such"):
        featcache.info(tmp_path / "f")
    csv_file.write_bytes(rows)
    assert featcache.info(tmp_path / "f") == facts


# --- bad input


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"folds": 1}, "--folds: expected a whole number from 2, found 1"),
        ({"folds": 2.0}, "--folds"), ({"repeats": 0}, "--repeats: expected a whole number from 1"),
        ({"valid_fraction": 1.0}, "--valid-fraction"), ({"seed": -1}, "-seed"),
        ({"seed": (1 << 63) - 1}, "--seed"), ({"dropout": 2}, "--dropout"),
        ({"optimizer": "lbfgs"}, "--optimizer"), ({"device": "tpu"}, "--device"),
        (LBFGS | {"epochs": 4}, "--epochs: expected none with --optimizer lbfgs"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_one_line(
    tmp_path: Path, go: Callable[..., CrossvalSummary], options: Any, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        crossval(tmp_path / "c.h5", tmp_path / "f", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]


@pytest.mark.parametrize(
    ("splits", "options", "wanted"),
    [
        ({"test": [0, 1] * 9}, {}, "split train: expected rows to train on, found only test"),
        ({"train": [0, 1] * 9}, {"with_test": True}, "--with-test: expected a cache with"),
        ({"train": [0] * 20 + [1] * 4}, {}, "--folds: expected class normal in each of 5 parts"),
        ({"train": [0] * 20 + [1] * 2}, {"folds": 2}, "expected class normal .* choose the epoch"),
        ({"train": [0] * 20, "valid": [-1] * 3}, {}, "train and valid: .* found none of normal"),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_cannot_be_parted_are_one_line(
    tmp_path: Path, splits: Any, options: Any, wanted: str
) -> None:
    make_cache(tmp_path / "c.h5", **splits)
    with pytest.raises((CacheError, ConfigError), match=wanted):
        crossval(tmp_path / "c.h5", tmp_path / "f", **(SMALL | options))
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]


def test_groups_not_rows_are_counted(tmp_path: Path) -> None:
    groups = [f"p{i // 10}" for i in range(40)]
    part = edited(rows_of("all", [0, 1] * 20), groups=groups)
    make_cache(tmp_path / "c.h5", all=part)
    with pytest.raises(CacheError, match="--folds: expected class covid in each of 5 parts"):
        crossval(tmp_path / "c.h5", tmp_path / "f", **SMALL)


def test_a_folder_that_is_there_stays_unless_it_is_its_own(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="output folder"):
            go("mine", overwrite=overwrite)
    go()
    before = (tmp_path / "f" / "crossval.json").read_bytes()
    with pytest.raises(ConfigError, match="replace it with --overwrite"):
        go(seed=1)
    (tmp_path / "f" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files: notes\.txt"):
        go(seed=1, overwrite=True)
    assert (tmp_path / "f" / "crossval.json").read_bytes() == before
    (tmp_path / "f" / "notes.txt").unlink()
    go(seed=1, overwrite=True)
    assert (tmp_path / "f" / "crossval.json").read_bytes() != before
    with pytest.raises(ConfigError, match="another file than those that are read"):
        go("c.h5", overwrite=True)
