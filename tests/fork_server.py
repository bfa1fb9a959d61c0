"""The fork server of all tests: a process has one, and its first user decides what it has loaded.

Children that are given a memory limit need all libraries loaded before it is set.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_WARM = [
    "featcache.cli.main", "featcache.extraction.extraction", "featcache.extraction.verification",
    "featcache.heads.training",
    "featcache.evaluation.evaluation", "featcache.deployment.classifier",
    "featcache.data.splitting", "featcache.cli.wording",
    "onnxruntime", "torch.hub", "torchvision", "sklearn.metrics", "pytest",
    "safetensors.numpy", "safetensors.torch",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "featcache.pixels.kernels", "numba",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(_WARM)


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -c CODE ARGUMENTS`` in a child of the server, where all is imported already.

    For code that needs a process of its own, but not to see what it imports, nor the
    interpreter's end: an import of torch is two seconds of computing, a fork 30 ms.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = [str(argument) for argument in arguments]
        child = CONTEXT.Process(target=_run, args=(code, texts, folder))
        child.start()
        child.join()
        out, err = (Path(folder, name).read_text("utf-8") for name in ("out", "err"))
    assert child.exitcode is not None
    return subprocess.CompletedProcess(texts, child.exitcode, out, err)


def _run(code: str, arguments: list[str], folder: str) -> None:
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), handle)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
