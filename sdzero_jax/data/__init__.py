"""Where questions come from and in which order."""

from sdzero_jax.data.iterators import shuffled_batches

__all__ = ["shuffled_batches"]
