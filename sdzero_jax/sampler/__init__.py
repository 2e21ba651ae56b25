"""Token ids in, sampled token ids and log-probs out."""

from sdzero_jax.sampler.engine import Completion, Request, Sampler, SamplerConfig

__all__ = ["Completion", "Request", "Sampler", "SamplerConfig"]
