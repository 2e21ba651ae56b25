"""The embedded tasks' corpora: shapes, masks, kinds, misconceptions and slips, by a second reading of their rows."""

import re
from collections import Counter
from random import Random

import numpy as np
import pytest
from second_reading import (
    BOTH,
    CHAIN,
    IS_RIGHT,
    STEPS,
    all_rows,
    assert_rate,
    batches,
    chain_is_right,
    chain_steps,
    chain_values,
    equal,
    read_rows,
)

from sdzero_jax.tasks import ChainConfig, CharTokenizer, TaskConfig, make_task
from sdzero_jax.tasks import corpus as corpus_lib


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
