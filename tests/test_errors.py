from __future__ import annotations

import multiprocessing
import pickle
import sys
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from featcache.errors import (
    BackboneError,
    CacheError,
    ConfigError,
    DataError,
    FeatcacheError,
    FeatcacheWarning,
    RunError,
    escaped,
    printable,
)

KINDS = [FeatcacheError, DataError, BackboneError, CacheError, RunError, ConfigError]

NASTY = {
    "escape": "\x1b[2Jwiped",
    "operating system command": "\x1b]0;title\x07",
    "nul": "a\0b",
    "newline": "a\nfeatcache: all is well",
    "carriage return": "bad\rgood",
    "tab": "a\tb",
    "delete": "a\x7f",
    "one-byte csi": "a\x9b31m",
    "next line": "a\x85b",
    "right-to-left override": "gpj.\u202eexe",
    "isolate": "a\u2066b",
    "zero width": "a\u200bb",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "byte order mark": "\ufeffa",
    "private use": "a\ue000b",
    "undecodable byte": "bad\udcff.png",
}


def raise_data_error(path: str) -> None:
    raise DataError("image", expected="a picture", found="text", where=Path(path), hint="Look")


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_says_what_was_expected_found_where_and_what_to_do(kind: type) -> None:
    error = kind("split", expected="train", found="trian", where=Path("d/x"), hint="Rename it")
    assert str(error) == f"split: expected train, found trian ({Path('d/x')}). Rename it."
    assert isinstance(error, FeatcacheError)
    assert isinstance(error, Exception)


def test_a_message_without_place_or_advice_is_still_a_sentence() -> None:
    assert str(CacheError("cache", expected=1, found=2)) == "cache: expected 1, found 2."
    with_stop = CacheError("cache", expected=1, found=2, hint="Make it again.")
    assert str(with_stop) == "cache: expected 1, found 2. Make it again."


def test_an_empty_place_is_still_a_place() -> None:
    assert str(CacheError("key", expected=1, found=2, where="")) == "key: expected 1, found 2 ()."


def test_the_kinds_are_siblings_so_that_catching_one_catches_no_other() -> None:
    for kind in KINDS[1:]:
        assert [k for k in KINDS if issubclass(kind, k)] == [FeatcacheError, kind]
    assert issubclass(FeatcacheWarning, UserWarning)
    assert not issubclass(FeatcacheWarning, FeatcacheError)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [Path("a/b"), "key", None, 3])
def test_pickling_keeps_kind_message_and_parts(kind: type, where: object) -> None:
    error = kind("x", expected=("a", 1), found=None, where=where, hint="Do it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.what, again.expected, again.found, again.hint) == ("x", ("a", 1), None, "Do it")
    assert str(again.where) == str(where)


def test_an_error_crosses_a_real_process_border() -> None:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(DataError, match=r"^image: expected a picture, found text \(.*\)\. Look\.$"),
    ):
        pool.submit(raise_data_error, "a/b.png").result()


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_names_of_strangers_cannot_command_a_terminal_or_fake_a_line(text: str) -> None:
    error = DataError(text, expected=text, found=text, where=text, hint=text)
    for shown in (printable(text), str(error)):
        assert shown.isprintable()
        assert len(shown.splitlines()) == 1
        shown.encode("utf-8")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_escapes_name_the_character() -> None:
    assert printable("a\x1b[0m\n\u202e\udcff\u2028") == r"a\x1b[0m\n\u202e\udcff\u2028"


@pytest.mark.parametrize("text", ["Röntgen 1/ä.png", "肺炎 (2).jpg", "😀", "a b\u00a0c", ""])
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


def test_no_character_of_unicode_that_can_steer_output_survives() -> None:
    shown = printable("".join(map(chr, range(sys.maxunicode + 1))))
    left = {unicodedata.category(char) for char in set(shown)}
    assert left.isdisjoint({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})


def test_printable_takes_anything() -> None:
    assert printable(Path("a")) == "a"
    assert printable(3) == "3"
    assert printable(None) == "None"


def test_a_long_name_is_shortened_and_both_ends_are_there() -> None:
    name = "a" * 150_000 + "\x1b[31m" + "z" * 50_000
    for text in (printable(name), str(DataError(name, expected=1, found=2))):
        assert len(text) < 450
        assert text.startswith("a" * 300 + "...zzz")
    assert printable("x" * 403) == "x" * 403
    assert len(printable("x" * 404)) == 403
    assert len(printable("\x1b" * 10**6)) < 2000


def test_each_part_of_a_message_is_shortened_alone() -> None:
    long = "n" * 10_000
    text = str(
        DataError(long, expected=long, found=long, where=long, hint="Do " + "this " * 200 + "now")
    )
    assert len(text) < 4 * 410 + 1100
    for part in (": expected ", ", found ", " (", "this now."):
        assert part in text
    error = DataError("a", expected=1, found=long)
    assert error.found == long


def test_a_whole_text_is_escaped_and_kept() -> None:
    assert escaped("a\x1b" * 1000) == "a\\x1b" * 1000
