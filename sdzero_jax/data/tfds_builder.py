"""Problem sets as TFDS datasets of ArrayRecord files, written and read without TensorFlow.

Imports tensorflow_datasets when it is imported: only `prepare` does that, and late. Leaves out where
questions come from and what is recorded about them.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds

from sdzero_jax.examples import Question

Examples = Mapping[str, Callable[[], Iterator[Question]]]  # split -> its questions, read anew


class ProblemSet(tfds.core.GeneratorBasedBuilder):
    """Questions in a dataset of their own: id, prompt, gold, kind, and metadata as JSON; order kept."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, examples: Examples, **kwargs: Any):
        self._examples = examples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "prompt": text(),
                    "gold": tfds.features.Sequence(text()),
                    "kind": text(),
                    "metadata": text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(make()) for split, make in self._examples.items()}

    def _generate_examples(self, questions: Iterator[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, question in enumerate(questions):
            yield (
                number,
                {
                    "id": question.id,
                    "prompt": question.prompt,
                    "gold": list(question.gold),
                    "kind": question.kind,
                    "metadata": json.dumps(question.metadata, sort_keys=True),
                },
            )


class QuestionSource(Sequence):
    """One split, read through `as_data_source`: a random-access sequence of Questions that grain takes."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Question:
        number = range(len(self))[index]  # IndexError past the end, as iteration needs
        record = self._records[number]
        return Question(
            id=_text(record["id"]),
            prompt=_text(record["prompt"]),
            gold=tuple(_text(answer) for answer in record["gold"]),
            kind=_text(record["kind"]),
            metadata=json.loads(_text(record["metadata"])),
        )


def write(directory: Path, examples: Examples) -> dict[str, int]:
    """Writes the splits under `directory`; returns the number of questions of each."""
    builder = ProblemSet(examples=examples, data_dir=str(directory))
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # tfds prints; stdout is the command's own
        builder.download_and_prepare()
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def source(directory: Path, split: str) -> QuestionSource:
    """The questions of one split that `write` put under `directory`. Raises errors of many kinds for a broken copy."""
    builder = tfds.builder_from_directory(str(directory / "problem_set" / str(ProblemSet.VERSION)))
    for path in builder.info.splits[split].filepaths:
        os.stat(path)  # files are opened when a record is read, which is late
    questions = QuestionSource(builder.as_data_source(split))
    questions[0], questions[-1]  # a file that was cut fails here
    return questions


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
