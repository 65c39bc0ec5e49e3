"""Runs that are killed at random moments and gone on with end as if nothing had been."""

import random

import pytest

from benchmarks import kills


@pytest.mark.parametrize("name", kills.RUNS)
def test_killed_again_and_again_a_run_ends_at_the_same_hash(name, launcher, tmp_path, record_property):
    found = kills.kill_and_resume(launcher, name, 4, tmp_path, random.Random(name), per_run=4)
    assert not found.problems
    assert found.bytes_lost == found.rows_lost == 0
    assert found.kills == 4 and found.tensors > 50 and found.bytes_compared > 10_000 and found.rows_compared >= 10
    record_property("kills", found.kills)
