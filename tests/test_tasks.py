"""Embedded tasks: tokenizer, world, questions, verifiers, localisation of errors."""

import dataclasses
import hashlib
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from random import Random
from typing import get_type_hints

import numpy as np
import pytest
from second_reading import (
    BOTH,
    CHAIN,
    COUNTDOWN,
    IS_RIGHT,
    all_rows,
    assert_rate,
    chain_steps,
    chain_values,
    countdown_is_right,
    equal,
)

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.tasks import TASKS, ChainConfig, CharTokenizer, CountdownConfig, TaskConfig, make_task
from sdzero_jax.tasks import corpus as corpus_lib
from sdzero_jax.tasks.countdown import evaluate, walk

# --- tokenizer ----------------------------------------------------------------------------------------------


def test_tokenizer_by_hand():
    tokenizer = CharTokenizer("01=", ("<ok>", "<okay>"))
    assert tokenizer.tokens == ("<pad>", "<bos>", "<eos>", "0", "1", "=", "<ok>", "<okay>")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_id, tokenizer.stop_ids) == (8, 0, 2, (2,))
    assert tokenizer.encode("10=") == [4, 3, 5]
    assert tokenizer.encode("1<okay>0<ok><eos><pad>") == [4, 7, 3, 6, 2, 0]
    assert tokenizer.encode("") == []
    assert tokenizer.encode_prompt("1=") == [1, 4, 5]
    assert tokenizer.decode([1, 4, 6, 5, 2, 0, 0]) == "<bos>1<ok>="
    assert tokenizer.decode(np.array([4, 2], np.int32)) == "1"
    assert tokenizer.decode([4, 2, 3]) == "1<eos>0"
    assert tokenizer.decode([0, 0]) == ""
    assert tokenizer.plain_prefix([4, 3, 6, 5]) == "10"


@pytest.mark.parametrize("text", ["2", "1x", "<", "<o", "1<OK>", "١", "1 ", "1<ok", "\n"])
def test_tokenizer_refuses_unknown_text(text):
    with pytest.raises(ValueError, match="not in the vocabulary"):
        CharTokenizer("01=", ("<ok>",)).encode(text)


@pytest.mark.parametrize("bad", [-1, 7])
def test_tokenizer_refuses_unknown_ids(bad):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        CharTokenizer("01=", ("<ok>",)).decode([3, bad, 3])


def test_tokenizer_refuses_bad_vocabularies():
    for symbols, specials in [
        ("00", ()),
        ("0<", ()),
        ("0", ("ok",)),
        ("0", ("<ok>", "<ok>")),
        ("0", ("<eos>",)),
    ]:
        with pytest.raises(ValueError):
            CharTokenizer(symbols, specials)


def test_fingerprint_tells_vocabularies_apart():
    prints = {CharTokenizer(*args).fingerprint() for args in [("01",), ("10",), ("01", ("<ok>",)), ("01=",)]}
    assert len(prints) == 4
    assert CharTokenizer("01").fingerprint() == CharTokenizer("01").fingerprint()
    assert all(re.fullmatch("[0-9a-f]{64}", p) for p in prints)


def test_chain_vocabulary_has_20_tokens():
    assert CHAIN.tokenizer.vocab_size == 20
    assert set(CHAIN.tokenizer.tokens) == {"<pad>", "<bos>", "<eos>", "<wrong>", "<ok>", *"0123456789+-*=#"}


@BOTH
def test_tokenizer_round_trip(task):
    for row in all_rows(task, 4):
        text = row.prompt + "".join(a + p for a, p in zip(row.attempts, [*row.phrases, ""]))
        assert task.tokenizer.decode(task.tokenizer.encode(text)) == text


# --- registry and config ------------------------------------------------------------------------------------


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="unknown task 'chian'; did you mean 'chain'"):
        make_task(TaskConfig(name="chian"))
    assert set(TASKS) == {"chain", "countdown"}


@pytest.mark.parametrize("config", [TaskConfig, ChainConfig, CountdownConfig])
def test_every_setting_is_explained(config):
    for field, hint in get_type_hints(config, include_extras=True).items():
        assert len(getattr(hint, "__metadata__", ("",))[0]) > 10, field
    assert hash(config()) == hash(config())


