"""Divergences by brute force in float64 numpy, from logits: the oracle of the loss tests.

Written from the formulas, sharing nothing with the package. Gradients by central differences.
"""

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(p_logp, q_logp):
    """sum p (ln p - ln q); 0 where p = 0, +inf where only q = 0."""
    p = np.exp(p_logp)
    with np.errstate(invalid="ignore"):
        each = np.where(p_logp > -np.inf, p * (p_logp - q_logp), 0.0)
    return each.sum(-1)


def forward_kl(s, t):
    return kl(t, s)


def reverse_kl(s, t):
    return kl(s, t)


def mixed_kl(s, t, w):
    return w * kl(t, s) + (1 - w) * kl(s, t)


def jsd(s, t, beta):
    m = np.logaddexp(np.log(1 - beta) + s, np.log(beta) + t)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def _top(s, t, k, support):
    order = np.argsort(-(t if support == "teacher" else s), axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(s, order, -1), np.take_along_axis(t, order, -1)


def topk_renormalise(s, t, k, support, inner):
    s_k, t_k = _top(s, t, k, support)
    return inner(log_softmax(s_k), log_softmax(t_k))


def topk_bucket(s, t, k, support, inner):
    def close(logp):
        with np.errstate(divide="ignore"):  # no mass at all
            lse = np.log(np.exp(logp).sum(-1, keepdims=True))
        return np.concatenate([logp, np.log(-np.expm1(np.minimum(lse, -1e-7)))], -1)

    return inner(*(close(x) for x in _top(s, t, k, support)))


def topk_zero_outside(s, t, k, support, forward_weight):
    """The authors' formula: true S against the renormalised teacher, H_rest + 100 P_rest outside."""
    s_k, t_k = _top(s, t, k, support)
    t_k = log_softmax(t_k)
    h_rest = (np.exp(s) * s).sum(-1) - (np.exp(s_k) * s_k).sum(-1)
    p_rest = 1.0 - np.exp(s_k).sum(-1)
    reverse = (np.exp(s_k) * (s_k - t_k)).sum(-1) + h_rest + 100.0 * p_rest
    forward = (np.exp(t_k) * (t_k - s_k)).sum(-1)
    return forward_weight * forward + (1 - forward_weight) * reverse


def zero_outside_jsd(s, t, k, support, beta):
    """The whole-vocabulary JSD against the teacher with exactly 0 outside of the support."""
    chosen = t if support == "teacher" else s
    kth = np.sort(chosen, axis=-1)[..., -k][..., None]
    cut = np.where(chosen >= kth, t, -np.inf)
    return jsd(s, log_softmax(cut), beta)


def pointwise_clip(s, t, cap, forward):
    p, q = (t, s) if forward else (s, t)
    return np.minimum(np.exp(p) * (p - q), cap).sum(-1)


VARIANTS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "mixed_kl(0.5)": lambda s, t: mixed_kl(s, t, 0.5),
    "mixed_kl(weight=0.2)": lambda s, t: mixed_kl(s, t, 0.2),
    "jsd(0.5)": lambda s, t: jsd(s, t, 0.5),
    "jsd(0.1)": lambda s, t: jsd(s, t, 0.1),
    "topk(5)": lambda s, t: topk_renormalise(s, t, 5, "teacher", reverse_kl),
    "topk(5, support=student, divergence=forward_kl)": lambda s, t: topk_renormalise(s, t, 5, "student", forward_kl),
    "topk(5, divergence=mixed_kl(0.5))": lambda s, t: topk_renormalise(
        s, t, 5, "teacher", lambda a, b: mixed_kl(a, b, 0.5)
    ),
    "topk(5, support=student, tail=bucket)": lambda s, t: topk_bucket(s, t, 5, "student", reverse_kl),
    "topk(5, tail=bucket, divergence=jsd(0.3))": lambda s, t: topk_bucket(
        s, t, 5, "teacher", lambda a, b: jsd(a, b, 0.3)
    ),
    "topk(5, tail=zero_outside)": lambda s, t: topk_zero_outside(s, t, 5, "teacher", 0.0),
    "topk(5, tail=zero_outside, divergence=mixed_kl(0.5))": lambda s, t: topk_zero_outside(s, t, 5, "teacher", 0.5),
    "topk(5, tail=zero_outside, divergence=jsd(0.4))": lambda s, t: zero_outside_jsd(s, t, 5, "teacher", 0.4),
    "pointwise_clip(0.05)": lambda s, t: pointwise_clip(s, t, 0.05, True),
    "pointwise_clip(0.05, divergence=reverse_kl)": lambda s, t: pointwise_clip(s, t, 0.05, False),
}  # registry text -> oracle


def logit_gradient(function, student_logits, teacher_logits, step=1e-5):
    """d function / d student logits [..., V] by central differences; 0 for logits of -inf."""
    z = np.asarray(student_logits, np.float64)
    t = log_softmax(teacher_logits)
    out = np.zeros_like(z)
    for v in range(z.shape[-1]):
        up, down = z.copy(), z.copy()
        up[..., v] += step
        down[..., v] -= step
        out[..., v] = (function(log_softmax(up), t) - function(log_softmax(down), t)) / (2 * step)
    return np.where(np.isfinite(z), out, 0.0)
