"""Olmo-3: its dials, its config.json, its tensor names."""

from collections.abc import Mapping
from typing import Any

from sdzero_jax.errors import UserError
from sdzero_jax.models import hf_config
from sdzero_jax.models.decoder import DecoderConfig

MODEL_TYPE = "olmo3"
ARCHITECTURE = "Olmo3ForCausalLM"
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
    pattern = hf_config.layer_pattern(layer_types)
    if "sliding" in pattern:
        fields["sliding_window"] = hf_config.sliding_window(hf)
    fields.update(
        rms_norm_eps=hf.get("rms_norm_eps", 1e-5),
        norm_position="post",
        qk_norm="projection",
        layer_pattern=pattern,
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
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **hf_config.write_common(config),
        "rope_parameters": {
            "full_attention": hf_config.yarn_entry(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_sliding},
        },
        "sliding_window": config.sliding_window,
    }


# The published config.json files after long-context training: Base, Instruct and Think of one size are alike
# (and so are those of Olmo-3.1, 32B).
_COMMON = dict(
    vocab_size=100_278,
    head_dim=128,
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
_7B = dict(hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, intermediate_size=11_008)
_32B = dict(hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8, intermediate_size=27_648)
# Preset name -> its DecoderConfig fields.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "olmo3_7b_instruct": _COMMON | _7B,
    "olmo3_7b_think": _COMMON | _7B,
    "olmo3_32b_think": _COMMON | _32B,
    "olmo3_1_32b_instruct": _COMMON | _32B,
    "olmo3_1_32b_think": _COMMON | _32B,
}
