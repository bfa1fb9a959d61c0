"""What strangers wrote is read within stated limits: JSON, names, kinds of files."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_values import BAD_VALUES

from featcache.untrusted import (
    MAX_DEPTH,
    MAX_TEXT,
    find_fault,
    is_within,
    open_regular,
    parse_json,
    parse_json_object,
    reading_hint,
    why_no_file,
)


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_value_that_nothing_can_hold_is_refused_in_one_short_line(name: str) -> None:
    text, message = BAD_VALUES[name]
    for whole in (text, f'{{"a":[1,{text}]}}'):
        for data in (whole, whole.encode()):
            with pytest.raises(ValueError, match=message) as caught:
                parse_json(data)
            assert len(str(caught.value)) < 200
            assert str(caught.value).isprintable()


@pytest.mark.parametrize(("data", "message"), [
    (b'{"a": "\xff"}', "not UTF-8"), (b"\xff\xfe{\0}\0", "not UTF-8"), ("{", "not JSON"),
    ("", "not JSON"), ("{'a': 1}", "not JSON"), ("[1] [2]", "not JSON"), ("[1,]", "not JSON"),
])  # fmt: skip
def test_what_is_no_json_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_an_object_is_asked_for() -> None:
    assert parse_json_object(b'{"a": 1}') == {"a": 1}
    for text in ("[1]", "1", "null", '"a"'):
        with pytest.raises(ValueError, match="a JSON "):
            parse_json_object(text)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_at_the_limits_are_read() -> None:
    for value in (
        (1 << 64) - 1, -(1 << 63), sys.float_info.max, -sys.float_info.max, 5e-324, "x" * MAX_TEXT,
        nested(MAX_DEPTH), "caf\udce9", "\udc80\udcff", "\U0001f600", {"\udcff": None}, True,
    ):  # fmt: skip
        assert parse_json(json.dumps(value)) == value


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")),
                      inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(deadline=None)
@given(values)
def test_everything_within_the_limits_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_whatever_the_bytes_it_is_a_value_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        json.dumps(parse_json(data), allow_nan=False)


@settings(deadline=None)
@given(st.text(st.characters(categories=("Cs", "Lu", "Cc"))))
def test_a_name_without_fault_can_be_stored_and_a_classs_written(name: str) -> None:
    if find_fault(name) is None:
        assert name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") or True
        assert "\0" not in name
    if find_fault(name, is_class=True) is None:
        assert name.encode().decode() == name


def test_names_that_are_not_utf8_are_fit_for_images_and_not_for_classes() -> None:
    assert find_fault("caf\udce9") is None
    assert "not UTF-8" in str(find_fault("caf\udce9", is_class=True))
    for name in ("\ud800", "a\udfff", "\udc7f", "\udd00", "a\0", "x" * (MAX_TEXT + 1)):
        assert find_fault(name)
        assert find_fault(name, is_class=True)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "loop", "a", "to_pipe", "device"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(tmp_path / name)
        assert why_no_file(tmp_path / name) == "not a regular file"
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    assert why_no_file(tmp_path / "none") == "no such file"
    with pytest.raises(OSError, match="no file can have"):
        open_regular(tmp_path / "a\0b")
    assert why_no_file(tmp_path / "a\0b") == "a name that no file can have"
    (tmp_path / "file").write_bytes(b"abc")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"
        assert math.isfinite(os.fstat(file.fileno()).st_size)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM])
def test_what_may_pass_is_tried_again_before_anything_is_given_up(code: int) -> None:
    hint = reading_hint(OSError(code, os.strerror(code)), "Begin anew with --overwrite")
    assert hint.startswith("Run the same command again. If that does not help, begin anew with")


def test_what_will_not_pass_is_not_tried_again() -> None:
    assert reading_hint(FileNotFoundError(errno.ENOENT, "none"), "Make it") == "Make it"
    assert reading_hint(PermissionError(errno.EACCES, "no"), "Remove it") == "Check its permissions"


def test_a_place_in_a_folder_is_found_by_links_and_in_another_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder / "deep")
    for inside in (folder, folder / "c.h5", tmp_path / "link" / "no" / "c.h5"):
        assert is_within(inside, folder)
    for outside in (tmp_path, tmp_path / "data2" / "c.h5", tmp_path / "DATA" / "c.h5"):
        assert not is_within(outside, folder)
    real = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        """As where DATA and data are one."""
        return real(Path(str(path).replace("DATA", "data")), **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert is_within(tmp_path / "DATA" / "c.h5", folder)
    assert not is_within(tmp_path / "DATA2" / "c.h5", folder)
