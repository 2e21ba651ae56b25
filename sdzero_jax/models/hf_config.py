"""What the two families' config.json files have in common: reading, refusing, writing.

Both the legacy form (`rope_theta`, `rope_scaling`) and the newer `rope_parameters`, flat or one
entry per layer type, are read; both are written. Left out: every RoPE type but default and yarn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.models.decoder import DecoderConfig

# HF layer type -> ours.
LAYER_TYPE_NAMES = {"full_attention": "full", "sliding_attention": "sliding"}
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
}
_ROPE_TYPES = ("default", "yarn")
_ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
    "mscale",
    "mscale_all_dim",
)


def common_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """DecoderConfig fields that both families spell the same way; UserError names all that is refused."""
    missing = [key for key in _REQUIRED if hf.get(key) is None]
    if missing:
        raise UserError(f"the model's config.json lacks {', '.join(missing)}")
    wrong = [
        f"{key}={hf[key]!r}"
        for key in (*_REQUIRED, "num_key_value_heads", "head_dim")
        if hf.get(key) is not None and (type(hf[key]) is not int or hf[key] < 1)
    ]
    if wrong:
        raise UserError(f"in the model's config.json {wrong[0]} is not a whole number above 0")
    refused = []
    if hf.get("hidden_act", "silu") != "silu":
        refused.append(f"hidden_act={hf['hidden_act']!r} (only 'silu')")
    if hf.get("attention_dropout"):
        refused.append(f"attention_dropout={hf['attention_dropout']} (only 0)")
    for key, neutral in (("num_experts", 0), ("partial_rotary_factor", 1.0)):
        if (hf.get(key) or neutral) != neutral:
            refused.append(f"{key}={hf[key]} (only {neutral})")
    if hf.get("quantization_config"):
        refused.append("quantization_config (only unquantised weights)")
    if refused:
        raise UserError(f"the model's config.json asks for what is not supported: {'; '.join(refused)}")
    fields = {ours: hf[theirs] for theirs, ours in _REQUIRED.items()}
    heads = hf["num_attention_heads"]
    fields["num_kv_heads"] = hf.get("num_key_value_heads") or heads
    fields["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // heads
    fields["tie_embeddings"] = bool(hf.get("tie_word_embeddings", False))
    fields["attention_bias"] = bool(hf.get("attention_bias", False))
    fields["initializer_range"] = hf.get("initializer_range", 0.02)
    return fields


def layer_pattern(layer_types: Sequence[str]) -> tuple[str, ...]:
    """The shortest run of our layer types that repeats to the given HF layer types."""
    for kind in layer_types:
        if kind not in LAYER_TYPE_NAMES:
            raise UserError(f"layer type {kind!r} is not supported{nearest(str(kind), LAYER_TYPE_NAMES)}")
    kinds = tuple(LAYER_TYPE_NAMES[kind] for kind in layer_types)
    for period in range(1, len(kinds) + 1):
        if len(kinds) % period == 0 and kinds == kinds[:period] * (len(kinds) // period):
            return kinds[:period]
    raise UserError("the model's config.json has no layers")


def check_layer_count(hf: Mapping[str, Any], layer_types: Sequence[str]) -> None:
    """UserError when layer_types and num_hidden_layers disagree."""
    if len(layer_types) != hf["num_hidden_layers"]:
        raise UserError(
            f"the model's config.json lists {len(layer_types)} layer_types for {hf['num_hidden_layers']} layers"
        )


def sliding_window(hf: Mapping[str, Any]) -> int:
    """The window of sliding layers; 4096 where the file is silent, UserError where it says none."""
    window = hf.get("sliding_window", 4096)
    if type(window) is not int or window < 1:
        raise UserError(f"the model's config.json has sliding layers, but no sliding_window (it is {window!r})")
    return window


def rope_entries(hf: Mapping[str, Any], default_theta: float) -> dict[str, dict[str, Any] | None]:
    """RoPE parameters as {"full_attention": {...}, "sliding_attention": {...} or None}.

    None means that the file says nothing of sliding layers on their own. Every entry has
    `rope_type` and `rope_theta`.
    """
    given = hf.get("rope_parameters") or {}
    theta = hf.get("rope_theta") or default_theta
    if any(name in given for name in LAYER_TYPE_NAMES):
        entries = {name: given.get(name) for name in LAYER_TYPE_NAMES}
    else:
        entries = {"full_attention": {**(hf.get("rope_scaling") or {}), **given}, "sliding_attention": None}
    for name, entry in entries.items():
        if entry is None:
            continue
        unknown = sorted(set(entry) - set(_ROPE_KEYS))
        kind = entry.get("rope_type") or entry.get("type") or "default"
        if unknown:
            choice = nearest(unknown[0], _ROPE_KEYS)
            raise UserError(f"RoPE parameter {unknown[0]!r} of {name} is not supported{choice}")
        if kind not in _ROPE_TYPES:
            raise UserError(f"rope_type {kind!r} of {name} is not supported{nearest(kind, _ROPE_TYPES)}")
        for key, neutral in (("partial_rotary_factor", 1.0), ("mscale", 0), ("mscale_all_dim", 0)):
            if (entry.get(key) or neutral) != neutral:
                raise UserError(f"{key}={entry[key]} in the RoPE parameters of {name} is not supported")
        if not entry.get("truncate", True):
            raise UserError(f"truncate=false in the RoPE parameters of {name} is not supported")
        entries[name] = {**entry, "rope_type": kind, "rope_theta": float(entry.get("rope_theta") or theta)}
    if entries.get("full_attention") is None:
        entries["full_attention"] = {"rope_type": "default", "rope_theta": float(theta)}
    return entries


def yarn_fields(entry: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """DecoderConfig's yarn_* fields from the RoPE entry of the full layers ({} for plain RoPE)."""
    if entry["rope_type"] == "default":
        return {}
    original = entry.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    if not entry.get("factor") or not original:
        raise UserError("yarn RoPE needs factor and original_max_position_embeddings in config.json")
    return {
        "yarn_factor": float(entry["factor"]),
        "yarn_original_length": int(original),
        "yarn_beta_fast": float(entry.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(entry.get("beta_slow") or 1.0),
        "yarn_attention_factor": float(entry.get("attention_factor") or 0.0),
    }


def yarn_entry(config: DecoderConfig) -> dict[str, Any]:
    """The HF RoPE entry of full layers."""
    if config.yarn_factor == 1.0 and not config.yarn_attention_factor:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    entry = {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.yarn_factor,
        "original_max_position_embeddings": config.yarn_original_length,
        "beta_fast": config.yarn_beta_fast,
        "beta_slow": config.yarn_beta_slow,
    }
    if config.yarn_attention_factor:
        entry["attention_factor"] = config.yarn_attention_factor
    return entry


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """The HF fields that both families spell the same way, RoPE in its legacy form."""
    entry = yarn_entry(config)
    theta = entry.pop("rope_theta")
    names = {ours: theirs for theirs, ours in LAYER_TYPE_NAMES.items()}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position,
        "layer_types": [names[kind] for kind in config.layer_pattern] * config.num_groups,
        "rope_theta": theta,
        "rope_scaling": None if entry["rope_type"] == "default" else entry,
        "use_cache": True,
    }
