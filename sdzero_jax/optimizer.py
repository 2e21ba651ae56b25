"""The optimiser and its learning-rate schedule, from a small config; wraps optax.

Leaves out what belongs to a step: gradient accumulation and the update itself.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from sdzero_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, warm-up and a decay."""

    learning_rate: Annotated[float, "peak learning rate"] = 5e-6
    schedule: Annotated[Literal["constant", "cosine", "linear"], "decay after the warm-up"] = "constant"
    warmup_fraction: Annotated[float, "share of the steps that warm up, from warmup_start"] = 0.05
    warmup_start: Annotated[float, "learning rate at step 0, as a share of the peak"] = 0.0
    final_fraction: Annotated[float, "learning rate at the last step, as a share of the peak"] = 0.0
    beta1: Annotated[float, "decay of the first moment"] = 0.9
    beta2: Annotated[float, "decay of the second moment"] = 0.95
    epsilon: Annotated[float, "added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, "decoupled weight decay, on matrices only"] = 0.0
    clip_norm: Annotated[float, "global gradient norm is clipped to this; 0 turns it off"] = 1.0
    mu_dtype: Annotated[Literal["float32", "bfloat16"], "dtype of the first moment"] = "float32"


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then constant, cosine or linear decay over the rest."""
    if not 0.0 <= config.warmup_fraction < 1.0:
        raise UserError(f"warmup_fraction is {config.warmup_fraction}; wanted 0 <= warmup_fraction < 1")
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = round(config.warmup_fraction * total_steps)
    rest = max(total_steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, final, rest),
    }[config.schedule]
    if warmup == 0:
        return decay
    # The first step already moves: step 0 would otherwise be wasted at rate 0.
    start = max(config.warmup_start, 1.0 / (warmup + 1)) * peak
    return optax.join_schedules([optax.linear_schedule(start, peak, warmup), decay], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW. The second moment is kept in float32 (bf16 never decays)."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_matrices,
            mu_dtype=jnp.dtype(config.mu_dtype),
        ),
    )


def _matrices(params):
    """True for weight matrices; norm scales and biases are not decayed, stacked over layers or not."""

    def is_matrix(path, leaf):
        name = str(path[-1].key)
        return leaf.ndim >= 2 and not ("norm" in name or name in ("scale", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
