"""How rows were made, all together, is never told better than it is known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.backbones.engine import Engine
from featcache.cache.precisions import error_bound, known_precision, warn_of_precisions
from featcache.cache.provenance import join_provenances
from featcache.cache.reading import Cache
from featcache.cache.writing import write_cache
from featcache.errors import CacheError, FeatcacheWarning
from featcache.extraction.engine_choice import extend_provenance, warn_of_update

LOST = {"lost": "damaged"}


def cache(folder: Path, provenance: dict[str, Any], dtype: str = "float32") -> Cache:
    return write_cache(
        folder / f"{len(list(folder.iterdir()))}.h5", np.ones((2, 3), dtype), [0, 0], ["a", "b"],
        classes=["x"], provenance=provenance, identity={"feature_dtype": dtype},
    )  # fmt: skip


def engine(precision: str, *parity: float) -> Engine:
    device = torch.device("cpu")
    return Engine(
        "eager", "asked for", device, precision, 4, 1, 3, parity, lambda batch: batch.numpy(),
        lambda: True,
    )  # fmt: skip


def test_parity_bounds_of_known_and_unknown_precisions(tmp_path: Path) -> None:
    for told, known, bound in [
        ({"precision": "bf16"}, "bf16", 2e-1),
        ({}, None, 1e-4),  # made elsewhere
        (LOST, None, 1e-4),
        (LOST | {"precision": "fp16"}, None, 1e-4),  # of the rows that came later only
        (LOST | {"precision": "fp8"}, None, 1e-4),
    ]:
        made = cache(tmp_path, told)
        assert (known_precision(made), error_bound(made)) == (known, bound), told
    assert error_bound(cache(tmp_path, {"precision": "fp16"}, "float16")) == 2e-2 + 5e-4


@pytest.mark.parametrize("odd", ["fp8", ["fp32"], 5])
def test_an_unknown_precision_is_refused(tmp_path: Path, odd: object) -> None:
    with pytest.raises(CacheError, match=r"precision of the cache: expected fp32 or .*, found "):
        error_bound(cache(tmp_path, {"precision": odd}))


def test_errors_of_many_updates_stay_few_and_the_worst_among_them() -> None:
    made: dict[str, Any] = {}

    def update(*errors: float) -> None:
        nonlocal made
        known = {"errors": made.get("parity", []), "num_probed": made.get("num_probed", 0)}
        made = extend_provenance(made, {"fp32": known}, engine("fp32", *errors), "")

    for number in range(20):
        update(*(number + i for i in range(4)))
        assert max(made["parity"]) == number + 3
    update(1e-6)
    assert max(made["parity"]) == 22
    assert (len(made["parity"]), made["num_probed"]) == (9, 81)


def test_errors_of_many_caches_stay_few_and_the_worst_among_them(tmp_path: Path) -> None:
    caches = [cache(tmp_path, {"parity": [n * 1e-6, 1e-9]}) for n in range(12)]
    parity = join_provenances(caches)["parity"]
    assert max(parity) == 11e-6
    assert len(parity) == 8


def test_a_precision_lost_in_a_repair_stays_unknown(tmp_path: Path) -> None:
    """Rows that are added later say nothing of those that were there."""
    with pytest.warns(FeatcacheWarning, match=r"c.h5: nobody knows how .* ones will be at fp16"):
        warn_of_update("c.h5", LOST, [], engine("fp16"))
    updated = cache(tmp_path, extend_provenance(LOST, {}, engine("fp16", 1e-3), "random"))
    assert updated.provenance["precision"] == "fp16"
    assert known_precision(updated) is None
    good = cache(tmp_path, {"precision": "fp32", "parity": [1e-6]})
    joined = cache(tmp_path, join_provenances([good, updated]))
    assert known_precision(joined) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_precisions([good, updated])  # of which only one says anything
        warn_of_update("c.h5", good.provenance, good.parity, engine("fp32"))
