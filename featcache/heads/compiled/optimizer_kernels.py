"""The optimizers of module ``optimizer``, compiled, for ``head_kernels``.

Reads, writes: arrays. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.compiling import intrinsic, part
from featcache.heads.compiled.vectors import INDEX, NOTHING, PANEL, Code, Pair, Value

_Floats = npt.NDArray[np.float32]

ADAM, ADAMW, SGD = 0, 1, 2  # ``kind``: places in ``optimizer.OPTIMIZERS``

NUM_MOVED = {ADAM: 3, SGD: 2}
"""How many arrays a step writes: parameters and moments. (ADAMW is as ADAM.)"""

_ZERO, _ONE = np.float32(0), np.float32(1)
_BETA_1, _BETA_2, _ADAM_EPS = 0.9, 0.999, 1e-8
_SGD_MOMENTUM = 0.9


@part
def pace_of(kind: int, settings: _Floats) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return what a step needs of a head's settings.

    Args:
        kind: Of the optimizer.
        settings: (4,) learning rate, weight decay and Adam's corrections.

    Returns:
        Step size; what the root of the second moment is divided by, as a factor; the weight decay
        that is added to gradients; that which parameters shrink by.
    """
    rate, decay = settings[0], settings[1]
    if kind == SGD:
        return rate, _ONE, decay, _ZERO
    step, root = rate / settings[2], _ONE / np.sqrt(settings[3])
    return (step, root, _ZERO, rate * decay) if kind == ADAMW else (step, root, decay, _ZERO)


def write_move(
    code: Code, kind: int, pace: Sequence[Value], grad: Pair, before: Sequence[Pair]
) -> list[Pair]:
    """Write code that moves a panel of parameters.

    Args:
        code: Where.
        kind: ``SGD``, or another for both Adams.
        pace: As by ``pace_of``, spread.
        grad: Of the parameters.
        before: The parameters and their moments: of SGD one, else two.

    Returns:
        As ``before``.
    """
    build, fma = code.builder, code.multiply_add
    step, root, decay, shrinking = pace
    grad = [fma(decay, *pair) for pair in zip(before[0], grad, strict=True)]
    params = [build.fsub(param, build.fmul(shrinking, param)) for param in before[0]]
    if kind == SGD:
        moments = [[fma(code.all(_SGD_MOMENTUM), *p) for p in zip(before[1], grad, strict=True)]]
        by = [build.fmul(step, first) for first in moments[0]]
    else:
        moments = [[], []]
        for slope, first, second in zip(grad, *before[1:], strict=True):
            square = build.fmul(code.all(1 - _BETA_2), build.fmul(slope, slope))
            moments[0].append(fma(code.all(1 - _BETA_1), build.fsub(slope, first), first))
            moments[1].append(fma(code.all(_BETA_2), second, square))
        low, high = (fma(code.root(v), root, code.all(_ADAM_EPS)) for v in moments[1])
        # One division for two: a core has a single divider, which they would wait for. (Where a
        # second moment is infinite, after gradients of 1e19, both become NaN: torch stands still.)
        share = build.fdiv(step, build.fmul(low, high))
        by = [
            build.fmul(build.fmul(first, other), share)
            for first, other in zip(moments[0], (high, low), strict=True)
        ]
    return [[build.fsub(*pair) for pair in zip(params, by, strict=True)], *moments]


def _panel(kind: int, *, partial: bool) -> Any:
    """Return a function that moves the parameters of a panel."""

    @intrinsic
    def move_panel(  # noqa: PLR0917
        _: Any, param: Any, grad: Any, first: Any, second: Any, pace: Any, start: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code, start = Code(context, builder), arguments[5]
            grad, *moved = (code.array(signature, arguments, i) for i in (1, 0, 2, 3))
            if partial:
                code.keep_within(builder.sub(grad.shape[0], start))
            numbers = [code.spread(builder.extract_value(arguments[4], i)) for i in range(4)]
            places = [array.at(start) for array in moved[: NUM_MOVED[kind]]]
            before = [code.load(place) for place in places]
            after = write_move(code, kind, numbers, code.load(grad.at(start)), before)
            for panel, place in zip(after, places, strict=True):
                code.store(panel, place)
            return context.get_dummy_value()

        return NOTHING(param, grad, first, second, pace, INDEX), generate

    return move_panel


_adam, _last_adam = _panel(ADAM, partial=False), _panel(ADAM, partial=True)
_sgd, _last_sgd = _panel(SGD, partial=False), _panel(SGD, partial=True)


@part
def move(  # noqa: PLR0917
    kind: int, param: _Floats, grad: _Floats, first: _Floats, second: _Floats, settings: _Floats
) -> None:
    """Move some parameters against their gradient, all (n,)."""
    pace, end = pace_of(kind, settings), len(param) - len(param) % PANEL
    for start in range(0, end, PANEL):
        if kind == SGD:
            _sgd(param, grad, first, second, pace, start)
        else:
            _adam(param, grad, first, second, pace, start)
    if end < len(param) and kind == SGD:
        _last_sgd(param, grad, first, second, pace, end)
    elif end < len(param):
        _last_adam(param, grad, first, second, pace, end)