@pytest.mark.parametrize(
    "change",
    [
        {"slip": 1.5},
        {"garbled_share": -0.1},
        {"copy_after_ok": 2},
        {"min_operations": 0},
        {"min_operations": 7},
        {"operators": "+/"},
        {"operators": ""},
        {"operators": "++"},
        {"kind_shares": (0.5, 0.5)},
        {"kind_shares": (0.5, 0.4, 0.0)},
        {"batch_sizes": (128, 0, 42)},
    ],
)
def test_bad_chain_settings_are_refused_in_one_line(change):
    with pytest.raises(UserError) as error:
        make_task(TaskConfig(chain=ChainConfig(**change)))
    assert "\n" not in str(error.value) and next(iter(change)) in str(error.value)


@pytest.mark.parametrize("change", [{"numbers": 1}, {"largest": 100}, {"right_share": -1}])
def test_bad_countdown_settings_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        make_task(TaskConfig(name="countdown", countdown=CountdownConfig(**change)))


CHAIN_CHANGES = {
    "operators": "+-",
    "min_operations": 5,
    "max_operations": 5,
    "misconception_share": 0.1,
    "right_share": 0.5,
    "slip": 0.1,
    "kind_shares": (0.0, 0.0, 1.0),
    "batch_sizes": (3, 3, 3),
    "copy_after_ok": 0.1,
    "copy_after_wrong": 0.8,
    "garbled_share": 0.6,
}
COUNTDOWN_CHANGES = {"numbers": 2, "largest": 9, "right_share": 0.1}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ChainConfig)])
def test_every_chain_setting_changes_the_corpus(field):
    base = ChainConfig(batch_sizes=(4, 4, 4), kind_shares=(0.0, 0.5, 0.5))
    changed = dataclasses.replace(base, **{field: CHAIN_CHANGES[field]})
    one, other = (make_task(TaskConfig(chain=c)) for c in (base, changed))
    assert any(not equal(one.corpus_batch(s), other.corpus_batch(s)) for s in range(6))


@pytest.mark.parametrize("field", sorted(COUNTDOWN_CHANGES))
def test_every_countdown_setting_changes_the_corpus(field):
    changed = CountdownConfig(**{field: COUNTDOWN_CHANGES[field]})
    other = make_task(TaskConfig(name="countdown", countdown=changed))
    assert not equal(COUNTDOWN.corpus_batch(0), other.corpus_batch(0))


def test_tasks_load_no_jax():
    code = "import sys, sdzero_jax.tasks; print([m for m in sys.modules if m.split('.')[0] in ('jax', 'flax')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- questions ----------------------------------------------------------------------------------------------


def test_the_recorded_world_does_not_change():
    """Worlds, questions and batches are the same on every Python and numpy; a change here is a new world."""
    assert [q.prompt for q in CHAIN.questions("train", 3)] == ["5+1+6*7*3=", "3+0+6+3-9-0=", "5*5-9+5+0-4="]
    digest = hashlib.sha256()
    for step in range(4):
        for name, array in CHAIN.corpus_batch(step).items():
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest()[:16] == "3d612d832b5f2fda"


@BOTH
def test_questions_are_reproducible_and_prefix_stable(task):
    questions = task.questions("train", 60)
    again = make_task(TaskConfig(name=task.name)).questions("train", 60)
    assert questions == again and task.questions("train", 17) == questions[:17]
    assert questions[12].id == f"{task.name}-train-000012"
    assert task.questions("test", 0) == []
    other_seed = make_task(TaskConfig(name=task.name, seed=1)).questions("train", 60)
    assert sum(a.prompt == b.prompt for a, b in zip(questions, other_seed)) <= 1
    assert {q.kind for q in questions} == {task.name}


