"""A head of any depth and its training step: NumPy's matrix products and a few functions.

The functions are those of ``kernels``, or of ``numpy_kernels``: the step is the same.

A step is bound by memory: of a head of 0.7 M parameters the optimizer reads and writes 18 MB. So a
layer is moved in pieces of 128 units whose gradient is still in the cache (``move_layer``).
Activations are (U, B), which BLAS multiplies in 0.43 ms where (B, U) takes 0.68 (32 x 1280 by
1280 x 512 on one AVX-512 Xeon core).

Pieces are the same whoever computes them, and their sums are added in order: a head has the same
bits alone, beside others and with any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.heads.compiled.team import Team
from featcache.heads.config import HeadJob
from featcache.heads.head import BATCH_NORM_MOMENTUM, initial_state, norm_and_linear
from featcache.heads.optimizer import step_settings
from featcache.heads.prediction import compute_logits

Array = npt.NDArray[Any]

_PIECE_UNITS = 128  # of a wide layer: the gradient of 1280 inputs is 0.6 MB, and stays in the cache
_LINE_BYTES = 64
_MASKS_STREAM = 1
_SHARED_VALUES = 100_000  # weights of a layer from which a second thread gains more than it costs


class Batch(NamedTuple):
    """A batch of rows, as all heads that are trained on it see it.

    Attributes:
        normed: (B, D) features, each column with mean 0 and variance 1 over the batch.
        mean: (D,) of the features.
        variance: (D,) of the features, with Bessel's correction.
    """

    normed: Array
    mean: Array
    variance: Array


class _Layer:
    """A batch norm and the linear layer that follows: views of a head's arrays."""

    def __init__(self, name: tuple[int, int], arrays: list[dict[str, Array]]) -> None:
        norm, linear = name
        values = arrays[0]
        self.scale, self.shift = values[f"{norm}.weight"], values[f"{norm}.bias"]
        self.running_mean = values[f"{norm}.running_mean"]
        self.running_var = values[f"{norm}.running_var"]
        self.bias = values[f"{linear}.bias"]
        self.weights, self.first, self.second = (a[f"{linear}.weight"] for a in arrays[:3])
        grads = arrays[3]
        self.scale_grad, self.shift_grad = grads[f"{norm}.weight"], grads[f"{norm}.bias"]
        self.bias_grad, self.weights_grad = grads[f"{linear}.bias"], grads.get(f"{linear}.weight")
        num_units = len(self.weights)
        self.is_shared = self.weights.size >= _SHARED_VALUES and num_units > _PIECE_UNITS
        self.pieces = _cut(num_units, _PIECE_UNITS)
        self.halves = _cut(num_units, math.ceil(num_units / 2) if self.is_shared else num_units)


@dataclass
class _Activations:
    """What a layer computes for a batch of one size, kept for the way back; each (U, B)."""

    z: Array
    normed: Array
    inverse: Array
    out: Array
    grad: Array

    @classmethod
    def empty(cls, num_units: int, num_rows: int, dtype: npt.DTypeLike) -> _Activations:
        z, normed, out, grad = aligned_zeros((4, num_units, num_rows), dtype)
        return cls(z, normed, np.empty(num_units, dtype), out, grad)


