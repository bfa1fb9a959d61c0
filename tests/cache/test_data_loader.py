"""A split of a cache in torch's ``DataLoader``, whenever torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sample_rows import make_cache

_LOAD = """
import sys
{first}
import featcache
split = featcache.open_cache(sys.argv[1]).split("train")
assert {is_loaded} == ("torch" in sys.modules)
{then}
from torch.utils.data import DataLoader

def main():
    options = dict(num_workers={workers}, multiprocessing_context={context})
    loader = DataLoader(split, batch_size=8, **options)
    batches = [(features.sum().item(), targets.tolist()) for features, targets in loader]
    assert [t for _, targets in batches for t in targets] == split.targets.tolist()
    total = sum(value for value, _ in batches)
    assert abs(total - float(split.features.sum(dtype="f8"))) < 1e-3
    print("whole")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("workers", "torch_first"), [(0, True), (1, False)])
def test_a_split_is_a_map_style_dataset(tmp_path: Path, workers: int, torch_first: bool) -> None:
    cache = make_cache(tmp_path / "c.h5")
    script = tmp_path / "load.py"
    script.write_text(
        _LOAD.format(
            first="import torch" if torch_first else "", is_loaded=torch_first,
            then="" if torch_first else "import torch", workers=workers,
            context="'spawn'" if workers else None,
        )
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, script, cache.path], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["whole"], done.stderr
