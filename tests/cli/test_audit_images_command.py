"""audit --data and --blackout on the command line: one line for bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, assert_one_line_error
from sample_images import write_tree


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import featcache

    folder = tmp_path_factory.mktemp("audit")
    write_tree(folder / "data", {"train": 6, "test": 2})
    featcache.extract(
        folder / "data", folder / "c.h5", backbone=TINY[1], say=lambda _: None, progress=False
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--blackout", "0.6"), "the images, by --data DATA"),
        (("--data", "data", "--blackout", "1.2"), "between 0 and 1, found 1.2"),
        (("--data", "data", "--blackout", "0.6,nan"), "found 0.6, nan"),
        (("--data", "data", "--blackout", "0.6"), "your word that its code may run"),
        (("--data", "data/train"), "none of 16 with the same name"),
        (("--data", "nowhere"), "found nothing there"),
        (("--weights", "w.pt"), "--blackout or --evidence beside it"),
        (("--evidence",), "the images, by --data DATA"),
        (("--data", "data", "--evidence"), "your word that its code may run"),
    ],
)
def test_bad_input_gets_one_line(
    extracted: Path, run: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...],
    part: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(extracted)
    assert_one_line_error(run("audit", "c.h5", *arguments), part)


def test_shares_that_are_no_numbers_are_wrong_usage(extracted: Path, run: Any) -> None:
    result = run("audit", extracted / "c.h5", "--data", extracted / "data", "--blackout", "half")
    assert (result.code, "Traceback" in result.err) == (2, False)


def test_data_and_blackout_are_told_as_json(extracted: Path, run: Any) -> None:
    result = run(
        "audit", extracted / "c.h5", "--data", extracted / "data", "--blackout", "0.6,0.8",
        *TINY, "--only", "same", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert '"num_read": 16' in result.out
    assert '"blackout": {"sentence": "not measured: a class has 6 labelled rows' in result.out
