"""evaluate --by: the figures of each subgroup, and what a table may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score

from featcache.cache.writing import write_cache
from featcache.errors import CacheError, ConfigError, DataError
from featcache.evaluation import subgroups
from featcache.evaluation.evaluation import evaluate
from featcache.evaluation.intervals import measure_intervals
from featcache.evaluation.predicted_rows import PredictedRows
from featcache.evaluation.subgroups import measure_subgroups, subgroup_lines
from featcache.heads.training import train
from featcache.metrics.areas import auc_interval
from featcache.metrics.calibration import measure_calibration
from featcache.metrics.rates import grouped_rate_interval, rate_interval


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose test split has 60 rows of two classes, 30 patients, some rows without one."""
    folder, rng = tmp_path_factory.mktemp("by"), np.random.default_rng(0)
    targets = {"train": np.arange(40) % 2, "valid": np.arange(20) % 2, "test": np.arange(60) % 2}
    features = {
        name: (rng.normal(size=(len(t), 4)) + t[:, None]).astype("<f4")
        for name, t in targets.items()
    }
    paths = {name: [f"{name}/{i:02d}.png" for i in range(len(t))] for name, t in targets.items()}
    groups = {name: [f"{name}{i // 2}" for i in range(len(t))] for name, t in targets.items()}
    groups["test"][:4] = [""] * 4
    write_cache(folder / "c.h5", features, targets, paths, groups=groups,
                classes=["covid", "normal"], identity={"backbone": "fake"})  # fmt: skip
    train(folder / "c.h5", folder / "r", hidden=(), epochs=2, device="cpu")
    return folder / "r"


def made_up(groups: bool = True) -> PredictedRows:
    """100 rows of three classes; of "c" there are none among the last 40."""
    rng = np.random.default_rng(1)
    targets = np.concatenate([np.arange(60) % 3, np.arange(40) % 2])
    probs = rng.dirichlet(np.ones(3), 100)
    probs[np.arange(100), targets] += 0.5
    return PredictedRows(
        ("a", "b", "c"), [f"{i}.png" for i in range(100)],
        [f"p{i // 3}" if groups else "" for i in range(100)], targets,
        probs / probs.sum(axis=1, keepdims=True),
    )  # fmt: skip


@pytest.mark.parametrize("groups", [True, False])
def test_figures_are_those_of_the_subgroups_rows_alone(groups: bool) -> None:
    rows = made_up(groups)
    values = ["F"] * 60 + ["M"] * 35 + [None] * 5
    facts = measure_subgroups(rows, "sex", values, "b")
    assert [part["value"] for part in facts["subgroups"]] == ["F", "M", None]
    assert facts["unit"] == ("group" if groups else "image")
    for part, chosen in zip(facts["subgroups"], (slice(60), slice(60, 95)), strict=False):
        targets, preds = rows.targets[chosen], rows.preds[chosen]
        figures, names = part["figures"], np.array(rows.groups[chosen])
        assert figures["accuracy"]["value"] == pytest.approx((targets == preds).mean())
        of_class = targets == 1
        recall = recall_score(targets, preds, labels=[1], average=None)[0]
        assert figures["sensitivity"]["value"] == pytest.approx(recall)
        specificity = (preds != 1)[~of_class].mean()
        assert figures["specificity"]["value"] == pytest.approx(specificity)
        interval = grouped_rate_interval((preds == 1)[of_class], [*names[of_class]])
        assert figures["sensitivity"]["interval"] == pytest.approx(interval)
        area = auc_interval(of_class, rows.probs[chosen, 1], groups=[*names])
        assert figures["positive_roc_auc"]["interval"] == pytest.approx(area)
        assert part["num_positive"] == of_class.sum()
        units = len({*names[of_class]}) if groups else int(of_class.sum())
        assert figures["sensitivity"]["num_units"] == units
        assert "roc_auc" not in figures
    first = facts["subgroups"][0]["figures"]["balanced_accuracy"]
    expected = balanced_accuracy_score(rows.targets[:60], rows.preds[:60])
    assert first["value"] == pytest.approx(expected)


