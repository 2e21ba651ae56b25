"""The countdown task: reach a target with + - * / and parentheses, using each given number exactly once.

Question `3,5,7>32=`, solution `5*7=35;35-3=32#(5*7)-3`: worked steps, then an expression after `#`.
The corpus solves right_share of its attempts and else walks at random to some other value. Leaves out
search in the working, negative and fractional intermediate values (the verifier accepts both).
"""

import dataclasses
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Annotated

import numpy as np

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.tasks import corpus
from sdzero_jax.tasks.char_tokenizer import CharTokenizer

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LARGEST_VALUE = 999  # of an intermediate value in the corpus
LARGEST_TARGET = 99
LONGEST_EXPRESSION = 100  # characters; bounds the parser's recursion
_STEP = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})")


@dataclasses.dataclass(frozen=True)
class CountdownConfig(corpus.CorpusConfig):
    """Questions and corpus of the countdown task."""

    numbers: Annotated[int, "how many numbers a question gives"] = 3
    largest: Annotated[int, "largest number given"] = 20
    right_share: Annotated[float, "how often the corpus solves a question, a random walk aside"] = 0.5


class CountdownTask:
    """Task `countdown` (see `tasks.base.Task`). Every output depends only on (seed, config, arguments)."""

    name = "countdown"

    def __init__(self, seed: int, config: CountdownConfig = CountdownConfig()):
        corpus.check_shares(config, "right_share")
        if not 2 <= config.numbers <= 6:
            raise UserError(f"countdown setting numbers={config.numbers}; wanted 2 to 6")
        if not 2 <= config.largest <= LARGEST_TARGET:
            raise UserError(f"countdown setting largest={config.largest}; wanted 2 to {LARGEST_TARGET}")
        self.seed, self.config = seed, config
        self.tokenizer = CharTokenizer("0123456789+-*/()=,>;#", (corpus.PHRASE.wrong, corpus.PHRASE.correct))
        n, digits, value_digits = config.numbers, len(str(config.largest)), len(str(LARGEST_VALUE))
        self.max_prompt_tokens = n * digits + (n - 1) + len(f">{LARGEST_TARGET}=")
        steps = (n - 1) * (3 * value_digits + 2) + (n - 2)
        self.max_attempt_tokens = steps + 1 + n * digits + (n - 1) + 2 * (n - 2)

    def questions(self, split: corpus.Split, count: int) -> list[Question]:
        """The first `count` questions of a split; splits are disjoint, a longer list extends a shorter."""
        return corpus.draw_questions(self.name, self.seed, split, count, self._draw)

    def verify(self, question: Question, response: str) -> Verdict:
        """Parses the expression after the last `#` (up to a special token or the end) in exact fractions."""
        _, mark, answer = response.rpartition("#")
        if not mark:
            return Verdict.of("unparseable", "no #")
        numbers, target = read_prompt(question.prompt)
        try:
            value, used = evaluate(answer.partition("<")[0])
        except ZeroDivisionError:
            return Verdict.of("wrong", "division by zero")
        except ValueError as error:
            return Verdict.of("unparseable", str(error))
        if Counter(used) != Counter(numbers):
            return Verdict.of("wrong", "does not use each number exactly once")
        return Verdict.of("correct" if value == target else "wrong")

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
        """The solution from which the question was made."""
        return question.metadata["solution"]

    def answer(self, question: Question) -> str:
        """The end of the demonstration, from `#` on."""
        return corpus.answer_of(self.demonstration(question))

    def stated(self, response: str) -> str | None:
        """What stands after the last `#`."""
        return corpus.stated_in(response)

    def first_error(self, question: Question, response_ids: Sequence[int]) -> int | None:
        """Index of the first wrong digit in a step's value, or in a last value that is not the target.

        None when there is none, and when the first attempt is malformed or uses numbers it does not have.
        """
        text = self.tokenizer.plain_prefix(response_ids)
        working, _, answer = text.partition("#")
        numbers, target = read_prompt(question.prompt)
        pool, values = Counter(numbers), []  # values: (position, stated, right)
        position = 0
        for step in working.split(";"):
            match = _STEP.fullmatch(step)
            if match is None or (match[2] == "/" and int(match[3]) == 0):
                return None
            pool.subtract([int(match[1]), int(match[3])])
            pool[int(match[4])] += 1
            if min(pool.values()) < 0:
                return None
            right = OPERATIONS[match[2]](Fraction(match[1]), Fraction(match[3]))
            values.append((position + match.start(4), match[4], str(right)))
            position += len(step) + 1
        try:
            evaluate(answer)
        except (ValueError, ZeroDivisionError):
            return None
        values.append((*values[-1][:2], str(target)))
        for start, stated, right in values:
            if stated != right:
                same = (a == b for a, b in zip(stated, right))
                return start + next((i for i, equal in enumerate(same) if not equal), len(stated) - 1)
        return None

    def _draw(self, rng: Random) -> Question:
        config = self.config
        while True:
            numbers = sorted(1 + corpus.below(rng, config.largest) for _ in range(config.numbers))
            target, solution = walk(rng, numbers)
            if target <= LARGEST_TARGET:
                prompt = f"{','.join(map(str, numbers))}>{target}="
                return Question("", prompt, (str(target),), self.name, {"solution": solution})

    def _solve(self, rng: Random, question: Question) -> str:
        if rng.random() < self.config.right_share:
            return self.demonstration(question)
        return walk(rng, read_prompt(question.prompt)[0])[1]


