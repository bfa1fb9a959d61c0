"""A head computed by NumPy gives the probabilities that torch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_heads import logits_of
from sample_rows import edited, make_cache, rows_of

from featcache.cache.reading import open_cache
from featcache.errors import CacheError
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.prediction import compute_logits, predict_logits, predict_probs
from featcache.heads.streaming import StoredFeatures


def trained_head(config: HeadConfig) -> torch.nn.Sequential:
    """A head whose batch norms have seen rows."""
    head = build_head(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(5):
            head(torch.randn(64, config.num_features, generator=generator) * 2 + 1)
        for layer in head:
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.weight.normal_(1, 0.2, generator=generator)
                layer.bias.normal_(0, 0.2, generator=generator)
    return head.eval()


def state_of(head: torch.nn.Module) -> dict[str, Any]:
    return {name: value.numpy() for name, value in head.state_dict().items()}


@pytest.mark.parametrize("hidden", [(), (16,), (512, 128), (24, 16, 8)])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_probabilities_are_torch_s(hidden: tuple[int, ...], task: str) -> None:
    config = HeadConfig(96, 4, hidden)
    head, rng = trained_head(config), np.random.default_rng(0)
    features = rng.normal(1, 2, (1301, 96)).astype(np.float32)
    with torch.inference_mode():
        logits = head(torch.from_numpy(features)).double()
    wanted = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    probs = predict_probs(config, state_of(head), features, task)
    assert probs.dtype == np.float64
    np.testing.assert_allclose(probs, wanted.numpy(), rtol=0, atol=1e-6)
    views = predict_probs(config, state_of(head), features[:1300].reshape(325, 4, 96), task)
    np.testing.assert_allclose(views, probs[:1300].reshape(325, 4, 4).mean(1), rtol=0, atol=1e-7)
    assert predict_probs(config, state_of(head), features[:0], task).shape == (0, 4)


@pytest.mark.filterwarnings("error")
def test_what_overflows_is_as_in_torch_and_a_very_sure_head_still_ranks() -> None:
    config = HeadConfig(3, 2, ())
    state = state_of(trained_head(config))
    state["2.weight"] = np.array([[2, 0, 0], [0, 2, 0]], np.float32)
    features = np.array([[1, 1, 1], [100, 1, 1], [200, 1, 1]], np.float32)
    falling = predict_probs(config, state, features, "multilabel")[:, 0]
    assert falling[2] == pytest.approx(1)
    rising = predict_probs(config, state, -features)[:, 0]
    assert 0 < rising[2] < rising[1] < rising[0]
    huge = np.full((1, 3), 3e38, np.float32)
    assert not np.isfinite(compute_logits(config, state, huge)).all()


def test_stored_features_give_the_same_as_arrays_and_infinity_is_refused(tmp_path: Path) -> None:
    rows = rows_of("all", [0, 1] * 700, dtype="<f2")
    split = make_cache(tmp_path / "c.h5", all=rows).splits["all"]
    config = HeadConfig(10, 2, (6,))
    state, numbers = state_of(trained_head(config)), np.arange(3, 1303)
    stored = predict_probs(config, state, StoredFeatures(split, numbers))
    assert np.array_equal(stored, predict_probs(config, state, split.features[3:1303]))
    features = np.array(split.features)
    features[777, 1] = np.inf
    make_cache(tmp_path / "bad.h5", all=edited(rows, features=features))
    bad = open_cache(tmp_path / "bad.h5").splits["all"]
    with pytest.raises(CacheError, match="row 777"):
        predict_probs(config, state, StoredFeatures(bad, np.arange(len(bad))))


def test_logits_do_not_depend_on_the_order_of_the_entries() -> None:
    """The first may be the number of batches, which is whole."""
    config = HeadConfig(10, 3, (8,))
    state = state_of(trained_head(config))
    features = np.random.default_rng(0).normal(size=(5, 10)).astype("<f4")
    wanted = predict_logits(config, state, features)
    first = {"0.num_batches_tracked": state["0.num_batches_tracked"]}
    assert np.array_equal(predict_logits(config, first | state, features), wanted)
    assert wanted.dtype == np.float32


def test_logits_are_those_of_the_head_in_its_dtype() -> None:
    config = HeadConfig(12, 3, hidden=(8,))
    head = build_head(config, seed=0).eval()
    features = np.random.default_rng(0).normal(size=(1300, 12)).astype(np.float32)
    for dtype, bound in ((np.float32, 1e-6), (np.float64, 1e-12)):
        state = {n: v.astype(dtype) if v.ndim else v for n, v in state_of(head).items()}
        logits = predict_logits(config, state, features)
        assert (logits.shape, logits.dtype) == ((1300, 3), dtype)
        np.testing.assert_allclose(logits, logits_of(head, features), rtol=0, atol=1e-5)
        wide = build_head(config, seed=0).double()
        np.testing.assert_allclose(logits, logits_of(wide, features), rtol=0, atol=bound)
    assert predict_logits(config, state_of(head), features[:0]).shape == (0, 3)
