"""Networks that amplify rounding: judged by the spread of their library's own fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
import torch
from sample_caches import rewrite
from sample_pixels import CPU, pictures, worst
from torch import nn

from featcache.backbones import forward as forward_module
from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.backbones.engine import build_engine, eager_features, measure_spread
from featcache.cache.precisions import error_bound, read_parities
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.deployment.exporting.export import export
from featcache.errors import BackboneError, CacheError, FeatcacheWarning
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify
from featcache.heads.training import train
from featcache.precision import format_bound, parity_bound


class Amplifying(nn.Module):
    """The tiny network's features, whose rounding is multiplied by about ``factor``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.network = tiny_network.network()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.factor * self.network(images))


NOISY, HOPELESS = 1e5, 1e7  # spreads of 1e-3 and of 0.1


def amplifying(factor: float) -> Backbone:
    return wrap_backbone("noisy", Amplifying(factor), image_size=32)


def spread_of(backbone: Backbone, pixels: Any) -> float:
    """Return the spread by other arithmetic: one batch, normalized before it is in float64."""
    network = copy.deepcopy(backbone.network).double()
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (backbone.mean, backbone.std))
    batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 - mean) / std
    with torch.inference_mode():
        return worst(eager_features(backbone, pixels), network(batch).numpy())


@pytest.mark.parametrize("name", ["onnx", "folded", "eager"])
def test_engines_as_good_as_the_library_are_used(name: str) -> None:
    backbone, pixels = amplifying(NOISY), pictures(6, 32)
    spread = spread_of(backbone, pixels)
    assert 1e-4 < spread < 3e-3
    engine = build_engine(backbone, CPU, pixels, name=name)
    assert engine.name == name
    assert engine.spread is not None
    assert spread <= engine.spread < 3 * spread
    assert 1e-4 < max(engine.parity) <= 3 * engine.spread
    assert "the library's own fp32 is off by" in engine.reason
    assert measure_spread(backbone, pixels, eager_features(backbone, pixels)) >= spread


def test_nothing_is_measured_where_the_usual_bound_is_met(
    monkeypatch: pytest.MonkeyPatch, tiny_backbone: Backbone
) -> None:
    monkeypatch.setattr("featcache.backbones.engine.measure_spread", lambda *_: 1 / 0)
    assert build_engine(tiny_backbone, CPU, pictures(4, 32)).spread is None


@pytest.mark.parametrize(
    ("factor", "name", "precision", "hint"),
    [
        (HOPELESS, "auto", "fp32", "Check the weights: "),
        (HOPELESS, "eager", "fp32", "Check the weights: "),
        (HOPELESS, "folded", "fp32", "Use --engine auto"),
        (HOPELESS, "eager", "bf16", "Use --precision fp32"),
    ],
)
def test_above_the_cap_all_are_refused_with_a_hint_that_is_new(
    factor: float, name: str, precision: str, hint: str
) -> None:
    with (
        pytest.warns(FeatcacheWarning, match="is not used"),
        pytest.raises(BackboneError, match=hint) as caught,
    ):
        build_engine(amplifying(factor), CPU, pictures(4, 32), name=name, precision=precision)
    expected = "within 1e-02" if precision == "fp32" else "within 2e-01"
    assert expected in str(caught.value)
    assert "the library's own fp32 is off by" in str(caught.value)


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Overflowing(nn.Module):
        """Finite on zeros, which is all that is looked at when it is wrapped."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)).exp().exp()

    backbone = wrap_backbone("mine", Overflowing(), image_size=32, mean=(0, 0, 0), std=(0.1,) * 3)
    with (
        pytest.warns(FeatcacheWarning, match="is off by inf"),
        pytest.raises(BackboneError, match="Check the weights"),
    ):
        build_engine(backbone, CPU, pictures(4, 32) | 128, name="eager")


def test_a_wrong_engine_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by ten times the spread."""
    backbone, pixels = amplifying(NOISY), pictures(6, 32)
    real = forward_module.fold

    def broken(network: nn.Module, image_size: int) -> nn.Module:
        folded = real(network, image_size)
        folded.register_forward_hook(lambda _m, _i, output: output * (1 + 10 * spread))
        return folded

    spread = measure_spread(backbone, pixels, eager_features(backbone, pixels))
    monkeypatch.setattr(forward_module, "fold", broken)
    with pytest.warns(FeatcacheWarning, match="folded at fp32 is off by"):
        engine = build_engine(backbone, CPU, pixels, num_images=6)
    assert engine.name == "eager"


