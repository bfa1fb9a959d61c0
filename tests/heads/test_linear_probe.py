"""Linear heads solved for, against nn.Sequential and torch.optim.LBFGS, and as runs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
import torch
from sample_heads import as_tensors, logits_of
from torch import nn

from featcache import HeadClassifier, evaluate, load_run, open_cache, sweep, train, write_cache
from featcache.errors import ConfigError
from featcache.heads.config import (
    STRENGTHS,
    FitResult,
    HeadJob,
    TrainingConfig,
    choose_strengths,
)
from featcache.heads.fit import compare_linear_probe, fit_head, fit_heads
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.linear_probe import SoftmaxRegression
from featcache.runtime import CPU
from featcache.sweeps.space import read_space

LINEAR = HeadConfig(12, 3, hidden=())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small only wait for each other on more threads, and long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        yield
    torch.set_num_threads(before)


def blobs(num_rows: int, seed: int = 0, dtype: str = "f8") -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, num_rows)
    features = (rng.normal(size=(num_rows, 12)) * rng.uniform(0.1, 9, 12) + 3).astype(dtype)
    features[np.arange(num_rows), targets] += 2
    return features, targets


def fit(dtype: str = "f8", *, valid: bool = True, seed: int = 0, **options: Any) -> FitResult:
    held_out = blobs(50, 1, dtype) if valid else ()
    weights = options.pop("train_weights", None)
    rows = options.pop("rows", blobs(90, 0, dtype))
    return fit_head(
        LINEAR, TrainingConfig(optimizer="lbfgs", **options), *rows, *held_out, seed=seed,
        data_seed=seed, device=CPU, train_weights=weights,
    )  # fmt: skip


def plain_head(
    features: Any, targets: Any, strength: float, weights: Any = None, **loss: Any
) -> nn.Sequential:
    """The head of layers, its last solved for by torch's own L-BFGS; rows weighed one by one."""
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    head = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.4), nn.Linear(12, 3)).double().eval()
    with torch.no_grad():
        head[0].running_mean.copy_(x.mean(0))
        head[0].running_var.copy_(x.var(0, correction=0))
        head[2].weight.zero_()
        head[2].bias.zero_()
    solver = torch.optim.LBFGS(
        head[2].parameters(), max_iter=5000, max_eval=9000, tolerance_grad=1e-10,
        tolerance_change=0, history_size=30, line_search_fn="strong_wolfe",
    )  # fmt: skip
    of_rows = torch.ones(len(y)).double() if weights is None else torch.from_numpy(weights)
    of_targets = loss.get("weight", torch.ones(3).double())[y]

    def closure() -> torch.Tensor:
        solver.zero_grad()
        each = nn.functional.cross_entropy(head(x), y, reduction="none", **loss)
        value = (each * of_rows).sum() / (of_rows * of_targets).sum()
        value = value + strength / 2 * (head[2].weight ** 2).sum()
        value.backward()
        return value

    solver.step(closure)
    return head


