"""Splits by id, and training questions that an evaluation set also holds."""

import pytest

from sdzero_jax.data import check_overlap, find_overlap, split_by_id, without_overlap
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.prompts import MATH_INSTRUCTION


def question(number, prompt, kind="math"):
    return Question(f"q-{number}", prompt, ("1",), kind)


def test_splits_follow_ids_only():
    questions = [question(n, f"{n}?") for n in range(2000)]
    splits = split_by_id(questions, {"collect": 0.5, "distill": 0.3, "validation": 0.2})
    assert {q.id for split in splits.values() for q in split} == {q.id for q in questions}
    assert sum(map(len, splits.values())) == 2000
    assert [round(len(split) / 2000, 1) for split in splits.values()] == [0.5, 0.3, 0.2]
    fewer = split_by_id(questions[1000:][::-1], {"collect": 0.5, "distill": 0.3, "validation": 0.2})
    for name, split in fewer.items():
        assert {q.id for q in split} <= {q.id for q in splits[name]}
    assert split_by_id(questions, {"a": 0.5, "b": 0.5}, 0)["a"] != split_by_id(questions, {"a": 0.5, "b": 0.5}, 1)["a"]
    for shares in ({"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(UserError, match="sum to 1"):
            split_by_id(questions, shares)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("what is  $\\frac{1}{2} + x$ ?", True),
        ("What is $\\dfrac{1}{2}+x$?\n", True),
        (f"What is $\\frac{{1}}{{2}} + x$? {MATH_INSTRUCTION}", True),
        ("What is $\\frac{1}{2} - x$?", False),
        ("What is $\\frac{1}{3} + x$?", False),
    ],
)
def test_the_same_problem_in_another_spelling_is_found(other, same):
    train, test = question(1, "What is $\\frac{1}{2} + x$?"), question(2, other)
    assert bool(find_overlap([train], {"math500": [test]})) == same


def test_decimals_and_signs_tell_problems_apart():
    texts = ["Is 1.5 > x?", "Is 15 > x?", "Is 1.5 < x?", "Is -1.5 > x?", "Is 1,5 > x?"]
    texts += ["$\\frac{1}{23}$?", "$\\frac{12}{3}$?", "5! is?", "5 is?", "x^{10}?", "x^10 + 0?"]
    for number, text in enumerate(texts):
        others = [question(n, t) for n, t in enumerate(texts, start=10) if n != number + 10]
        assert not find_overlap([question(0, text)], {"e": others})


def test_overlap_is_refused_unless_allowed(caplog):
    train = [question(1, "A?"), question(2, "B?"), question(3, "C?")]
    evaluation = {
        "gsm8k": [question(10, "b ?")],
        "math500": [question(3, "other"), question(11, "b?"), question(12, "C")],
        "x": [],
    }
    with pytest.raises(UserError) as caught:
        check_overlap(train, evaluation)
    assert "1 with gsm8k, 2 with math500 (first: q-2 is q-10)" in str(caught.value)
    pairs = check_overlap(train, evaluation, allow=True)
    assert len(pairs) == 3 and "allowed" in caplog.text
    assert [q.id for q in without_overlap(train, pairs)] == ["q-1"]
    assert check_overlap([question(9, "D?")], evaluation) == []
