"""The mean of the folds' heads as one run: what it predicts, what it has seen, how it is kept."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_labels
import torch
from sample_crossval import LBFGS, SMALL, crossval_small, grouped_cache
from sample_heads import as_tensors, logits_of, probs_of
from sample_images import write_tree
from torch import nn

import featcache
from featcache.backbones.backbone import Backbone
from featcache.cli import main as cli
from featcache.errors import CacheError, ConfigError, FeatcacheWarning, RunError
from featcache.files import json_sha256
from featcache.heads.fit import fit_head
from featcache.heads.head import build_head
from featcache.sweeps.crossval import CrossvalSummary, crossval

NAMES = ["environment.json", "head.safetensors", "history.csv", "rows.bin", "run.json"]


class MeanOfHeads(nn.Module):
    """As README has it, for those who have no featcache."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(heads)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the mean of the probabilities."""
        logits = torch.stack([head(features) for head in self.members])
        return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., CrossvalSummary]:
    """Cross-validate a small cache in four folds."""
    grouped_cache(tmp_path / "c.h5")
    return functools.partial(crossval_small, tmp_path)


def trained_heads(patch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list that grows with each head that is trained, as a torch module."""
    heads: list[nn.Module] = []

    def fit(config: Any, *arguments: Any, **options: Any) -> Any:
        result = fit_head(config, *arguments, **options)
        heads.append(build_head(config))
        heads[-1].load_state_dict(as_tensors(result.state))
        return result

    patch.setattr("featcache.sweeps.fold_heads.fit_head", fit)
    return heads


def read_probs(file: Path) -> Any:
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return np.array([[float(v) for k, v in row.items() if k.startswith("prob_")] for row in rows])


# --- what it predicts


@pytest.mark.filterwarnings("ignore:the head was trained on 2 of the 11 rows of test")
@pytest.mark.parametrize("case", ["default", "lbfgs", "labels"])
def test_it_is_the_mean_of_the_probabilities_of_all_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Of the heads as they were trained, by torch one by one."""
    if case == "labels":
        cache = sample_labels.make_cache(tmp_path / "c.h5")
    else:
        cache = grouped_cache(tmp_path / "c.h5")
    heads = trained_heads(monkeypatch)
    options = LBFGS if case == "lbfgs" else SMALL
    made = crossval(
        cache.path, tmp_path / "f", folds=3, repeats=2, keep_ensemble=True, say=lambda _: None,
        **options,
    )  # fmt: skip
    folder = tmp_path / "f" / "ensemble"
    assert made.ensemble == folder
    assert sorted(p.name for p in folder.iterdir()) == NAMES
    test = cache.split("test")
    known = np.flatnonzero(
        ~np.isnan(test.targets).all(1) if case == "labels" else test.targets >= 0
    )
    features = np.array(test.features)[known]
    alone = np.stack([probs_of(head, features, cache.task) for head in heads])
    assert alone.shape == (6, len(known), len(cache.classes))
    assert np.abs(alone[0] - alone.mean(0)).max() > 1e-3, "heads that differ"
    featcache.evaluate(folder, csv=tmp_path / "t.csv", say=lambda _: None)
    np.testing.assert_allclose(read_probs(tmp_path / "t.csv"), alone.mean(0), 0, 1e-6)
    head = featcache.load_head(folder)
    np.testing.assert_allclose(probs_of(head, features, cache.task), alone.mean(0), 0, 1e-6)
    if case == "default":
        loaded = featcache.load_run(folder)
        assert list(head.state_dict()) == list(loaded.state)
        plain = MeanOfHeads([build_head(loaded.head) for _ in heads])
        plain.load_state_dict(as_tensors(loaded.state))
        logs = logits_of(plain, features)
        np.testing.assert_allclose(np.exp(logs), alone.mean(0), 0, 1e-6)
        np.testing.assert_allclose(logits_of(head, features), logs, 0, 1e-6)
        assert "mean of 6 heads" in repr(loaded)
        sizes = {(m["repeat"], m["fold"]): m["num_train"] for m in loaded.members}
        assert sizes == {(f["repeat"], f["fold"]): f["num_train"] for f in made.per_fold}
        assert {member["batch_size"] for member in loaded.members} == {32}


@pytest.mark.filterwarnings("ignore:the head was trained on")
def test_it_classifies_images_and_exports_as_one_network(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    tree = write_tree(tmp_path / "data")
    featcache.extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    crossval_small(tmp_path, keep_ensemble=True, folds=3)
    run = tmp_path / "f" / "ensemble"
    found = featcache.predict(run, tree / "test", backbone=tiny_backbone)
    cached = featcache.predict(run, cache=tmp_path / "c.h5")
    of_cache = dict(zip(cached.paths, cached.probs, strict=True))
    for path, probs in zip(found.paths, found.probs, strict=True):
        wanted = of_cache[Path(path).relative_to(tree).as_posix()]
        np.testing.assert_allclose(probs, wanted, 0, 1e-5)
    summary = featcache.export(run, tmp_path / "out.pt", backbone=tiny_backbone)
    assert summary.head["num_members"] == 3
    assert len(summary.head["layers"]) == 6
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    head = MeanOfHeads([build_head(featcache.load_run(run).head) for _ in range(3)])
    network = nn.ModuleDict({"backbone": tiny_backbone.network, "head": head}).eval()
    network.load_state_dict(state, strict=True)
    classifier = featcache.load_classifier(run, backbone=tiny_backbone)
    images = classifier.preprocess([tree / path for path in cached.paths])
    with torch.inference_mode():
        probs = network["head"](network["backbone"](images)).softmax(1).numpy()
    np.testing.assert_allclose(probs, cached.probs, 0, 1e-5)


# --- what it has seen


def test_all_its_rows_are_seen_and_the_others_are_not(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    """Two images of test are copies of others."""
    go(keep_ensemble=True)
    run, quiet = tmp_path / "f" / "ensemble", {"say": lambda _: None}
    found = featcache.evaluate(run, unseen=True, **quiet)
    assert (found.num_samples, found.num_trained_on, found.num_chosen_by) == (9, 2, 0)
    for split, number in (("train", 57), ("valid", 23)):
        with pytest.warns(FeatcacheWarning, match=f"of the {number} rows of {split}"):
            found = featcache.evaluate(run, split=split, **quiet)
        assert (found.num_trained_on or 0) + (found.num_chosen_by or 0) == number
        with pytest.raises(CacheError, match="labelled rows that the head has not seen"):
            featcache.evaluate(run, split=split, unseen=True, **quiet)
    with pytest.warns(FeatcacheWarning, match="--with-test"):
        go("g", keep_ensemble=True, with_test=True)
    with pytest.warns(FeatcacheWarning, match="trained on 11 of the 11 rows of test"):
        featcache.evaluate(tmp_path / "g" / "ensemble", **quiet)


def test_rows_that_only_chose_an_epoch_are_told_apart(tmp_path: Path) -> None:
    """In two folds, with half of the rest held out, some rows are in no head's batches."""
    cache = grouped_cache(tmp_path / "c.h5")
    made = crossval_small(tmp_path, folds=2, valid_fraction=0.5, keep_ensemble=True)
    with pytest.warns(FeatcacheWarning, match=r"was trained on .* was chosen by"):
        found = featcache.predict(tmp_path / "f" / "ensemble", cache=cache.path)
    counts = [
        sum(fold[name] for fold in made.per_fold) for name in ("num_train", "num_valid")
    ]  # of two folds: each row is outside one
    assert sum(counts) == made.num_rows == 80
    assert sum([found.num_trained_on or 0, found.num_chosen_by or 0]) == 80 + 2  # copies in test
    assert 0 <= (found.num_trained_on or 0) - counts[0] <= 2
    assert found.num_unclear == 0


# --- the files


@pytest.mark.filterwarnings("ignore:in more than one split")
def test_only_an_ensemble_has_another_version(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    go(keep_ensemble=True)
    featcache.train(tmp_path / "c.h5", tmp_path / "run", **SMALL)
    run, folder = tmp_path / "run" / "run.json", tmp_path / "f"
    one = json.loads(run.read_text("utf-8"))
    file = folder / "ensemble" / "run.json"
    facts = json.loads(file.read_text("utf-8"))
    assert set(facts) - set(one) == {"members"}
    assert (one["format_version"], facts["format_version"]) == (1, 2)
    assert facts["cache"] == one["cache"] | {"path": "../../c.h5"}
    folds = json.loads((folder / "crossval.json").read_text("utf-8"))
    assert folds["ensemble_weights_sha256"] == facts["weights_sha256"]
    assert facts["training"].items() >= folds["training"].items()
    lines = (folder / "ensemble" / "history.csv").read_text("utf-8").splitlines()
    assert lines[0].startswith("repeat,fold,epoch,train_loss,valid_loss,")
    assert [line.split(",")[:3] for line in lines[1:]] == [
        ["1", str(fold), str(epoch)] for fold in range(1, 5) for epoch in range(1, 4)
    ]
    for change in (
        {"members": facts["members"][:3]}, {"members": facts["members"][:1]}, {"members": []},
        {"members": 4}, {"members": [1, 2, 3, 4]}, {"format_version": 1},
    ):  # fmt: skip
        edited = facts | change
        edited["sha256"] = json_sha256(edited, without="sha256")
        file.write_text(json.dumps(edited), "utf-8")
        with pytest.raises(RunError, match=r"members|the head, classes and task it was saved"):
            featcache.load_run(file.parent)
    del facts["members"]
    facts["format_version"] = 1
    facts["sha256"] = json_sha256(facts, without="sha256")
    file.write_text(json.dumps(facts), "utf-8")
    with pytest.raises(RunError, match="the head, classes and task it was saved with"):
        featcache.load_run(file.parent)


def test_a_head_of_scikit_learns_kind_is_one_head(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    go(keep_ensemble=True)
    with pytest.raises(ConfigError, match="expected a run with one head, found the mean of 4"):
        featcache.HeadClassifier.from_run(tmp_path / "f" / "ensemble")


def test_a_killed_one_goes_on_with_the_heads_that_are_there(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    go("whole", keep_ensemble=True)
    heads = tmp_path / "f.partial" / "heads.bin"

    def stop(number: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            done = trained_heads(patch)
            inner = patch.setattr

            def fit(*arguments: Any, **options: Any) -> Any:
                if len(done) == number:
                    raise KeyboardInterrupt
                done.append(nn.Identity())
                return fit_head(*arguments, **options)

            inner("featcache.sweeps.fold_heads.fit_head", fit)
            with pytest.raises(KeyboardInterrupt):
                go(keep_ensemble=True)

    stop(2)
    size = heads.stat().st_size
    with pytest.raises(ConfigError, match="keep_ensemble true, found keep_ensemble false"):
        go()
    whole = heads.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        heads.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"its journal, found heads\.bin with another head 2"):
            go(keep_ensemble=True)
    heads.write_bytes(whole + whole[: size // 2 - 3])  # a third head, torn by a power cut
    go(keep_ensemble=True)
    for name in ("predictions.csv", "crossval.json", "ensemble/head.safetensors"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "f" / "ensemble" / "rows.bin").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "f", "whole"]


def test_what_the_user_put_beside_it_is_not_replaced(
    tmp_path: Path, go: Callable[..., CrossvalSummary]
) -> None:
    go(keep_ensemble=True)
    folder = tmp_path / "f" / "ensemble"
    featcache.evaluate(folder, unseen=True, say=lambda _: None)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files: ensemble/notes\.txt"):
        go(overwrite=True)
    (folder / "notes.txt").unlink()
    assert go(overwrite=True).ensemble is None
    assert not folder.exists()


# --- the command line


def test_the_command_line_keeps_and_describes_it(
    tmp_path: Path, go: Callable[..., CrossvalSummary], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    call = functools.partial(cli.cli.main, standalone_mode=False)
    options = "--keep-ensemble --folds 3 --hidden 8 --epochs 1 --device cpu"
    call(["crossval", "c.h5", "f", *options.split()])
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "their mean, a run like any other: f/ensemble"
    call(["info", "f/ensemble", "--layers"])
    lines = capfd.readouterr().out.splitlines()
    head = build_head(featcache.load_run("f/ensemble").head)
    number = sum(parameter.numel() for parameter in head.parameters())
    assert lines[-1].split("  ")[0] == "mean of 3 such heads"
    assert f"{3 * number:,}" in lines[-1]
    call(["info", "f"])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "f: a featcache cross-validation"
    assert "ensemble: f/ensemble" in lines
    assert any(line.startswith("  recall of covid: ") for line in lines)
