"""A character tokenizer for the embedded tasks: one id per symbol and one per control phrase.

Implements `sdzero_jax.tokenizer.Tokenizer`. Leaves out chat templates (a prompt is bos + text)
and merges of any kind, so that a position in a text is a position in its ids.
"""

import hashlib
import json
import re
from collections.abc import Sequence

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


class CharTokenizer:
    """Vocabulary: pad, bos, eos, then one id per character of `symbols`, then one per special token.

    Args:
      symbols: the plain characters; "<" is reserved for spelling special tokens.
      specials: tokens of several characters, e.g. the control phrases ("<wrong>", "<ok>").
    Raises: ValueError when an entry occurs twice or a special is not spelled "<...>".
    """

    def __init__(self, symbols: str, specials: Sequence[str] = ()):
        self.symbols = symbols
        self.tokens = (PAD, BOS, EOS, *symbols, *specials)
        if len(set(self.tokens)) != len(self.tokens) or "<" in symbols:
            raise ValueError(f"symbols {symbols!r}, specials {tuple(specials)!r}: wanted distinct, no '<' symbol")
        if not all(re.fullmatch(r"<[^<>]+>", token) for token in specials):
            raise ValueError(f"special tokens are spelled '<name>', got {tuple(specials)!r}")
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        # No token is the start of another (only specials hold "<", each ends at its only ">"), so the first
        # match is the longest.
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)))
        self.vocab_size = len(self.tokens)
        self.pad_id, self.bos_id, self.end_id = self._ids[PAD], self._ids[BOS], self._ids[EOS]
        self.stop_ids = (self.end_id,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no bos added; special tokens spelled in it are parsed.

        Raises: ValueError that names the first character outside the vocabulary.
        """
        if "<" not in text:  # no special token can occur: one lookup per character
            try:
                return [self._ids[character] for character in text]
            except KeyError:
                pass  # the loop below says where
        ids, position = [], 0
        while position < len(text):
            match = self._pattern.match(text, position)
            if match is None:
                raise ValueError(
                    f"character {text[position]!r} at position {position} is not in the vocabulary "
                    f"({' '.join(self.tokens)})"
                )
            ids.append(self._ids[match.group()])
            position = match.end()
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of bos + `prompt`."""
        return [self.bos_id, *self.encode(prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without trailing pads and the end token before them; special tokens spelled out.

        Raises: ValueError on an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        while ids and ids[-1] == self.pad_id:
            ids.pop()
        if ids and ids[-1] == self.end_id:
            ids.pop()
        return "".join(map(self._token, ids))

    def plain_prefix(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first special token: position i of the text is position i of `ids`."""
        characters = []
        for i in ids:
            token = self._token(int(i))
            if len(token) > 1:
                break
            characters.append(token)
        return "".join(characters)

    def fingerprint(self) -> str:
        """sha256 (hex) of the vocabulary in order and of the prompt format."""
        record = json.dumps({"tokens": self.tokens, "prompt": f"{BOS}{{prompt}}"})
        return hashlib.sha256(record.encode()).hexdigest()

    def _token(self, i: int) -> str:
        if not 0 <= i < self.vocab_size:  # a negative index would silently read from the end
            raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}")
        return self.tokens[i]
