"""The two families by name: published models, config.json -> model, model -> config.json. Left out: tensors."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.models import olmo3, qwen3
from sdzero_jax.models.decoder import DecoderConfig, LanguageModel

FAMILIES = {qwen3.MODEL_TYPE: qwen3, olmo3.MODEL_TYPE: olmo3}


def _preset(fields: Mapping[str, Any], **dials: Any) -> DecoderConfig:
    return DecoderConfig(**{**fields, **dials})


# Name -> DecoderConfig of a published model; keywords set other dials (remat, compute_dtype, ...).
PRESETS: Mapping[str, Callable[..., DecoderConfig]] = {
    name: functools.partial(_preset, fields) for module in FAMILIES.values() for name, fields in module.PRESETS.items()
}
# Dials of how a model runs, not of what it is: no config.json mentions them.
RUNTIME_FIELDS = ("param_dtype", "compute_dtype", "remat", "attention")


def from_config(hf_config: Mapping[str, Any], **dials: Any) -> LanguageModel:
    """The model that a config.json (already parsed) describes; `dials` set DecoderConfig fields.

    Raises UserError for another model_type and for every setting that is not supported.
    """
    if not isinstance(hf_config, Mapping):
        raise UserError(f"a model's config.json holds an object, this one a {type(hf_config).__name__}")
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        if "moe" in str(model_type):
            families = " and ".join(sorted(FAMILIES))
            raise UserError(f"model_type {model_type!r} is a mixture of experts; only dense {families} are supported")
        raise UserError(f"model_type {model_type!r} is not supported{nearest(str(model_type), FAMILIES)}")
    heads = hf_config.get("architectures")
    if heads and FAMILIES[model_type].ARCHITECTURE not in heads:
        raise UserError(
            f"architecture {heads[0]!r} is not supported; wanted {FAMILIES[model_type].ARCHITECTURE!r} (next-token "
            "weights)"
        )
    config = FAMILIES[model_type].from_hf(hf_config, **dials)
    return LanguageModel(config, json.dumps(hf_config, indent=2))


def to_hf_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a model: the one it was read from while that still describes it."""
    if model.hf_config:
        read = json.loads(model.hf_config)
        same = {name: getattr(model.config, name) for name in RUNTIME_FIELDS}
        if from_config(read, **same).config == model.config:
            return read
    return FAMILIES[family(model.config)].to_hf(model.config)


def family(config: DecoderConfig) -> str:
    """The model_type that a decoder can be written as; UserError when there is none."""
    dials = (config.norm_position, config.qk_norm)
    families = {("pre", "head"): qwen3.MODEL_TYPE, ("post", "projection"): olmo3.MODEL_TYPE}
    if dials not in families:
        raise UserError(
            f"norm_position={dials[0]!r} with qk_norm={dials[1]!r} has no Hugging Face form; "
            "pre with head is qwen3, post with projection is olmo3"
        )
    return families[dials]
