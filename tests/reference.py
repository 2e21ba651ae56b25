"""An independent decoder and distillation loss: one row at a time, no padding, no fusion, float64.

Written from the published formulas on the package's parameter layout; shares no code with it.
Use inside `jax.enable_x64`.
"""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def rotate(x, positions, theta):
    """Rotary embedding, half-split convention: x [T, H, W]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def qwen3_logits(params, config, tokens):
    """Logits [T, V] of one unpadded row of token ids [T]."""
    tokens = jnp.asarray(tokens)
    positions = jnp.arange(len(tokens), dtype=jnp.float64)
    visible = positions[:, None] >= positions[None]
    x = params["embedding"][tokens]
    group = config.num_heads // config.num_kv_heads
    for number in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"]["block_0"])
        attention, mlp = layer["attention"], layer["mlp"]
        h = rms_norm(x, layer["attention_norm"], config.rms_norm_eps)
        q = jnp.einsum("td,dnw->tnw", h, attention["query"])
        k = jnp.einsum("td,dnw->tnw", h, attention["key"])
        v = jnp.einsum("td,dnw->tnw", h, attention["value"])
        q = rotate(rms_norm(q, attention["query_norm"], config.rms_norm_eps), positions, config.rope_theta)
        k = rotate(rms_norm(k, attention["key_norm"], config.rms_norm_eps), positions, config.rope_theta)
        heads = []
        for head in range(config.num_heads):
            scores = q[:, head] @ k[:, head // group].T / jnp.sqrt(config.head_dim)
            heads.append(jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v[:, head // group])
        x = x + jnp.einsum("tnw,nwd->td", jnp.stack(heads, axis=1), attention["out"])
        h = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
        gate = h @ mlp["gate"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (h @ mlp["up"])) @ mlp["down"]
    x = rms_norm(x, params["final_norm"], config.rms_norm_eps)
    return x @ params["embedding" if config.tie_embeddings else "unembedding"].T


def response_logp(params, config, context, response):
    """ln p [R, V] at each response token, given the context and the response before it."""
    logits = qwen3_logits(params, config, [*context, *response])
    start = len(context) - 1
    return jax.nn.log_softmax(logits[start : start + len(response)], axis=-1)


def distillation_loss(params, teacher, config, rows):
    """Token-mean reverse KL over rows of (student context, teacher context, response)."""
    total, count = 0.0, 0
    for student_context, teacher_context, response in rows:
        s = response_logp(params, config, student_context, response)
        t = response_logp(teacher, config, teacher_context, response)
        total = total + jnp.sum(jnp.exp(s) * (s - t))
        count += len(response)
    return total / count


def weighted_nll(params, config, sequences):
    """sum w * nll / number of weighted tokens over (tokens, weights) rows."""
    total, count = 0.0, 0
    for tokens, weights in sequences:
        logp = jax.nn.log_softmax(qwen3_logits(params, config, tokens), axis=-1)
        for position in range(1, len(tokens)):
            total = total - weights[position] * logp[position - 1, tokens[position]]
            count += weights[position] > 0
    return total / count