@BOTH
def test_splits_are_disjoint_also_across_seeds_and_from_the_corpus(task):
    prompts = {s: {q.prompt for q in task.questions(s, 300)} for s in corpus_lib.SPLITS}
    other = make_task(TaskConfig(name=task.name, seed=7))
    assert all(len(p) == 300 for p in prompts.values()), "questions of a split are distinct"
    trained_on = {row.prompt for row in all_rows(task)}
    held_out = prompts["test"] | prompts["validation"]
    assert not prompts["test"] & prompts["validation"]
    assert not held_out & prompts["train"]
    assert not held_out & {q.prompt for q in other.questions("train", 300)}
    assert not held_out & trained_on
    assert {corpus_lib.split_of(p) for p in trained_on} == {"train"}


def test_a_small_world_runs_out_of_questions_with_a_clear_error():
    tiny = make_task(TaskConfig(chain=ChainConfig(operators="+", min_operations=1, max_operations=1)))
    every = {split: tiny.questions(split, n) for split, n in [("train", 50), ("test", 3), ("validation", 3)]}
    assert len({q.prompt for q in every["train"]}) == 50
    with pytest.raises(UserError, match="150 train questions of chain asked for, it has only"):
        tiny.questions("train", 150)


def test_bad_question_requests_are_refused():
    with pytest.raises(UserError, match="unknown split 'tset'; did you mean 'test'"):
        CHAIN.questions("tset", 1)
    with pytest.raises(UserError, match="negative"):
        CHAIN.questions("test", -1)


def test_chain_questions_by_plain_arithmetic():
    questions = CHAIN.questions("train", 1500)
    for question in questions:
        assert re.fullmatch(r"\d([-+*]\d){4,6}=", question.prompt)
        assert question.gold == (str(chain_values(question.prompt)[-1]),)
    lengths = Counter(q.metadata["operations"] for q in questions)
    assert set(lengths) == {4, 5, 6}
    for n in lengths.values():
        assert_rate(n, len(questions), 1 / 3)
    operators = Counter(c for q in questions for c in q.prompt if c in "+-*")
    assert_rate(operators["*"], sum(operators.values()), 1 / 3)


@BOTH
def test_demonstrations_are_right_and_have_no_first_error(task):
    for question in task.questions("validation", 200):
        text = task.demonstration(question)
        assert task.verify(question, text).outcome == "correct"
        assert IS_RIGHT[task.name](question.prompt, text)
        assert task.first_error(question, task.tokenizer.encode(text + "<eos>")) is None
        assert len(text) <= task.max_attempt_tokens and len(question.prompt) <= task.max_prompt_tokens


@BOTH
def test_answers_are_what_stands_after_the_last_mark(task):
    for question in task.questions("validation", 50):
        text = task.demonstration(question)
        answer = task.answer(question)
        assert answer == text[text.index("#") :] and task.verify(question, answer).outcome == "correct"
        for response in (text, text + "<eos>", "#1<wrong>" + text + "<ok>", answer + " "):
            assert "#" + task.stated(response) == answer
    assert task.stated("") is task.stated("7#") is task.stated("7#<eos>") is None
    assert task.stated("7*9=3") == "7*9=3"  # without a mark, all of it


# --- chain verifier and localisation ------------------------------------------------------------------------

EIGHT = Question("q", "7*9*5+2+1=", ("8",), "chain")


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("7*9=3*5=5+2=7+1=8#8", "correct"),
        ("7*9=3*5=5+2=7+1=8#9", "wrong"),
        ("#8", "correct"),
        ("", "unparseable"),
        ("8", "unparseable"),
        ("7*9=3*5=5+2=7+1=8", "unparseable"),
        ("#", "unparseable"),
        ("8#", "unparseable"),
        ("# 8", "unparseable"),
        ("#-8", "unparseable"),
        ("#1#8", "correct"),
        ("#8#1", "wrong"),
        ("#8#", "correct"),  # cut behind the second #
        ("#8<wrong>7*9=3*", "correct"),  # cut in the second attempt: the last complete answer counts
        ("#8<wrong>7*9=3*5=5+2=7+1=8#", "correct"),
        ("#1<wrong>7*9=3#8", "correct"),
        ("#8<ok>7*9=3#1", "wrong"),
        ("#8<wrong>", "correct"),
        ("#8+1", "correct"),
        ("#8\n", "correct"),
        ("#88", "unparseable"),
        ("#18", "unparseable"),
        ("#8#88", "unparseable"),
        ("#08", "unparseable"),
        ("#٨", "unparseable"),  # Arabic-Indic eight
        ("#８", "unparseable"),  # full-width eight
        ("#8٣", "unparseable"),
        ("＃8", "unparseable"),  # full-width number sign
        ("#<ok>8", "unparseable"),
        ("#8\x00", "correct"),
        ("#__import__('os').abort()#8", "correct"),
    ],
)
def test_chain_verifier(response, outcome):
    verdict = CHAIN.verify(EIGHT, response)
    assert verdict.outcome == outcome
    assert verdict.reward == float(outcome == "correct")


