from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import ConfigError
from featcache.heads.config import TrainingConfig
from featcache.heads.head import HeadConfig
from featcache.sweeps.space import (
    DEFAULTS,
    Dimension,
    Space,
    build_configs,
    default_space,
    params_from_json,
    read_space,
)

EXAMPLE = """
hidden = [[512, 128], [256], []]
learning_rate = { low = 1e-5, high = 1e-2, log = true }
dropout = { low = 0.0, high = 0.6, num = 4 }
batch_size = { low = 16, high = 64, log = true }
epochs = 20
"""


def written(folder: Path, text: str) -> Path:
    (folder / "space.toml").write_text(text, "utf-8")
    return folder / "space.toml"


def test_no_options_are_the_defaults_of_train() -> None:
    assert build_configs({}, 5, 3) == (HeadConfig(5, 3), TrainingConfig())
    assert build_configs(DEFAULTS, 5, 3) == (HeadConfig(5, 3), TrainingConfig())


def test_the_example_of_the_help_is_read(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, EXAMPLE))
    assert space.fixed == {"epochs": 20}
    assert [d.name for d in space.dimensions] == [
        "hidden", "dropout", "learning_rate", "batch_size"
    ]  # fmt: skip
    assert space.dimensions[0].choices == ((512, 128), (256,), ())
    assert space.dimensions[1].grid() == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert space.dimensions[3].grid() == [16, 32, 64]
    assert space.num_points() == len(space.grid()) == 3 * 3 * 4 * 3
    assert all(point["epochs"] == 20 for point in space.grid())
    assert len({tuple(point.items()) for point in space.grid()}) == space.num_points()


def test_as_json_is_a_space_file_again(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, EXAMPLE + 'class_weights = ["none", "balanced"]\n'))
    fixed_hidden = Space(space.dimensions[1:], {"hidden": (8,)})
    for one in (space, fixed_hidden):
        lines = []
        for name, value in one.as_json().items():
            if isinstance(value, dict):
                text = ", ".join(f"{k} = {str(v).lower()}" for k, v in value.items())
                lines.append(f"{name} = {{ {text} }}")
            else:
                lines.append(f"{name} = {str(value).replace(chr(39), chr(34))}")
        again = read_space(written(tmp_path, "\n".join(lines)))
        assert again.fixed == one.fixed
        assert again.dimensions == one.dimensions


def test_draws_lie_inside_and_fill_the_space() -> None:
    space = default_space(3000)
    draws = [space.draw(1, number) for number in range(400)]
    for dimension in space.dimensions:
        values = [draw[dimension.name] for draw in draws]
        if dimension.choices:
            counts = [values.count(choice) for choice in dimension.choices]
            assert sum(counts) == 400
            assert min(counts) > 400 / len(counts) / 2
        else:
            assert dimension.low <= min(values) <= max(values) <= dimension.high
            shares = np.log(values) if dimension.log else np.array(values)
            ends = (dimension.low, dimension.high)
            low, high = np.log(ends) if dimension.log else ends
            quarters = np.histogram(shares, bins=4, range=(low, high))[0]
            assert quarters.min() > 60
    pairs = [(draw["dropout"], math.log(draw["learning_rate"])) for draw in draws]
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.15, "options are drawn independently"
    for draw in draws:
        build_configs(draw, 5, 2)


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    space = default_space(100)
    assert space.draw(3, 7) == space.draw(3, 7)
    assert space.draw(3, 7) != space.draw(3, 8)
    assert space.draw(3, 7) != space.draw(4, 7)


def test_ends_of_a_range_are_reached_and_not_passed() -> None:
    rate = Dimension("learning_rate", low=1e-5, high=1e-2, log=True)
    assert rate.at(0) == 1e-5
    assert rate.at(1) == 1e-2
    size = Dimension("batch_size", low=2, high=5)
    assert {size.at(i / 99) for i in range(100)} == {2, 3, 4, 5}
    assert all(type(size.at(i / 9)) is int for i in range(10))


