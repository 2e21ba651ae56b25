"""Statistics and localisation against enumeration, brute force and constants worked out by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from sdzero_jax import statistics
from sdzero_jax.analysis import localisation


@pytest.mark.parametrize("n", [1, 4, 6])
def test_pass_at_k_by_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert statistics.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_nonsense(n, c, k):
    with pytest.raises(ValueError):
        statistics.pass_at_k(n, c, k)


def test_avg_at_k_leaves_out_what_the_grader_could_not_judge():
    assert statistics.avg_at_k(np.array([[1, 0, 0, 0], [1, 1, 1, 0]])) == 0.5
    # Question means 1, 0.5; the third has no verdict at all.
    assert statistics.avg_at_k([[1, None], [1, 0], [None, None]]) == 0.75
    assert math.isnan(statistics.avg_at_k([[None, None]]))


def test_majority():
    answers = [["7", "3", "3", None], [None, None, None, None], ["1", "2", "2", "1"], ["5", "5", "5", "6"]]
    assert statistics.majority_votes(answers) == [1, None, 0, 0]
    rewards = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]])
    assert statistics.majority_at_k(answers, rewards) == 0.5


def test_bootstrap_of_a_mean_matches_the_normal_theory():
    values = np.random.default_rng(3).normal(2.0, 3.0, 400)
    low, high = statistics.bootstrap_interval(values, seed=0, samples=4000)
    error = values.std() / math.sqrt(400)  # standard error of the resampled mean
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert statistics.bootstrap_interval(values, seed=0, samples=4000) == (low, high)
    assert statistics.bootstrap_interval(values, seed=1, samples=4000) != (low, high)


def test_bootstrap_of_two_values_and_other_statistics():
    # Means of two draws from {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert statistics.bootstrap_interval([0.0, 1.0], seed=0) == (0.0, 1.0)
    assert statistics.bootstrap_interval([0.3] * 5, seed=0) == pytest.approx((0.3, 0.3))
    assert statistics.bootstrap_interval(np.arange(5.0), np.max, seed=0)[1] == 4.0
    assert all(math.isnan(end) for end in statistics.bootstrap_interval([]))


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, 300)
    a, b = difficulty + 0.05 + rng.normal(0, 0.01, 300), difficulty
    difference = statistics.paired_difference(a, b, seed=0)
    assert difference.mean == pytest.approx(0.05, abs=0.002)
    assert 0.04 < difference.low < difference.mean < difference.high < 0.06  # unpaired would be +-0.045
    assert statistics.paired_difference([1.0, float("nan"), 3.0], [0.0, 1.0, 1.0]).mean == 1.5
    with pytest.raises(ValueError):
        statistics.paired_difference([1.0], [1.0, 2.0])


def brute_force_auroc(scores, labels):
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_pair_counting_with_ties(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 60) / 3.0
    labels = rng.integers(0, 2, 60)
    assert localisation.auroc(scores, labels) == pytest.approx(brute_force_auroc(scores, labels), abs=1e-12)


def test_auroc_extremes():
    assert localisation.auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1.0
    assert localisation.auroc([1, 2, 3, 4], [1, 1, 0, 0]) == 0.0
    assert localisation.auroc([5, 5, 5], [1, 0, 0]) == 0.5
    assert math.isnan(localisation.auroc([1, 2], [0, 0]))


def test_top_hit_rate_by_hand_and_chance_under_ties():
    scores = [[0.1, 0.9, 0.5], [0.9, 0.1, 0.5, 0.3]]
    assert localisation.top_hit_rate(scores, [1, 2], 1) == 0.5
    assert localisation.top_hit_rate(scores, [1, 2], 2) == 1.0
    assert localisation.top_hit_rate(scores, [0, 1], 2) == 0.0
    # Random tie-breaking in expectation: chance 2/3 and 2/4.
    assert localisation.top_hit_rate([[1, 1, 1], [1, 1, 1, 1]], [0, 3], 2) == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert localisation.top_hit_rate([[2, 1, 1, 1]], [2], 2) == pytest.approx(1 / 3)
    assert localisation.top_hit_rate([[1.0]], [0], 3) == 1.0
    assert math.isnan(localisation.top_hit_rate([], [], 1))


def test_buckets_by_hand():
    values = np.arange(40.0)[::-1]
    np.testing.assert_array_equal(localisation.buckets(values), np.arange(20) * 2 + 0.5)
    ratios = np.array([10.0, 20.0, 30.0, 40.0])
    np.testing.assert_array_equal(localisation.buckets(ratios, 2, sort_by=np.array([4.0, 1.0, 3.0, 2.0])), [30.0, 20.0])
    assert np.isnan(localisation.buckets(np.ones(3), 5)).sum() == 2


def test_concentration_by_hand_and_against_the_pairwise_gini():
    assert localisation.concentration(np.ones(20)) == pytest.approx((0.05, 0.0))
    assert localisation.concentration([0, 0, 0, 8.0]) == pytest.approx((1.0, 0.75))
    values = np.random.default_rng(0).exponential(size=57)
    share, gini = localisation.concentration(values)
    pairwise = np.abs(values[:, None] - values[None]).sum() / (2 * 57 * values.sum())
    assert gini == pytest.approx(pairwise, abs=1e-12)
    assert share == pytest.approx(np.sort(values)[-3:].sum() / values.sum(), abs=1e-12)  # 5% of 57, rounded up
    assert all(math.isnan(x) for x in localisation.concentration(np.zeros(4)))


def records():
    """Two wrong responses (one with unscored control tokens), one right, one wrong of unknown place."""
    return [
        {
            "reward": 0,
            "kl": [9.0, 0.1, 2.0, 0.3, 99.0],
            "entropy": [9.0, 0.5, 0.4, 0.3, 99.0],
            "log_ratio": [9.0, 0.0, 1.0, -1.0, 99.0],
            "first_error": 2,
            "scored": [False, True, True, True, False],
        },
        {
            "reward": 0.0,
            "kl": [1.0, 0.2, 0.4],
            "entropy": [0.1, 0.2, 0.6],
            "log_ratio": [0.0, 0.0, 2.0],
            "first_error": 0,
            "scored": [True, True, True],
        },
        {
            "reward": 1.0,
            "kl": [0.1, 0.1],
            "entropy": [0.0, 0.0],
            "log_ratio": [-0.5, 0.5],
            "first_error": None,
            "scored": [True, True],
        },
        {
            "reward": 0,
            "kl": [4.0],
            "entropy": [5.0],
            "log_ratio": [0.0],
            "first_error": None,
            "scored": [True],
        },
        {
            "reward": None,
            "kl": [50.0],
            "entropy": [50.0],
            "log_ratio": [50.0],
            "first_error": 0,
            "scored": [True],
        },
    ]


def test_localisation_summary_by_hand():
    summary = localisation.localisation_summary(records())
    counts = {key: summary[key] for key in ("responses", "wrong", "right", "localised", "tokens")}
    assert counts == {"responses": 5, "wrong": 3, "right": 1, "localised": 2, "tokens": 6}
    # Positives 2.0, 1.0 (kl) against 0.1, 0.3, 0.2, 0.4; entropies 0.4, 0.1 against 0.5, 0.3, 0.2, 0.6.
    assert summary["auroc_kl"] == 1.0
    assert summary["auroc_entropy"] == pytest.approx(2 / 8)
    assert summary["auroc_log_ratio"] == pytest.approx((3 + 0.5 * 2 + 1) / 8)
    assert summary["top1_kl"] == 1.0 and summary["top3_kl"] == 1.0
    assert summary["top1_chance"] == pytest.approx(1 / 3) and summary["top3_chance"] == 1.0
    assert summary["top1_entropy"] == 0.0
    # Unscored tokens (9, 99) and the unjudged response (50) stay out; the wrong one of unknown place is in.
    assert summary["concentration_wrong"]["tokens"] == 7
    assert summary["concentration_wrong"]["top5_share"] == pytest.approx(4.0 / 8.0)
    assert summary["concentration_right"]["gini"] == pytest.approx(0.0, abs=1e-12)
    wrong = summary["buckets"]["wrong"]
    assert wrong["kl"][:7] == [0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 4.0]
    assert wrong["log_ratio"][:8] == [0.0, 0.0, -1.0, 2.0, 0.0, 1.0, 0.0, None]
    offsets = dict(zip(summary["offsets"]["offset"], summary["offsets"]["kl"], strict=True))
    assert offsets[0] == pytest.approx(1.5) and offsets[-1] == 0.1 and offsets[-2] is None
    assert offsets[1] == pytest.approx((0.3 + 0.2) / 2) and offsets[2] == 0.4
    json.dumps(summary, allow_nan=False)


def test_a_first_error_on_an_unscored_token_is_not_localised():
    unscored = records()[0] | {"first_error": 4}  # the end token: nothing to point at
    summary = localisation.localisation_summary([unscored, records()[1]])
    assert summary["wrong"] == 2 and summary["localised"] == 1 and summary["tokens"] == 3


def test_localisation_summary_of_nothing():
    summary = localisation.localisation_summary([])
    assert summary["responses"] == 0 and summary["auroc_kl"] is None and summary["top1_kl"] is None
    json.dumps(summary, allow_nan=False)
