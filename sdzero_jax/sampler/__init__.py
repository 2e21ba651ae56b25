"""Token ids in, sampled token ids and log-probs out."""

from sdzero_jax.sampler.engine import Sampler, SamplerConfig, Session, prompt_buckets
from sdzero_jax.sampler.requests import Completion, Request

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig", "Session", "prompt_buckets"]