def test_whole_numbers_of_a_range_are_equally_likely() -> None:
    epochs = Dimension("epochs", low=2, high=5)
    drawn = [epochs.draw((i + 0.5) / 4000) for i in range(4000)]
    assert [drawn.count(value) for value in (2, 3, 4, 5)] == [1000] * 4
    sizes = Dimension("batch_size", low=2, high=7, log=True)
    drawn = [sizes.draw((i + 0.5) / 4000) for i in range(4000)]
    assert sorted({*drawn}) == [2, 3, 4, 5, 6, 7]
    for value in range(2, 8):  # by the logarithm: 2 and 3 together as likely as 4 to 7
        share = math.log((value + 1) / value) / math.log(8 / 2)
        assert drawn.count(value) == pytest.approx(4000 * share, abs=1)
    assert all(type(value) is int for value in drawn)


def test_the_default_batch_sizes_follow_the_rows() -> None:
    sizes = {d.name: d.choices for d in default_space(100_000).dimensions}["batch_size"]
    assert sizes == (512, 1024, 2048, 4096)
    assert {d.name: d.choices for d in default_space(200).dimensions}["batch_size"][0] == 16


def test_options_survive_json() -> None:
    assert params_from_json({"epochs": 3, "hidden": [8]}) == {"hidden": (8,), "epochs": 3}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "expected an option of several values, found an empty file"),
        ("epochs = 3", "expected an option of several values, found one value each"),
        ("hiden = [[1], [2]]", r"expected options out of hidden, dropout, .*, found hiden"),
        ("hidden = [512, 128]", r"hidden .*expected a list of lists, such as \[\[512"),
        ("hidden = [[512], [0]]", "hidden .*expected a whole number from 1"),
        ("hidden = [[[5]], []]", "hidden .*expected (a whole number|single values)"),
        ("dropout = [0.1, 1.5]", "dropout .*expected a number from 0 to below 1, found 1.5"),
        ("dropout = [0.1, nan]", "dropout .*expected a number"),
        ("dropout = [0.1, 0.1]", "dropout .*expected values, each once"),
        ("dropout = []", "dropout .*expected values, each once"),
        ("learning_rate = { low = 0.0, high = 1.0, log = true }", "expected a number above 0"),
        ("weight_decay = { low = 0.0, high = 1.0, log = true }", "both above 0 for log"),
        ("weight_decay = { low = 1.0, high = 0.5 }", "expected low below high"),
        ("weight_decay = { low = 0.0, high = inf }", "expected a number from 0"),
        ("weight_decay = { low = 0.0 }", "expected low and high, numbers"),
        ("weight_decay = { low = 0.0, high = 1.0, step = 2 }", "if need be log and num"),
        ("weight_decay = { low = 0.0, high = 1.0, num = 1 }", "num a whole number from 2"),
        ("batch_size = { low = 1, high = 8 }", "expected auto or a whole number from 2"),
        ("batch_size = { low = 2.5, high = 8 }", "low and high, whole numbers"),
        ("optimizer = { low = 0, high = 1 }", "optimizer .*expected a list of its values"),
        ('optimizer = ["adam", "lamb"]', "optimizer .*found 'lamb'"),
        ('schedule = ["constant", ["cosine"]]', "schedule .*expected"),
        ("dropout = [", "--space: expected TOML"),
        ("dropout = [0.1, true]", "dropout .*expected a number"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, text: str, wanted: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=wanted) as caught:
        read_space(file)
    assert "\n" not in str(caught.value)
    assert "space.toml" in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.toml", "folder", "bytes.toml"):
        with pytest.raises(ConfigError, match="--space: expected"):
            read_space(tmp_path / name)


def test_the_guide_shows_a_space_that_works(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "featcache/heads/README.md").read_text("utf-8")
    found: list[Any] = []
    for block in text.split("```toml\n")[1:]:
        shown = block.split("```")[0]
        found.append(tomllib.loads(shown))
        read_space(written(tmp_path, shown))
    assert len(found) == 1
