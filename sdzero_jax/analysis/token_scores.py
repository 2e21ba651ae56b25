"""Per-token scores of sampled responses: where the reviser disagrees with the generator."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdzero_jax import ops, sharding
from sdzero_jax.batches import Batch, DistillLayout, distill_batch
from sdzero_jax.examples import Rollout
from sdzero_jax.models import LanguageModel
from sdzero_jax.objectives import response_hidden
from sdzero_jax.rollouts import Domain


@functools.partial(jax.jit, static_argnames=("model", "divergence"))
def score_batch(model: LanguageModel, student, teacher, batch: Batch, divergence: str) -> ops.PerToken:
    """Divergence, entropy and log-probs [B, R] of a distillation batch, without a gradient."""
    student_hidden = response_hidden(model, student, batch, "gen_", "gen_index")
    teacher_hidden = response_hidden(model, teacher, batch, "rev_", "rev_index")
    width = student_hidden.shape[-1]
    per_token = ops.linear_divergence(
        student_hidden.reshape(-1, width),
        model.unembedding(student),
        teacher_hidden.reshape(-1, width),
        model.unembedding(teacher),
        ids=batch["target_ids"].reshape(-1),
        divergence=divergence,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(batch["mask"].shape), per_token)


@functools.partial(jax.jit, static_argnames=("model", "count"))
def top_batch(model: LanguageModel, student, teacher, batch: Batch, count: int):
    """{"student", "teacher"}: (probabilities, ids) [B, R, count] of the likeliest tokens; a few logits at a time."""

    def likeliest(params, prefix: str):
        hidden = response_hidden(model, params, batch, f"{prefix}_", f"{prefix}_index")
        weights = model.unembedding(params)

        def of_token(h):
            logits = jnp.einsum("d,vd->v", h, weights.astype(h.dtype), preferred_element_type=jnp.float32)
            return jax.lax.top_k(jax.nn.softmax(logits), count)

        tops = jax.lax.map(of_token, hidden.reshape(-1, hidden.shape[-1]), batch_size=64)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch["mask"].shape, count), tops)

    return {"student": likeliest(student, "gen"), "teacher": likeliest(teacher, "rev")}


def _padded(rollouts: Sequence[Rollout], rows: int, domain: Domain, layout: DistillLayout, mesh):
    """A distillation batch of `rows` rows, on the host and on the mesh; the repeated rows are not read."""
    full = [*rollouts, *[rollouts[-1]] * (rows - len(rollouts))]
    batch, _ = distill_batch(full, domain.phrase_ids, domain.tokenizer.stop_ids, layout)
    return batch, batch if mesh is None else sharding.shard_batch(mesh, batch)


def top_alternatives(
    model: LanguageModel,
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    domain: Domain,
    layout: DistillLayout,
    *,
    batch_size: int,
    count: int = 3,
    mesh=None,
) -> list[dict[str, list]]:
    """What either side would rather have said: per rollout {"top_student", "top_teacher"}: [T][count] of [token, p]."""
    records = []
    for start in range(0, len(rollouts), batch_size):
        part = list(rollouts[start : start + batch_size])
        _, arrays = _padded(part, batch_size, domain, layout, mesh)
        with sharding.use(mesh):
            tops = sharding.fetch(top_batch(model, student, teacher, arrays, count))
        records += [
            {
                f"top_{side}": [
                    [[domain.tokenizer.decode([int(i)]) or "<eos>", round(float(p), 4)] for p, i in zip(*pair)]
                    for pair in zip(*(leaf[row, : len(rollout.response_ids)] for leaf in tops[side]))
                ]
                for side in ("student", "teacher")
            }
            for row, rollout in enumerate(part)
        ]
    return records


def localisation_records(
    model: LanguageModel,
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    domain: Domain,
    layout: DistillLayout,
    first_error: Callable[[Rollout], int | None],
    *,
    divergence: str,
    batch_size: int,
    mesh=None,
) -> list[dict[str, Any]]:
    """One record per trained rollout, with the scores of its tokens.

    A token is `scored` when it belongs to the first attempt: end tokens, control tokens and what
    follows them are left out, since the reviser treats them by form and not by content. `rollout` is the
    index of a record's rollout.
    """
    control = {token for reward in (0.0, 1.0) for token in domain.phrase_ids(reward)}
    skipped = control | set(domain.tokenizer.stop_ids)
    records = []
    for start in range(0, len(rollouts), batch_size):
        part = list(rollouts[start : start + batch_size])
        batch, arrays = _padded(part, batch_size, domain, layout, mesh)
        with sharding.use(mesh):
            scores = sharding.fetch(score_batch(model, student, teacher, arrays, divergence))
        for row, rollout in enumerate(part):
            count = len(rollout.response_ids)
            if not batch["mask"][row].any():
                continue
            pick = lambda values, row=row, count=count: np.asarray(values[row, :count], float).tolist()  # noqa: E731
            logp_student, logp_teacher = pick(scores.logp_student), pick(scores.logp_teacher)
            first_skipped = next((i for i, t in enumerate(rollout.response_ids) if t in skipped), count)
            records.append(
                {
                    "rollout": start + row,
                    "prompt": rollout.question.prompt,
                    "tokens": [domain.tokenizer.decode([token]) or "<eos>" for token in rollout.response_ids],
                    "reward": int(rollout.verdict.reward or 0),
                    "kl": pick(scores.value),
                    "entropy": pick(scores.entropy),
                    "p_student": np.exp(logp_student).tolist(),
                    "p_teacher": np.exp(logp_teacher).tolist(),
                    "log_ratio": [s - t for s, t in zip(logp_student, logp_teacher)],
                    "first_error": first_error(rollout),
                    "scored": [position < first_skipped for position in range(count)],
                }
            )
    return records
