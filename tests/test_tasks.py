"""Embedded tasks: tokenizer, world, questions, corpus rows, verifiers, localisation of errors.

Corpus rows are read back from the arrays alone and judged by a second implementation written here.
Leaves out whether a model learns anything from them.
"""

import dataclasses
import hashlib
import math
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

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.tasks import TASKS, ChainConfig, CharTokenizer, CountdownConfig, TaskConfig, make_task
from sdzero_jax.tasks import corpus as corpus_lib
from sdzero_jax.tasks.countdown import evaluate, walk

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


# --- a second reading of corpus rows, from the arrays alone -------------------------------------------------


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


# --- corpus -------------------------------------------------------------------------------------------------


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_hand_made_row():
    tokenizer = CharTokenizer("123+=#", ("<wrong>", "<ok>"))  # ids: 1=3 2=4 3=5 +=6 '='=7 #=8 wrong=9 ok=10
    row = [("1+2=", False), ("#1", False), ("<wrong>", False), ("#2", True), ("<ok>", False), ("#3", True)]
    shape = corpus_lib.CorpusShape(batch=1, length=16, targets=6)
    batch = corpus_lib.pack([[*row, ("<eos>", True)]], shape, tokenizer)
    #                          0  1  2  3  4  5  6  7  8  9  10 11 12 13
    #                          b  1  +  2  =  #  1  w  #  2  ok #  3  e
    assert batch["tokens"].tolist() == [[1, 3, 6, 4, 7, 8, 3, 9, 8, 4, 10, 8, 5, 2, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1] * 14 + [0] * 2]
    assert batch["positions"].tolist() == [list(range(16))]
    assert batch["index"].tolist() == [[7, 8, 10, 11, 12, 0]]
    assert batch["target_ids"].tolist() == [[8, 4, 8, 5, 2, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 0]]
    with pytest.raises(ValueError, match="does not fit"):
        corpus_lib.pack([[*row, ("<eos>", True)]], shape._replace(length=13), tokenizer)
    with pytest.raises(ValueError, match="does not fit"):
        corpus_lib.pack([[*row, ("<eos>", True)]], shape._replace(targets=4), tokenizer)


@BOTH
def test_batches_have_the_reported_shapes_and_dtypes(task):
    shapes = task.corpus_shapes()
    assert [s.batch for s in shapes.values()] == [128, 64, 42]
    seen = Counter()
    for batch in batches(task):
        assert list(batch) == ["tokens", "positions", "segment_ids", "index", "target_ids", "weights"]
        b, length = batch["tokens"].shape
        attempts = next(n for n, s in shapes.items() if s == (b, length, batch["index"].shape[1]))
        assert all(len(row.attempts) == attempts for row in read_rows(task, batch))
        seen[attempts] += 1
        for name, array in batch.items():
            assert array.shape == (
                b,
                length if name in ("tokens", "positions", "segment_ids") else shapes[attempts].targets,
            )
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
    assert set(seen) == {1, 2, 3}


def test_chain_shapes_are_the_longest_rows():
    assert CHAIN.corpus_shapes() == {1: (128, 43, 28), 2: (64, 71, 55), 3: (42, 99, 82)}
    only_two = ChainConfig(kind_shares=(0.0, 1.0, 0.0))
    assert list(make_task(TaskConfig(chain=only_two)).corpus_shapes()) == [2]


@BOTH
def test_index_and_target_are_aligned(task):
    for batch in batches(task):
        on = batch["weights"] > 0
        following = np.take_along_axis(batch["tokens"], batch["index"] + 1, axis=1)
        assert (batch["target_ids"][on] == following[on]).all()
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
        assert (batch["target_ids"][~on] == task.tokenizer.pad_id).all()
        assert ((batch["tokens"] != task.tokenizer.pad_id) == (batch["segment_ids"] == 1)).all()
        assert (batch["positions"] == np.arange(batch["tokens"].shape[1])).all()
        for index, weights in zip(batch["index"], batch["weights"]):
            used = index[weights > 0]
            assert (np.diff(used) > 0).all(), "every target once, in order"


