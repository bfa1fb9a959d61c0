"""Networks of torchxrayvision against the library's own preprocessing and features."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featcache.backbones.backbone import build_backbone
from featcache.cache.provenance import training_data_note
from featcache.cli.wording import facts_lines
from featcache.errors import BackboneError

NAMES = ["densenet121-res224-all", "densenet121-res224-nih", "resnet50-res512-all", "all"]
has_library = importlib.util.find_spec("torchxrayvision") is not None


class Small(nn.Module):
    """Stands for ``xrv.models.DenseNet``, which has these names and sees one channel."""

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        if weights is not None:
            sys.stdout.write("Downloading weights...\n")
            raise ConnectionError("no way there")
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
        self.classifier = nn.Linear(6, 18)
        self.register_buffer("op_threshs", None)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the place of the library, which is large and seldom there."""
    models = types.ModuleType("torchxrayvision.models")
    facts = {"input_resolution": 64, "weights_url": "https://there/a-best.pt"}
    models.model_urls = dict.fromkeys(NAMES, facts)  # type: ignore[attr-defined]
    models.DenseNet = Small  # type: ignore[attr-defined]
    models.utils = types.SimpleNamespace(  # type: ignore[attr-defined]
        get_cache_dir=lambda: "/home/me/.torchxrayvision"
    )
    package = types.ModuleType("torchxrayvision")
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchxrayvision", package)
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", models)


def test_one_channel_in_the_librarys_range(stand_in: None) -> None:
    backbone = build_backbone("xrv:densenet121", weights="random")
    assert (backbone.num_features, backbone.image_size, backbone.classifier_name) == (
        6, 64, "classifier",
    )  # fmt: skip
    pixels = torch.tensor([0.0, 1.0])
    assert ((pixels - backbone.mean[0]) / backbone.std[0]).tolist() == [-1024, 1024]
    assert {name.partition(".")[0] for name in backbone.network.state_dict()} == {"features"}
    images = torch.randn(2, 1, 64, 64)
    truth = torch.relu(backbone.network.features(images)).mean((2, 3))  # type: ignore[operator]
    found = backbone.network(images.expand(-1, 3, -1, -1))
    assert torch.allclose(found, truth, atol=1e-5)


def test_weights_files_have_the_librarys_names(stand_in: None, tmp_path: Path) -> None:
    state = Small().state_dict()
    torch.save(state, tmp_path / "w.pt")
    backbone = build_backbone("xrv:densenet121-res224-nih", weights=tmp_path / "w.pt")
    loaded = backbone.network.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_a_download_that_fails_names_the_file(
    stand_in: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackboneError, match=r"https://there/a-best.pt, found no way.*xrayvision"):
        build_backbone("xrv:densenet121")
    assert capsys.readouterr().out == ""


def test_other_names_are_refused(stand_in: None) -> None:
    with pytest.raises(BackboneError, match=r"xrv:densenet121, or .*-nih, found xrv:resnet50-"):
        build_backbone("xrv:resnet50-res512-all")


@pytest.mark.skipif(has_library, reason="torchxrayvision is installed")
def test_without_the_library() -> None:
    with pytest.raises(BackboneError, match=r"pip install 'featcache\[xrv\]'"):
        build_backbone("xrv:densenet121", weights="random")


def test_what_it_was_trained_on_is_told() -> None:
    assert training_data_note("timm:resnet18") is None
    for facts in ({"identity": {"backbone": "xrv:densenet121"}},
                  {"cache": {"identity": {"backbone": "xrv:densenet121"}}}):  # fmt: skip
        lines = [*facts_lines({"kind": "run", "path": "run"} | facts)]
        assert any(
            "note: xrv:densenet121 was trained on images of NIH, PadChest" in x for x in lines
        )


@pytest.mark.skipif(not has_library, reason="torchxrayvision is not installed")
def test_features_are_those_of_the_library() -> None:
    before = warnings.filters[:]
    backbone = build_backbone("xrv:densenet121", weights="random")
    assert warnings.filters == before  # its import turns all warnings off
    with warnings.catch_warnings():
        import torchxrayvision as xrv
    network = xrv.models.DenseNet().eval()
    missing = network.load_state_dict(backbone.network.state_dict(), strict=False)
    assert {*missing.missing_keys} == {"classifier.weight", "classifier.bias"}
    assert not missing.unexpected_keys
    grey = np.random.default_rng(0).integers(0, 256, (2, 224, 224)).astype(np.uint8)
    own = torch.from_numpy(np.stack([xrv.datasets.normalize(image, 255) for image in grey]))[
        :, None
    ]
    pixels = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    with torch.inference_mode():
        truth = network.features2(own)
        found = backbone.network((pixels - mean) / std)
    assert found.shape == (2, 1024)
    assert torch.linalg.norm(found - truth) <= 1e-5 * torch.linalg.norm(truth)
