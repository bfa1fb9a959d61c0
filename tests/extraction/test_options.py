"""The options of an extraction: all keywords of ``extract``, checked before anything is done."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import tiny_network

from featcache.errors import ConfigError, FeatcacheWarning
from featcache.extraction.extraction import extract, plan
from featcache.extraction.options import ExtractionOptions, ExtractKeywords, parse_max_errors


def test_the_keywords_of_extract_are_those_of_the_options() -> None:
    """As they are listed for people, for type checkers and within the package."""
    signature = inspect.signature(extract)
    options = {field.name: field.default for field in dataclasses.fields(ExtractionOptions)}
    given = {name: p.default for name, p in signature.parameters.items()}
    assert {name: given[name] for name in options} == options
    assert [name for name in given if name not in options] == ["data", "cache", "backbone"]
    for_checkers = ExtractKeywords.__annotations__
    assert [*for_checkers] == [n for n in given if n not in {"image_size", *[*given][:3]}]
    for name, annotation in for_checkers.items():
        # as a string: the module's annotations are
        assert annotation.__forward_arg__ == signature.parameters[name].annotation
    overloads = [inspect.signature(listed) for listed in typing.get_overloads(extract)]
    assert len(overloads) == 3  # of one backbone, of several, of several sizes
    for listed in overloads:
        assert [*listed.parameters] == ["data", "cache", "backbone", "image_size", "options"]


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0", 0), (7, 7), ("100%", 1.0)])
def test_max_errors_is_a_count_or_a_share(text: str | int, value: float) -> None:
    assert parse_max_errors(text) == value


@pytest.mark.parametrize("text", ["-1", "101%", "many", "5.5", "%"])
def test_max_errors_refuses_the_rest(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-errors"):
        parse_max_errors(text)


@pytest.mark.parametrize("odd", [{"workers": 0}, {"max_errors": "many"}])
def test_bad_values_are_told_before_anything_is_done(
    tmp_path: Path, odd: dict[str, object]
) -> None:
    for verb in (extract, plan):
        with pytest.raises(ConfigError, match=r"--(workers|max-errors)"):
            verb(tmp_path / "nowhere", tmp_path / "c.h5", backbone="nothing", **odd)


def test_a_warning_points_at_the_line_that_called_the_verb(tree: Path, tmp_path: Path) -> None:
    next((tree / "train" / "covid").iterdir()).write_bytes(b"broken")
    with pytest.warns(FeatcacheWarning, match="1 image could not be read and is") as warned:
        extract(tree, tmp_path / "c.h5", backbone=tiny_network.build())
    assert [warning.filename for warning in warned] == [__file__]
