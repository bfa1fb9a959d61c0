"""Networks are those that their libraries build when they are given weights."""

import logging
import random
import warnings

import pytest
import timm
import torch
from sample_pixels import CPU, images, off_by, run
from torch import nn
from torchvision import models
from torchvision.models import _api

from featcache.backbones.backbone import build_backbone
from featcache.backbones.engine import build_engine
from featcache.backbones.libraries import build_network, find_blueprint
from featcache.errors import BackboneError

SIDE = 96


def fitted(network):
    """Fit the batch norms of a network, as training does: else depth hides what is wrong."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = None
    with torch.no_grad():
        network(images(SIDE, 8, seed=1))
    return network.eval()


def quietly(build, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*arguments, **options)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_torchvisions_networks_are_those_of_its_weights(name, tmp_path, monkeypatch):
    file = tmp_path / "weights.pt"
    plain = fitted(quietly(models.get_model, name, init_weights=False))
    torch.save(plain.state_dict(), file)
    # The library's own way, but for the download.
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: torch.load(file))
    library = models.get_model(name, weights="DEFAULT").eval()
    monkeypatch.undo()
    library.fc = plain.fc = nn.Identity()
    backbone = build_backbone(f"torchvision:{name}", weights=file, image_size=SIDE)
    batch = images(SIDE)
    truth = run(library, batch)
    assert off_by(run(backbone.network, batch), truth) < 1e-5
    assert off_by(run(plain, batch), truth) > 0.1  # the trap: the same weights, built without them
    assert backbone.built_as == "library"
    assert not {n.split(".")[0] for n in backbone.network.state_dict()} & {"aux1", "aux2"}
    # The reference of the parity check is that network, so an engine of another one would fail.
    pixels = torch.randint(0, 256, (2, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0))
    engine = build_engine(backbone, CPU, pixels.numpy().astype("u1"), name="folded")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    truth = run(library, (pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert off_by(torch.from_numpy(engine.run(pixels.numpy().astype("u1"))), truth) < 1e-4


def test_timms_networks_are_those_of_its_weights(tmp_path):
    file, name = tmp_path / "weights.pth", "fbnetc_100"
    plain = fitted(timm.create_model(name))
    torch.save(plain.state_dict(), file)
    library = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, num_classes=0
    ).eval()
    plain.reset_classifier(0)
    backbone = build_backbone(f"timm:{name}", weights=file, image_size=SIDE)
    batch = images(SIDE)
    assert off_by(run(backbone.network, batch), run(library, batch)) < 1e-5
    assert off_by(run(plain, batch), run(library, batch)) > 1e-4
    assert backbone.built_as == "library"


def test_mnasnet_takes_weights_files(tmp_path):
    file = tmp_path / "weights.pt"
    library = fitted(models.mnasnet0_5())
    torch.save(library.state_dict(), file)
    backbone = build_backbone("torchvision:mnasnet0_5", weights=file, image_size=SIDE)
    library.classifier[1] = nn.Identity()
    assert off_by(run(backbone.network, images(SIDE)), run(library, images(SIDE))) < 1e-5
    assert backbone.built_as is None


def test_metaformers_give_the_features_that_timm_documents(tmp_path):
    file, name = tmp_path / "weights.pth", "caformer_s18"
    library = timm.create_model(name).eval()
    torch.save(library.state_dict(), file)
    backbone = build_backbone(f"timm:{name}", weights=file, image_size=SIDE)
    library.reset_classifier(0)
    assert backbone.num_features == library.num_features == 512
    assert off_by(run(backbone.network, images(SIDE)), run(library, images(SIDE))) < 1e-5
    assert backbone.built_as == "library"


@pytest.mark.parametrize(("size", "entry"), [(None, 518), (224, 224), (518, 518)])
def test_vision_transformers_are_built_for_the_size_of_their_weights(size, entry):
    with torch.device("meta"):
        blueprint = find_blueprint("torchvision:vit_h_14", size)
        network, is_other = build_network("torchvision:vit_h_14", blueprint)
    assert (blueprint.image_size, network.image_size, is_other) == (entry, entry, False)


def test_no_other_network_of_torchvision_is_built_otherwise_with_weights(rounds, tally):
    """On the meta device, where nothing is computed; some networks cannot be built there."""
    every = models.list_models(module=models)
    others = set()
    for name in random.Random(0).sample(every, rounds(6, len(every))):
        try:
            with torch.device("meta"):
                blueprint = find_blueprint(f"torchvision:{name}", None)
                is_other = build_network(name, blueprint)[1]
        except BackboneError:
            tally("torchvision with and without weights", "cannot be built on meta")
            continue
        tally("torchvision with and without weights", "another network" if is_other else "equal")
        if is_other:
            others.add(name)
    assert others <= {"inception_v3", "googlenet"}


def test_no_other_network_of_timm_is_built_otherwise_with_weights(rounds, tally):
    every = timm.list_models()
    logging.getLogger("timm").setLevel(logging.ERROR)
    others = set()
    for name in random.Random(0).sample(every, rounds(4, 40)):
        try:
            with torch.device("meta"):
                blueprint = find_blueprint(f"timm:{name}", None)
                is_other = quietly(build_network, name, blueprint)[1]
        except BackboneError:
            tally("timm with and without weights", "cannot be built on meta")
            continue
        tally("timm with and without weights", "another network" if is_other else "equal")
        if is_other:
            others.add(name)
    assert {n for n in others if not n.startswith(("caformer", "convformer"))} <= {"fbnetc_100"}
