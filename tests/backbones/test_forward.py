"""Forward passes: grey as one channel is grey as three, threads do not mix, refusals say why."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_network
import torch
from torch import nn

from featcache.backbones import forward as forward_module
from featcache.backbones.backbone import wrap_backbone
from featcache.backbones.forward import NotUsableError, onnx_forward, torch_forward

CPU = torch.device("cpu")


def passes():
    backbone = tiny_network.build()
    return {
        "onnx": onnx_forward(backbone, 4),
        "folded": torch_forward(backbone, CPU, "fp32", folded=True)[0],
        "plain": torch_forward(backbone, CPU, "fp32", folded=False)[0],
    }


def batch(seed=0, channels=3):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (4, 32, 32, channels), np.uint8))


@pytest.mark.parametrize("name", ["onnx", "folded", "plain"])
def test_grey_in_one_channel_is_grey_in_three_bit_for_bit(name):
    forward = passes()[name]
    grey = batch(channels=1)
    rows = forward(grey)
    assert (rows.shape, rows.dtype) == ((4, 24), np.float32)
    assert np.array_equal(rows, forward(grey.expand(-1, -1, -1, 3).contiguous()))


def test_all_ways_agree_with_the_network_on_normalized_images():
    backbone, pixels = tiny_network.build(), batch(1)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (backbone.mean, backbone.std))
    images = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        truth = backbone.network.double()(images).numpy()
    for name, forward in passes().items():
        np.testing.assert_allclose(forward(pixels), truth, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["onnx", "folded"])
def test_threads_get_the_rows_of_their_own_images(name):
    forward = passes()[name]
    truth = {seed: forward(batch(seed)) for seed in range(8)}
    wrong = []

    def work(seed):
        rows = [forward(batch(seed)) for _ in range(30)]
        wrong.extend(seed for row in rows if not np.array_equal(row, truth[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in truth]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert wrong == []


class Untraceable(nn.Module):
    """Its features come from where no exporter can follow."""

    def forward(self, images):
        return torch.linalg.eigvals(images.mean(1)[:, :8, :8]).abs()


class Unexportable(nn.Module):
    """It can be traced, but ONNX has no such operator: torch then prints the whole graph."""

    def forward(self, images):
        return nn.functional.interpolate(
            images, size=(4, 4), mode="bicubic", antialias=True
        ).flatten(1)


@pytest.mark.parametrize(("network", "why"), [(Untraceable, "eig"), (Unexportable, "bicubic")])
def test_a_network_that_cannot_be_exported_is_not_usable_and_says_why(network, why, capfd):
    """Nothing is printed either: torch would, where _jit_set_onnx_log_output_stream says."""
    backbone = wrap_backbone("foreign", network(), image_size=32)
    with pytest.raises(NotUsableError, match=why):
        onnx_forward(backbone, 1)
    assert capfd.readouterr() == ("", "")
    assert hasattr(torch._C, "_jit_set_onnx_log_output_stream")  # a private name


def test_without_onnx_runtime_it_is_not_usable_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NotUsableError, match="onnxruntime"):
        onnx_forward(tiny_network.build(), 1)


def test_onnx_runtime_tells_nobody_what_runs_here(tmp_path):
    """It keeps what it sends in the home folder first."""
    code = "import test_forward; test_forward.passes()['onnx'](test_forward.batch())"
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    here = Path(__file__).parent
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]


def test_exporting_leaves_the_network_and_the_warnings_alone():
    backbone = tiny_network.build()
    before = {k: v.clone() for k, v in backbone.network.state_dict().items()}
    onnx_forward(backbone, 1)  # a warning would be an error here
    after = backbone.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not backbone.network.training


class Counting(nn.Module):
    """Its state changes with every forward pass, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return images.mean((2, 3)) + self.calls


@pytest.mark.parametrize("folded", [True, False])
def test_a_copy_that_changes_is_noticed(folded):
    steady, is_frozen = torch_forward(tiny_network.build(), CPU, "fp32", folded=folded)
    steady(batch())
    assert is_frozen()
    drifting, is_frozen = torch_forward(
        wrap_backbone("counting", Counting(), image_size=32), CPU, "fp32", folded=folded
    )
    assert is_frozen()  # so far
    drifting(batch())
    assert not is_frozen()


class ByKeyword(nn.Module):
    """Feeds its batch norm by keyword: there is no positional input to watch."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        return self.norm(input=self.conv(images)).mean((2, 3))


def test_a_batch_norm_fed_by_keyword_is_left_alone():
    backbone = wrap_backbone("keyword", ByKeyword(), image_size=32)
    folded, plain = (torch_forward(backbone, CPU, "fp32", folded=f)[0] for f in (True, False))
    np.testing.assert_allclose(folded(batch()), plain(batch()), rtol=1e-5, atol=1e-6)


def test_a_failure_of_folding_is_no_traceback(monkeypatch):
    def broken(network, image_size):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(forward_module, "fold", broken)
    with pytest.raises(NotUsableError, match="tuple index"):
        torch_forward(tiny_network.build(), CPU, "fp32", folded=True)