class TrainableHead:
    """A head with its optimizer's moments, trained by one step after the other.

    Args:
        job: Its shape, training and seed.
        dtype: float32 or float64.
        kernels: ``numpy_kernels``, or what ``kernels.load`` returns.
        team: Threads that share the pieces of a step.
    """

    def __init__(self, job: HeadJob, dtype: npt.DTypeLike, kernels: Any, team: Team) -> None:
        config = self._config = job.head
        self._training, self._kernels, self._team = job.training, kernels, team
        self._num_steps, self._dropout = 0, config.dropout
        self._masks = mask_generator(job.seed)
        state = initial_state(config, job.seed)
        self._names, self._dtype = list(state), np.dtype(dtype)
        num_layers = len(config.hidden) + 1
        in_pieces = {f"{norm_and_linear(config, i)[1]}.weight" for i in range(num_layers - 1)}
        # All that is not moved in pieces lies side by side, and is moved by one call.
        together = [
            name for name in state
            if name.endswith((".weight", ".bias")) and name not in in_pieces
        ]  # fmt: skip
        size = sum(state[name].size for name in together)
        self._values, self._firsts, self._seconds, self._grads = (
            np.zeros(size, dtype) for _ in range(4)
        )
        arrays = [
            _views(flat, {name: state[name].shape for name in together})
            for flat in (self._values, self._firsts, self._seconds, self._grads)
        ]
        # In one array: from 4 MB NumPy asks the system for large pages, a tenth of a step's time.
        shapes = {name: state[name].shape for name in in_pieces}
        size = sum(map(math.prod, shapes.values()))
        scratch_size = _PIECE_UNITS * max(config.num_features, *config.hidden, 0)
        memory = aligned_zeros((3 * size + team.size * scratch_size,), dtype)
        for values, flat in zip(arrays[:3], memory[: 3 * size].reshape(3, -1), strict=True):
            values.update(_views(flat, shapes))
        self._scratch = memory[3 * size :].reshape(team.size, -1)  # a row for each thread
        self._arrays = arrays[0]
        for name, value in state.items():
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith(("running_mean", "running_var")):
                self._arrays[name] = np.empty(value.shape, dtype)
            self._arrays[name][...] = value
        self._layers = [_Layer(norm_and_linear(config, i), arrays) for i in range(num_layers)]
        self._activations: dict[int, list[_Activations]] = {}

    def state(self) -> dict[str, Array]:
        """Return a copy of the state dict, by the names of the head's ``nn.Sequential``."""
        return {
            name: self._arrays[name].copy() if name in self._arrays
            else np.array(self._num_steps, np.int64)
            for name in self._names
        }  # fmt: skip

    def snapshot(self) -> tuple[dict[str, Array], np.random.Generator]:
        """Return all that decides the following steps: the arrays in use, the masks' generator."""
        arrays = {f"values/{name}": array for name, array in self._arrays.items()}
        arrays |= {"firsts": self._firsts, "seconds": self._seconds}
        for number, layer in enumerate(self._layers):
            arrays |= {f"{number}/first": layer.first, f"{number}/second": layer.second}
        return arrays | {"num_steps": np.array(self._num_steps, np.int64)}, self._masks

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Go on from the arrays of a snapshot; its generator is set by the caller."""
        for name, array in self.snapshot()[0].items():
            array[...] = arrays[name]
        self._num_steps = int(arrays["num_steps"])

    def logits(self, features: Array) -> Array:
        """Return the logits (n, C) of features (n, D), as the head is used: in eval mode."""
        return compute_logits(self._config, self._arrays, features)

    def step(self, batch: Batch, weights: Array, denominators: Array, rate: float) -> float:
        """Move the head against its loss on a batch; return the loss.

        Args:
            batch: Of two rows or more.
            weights: Of the loss, as is the next: see ``loss.target_weights``.
            denominators: (B,).
            rate: The learning rate.
        """
        training = self._training
        self._num_steps += 1
        settings = step_settings(
            training.optimizer, self._num_steps, rate, training.weight_decay, self._dtype
        )
        num_rows = len(batch.normed)
        activations = self._activations.get(num_rows)
        if activations is None:
            activations = self._activations[num_rows] = [
                _Activations.empty(len(layer.weights), num_rows, self._dtype)
                for layer in self._layers
            ]
        last_input = self._forward(batch, activations)
        mask = self._draw_mask(num_rows, len(last_input))
        if mask is not None:
            last_input = last_input * mask
        layer, found = self._layers[-1], activations[-1]
        np.dot(layer.weights, last_input, out=found.z)
        found.z += layer.bias[:, None]
        loss = self._kernels.loss_and_gradient(found.z, weights, denominators, found.grad)
        np.dot(found.grad, last_input.T, out=layer.weights_grad)
        np.sum(found.grad, 1, out=layer.bias_grad)
        grad = np.dot(layer.weights.T, found.grad)
        if mask is not None:
            grad *= mask
        self._backward(batch, activations, grad, settings)
        self._kernels.move_values(self._grads, self._values, self._firsts, self._seconds, settings)
        return float(loss)

    def _forward(self, batch: Batch, activations: Sequence[_Activations]) -> Array:
        """Return the input (U, B) of the last layer, before dropout."""
        first = self._layers[0]
        first.running_mean += (batch.mean - first.running_mean) * BATCH_NORM_MOMENTUM
        first.running_var += (batch.variance - first.running_var) * BATCH_NORM_MOMENTUM
        values = batch.normed * first.scale
        values += first.shift
        values = values.T
        for (layer, following), found in zip(pairwise(self._layers), activations, strict=False):
            self._share(layer, _multiply, layer.halves, layer.weights, values, found.z)
            self._kernels.relu_and_normalise(
                found.z, layer.bias, following.scale, following.shift, following.running_mean,
                following.running_var, found.normed, found.inverse, found.out,
            )  # fmt: skip
            values = found.out
        return values

    def _backward(
        self, batch: Batch, activations: Sequence[_Activations], grad: Array, settings: Array
    ) -> None:
        """Take the gradient by the last layer's input (U, B) back, and move the hidden layers."""
        for number in range(len(self._layers) - 2, -1, -1):
            layer, following, found = (
                self._layers[number],
                self._layers[number + 1],
                activations[number],
            )
            self._kernels.norm_and_relu_backward(
                grad, found.normed, found.inverse, following.scale, found.z, found.grad,
                following.scale_grad, following.shift_grad, layer.bias_grad,
            )  # fmt: skip
            if number:
                grad = np.dot(layer.weights.T, found.grad)
                normed = activations[number - 1].normed.T
            else:
                normed = batch.normed
            sums = np.empty((len(layer.pieces), 2, layer.weights.shape[1]), self._dtype)
            self._share(
                layer, self._move_piece, layer.pieces, layer, found.grad, normed, sums, settings
            )
            if number == 0:
                total = sums[0]
                for piece_sums in sums[1:]:
                    total += piece_sums
                layer.scale_grad[:], layer.shift_grad[:] = total
        if len(self._layers) == 1:
            layer = self._layers[0]
            np.einsum("db,bd->d", grad, batch.normed, out=layer.scale_grad)
            np.sum(grad, 1, out=layer.shift_grad)

    def _move_piece(  # noqa: PLR0917
        self, piece: slice, number: int, layer: _Layer, grad: Array, normed: Array, sums: Array,
        settings: Array,
    ) -> None:  # fmt: skip
        # Fresh memory for each piece would be asked of the system, and given back.
        scratch = self._scratch[number % self._team.size]
        products = scratch[: (piece.stop - piece.start) * normed.shape[1]]
        products = products.reshape(-1, normed.shape[1])
        np.dot(grad[piece], normed, out=products)
        self._kernels.move_layer(
            products, layer.bias_grad[piece], layer.scale, layer.shift,
            layer.weights[piece], layer.first[piece], layer.second[piece], *sums[number], settings,
        )  # fmt: skip

    def _share(
        self, layer: _Layer, function: Any, pieces: Sequence[slice], *arguments: Any
    ) -> None:
        """Call a function for each piece: of a large layer, by all threads of the team."""
        tasks = [(piece, number, *arguments) for number, piece in enumerate(pieces)]
        if layer.is_shared:
            self._team.run(function, tasks)
        else:
            for task in tasks:
                function(*task)

    def _draw_mask(self, num_rows: int, width: int) -> Array | None:
        """Return what the last layer's input (U, B) is multiplied by while training."""
        mask = draw_mask(self._masks, self._dropout, num_rows, width, self._dtype)
        return None if mask is None else np.ascontiguousarray(mask.T)


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return zeros that begin at a cache line: the step of a wide layer is 8 % faster so.

    NumPy's own arrays begin 16 bytes after one where they are large.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(num_bytes + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def mask_generator(seed: int) -> np.random.Generator:
    """Return what a head's dropout masks are drawn by, the same on every device."""
    return np.random.default_rng([seed, _MASKS_STREAM])


def draw_mask(
    generator: np.random.Generator, dropout: float, num_rows: int, width: int, dtype: npt.DTypeLike
) -> Array | None:
    """Return the next dropout mask (B, U): 0, or 1 / (1 - dropout); None without dropout."""
    if not dropout:
        return None
    draws = generator.random((num_rows, width), np.float32)
    return np.multiply(draws >= dropout, 1 / (1 - dropout), dtype=dtype)


def _multiply(piece: slice, _: int, weights: Array, values: Array, out: Array) -> None:
    np.dot(weights[piece], values, out=out[piece])


def _cut(num_units: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, num_units)) for i in range(0, num_units, size)]


def _views(flat: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return arrays of some shapes that lie one after the other in a flat one."""
    views, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        views[name] = flat[start:end].reshape(shape)
        start = end
    return views
