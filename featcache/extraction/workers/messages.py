"""How workers in other processes are told of their facts, and tell what they do.

The same for processes of this machine and for Ray's actors, which differ in what carries it.
"""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable
from dataclasses import replace

from featcache.errors import ConfigError, FeatcacheError
from featcache.extraction.workers.worker import Done, Facts, Message, Progress

_NUM_IMAGES = 64  # of one message of progress: small batches would send thousands a second


def pack_facts(facts: Facts, option: str, dumps: Callable[[Facts], bytes] = pickle.dumps) -> bytes:
    """Return the facts as a pickle.

    Args:
        facts: What workers are told.
        option: What the user asked for, ``--ray`` say, for messages.
        dumps: Makes the pickle.

    Raises:
        ConfigError: If a backbone cannot be sent.
    """
    try:
        return dumps(facts)
    except Exception as error:  # a user's network may refuse in any way
        raise ConfigError(
            option, expected="a backbone that can be sent to another process",
            found=first_line(error), hint=f"Make it of classes of a module, or leave {option} out",
        ) from error  # fmt: skip


def unpack_facts(data: bytes, option: str) -> Facts:
    """Return what ``pack_facts`` packed, in the worker.

    Raises:
        ConfigError: If a module is not there, or fails.
    """
    try:
        facts = pickle.loads(data)
    except Exception as error:
        raise ConfigError(
            option, expected="a backbone that another process can import", found=first_line(error),
            hint="Make it of classes of a module on PYTHONPATH (of every machine), or leave "
            f"{option} out",
        ) from error  # fmt: skip
    assert isinstance(facts, Facts)
    return facts


class Bundled:
    """Hands messages on, those of progress bundled: one for every 64 images.

    Args:
        hand_on: Called with each.
    """

    def __init__(self, hand_on: Callable[[Message], object]) -> None:
        self._hand_on, self._num_images = hand_on, 0

    def __call__(self, message: Message) -> None:
        """Take a message."""
        if isinstance(message, Progress):
            self._num_images += message.num_images
            if self._num_images < _NUM_IMAGES:
                return
            message = replace(message, num_images=self._num_images)
        if isinstance(message, Progress | Done):
            self._num_images = 0
        self._hand_on(message)


def first_line(error: BaseException) -> str:
    """Return what an error says, in a line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def sendable_error(error: BaseException) -> BaseException:
    """Return an error that another process can read; of a bug with its traceback."""
    if not isinstance(error, FeatcacheError):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            error.add_note("".join(traceback.format_exception(error)))
            return error
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
