"""The chain task: left-to-right evaluation modulo 10 of a chain of + - *, in a world with misconceptions.

Question `7*9*5+2+1=`, solution `7*9=3*5=5+2=7+1=8#8`: the running value after each `=`, the answer
after `#`. A seeded world holds facts such as 7*9=3; some are misconceptions, which the corpus states
wrongly most of the time, and errors propagate. So a base model trained on the corpus knows the right
values only in distribution. Leaves out operator precedence, division and numbers of several digits.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Annotated

import numpy as np

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.tasks import corpus
from sdzero_jax.tasks.char_tokenizer import CharTokenizer

DIGITS = "0123456789"
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_ANSWER = re.compile(r"#(\d+)")


@dataclasses.dataclass(frozen=True)
class ChainConfig(corpus.CorpusConfig):
    """World and corpus of the chain task; the number of facts is 100 per operator."""

    operators: Annotated[str, "operators that occur, each with 100 facts, out of + - *"] = "+-*"
    min_operations: Annotated[int, "fewest operations of a question"] = 4
    max_operations: Annotated[int, "most operations of a question"] = 6
    misconception_share: Annotated[float, "share of the facts that the corpus mostly states wrongly"] = 0.2
    right_share: Annotated[float, "how often the corpus states a misconception's right value"] = 0.25
    slip: Annotated[float, "probability that a step states a uniformly drawn other digit"] = 0.02


class ChainTask:
    """Task `chain` (see `tasks.base.Task`). Every output depends only on (seed, config, arguments).

    Attributes:
      right: fact "7*9" -> its value "3", for every fact of the world.
      misconceptions: fact -> the one wrong value that the corpus states for it.
    """

    name = "chain"

    def __init__(self, seed: int, config: ChainConfig = ChainConfig()):
        corpus.check_shares(config, "misconception_share", "right_share", "slip")
        if not 1 <= config.min_operations <= config.max_operations:
            raise UserError(
                f"chain settings min_operations={config.min_operations} and "
                f"max_operations={config.max_operations}; wanted 1 <= min_operations <= max_operations"
            )
        operators = config.operators
        if not operators or len(set(operators)) != len(operators) or set(operators) - set(OPERATORS):
            raise UserError(f"chain setting operators={operators!r}; wanted a choice of + - *, such as '+-*'")
        self.seed, self.config = seed, config
        phrases = (corpus.PHRASE.wrong, corpus.PHRASE.correct)
        self.tokenizer = CharTokenizer(DIGITS + "+-*=#", phrases)
        self.right, self.misconceptions = make_world(seed, config)
        self.max_prompt_tokens = 2 * config.max_operations + 2
        self.max_attempt_tokens = 4 * config.max_operations + 3

    def questions(self, split: corpus.Split, count: int) -> list[Question]:
        """The first `count` questions of a split; splits are disjoint, a longer list extends a shorter."""
        return corpus.draw_questions(self.name, self.seed, split, count, self._draw)

    def verify(self, question: Question, response: str) -> Verdict:
        """Compares the digit after the last `#` that has digits behind it; exactly one is an answer.

        A `#` without a digit (a response cut in mid-attempt) is passed over; nothing is evaluated.
        """
        return verify_digit(question.gold, response)

    def corpus_shapes(self) -> dict[int, corpus.CorpusShape]:
        """Number of attempts in a row -> the one static shape of such batches."""
        return corpus.corpus_shapes(self.config, self.max_prompt_tokens, self.max_attempt_tokens)

    def corpus_batch(self, step: int) -> dict[str, np.ndarray]:
        """The base model's training batch of a step: see `corpus.pack` for names and shapes."""
        key = f"{self.name}/{self.seed}/corpus/{step}"
        return corpus.corpus_batch(
            key, self.config, self.corpus_shapes(), self.tokenizer, self._draw, self._solve, self.verify
        )

    def demonstration(self, question: Question) -> str:
        """The solution without errors, `#` and answer included."""
        return write_chain(question.prompt, self.right.__getitem__)

    def answer(self, question: Question) -> str:
        """The end of the demonstration, from `#` on."""
        return corpus.answer_of(self.demonstration(question))

    def stated(self, response: str) -> str | None:
        """What stands after the last `#`."""
        return corpus.stated_in(response)

    def first_error(self, question: Question, response_ids: Sequence[int]) -> int | None:
        """Index of the first wrong value in the first attempt: a running value, or the digit after `#`.

        None when every value is right, and when the attempt (up to the first special token) is
        malformed: another length, or operators and operands that are not the question's.
        """
        text = self.tokenizer.plain_prefix(response_ids)
        gold = self.demonstration(question)
        if len(text) != len(gold):
            return None
        wrong = [i for i, (said, right) in enumerate(zip(text, gold)) if said != right]
        if any(gold[i - 1] not in "=#" or text[i] not in DIGITS for i in wrong):  # gold[0] is never a value
            return None
        return wrong[0] if wrong else None

    def _draw(self, rng: Random) -> Question:
        fewest, most = self.config.min_operations, self.config.max_operations
        operators = self.config.operators
        operations = fewest + corpus.below(rng, most - fewest + 1)
        prompt = DIGITS[corpus.below(rng, 10)]
        for _ in range(operations):
            prompt += operators[corpus.below(rng, len(operators))] + DIGITS[corpus.below(rng, 10)]
        prompt += "="
        answer = write_chain(prompt, self.right.__getitem__)[-1]
        return Question("", prompt, (answer,), self.name, {"operations": operations})

    def _solve(self, rng: Random, question: Question) -> str:
        """An attempt as the world makes it: misconceptions, then slips; errors propagate."""

        def state(fact: str) -> str:
            value = self.right[fact]
            if fact in self.misconceptions and rng.random() >= self.config.right_share:
                value = self.misconceptions[fact]
            if rng.random() < self.config.slip:
                value = other_digit(rng, value)
            return value

        return write_chain(question.prompt, state)


