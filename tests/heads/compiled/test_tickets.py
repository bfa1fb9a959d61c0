"""Pieces of work that threads take by ticket: each once, and nobody waits for ever."""

from __future__ import annotations

import threading
import time

import numba
import numpy as np
import numpy.typing as npt
import pytest

from featcache.heads.compiled import tickets
from featcache.heads.compiled.atomics import add, exchange, look, pause
from featcache.heads.compiled.tickets import (
    STATE_SIZE,
    await_all,
    await_piece,
    end_piece,
    open_pieces,
    take_piece,
)

_Array = npt.NDArray[np.int64]
PIECES = 8


@numba.njit(nogil=True)
def lead(state: _Array, work: _Array, sums: _Array) -> int:
    """Open pieces again and again; sum up what was written for them. Returns how many it took."""
    num_taken = 0
    for phase in range(len(sums)):
        end = open_pieces(state, PIECES)
        piece = take_piece(state, end)
        while piece >= 0:
            work[piece] += piece
            num_taken += 1
            end_piece(state)
            piece = take_piece(state, end)
        await_all(state, end, tickets.PATIENCE)
        for piece in range(end - PIECES, end):
            sums[phase] += work[piece]
    return num_taken


@numba.njit(nogil=True)
def follow(state: _Array, work: _Array, end: int) -> int:
    """Take pieces before ``end`` as a helper does; return how many."""
    num_taken = 0
    piece = await_piece(state, end, tickets.PATIENCE)
    while piece >= 0:
        work[piece] += piece
        num_taken += 1
        end_piece(state)
        piece = await_piece(state, end, tickets.PATIENCE)
    return num_taken


def follow_and_tell(state: _Array, work: _Array, end: int, taken: list[int]) -> None:
    """Help until all pieces are taken: one who came too early, or was stopped, comes again."""
    num_taken = 0
    while state[tickets._TAKEN] < end:
        num_taken += follow(state, work, end)
    taken.append(num_taken)


@numba.njit(nogil=True)
def take_one(state: _Array, end: int) -> int:
    return take_piece(state, end)


@numba.njit(nogil=True)
def open_some(state: _Array, count: int) -> int:
    return open_pieces(state, count)


@numba.njit(nogil=True)
def end_one(state: _Array) -> None:
    end_piece(state)


@numba.njit(nogil=True)
def wait_for(state: _Array, end: int) -> None:
    await_all(state, end, tickets.PATIENCE)


def test_each_piece_is_taken_once_and_its_result_is_seen() -> None:
    """By the sums right after each phase: a result that came late would be missing there."""
    num_phases = 5_000
    numbers = np.arange(num_phases * PIECES)
    for _ in range(100):  # until both had a core
        state, sums = np.zeros(STATE_SIZE, np.int64), np.zeros(num_phases, np.int64)
        work, taken = np.zeros_like(numbers), list[int]()
        arguments = state, work, len(numbers), taken
        helper = threading.Thread(target=follow_and_tell, args=arguments)
        helper.start()
        taken.append(lead(state, work, sums))
        helper.join(60)
        assert np.array_equal(work, numbers)
        assert np.array_equal(sums, numbers.reshape(-1, PIECES).sum(1))
        assert sum(taken) == len(work)
        if min(taken) > num_phases:
            return
    pytest.fail("never did both work, so nothing was shown")


def test_a_leader_alone_takes_all() -> None:
    state, work, sums = (np.zeros(n, np.int64) for n in (STATE_SIZE, 5 * PIECES, 5))
    assert lead(state, work, sums) == 5 * PIECES
    assert np.array_equal(work, np.arange(5 * PIECES))


def test_pieces_end_where_they_were_opened_and_where_the_helper_is_told() -> None:
    state = np.zeros(STATE_SIZE, np.int64)
    assert take_one(state, 10) == -1
    assert open_some(state, 3) == 3
    assert [take_one(state, 2) for _ in range(3)] == [0, 1, -1]
    assert [take_one(state, 10) for _ in range(2)] == [2, -1]
    assert open_some(state, 4) == 7
    assert take_one(state, 10) == 3


def test_a_helper_gives_up_when_nothing_is_opened() -> None:
    state, work = np.zeros(STATE_SIZE, np.int64), np.zeros(1, np.int64)
    assert follow(state, work, 1) == 0
    assert not state.any()


def test_the_leader_waits_for_a_piece_in_other_hands() -> None:
    state = np.zeros(STATE_SIZE, np.int64)
    wait_for(state, 0)  # compiled; nothing to wait for
    assert (open_some(state, 1), take_one(state, 1)) == (1, 0)
    waiting = threading.Thread(target=wait_for, args=(state, 1))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    end_one(state)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_helper_that_kept_the_leader_waiting_for_long_is_sent_away() -> None:
    state, work = np.zeros(STATE_SIZE, np.int64), np.zeros(2, np.int64)
    wait_for(state, 0)
    assert (open_some(state, 1), take_one(state, 2)) == (1, 0)
    waiting = threading.Thread(target=wait_for, args=(state, 1))
    waiting.start()
    time.sleep(0.2)  # as one that has lost its core
    end_one(state)
    waiting.join(10)
    assert state[tickets._CLOSED]
    assert open_some(state, 1) == 2
    assert follow(state, work, 2) == 0
    assert take_one(state, 2) == 1  # by the leader


def test_entries_are_changed_one_thread_at_a_time() -> None:
    @numba.njit(nogil=True)
    def count(array: _Array, times: int) -> None:
        for _ in range(times):
            add(array, 1, 2)
            pause()
            while True:
                found = look(array, 2)
                if exchange(array, 2, found, found + 3):
                    break

    array, times = np.zeros(3, np.int64), 200_000
    count(array, 0)
    threads = [threading.Thread(target=count, args=(array, times)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert array.tolist() == [0, 4 * times, 6 * times]


def test_an_exchange_that_comes_too_late_changes_nothing() -> None:
    @numba.njit
    def try_to(array: _Array) -> bool:
        return exchange(array, 0, 5, 9)

    array = np.array([4])
    assert not try_to(array)
    assert array.tolist() == [4]


def test_counters_lie_in_cache_lines_of_their_own() -> None:
    places = sorted({tickets._OPENED, tickets._TAKEN, tickets._DONE, tickets._CLOSED})
    assert all(b - a >= 8 for a, b in zip(places, [*places[1:], STATE_SIZE], strict=True))
