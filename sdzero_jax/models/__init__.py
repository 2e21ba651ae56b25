"""Qwen3 and Olmo-3 decoders and their exchange with Hugging Face checkpoints."""

from sdzero_jax.models.convert import PRESETS, from_config, load_pretrained, save_pretrained, to_hf_config
from sdzero_jax.models.decoder import Cache, DecoderConfig, LanguageModel

__all__ = [
    "PRESETS",
    "Cache",
    "DecoderConfig",
    "LanguageModel",
    "from_config",
    "load_pretrained",
    "save_pretrained",
    "to_hf_config",
]
