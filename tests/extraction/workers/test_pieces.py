"""Which image is blamed for dead workers: the one that kills them, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from featcache.extraction.workers import pieces
from featcache.extraction.workers.pieces import Pieces

RATE = 50.0  # images a second of a worker
DECODER_SECONDS = 1.0  # for a child process to begin, where images are decoded in one
SHARD = 100


def simulate(
    rng: random.Random, num_images: int, life: float, fatal: frozenset[int] = frozenset()
) -> tuple[int, list[int]]:
    """Run images with a worker that dies at random after ``life`` s on average, and of some images.

    Returns:
        How many workers have died, and the images that were blamed.
    """
    wanted = set(range(num_images))
    ledger: Any = SimpleNamespace(wants=wanted.__contains__)
    job: Any = SimpleNamespace(ledger=ledger, engine=SimpleNamespace(batch_size=1))
    left = Pieces([job], range(num_images), 1, least=16, most=num_images)
    num_deaths, blamed = 0, list[int]()
    while piece := left.cut(RATE):
        start = DECODER_SECONDS if piece.is_suspect else 0.0
        death = rng.expovariate(1 / life) - start
        for number, position in enumerate(piece.positions):
            if position in fatal:
                death = min(death, number / RATE)
        num_done = max(0, int(death * RATE))
        is_dead = num_done < len(piece.positions)
        if is_dead:  # what is in no shard is lost
            num_done -= num_done % SHARD
        wanted.difference_update(piece.positions[:num_done])
        if not is_dead:
            left.put_back(piece)
            continue
        num_deaths += 1
        if (to_blame := left.give_again(piece)) is not None:
            blamed.append(to_blame)
            wanted.remove(to_blame)
    assert not wanted
    assert left.num_done == num_images
    return num_deaths, blamed


def blamed_at_random(life: float, rounds: int) -> tuple[int, int]:
    """Return how many workers died, and how many images were blamed that had done nothing."""
    rng, deaths, blamed = random.Random(4), 0, 0
    for _ in range(rounds):
        num_deaths, of_round = simulate(rng, 1000, life)
        deaths, blamed = deaths + num_deaths, blamed + len(of_round)
    return deaths, blamed


def test_no_image_is_blamed_for_deaths_at_random(
    monkeypatch: pytest.MonkeyPatch, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """Of workers that live for 3 s, where one image alone takes a second: 6 of 34,044 deaths."""
    deaths, blamed = blamed_at_random(3.0, rounds(200, 2000))
    assert deaths > rounds(2000, 20_000)
    assert blamed <= deaths // 4000
    tally("images blamed for deaths at random", f"of {deaths:,} deaths", blamed)
    monkeypatch.setattr(pieces, "DEATHS_ALONE", 2)
    assert blamed_at_random(3.0, 200)[1] > 5


@pytest.mark.parametrize("life", [1e9, 30.0])
def test_images_that_kill_are_found_among_deaths_at_random(life: float) -> None:
    rng = random.Random(5)
    for _ in range(20):
        fatal = frozenset(rng.sample(range(1000), 4))
        assert set(simulate(rng, 1000, life, fatal)[1]) == fatal
