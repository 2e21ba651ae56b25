"""Verifiers: text -> Verdict, in processes that can be killed; no jax."""

from sdzero_jax.verifiers.code import Limits, judge_code
from sdzero_jax.verifiers.math import MathSettings, answers_equal, verify_math
from sdzero_jax.verifiers.pool import Failure, PoolSettings, VerifierPool, WorkerPool

__all__ = [
    "Failure",
    "Limits",
    "MathSettings",
    "PoolSettings",
    "VerifierPool",
    "WorkerPool",
    "answers_equal",
    "judge_code",
    "verify_math",
]