BALANCED = 90 / (3 * np.bincount(blobs(90)[1]))


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, {}),
        ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ({"class_weights": (0.5, 3.0, 1.0)}, {"weight": torch.tensor([0.5, 3.0, 1.0]).double()}),
        ({"class_weights": "balanced", "label_smoothing": 0.1},
         {"weight": torch.from_numpy(BALANCED), "label_smoothing": 0.1}),
        ({"train_weights": np.linspace(0.1, 4, 90)}, {"weights": np.linspace(0.1, 4, 90)}),
        ({"train_weights": np.linspace(0.1, 4, 90), "class_weights": (0.5, 3.0, 1.0)},
         {"weights": np.linspace(0.1, 4, 90), "weight": torch.tensor([0.5, 3.0, 1.0]).double()}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strength", [0.3, 1e-3])
def test_every_option_has_the_optimum_of_layers_and_torchs_solver(
    options: Any, loss: Any, strength: float
) -> None:
    result = fit(weight_decay=strength, **options)
    plain = plain_head(*blobs(90), strength, **loss)
    assert list(result.state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        np.testing.assert_allclose(result.state[name], value, 1e-3, 2e-4)
    loaded = build_head(LINEAR, seed=0).double()
    loaded.load_state_dict(as_tensors(result.state))
    logits = [logits_of(head, blobs(50, 1)[0]) for head in (loaded, plain)]
    np.testing.assert_allclose(*logits, atol=2e-3)


def test_views_count_each_for_its_share() -> None:
    views = np.stack([blobs(60, seed)[0] for seed in (0, 1, 2)], 1)
    targets, weights = blobs(60)[1], np.linspace(1, 2, 60)
    as_views = fit(weight_decay=0.01, rows=(views, targets), train_weights=weights)
    flat = views.reshape(180, 12), targets.repeat(3)
    as_rows = fit(weight_decay=0.01, rows=flat, train_weights=weights.repeat(3))
    for name, value in as_views.state.items():
        np.testing.assert_allclose(value, as_rows.state[name], 1e-6, 1e-7)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_kept_is_the_strength_with_the_lowest_validation_loss(dtype: str) -> None:
    result = fit(dtype)
    history = result.history
    assert [row["strength"] for row in history] == list(STRENGTHS)
    losses = [row["valid_loss"] for row in history]
    assert 1 < result.best_epoch == 1 + int(np.argmin(losses)) < 65  # or this test shows nothing
    assert all(row["converged"] for row in history)
    features, targets = blobs(90, 0, dtype)
    assert result.state["0.running_mean"] == pytest.approx(features.mean(0), rel=1e-6)
    assert result.state["0.running_var"] == pytest.approx(features.var(0), rel=1e-5)
    assert {value.dtype for value in result.state.values()} == {
        features.dtype, np.dtype(np.int64)
    }  # fmt: skip
    head = build_head(LINEAR, seed=0).to(torch.from_numpy(features).dtype)
    head.load_state_dict(as_tensors(result.state))
    features, targets = blobs(50, 1, dtype)
    loss = nn.functional.cross_entropy(
        torch.from_numpy(logits_of(head, features)).double(), torch.from_numpy(targets)
    )
    assert loss.item() == pytest.approx(min(losses), rel=1e-6)


def test_the_path_from_nothing_learnt_to_all() -> None:
    losses = [row["train_loss"] for row in fit().history]
    shares = np.bincount(blobs(90)[1]) / 90
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(-(shares * np.log(shares)).sum(), rel=0.02)


def test_ties_keep_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.4, 0.4, *[0.6] * 62])
    monkeypatch.setattr(
        "featcache.heads.linear_probe.validation_columns", lambda *_: {"valid_loss": next(values)}
    )
    assert fit().best_epoch == 2


def test_nothing_is_drawn_and_the_callers_arrays_are_left_alone() -> None:
    rows = blobs(90)
    before = rows[0].copy()
    one, two = fit(rows=rows, seed=1), fit(rows=rows, seed=2)
    assert all(np.array_equal(one.state[name], two.state[name]) for name in one.state)
    assert np.array_equal(rows[0], before)


def test_strengths_without_rows_to_choose_by() -> None:
    assert choose_strengths(TrainingConfig(), 200, has_valid=True) == STRENGTHS
    assert choose_strengths(TrainingConfig(), 200, has_valid=False) == (1 / 200,)
    given = TrainingConfig(weight_decay=0.3)
    assert choose_strengths(given, 200, has_valid=True) == (0.3,)
    result = fit(valid=False)
    assert [row["strength"] for row in result.history] == [1 / 90]
    assert "valid_loss" not in result.history[0]
    plain = plain_head(*blobs(90), 1 / 90)
    np.testing.assert_allclose(result.state["2.weight"], plain[2].weight.data, 0, 1e-3)


def test_beside_other_heads_and_given_up_on_the_way() -> None:
    linear = HeadJob(LINEAR, TrainingConfig(optimizer="lbfgs"), 0)
    trained = HeadJob(LINEAR, TrainingConfig(epochs=2), 0)
    told: dict[int, int] = {0: 0, 1: 0}

    def tell(number: int, row: dict[str, Any]) -> bool:
        told[number] += 1
        return number == 0 and told[0] == 5

    results = fit_heads(
        [linear, trained], *blobs(90), *blobs(50, 1), data_seed=0, device=CPU, on_epoch=tell
    )
    assert told == {0: 5, 1: 2}
    assert [len(result.history) for result in results] == [5, 2]


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--optimizer: expected adam .* for hidden layers 8,4"):
        HeadJob(HeadConfig(12, 3, hidden=(8, 4)), TrainingConfig(optimizer="lbfgs"), 0)
    labels = np.eye(3, dtype=np.float32)[blobs(90)[1]]
    with pytest.raises(ConfigError, match="expected one class per row, found several labels"):
        fit(rows=(blobs(90)[0], labels), valid=False)
    monkeypatch.setattr("featcache.heads.linear_probe.available_memory", lambda: 16 * 90 * 12 - 1)
    with pytest.raises(ConfigError, match=r"expected .* GB of memory, for all rows in float64"):
        fit()


