"""What a run asks and how it is graded: an embedded task, or real questions with a model's tokenizer.

Both give the same four things to the stages: questions by split, a tokenizer, verdicts, and (embedded
tasks only) the place of the first error. Leaves out preparing sets (`data`) and grading (`graders`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol

import numpy as np

from sdzero_jax.data import (
    FieldMapping,
    QuestionsConfig,
    find_overlap,
    load_questions,
    split_by_id,
    without_overlap,
)
from sdzero_jax.data.overlap import check_overlap
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.graders import Graders, GradersConfig
from sdzero_jax.models.hub import resolve
from sdzero_jax.progress import say
from sdzero_jax.tasks import Task
from sdzero_jax.tokenizer import HFTokenizer, Tokenizer
from sdzero_jax.verifiers import extraction, normalise


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """Real questions. With an empty `train` the run uses the embedded task."""

    train: Annotated[str, "NAME:SPLIT of a prepared set, or a .jsonl, .json or .parquet file; empty: the task"] = ""
    validation: Annotated[str, "as train; empty: a share of the training questions, which they leave"] = ""
    validation_share: Annotated[float, "that share"] = 0.02
    test: Annotated[str, "as train: what is evaluated"] = ""
    data_dir: Annotated[str, "folder of the prepared sets"] = "data"
    fields: Annotated[FieldMapping, "fields of files; prepared sets have their own"] = FieldMapping()
    overlap: Annotated[Literal["refuse", "drop", "allow"], "training questions that validation or test hold too"] = (
        "refuse"
    )
    tokenizer: Annotated[str, "Hugging Face folder or hub id of a tokenizer; empty: that of base.pretrained"] = ""
    system: Annotated[str, "system message before every question; empty: what the template has"] = ""
    thinking: Annotated[bool, "ask hybrid templates for their thinking mode"] = False
    max_prompt_tokens: Annotated[int, "longer questions are left out, template included"] = 1024
    seed: Annotated[int, "order in which questions are taken, and the validation share"] = 0
    graders: Annotated[GradersConfig, "how responses are graded"] = GradersConfig()


class Problems(Protocol):
    """What stages ask of a run's questions."""

    name: str
    tokenizer: Tokenizer
    max_prompt_tokens: int  # longest prompt in ids, everything included

    def questions(self, split: str, count: int) -> list[Question]:
        """The first `count` questions of train, validation or test; the splits are disjoint."""
        ...

    def verify(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Verdict]:
        """Grades responses, in order."""
        ...

    def first_error(self, rollout: Rollout) -> int | None:
        """Index of the first wrong token of a response; None where nobody knows."""
        ...

    def demonstration(self, question: Question) -> str | None:
        """A right solution, without end token; None where there is none."""
        ...

    def answer(self, question: Question) -> str | None:
        """The final answer alone, as a response would state it."""
        ...

    def stated(self, question: Question, response: str) -> str | None:
        """The answer that a response states, for majority votes; None without one."""
        ...

    def close(self) -> None:
        """Ends the processes that grade."""
        ...


class TaskProblems:
    """An embedded task as Problems."""

    def __init__(self, task: Task):
        self._task = task
        self.name, self.tokenizer = task.name, task.tokenizer
        self.max_prompt_tokens = task.max_prompt_tokens + 1  # bos

    def questions(self, split: str, count: int) -> list[Question]:
        return self._task.questions(split, count)

    def verify(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Verdict]:
        return [self._task.verify(question, response) for question, response in zip(questions, responses)]

    def first_error(self, rollout: Rollout) -> int | None:
        return self._task.first_error(rollout.question, rollout.response_ids)

    def demonstration(self, question: Question) -> str:
        return self._task.demonstration(question)

    def answer(self, question: Question) -> str:
        return self._task.answer(question)

    def stated(self, question: Question, response: str) -> str | None:
        return self._task.stated(response)

    def close(self) -> None:
        pass


