"""Does the per-token KL point at the mistake? AUROC, hit rates, buckets, concentration. numpy only.

A score is worth something only beside a baseline: the student's plain entropy, which needs no
teacher, and chance. Leaves out finding the first error; the task's verifier knows it or nobody does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BUCKETS = 20
REACH = 8  # tokens to either side of the first error in the profile
TOP_SHARE = 0.05


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting one half (mid-ranks).

    Args:
      scores: [N] finite.
      labels: [N], non-zero = positive.
    NaN if either class is empty. Source: Mann-Whitney U / (n+ n-).
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels).astype(bool)
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mid_ranks = (last_rank - (counts - 1) / 2.0)[inverse]  # [N], from 1
    u = mid_ranks[labels].sum() - positives * (positives + 1) / 2.0
    return float(u / (positives * negatives))


def top_hit_rate(scores: Sequence[np.ndarray], positions: Sequence[int], n: int) -> float:
    """Share of responses whose first error is among their n highest-scored tokens.

    Args:
      scores: per response the scores [L] of its tokens.
      positions: per response the index of its first error in those scores.
      n: how many tokens may be pointed at.
    Ties are broken at random, in expectation: constant scores give chance, mean of min(1, n / L).
    NaN without any response.
    """
    hits = []
    for row, position in zip(scores, positions, strict=True):
        row = np.asarray(row, dtype=np.float64)
        above = int((row > row[position]).sum())
        tied = int((row == row[position]).sum())
        hits.append(min(max(n - above, 0) / tied, 1.0))
    return float(np.mean(hits)) if hits else float("nan")


def buckets(values: np.ndarray, count: int = BUCKETS, *, sort_by: np.ndarray | None = None) -> np.ndarray:
    """Mean of `values` in each of `count` buckets of equal size, sorted by `sort_by`, smallest first.

    Args:
      values: [N].
      sort_by: [N], default `values` themselves. Ties keep the order of the tokens.
    Returns [count]; NaN for a bucket without a token. Source: SD-Zero paper, analysis of 200
    responses: tokens sorted by KL, mean of ln S - ln T per bucket.
    """
    values = np.asarray(values, dtype=np.float64)
    order = np.argsort(values if sort_by is None else np.asarray(sort_by, dtype=np.float64), kind="stable")
    parts = np.array_split(values[order], count)
    return np.array([part.mean() if part.size else np.nan for part in parts])


def concentration(values: np.ndarray) -> tuple[float, float]:
    """(share of the total in the largest 5% of the tokens, Gini coefficient).

    Args:
      values: [N]; rounding below zero is cut to 0. The 5% is at least one token, rounded up.
    Gini is 0 for equal values and 1 - 1/N when one token holds everything. (nan, nan) without mass.
    """
    values = np.sort(np.maximum(np.asarray(values, dtype=np.float64), 0.0))  # [N] ascending
    total = values.sum()
    if not values.size or total <= 0:
        return float("nan"), float("nan")
    # Integer arithmetic: 0.05 * 20 may round up to two tokens in floating point.
    top = max(1, -(-values.size * round(TOP_SHARE * 100) // 100))
    ranks = np.arange(1, values.size + 1)
    gini = float((2 * ranks - values.size - 1) @ values / (values.size * total))
    return float(values[-top:].sum() / total), gini


def around_first_error(values: Sequence[np.ndarray], positions: Sequence[int], reach: int = REACH) -> np.ndarray:
    """Mean value at offsets -reach..reach from the first error.

    Args:
      values: per response [T], NaN where a token does not count.
      positions: per response the index of its first error.
    Returns [2 * reach + 1]; NaN at an offset that no response has.
    """
    sums, counts = np.zeros(2 * reach + 1), np.zeros(2 * reach + 1)
    for row, position in zip(values, positions, strict=True):
        for offset in range(-reach, reach + 1):
            index = position + offset
            if 0 <= index < len(row) and not math.isnan(row[index]):
                sums[offset + reach] += row[index]
                counts[offset + reach] += 1
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def localisation_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything above for a list of responses, as plain JSON values (None where undefined).

    Args:
      records: per response {"reward": 0 | 1, "kl": [T], "entropy": [T], "log_ratio": [T] (ln S - ln T
        of the token), "first_error": index | None, "scored": [T] False for eos and control tokens}.
    The label of a token is "is the first wrong value", over the scored tokens of the wrong responses
    whose first error is known and scored. Buckets and concentration use every scored token, split by
    reward. A response whose reward is None (the grader failed) is in neither half.
    """
    wrong = [record for record in records if record["reward"] == 0]
    right = [record for record in records if record["reward"] == 1]
    localised = [r for r in wrong if r.get("first_error") is not None and r["scored"][r["first_error"]]]
    positions = [int(np.sum(np.asarray(r["scored"], bool)[: r["first_error"]])) for r in localised]
    labels = [np.arange(int(np.sum(r["scored"]))) == p for r, p in zip(localised, positions, strict=True)]
    kl = [_scored(record, "kl") for record in localised]
    flat = [np.zeros_like(row) for row in kl]

    summary: dict[str, Any] = {"responses": len(records), "wrong": len(wrong), "right": len(right)}
    summary["localised"] = len(localised)
    summary["tokens"] = int(sum(row.size for row in kl))
    for name in ("kl", "entropy", "log_ratio"):
        scores = [_scored(record, name) for record in localised]
        summary[f"auroc_{name}"] = auroc(_join(scores), _join(labels)) if scores else math.nan
    for n in (1, 3):
        summary[f"top{n}_kl"] = top_hit_rate(kl, positions, n)
        summary[f"top{n}_entropy"] = top_hit_rate([_scored(r, "entropy") for r in localised], positions, n)
        summary[f"top{n}_chance"] = top_hit_rate(flat, positions, n)
    summary["buckets"] = {}
    for name, half in (("wrong", wrong), ("right", right)):
        values, ratios = (
            _join([_scored(r, "kl") for r in half]),
            _join([_scored(r, "log_ratio") for r in half]),
        )
        share, gini = concentration(values)
        summary[f"concentration_{name}"] = {"top5_share": share, "gini": gini, "tokens": int(values.size)}
        means = {"kl": buckets(values), "log_ratio": buckets(ratios, sort_by=values)}
        summary["buckets"][name] = {key: mean.tolist() for key, mean in means.items()}
    errors = [record["first_error"] for record in localised]
    summary["offsets"] = {"offset": list(range(-REACH, REACH + 1))}
    for name in ("kl", "entropy"):
        rows = [np.where(np.asarray(r["scored"], bool), np.asarray(r[name], float), np.nan) for r in localised]
        summary["offsets"][name] = around_first_error(rows, errors).tolist()
    return _nan_to_none(summary)


def _scored(record: Mapping[str, Any], name: str) -> np.ndarray:
    return np.asarray(record[name], dtype=np.float64)[np.asarray(record["scored"], dtype=bool)]


def _join(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if len(rows) else np.zeros(0)


def _nan_to_none(value: Any) -> Any:
    """JSON has no NaN: undefined numbers become null."""
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