def test_a_figure_of_few_units_or_without_a_class_is_too_few() -> None:
    values = ["F"] * 60 + ["M"] * 31 + ["none"] * 9
    facts = measure_subgroups(made_up(False), "sex", values, None)
    woman, man, nobody = (part["figures"] for part in facts["subgroups"])
    assert not any(figure["too_few"] for figure in woman.values())
    assert man["balanced_accuracy"]["too_few"]  # of "c" there is nobody
    assert man["balanced_accuracy"]["value"] is man["balanced_accuracy"]["interval"] is None
    assert not man["accuracy"]["too_few"]
    assert nobody["accuracy"]["too_few"]
    assert nobody["accuracy"]["num_units"] == 9
    unmeasured = {(figure["value"], figure["interval"]) for figure in nobody.values()}
    assert unmeasured == {(None, None)}
    of_groups = measure_subgroups(made_up(), "sex", values, None)
    assert of_groups["subgroups"][2]["figures"]["accuracy"]["num_units"] == 4
    lines = [*subgroup_lines(facts, None)]
    assert lines[0].startswith("by sex (95 % intervals")
    assert "too few" in lines[3]
    assert lines[-1] == "too few images in 1 subgroup: none (9)"
    assert max(map(len, lines)) <= 80


def test_of_many_subgroups_the_largest_are_shown() -> None:
    rows = made_up(False)
    values = [f"site {min(i // 4, 3)}\x1b" for i in range(100)]
    text = "\n".join(subgroup_lines(measure_subgroups(rows, "site", values, "b"), "b"))
    assert "\x1b" not in text
    assert "too few images in 3 subgroups: site 0\\x1b (4), site 1\\x1b (4)" in text
    long = [f"hospital number {i // 5}" for i in range(100)]
    lines = [*subgroup_lines(measure_subgroups(rows, "site", long, "b"), "b")]
    assert max(map(len, lines)) <= 80
    many = PredictedRows(rows.classes, rows.paths * 5, rows.groups * 5, np.tile(rows.targets, 5),
                         np.tile(rows.probs, (5, 1)))  # fmt: skip
    names = [f"s{min(i // 15, 29):02d}" for i in range(500)]
    lines = [*subgroup_lines(measure_subgroups(many, "site", names, None), None)]
    assert lines[1] == "the 20 largest of 30:"
    assert len(lines) == 23
    assert lines[-1].split()[:2] == ["s29", "65"]