# --- runs, sweeps, HeadClassifier


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    sizes = {"train": 90, "valid": 50, "test": 40}
    parts = {name: blobs(n, i, "f4") for i, (name, n) in enumerate(sizes.items())}
    write_cache(
        tmp_path / "c.h5", {name: x for name, (x, _) in parts.items()},
        {name: y for name, (_, y) in parts.items()},
        {name: [f"{name}/{i:03d}.png" for i in range(n)] for name, n in sizes.items()},
        classes=["a", "b", "c"],
    )  # fmt: skip
    return tmp_path / "c.h5"


SOLVED: dict[str, Any] = {"hidden": (), "optimizer": "lbfgs", "device": "cpu"}


def test_train_and_sweep_report_the_probe_that_lbfgs_keeps(cache: Path, tmp_path: Path) -> None:
    weighed = {"class_weights": "balanced", "device": "cpu"}
    solved = train(cache, tmp_path / "solved", hidden=(), optimizer="lbfgs", **weighed)
    trained = train(cache, tmp_path / "trained", hidden=(4,), epochs=2, **weighed)
    assert solved.linear_probe is None
    assert trained.linear_probe == {
        name: getattr(solved, name)
        for name in ("strength", "valid_loss", "valid_accuracy", "valid_recall")
    }
    assert trained.valid_loss != solved.valid_loss
    plain = train(cache, tmp_path / "plain", hidden=(), optimizer="lbfgs", device="cpu")
    swept = sweep(cache, tmp_path / "swept", trials=2, device="cpu")
    assert swept.linear_probe is not None
    assert swept.linear_probe["valid_loss"] == plain.valid_loss


def test_the_probe_beside_a_head_ends_half_a_decade_after_the_lowest_loss() -> None:
    rows, held_out = blobs(90), blobs(50, 1)
    whole = [row["valid_loss"] for row in fit().history]
    lowest = int(np.argmin(whole))
    assert lowest + 5 < 65  # or this test shows nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.linear_probe._BLOCK_STRENGTHS", 1)
        calls = list[int]()
        real = SoftmaxRegression.solve
        patch.setattr(SoftmaxRegression, "solve", lambda *given: [calls.append(1), real(*given)][1])
        found = compare_linear_probe(TrainingConfig(), *rows, *held_out, ["a", "b", "c"])
    assert found is not None
    assert found["valid_loss"] == pytest.approx(whole[lowest], rel=1e-5)
    assert len(calls) == lowest + 5


def test_no_probe_of_several_labels_or_of_many_rows() -> None:
    rows, held_out, names = blobs(90), blobs(50, 1), ["a", "b", "c"]
    labels = np.eye(3, dtype=np.float32)
    of_labels = rows[0], labels[rows[1]], held_out[0], labels[held_out[1]]
    assert compare_linear_probe(TrainingConfig(), *of_labels, names) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.fit._PROBE_VALUES", 90 * 3 * (12 + 3) - 1)
        assert compare_linear_probe(TrainingConfig(), *rows, *held_out, names) is None


