"""Random weights of large networks at a tenth of the time that torch takes to draw them.

A network of 30 million parameters is drawn in a third of a second, and a file's weights then
replace what was drawn. These repeat 65,537 numbers, which is random enough for a network to be
compared with itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def draw_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``uniform_`` and ``normal_`` repeat the numbers that they drew first."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(65_537, generator=generator)
    normal = torch.randn(65_537, generator=generator)

    def fill(into: torch.Tensor, numbers: torch.Tensor, scale: float, shift: float) -> torch.Tensor:
        if into.is_meta:
            return into
        flat = torch.empty(into.numel(), dtype=into.dtype)
        for part in flat.split(len(numbers)):
            torch.mul(numbers[: len(part)], scale, out=part)
        return into.copy_(flat.add_(shift).view(into.shape))

    def uniform_(self: torch.Tensor, a: float = 0, b: float = 1, **_: Any) -> torch.Tensor:
        return fill(self, uniform, b - a, a)

    def normal_(self: torch.Tensor, mean: float = 0, std: float = 1, **_: Any) -> torch.Tensor:
        return fill(self, normal, std, mean)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
