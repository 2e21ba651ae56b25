"""Questions as a config names them: a prepared set's split, or a file with a field mapping."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from sdzero_jax.data.prepare import DATA_DIR, open_split
from sdzero_jax.data.questions import SUFFIXES, FieldMapping, read_questions, with_instruction
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Where questions come from."""

    source: Annotated[str, "NAME:SPLIT of a prepared set, or a .jsonl, .json or .parquet file"] = "gsm8k:train"
    data_dir: Annotated[str, "folder of the prepared sets"] = DATA_DIR
    fields: Annotated[FieldMapping, "fields of a file; prepared sets have their own"] = FieldMapping()


class _Asked(Sequence):
    """Questions with their instruction, made when read."""

    def __init__(self, questions: Sequence[Question]):
        self._questions = questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Question:
        return with_instruction(self._questions[index])


def load_questions(config: QuestionsConfig) -> Sequence[Question]:
    """The questions of a source as every stage asks them, instruction included; random access.

    Raises: UserError for a source that is neither a file nor NAME:SPLIT, and as `read_questions` and
      `open_split` do.
    """
    name, separator, split = config.source.rpartition(":")
    if any(suffix in Path(config.source).suffixes for suffix in SUFFIXES):
        return _Asked(read_questions(config.source, config.fields))
    if not separator:
        raise UserError(f"question source {config.source!r}; wanted NAME:SPLIT or a {', '.join(SUFFIXES)} file")
    return _Asked(open_split(name, split, data_dir=config.data_dir))