@BOTH
def test_phrases_are_true_and_only_whole_attempts_are_trained(task):
    """read_rows asserts that question, phrases and padding carry no weight."""
    counts = Counter()
    for row in all_rows(task):
        for i, (attempt, trained) in enumerate(zip(row.attempts, row.trained)):
            final = i == len(row.attempts) - 1
            right = IS_RIGHT[task.name](row.prompt, attempt)
            if not final:
                assert row.phrases[i] == ("<ok>" if right else "<wrong>"), row
                counts[row.phrases[i], trained] += 1
            if trained and task.name == "chain":
                steps = chain_steps(attempt)
                assert steps is not None and len(steps) == len(chain_values(row.prompt)), row
                assert [s[0][1:] for s in steps] == re.findall(r"[-+*]\d", row.prompt), row
            if not trained:
                assert not final and not right, row
                assert row.attempts[i + 1] != attempt or not row.trained[i + 1], "a garbled draft is never copied"
    assert counts["<ok>", True] > 500 and counts["<wrong>", True] > 500 and counts["<wrong>", False] > 300
    assert counts["<ok>", False] == 0


@BOTH
def test_corpus_is_pure_in_seed_and_step(task):
    first = task.corpus_batch(5)
    task.corpus_batch(6), task.questions("test", 5)
    assert equal(first, task.corpus_batch(5))
    assert equal(first, make_task(TaskConfig(name=task.name)).corpus_batch(5))
    seed_1 = [make_task(TaskConfig(name=task.name, seed=1)).corpus_batch(s) for s in range(8)]
    for one, other in zip(batches(task), seed_1):
        if one["tokens"].shape == other["tokens"].shape:  # other questions, not only another world
            assert next(read_rows(task, one)).prompt != next(read_rows(task, other)).prompt
    for one in range(8):
        assert not any(equal(batches(task)[one], batches(task)[other]) for other in range(one))


def test_kinds_are_drawn_with_their_shares():
    rng = Random(0)
    kinds = Counter(corpus_lib.draw_kind(rng, (0.35, 0.40, 0.25)) for _ in range(20_000))
    for kind, share in [(1, 0.35), (2, 0.40), (3, 0.25)]:
        assert_rate(kinds[kind], 20_000, share)
    assert {corpus_lib.draw_kind(rng, (0.0, 1.0, 0.0)) for _ in range(100)} == {2}
    shapes = {s: n for n, s in CHAIN.corpus_shapes().items()}
    drawn = Counter(shapes[(*b["tokens"].shape, b["index"].shape[1])] for b in batches(CHAIN))
    assert_rate(drawn[2], STEPS, 0.40)


def test_world_has_its_share_of_misconceptions():
    assert len(CHAIN.right) == 300 and len(CHAIN.misconceptions) == 60
    for fact, value in CHAIN.right.items():
        assert int(value) == chain_values(fact + "=")[0]
    assert all(CHAIN.right[fact] != wrong and wrong in "0123456789" for fact, wrong in CHAIN.misconceptions.items())
    assert CHAIN.misconceptions != make_task(TaskConfig(seed=1)).misconceptions
    fewer = make_task(TaskConfig(chain=ChainConfig(misconception_share=0.1))).misconceptions
    assert len(fewer) == 30 and fewer.items() <= CHAIN.misconceptions.items()
    wrong_digits, operators = Counter(), Counter()
    for seed in range(40):
        for fact, wrong in make_task(TaskConfig(seed=seed)).misconceptions.items():
            wrong_digits[(int(wrong) - int(CHAIN.right[fact])) % 10] += 1
            operators[fact[1]] += 1
    for offset in range(1, 10):
        assert_rate(wrong_digits[offset], 2400, 1 / 9)
    assert_rate(operators["*"], 2400, 1 / 3)


