"""Olmo-3: its dials, its config.json, its tensor names."""

from collections.abc import Mapping
from typing import Any

from sdzero_jax.errors import UserError
from sdzero_jax.models import hf_config
from sdzero_jax.models.decoder import DecoderConfig

MODEL_TYPE = "olmo3"
# Our parameter -> the family's tensor inside model.layers.N (the rest is common, see convert.py).
NORM_NAMES = {
    "attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "post_feedforward_layernorm.weight",
}
_THETA = 500_000.0


def from_hf(hf: Mapping[str, Any], **dials: Any) -> DecoderConfig:
    """DecoderConfig of an Olmo-3 config.json; `dials` (remat, compute_dtype, ...) win over the file.

    YaRN belongs to full layers only. A file that gives one theta (legacy form) gives it to both
    layer types; a file with an entry per layer type is taken at its word.
    """
    fields = hf_config.common_fields(hf)
    count = hf["num_hidden_layers"]
    layer_types = hf.get("layer_types")
    if layer_types is None:
        layer_types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(count)]
    hf_config.check_layer_count(hf, layer_types)
    entries = hf_config.rope_entries(hf, _THETA)
    full, sliding = entries["full_attention"], entries["sliding_attention"]
    if sliding is not None and sliding["rope_type"] != "default":
        kind = sliding["rope_type"]
        raise UserError(f"rope_type {kind!r} on Olmo-3's sliding layers is not supported; use 'default'")
    fields.update(
        rms_norm_eps=hf.get("rms_norm_eps", 1e-5),
        norm_position="post",
        qk_norm="projection",
        layer_pattern=hf_config.layer_pattern(layer_types),
        sliding_window=hf.get("sliding_window") or 4096,
        rope_theta=full["rope_theta"],
        rope_theta_sliding=(sliding or full)["rope_theta"],
        max_position=hf.get("max_position_embeddings", 2048),
        **hf_config.yarn_fields(full, hf),
    )
    return DecoderConfig(**{**fields, **dials})


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """config.json of an Olmo-3 decoder, with one RoPE entry per layer type.

    The legacy theta is written too, for older readers; transformers 5 alone would give it to full
    layers only.
    """
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": MODEL_TYPE,
        **hf_config.write_common(config),
        "rope_parameters": {
            "full_attention": hf_config.yarn_entry(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_sliding},
        },
        "sliding_window": config.sliding_window,
    }


def olmo3_7b_instruct(**dials: Any) -> DecoderConfig:
    """Olmo-3-7B-Instruct, as in its published config.json."""
    fields = dict(
        vocab_size=100_278,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11_008,
        norm_position="post",
        qk_norm="projection",
        layer_pattern=("sliding", "sliding", "sliding", "full"),
        sliding_window=4096,
        rope_theta=_THETA,
        rope_theta_sliding=_THETA,
        yarn_factor=8.0,
        yarn_original_length=8192,
        yarn_attention_factor=1.2079441541679836,
        max_position=65_536,
    )
    return DecoderConfig(**{**fields, **dials})
