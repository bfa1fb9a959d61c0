"""Images are classified in a process that was forked from one that had done so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TESTS

_FORKED = """
import os, signal, sys
import featcache, tiny_network
backbone = tiny_network.build()
files = sorted(sys.argv[1:])
featcache.extract("data", "c.h5", backbone=backbone)
featcache.train("c.h5", "run", epochs=1)
before = featcache.predict("run", files, backbone=backbone)
child = os.fork()
if child == 0:
    signal.alarm(300)  # where it hangs
    after = featcache.predict("run", files, backbone=backbone)
    assert after.paths == before.paths
    assert abs(after.probs - before.probs).max() < 1e-5
    featcache.extract("data", "again.h5", backbone=backbone)
    one, again = (featcache.open_cache(name).split("test") for name in ("c.h5", "again.h5"))
    assert abs(one.read_features() - again.read_features()).max() < 1e-4
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_predicts_and_extracts(tree: Path, tmp_path: Path) -> None:
    files = [str(file) for file in (tree / "test").rglob("*") if file.is_file()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    environment["OMP_NUM_THREADS"] = "2"  # with one there is nothing to wait for
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKED, *files], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != -signal.SIGALRM, "it hangs"
    assert (done.returncode, done.stderr) == (0, "")
