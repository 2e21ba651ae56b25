"""Order of records: every epoch whole and shuffled anew, and exact resumption."""

import json

import pytest

from sdzero_jax.data import shuffled_batches
from sdzero_jax.errors import UserError


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_each_epoch_is_a_new_permutation(batch_size):
    batches = shuffled_batches(list(range(14)), batch_size, seed=0)
    order = [record for _ in range(2 * 14 // batch_size) for record in next(batches)]
    assert sorted(order[:14]) == sorted(order[14:28]) == list(range(14))
    assert order[:14] != order[14:28] and order[:14] != list(range(14))


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_state_is_exact_and_plain_json(drawn):
    batches = shuffled_batches(list(range(10)), 3, seed=1)
    for _ in range(drawn):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    wanted = [next(batches) for _ in range(6)]
    other = shuffled_batches(list(range(10)), 3, seed=1)
    other.set_state(state)
    assert [next(other) for _ in range(6)] == wanted


def test_seeds_differ_and_empty_input_is_refused():
    assert next(shuffled_batches(list(range(50)), 8, 0)) != next(shuffled_batches(list(range(50)), 8, 1))
    with pytest.raises(UserError, match="from 0 records"):
        shuffled_batches([], 4, 0)