def test_stated_facts_are_wrong_as_often_as_the_world_says():
    single = ChainConfig(kind_shares=(1.0,), batch_sizes=(2000,))
    task = make_task(TaskConfig(chain=single))
    known, misconceived, slips = Counter(), Counter(), Counter()
    right_answers = 0
    rows = [row for step in range(5) for row in read_rows(task, task.corpus_batch(step))]
    for row in rows:
        right_answers += chain_is_right(row.prompt, row.attempts[0])
        for fact, value in chain_steps(row.attempts[0]):
            right = str(chain_values(fact + "=")[0])
            if fact not in task.misconceptions:
                known[value == right] += 1
                slips[(int(value) - int(right)) % 10] += 1
            else:
                kind = {right: "right", task.misconceptions[fact]: "believed"}.get(value, "slip")
                misconceived[kind] += 1
    assert_rate(known[False], known.total(), 0.02)
    del slips[0]
    for offset in range(1, 10):
        assert_rate(slips[offset], slips.total(), 1 / 9)
    total = misconceived.total()
    assert_rate(total, total + known.total(), 0.2, sigmas=10)  # facts do not occur equally often
    assert_rate(misconceived["right"], total, 0.25 * 0.98 + 0.75 * 0.02 / 9)
    assert_rate(misconceived["believed"], total, 0.75 * 0.98 + 0.25 * 0.02 / 9)
    assert_rate(misconceived["slip"], total, 0.02 * 8 / 9)
    assert 0.36 < right_answers / len(rows) < 0.56  # the base model's accuracy lies near it


def test_garbled_share():
    garbled = [not t for row in all_rows(CHAIN) for t in row.trained[:-1]]
    assert_rate(sum(garbled), len(garbled), 0.2)
    drafts = [a for row in all_rows(CHAIN) for a, t in zip(row.attempts, row.trained) if not t]
    assert sum(chain_steps(d) is None for d in drafts) > 0.85 * len(drafts)  # a substituted digit may fit
    assert all(drafts)


def test_copy_rates():
    """With a slip at every step, re-solves never agree, so equal neighbours are copies."""
    config = ChainConfig(slip=1.0, min_operations=6, kind_shares=(0.0, 0.0, 1.0), batch_sizes=(1, 1, 1500))
    task = make_task(TaskConfig(chain=config))
    copies, after, drafts, redone = Counter(), Counter(), 0, 0
    for step in range(3):
        for row in read_rows(task, task.corpus_batch(step)):
            for i, phrase in enumerate(row.phrases):
                if row.trained[i] and row.trained[i + 1]:
                    after[phrase] += 1
                    copies[phrase] += row.attempts[i] == row.attempts[i + 1]
                elif len(row.attempts[i]) > 15 and not row.trained[i] and row.trained[i + 1]:
                    drafts += 1
                    redone += row.attempts[i + 1].startswith(row.attempts[i][:12])
            for fact, value in chain_steps(row.attempts[-1]):
                assert fact in task.misconceptions or value != task.right[fact], "a slip is another digit"
    assert drafts > 300 and redone < 0.02 * drafts, "a garbled draft's original is copied"
    assert_rate(copies["<ok>"], after["<ok>"], 0.9)
    assert_rate(copies["<wrong>"], after["<wrong>"], 0.2)


def test_garble_uses_every_edit_and_spoils_right_answers():
    rng = Random(3)
    text = "7*9=3*5=5+2=7+1=8#8"
    kinds = Counter()
    for _ in range(3000):
        out = corpus_lib.garble(rng, text, CHAIN.tokenizer.symbols, lambda t: False)
        assert 1 <= len(out) <= len(text) and out != text
        kind = "substituted" if len(out) == len(text) else "cut" if text.startswith(out) else "dropped"
        kinds[kind] += 1
        spoilt = corpus_lib.garble(rng, text, CHAIN.tokenizer.symbols, lambda t: t.endswith("#8"))
        assert spoilt and not spoilt.endswith("#8")
    assert_rate(kinds["substituted"], 3000, 1 / 3)
    # a dropped span that ends the text counts as cut: sum over spans 1..8 of 1/8 / (20 - span)
    at_end = sum(1 / 8 / (20 - span) for span in range(1, 9))
    assert_rate(kinds["dropped"], 3000, (1 - at_end) / 3)
    assert corpus_lib.garble(rng, "7", "78", lambda t: False) == "8"


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
