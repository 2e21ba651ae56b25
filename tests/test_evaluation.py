"""Figures of an evaluation that records alone decide: majority votes, stated answers, revision words, top tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_method import CONFIG, EOS, LAYOUT, MODEL, ROLLOUTS, ROWS, as_float64, student_and_teacher
from test_methods import domain, exact_logp

from sdzero_jax import evaluate
from sdzero_jax.analysis.token_scores import top_alternatives
from sdzero_jax.evaluate import evaluation_metrics
from sdzero_jax.examples import Question
from sdzero_jax.problems import RealProblems, TaskProblems
from sdzero_jax.prompts import revision_words
from sdzero_jax.tasks import TaskConfig, make_task


def record(question, answer, reward, index=0):
    return {
        "question_id": question, "answer": answer, "reward": reward, "sample_index": index,
        "response": "Wait, 1", "tokens": 3, "finish": "stop",
    }  # fmt: skip


def test_majority_counts_questions_whose_commonest_answer_is_right():
    votes = [("a", "1", 1.0), ("a", "2", 0.0), ("a", "1", 1.0)]  # right
    votes += [("b", "3", 0.0), ("b", "3", 0.0), ("b", "4", 1.0)]  # outvoted
    votes += [("c", None, 0.0), ("c", None, 0.0), ("c", "7", 1.0)]  # one vote is enough when no other is given
    metrics = evaluation_metrics([record(*vote) for vote in votes], 3)
    assert metrics["maj@3"] == pytest.approx(2 / 3)
    assert metrics["avg@3"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert metrics["revision_words"] == 1.0
    bare = [{name: value for name, value in record(*vote).items() if name != "answer"} for vote in votes]
    assert evaluation_metrics(bare, 3)["maj@3"] is None
    programs = [record("a", None, 1.0), record("a", None, 0.0)]  # are not put to a vote
    assert evaluation_metrics(programs, 2)["maj@2"] is None


def test_answers_of_the_embedded_task_and_of_mathematics():
    task = TaskProblems(make_task(TaskConfig()))
    question = task.questions("test", 1)[0]
    solution = task.demonstration(question)
    assert task.stated(question, solution) == solution[-1] == task.answer(question)[-1]
    assert task.stated(question, "7*9=3#4<wrong>7*9=3#3<eos>") == "3"
    assert task.stated(question, "7*9") in (None, "7*9") and task.stated(question, "#") is None
    math, code = (Question("q", "", (r"\frac{1}{2}",), kind) for kind in ("math", "code"))
    stated = functools.partial(RealProblems.stated, None)
    assert stated(math, r"so \boxed{0.5}") == stated(math, r"<think>\boxed{3}</think> \boxed{\frac12}") == "1/2"
    assert stated(math, "no box") is None and stated(code, r"\boxed{1}") is None
    assert RealProblems.answer(None, math) == r"The answer is \boxed{\frac{1}{2}}."


def test_stated_answers_are_recorded_where_a_domain_has_them():
    with_answers = dataclasses.replace(domain(), stated=lambda question, text: f"{question.id}:{text}")
    assert evaluate._stated(with_answers, ROLLOUTS[0]) == {"answer": "q:efg"}
    assert evaluate._stated(domain(), ROLLOUTS[0]) == {}


def test_words_of_revision():
    assert revision_words("Wait, that is wrong. Let me recompute; however, I must not wait: waiting is fine.") == 5
    assert revision_words("3*4=2#2<wrong>3*4=2#2") == 1
    assert revision_words("") == 0


def test_alternatives_are_the_likeliest_tokens_of_both_sides():
    student, teacher = student_and_teacher()
    phrases = {1.0: (28,), 0.0: (26, 27)}
    rollouts = ROLLOUTS[:3]
    tops = top_alternatives(MODEL, student, teacher, rollouts, domain(), LAYOUT, batch_size=2, count=2)
    assert len(tops) == 3  # in batches of two
    for found, source, (context, _, response) in zip(tops, rollouts, ROWS):
        first = response[:-1] if response[-1] == EOS else response
        revised = [*source.prompt_ids, *first, *phrases[source.verdict.reward]]
        for side, params, before in (("student", student, context), ("teacher", teacher, revised)):
            with jax.enable_x64(True):
                wanted = np.exp(np.asarray(exact_logp(as_float64(params), before, response)))
            assert len(found[f"top_{side}"]) == len(response)
            for pairs, row in zip(found[f"top_{side}"], wanted):
                best = np.argsort(-row)[:2]
                assert [p for _, p in pairs] == pytest.approx(row[best], abs=1e-4)
                assert [t for t, _ in pairs] == [domain().tokenizer.decode([int(i)]) or "<eos>" for i in best]
    assert CONFIG.vocab_size == 37
