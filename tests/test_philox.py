"""Philox4x32-10 against the published known answers and a plain-integer oracle."""

import pytest
import torch
from resident_oracle import philox_words

from fastcifar import philox

# From the known-answer file of Random123: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    step, seed = counter[1] | counter[2] << 32, key[0] | key[1] << 32
    words = philox.philox(torch.tensor([counter[0]]), step, counter[3], seed)
    assert tuple(words[:, 0].tolist()) == expected
    assert philox_words(counter[0], step, counter[3], seed) == expected


def test_all_positions_equal_the_oracle():
    words = philox.philox(torch.arange(100, 140), 7, 3, 12345)
    for row, position in enumerate(range(100, 140)):
        assert tuple(words[:, row].tolist()) == philox_words(position, 7, 3, 12345)


def test_below_and_uniform_stay_in_range():
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert philox.below(words, 9).tolist() == [0, 0, 4, 8]
    values = philox.uniform(words)
    assert 0 < values.min() and values.max() < 1
