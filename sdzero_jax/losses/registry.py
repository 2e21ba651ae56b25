"""Names of the divergences, for configs: "reverse_kl", "mixed_kl(0.5)", "topk(64, tail=bucket)".

The same text gives the same object, so that jit sees no new function.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdzero_jax.losses import spec
from sdzero_jax.losses.divergences import FULL, Divergence
from sdzero_jax.losses.tokens import sampled_token_loss
from sdzero_jax.losses.truncated import pointwise_clip, topk_divergence

SAMPLED_TOKEN = "sampled_token"  # the one entry that needs the sampled ids
DIVERGENCES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    **FULL,
    "topk": (topk_divergence, ("k", "support", "tail", "divergence")),
    "pointwise_clip": (pointwise_clip, ("cap", "divergence")),
    SAMPLED_TOKEN: (sampled_token_loss, ()),
}  # name -> (function, settings in positional order)
DEFAULTS = {"topk": {"k": 64}, "pointwise_clip": {"cap": 0.05}}  # settings that the functions require


@functools.cache
def get_divergence(text: str) -> Divergence:
    """The function (student_logp, teacher_logp) -> value that `text` names.

    "sampled_token" gives the function of the two log-probs of the sampled token; all others take
    [..., V]. Raises UserError with the nearest name, setting or range.
    """
    name, settings = spec.bind(text, DIVERGENCES)
    settings = {**DEFAULTS.get(name, {}), **settings}
    function = functools.partial(DIVERGENCES[name][0], **settings)
    # Reports a bad setting now rather than inside the train step.
    example = jax.ShapeDtypeStruct((1,) if name == SAMPLED_TOKEN else (1, 2), jnp.float32)
    jax.eval_shape(function, example, example)
    return function


def needs_ids(text: str) -> bool:
    """Whether the divergence named by `text` is evaluated at the sampled tokens only."""
    return spec.bind(text, DIVERGENCES)[0] == SAMPLED_TOKEN
