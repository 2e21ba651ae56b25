"""From logits to tokens: filters against a sort in float64, draws against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sdzero_jax.sampler.sampling import filter_logits, request_key_data, sample_tokens

LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], np.float32))


def filtered(**settings):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    arrays = {k: jnp.array([v], jnp.int32 if k == "top_k" else jnp.float32) for k, v in values.items()}
    return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(LOGITS)[None], **arrays)[0]))


def test_filters_keep_what_they_say():
    np.testing.assert_allclose(filtered(top_k=2), [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(filtered(top_p=0.7), np.array([0.4, 0.25, 0.15, 0, 0, 0]) / 0.8, atol=1e-6)
    np.testing.assert_allclose(filtered(top_p=0.3), [1, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(filtered(min_p=0.3), np.array([0.4, 0.25, 0.15, 0, 0, 0]) / 0.8, atol=1e-6)
    np.testing.assert_allclose(filtered(top_p=1.0, top_k=6), [0.4, 0.25, 0.15, 0.1, 0.06, 0.04], atol=1e-6)


def draws(count, temperature, **settings):
    values = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    keys = np.stack([request_key_data(7, f"r{i}", 0) for i in range(count)])
    column = lambda value, dtype=jnp.float32: jnp.full(count, value, dtype)  # noqa: E731
    tokens, _, _ = sample_tokens(
        jnp.broadcast_to(jnp.asarray(LOGITS), (count, len(LOGITS))), jnp.asarray(keys), column(0, jnp.int32),
        column(temperature), column(values["top_k"], jnp.int32), column(values["top_p"]), column(values["min_p"]),
    )  # fmt: skip
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS))


def p_value(counts, probabilities):
    kept = probabilities > 0
    assert counts[~kept].sum() == 0, "a token outside the kept set was drawn"
    expected = probabilities[kept].astype(float)
    return stats.chisquare(counts[kept], counts.sum() * expected / expected.sum()).pvalue


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.79}, {"min_p": 0.2},
        {"top_k": 4, "top_p": 0.9, "min_p": 0.2, "temperature": 1.3},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(settings):
    temperature = settings.pop("temperature", 1.0)
    counts = draws(20_000, temperature, **settings)
    assert p_value(counts, filtered(temperature=temperature, **settings)) > 1e-3


def test_the_distribution_test_notices_a_wrong_temperature():
    assert p_value(draws(20_000, 1.0), filtered(temperature=1.2)) < 1e-6


def test_the_test_notices_five_percent_of_temperature():
    logits = np.zeros(64, np.float32)
    logits[9] = np.log(63)  # half of the mass: where a temperature shows most
    exact = np.exp(logits / 1.05) / np.exp(logits / 1.05).sum()
    keys = np.stack([request_key_data(7, f"r{i}", 0) for i in range(20_000)])
    column = lambda value, dtype=jnp.float32: jnp.full(20_000, value, dtype)  # noqa: E731
    tokens, _, _ = sample_tokens(
        jnp.broadcast_to(jnp.asarray(logits), (20_000, 64)), jnp.asarray(keys), column(0, jnp.int32),
        column(1.0), column(0, jnp.int32), column(1.0), column(0.0),
    )  # fmt: skip
    counts = np.bincount(np.asarray(tokens), minlength=64)
    assert pooled_p_value(counts, exact) < 1e-6
    assert pooled_p_value(counts, np.exp(logits) / np.exp(logits).sum()) > 1e-3


def pooled_p_value(counts, probabilities):
    """Chi-square, bins with an expected count below 5 pooled."""
    expected = counts.sum() * probabilities.astype(float)
    small = expected < 5
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def by_sorting(logits, temperature, top_k, top_p, min_p):
    """The kept set of one row in float64, by a stable sort: the definition."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    order = order[:top_k] if top_k else order
    p = np.exp(scaled[order] - scaled[order].max())
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p) - p
        order, p = order[before < top_p], p[before < top_p]
    return set(order[p >= min_p * p[0]].tolist())


def test_filters_keep_what_a_sort_keeps():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        logits = rng.normal(size=50).astype(np.float32) * rng.choice([0.1, 1.0, 5.0])
        if rng.random() < 0.3:
            logits = np.round(logits)  # many ties
        rows.append((logits, rng.choice([0.5, 1.0, 1.7]), int(rng.choice([0, 1, 7, 50])),
                     float(rng.choice([0.05, 0.5, 0.93, 1.0])), float(rng.choice([0.0, 0.1, 0.5]))))  # fmt: skip
    logits, temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*rows))
    out = filter_logits(
        jnp.asarray(logits), jnp.asarray(temperature, jnp.float32), jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32), jnp.asarray(min_p, jnp.float32),
    )  # fmt: skip
    for row, kept in zip(rows, np.asarray(out) > -np.inf):
        assert set(np.flatnonzero(kept).tolist()) == by_sorting(*row)


def test_equal_logits_are_kept_from_the_lowest_id_on():
    flat = jnp.zeros((4, 10))
    one = jnp.ones(4)
    out = filter_logits(flat, one, jnp.array([3, 0, 0, 0]), jnp.array([1.0, 0.35, 1.0, 1.0]), jnp.array([0, 0, 0.9, 0]))
    kept = [np.flatnonzero(row > -np.inf).tolist() for row in np.asarray(out)]
    assert kept == [[0, 1, 2], [0, 1, 2, 3], list(range(10)), list(range(10))]


def test_a_row_is_the_same_whatever_its_neighbours_ask_for():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32))
    keys = jnp.asarray(np.stack([request_key_data(1, "a", 0), request_key_data(1, "b", 0)]))
    zero = jnp.zeros(2, jnp.int32)

    def draw(top_p, temperature, live):
        out = sample_tokens(logits, keys, zero, jnp.array([0.9, temperature]), zero, jnp.array([1.0, top_p]),
                            jnp.zeros(2), jnp.array([True, live]))  # fmt: skip
        return [np.asarray(x)[0].tobytes() for x in out]

    assert draw(1.0, 0.9, True) == draw(0.3, 0.9, True) == draw(0.3, 0.0, True) == draw(0.3, 0.9, False)