def test_subgroups_below_the_limit_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many groups of a few images each take no minute."""
    sizes: list[int] = []

    def counting(rows: PredictedRows, positive: str | None) -> dict[str, Any]:
        sizes.append(len(rows.targets))
        return measure_intervals(rows, positive)

    monkeypatch.setattr(subgroups, "measure_intervals", counting)
    values = [f"p{i // 4}" if i < 80 else "rest" for i in range(100)]
    facts = measure_subgroups(made_up(False), "group", values, "b")
    assert len(facts["subgroups"]) == 21
    assert sizes == [20]


def test_numbers_are_sorted_by_size_and_what_has_no_value_is_last() -> None:
    values = [None, "100", "20", "9.5", "nan", "old"] * 16 + ["20"] * 4
    facts = measure_subgroups(made_up(), "age", values, None)
    found = [part["value"] for part in facts["subgroups"]]
    assert found == ["9.5", "20", "100", "nan", "old", None]


def test_a_column_of_many_numbers_is_better_in_bins() -> None:
    rows = made_up()
    facts = measure_subgroups(rows, "age", [*(f"{n % 60}.5" for n in range(99)), None], None)
    text = " ".join(map(str.strip, subgroup_lines(facts, None)))
    assert "age has 60 different numbers: name a column of bins instead (such as 0-39," in text
    assert max(map(len, subgroup_lines(facts, None))) <= 80
    for values in ([f"site {n % 60}" for n in range(100)], [f"{n % 4}" for n in range(100)]):
        facts = measure_subgroups(rows, "age", values, None)
        assert "bins" not in " ".join(subgroup_lines(facts, None))


def test_labels_have_subgroups_of_a_positive_class() -> None:
    rng = np.random.default_rng(2)
    targets = rng.integers(0, 2, (40, 2)).astype(float)
    targets[::5, 0] = np.nan
    rows = PredictedRows(("a", "b"), ["x"] * 40, [""] * 40, targets, rng.random((40, 2)))
    (part,) = measure_subgroups(rows, "view", ["PA"] * 40, "a")["subgroups"]
    hits = rows.probs[targets[:, 0] == 1, 0] > 0.5
    figure = part["figures"]["sensitivity"]
    assert figure["interval"] == pytest.approx(rate_interval(int(hits.sum()), len(hits)))
    assert part["num_positive"] == len(hits)
    assert part["figures"]["accuracy"]["interval"] is None


def write_table(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_column_of_a_table_makes_subgroups(run: Path, tmp_path: Path) -> None:
    cells = [f"raw/test/{i:02d}.png,x,{'FM'[i % 3 > 0] if i < 50 else ''}" for i in range(55)]
    table = write_table(tmp_path / "t.csv", ["Image Index,Finding Labels,sex", *cells])
    said: list[str] = []
    options: dict[str, Any] = {"by": "sex", "table": table, "positive": "covid"}
    result = evaluate(run, columns={"path": "Image Index"}, say=said.append, **options)
    assert result.by is not None
    parts = {part["value"]: part for part in result.by["subgroups"]}
    assert [parts[value]["num_samples"] for value in ("F", "M", None)] == [17, 33, 10]
    assert "table: 5 of 60 images are not in it" in said
    assert any("(none) (10)" in line for line in said)
    preds = [row["path"] for row in result.mistakes]
    wrong = sum(int(path[5:7]) % 3 == 0 for path in preds if int(path[5:7]) < 50)
    assert parts["F"]["figures"]["accuracy"]["value"] == pytest.approx(1 - wrong / 17)
    with pytest.raises(
        DataError, match=r"'Image Index' \(path\?\).*--columns 'path=Image Index'\.$"
    ):
        evaluate(run, **options)
    with pytest.raises(DataError, match=r"--by: expected a header of the CSV.*, sex, found 'age'"):
        evaluate(run, by="age", table=table, columns={"path": "Image Index"})
    other = write_table(tmp_path / "o.csv", ["path,sex", "elsewhere/1.png,F"])
    with pytest.raises(DataError, match=r"expected paths of the caches.* found none, but such as"):
        evaluate(run, by="sex", table=other)


def test_groups_of_the_cache_are_subgroups_of_images(run: Path) -> None:
    result = evaluate(run, by="group")
    assert result.by is not None
    assert result.by["unit"] == "image"
    counts = [(part["value"], part["num_samples"]) for part in result.by["subgroups"]]
    assert len(counts) == 29
    assert counts[0] == ("test10", 2)
    assert counts[-1] == (None, 4)
    assert result.as_dict()["by"] == result.by


def test_what_does_not_go_together_is_refused(run: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", ["path,sex", "test/00.png,F"])
    with pytest.raises(
        ConfigError, match=r"--by: expected group, or a column of a CSV .* found sex"
    ):
        evaluate(run, by="sex")
    with pytest.raises(ConfigError, match="--table: expected --by with one of its columns"):
        evaluate(run, table=table)
    with pytest.raises(ConfigError, match="--columns: expected a --table that has them"):
        evaluate(run, by="group", columns={"path": "p"})
    with pytest.raises(ConfigError, match="--columns: expected path=HEADER and no other"):
        evaluate(run, by="sex", table=table, columns={"target": "sex"})
    write_cache(tmp_path / "n.h5", np.ones((4, 4), "<f4"), [0, 1] * 2, list("abcd"),
                classes=["covid", "normal"], identity={"backbone": "fake"})  # fmt: skip
    with pytest.raises(CacheError, match="--by group: expected groups in the cache, found none"):
        evaluate(run, cache=tmp_path / "n.h5", split="all", by="group")


def test_evaluate_tells_how_well_calibrated_the_head_is_and_that_images_are_few(
    run: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    result = evaluate(run, csv=tmp_path / "p.csv", say=said.append)
    table = np.genfromtxt(tmp_path / "p.csv", delimiter=",", names=True, dtype=None, encoding=None)
    probs = np.stack([table["prob_covid"], table["prob_normal"]], axis=1)
    targets = (table["target"] == "normal").astype(int)
    expected = measure_calibration(targets, probs, result.classes)
    assert result.calibration == pytest.approx(expected, abs=1e-6)
    shown = f"log loss {expected['log_loss']:.3f}, Brier score {expected['brier']:.3f}, ECE "
    assert any(line.startswith(f"  calibration        {shown}") for line in said)
    assert result.intervals["few"] == {"class": "covid", "num_samples": 30}
    assert any(line.startswith("few images (30 of covid): with fewer than 100") for line in said)
    assert max(len(line) for line in said if "written to" not in line) <= 80
    assert "of 28 groups and 4 images without one)" in " ".join(map(str.strip, said))
    right = 60 - len(result.mistakes)
    assert any(line.endswith(f"), {right} of 60") for line in said)
    assert result.by is result.against is None
