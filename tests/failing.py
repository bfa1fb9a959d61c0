"""Functions that fail, to stand in for ones that would work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def failing(error: BaseException) -> Callable[..., NoReturn]:
    """Return a function that raises ``error`` whatever it is given."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail
