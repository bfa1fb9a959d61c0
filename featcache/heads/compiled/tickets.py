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

from featcache.compiling import part
from featcache.heads.compiled.atomics import add, exchange, look, pause

_State = npt.NDArray[np.int64]

_OPENED, _TAKEN, _DONE, _CLOSED = 0, 8, 16, 24  # 64 bytes apart: cache lines of their own
STATE_SIZE = 32

PATIENCE = 25_000
"""Times that a leader looks whether a helper has ended its piece, beside what that should take: for
half a millisecond. One that takes longer is sent away then: where others want the cores too, the
scheduler stops who is busy, with a piece in its hands. Beside one busy process on two Xeon cores a
head trains in 1.5 s, as by one thread; alone in 0.8 and 1.3."""

_HELPERS = 20
"""Times that patience that a helper has while no piece is open: for ever would be too long if there
is no leader any more."""


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
def await_piece(state: _State, end: int, patience: int) -> int:
    """As ``take_piece``, but wait a while for pieces before ``end`` to be opened."""
    for _ in range(_HELPERS * patience):
        if look(state, _CLOSED):
            return -1
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
def await_all(state: _State, end: int, patience: int) -> None:
    """Wait until all pieces before ``end`` are done; if that is long, do without a helper then."""
    looks = 0
    while look(state, _DONE) < end:
        looks += 1
        pause()
    if looks > patience:
        add(state, _CLOSED, 1)
