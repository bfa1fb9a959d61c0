"""Contents are found by their sha256 like by a dict, however many there are."""

import hashlib
import random

import numpy as np

from featcache.extraction.contents import FORGOTTEN, IN_HAND, Contents


def digest(number):
    return hashlib.sha256(b"%d" % number).digest()


def test_what_was_entered_first_of_the_most_views_is_found():
    contents, known = Contents(), {}
    chance = random.Random(0)
    for _ in range(5000):  # the table of slots grows thrice
        sha256, views = digest(chance.randrange(2000)), chance.choice((1, 1, 4))
        number = contents.append(sha256, views, IN_HAND)
        if sha256 not in known or contents.num_views[known[sha256]] < views:
            known[sha256] = number
    assert all(contents.find(sha256) == number for sha256, number in known.items())
    assert contents.find(digest(2001)) is None
    few = next(s for s, number in known.items() if contents.num_views[number] == 1)
    assert contents.find(few, 4) is None
    hashes = contents.sha256_of(np.array([7, 3]))
    assert [row.tobytes() for row in hashes] == [contents.sha256(7), contents.sha256(3)]


def test_unknown_hashes_are_never_found_and_forgotten_ones_give_way():
    contents = Contents()
    assert contents.append(bytes(32), 1, 0) == 0
    assert contents.find(bytes(32)) is None
    first = contents.append(digest(1), 1, IN_HAND)
    contents.source[first] = FORGOTTEN
    assert contents.find(digest(1)) is None
    assert contents.find(digest(1)) is None
    second = contents.append(digest(1), 1, IN_HAND)
    assert contents.find(digest(1)) == second


def test_hashes_that_share_a_slot_are_told_apart():
    contents = Contents()
    alike = [bytes(8) + digest(number)[8:] for number in range(20)]
    numbers = [contents.append(sha256, 1, IN_HAND) for sha256 in alike]
    assert [contents.find(sha256) for sha256 in alike] == numbers
