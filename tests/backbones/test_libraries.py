"""Networks are those that their libraries build when they are given weights."""

import logging
import random
import warnings

import pytest
import timm
import torch
from quick_weights import draw_quickly
from sample_pixels import CPU, images, off_by, run
from torch import nn
from torchvision import models
from torchvision.models import _api
from torchvision.models.vision_transformer import interpolate_embeddings

from featcache.backbones.backbone import build_backbone
from featcache.backbones.engine import build_engine
from featcache.backbones.libraries import build_network, find_blueprint
from featcache.errors import BackboneError

SIDE = 96


@pytest.fixture(autouse=True)
def quick_weights(monkeypatch):
    draw_quickly(monkeypatch)


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


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_networks_are_those_of_its_weights(name, tmp_path, monkeypatch, rounds):
    if name == "inception_v3" and not rounds(0, 1):
        pytest.skip("torchvision and featcache build it as googlenet (--long)")
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


@pytest.mark.parametrize(
    ("name", "heads"),
    [("deit_tiny_distilled_patch16_224", ("head", "head_dist")), ("crossvit_9_240", ("head",))],
)
def test_networks_with_several_classifiers_take_weights_files(name, heads, tmp_path, rounds):
    """Also files whose classifiers are of other classes, or missing."""
    if name == "crossvit_9_240" and not rounds(0, 1):
        pytest.skip("the same way as the other; its features are in test_every_network (--long)")
    file, library = tmp_path / "weights.pth", timm.create_model(name, num_classes=7).eval()
    torch.save(library.state_dict(), file)
    backbone = build_backbone(f"timm:{name}", weights=file)
    batch = images(backbone.image_size, 1)
    with torch.inference_mode():
        truth = library.forward_head(library.forward_features(batch), pre_logits=True)
    assert off_by(run(backbone.network, batch), truth) < 1e-5
    assert (backbone.classifier_name, backbone.built_as) == (None, None)
    state = {k: v for k, v in library.state_dict().items() if not k.startswith(heads)}
    assert len(state) < len(library.state_dict())
    torch.save(state, file)
    assert build_backbone(f"timm:{name}", weights=file).weights_sha256 == backbone.weights_sha256


def test_squeezenets_features_are_those_of_its_last_pooling(tmp_path):
    file, library = tmp_path / "weights.pth", models.squeezenet1_1(num_classes=7).eval()
    torch.save(library.state_dict(), file)
    backbone = build_backbone("torchvision:squeezenet1_1", weights=file, image_size=SIDE)
    truth = run(library.features, images(SIDE)).mean((2, 3))
    assert off_by(run(backbone.network, images(SIDE)), truth) < 1e-6
    assert backbone.num_features == 512


# ------------------------------------------------------------------- networks built for one size


def test_fixed_networks_of_timm_are_built_for_other_sizes_as_timm_does(tmp_path):
    file, name = tmp_path / "weights.pth", "deit_tiny_distilled_patch16_224"
    library = timm.create_model(name).eval()
    torch.save(library.state_dict(), file)
    backbone = build_backbone(f"timm:{name}", weights=file, image_size=SIDE)
    resized = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=SIDE,
        num_classes=0,
    ).eval()  # fmt: skip
    assert off_by(run(backbone.network, images(SIDE)), run(resized, images(SIDE))) < 1e-6
    assert backbone.image_size == SIDE
    # The weights of the library's own size are the same as ever.
    assert build_backbone(f"timm:{name}", weights=file).network.pos_embed.shape == (1, 198, 192)


def test_vision_transformers_are_interpolated_as_torchvision_does(tmp_path, rounds):
    if not rounds(0, 1):
        pytest.skip("10 s: the smallest of them has 88 million parameters (--long)")
    file = tmp_path / "weights.pth"
    library = models.vit_b_32().eval()
    torch.save(library.state_dict(), file)
    backbone = build_backbone("torchvision:vit_b_32", weights=file, image_size=SIDE)
    resized = models.vit_b_32(image_size=SIDE).eval()
    resized.load_state_dict(interpolate_embeddings(SIDE, 32, library.state_dict()))
    resized.heads = nn.Identity()
    assert off_by(run(backbone.network, images(SIDE)), run(resized, images(SIDE))) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm:levit_128s", 256),  # weights of its own size
        ("timm:efficientformer_l1", 256),  # takes img_size, and cannot run
        ("timm:convit_tiny", 100),
        ("torchvision:vit_b_32", 100),
        ("torchvision:maxvit_t", 256),
    ],
)
def test_sizes_that_a_network_cannot_have_are_refused_in_one_line(name, size):
    with pytest.raises(BackboneError, match=r"expected .*, found .*size") as caught:
        build_backbone(name, weights="random", image_size=size)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_sizes_that_a_network_takes_as_it_is_change_nothing_of_it():
    """Else caches of such a network would have another identity."""
    for name, size in [("test_resnet", 64), ("xcit_nano_12_p16_224", 64)]:
        own = build_backbone(f"timm:{name}", weights="random", image_size=size).network
        torch.manual_seed(0)
        network = timm.create_model(name)
        names = set(network.state_dict()) & set(own.state_dict())
        assert names == set(own.state_dict())
        assert all(own.state_dict()[n].shape == network.state_dict()[n].shape for n in names)


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
    for name in random.Random(0).sample(every, rounds(3, len(every))):
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
    for name in random.Random(0).sample(every, rounds(2, 40)):
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