@pytest.mark.parametrize("gold", [(), ("",), ("12",), ("x",), ("٨",)])
def test_chain_verifier_without_gold_gives_no_reward(gold):
    verdict = CHAIN.verify(dataclasses.replace(EIGHT, gold=gold), "#8")
    assert (verdict.outcome, verdict.reward) == ("gold_unparseable", None)


@BOTH
def test_verifiers_are_quick_on_very_long_text(task):
    question = task.questions("test", 1)[0]
    million = 1_000_000
    start = time.perf_counter()
    for text in ["#" * million, "#" + "9" * million, "7*9=" * million, "#1" * million, "#" + "(" * million]:
        assert task.verify(question, text).reward == 0.0 or text == "#1" * million
    assert time.perf_counter() - start < 5


def first_error(text, question=EIGHT):
    return CHAIN.first_error(question, CHAIN.tokenizer.encode(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        #      0123456789012345678
        ("7*9=3*5=5+2=7+1=8#8<eos>", None),
        ("7*9=4*5=0+2=2+1=3#3<eos>", 4),
        ("7*9=3*5=6+2=8+1=9#9<eos>", 8),
        ("7*9=3*5=6+2=7+1=8#8<eos>", 8),  # two errors that cancel
        ("7*9=3*5=5+2=7+1=9#9<eos>", 16),
        ("7*9=3*5=5+2=7+1=8#7<eos>", 18),  # every value right, the answer is not
        ("7*9=3*5=6+2=8+1=9#9", 8),  # without an end token
        ("7*9=3*5=6+2=8+1=9#9<wrong>7*9=3*5=5+2=7+1=8#8<eos>", 8),  # the first attempt counts
        ("7*9=3*5=5+2=7+1=8#8<ok>7*9=4*5=0+2=2+1=3#3<eos>", None),
        ("", None),
        ("<eos>", None),
        ("7*9=4*5=0", None),  # cut off
        ("7*9=4*5=0+2=2+1=3#<eos>", None),
        ("7*9=4*5=0+2=2+1=3#33<eos>", None),
        ("7*9=4*5=0+2=2+2=3#3<eos>", None),  # another operand than the question's
        ("8*9=4*5=0+2=2+1=3#3<eos>", None),
        ("7*9=4*5=0-2=2+1=3#3<eos>", None),
        ("7*9==*5=5+2=7+1=8#8<eos>", None),
    ],
)
def test_first_error_by_hand(text, expected):
    assert first_error(text) == expected


def test_first_error_on_corpus_attempts():
    counts = Counter()
    for row in all_rows(CHAIN, 20):
        question = Question("q", row.prompt, (str(chain_values(row.prompt)[-1]),), "chain")
        values = [int(v) for _, v in chain_steps(row.attempts[-1])]
        pairs = zip(values, chain_values(row.prompt))
        step = next((i for i, (said, right) in enumerate(pairs) if said != right), None)
        expected = None if step is None else 4 + 4 * step
        assert first_error(row.attempts[-1] + "<eos>", question) == expected
        counts[expected] += 1
    assert counts[None] > 300 and counts[4] > 100 and counts[20] > 50


# --- countdown ----------------------------------------------------------------------------------------------

