"""Precision, batch size and the caller's own settings; the network stays frozen."""

import os
import threading

import numpy as np
import pytest
import tiny_network
import torch
from fork_server import run_code
from sample_pixels import CPU, pictures, plain_features, tiny_engine, worst
from torch import nn
from torch.nn import functional

from featcache.backbones.backbone import state_sha256, wrap_backbone
from featcache.backbones.engine import (
    build_engine,
    choose_batch_size,
    eager_features,
    halve_until_it_fits,
)
from featcache.errors import BackboneError, ConfigError, FeatcacheWarning
from featcache.precision import PARITY_BOUNDS, relative_errors


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
for setting in sys.argv[1:]:  # torch keeps some of them for good: each has its own process
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
    result = run_code(_EVERY_SETTING, *settings)
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
    workers = [
        threading.Thread(target=lambda: found.extend(engine.run(pixels) for _ in range(20)))
        for _ in range(2)
    ]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(300)
    assert len(found) == 40
    assert all(np.array_equal(rows, truth) for rows in found)
