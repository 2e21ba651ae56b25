"""The Task protocol, the registry of embedded tasks and the config that picks one.

A task is one file that implements `Task`, with a config dataclass of its own; it is registered by a
field of `TaskConfig` and an entry of `TASKS`. Leaves out everything else: `corpus` has what tasks share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import numpy as np

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.tasks.chain import ChainConfig, ChainTask
from sdzero_jax.tasks.char_tokenizer import CharTokenizer
from sdzero_jax.tasks.corpus import CorpusShape, Split
from sdzero_jax.tasks.countdown import CountdownConfig, CountdownTask


class Task(Protocol):
    """A synthetic verifiable task with a base-model corpus. Deterministic in its seed and config."""

    name: str
    tokenizer: CharTokenizer
    max_prompt_tokens: int  # longest prompt, without bos
    max_attempt_tokens: int  # longest well-formed attempt, without eos

    def questions(self, split: Split, count: int) -> list[Question]:
        """The first `count` questions of a split, ids like "chain-train-000012"; splits are disjoint."""
        ...

    def verify(self, question: Question, response: str) -> Verdict:
        """Grades a response text."""
        ...

    def corpus_batch(self, step: int) -> dict[str, np.ndarray]:
        """A base-model training batch, a pure function of (seed, step).

        Returns: tokens, positions, segment_ids (0 padding, 1 text) [B, L] int32; index, target_ids [B, R]
        int32; weights [B, R] float32. The output at position `index` predicts `target_ids`.
        """
        ...

    def corpus_shapes(self) -> dict[int, CorpusShape]:
        """Number of attempts in a row -> (B, L, R): every shape that `corpus_batch` returns."""
        ...

    def first_error(self, question: Question, response_ids: Sequence[int]) -> int | None:
        """Index of the first wrong value token in the first attempt; None without one or when malformed."""
        ...

    def demonstration(self, question: Question) -> str:
        """A right solution, without end token."""
        ...

    def answer(self, question: Question) -> str:
        """The final answer alone, as a response would state it."""
        ...

    def stated(self, response: str) -> str | None:
        """The answer that a response text states, for majority votes; None without one."""
        ...


@dataclass(frozen=True)
class TaskConfig:
    """Which embedded task, its seed, and the settings of each."""

    name: Annotated[str, "the embedded task: chain or countdown"] = "chain"
    seed: Annotated[int, "seed of the task's world, questions and corpus"] = 0
    chain: Annotated[ChainConfig, "settings of the chain task"] = field(default_factory=ChainConfig)
    countdown: Annotated[CountdownConfig, "settings of the countdown task"] = field(default_factory=CountdownConfig)


TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "chain": lambda config: ChainTask(config.seed, config.chain),
    "countdown": lambda config: CountdownTask(config.seed, config.countdown),
}


def make_task(config: TaskConfig) -> Task:
    """Builds the task that `config` names. Raises: UserError with the nearest name."""
    if config.name not in TASKS:
        raise UserError(f"unknown task {config.name!r}{nearest(config.name, TASKS)}")
    return TASKS[config.name](config)