class RealProblems:
    """Questions of problem sets or files, asked through a model's chat template.

    Args:
      config: see ProblemsConfig; `train` and `test` must be set.
      tokenizer: the model's.
    Raises: UserError for sources that are missing or overlap, and questions that cannot be graded here.
    """

    def __init__(self, config: ProblemsConfig, tokenizer: Tokenizer):
        if not config.test:
            raise UserError("problems.train is set but problems.test is not; set it to NAME:SPLIT or a file")
        self._config, self.tokenizer = config, tokenizer
        self.name, self.max_prompt_tokens = config.train, config.max_prompt_tokens
        self._graders = Graders(config.graders)
        self.verify: Callable[..., list[Verdict]] = self._graders.verify

    def questions(self, split: str, count: int) -> list[Question]:
        """In an order of the seed, without those whose prompt is too long.

        Prompts are measured as far as needed: a large set is not tokenised to ask a hundred questions.
        """
        fitting, rest, total = self._taken[split]
        while len(fitting) < count and rest:
            question = rest.pop()
            if len(self.tokenizer.encode_prompt(question.prompt)) <= self.max_prompt_tokens:
                fitting.append(question)
        if len(fitting) < count:
            raise UserError(self._too_few(split, count, len(fitting), total))
        return fitting[:count]

    def _too_few(self, split: str, count: int, fitting: int, total: int) -> str:
        """What is said when `count` questions are asked for: how many there are, and the settings that give more."""
        has, remedies = f"{total}", []
        if fitting < total:
            has = f"{fitting} of {total} within problems.max_prompt_tokens={self.max_prompt_tokens}"
            remedies.append("raise problems.max_prompt_tokens")
        if split == "validation" and not self._config.validation:
            remedies.append("raise problems.validation_share")
        remedies.append(f"set problems.{split} to a larger set")
        if fitting:
            remedies.append(f"ask for at most {fitting}")
        asked = f"{count} {split} questions are asked for, but {self._sources[split]} has {has}"
        return f"{asked}; {', or '.join(remedies)}"

    def first_error(self, rollout: Rollout) -> None:
        return None

    def demonstration(self, question: Question) -> str | None:
        return demonstration(question)

    def answer(self, question: Question) -> str | None:
        return f"The answer is \\boxed{{{question.gold[0]}}}." if question.kind == "math" and question.gold else None

    def stated(self, question: Question, response: str) -> str | None:
        """Of mathematics, the last box: its number, else its text; programs are not put to a vote."""
        box = extraction.last_box(extraction.after_thinking(response)) if question.kind == "math" else None
        if box is None:
            return None
        text = normalise.clean(box)
        number = normalise.parse_number(text)
        return text if number is None else str(number.value)

    def close(self) -> None:
        self._graders.close()

    @property
    def _sources(self) -> dict[str, str]:
        config = self._config
        share = f"a share of {config.validation_share} of {config.train}"
        return {"train": config.train, "validation": config.validation or share, "test": config.test}

    @functools.cached_property
    def _taken(self) -> dict[str, tuple[list[Question], list[Question], int]]:
        """Split -> (questions found to fit, those not yet looked at, the next one last, how many there are)."""
        config = self._config
        splits = {"train": self._load(config.train), "test": self._load(config.test)}
        if config.validation:
            splits["validation"] = self._load(config.validation)
        else:
            share = config.validation_share
            splits |= split_by_id(splits["train"], {"validation": share, "train": 1 - share}, config.seed)
        splits["train"] = self._apart(splits)
        taken = {}
        for split, questions in splits.items():
            self._graders.check(questions)
            order = np.random.default_rng(config.seed).permutation(len(questions))
            taken[split] = ([], [questions[i] for i in order], len(questions))
        return taken

    def _load(self, source: str) -> list[Question]:
        return list(load_questions(QuestionsConfig(source, self._config.data_dir, self._config.fields)))

    def _apart(self, splits: dict[str, list[Question]]) -> list[Question]:
        """The training questions, as the setting on overlap wants them."""
        evaluation = {self._sources[split]: splits[split] for split in ("validation", "test")}
        if self._config.overlap == "drop":
            pairs = find_overlap(splits["train"], evaluation)
            if pairs:
                say(f"{len({pair.train_id for pair in pairs})} training questions overlap with evaluation, left out")
            return without_overlap(splits["train"], pairs)
        check_overlap(splits["train"], evaluation, allow=self._config.overlap == "allow")
        return splits["train"]


def open_tokenizer(config: ProblemsConfig, pretrained: str) -> Tokenizer:
    """The tokenizer of a run on real questions: one of its own, or the pretrained model's."""
    path = config.tokenizer or pretrained
    if not path:
        raise UserError("real questions need a tokenizer; set problems.tokenizer or base.pretrained to a model folder")
    folder = resolve(path, weights=False).folder
    return HFTokenizer(folder, system=config.system or None, enable_thinking=config.thinking)


_CALCULATIONS = re.compile(r"<<[^<>]*>>")  # GSM8K's marks for a calculator


def demonstration(question: Question) -> str | None:
    """A right response: one that came with the question, or its reference solution as graders read answers.

    That is, a solution in mathematics ends with the gold answer in a box, and a program stands in a fenced block.
    None where there is neither.
    """
    if isinstance(whole := question.metadata.get("demonstration"), str):
        return whole
    solution = question.metadata.get("solution")
    if not isinstance(solution, str):
        return None
    if question.kind == "code":
        return f"```{question.metadata.get('language', 'python')}\n{solution.strip(chr(10))}\n```"
    if question.kind != "math":
        return None
    solution = _CALCULATIONS.sub("", solution).rpartition("####")[0].strip() or solution.strip()
    boxed = "\\boxed" in solution
    return solution if boxed else f"{solution}\nThe answer is \\boxed{{{question.gold[0]}}}."
