"""Frozen in fact: a network that changes itself is refused, and its rows are never kept."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
import torch
from sample_images import write_image

from featcache.backbones.backbone import Backbone, build_backbone, state_sha256, wrap_backbone
from featcache.errors import BackboneError
from featcache.extraction import work
from featcache.extraction.extraction import extract
from featcache.extraction.manifest import Receipt
from featcache.extraction.partial_cache import PartialCache


@pytest.mark.parametrize("name", ["efficientnet-b0", "timm:test_resnet"])
def test_the_backbone_is_frozen_even_if_it_comes_in_train_mode(
    name: str, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    for i in range(3):
        write_image(tmp_path / "data" / f"{i}.png", i)
    backbone = build_backbone(name, weights="random", image_size=64)
    backbone.network.train()
    before = state_sha256(backbone.network)
    first = extract(tmp_path / "data", tmp_path / "a.h5", backbone=backbone, batch_size=2)
    assert state_sha256(backbone.network) == before == backbone.weights_sha256
    backbone.network.train()
    second = extract(tmp_path / "data", tmp_path / "b.h5", backbone=backbone, batch_size=2)
    assert first.content_sha256 == second.content_sha256


class _Drifting(torch.nn.Module):
    """Counts its forward passes in a buffer: not frozen, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return images.mean((2, 3))


def test_a_network_that_changes_itself_is_refused(tree: Path, tmp_path: Path) -> None:
    backbone = wrap_backbone("drifting", _Drifting(), image_size=32)
    with pytest.raises(BackboneError, match=r"frozen backbone"):
        extract(tree, tmp_path / "c.h5", backbone=backbone)
    with pytest.raises(BackboneError, match=r"frozen backbone"):  # nor from what is left behind
        extract(tree, tmp_path / "c.h5", backbone=backbone)
    assert list(tmp_path.iterdir()) == [tree]


def test_a_network_that_changes_itself_late_is_refused_again_and_again(
    tree: Path, tmp_path: Path
) -> None:
    """After the probes, when rows have been made: they must not be found by the next run."""

    class Late(torch.nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.num_calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.num_calls += 1
            if self.num_calls > 20:
                self.calls += 1e-9
            return images.mean((2, 3)) + self.calls

    for _ in range(2):
        backbone = wrap_backbone("late", Late(), image_size=32)
        with pytest.raises(BackboneError, match=r"frozen backbone"):
            extract(tree, tmp_path / "c.h5", backbone=backbone, engine="eager", batch_size=1)
    assert list(tmp_path.iterdir()) == [tree]


class _Drifts(torch.nn.Module):
    """Adds 1,000 to every feature after so many calls; calls ``then`` a little later."""

    shift: torch.Tensor

    def __init__(self, steady: int, then: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.steady, self.then, self.num_calls = steady, then, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        if self.num_calls > self.steady:
            self.shift.fill_(1000.0)
        if self.num_calls == self.steady + 3 and self.then is not None:
            self.then()
        return images.mean((2, 3)) + self.shift


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupted_run_keeps_no_rows_of_a_network_that_changed(
    tree: Path, tmp_path: Path
) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    backbone = wrap_backbone("drifts", _Drifts(20, interrupt), image_size=32)
    with pytest.raises((BackboneError, KeyboardInterrupt), match=r"frozen backbone"):
        extract(tree, tmp_path / "c.h5", backbone=backbone, engine="eager", batch_size=1)
    assert list(tmp_path.iterdir()) == [tree]


def test_no_shard_of_a_network_that_changed_is_ever_listed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a kill after it would leave rows behind that the next run takes for good."""
    listed: list[float] = []
    inner = PartialCache.add_shard

    def add_shard(self: PartialCache, receipt: Receipt) -> Any:
        vectors = inner(self, receipt)
        reader = vectors()
        features = reader.take(np.arange(reader.shape[0]))
        listed.extend(np.abs(features).max(axis=1).tolist())
        return vectors

    monkeypatch.setattr(PartialCache, "add_shard", add_shard)
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 1, 3))
    backbone = wrap_backbone("drifts", _Drifts(20), image_size=32)
    with pytest.raises(BackboneError, match=r"frozen backbone"):
        extract(tree, tmp_path / "c.h5", backbone=backbone, engine="eager", batch_size=1)
    assert listed
    assert max(listed) < 100
    assert list(tmp_path.iterdir()) == [tree]


def test_features_that_overflow_float16_are_refused(tree: Path, tmp_path: Path) -> None:
    class Huge(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) * 1e6 + 1e6

    backbone = wrap_backbone("huge", Huge(), image_size=32)
    with pytest.raises(BackboneError, match=r"finite float16.*--feature-dtype float32"):
        extract(tree, tmp_path / "c.h5", backbone=backbone, feature_dtype="float16")
