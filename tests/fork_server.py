"""The fork server of all tests: a process has one, and its first user decides what it has loaded.

Children that are given a memory limit need all libraries loaded before it is set.
"""

from __future__ import annotations

import multiprocessing

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
