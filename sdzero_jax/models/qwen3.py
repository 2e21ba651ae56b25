"""Qwen3: its dials, its config.json, its tensor names. Left out: the mixture-of-experts models."""

from collections.abc import Mapping
from typing import Any

from sdzero_jax.errors import UserError
from sdzero_jax.models import hf_config
from sdzero_jax.models.decoder import DecoderConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
# Our parameter -> the family's tensor inside model.layers.N (the rest is common, see convert.py).
NORM_NAMES = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}


def from_hf(hf: Mapping[str, Any], **dials: Any) -> DecoderConfig:
    """DecoderConfig of a Qwen3 config.json; `dials` (remat, compute_dtype, ...) win over the file."""
    fields = hf_config.common_fields(hf)
    layer_types = hf.get("layer_types") or _layer_types(hf)
    hf_config.check_layer_count(hf, layer_types)
    entries = hf_config.rope_entries(hf, 10_000.0)
    full, sliding = entries["full_attention"], entries["sliding_attention"]
    pattern = hf_config.layer_pattern(layer_types)
    if "sliding" in pattern:
        if full["rope_type"] != "default":
            raise UserError("qwen3 with sliding layers and yarn RoPE is not supported: drop one of the two")
        fields["sliding_window"] = hf_config.sliding_window(hf)
    fields.update(
        head_dim=hf.get("head_dim") or 128,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_position="pre",
        qk_norm="head",
        layer_pattern=pattern,
        rope_theta=full["rope_theta"],
        rope_theta_sliding=(sliding or full)["rope_theta"],
        max_position=hf.get("max_position_embeddings", 32_768),
        **hf_config.yarn_fields(full, hf),
    )
    return DecoderConfig(**{**fields, **dials})


def _layer_types(hf: Mapping[str, Any]) -> list[str]:
    """Layers from max_window_layers on slide, when the file switches sliding windows on."""
    slides = hf.get("use_sliding_window", False) and hf.get("sliding_window") is not None
    first = hf.get("max_window_layers", 28) if slides else hf["num_hidden_layers"]
    return ["full_attention" if i < first else "sliding_attention" for i in range(hf["num_hidden_layers"])]


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """config.json of a Qwen3 decoder."""
    slides = "sliding" in config.layer_pattern
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **hf_config.write_common(config),
        "rope_parameters": hf_config.yarn_entry(config),
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window if slides else None,
    }


# The published config.json files of the dense models. All have 128 wide heads and 8 KV heads; the base
# models (-Base) differ from these in max_position only.
_COMMON = dict(
    vocab_size=151_936,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1_000_000.0,
    rope_theta_sliding=1_000_000.0,
    max_position=40_960,
)
_4B = dict(hidden_size=2560, num_layers=36, num_heads=32, intermediate_size=9728, tie_embeddings=True)
_2507 = dict(rope_theta=5_000_000.0, rope_theta_sliding=5_000_000.0, max_position=262_144)
_SIZES = {
    "qwen3_0_6b": dict(hidden_size=1024, num_layers=28, num_heads=16, intermediate_size=3072, tie_embeddings=True),
    "qwen3_1_7b": dict(hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144, tie_embeddings=True),
    "qwen3_4b": _4B,
    "qwen3_4b_instruct_2507": _4B | _2507,
    "qwen3_8b": dict(hidden_size=4096, num_layers=36, num_heads=32, intermediate_size=12_288),
    "qwen3_14b": dict(hidden_size=5120, num_layers=40, num_heads=40, intermediate_size=17_408),
    "qwen3_32b": dict(hidden_size=5120, num_layers=64, num_heads=64, intermediate_size=25_600),
}
# Preset name -> its DecoderConfig fields.
PRESETS: Mapping[str, Mapping[str, Any]] = {name: _COMMON | size for name, size in _SIZES.items()}
