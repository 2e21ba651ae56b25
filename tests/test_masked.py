"""Masked reductions: hand constants of every length mode, micro-batches, and masked rubbish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdzero_jax import masked

VALUES = jnp.array([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
MASK = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # 3, 1 and 0 tokens
BY_HAND = {
    "sum": 15.0,
    "token_mean": 15 / 4,
    "seq_mean_token_sum": 15 / 2,  # the row without tokens does not count
    "seq_mean_token_mean": (7 / 3 + 8) / 2,
    "seq_sum_over_max_length": (7 / 5 + 8 / 5) / 2,
}


def _loss(values, mask, mode, denominator=None):
    weights = masked.token_weights(mask, mode, denominator, max_length=5)
    return masked.masked_sum(values, weights)


@pytest.mark.parametrize("mode", BY_HAND)
def test_length_modes_by_hand(mode):
    np.testing.assert_allclose(_loss(VALUES, MASK, mode), BY_HAND[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", BY_HAND)
@pytest.mark.parametrize("cuts", [(1, 2), (2,), (1,)])
def test_micro_batches_with_a_global_denominator_add_up(mode, cuts):
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(3, 7)), rng.integers(0, 2, size=(3, 7))
    values, mask = jnp.asarray(values, jnp.float32), jnp.asarray(mask, jnp.float32)
    denominator = masked.length_denominator(mask, mode)
    parts = list(zip(np.split(values, cuts), np.split(mask, cuts)))
    total = sum(_loss(v, m, mode, denominator) for v, m in parts)
    np.testing.assert_allclose(total, _loss(values, mask, mode), rtol=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in BY_HAND if mode != "sum"])
def test_denominators_of_micro_batches_add_up_to_the_global_one(mode):
    parts = sum(masked.length_denominator(MASK[i : i + 1], mode) for i in range(3))
    assert parts == masked.length_denominator(MASK, mode) == {"token_mean": 4}.get(mode, 2)


def test_weights_above_one_count_as_such_and_as_one_token():
    weights = masked.token_weights(2 * MASK, "token_mean")
    np.testing.assert_allclose(weights, 2 * MASK / 4)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_masked_rubbish_adds_exactly_zero_to_value_and_gradient(rubbish):
    dirty = jnp.where(MASK == 0, rubbish, VALUES)
    assert masked.masked_sum(dirty, MASK) == 15.0
    assert masked.masked_mean(dirty, MASK) == 15 / 4
    np.testing.assert_array_equal(jax.grad(masked.masked_sum)(dirty, MASK), MASK)


def test_an_empty_mask_gives_zero_and_not_nan():
    nothing = jnp.zeros_like(MASK)
    assert masked.masked_mean(VALUES, nothing) == 0
    for mode in BY_HAND:
        assert np.all(masked.token_weights(nothing, mode, max_length=5) == 0)


def test_masked_mean_takes_a_global_denominator():
    assert masked.masked_mean(VALUES, MASK, jnp.float32(30.0)) == 0.5


def test_reductions_are_float32():
    values = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    total = masked.masked_sum(values, jnp.ones((1, 4096), jnp.bfloat16))
    assert total.dtype == jnp.float32 and total == 4096


def test_unknown_mode_and_missing_max_length_are_refused():
    with pytest.raises(ValueError, match="unknown length mode 'mean'"):
        masked.token_weights(MASK, "mean")
    with pytest.raises(ValueError, match="max_length"):
        masked.token_weights(MASK, "seq_sum_over_max_length")
