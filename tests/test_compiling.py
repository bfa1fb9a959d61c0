"""What Numba compiles is kept on the disk where there is a place, used only while true."""

import os
from pathlib import Path

import numba
import pytest
from fork_server import run_code

import featcache
from featcache.compiling import compiled

PACKAGE = Path(featcache.__file__).parent


def test_what_cannot_be_kept_on_the_disk_is_compiled_all_the_same():
    """Numba finds no place for what has no file, as it finds none without a cache folder."""
    space = {}
    exec("def double(x): return 2 * x", space)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit("int64(int64)", cache=True)(space["double"])
    assert compiled("int64(int64)")(space["double"])(21) == 42


def test_code_kept_of_other_sources_is_not_used(tmp_path):
    """Numba alone takes it, of a part from another file, or of a file of the same size and time."""
    factors = tmp_path / "factors.py"
    (tmp_path / "work.py").write_text(
        "import factors\nfrom factors import scale\nfrom featcache.compiling import compiled\n"
        "@compiled('int64(int64)', factors)\ndef run(x): return scale(x)\n"
        "print(run(7), sum(run.stats.cache_hits.values()))\n"
    )

    def run(factor: int) -> str:
        factors.write_text(
            f"from featcache.compiling import part\n@part\ndef scale(x): return x * {factor}\n"
        )
        os.utime(factors, (1e9, 1e9))
        # Without Python's own bytecode, which is taken by time and size.
        code = "import sys; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1])"
        done = run_code(f"{code}; import work", tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [run(2), run(2), run(3), run(2)] == ["14 0", "14 1", "21 0", "14 1"]
