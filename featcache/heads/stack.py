"""Heads of one shape on a GPU, trained as one program: stacked parameters (K, ...) and autograd.

A step of one head is some sixty small operations that a GPU waits for, so K heads share each of
them and the rows of a batch. Batch norm is per head, with its own running statistics. All
parameters of a head lie in one row of a tensor (K, P): the optimizer is a few operations, whatever
the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featcache.heads.batches import BatchSampler, TrainingData
from featcache.heads.compiled import numpy_kernels
from featcache.heads.compiled.training_step import draw_mask, mask_generator
from featcache.heads.config import HeadJob
from featcache.heads.head import (
    BATCH_NORM_EPS,
    BATCH_NORM_MOMENTUM,
    HeadConfig,
    initial_state,
    norm_and_linear,
    state_layout,
)
from featcache.heads.loss import SharedLosses, validation_columns
from featcache.heads.optimizer import (
    COUPLED_DECAY,
    DECAY,
    EPS,
    INVERSE_ROOT_CORRECTION,
    IS_SGD,
    SECOND_DECAY,
    STEP,
    WEIGHT_FACTOR,
    step_settings,
)
from featcache.heads.resuming import Snapshot
from featcache.runtime import exact_fp32

_FORWARD_ROWS = 8192  # times heads, that are evaluated at once


class HeadStack:
    """K heads of one shape: their parameters and running statistics.

    Args:
        config: The shape; its dropout is not looked at.
        seeds: What each head's initial weights are drawn by.
        device: Where the heads live.
        dtype: float32 or float64.

    Attributes:
        params: (K, P), which requires gradients.
        stats: The running statistics by name, each (K, U).
        num_steps: How often the statistics were moved.
    """

    def __init__(
        self, config: HeadConfig, seeds: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config = config
        layout = state_layout(config)
        self._names = list(layout)
        self._shapes = {
            name: shape for name, (_, shape) in layout.items()
            if name.endswith((".weight", ".bias"))
        }  # fmt: skip
        states = [initial_state(config, seed) for seed in seeds]
        flat = [np.concatenate([s[name].reshape(-1) for name in self._shapes]) for s in states]
        self.params = torch.from_numpy(np.stack(flat)).to(device, dtype).requires_grad_()
        self.stats = {
            name: torch.from_numpy(np.stack([s[name] for s in states])).to(device, dtype)
            for name in layout
            if name.endswith((".running_mean", ".running_var"))
        }
        self.num_steps = 0

    def keep(self, places: Sequence[int]) -> None:
        """Give up all but some heads."""
        self.params = self.params.detach()[places].requires_grad_()
        self.stats = {name: values[places] for name, values in self.stats.items()}

    def state(self, place: int) -> dict[str, npt.NDArray[Any]]:
        """Return a copy of one head's state dict, by the names of its ``nn.Sequential``."""
        values = self._by_name() | self.stats
        return {
            name: values[name][place].detach().cpu().numpy().copy() if name in values
            else np.array(self.num_steps, np.int64)
            for name in self._names
        }  # fmt: skip

    def _by_name(self) -> dict[str, Tensor]:
        # One split: its backward pass is one operation too.
        parts = torch.split(self.params, [math.prod(shape) for shape in self._shapes.values()], 1)
        return {
            name: part.view(-1, *shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def forward(self, rows: Tensor, *, training: bool, masks: Tensor | None = None) -> Tensor:
        """Return logits (K, B, C) of rows (B, D).

        Args:
            rows: Features.
            training: Normalise by the batch, and move the running statistics.
            masks: (K, B, U), by which the last layer's input is multiplied.
        """
        params, num_hidden = self._by_name(), len(self._config.hidden)
        self.num_steps += training
        values = rows.expand(len(self.params), *rows.shape)
        for number in range(num_hidden + 1):
            norm, linear = norm_and_linear(self._config, number)
            values = self._normalise(f"{norm}", values, training=training)
            values = torch.addcmul(
                params[f"{norm}.bias"][:, None], values, params[f"{norm}.weight"][:, None]
            )
            if number == num_hidden and masks is not None:
                values = values * masks
            values = torch.baddbmm(
                params[f"{linear}.bias"][:, None], values, params[f"{linear}.weight"].mT
            )
            if number < num_hidden:
                values = values.relu()
        return values

    def _normalise(self, norm: str, values: Tensor, *, training: bool) -> Tensor:
        """Normalise (K, B, U) for each head: a batch norm without scale and shift."""
        running_mean, running_var = (
            self.stats[f"{norm}.{name}"] for name in ("running_mean", "running_var")
        )
        if not training:
            mean, variance = running_mean, running_var
        else:
            variance, mean = torch.var_mean(values, 1, correction=0)
            with torch.no_grad():
                unbiased = variance * (values.shape[1] / (values.shape[1] - 1))
                running_mean.lerp_(mean, BATCH_NORM_MOMENTUM)
                running_var.lerp_(unbiased, BATCH_NORM_MOMENTUM)
        return (values - mean[:, None]) * torch.rsqrt(variance + BATCH_NORM_EPS)[:, None]


def stacked_losses(logits: Tensor, weights: Tensor, denominators: Tensor) -> Tensor:
    """Return the losses (K,) of logits (K, B, C): see ``loss.target_weights``.

    Args:
        logits: (K, B, C).
        weights: (K, B, C), or (K, B, 2 C) of several labels a row.
        denominators: (K, B).
    """
    if weights.shape[2] == logits.shape[2]:
        terms = -weights * logits.log_softmax(2)
    else:
        yes, no = weights.chunk(2, 2)
        terms = -yes * functional.logsigmoid(logits) - no * functional.logsigmoid(-logits)
    return terms.sum((1, 2)) / denominators.sum(1)


class StackTrainer:
    """A stack with its data, losses and optimizer: on a GPU what ``HeadGroup`` is on a CPU.

    Args:
        jobs: The heads, of one shape, optimizer, batch size and number of epochs.
        data: What they are trained on; features that are not in their file go to the device.
        device: Where they are trained.
    """

    def __init__(self, jobs: Sequence[HeadJob], data: TrainingData, device: torch.device) -> None:
        self._jobs, self._data, self._device = list(jobs), data, device
        self._dtype = torch.float64 if data.dtype == np.float64 else torch.float32
        self.stack = HeadStack(jobs[0].head, [job.seed for job in jobs], device, self._dtype)
        self._first = torch.zeros_like(self.stack.params, requires_grad=False)
        self._second = torch.zeros_like(self._first)
        self._num_steps = 0
        self._masks = [mask_generator(job.seed) for job in jobs]
        self._features = self._valid_features = None
        if isinstance(data.features, np.ndarray):
            self._features = self._to_device(data.features).flatten(0, -2)
        if isinstance(data.valid_features, np.ndarray):
            self._valid_features = self._to_device(data.valid_features)
        self._scaling = None
        if data.scaling is not None:
            mean, inverse = data.scaling.mean, data.scaling.inverse
            self._scaling = self._to_device(mean), self._to_device(inverse)
        gather = None if self._features is None else self._gather
        self._sampler = BatchSampler(data, numpy_kernels.shuffle, gather)
        self._bind()

    def _bind(self) -> None:
        data = self._data
        self._losses = SharedLosses(
            [job.training for job in self._jobs], data.targets, data.row_weights,
            self._jobs[0].head.num_classes, data.dtype,
        )  # fmt: skip

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        if not array.flags.writeable:  # a tensor may not share a mapped file
            array = array.copy()
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, self._dtype)

    def _gather(self, places: npt.NDArray[Any]) -> Tensor:
        assert self._features is not None
        places_there = torch.from_numpy(places).to(self._device)
        return self._scale(self._features.index_select(0, places_there))

    def _scale(self, rows: Tensor) -> Tensor:
        if self._scaling is None:
            return rows
        mean, inverse = self._scaling
        return (rows - mean) * inverse

    def keep(self, places: Sequence[int]) -> None:
        """Give up all but some heads."""
        self._jobs = [self._jobs[place] for place in places]
        self._masks = [self._masks[place] for place in places]
        self._first, self._second = self._first[places], self._second[places]
        self.stack.keep(places)
        self._bind()

    def state(self, place: int) -> dict[str, npt.NDArray[Any]]:
        """Return a copy of one head's state dict."""
        return self.stack.state(place)

    def snapshot(self) -> Snapshot:
        """Return what decides the steps to come, of one head: copies on the CPU."""
        (masks,) = self._masks
        arrays = {name: part.detach().cpu().numpy().copy() for name, part in self._parts().items()}
        arrays["num_steps"] = np.array(self._num_steps, np.int64)
        return arrays, [masks, *self._sampler.generators]

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Let one head go on from the arrays of a snapshot."""
        with torch.no_grad():
            for name, part in self._parts().items():
                part.copy_(torch.from_numpy(arrays[name].copy()))
        self._num_steps = self.stack.num_steps = int(arrays["num_steps"])

    def _parts(self) -> dict[str, Tensor]:
        parts = {"params": self.stack.params, "first": self._first, "second": self._second}
        return parts | self.stack.stats

    def train_epoch(
        self, batch_size: int, rates: Sequence[Sequence[float]],
        on_rows: Callable[[int], None] | None = None,
    ) -> list[float]:  # fmt: skip
        """Take one step per batch; return each head's mean loss, batches weighted by their rows.

        Args:
            batch_size: Of all but the last.
            rates: For each batch, the learning rate of each head.
            on_rows: Called with the rows of each batch when all heads have seen them.
        """
        totals = torch.zeros(len(self._jobs), dtype=self._dtype, device=self._device)
        num_rows, rates_left = 0, iter(rates)
        with exact_fp32():
            for rows, features in self._sampler.epoch(batch_size):
                if isinstance(features, np.ndarray):
                    features = self._to_device(features)  # noqa: PLW2901
                weights, denominators = (
                    self._to_device(np.stack(part))[self._losses.numbers]
                    for part in zip(*self._losses.weigh(rows), strict=True)
                )
                for start in range(0, len(rows), batch_size):
                    part = slice(start, start + batch_size)
                    batch = features[part]
                    masks = self._draw_masks(len(batch))
                    losses = stacked_losses(
                        self.stack.forward(batch, training=True, masks=masks),
                        weights[:, part], denominators[:, part],
                    )  # fmt: skip
                    (grads,) = torch.autograd.grad(losses.sum(), self.stack.params)
                    self._move(grads, next(rates_left))
                    totals.add_(losses.detach(), alpha=len(batch))
                    num_rows += len(batch)
                    if on_rows is not None:
                        on_rows(len(batch))
        assert next(rates_left, None) is None, "a rate for each batch"
        means: list[float] = (totals / num_rows).tolist()
        return means

    def _draw_masks(self, num_rows: int) -> Tensor | None:
        dropouts = [job.head.dropout for job in self._jobs]
        if not any(dropouts):
            return None
        head = self._jobs[0].head
        width, dtype = (head.num_features, *head.hidden)[-1], self._data.dtype
        masks = np.ones((len(self._jobs), num_rows, width), dtype)
        for mask, generator, dropout in zip(masks, self._masks, dropouts, strict=True):
            drawn = draw_mask(generator, dropout, num_rows, width, dtype)
            if drawn is not None:
                mask[:] = drawn
        return self._to_device(masks)

    @torch.no_grad()
    def _move(self, grads: Tensor, rates: Sequence[float]) -> None:
        """Move all parameters: see module ``optimizer``."""
        self._num_steps += 1
        settings = [
            step_settings(
                job.training.optimizer, self._num_steps, rate, job.training.weight_decay,
                self._data.dtype,
            )
            for job, rate in zip(self._jobs, rates, strict=True)
        ]  # fmt: skip
        columns = self._to_device(np.stack(settings)).mT[..., None]
        step, decay, second_decay = columns[STEP], columns[DECAY], columns[SECOND_DECAY]
        params = self.stack.params
        grads = torch.addcmul(grads, params, columns[COUPLED_DECAY])
        if settings[0][IS_SGD]:
            self._first.mul_(decay).add_(grads)
            params.sub_(self._first * step)
        else:
            self._first.add_((grads - self._first) * (1 - decay))
            self._second.mul_(second_decay).add_(grads.square() * (1 - second_decay))
            roots = self._second.sqrt() * columns[INVERSE_ROOT_CORRECTION] + columns[EPS]
            params.mul_(columns[WEIGHT_FACTOR]).sub_(self._first * step / roots)

    def validate(self) -> list[dict[str, Any]]:
        """Return the validation columns of each head's history row; none without such rows."""
        data = self._data
        if data.valid_targets is None:
            return [{} for _ in self._jobs]
        size = max(1, _FORWARD_ROWS // len(self._jobs))
        with torch.inference_mode(), exact_fp32():
            logits = [
                self.stack.forward(part, training=False).cpu() for part in self._valid_parts(size)
            ]
        return [
            validation_columns(head_logits.numpy(), data.valid_targets, data.names)
            for head_logits in torch.cat(logits, 1)
        ]

    def _valid_parts(self, size: int) -> Iterator[Tensor]:
        """Yield the validation features on the device, scaled, ``size`` rows at a time."""
        if (features := self._valid_features) is not None:
            for i in range(0, len(features), size):
                yield self._scale(features[i : i + size])
            return
        for block in self._data.valid_blocks():
            for i in range(0, len(block), size):
                yield self._to_device(block[i : i + size])
