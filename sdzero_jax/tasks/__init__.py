"""Synthetic tasks: question generator, corpus, verifier, character tokenizer."""

from sdzero_jax.tasks.base import TASKS, Task, TaskConfig, make_task
from sdzero_jax.tasks.chain import ChainConfig
from sdzero_jax.tasks.char_tokenizer import CharTokenizer
from sdzero_jax.tasks.countdown import CountdownConfig

__all__ = ["TASKS", "ChainConfig", "CharTokenizer", "CountdownConfig", "Task", "TaskConfig", "make_task"]
