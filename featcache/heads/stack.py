"""Heads of one shape trained as one program: parameters (K, ...), gradients written out.

A head of 0.7 M parameters and a batch of 32 rows is bound by memory traffic and by the overhead of
some sixty small operations, so K heads share whatever they can: the rows of a batch, their
normalised values before the affine part of the first batch norm, and every call. Batch norm is per
head, with its own running statistics. The first layer needs no gradient of its input, a third of
the arithmetic: with x the shared normalised rows, G = dz' x, and s the column sums of dz,

    dW = G * gamma + s beta'        dgamma = sum over rows of W * G        dbeta = W' s

so nothing is divided by gamma, which may be zero.

All parameters of a head lie in one row of a buffer (K, P), and so do gradients and the optimizer's
moments: the optimizer is one call a head, whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featcache.heads.head import HeadConfig, build_head, state_layout
from featcache.heads.loss import Loss, cross_entropy

_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = 1e-5, 0.1  # torch.nn.BatchNorm1d's


@dataclass(frozen=True)
class SharedRows:
    """Rows that all heads of a stack see: a batch of the training.

    Attributes:
        normalised: (B, D), each column with mean 0 and variance 1 over the batch.
        mean: (D,) of the rows.
        variance: (D,) of the rows, with Bessel's correction: what running statistics take.
    """

    normalised: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> SharedRows:
        """Normalise rows (B, D), two or more."""
        variance, mean, centred = _moments(rows, 0)
        normalised = centred.mul_(torch.rsqrt(variance + _BATCH_NORM_EPS))
        return cls(normalised, mean, variance * (len(rows) / (len(rows) - 1)))


@dataclass
class _BatchNorm:
    weight: Tensor
    bias: Tensor
    weight_grad: Tensor
    bias_grad: Tensor
    running_mean: Tensor
    running_var: Tensor


@dataclass
class _Linear:
    weight: Tensor
    bias: Tensor
    weight_grad: Tensor
    bias_grad: Tensor


class HeadStack:
    """K heads of one shape: their parameters, gradients and running statistics.

    Args:
        config: The shape; its dropout is not looked at.
        dropouts: Chance of each head, K of them.
        seeds: What each head's initial weights and dropout masks are drawn by: those of
            ``torch.manual_seed(seed)``, the head built, and its forward passes.
        device: Where the heads live.
        dtype: float32 or float64.
        loss: What is minimised.
    """

    def __init__(  # noqa: PLR0917
        self, config: HeadConfig, dropouts: Sequence[float], seeds: Sequence[int],
        device: torch.device, dtype: torch.dtype, loss: Loss = cross_entropy,
    ) -> None:  # fmt: skip
        self.config, self.dropouts, self.loss = config, list(dropouts), loss
        self._names, sizes = _layout(config)
        num_heads, num_params = len(seeds), sum(math.prod(s) for s in sizes.values())
        self.params = torch.empty((num_heads, num_params), dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.params)
        self._sizes = sizes
        self._stat_sizes = {
            name: shape
            for name, (_, shape) in state_layout(config).items()
            if name.endswith(("running_mean", "running_var"))
        }
        num_stats = sum(math.prod(shape) for shape in self._stat_sizes.values())
        self.stats = torch.zeros((num_heads, num_stats), dtype=dtype, device=device)
        for name, values in _views(self.stats, self._stat_sizes).items():
            values.fill_(float(name.endswith("var")))
        self.num_batches = 0
        self._generators = []
        for number, seed in enumerate(seeds):
            state, generator = _initialise(config, seed, device)
            self._generators.append(generator)
            flat = [state[name].reshape(-1) for name in sizes]
            self.params[number] = torch.cat(flat).to(device, dtype)
        self._bind()

    def _bind(self) -> None:
        """Make the layers: views of the buffers."""
        params, grads = _views(self.params, self._sizes), _views(self.grads, self._sizes)
        self._stats = _views(self.stats, self._stat_sizes)
        self._norms = [
            _BatchNorm(
                params[f"{name}.weight"], params[f"{name}.bias"],
                grads[f"{name}.weight"], grads[f"{name}.bias"],
                self._stats[f"{name}.running_mean"], self._stats[f"{name}.running_var"],
            )
            for name in self._names.norms
        ]  # fmt: skip
        self._linears = [
            _Linear(
                params[f"{name}.weight"], params[f"{name}.bias"],
                grads[f"{name}.weight"], grads[f"{name}.bias"],
            )
            for name in self._names.linears
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.params)

    def select(self, heads: slice) -> HeadStack:
        """Return a stack of some of the heads, sharing their buffers."""
        part = object.__new__(HeadStack)
        part.config, part.dropouts, part.loss = self.config, self.dropouts[heads], self.loss
        part._names, part._sizes, part._stat_sizes = self._names, self._sizes, self._stat_sizes
        part.params, part.grads = self.params[heads], self.grads[heads]
        part.stats = self.stats[heads]
        part.num_batches = self.num_batches
        part._generators = self._generators[heads]
        part._bind()
        return part

    def keep(self, heads: Sequence[int]) -> HeadStack:
        """Return a stack of some of the heads, copied: the others are given up."""
        part = self.select(slice(0, 0))
        index = torch.tensor(heads, device=self.params.device)
        part.dropouts = [self.dropouts[head] for head in heads]
        part.params, part.grads = self.params[index], self.grads[index]
        part.stats = self.stats[index]
        part._generators = [self._generators[head] for head in heads]
        part._bind()
        return part

    def state(self, head: int) -> dict[str, Tensor]:
        """Return a copy of one head's state dict, as its ``nn.Sequential`` would give it."""
        params = {name: value[head] for name, value in _views(self.params, self._sizes).items()}
        params |= {name: value[head] for name, value in self._stats.items()}
        params |= {
            f"{name}.num_batches_tracked": torch.tensor(self.num_batches)
            for name in self._names.norms
        }
        return {name: params[name].clone() for name in self._names.state}

    def backward(self, rows: SharedRows, wanted: Tensor) -> Tensor:
        """Set ``grads`` to those of each head's loss on a batch; return the losses (K,).

        A training pass: running statistics move and dropout masks are drawn.

        Args:
            rows: The batch.
            wanted: What the loss takes besides logits: see module ``loss``.
        """
        self.num_batches += 1
        _track(self._norms[0], rows.mean, rows.variance)
        normed: list[Tensor] = [rows.normalised]
        inverses, shown, active = [torch.empty(0)], list[Tensor](), list[Tensor]()
        for norm, linear, following in zip(
            self._norms, self._linears[:-1], self._norms[1:], strict=False
        ):
            shown.append(torch.addcmul(norm.bias[:, None], normed[-1], norm.weight[:, None]))
            out = torch.baddbmm(linear.bias[:, None], shown[-1], linear.weight.mT).relu_()
            active.append(out > 0)
            normalised, inverse = _normalise(following, out)
            normed.append(normalised)
            inverses.append(inverse)
        norm, linear = self._norms[-1], self._linears[-1]
        last = torch.addcmul(norm.bias[:, None], normed[-1], norm.weight[:, None])
        mask = self.draw_masks(torch.empty_like(last))
        if mask is not None:
            last = last * mask
        logits = torch.baddbmm(linear.bias[:, None], last, linear.weight.mT)
        losses, grad = self.loss(logits, wanted)

        torch.bmm(grad.mT, last, out=linear.weight_grad)
        torch.sum(grad, 1, out=linear.bias_grad)
        grad = torch.bmm(grad, linear.weight)
        if mask is not None:
            grad *= mask
        for number in range(len(self._linears) - 2, -1, -1):
            linear, norm = self._linears[number], self._norms[number + 1]
            grad = _through_norm(norm, grad, normed[number + 1], inverses[number + 1])
            grad *= active[number]
            torch.sum(grad, 1, out=linear.bias_grad)
            if number == 0:
                _first_layer(self._norms[0], linear, grad, rows.normalised)
                return losses
            torch.bmm(grad.mT, shown[number], out=linear.weight_grad)
            grad = torch.bmm(grad, linear.weight)
        torch.sum(grad * rows.normalised, 1, out=self._norms[0].weight_grad)  # no hidden layer
        torch.sum(grad, 1, out=self._norms[0].bias_grad)
        return losses

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits (K, B, C) of rows (B, D), as evaluated: running statistics, no dropout."""
        values = rows.expand(len(self), *rows.shape)
        for number, (norm, linear) in enumerate(zip(self._norms, self._linears, strict=True)):
            scale = norm.weight * torch.rsqrt(norm.running_var + _BATCH_NORM_EPS)
            shift = norm.bias - norm.running_mean * scale
            values = torch.addcmul(shift[:, None], values, scale[:, None])
            values = torch.baddbmm(linear.bias[:, None], values, linear.weight.mT)
            if number < len(self._linears) - 1:
                values = values.relu_()
        return values

    def draw_masks(self, masks: Tensor) -> Tensor | None:
        """Set masks (K, B, W), by which the last layer's inputs are multiplied, if any dropout is.

        Drawn as ``nn.Dropout`` draws: a head gets the masks that it would get alone.
        """
        if not any(self.dropouts):
            return None
        for mask, chance, generator in zip(masks, self.dropouts, self._generators, strict=True):
            if chance:
                mask.bernoulli_(1 - chance, generator=generator).div_(1 - chance)
            else:
                mask.fill_(1)
        return masks


def _normalise(norm: _BatchNorm, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (K, B, C) normalised over the batch, and 1 / std (K, C)."""
    variance, mean, centred = _moments(values, 1)
    inverse = torch.rsqrt(variance + _BATCH_NORM_EPS)
    num_rows = values.shape[1]
    _track(norm, mean, variance * (num_rows / (num_rows - 1)))
    return centred.mul_(inverse[:, None]), inverse


