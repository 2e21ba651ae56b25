"""The tokenizer interface of the whole package, and its Hugging Face implementation.

Sequences are always joined from pieces of ids (prompt, response as sampled, control
phrase); text is decoded only to be graded or shown, and never encoded again.
"""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What stages need of a tokenizer. Ids are Python ints."""

    vocab_size: int
    pad_id: int
    stop_ids: tuple[int, ...]  # every id that ends a response
    end_id: int  # the end token written after text that was not sampled

    def encode(self, text: str) -> list[int]:
        """Ids of a bare piece of text: no bos, no template, special tokens spelled in `text` parsed."""
        ...

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of the chat prompt up to the start of the assistant's turn."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without a trailing end token, other special tokens kept."""
        ...

    def fingerprint(self) -> str:
        """A hash of vocabulary and template, recorded with every checkpoint."""
        ...