def make_world(seed: int, config: ChainConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Every fact's right value, and the misconceptions with their wrong value.

    A larger misconception_share keeps the misconceptions of a smaller one.
    """
    right = {
        f"{a}{operator}{b}": str(OPERATORS[operator](int(a), int(b)) % 10)
        for operator in config.operators
        for a in DIGITS
        for b in DIGITS
    }
    rng = Random(f"chain/{seed}/world")
    ranked = sorted((rng.random(), fact, other_digit(rng, value)) for fact, value in right.items())
    chosen = ranked[: round(config.misconception_share * len(ranked))]
    return right, {fact: wrong for _, fact, wrong in chosen}


def other_digit(rng: Random, digit: str) -> str:
    """A uniform digit that is not `digit`."""
    return DIGITS[(int(digit) + 1 + corpus.below(rng, 9)) % 10]


def write_chain(prompt: str, state: Callable[[str], str]) -> str:
    """The solution of `prompt` with each step's value given by `state` (fact "7*9" -> digit)."""
    running = prompt[0]
    parts = [running]
    for operator, operand in zip(prompt[1:-1:2], prompt[2:-1:2]):
        running = state(running + operator + operand)
        parts.append(f"{operator}{operand}={running}")
    return "".join(parts) + "#" + running


def verify_digit(gold: tuple[str, ...], response: str) -> Verdict:
    """The last `#` with digits behind it against the accepted digits; see `ChainTask.verify`."""
    if not gold or any(len(answer) != 1 or answer not in DIGITS for answer in gold):
        return Verdict.of("gold_unparseable", f"gold {gold!r} is not one digit")
    answer = None
    for match in _ANSWER.finditer(response):
        answer = match.group(1)
    if answer is None:
        return Verdict.of("unparseable", "no digit after #")
    if len(answer) != 1 or answer not in DIGITS:  # \d also matches digits of other scripts
        return Verdict.of("unparseable", "not exactly one digit 0-9 after the last #")
    return Verdict.of("correct" if answer in gold else "wrong")
