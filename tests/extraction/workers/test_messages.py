"""What workers in other processes are told, and tell."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from featcache.errors import ConfigError, DataError
from featcache.extraction.workers.messages import (
    Bundled,
    pack_facts,
    sendable_error,
    unpack_facts,
)
from featcache.extraction.workers.worker import Done, Facts, Message, Progress, Ready


def test_progress_is_bundled_and_begins_anew_with_each_task() -> None:
    said = list[Message]()
    bundled = Bundled(said.append)
    ready, done = Ready("host", "cpu", 1, 16), Done(1, (), 130, 1.0, {})
    for message in (ready, *[Progress(1, 10)] * 13, done, *[Progress(2, 30)] * 2, done):
        bundled(message)
    assert said == [ready, Progress(1, 70), done, done]


def test_facts_that_cannot_be_sent_or_read_are_said() -> None:
    facts: Any = Facts(threading.Lock(), (), 1, 0)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"^--ray: expected a backbone that can be sent .*_thread"
    ):
        pack_facts(facts, "--ray")
    with pytest.raises(
        ConfigError, match=r"^--processes: expected a backbone that another .*nowhe"
    ):
        unpack_facts(b"cnowhere\nNetwork\n.", "--processes")
    assert unpack_facts(pack_facts(Facts(None, (), 7, 0), "--ray"), "--ray").workers == 7  # type: ignore[arg-type]


def test_errors_are_sent_with_their_traceback_unless_they_are_ours() -> None:
    own = DataError("image", expected="a", found="b")
    assert sendable_error(own) is own

    class Local(Exception):  # noqa: N818 (its name does not matter)
        pass

    for error in (ValueError("odd"), Local("odd")):
        try:
            raise error
        except Exception as caught:  # noqa: BLE001
            sent = pickle.loads(pickle.dumps(sendable_error(caught)))
        assert "test_messages.py" in "".join([str(sent), *getattr(sent, "__notes__", [])])
