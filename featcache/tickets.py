"""Pieces of a compiled step's work, which two threads take by themselves: for ``head_kernels``.

The thread that leads a step opens some pieces at a time. Who is free takes the next one by its
number, as a ticket, until none is left; the leader then waits for those that the other still works
on. Who comes late has less to do, and nobody is waited for who did not come. Before, each thread
was handed its half by a queue and a future, and waited for asleep, each time: that took a quarter
of a millisecond of a step of 1.6 on two Sapphire Rapids cores.

Reads: nothing. Writes: the state. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.atomics import add, exchange, look, pause
from featcache.compiling import part

_State = npt.NDArray[np.int64]

_OPENED, _TAKEN, _DONE = 0, 8, 16  # 64 bytes apart: cache lines of their own
STATE_SIZE = 24

_PATIENCE = 2_000
"""Times that a helper looks for a piece to take: 40 microseconds. One that has to wait longer helps
with the next pieces. With a millisecond, and another process on one of two cores, a step took
3.8 ms: the scheduler stops who looks busy, and the leader waits for a piece in its hands. So it
takes 2.3, as one thread alone does, and no longer on quiet cores."""


@part
def open_pieces(state: _State, count: int) -> int:
    """Let pieces be taken, numbered from where the last ones ended; return where these end."""
    end: int = add(state, _OPENED, count) + count
    return end


@part
def take_piece(state: _State, end: int) -> int:
    """Return the number of a piece that is now the caller's; -1 if none before ``end`` is open."""
    while True:
        taken: int = look(state, _TAKEN)
        if taken >= min(look(state, _OPENED), end):
            return -1
        if exchange(state, _TAKEN, taken, taken + 1):
            return taken


@part
def await_piece(state: _State, end: int) -> int:
    """As ``take_piece``, but wait a while for pieces before ``end`` to be opened."""
    for _ in range(_PATIENCE):
        piece = take_piece(state, end)
        if piece >= 0 or look(state, _TAKEN) >= end:
            return piece
        pause()
    return -1


@part
def end_piece(state: _State) -> None:
    """Show the leader what was written for a piece."""
    add(state, _DONE, 1)


@part
def await_all(state: _State, end: int) -> None:
    """Wait until all pieces before ``end`` are done."""
    while look(state, _DONE) < end:
        pause()