def read_prompt(prompt: str) -> tuple[list[int], int]:
    """Numbers and target of a question such as `3,5,7>32=`."""
    numbers, _, target = prompt.rstrip("=").partition(">")
    return [int(number) for number in numbers.split(",")], int(target)


def walk(rng: Random, numbers: Sequence[int]) -> tuple[int, str]:
    """Combines the numbers at random through whole values from 1 on: the value reached, the attempt."""
    while True:
        pool = [(number, str(number)) for number in numbers]
        steps = []
        while len(pool) > 1:
            a, a_text = pool.pop(corpus.below(rng, len(pool)))
            b, b_text = pool.pop(corpus.below(rng, len(pool)))
            sign = "+-*/"[corpus.below(rng, 4)]
            value = OPERATIONS[sign](a, b)
            if value != int(value) or not 1 <= value <= LARGEST_VALUE:
                break
            steps.append(f"{a}{sign}{b}={int(value)}")
            pool.append((int(value), f"{_wrapped(a_text)}{sign}{_wrapped(b_text)}"))
        else:
            value, expression = pool[0]
            return value, f"{';'.join(steps)}#{expression}"


def _wrapped(expression: str) -> str:
    return expression if expression.isdigit() else f"({expression})"


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of numbers, + - * / and parentheses, and the numbers in it, in order.

    Raises: ValueError when malformed or longer than LONGEST_EXPRESSION, ZeroDivisionError.
    """
    if len(text) > LONGEST_EXPRESSION:
        raise ValueError(f"expression longer than {LONGEST_EXPRESSION} characters")
    tokens = re.findall(r"[0-9]+|[-+*/()]", text)
    if "".join(tokens) != text:
        raise ValueError("a character that belongs in no expression")
    tokens.append("")  # the end
    numbers: list[int] = []

    def factor() -> Fraction:
        token = tokens.pop(0)
        if token == "(":
            value = chain("+-", lambda: chain("*/", factor))
            if tokens.pop(0) != ")":
                raise ValueError("unclosed parenthesis")
            return value
        if not token.isdigit():
            raise ValueError(f"number expected, got {token or 'the end'}")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    def chain(signs: str, operand) -> Fraction:
        value = operand()
        while tokens and tokens[0] and tokens[0] in signs:
            value = OPERATIONS[tokens.pop(0)](value, operand())
        return value

    value = chain("+-", lambda: chain("*/", factor))
    if tokens != [""]:
        raise ValueError("text behind the expression")
    return value, numbers
