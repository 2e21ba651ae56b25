"""A second implementation of the embedded tasks' rules: reads corpus rows back from the arrays and judges them."""

import dataclasses
import math
import re
from fractions import Fraction

import numpy as np
import pytest

from sdzero_jax.tasks import TaskConfig, make_task

CHAIN = make_task(TaskConfig())
COUNTDOWN = make_task(TaskConfig(name="countdown"))
BOTH = pytest.mark.parametrize("task", [CHAIN, COUNTDOWN], ids=["chain", "countdown"])
STEPS = 60
_cache: dict = {}


def batches(task, steps=STEPS):
    key = (id(task), steps)
    if key not in _cache:
        _cache[key] = [task.corpus_batch(step) for step in range(steps)]
    return _cache[key]


@dataclasses.dataclass
class Row:
    prompt: str
    attempts: list[str]
    phrases: list[str]
    trained: list[bool]  # per attempt


def read_rows(task, batch):
    """Splits every row into prompt, attempts and phrases; checks which tokens carry weight."""
    vocabulary = task.tokenizer.tokens
    for tokens, segments, index, weights in zip(
        batch["tokens"], batch["segment_ids"], batch["index"], batch["weights"]
    ):
        length = int(segments.sum())
        words = [vocabulary[i] for i in tokens[:length]]
        is_target = np.zeros(len(tokens) + 1, bool)
        is_target[index[weights > 0] + 1] = True
        assert words[0] == "<bos>" and words[-1] == "<eos>" and is_target[length - 1]
        assert not is_target[length:].any(), "padding carries weight"
        start = words.index("=") + 1
        assert not is_target[:start].any(), "the question carries weight"
        attempts, phrases, trained, flags, text = [], [], [], [], ""
        for position in range(start, length):
            word = words[position]
            if len(word) == 1:
                text += word
                flags.append(bool(is_target[position]))
                continue
            assert word in ("<wrong>", "<ok>") or (word == "<eos>" and position == length - 1)
            if word != "<eos>":
                assert not is_target[position], "a control phrase carries weight"
                phrases.append(word)
            assert len(set(flags)) == 1, "an attempt is trained as a whole or not at all"
            attempts.append(text)
            trained.append(flags[0])
            flags, text = [], ""
        yield Row("".join(words[1:start]), attempts, phrases, trained)


def all_rows(task, steps=STEPS):
    return [row for batch in batches(task, steps) for row in read_rows(task, batch)]


def chain_values(prompt):
    """Running values of a chain question, by plain integer arithmetic."""
    value, values = int(prompt[0]), []
    for i in range(1, len(prompt) - 1, 2):
        b = int(prompt[i + 1])
        value = {"+": value + b, "-": value - b, "*": value * b}[prompt[i]] % 10
        values.append(value)
    return values


def chain_is_right(prompt, text):
    answers = [p for p in range(len(text) - 1) if text[p] == "#" and text[p + 1].isdigit()]
    if not answers:
        return False
    last = answers[-1]
    if last + 2 < len(text) and text[last + 2].isdigit():
        return False
    return int(text[last + 1]) == chain_values(prompt)[-1]


def countdown_is_right(prompt, text):
    given, target = prompt[:-1].split(">")
    expression = text.rsplit("#", 1)[1] if "#" in text else ""
    try:
        value = eval(re.sub(r"\d+", lambda m: f"F({int(m[0])})", expression), {"F": Fraction, "__builtins__": {}})
    except Exception:
        return False
    return value == int(target) and sorted(re.findall(r"\d+", expression)) == sorted(given.split(","))


IS_RIGHT = {"chain": chain_is_right, "countdown": countdown_is_right}


def chain_steps(text):
    """(fact, stated value) of a well-formed attempt, None of any other."""
    match = re.fullmatch(r"(\d)((?:[-+*]\d=\d)+)#(\d)", text)
    if not match:
        return None
    running, steps = match[1], []
    for operator, operand, value in re.findall(r"([-+*])(\d)=(\d)", match[2]):
        steps.append((running + operator + operand, value))
        running = value
    return steps if match[3] == running else None


def assert_rate(hits, total, expected, sigmas=4.0):
    error = math.sqrt(expected * (1 - expected) / total)
    assert abs(hits / total - expected) < sigmas * error, f"{hits}/{total} = {hits / total:.4f}, not {expected:.4f}"


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
