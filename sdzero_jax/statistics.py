"""Statistics of an evaluation: pass@k, avg@k, majority vote, bootstrap and t-intervals. numpy and scipy.

The unit of resampling is the question: its samples share difficulty and are not independent.
Leaves out significance tests; an interval of the difference says more.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Mean of a - b over questions with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c correct ones.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def avg_at_k(rewards: np.ndarray) -> float:
    """Mean over questions of the mean reward of a question's k samples.

    Args:
      rewards: [Q, K]; NaN (or None) marks a sample that the grader could not judge. It is left out,
        and so is a question without any judged sample. NaN if nothing was judged.
    """
    rewards = np.asarray(rewards, dtype=np.float64)  # [Q, K]
    judged = ~np.isnan(rewards)
    counts = judged.sum(axis=1)  # [Q]
    if not counts.any():
        return float("nan")
    sums = np.where(judged, rewards, 0.0).sum(axis=1)
    return float(np.mean(sums[counts > 0] / counts[counts > 0]))


def majority_votes(answers: Sequence[Sequence[Hashable | None]]) -> list[int | None]:
    """For each question the index of the first sample that gives the most frequent answer.

    Args:
      answers: [Q][K] comparable answers, None where a response has none; a tie goes to the answer
        that came first. None for a question without any answer.
    """
    winners: list[int | None] = []
    for row in answers:
        votes = Counter(answer for answer in row if answer is not None)
        # Counter keeps first-seen order and max takes the first maximum, which settles ties.
        winners.append(list(row).index(max(votes, key=votes.__getitem__)) if votes else None)
    return winners


def majority_at_k(answers: Sequence[Sequence[Hashable | None]], rewards: np.ndarray) -> float:
    """Share of questions whose most frequent answer is right; one without any answer counts as wrong.

    Args:
      answers: [Q][K], see `majority_votes`.
      rewards: [Q, K] rewards of the same samples; a question whose winning sample has NaN is left out.
    """
    rewards = np.asarray(rewards, dtype=np.float64)  # [Q, K]
    winning = [0.0 if w is None else rewards[q, w] for q, w in enumerate(majority_votes(answers))]
    winning = np.asarray(winning)[~np.isnan(winning)]
    return float(winning.mean()) if winning.size else float("nan")


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    seed: int = 0,
    samples: int = 2000,
) -> tuple[float, float]:
    """95% percentile bootstrap interval (low, high) of `statistic`, resampling questions.

    Args:
      values: [Q, ...], one row per question.
      statistic: [Q, ...] -> number.
      samples: number of resamples.
    (nan, nan) without any question.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(samples)]
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100.0 - tail])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two-sided 95% t-interval (low, high) of the mean of independent values, such as one per seed.

    (nan, nan) for fewer than two values, which say nothing about their spread.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float("nan"), float("nan")
    from scipy import stats  # slow to import, and only comparisons ask

    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0, samples: int = 2000) -> Difference:
    """Mean of a - b over the same questions, with its 95% bootstrap interval.

    Args:
      a, b: [Q] one value per question, in the same order; a question with a NaN on either side is
        left out of both. Raises ValueError if the lengths differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired difference needs the same questions on both sides, got {a.shape}, {b.shape}")
    difference = a - b
    difference = difference[~np.isnan(difference)]
    if not difference.size:
        return Difference(float("nan"), float("nan"), float("nan"))
    return Difference(float(difference.mean()), *bootstrap_interval(difference, seed=seed, samples=samples))