def _moments(values: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return variance (biased) and mean along a dimension, and the values less their mean.

    ``torch.var_mean`` takes 240 microseconds of (32, 1280) on the CPU: it strides down columns.
    """
    mean = values.mean(dim, keepdim=True)
    centred = values - mean
    return (centred * centred).mean(dim), mean.squeeze(dim), centred


def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics a tenth of the way, as batch norm does."""
    norm.running_mean.lerp_(mean.expand_as(norm.running_mean), _BATCH_NORM_MOMENTUM)
    norm.running_var.lerp_(variance.expand_as(norm.running_var), _BATCH_NORM_MOMENTUM)


def _through_norm(norm: _BatchNorm, grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Set the gradients of a batch norm; return that of its input (K, B, C)."""
    torch.sum(grad * normed, 1, out=norm.weight_grad)
    torch.sum(grad, 1, out=norm.bias_grad)
    num_rows = grad.shape[1]
    grad = grad - norm.bias_grad[:, None] / num_rows
    grad.addcmul_(normed, norm.weight_grad[:, None], value=-1 / num_rows)
    return grad.mul_((norm.weight * inverse)[:, None])


def _first_layer(norm: _BatchNorm, linear: _Linear, grad: Tensor, normed: Tensor) -> None:
    """Set the gradients of the first batch norm and the first layer: see the module's docstring.

    ``linear.bias_grad`` is there already: the column sums of ``grad``.
    """
    sums = linear.bias_grad
    torch.bmm(grad.mT, normed.expand(len(grad), *normed.shape), out=linear.weight_grad)
    torch.sum(linear.weight * linear.weight_grad, 1, out=norm.weight_grad)
    torch.bmm(sums[:, None], linear.weight, out=norm.bias_grad[:, None])
    linear.weight_grad.mul_(norm.weight[:, None]).baddbmm_(sums[:, :, None], norm.bias[:, None])


@dataclass(frozen=True)
class _Names:
    """Names of the entries of a head's state dict."""

    norms: tuple[str, ...]
    linears: tuple[str, ...]
    state: tuple[str, ...]


def _layout(config: HeadConfig) -> tuple[_Names, dict[str, tuple[int, ...]]]:
    """Return the names, and the shapes of the parameters in the order of the state dict."""
    state = state_layout(config)
    sizes = {name: shape for name, (_, shape) in state.items() if name.endswith(("t", "bias"))}
    norms = [name.split(".", 1)[0] for name in state if name.endswith("running_mean")]
    linears = [
        name.split(".", 1)[0] for name in sizes
        if name.endswith("weight") and name.split(".", 1)[0] not in norms
    ]  # fmt: skip
    return _Names(tuple(norms), tuple(linears), tuple(state)), sizes


def _views(buffer: Tensor, sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the parameters by name: views (K, ...) of a buffer (K, P)."""
    views, start = {}, 0
    for name, shape in sizes.items():
        end = start + math.prod(shape)
        views[name] = buffer[:, start:end].view(len(buffer), *shape)
        start = end
    return views


def _initialise(
    config: HeadConfig, seed: int, device: torch.device
) -> tuple[dict[str, Tensor], torch.Generator]:
    """Return the initial state of a head on the CPU, and what its dropout masks are drawn by."""
    generator = torch.Generator().manual_seed(seed)
    state = build_head(config, generator).state_dict()
    if device.type != "cpu":  # on a CPU the same stream goes on
        generator = torch.Generator(device).manual_seed(seed)
    return state, generator
