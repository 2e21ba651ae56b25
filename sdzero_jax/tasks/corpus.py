"""What synthetic tasks share: disjoint question splits, multi-attempt corpus rows, static batches.

A corpus row is `bos x y1 [P y2 [P y3]] eos`, where P is true of the attempt before it. Every draw
uses only `random.Random.random()`, whose sequence Python guarantees, so that worlds, questions and
batches are the same on every version and machine. Leaves out what an attempt looks like: a task
hands in `draw`, `solve` and `verify`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Annotated, Literal, NamedTuple

import numpy as np

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.prompts import PHRASES
from sdzero_jax.tasks.char_tokenizer import EOS, CharTokenizer

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PHRASE = PHRASES["embedded"]

Draw = Callable[[Random], Question]
Solve = Callable[[Random, Question], str]
Verify = Callable[[Question, str], Verdict]
Piece = tuple[str, bool]  # text, whether its tokens are training targets


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """How corpus rows and batches are made; a task's own config inherits these fields."""

    kind_shares: Annotated[tuple[float, ...], "share of batches whose rows hold 1, 2, 3, ... attempts"] = (
        0.35,
        0.40,
        0.25,
    )
    batch_sizes: Annotated[tuple[int, ...], "rows of a batch of each kind"] = (128, 64, 42)
    copy_after_ok: Annotated[float, "probability that an attempt copies a right one before it"] = 0.9
    copy_after_wrong: Annotated[float, "probability that an attempt copies a wrong one before it"] = 0.2
    garbled_share: Annotated[float, "share of the attempts before the last that are garbled drafts"] = 0.2


class CorpusShape(NamedTuple):
    """Static shape of one kind of corpus batch: tokens [batch, length], index [batch, targets]."""

    batch: int
    length: int
    targets: int


def check_shares(config: CorpusConfig, *names: str) -> None:
    """Refuses probabilities outside [0, 1] and kinds that do not fit together.

    Args:
      names: the probability fields of the task's own config, checked besides those of CorpusConfig.
    Raises: UserError.
    """
    for name in ("copy_after_ok", "copy_after_wrong", "garbled_share", *names):
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"task setting {name}={value!r} is no probability; wanted a number from 0 to 1")
    shares, sizes = config.kind_shares, config.batch_sizes
    if len(shares) != len(sizes):
        raise UserError(f"task settings kind_shares={shares} and batch_sizes={sizes}; wanted equally many")
    if min(shares, default=-1) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"task setting kind_shares={shares}; wanted shares >= 0 that sum to 1")
    if min(sizes) < 1:
        raise UserError(f"task setting batch_sizes={sizes}; wanted at least 1 each")


def below(rng: Random, n: int) -> int:
    """A uniform integer in [0, n), by the one method whose sequence Python guarantees."""
    return int(rng.random() * n)


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, by a hash of its text: 80% train, 10% validation, 10% test."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    return {0: "test", 1: "validation"}.get(int.from_bytes(bucket, "big") % 10, "train")


