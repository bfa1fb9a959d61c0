"""How much memory a process may take: what the system and its control groups allow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from featcache.memory import _limits_of_groups


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_limits_of_control_groups_are_read(tmp_path: Path) -> None:
    for folder, names in (
        (tmp_path, ("memory.max", "memory.current")),
        (tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        folder.mkdir(exist_ok=True)
        for name, text in zip((*names, "memory.stat"), ("1000", "600", "inactive_file 50\nx 7\n"),
                              strict=True):  # fmt: skip
            (folder / name).write_text(text)
    assert set(_limits_of_groups(tmp_path)) == {450}
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "memory" / "memory.limit_in_bytes").unlink()
    assert list(_limits_of_groups(tmp_path)) == []
