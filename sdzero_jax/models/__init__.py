"""Qwen3 and Olmo-3 decoders and their exchange with Hugging Face checkpoints."""

from sdzero_jax.models.cache import Cache, cache_bytes, insert
from sdzero_jax.models.convert import check_replaceable, float_dtype, load_pretrained, read_model, save_pretrained
from sdzero_jax.models.decoder import DecoderConfig, LanguageModel
from sdzero_jax.models.families import PRESETS, RUNTIME_FIELDS, from_config, to_hf_config
from sdzero_jax.models.hub import Source, resolve

__all__ = [
    "PRESETS",
    "RUNTIME_FIELDS",
    "Cache",
    "DecoderConfig",
    "LanguageModel",
    "Source",
    "cache_bytes",
    "check_replaceable",
    "float_dtype",
    "from_config",
    "insert",
    "load_pretrained",
    "read_model",
    "resolve",
    "save_pretrained",
    "to_hf_config",
]