def test_the_run_tells_path_and_strength(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = train(cache, tmp_path / "r", say=said.append, **SOLVED)
    wanted = fit("f4")
    run = load_run(tmp_path / "r")
    assert all(np.array_equal(run.state[name], wanted.state[name]) for name in wanted.state)
    strength = STRENGTHS[wanted.best_epoch - 1]
    assert summary.strength == summary.as_dict()["strength"] == strength
    assert run.training == {
        "optimizer": "lbfgs", "weight_decay": 0.0, "class_weights": "none", "label_smoothing": 0.0,
        "valid_fraction": None, "strength": strength, "strengths": list(STRENGTHS),
    }  # fmt: skip
    with (tmp_path / "r" / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    assert [float(row["strength"]) for row in history] == list(STRENGTHS)
    assert [row["valid_loss"] for row in history] == [str(r["valid_loss"]) for r in wanted.history]
    assert "lbfgs: solved for, without dropout" in "\n".join(said)
    lines = [line for line in said if re.match(r"\d\.\d\de", line)]
    assert len(lines) == 65
    assert len({len(line.removesuffix("  *")) for line in lines}) == 1  # aligned
    marked = [line for line in lines if line.endswith("*")]
    assert marked[-1].startswith(f"{strength:.2e} ")
    assert said[-2].startswith(f"kept strength {strength:.2e}: valid loss")
    assert not any("converged" in line for line in said)
    assert evaluate(tmp_path / "r")["num_samples"] == 40
    again = train(cache, tmp_path / "s", weight_decay=strength, **SOLVED)
    assert again.valid_loss == pytest.approx(summary.valid_loss, abs=1e-5)


def test_strengths_that_took_too_long_are_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.linear_probe.MAX_ITERATIONS", 2)
    said: list[str] = []
    train(cache, tmp_path / "r", say=said.append, **SOLVED)
    assert any(" of 65 strengths had not converged after " in line for line in said)


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", 0.1), ("schedule", "cosine"), ("batch_size", 64), ("epochs", 20),
     ("patience", 3), ("warmup", 2)],
)  # fmt: skip
def test_options_without_use_are_refused(
    cache: Path, tmp_path: Path, option: str, value: Any
) -> None:
    name = option.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^--{name}: expected none with --optimizer lbfgs"):
        train(cache, tmp_path / "r", **SOLVED, **{option: value})
    with pytest.raises(ConfigError, match="hidden layers 512,128"):
        train(cache, tmp_path / "r", optimizer="lbfgs")
    assert not (tmp_path / "r").exists()


def test_head_classifier_gives_the_weights_of_train(cache: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "r", **SOLVED)
    splits = open_cache(cache).splits
    x, y = (np.asarray(splits["train"].features), splits["train"].targets)
    model = HeadClassifier((), solver="lbfgs", device="cpu", max_epochs=3)
    model.fit(x, y, X_val=splits["valid"].features, y_val=splits["valid"].targets)
    state = model.head_.state_dict()
    assert all(np.array_equal(v, state[k]) for k, v in load_run(tmp_path / "r").state.items())
    assert (model.n_iter_, len(model.history_)) == (65, 65)
    assert model.fit(x, y).history_[0]["strength"] == 1 / 90
    assert HeadClassifier((), solver="lbfgs", weight_decay=0.5).fit(x, y).score(x, y) > 0.5
    with pytest.raises(ValueError, match=r"^solver: expected adam"):
        HeadClassifier((4,), solver="lbfgs").fit(x, y)


def test_a_sweep_may_solve_for_its_trials(cache: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text(
        'hidden = [[]]\noptimizer = ["lbfgs"]\nclass_weights = ["none", "balanced"]\n'
        "label_smoothing = [0.0, 0.1]\n"
    )
    summary = sweep(
        cache, tmp_path / "best", trials=5, sampler="grid", space=space, repeats=2, select="best",
        device="cpu",
    )  # fmt: skip
    with (tmp_path / "best" / "trials.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    assert [row["num_epochs"] for row in trials] == ["10", "65", "65", "65", "65"]
    assert (summary.num_pruned, summary.num_failed) == (0, 0)
    plain = train(cache, tmp_path / "r", **SOLVED)
    (row,) = (
        t for t in trials[1:] if (t["class_weights"], t["label_smoothing"]) == ("none", "0.0")
    )
    assert float(row["score"]) == pytest.approx(plain.valid_loss, rel=1e-12)
    facts = json.loads((tmp_path / "best" / "run.json").read_text())
    assert summary.chosen == facts["training"]["sweep"]["trial"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('optimizer = ["adam", "lbfgs"]\n', "hidden in the space: expected .* lbfgs"),
        ('optimizer = ["adam", "lbfgs"]\nhidden = [[], [8]]\n', "hidden in the space"),
        ('optimizer = ["adam", "lbfgs"]\nhidden = [[]]\nlearning_rate = [0.1, 0.2]\n',
         "no use for, found learning_rate"),
        ("warmup = [2, 5]\nepochs = 5\n", "warmup in the space: expected fewer than the 5 epochs"),
    ],
)  # fmt: skip
def test_spaces_whose_options_do_not_go_together_are_refused(
    tmp_path: Path, text: str, wanted: str
) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=wanted):
        read_space(tmp_path / "s.toml")
