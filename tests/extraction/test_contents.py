"""Contents: found by sha256 whatever else is known, claimed once, gathered in any order."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest

from featcache.extraction.contents import Contents, Vectors


def held(array: np.ndarray) -> Vectors:
    return lambda: array


def sha(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def colliding(number: int) -> bytes:
    """Hashes that all begin in the same slot of the table."""
    return bytes(8) + sha(number)[8:]


@pytest.fixture
def mixed() -> Contents:
    """0 to 5: one vector [n, n, n] each; then 6 and 8 of three views, 7 of one."""
    contents = Contents()
    plain = np.array([[n] * 3 for n in range(6)], np.float32)
    assert contents.add(held(plain), [1] * 6, [sha(n) for n in range(6)], [False] * 6) == range(6)
    views = {6: 3, 7: 1, 8: 3}
    vectors = [[n + view / 10] * 3 for n, count in views.items() for view in range(count)]
    made = np.array(vectors, np.float32)
    numbers = contents.add(held(made), [3, 1, 3], [sha(n) for n in views], [False, True, False])
    assert numbers == range(6, 9)
    return contents


def gather(contents: Contents, *numbers: int, num_views: int = 1, block: int = 3) -> np.ndarray:
    blocks = contents.blocks(np.array(numbers), num_views, block_vectors=block)
    return np.concatenate(list(blocks))


def test_features_are_gathered_in_the_order_asked_for(mixed: Contents) -> None:
    np.testing.assert_array_equal(gather(mixed, 5, 7, 0, 4, 3)[:, 0], [5, 7, 0, 4, 3])
    views = gather(mixed, 8, 6, num_views=3, block=4)
    expected = np.float32([[8, 8.1, 8.2], [6, 6.1, 6.2]])
    np.testing.assert_array_equal(views, np.repeat(expected[..., None], 3, 2))


def test_of_more_views_than_wanted_the_first_are_taken(mixed: Contents) -> None:
    """``train`` has become ``valid``."""
    assert [mixed.find(sha(n)) for n in (8, 0, 7)] == [8, 0, 7]
    np.testing.assert_array_equal(gather(mixed, 8, 0, 6)[:, 0], [8, 0, 6])
    np.testing.assert_array_equal(
        gather(mixed, 8, 6, num_views=2)[..., 0], np.float32([[8, 8.1], [6, 6.1]])
    )


def test_a_content_of_too_few_views_is_not_known(mixed: Contents) -> None:
    """``valid`` has become ``train``."""
    assert [mixed.find(sha(n), 3) for n in (0, 6, 7, 8)] == [None, 6, None, 8]
    assert mixed.find(sha(6), 4) is None
    assert mixed.claim(sha(7), 3, "seven")
    number = mixed.claimed_by("seven")
    assert number == 9
    mixed.add_made(held(np.full((3, 3), 70, np.float32)), ["seven"], [False])
    assert mixed.find(sha(7), 3) == mixed.find(sha(7)) == 9
    np.testing.assert_array_equal(gather(mixed, 9, num_views=3), np.full((1, 3, 3), 70))
    np.testing.assert_array_equal(gather(mixed, 7), [[7, 7, 7]])


def test_what_is_known_of_a_content(mixed: Contents) -> None:
    assert [mixed.is_truncated(n) for n in (6, 7, 8)] == [False, True, False]
    assert mixed.sha256_of(4) == sha(4)
    rows = mixed.sha256(np.array([8, 1]))
    assert [row.tobytes() for row in rows] == [sha(8), sha(1)]
    assert len(mixed) == 9
    assert mixed.find(sha(99)) is None


def test_an_unknown_hash_is_never_found() -> None:
    """Rows of ``write_cache`` have zeros for a hash: they are no copies of each other."""
    contents = Contents()
    contents.add(held(np.zeros((2, 3), np.float32)), [1, 1], [bytes(32), bytes(32)], [False, False])
    assert contents.find(bytes(32)) is None


@pytest.mark.parametrize("make", [sha, colliding])
def test_thousands_are_told_apart(make: object) -> None:
    number_of = sha if make is sha else colliding
    count = 5_000 if make is sha else 700
    contents = Contents()
    for n in range(count):
        assert contents.claim(number_of(n), 1, str(n))
        assert not contents.claim(number_of(n), 1, "another")
    assert [contents.find(number_of(n)) for n in range(count)] == list(range(count))
    assert contents.find(number_of(count)) is None


def test_whoever_claims_first_makes_it_and_may_ask_again() -> None:
    contents = Contents()
    assert contents.claim(sha(0), 1, "a")
    assert not contents.claim(sha(0), 1, "b")
    assert contents.claim(sha(0), 1, "a")  # tried again, after a decoder that hung
    assert contents.claimed_by("b") is None
    assert not contents.is_made(0)
    contents.add_made(held(np.ones((1, 3), np.float32)), ["a"], [True])
    assert contents.is_made(0)
    assert contents.is_truncated(0)
    assert contents.claimed_by("a") is None
    assert not contents.claim(sha(0), 1, "c")


def test_a_claim_for_more_views_does_not_disturb_the_one_for_fewer() -> None:
    contents = Contents()
    assert contents.claim(sha(0), 1, "valid")
    assert contents.claim(sha(0), 2, "train")
    assert not contents.claim(sha(0), 1, "test")
    contents.add_made(held(np.full((1, 3), 1, np.float32)), ["valid"], [False])
    contents.add_made(held(np.full((2, 3), 2, np.float32)), ["train"], [False])
    np.testing.assert_array_equal(gather(contents, 0), np.full((1, 3), 1))
    np.testing.assert_array_equal(gather(contents, 1, num_views=2), np.full((1, 2, 3), 2))


def test_a_failure_is_remembered() -> None:
    contents = Contents()
    assert contents.claim(sha(0), 1, "a")
    contents.fail("a", "not an image")
    assert contents.failure(0) == "not an image"
    assert not contents.is_made(0)
    assert not contents.claim(sha(0), 1, "b")  # it would fail again


def test_of_many_threads_one_makes_each_content() -> None:
    contents = Contents()
    won: list[int] = []

    def ask(name: str) -> None:
        won.extend(n for n in range(2_000) if contents.claim(sha(n), 1, f"{name}/{n}"))

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(2_000))