def test_networks_that_know_fp32_only_are_compared_with_themselves() -> None:
    class OnlySingle(Amplifying):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.dtype != torch.float32:
                raise TypeError("float32 only")
            return super().forward(images)

    backbone, pixels = wrap_backbone("mine", OnlySingle(NOISY), image_size=32), pictures(6, 32)
    assert 0 < measure_spread(backbone, pixels, eager_features(backbone, pixels)) < 1e-2
    assert build_engine(backbone, CPU, pixels, name="eager").name == "eager"


# ---------------------------------------------------------------------------- recorded in caches


def test_bounds_and_spreads_are_recorded_and_used(tree: Path, tmp_path: Path) -> None:
    backbone = amplifying(NOISY)
    extract(tree, tmp_path / "c.h5", backbone=backbone, engine="folded")
    cache = open_cache(tmp_path / "c.h5")
    spread, bound = (cache.provenance[f"parity_{key}"] for key in ("spread", "bound"))
    assert 1e-4 < spread < 3e-3
    assert bound == parity_bound("fp32", spread) == 3 * spread == error_bound(cache)
    result = verify(cache.path, data=tree, backbone=backbone, samples="all")
    assert result.bound == bound
    assert result.largest_error is not None
    assert 1e-4 < result.largest_error < bound
    features = np.array(cache.splits["test"].features)
    features[3] *= 1 + 3 * bound
    rewrite(cache, {"test": features})
    with pytest.raises(CacheError, match=f"^row 3 of test.* within {format_bound(bound)}"):
        verify(cache.path, data=tree, backbone=backbone, samples="all")


def test_updates_and_selections_keep_the_largest(tree: Path, tmp_path: Path) -> None:
    backbone = amplifying(NOISY)
    first = sorted((tree / "train" / "covid").iterdir())[0]
    hidden = tmp_path / first.name
    first.rename(hidden)
    extract(tree, tmp_path / "c.h5", backbone=backbone, engine="folded")
    before = open_cache(tmp_path / "c.h5").provenance["parity_spread"]
    hidden.rename(first)
    extract(tree, tmp_path / "c.h5", backbone=backbone, engine="folded")
    after = open_cache(tmp_path / "c.h5")
    assert after.provenance["parity_spread"] >= before
    select([after.path], tmp_path / "new.h5", classes=["covid"])
    chosen = open_cache(tmp_path / "new.h5")
    assert error_bound(chosen) == error_bound(after)
    assert read_parities(chosen)["fp32"]["spread"] == after.provenance["parity_spread"]


def test_a_stated_bound_is_believed_up_to_the_cap(tree: Path, tmp_path: Path) -> None:
    extract(tree, tmp_path / "c.h5", backbone=amplifying(NOISY), engine="folded")
    cache = open_cache(tmp_path / "c.h5")
    for stated, used in [(1.0, 1e-2), (1e-9, 1e-4), ("wide", 1e-4), (float("nan"), 1e-4)]:
        cache.provenance["parity_bound"] = stated
        assert error_bound(cache) == used


def test_such_a_network_is_exported(tree: Path, tmp_path: Path) -> None:
    backbone = amplifying(NOISY)
    extract(tree, tmp_path / "c.h5", backbone=backbone)
    train(tmp_path / "c.h5", tmp_path / "run", epochs=1)
    assert export(tmp_path / "run", tmp_path / "n.pt", backbone=backbone).path.exists()
