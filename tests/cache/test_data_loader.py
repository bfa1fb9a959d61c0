"""A split of a cache in torch's ``DataLoader``, whenever torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sample_rows import make_cache
from torch.utils.data import DataLoader

_LOAD = """
import sys
import featcache
split = featcache.open_cache(sys.argv[1]).split("train")
assert "torch" not in sys.modules
from torch.utils.data import DataLoader

def main():
    loader = DataLoader(split, batch_size=8, num_workers=1, multiprocessing_context="spawn")
    batches = [(features.sum().item(), targets.tolist()) for features, targets in loader]
    assert [t for _, targets in batches for t in targets] == split.targets.tolist()
    total = sum(value for value, _ in batches)
    assert abs(total - float(split.features.sum(dtype="f8"))) < 1e-3
    print("whole")

if __name__ == "__main__":
    main()
"""


def test_a_split_is_a_map_style_dataset(tmp_path: Path) -> None:
    split = make_cache(tmp_path / "c.h5").split("train")
    assert "torch" in sys.modules
    loader: DataLoader[Any] = DataLoader(split, batch_size=8)
    batches = list(loader)
    assert torch.cat([targets for _, targets in batches]).tolist() == split.targets.tolist()
    assert np.array_equal(torch.cat([features for features, _ in batches]), split.features)


def test_a_split_opened_before_torch_is_one_too_and_workers_load_it(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.h5")
    script = tmp_path / "load.py"
    script.write_text(_LOAD)
    done = subprocess.run(
        [sys.executable, script, cache.path], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["whole"], done.stderr
