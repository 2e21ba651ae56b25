"""Small models that several test files share: the golden twins, and random ones of either family."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from sdzero_jax.models import DecoderConfig, LanguageModel, load_pretrained

DATA = Path(__file__).parent / "data"
TWINS = ("qwen3_tied", "qwen3_untied", "olmo3")


def twin(name, **dials):
    return load_pretrained(DATA / "goldens" / name, **dials)


def golden(name):
    return load_file(DATA / "goldens" / name / "golden.safetensors")


def same_bits(a, b):
    """Two trees hold the same bits in the same dtypes."""
    flags = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(flags))


def weights(model, seed=0):
    """Random parameters without a compilation; norm scales away from 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre, spread = (1.0, 0.2) if "norm" in path[-1].key else (0.0, 0.3)
        return jnp.asarray(centre + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.param_shapes())


def tiny(**dials):
    fields = dict(
        vocab_size=40, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=24, initializer_range=0.3,
    )  # fmt: skip
    return LanguageModel(DecoderConfig(**{**fields, **dials}))


def tiny_olmo(**dials):
    fields = dict(
        num_layers=4, norm_position="post", qk_norm="projection", sliding_window=5,
        layer_pattern=("sliding", "sliding", "sliding", "full"), yarn_factor=8.0, yarn_original_length=8,
    )  # fmt: skip
    return tiny(**{**fields, **dials})