def draw_questions(name: str, seed: int, split: Split, count: int, draw: Draw) -> list[Question]:
    """`count` distinct questions of a split: the start of one endless sequence keyed by (name, seed, split).

    Raises: UserError for an unknown split, a negative count, or more questions than the split seems to hold.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{nearest(str(split), SPLITS)}")
    if count < 0:
        raise UserError(f"question count {count} is negative; wanted 0 or more")
    rng = Random(f"{name}/{seed}/questions/{split}")
    questions: list[Question] = []
    seen: set[str] = set()
    misses = 0
    while len(questions) < count:
        question = draw(rng)
        if question.prompt in seen or split_of(question.prompt) != split:
            misses += 1
            if misses > 20_000:
                raise UserError(f"{count} {split} questions of {name} asked for, it has only {len(seen)}")
            continue
        misses = 0
        seen.add(question.prompt)
        questions.append(dataclasses.replace(question, id=f"{name}-{split}-{len(questions):06d}"))
    return questions


def answer_of(solution: str) -> str:
    """The end of a solution that writes `#` before its answer, from there on."""
    return "#" + solution.rpartition("#")[2]


def stated_in(response: str) -> str | None:
    """What stands after the last `#`, up to an end token or phrase; None where that is nothing."""
    return response.rpartition("#")[2].partition("<")[0].strip() or None


def garble(rng: Random, text: str, symbols: str, is_right: Callable[[str], bool]) -> str:
    """A spoilt copy of `text`: tokens substituted, a span dropped, or the end cut off.

    Repeated until the answer is not right, so that the phrase <wrong> is true of the draft.
    """
    while True:
        edit = below(rng, 3) if len(text) > 1 else 0
        if edit == 0:
            characters = list(text)
            # Distinct places, or a second substitution could undo the first.
            for at in sorted({below(rng, len(text)) for _ in range(1 + below(rng, 4))}):
                others = symbols.replace(characters[at], "")
                characters[at] = others[below(rng, len(others))]
            text = "".join(characters)
        elif edit == 1:
            span = 1 + below(rng, min(8, len(text) - 1))
            start = below(rng, len(text) - span + 1)
            text = text[:start] + text[start + span :]
        else:
            text = text[: 1 + below(rng, len(text) - 1)]
        if not is_right(text):
            return text


def draw_row(
    rng: Random,
    config: CorpusConfig,
    question: Question,
    attempts: int,
    symbols: str,
    solve: Solve,
    verify: Verify,
) -> list[Piece]:
    """The pieces x, y1, P, y2, ..., eos of one corpus row; prompt, phrases, garbled drafts are not trained.

    A right attempt is copied with probability copy_after_ok, a wrong one with copy_after_wrong, else the
    question is solved anew; after a garbled draft it always is, for there is nothing sound to copy.
    """

    def is_right(text: str) -> bool:
        return verify(question, text).reward == 1.0

    pieces = [(question.prompt, False)]
    text = solve(rng, question)
    for _ in range(attempts - 1):
        garbled = rng.random() < config.garbled_share
        if garbled:
            pieces.append((garble(rng, text, symbols, is_right), False))
            right = False
        else:
            pieces.append((text, True))
            right = is_right(text)
        pieces.append((PHRASE.text(float(right)), False))
        copy = config.copy_after_ok if right else config.copy_after_wrong
        if garbled or rng.random() >= copy:
            text = solve(rng, question)
    return [*pieces, (text, True), (EOS, True)]


def corpus_shapes(config: CorpusConfig, prompt_tokens: int, attempt_tokens: int) -> dict[int, CorpusShape]:
    """Number of attempts -> static shape, for every kind that is ever drawn.

    Args:
      prompt_tokens: longest prompt, without bos; attempt_tokens: longest attempt, without eos.
    """
    shapes = {}
    for attempts, (share, batch) in enumerate(zip(config.kind_shares, config.batch_sizes), start=1):
        if share > 0:
            targets = attempts * attempt_tokens + 1  # every attempt trained, and eos
            shapes[attempts] = CorpusShape(batch, 1 + prompt_tokens + targets + attempts - 1, targets)
    return shapes


def draw_kind(rng: Random, shares: Sequence[float]) -> int:
    """Number of attempts of a batch, drawn with `shares`; a kind of share 0 is never drawn."""
    u = rng.random()
    kinds = [(attempts, share) for attempts, share in enumerate(shares, start=1) if share > 0]
    for attempts, share in kinds:
        u -= share
        if u < 0:
            return attempts
    return kinds[-1][0]  # the shares summed to a hair less than 1


def draw_train_question(rng: Random, draw: Draw) -> Question:
    """A question of the train split: validation and test questions never enter the corpus."""
    while True:
        question = draw(rng)
        if split_of(question.prompt) == "train":
            return question


def corpus_batch(
    key: str,
    config: CorpusConfig,
    shapes: dict[int, CorpusShape],
    tokenizer: CharTokenizer,
    draw: Draw,
    solve: Solve,
    verify: Verify,
) -> dict[str, np.ndarray]:
    """One base-model training batch, a pure function of `key` (and of what the task hands in)."""
    rng = Random(key)
    attempts = draw_kind(rng, config.kind_shares)
    shape = shapes[attempts]
    rows = [
        draw_row(rng, config, draw_train_question(rng, draw), attempts, tokenizer.symbols, solve, verify)
        for _ in range(shape.batch)
    ]
    return pack(rows, shape, tokenizer)


def pack(rows: Sequence[Sequence[Piece]], shape: CorpusShape, tokenizer: CharTokenizer) -> dict[str, np.ndarray]:
    """Pads rows of pieces (without bos) to static arrays; the output at `index` predicts `target_ids`.

    Returns: tokens, positions, segment_ids (0 padding, 1 text) [B, L] int32; index, target_ids [B, R]
    int32; weights [B, R] float32, 1 for a target and 0 for padding.
    Raises: ValueError when a row is longer than the shape allows.
    """
    tokens, index, row_lengths, row_targets = [], [], [], []
    for row in rows:
        ids, predicts = [tokenizer.bos_id], []
        for text, trained in row:
            piece = tokenizer.encode(text)
            if trained:
                predicts.extend(range(len(ids) - 1, len(ids) + len(piece) - 1))
            ids += piece
        if len(ids) > shape.length or len(predicts) > shape.targets:
            raise ValueError(f"row of {len(ids)} tokens and {len(predicts)} targets does not fit {shape}")
        row_lengths.append(len(ids))
        row_targets.append(len(predicts))
        tokens.append(ids + [tokenizer.pad_id] * (shape.length - len(ids)))
        index.append(predicts + [0] * (shape.targets - len(predicts)))
    tokens = np.array(tokens, np.int32)  # [B, L]
    index = np.array(index, np.int32)  # [B, R]
    is_text = np.arange(shape.length) < np.array(row_lengths)[:, None]  # [B, L]
    is_target = np.arange(shape.targets) < np.array(row_targets)[:, None]  # [B, R]
    target_ids = np.take_along_axis(tokens, index + 1, axis=1)  # [B, R]
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(shape.length, dtype=np.int32), (len(rows), 1)),
        "segment_ids": is_text.astype(np.int32),
        "index": index,
        "target_ids": np.where(is_target, target_ids, tokenizer.pad_id).astype(np.int32),
        "weights": is_target.astype(np.float32),
    }
