"""What a stage spent: questions, generations, sampled and trained tokens, verifier calls, FLOPs.

Methods are compared at equal numbers of sampled (decoded) tokens; the rest is counted so that a reader can
weigh it. Leaves out prompts read by the sampler, and sampling for gates and validation, which no method learns from.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sdzero_jax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Counts of one or several stages; they add up."""

    questions: int = 0  # drawn to be answered, repeats included
    generations: int = 0
    sampled_tokens: int = 0
    student_tokens: int = 0  # read by the student in training, prompts included
    teacher_tokens: int = 0  # read by the teacher
    verifier_calls: int = 0

    def __add__(self, other: "Ledger") -> "Ledger":
        return Ledger(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def flops(self, model: DecoderConfig) -> float:
        """FLOPs of the products with the weights: 2 per weight and token, 3 times that for training.

        Attention's own products are left out, and so is recomputation.
        """
        forward = 2.0 * matrix_weights(model)
        return forward * (self.sampled_tokens + 3 * self.student_tokens + self.teacher_tokens)


def matrix_weights(model: DecoderConfig) -> int:
    """Weights that multiply each token: all but the embedding's rows, which are looked up."""
    head = model.head_dim
    attention = model.hidden_size * head * (2 * model.num_heads + 2 * model.num_kv_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * (attention + mlp) + model.vocab_size * model.hidden_size


def of_training(rows: Iterable[Mapping[str, Any]]) -> Ledger:
    """The ledger of a training stage from its metric rows: what its source reported, step by step."""
    names = ("questions", "generations", "sampled_tokens", "student_tokens", "teacher_tokens")
    totals = dict.fromkeys(names, 0.0)
    for row in rows:
        for name in names:
            totals[name] += row.get(name, 0.0)
    counts = {name: round(total) for name, total in totals.items()}
    return Ledger(**counts, verifier_calls=counts["generations"])


def of_sampling(summary: Mapping[str, Any]) -> Ledger:
    """The ledger of a collection or of rejection sampling from its summary."""
    return Ledger(
        questions=summary["questions"],
        generations=summary["generations"],
        sampled_tokens=summary["sampled_tokens"],
        verifier_calls=summary["generations"],
    )