FIVE = Question("q", "3,5,7>32=", ("32",), "countdown", {"solution": "5*7=35;35-3=32#(5*7)-3"})


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("5*7=35;35-3=32#(5*7)-3", "correct"),
        ("#5*7-3", "correct"),
        ("#((5)*(7)-(3))", "correct"),
        ("#7*5-3<eos>", "correct"),
        ("#1<wrong>#5*7-3", "correct"),
        ("#5*7-3<ok>3+5=8;", "correct"),
        ("#5*7-3<ok>3+5=8#3+5*7", "wrong"),
        ("#5*(7-3)", "wrong"),
        ("#5*7-3-0", "wrong"),
        ("#32", "wrong"),
        ("#35-3", "wrong"),
        ("#5*7-3*3/3", "wrong"),
        ("#7*5/(3-3)", "wrong"),
        ("5*7-3", "unparseable"),
        ("#", "unparseable"),
        ("#5*7-", "unparseable"),
        ("#(5*7-3", "unparseable"),
        ("#5*7-3)", "unparseable"),
        ("#()", "unparseable"),
        ("#5 * 7 - 3", "unparseable"),
        ("#-3+5*7", "unparseable"),
        ("#5**7-3", "unparseable"),
        ("#5(7)-3", "unparseable"),
        ("#5*7-3=32", "unparseable"),
        ("#5*7-٣", "unparseable"),
        ("#9**9**9**9", "unparseable"),
        ("#__import__('os')", "unparseable"),
        ("#" + "(" * 5000 + "5*7-3" + ")" * 5000, "unparseable"),
        ("#" + "(" * 47 + "5*7-3" + ")" * 47, "correct"),
        ("#" + "9" * 10_000, "unparseable"),
    ],
)
def test_countdown_verifier(response, outcome):
    assert COUNTDOWN.verify(FIVE, response).outcome == outcome


def test_countdown_parser_agrees_with_python():
    rng = Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(int(rng.random() * 12))
        text = expression(depth - 1) + "+-*/"[int(rng.random() * 4)] + expression(depth - 1)
        return f"({text})" if rng.random() < 0.5 else text

    compared = 0
    for _ in range(400):
        text = expression(3)
        try:
            expected = eval(re.sub(r"\d+", r"F(\g<0>)", text), {"F": Fraction})
        except ZeroDivisionError:
            with pytest.raises(ZeroDivisionError):
                evaluate(text)
            continue
        assert evaluate(text) == (expected, [int(n) for n in re.findall(r"\d+", text)])
        compared += 1
    assert compared > 200


def test_countdown_walks_state_true_steps():
    rng = Random(1)
    for numbers in [[3, 5, 7], [2, 2], [1, 4, 6, 20]]:
        for _ in range(200):
            value, text = walk(rng, numbers)
            working, answer = text.split("#")
            for a, sign, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", working):
                assert eval(f"{a}{sign}{b}") == int(c)
            assert evaluate(answer)[0] == value and sorted(evaluate(answer)[1]) == numbers


def test_countdown_base_solves_its_share():
    finals = [countdown_is_right(row.prompt, row.attempts[0]) for row in all_rows(COUNTDOWN) if len(row.attempts) == 1]
    assert 0.48 < sum(finals) / len(finals) < 0.62  # right_share, and some lucky walks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        #      0123456789012345678901
        ("5*7=35;35-3=32#(5*7)-3<eos>", None),
        ("5*7=36;36-3=33#(5*7)-3<eos>", 5),  # the first wrong digit of 36
        ("5*7=45;45-3=42#(5*7)-3<eos>", 4),
        ("5*7=3;3-3=0#(5*7)-3<eos>", 4),  # too short: its last digit
        ("5*7=35;35-3=31#(5*7)-3<eos>", 13),
        ("3+5=8;8*7=56#(3+5)*7<eos>", 10),  # true steps to another value than the target
        ("3+5=8;8*7=56#(3+5)*7<wrong>5*7=35;35-3=32#(5*7)-3", 10),
        ("3/5=0;0+7=32#3/5+7", 4),
        ("5*7=35;35-3=32", None),
        ("5*7=35;35-3=32#(5*7", None),
        ("5*8=40;40-3=37#(5*8)-3", None),  # a number it does not have
        ("5*5=25;25+7=32#5*5+7", None),
        ("5/0=1;1+7=8#5+7", None),
        ("", None),
    ],
)
def test_countdown_first_error_by_hand(text, expected):
    assert COUNTDOWN.first_error(FIVE, COUNTDOWN.tokenizer.encode(text)) == expected
