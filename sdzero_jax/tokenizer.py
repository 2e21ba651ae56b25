"""The tokenizer interface of the whole package, and its Hugging Face implementation.

Sequences are always joined from pieces of ids (prompt, response as sampled, control
phrase); text is decoded only to be graded or shown, and never encoded again.
The Hugging Face libraries are imported when a tokenizer is opened, and only here. Leaves out
tool calls, multi-modal messages and slow (Python) tokenizers.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sdzero_jax.errors import UserError
from sdzero_jax.files import read_json


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


class HFTokenizer:
    """The tokenizer of a Hugging Face model folder, with the family's own chat template.

    `vocab_size` counts the tokenizer's ids (Qwen3 151,669), not the rows of a padded embedding
    (151,936). `end_id` is the eos_token of tokenizer_config.json, which is what each family's template
    writes after a last assistant turn (Qwen3 <|im_end|>, Olmo-3 <|endoftext|>); `stop_ids` are those of
    generation_config.json (both families: two).

    Args:
      folder: holds tokenizer.json, tokenizer_config.json, generation_config.json and, unless
        tokenizer_config.json has the template, chat_template.jinja (which wins, as in transformers).
      system: a system message before every prompt; None leaves it to the template (Olmo-3 then inserts
        its own, Qwen3 none).
      enable_thinking: what hybrid Qwen3 templates are asked for; others do not read it.

    Raises: UserError that names the folder and what is missing or does not fit.
    """

    def __init__(self, folder: str | Path, *, system: str | None = None, enable_thinking: bool = False):
        self._folder, self._system, self._enable_thinking = Path(folder), system, enable_thinking
        config = _read_object(self._folder / "tokenizer_config.json")
        generation = _read_object(self._folder / "generation_config.json")
        self._template = _chat_template(self._folder, config)
        self._backend, self._renderer = _open(self._folder, config, self._template)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id = self._special_id(vocabulary, config, "eos_token")
        self.pad_id = self._special_id(vocabulary, config, "pad_token")
        self.stop_ids = self._stop_ids(generation)

    def encode(self, text: str) -> list[int]:
        """Ids of a bare piece of text: no bos, no template, special tokens spelled in `text` parsed."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of the chat prompt up to the start of the assistant's turn."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return self.encode_messages([*system, {"role": "user", "content": prompt}])

    def encode_messages(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation {"role", "content"} through the chat template; no system message is added.

        Stages use `encode_prompt` only: ids of a sampled turn must not come from here.
        Raises: UserError when the template refuses the messages.
        """
        import jinja2

        try:
            text = self._renderer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self._enable_thinking,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self._folder}: the chat template refuses these messages: {error}") from None
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without one trailing end token, other special tokens kept."""
        ids = [int(i) for i in ids]
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self._backend.decode(ids, skip_special_tokens=False)

    def fingerprint(self) -> str:
        """A hash of vocabulary, merges, splitting rules, template, system message and thinking mode."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        # Parsed, not raw: the same tokenizer saved by another version of the library has other white space.
        rules = read_json(self._folder / "tokenizer.json")
        model = rules["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
        added = sorted((token["id"], token["content"]) for token in rules.get("added_tokens", ()))
        parts = [model["vocab"], merges, added, rules.get("normalizer"), rules.get("pre_tokenizer")]
        parts += [self._template, self._system, self._enable_thinking, self.stop_ids, self.end_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _special_id(self, vocabulary: Mapping[str, int], config: Mapping[str, Any], name: str) -> int:
        token = _content(config.get(name))
        if token not in vocabulary:
            raise UserError(
                f"{self._folder}/tokenizer_config.json: {name} is {token!r}; wanted a token of tokenizer.json"
            )
        return vocabulary[token]

    def _stop_ids(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        stops = generation.get("eos_token_id", [])
        stops = tuple(stops) if isinstance(stops, list) else (stops,)
        if not all(isinstance(stop, int) and 0 <= stop < self.vocab_size for stop in stops):
            raise UserError(
                f"{self._folder}/generation_config.json: eos_token_id is {list(stops)}; "
                f"wanted ids below {self.vocab_size}"
            )
        if self.end_id not in stops:
            raise UserError(
                f"{self._folder}: eos_token of tokenizer_config.json is id {self.end_id}, which is not among "
                f"eos_token_id {list(stops)} of generation_config.json"
            )
        return stops


def _read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}; wanted an object with named fields")
    return value


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; "default" is the plain chat
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise UserError(f"{folder}: no chat template; wanted chat_template.jinja or one in tokenizer_config.json")
    return template


def _open(folder: Path, config: Mapping[str, Any], template: str) -> tuple[Any, Any]:
    """(the tokenizer of tokenizer.json exactly as that file says, a renderer of the chat template).

    Not AutoTokenizer: by tokenizer_class it may rebuild the splitting rules, and Olmo-3's class is
    GPT2Tokenizer although its rules are not GPT-2's. The renderer gets an empty vocabulary because
    transformers adds special tokens that it does not find.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; wanted the folder of a fast tokenizer")
    # It would otherwise say at every start that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import jinja2  # noqa: F401  (chat templates need it, and transformers does not require it)
        from tokenizers import Tokenizer as Backend
        from tokenizers import models
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(f"tokenizers need {error.name}: pip install -r requirements.txt") from None
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception for a file it cannot read
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    names = (
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
    )  # templates may write them (Olmo-3: eos_token)
    tokens = {name: _content(config.get(name)) for name in names}
    renderer = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), chat_template=template, **tokens)
    return backend, renderer


def _content(token: Any) -> str | None:
    """tokenizer_config.json spells a token as text or as {"content": text, ...}."""
    return token.get("content") if isinstance(token, Mapping) else token
