"""Methods: objectives against float64, advantages and masks by hand, sources, replay, ledger, budgets."""

import dataclasses
import functools
import json
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from test_method import (
    CONFIG,
    EOS,
    LAYOUT,
    MODEL,
    PHRASES,
    ROLLOUTS,
    ROWS,
    as_float64,
    assert_trees_close,
    phrase_ids,
    rollout,
    student_and_teacher,
)

from sdzero_jax import ledger, masked, objectives, sharding, statistics
from sdzero_jax.batches import distill_batch, reviser_context
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, RevisionTrace, Verdict
from sdzero_jax.methods import METHODS, SRT_STAGES, SrtData, find_method, loss_terms, right_sequences, srt_sequences
from sdzero_jax.objectives import CrossEntropy, PolicyGradient, SelfDistillation, Term
from sdzero_jax.optimizer import OptimizerConfig, make_optimizer
from sdzero_jax.rollouts import Domain, rollouts_from_json, rollouts_to_json
from sdzero_jax.sources import (
    AdvantageConfig,
    Hindsight,
    OnPolicySource,
    ReplayConfig,
    advantages,
    demonstration_context,
)
from sdzero_jax.teacher import TeacherConfig
from sdzero_jax.train_step import in_parts, init_state, make_train_step

ADVANTAGE = np.array([1.5, -0.5, -1.0, 0.0], np.float32)
LOGP_ROLLOUT = -1.0  # of every token, as `rollout` makes them


def batch_of(**settings):
    batch, _ = distill_batch(ROLLOUTS, phrase_ids, [EOS], LAYOUT, **settings)
    return batch | {"advantage": ADVANTAGE}


def exact_logp(params, context, response):
    """`reference.response_logp` of one row, compiled once for its length."""
    ids = jnp.asarray([*context, *response])
    return jax.nn.log_softmax(_exact_logits(params, ids), axis=-1)[len(context) - 1 : len(ids) - 1]


@jax.jit
def _exact_logits(params, ids):
    return reference.qwen3_logits(params, CONFIG, ids)


# ------------------------------------------------------------------------------------- policy gradient


def clipped_by_hand(params, clip_low, clip_high, temperature):
    """-sum_t min(r A, clip(r) A) / tokens, one row at a time in float64."""
    total, count = 0.0, 0
    for (context, _, response), advantage in zip(ROWS, ADVANTAGE):
        logp = jax.nn.log_softmax(reference.response_logp(params, CONFIG, context, response) / temperature, axis=-1)
        for t, token in enumerate(response):
            ratio = jnp.exp(logp[t, token] - LOGP_ROLLOUT)
            cut = jnp.where(ratio < 1 - clip_low, 1 - clip_low, jnp.where(ratio > 1 + clip_high, 1 + clip_high, ratio))
            total = total - jnp.where(ratio * advantage < cut * advantage, ratio * advantage, cut * advantage)
            count += 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_grpo_gradient_equals_the_computation_by_hand(temperature):
    """At the temperature of sampling: the ratio is to what the tokens were drawn from."""
    params, _ = student_and_teacher()
    (term,) = loss_terms(METHODS["grpo"], None, PolicyGradient(clip_low=0.2, clip_high=0.28), None, temperature)
    loss_fn = functools.partial(term.objective, term.config, MODEL)
    other = "logprobs" if temperature != 1.0 else "sampling_logprobs"
    batch = batch_of() | {other: np.full_like(batch_of()[other], -9.0)}
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, None, batch)
    with jax.enable_x64(True):
        hand = functools.partial(clipped_by_hand, clip_low=0.2, clip_high=0.28, temperature=temperature)
        by_hand = jax.jit(jax.value_and_grad(hand))
        wanted, wanted_gradient = by_hand(as_float64(params))
        wanted, wanted_gradient = float(wanted), jax.tree.map(np.asarray, wanted_gradient)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert 0 < float(metrics["clipped"][0]) < float(metrics["clipped"][1])  # the clip must have been tried
    assert_trees_close(gradient, wanted_gradient, 2e-4)


def test_on_policy_the_gradient_is_advantage_times_score():
    """With the rollout's log-probs equal to the student's the ratio is 1: REINFORCE."""
    params, _ = student_and_teacher()
    batch = batch_of()
    logp = jax.jit(lambda p, b: objectives._response_logprob(MODEL, p, b, 1.0))(params, batch)
    batch["logprobs"] = np.asarray(logp)
    loss_fn = functools.partial(objectives.policy_gradient, PolicyGradient(), MODEL)
    gradient = jax.jit(jax.grad(lambda p, b: loss_fn(p, None, b)[0]))(params, batch)

    def score(p, b):
        own = objectives._response_logprob(MODEL, p, b, 1.0)
        return -jnp.sum(own * b["mask"] * b["advantage"][:, None]) / jnp.sum(b["mask"])

    assert_trees_close(gradient, jax.jit(jax.grad(score))(params, batch), 1e-5)


def test_the_kl_to_the_reference_is_k3_and_is_zero_at_the_reference():
    params, other = student_and_teacher()
    loss_fn = lambda config: jax.jit(functools.partial(objectives.policy_gradient, config, MODEL))  # noqa: E731
    batch, config = batch_of(), PolicyGradient(kl_weight=0.5)
    plain = loss_fn(PolicyGradient())(params, None, batch)[0]
    same, _ = loss_fn(config)(params, params, batch)
    assert float(same) == pytest.approx(float(plain), abs=1e-6)
    loss, metrics = loss_fn(config)(params, other, batch)
    with jax.enable_x64(True):
        total, count = 0.0, 0
        for context, _, response in ROWS:
            own = exact_logp(as_float64(params), context, response)
            ref = exact_logp(as_float64(other), context, response)
            for t, token in enumerate(response):
                gap = float(ref[t, token] - own[t, token])
                total, count = total + math.exp(gap) - 1 - gap, count + 1
    assert float(loss - plain) == pytest.approx(0.5 * total / count, rel=1e-4)
    assert float(metrics["reference_k3"][0]) == pytest.approx(total, rel=1e-4)


# -------------------------------------------------------------------------------- guidance, end tokens


def test_guidance_equals_the_contrast_of_both_phrases_in_float64():
    params, teacher = student_and_teacher()
    beta = 0.7
    loss_fn = jax.jit(functools.partial(objectives.self_distillation, SelfDistillation(guidance=beta), MODEL))
    loss, _ = loss_fn(params, teacher, batch_of(opposite=True))
    with jax.enable_x64(True):
        total, count = 0.0, 0
        for (context, revised, response), source in zip(ROWS, ROLLOUTS):
            other = reviser_context(source, phrase_ids(1.0 - source.verdict.reward), [EOS], False)
            s = exact_logp(as_float64(params), context, response)
            l1 = exact_logp(as_float64(teacher), revised, response)
            l0 = exact_logp(as_float64(teacher), other, response)
            target = jax.nn.log_softmax(l1 + beta * (l1 - l0), axis=-1)
            total, count = total + float(jnp.sum(jnp.exp(s) * (s - target))), count + len(response)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)
    plain, _ = jax.jit(functools.partial(objectives.self_distillation, SelfDistillation(), MODEL))(
        params, teacher, batch_of()
    )
    assert abs(float(plain) - total / count) > 0.01  # the contrast must matter


def test_end_tokens_can_be_left_out_of_the_divergence():
    batch = batch_of()
    assert batch["ends"].sum(axis=1).tolist() == [1, 0, 1, 0]  # the second hit the limit, the fourth has no verdict
    mask = objectives.token_mask(SelfDistillation(mask_end=True), batch)
    assert mask.sum(axis=1).tolist() == [3, 7, 1, 0]
    assert objectives.token_mask(PolicyGradient(), batch).sum(axis=1).tolist() == [4, 7, 2, 0]
    params, teacher = student_and_teacher()
    loss_fn = jax.jit(functools.partial(objectives.self_distillation, SelfDistillation(mask_end=True), MODEL))
    loss, _ = loss_fn(params, teacher, batch)
    rows = [(s, t, response) for s, t, response in ROWS]
    with jax.enable_x64(True):
        total, count = 0.0, 0
        for student, revised, response in rows:
            s = exact_logp(as_float64(params), student, response)
            t = exact_logp(as_float64(teacher), revised, response)
            per_token = jnp.sum(jnp.exp(s) * (s - t), axis=-1)
            kept = [i for i, token in enumerate(response) if token != EOS]
            total, count = total + float(sum(per_token[i] for i in kept)), count + len(kept)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


# --------------------------------------------------------------------------------- terms, accumulation


TERMS = (
    Term(0.3, "rollouts", objectives.self_distillation, SelfDistillation(length_mode="seq_mean_token_sum")),
    Term(1.0, "rollouts", objectives.policy_gradient, PolicyGradient()),
    Term(0.5, "replay", objectives.cross_entropy, CrossEntropy()),
)


def replay_batch():
    memory = Hindsight(ReplayConfig(pairs=4, max_length=20), domain(), seed=0)
    memory.remember([answer("a", [7, 8, EOS], 1.0), answer("a", [9, EOS], 0.0), answer("b", [4, 5, 6, EOS], 1.0)])
    return memory.batch(0)


def test_a_method_is_the_weighted_sum_of_its_terms():
    params, teacher = student_and_teacher()
    batches = {"rollouts": batch_of(), "replay": replay_batch()}
    total, _ = jax.jit(functools.partial(objectives.combined, TERMS, MODEL))(params, teacher, batches)
    parts = [
        float(jax.jit(functools.partial(t.objective, t.config, MODEL))(params, teacher, batches[t.batch])[0])
        for t in TERMS
    ]
    assert float(total) == pytest.approx(sum(t.weight * part for t, part in zip(TERMS, parts)), rel=1e-5)


@pytest.mark.slow
def test_micro_batches_give_the_step_of_one_large_batch():
    """Rows carry 4, 7, 2 and 0 tokens: a mean of micro-batch means would be another number."""
    params, teacher = student_and_teacher()
    batches = {"rollouts": batch_of(), "replay": replay_batch()}
    loss_fn = functools.partial(objectives.combined, TERMS, MODEL)
    (whole, metrics), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, teacher, batches)
    parts = in_parts(2, TERMS)(loss_fn)
    (summed, merged), accumulated_gradient = jax.jit(parts)(params, teacher, batches)
    assert float(summed) == pytest.approx(float(whole), rel=1e-5)
    assert_trees_close(accumulated_gradient, gradient, 1e-5)
    for name in ("divergence", "nll", "clipped", "policy_loss", "trained_rows"):
        np.testing.assert_allclose(np.asarray(merged[name]), np.asarray(metrics[name]), rtol=1e-5)
    halves = [jax.tree.map(lambda leaf, i=i: leaf[i::2], batches) for i in range(2)]
    naive = np.mean([float(jax.jit(loss_fn)(params, teacher, half)[0]) for half in halves])
    assert abs(naive - float(whole)) > 1e-3


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_sum"])
def test_micro_batches_of_sequences_give_the_gradient_of_the_batch(mode):
    params, batches = student_and_teacher()[0], {"sequences": replay_batch()}
    terms = (Term(1.0, "sequences", objectives.cross_entropy, CrossEntropy(length_mode=mode)),)
    loss_fn = functools.partial(objectives.combined, terms, MODEL)
    (whole, _), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, None, batches)
    (summed, _), added = jax.jit(in_parts(2, terms)(loss_fn))(params, None, batches)
    assert float(summed) == pytest.approx(float(whole), rel=1e-5)
    assert_trees_close(added, gradient, 1e-5)


@pytest.mark.parametrize("mode", typing.get_args(masked.LengthMode))
def test_every_length_mode_reaches_the_loss(mode):
    """The weights of `masked.token_weights`, the length of a response of the batch's width."""
    params, batch = student_and_teacher()[0], replay_batch()
    loss, _ = objectives.cross_entropy(objectives.CrossEntropy(mode), MODEL, params, None, batch)
    hidden = objectives.response_hidden(MODEL, params, batch, "", "index")
    logp = jax.nn.log_softmax(MODEL.unembed(params, hidden))
    nll = -jnp.take_along_axis(logp, batch["target_ids"][..., None], axis=-1)[..., 0]
    weights = masked.token_weights(batch["weights"], mode, max_length=batch["weights"].shape[1])
    assert float(loss) == pytest.approx(float(jnp.sum(nll * weights)), rel=1e-5)


@pytest.mark.slow
def test_a_step_with_micro_batches_moves_the_parameters_alike():
    params, teacher = student_and_teacher()
    batches = {"rollouts": batch_of(), "replay": replay_batch()}
    loss_fn = functools.partial(objectives.combined, TERMS, MODEL)
    mesh, moved = sharding.make_mesh(sharding.MeshConfig()), []
    for differentiate in (in_parts(1, TERMS), in_parts(4, TERMS)):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, epsilon=1e-3), 10)
        schedule = TeacherConfig()
        step = make_train_step(loss_fn, MODEL, optimizer, mesh, teacher_config=schedule, differentiate=differentiate)
        state = init_state(MODEL, params, optimizer, mesh, teacher_config=schedule, reviser_params=teacher)
        moved.append(step(state, batches)[0].params)
    assert_trees_close(moved[1], moved[0], 1e-4)


# ------------------------------------------------------------------------------------------ advantages


def graded(question, reward):
    made = rollout([1, 5], [6, EOS], reward)
    return dataclasses.replace(made, question=Question(question, "", ("1",), "test"))


def test_advantages_by_hand():
    group = [graded("a", 1.0), graded("b", 0.0), graded("a", 0.0), graded("b", 0.0), graded("a", None)]
    got = advantages(group, AdvantageConfig(baseline="group"), None)
    np.testing.assert_allclose(got, [1.0, 0.0, -1.0, 0.0, 0.0], atol=1e-5)  # mean .5, deviation .5; b is uniform
    got = advantages(group, AdvantageConfig(baseline="batch"), 0.2)
    np.testing.assert_allclose(got, [2.0, -0.5, -0.5, -0.5, 0.0], atol=1e-6)  # sqrt(.2 * .8) = .4
    got = advantages(group, AdvantageConfig(baseline="batch"), 0.99)  # the deviation is at least sqrt(.05)
    assert got[0] == pytest.approx(0.01 / math.sqrt(0.05), rel=1e-5)
    assert advantages(group, AdvantageConfig(baseline="none"), 0.5).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------- sources


class Letters:
    """A tokenizer of ids 3 to 28 for letters."""

    stop_ids, end_id, vocab_size = (EOS,), EOS, 37

    def encode(self, text):
        return [3 + ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 3) for i in ids if i >= 3)


@dataclasses.dataclass(frozen=True)
class FakePhrases:
    def text(self, reward):
        return {1.0: "z", 0.0: "xy"}[reward]


def domain():
    return Domain(Letters(), FakePhrases(), verify=None)


Z, XY = [28], [26, 27]


def answer(question, ids, reward, prompt=(1, 5)):
    made = rollout(prompt, ids, reward)
    return dataclasses.replace(made, question=Question(question, "", ("1",), "test"))


class FakeRollouts:
    """Batches of two questions, two samples each; what was drawn is counted."""

    def __init__(self):
        self.drawn = 0

    def next(self, params):
        self.drawn += 1
        first = [answer("a", [6 + self.drawn % 3, EOS], 1.0), answer("a", [9, 9, EOS], 0.0)]
        return [*first, answer("b", [4, EOS], 0.0), answer("b", [4, 4, 4, EOS], 0.0)]

    def get_state(self):
        return self.drawn

    def set_state(self, state):
        self.drawn = state


def source(**settings):
    fake = FakeRollouts()
    return fake, OnPolicySource(fake, domain(), LAYOUT, **settings)


def same_batches(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_rollouts_are_handed_out_as_often_as_asked_and_counted_once():
    fake, own = source(updates=2, advantage=AdvantageConfig(baseline="group"))
    first, figures = own.next(None)
    again, repeated = own.next(None)
    assert fake.drawn == 1 and figures["sampled_tokens"] == 11 and figures["generations"] == 4
    assert figures["questions"] == 2 and figures["reward"] == 0.25
    assert "sampled_tokens" not in repeated and repeated["student_tokens"] == figures["student_tokens"]
    same_batches(first, again)
    own.next(None)
    assert fake.drawn == 2
    # 4 prompts of 2 tokens with the responses; the teacher reads prompt, first copy, phrase and response.
    assert figures["student_tokens"] == 8 + 11
    assert figures["teacher_tokens"] == 8 + (1 + 2 + 1 + 3) + (1 + 2 + 2 + 2) + 11
    np.testing.assert_allclose(first["rollouts"]["advantage"], [1, -1, 0, 0], atol=1e-5)
    _, alone = source(teacher=False)
    batches, figures = alone.next(None)
    assert figures["teacher_tokens"] == 0 and not any(name.startswith("rev") for name in batches["rollouts"])


def test_the_reference_of_a_policy_gradient_is_a_teacher_that_reads():
    """kl_weight > 0: the teacher's forward pass is over the student's rows."""
    _, own = source(teacher=False, reference=True)
    figures = own.next(None)[1]
    assert figures["teacher_tokens"] == figures["student_tokens"] == 8 + 11


def test_a_budget_ends_training_once_it_is_spent():
    for budget, batches in ((20, 2), (27, 2), (28, 3), (1, 1)):  # 11 tokens a batch: 22 is nearer to 27 than 33
        fake, own = source(budget=budget, updates=2)
        for _ in range(2 * batches):
            own.next(None)
        with pytest.raises(StopIteration):
            own.next(None)
        assert fake.drawn == batches


def test_questions_without_a_contrast_can_be_left_out():
    """By the policy gradient alone: self-distillation learns from them."""
    _, own = source(advantage=AdvantageConfig(baseline="group", drop_uniform=True))
    batch = own.next(None)[0]["rollouts"]
    assert objectives.token_mask(PolicyGradient(), batch).any(axis=1).tolist() == [True, True, False, False]
    assert objectives.token_mask(SelfDistillation(), batch).any(axis=1).all()


def test_a_batch_without_a_verdict_leaves_the_baseline_alone():
    fake, own = source(advantage=AdvantageConfig(baseline="batch"))
    own.next(None)
    graded, before = fake.next, own.get_state()["mean"]
    fake.next = lambda params: [dataclasses.replace(rollout, verdict=Verdict.of("error")) for rollout in graded(params)]
    batches, figures = own.next(None)
    assert own.get_state()["mean"] == before == 0.25 and "reward" not in figures and figures["no_verdict"] == 4
    assert not batches["rollouts"]["advantage"].any()


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_source_goes_on_where_it_stopped_in_the_middle_of_its_updates(stop):
    replay, advantage = ReplayConfig(pairs=4, max_length=24), AdvantageConfig("batch")
    settings = dict(updates=2, replay=replay, advantage=advantage, seed=3, budget=44)
    _, whole = source(**settings)
    wanted = [whole.next(None) for _ in range(8)]
    _, first = source(**settings)
    for _ in range(stop):
        first.next(None)
    _, second = source(**settings)
    second.set_state(json.loads(json.dumps(first.get_state())))  # as a checkpoint stores it
    for batches, figures in wanted[stop:]:
        got, got_figures = second.next(None)
        same_batches(got, batches)
        assert got_figures == figures
    with pytest.raises(StopIteration):  # 4 batches of 11 tokens
        second.next(None)


def test_rollouts_survive_json():
    assert rollouts_from_json(rollouts_to_json(ROLLOUTS)) == ROLLOUTS


# ---------------------------------------------------------------------------------------------- replay


def test_hindsight_makes_revisions_of_the_latest_wrong_and_right():
    memory = Hindsight(ReplayConfig(pairs=2, max_length=20), domain(), seed=0)
    memory.remember([answer("a", [7, EOS], 0.0), answer("a", [8, EOS], 0.0), answer("a", [9, 10, EOS], 1.0)])
    batch = memory.batch(0)
    wanted = [[1, 5, 8, *XY, 9, 10, EOS], [1, 5, 9, 10, *Z, 9, 10, EOS]]  # no end token before the phrase
    for row, tokens in enumerate(wanted):
        assert batch["tokens"][row, : len(tokens)].tolist() == tokens
        weighted = batch["target_ids"][row][batch["weights"][row] > 0]
        assert weighted.tolist() == [9, 10, EOS]


def test_hindsight_forgets_the_oldest_and_leaves_out_what_it_cannot_use():
    memory = Hindsight(ReplayConfig(pairs=4, capacity=2, max_length=12), domain(), seed=0)
    cut = dataclasses.replace(answer("d", [7, 8], 1.0), finish_reason="length")
    memory.remember([cut, answer("e", [7, EOS], None), answer("f", list(range(3, 12)), 1.0)])
    assert memory.get_state() == []
    assert not memory.batch(0)["weights"].any()
    memory.remember([answer(name, [7, EOS], 1.0) for name in "abc"])
    memory.remember([answer("b", [8, EOS], 0.0)])
    assert [entry[0] for entry in memory.get_state()] == ["c", "b"]
    batch = memory.batch(1)
    assert batch["weights"].any(axis=1).sum() == 4
    memory.remember([answer("c", [6, EOS], 1.0)])
    assert len({memory.batch(step)["tokens"].tobytes() for step in range(8)}) > 1  # each step draws its own


# --------------------------------------------------------------------------------- contexts, sequences


def test_the_teacher_of_sdft_reads_the_demonstration_and_no_first_copy():
    context = demonstration_context(lambda question: {"a": "cd"}.get(question.id), domain())
    rows = [answer("a", [7, 8, EOS], 0.0), answer("none", [9, EOS], 1.0)]
    batch, counts = distill_batch(rows, domain().phrase_ids, [EOS], LAYOUT, context=context)
    assert batch["rev_tokens"][0, :8].tolist() == [1, 5, 5, 6, *Z, 7, 8, EOS]
    assert batch["rev_index"][0, :3].tolist() == [4, 5, 6]
    assert batch["gen_tokens"][0, :5].tolist() == [1, 5, 7, 8, EOS]
    # Without a demonstration the teacher would read what the student reads, and teach nothing.
    assert batch["mask"].sum(axis=1).tolist() == [3, 0]
    assert counts == {"overlong": 0, "no_verdict": 0, "no_context": 1, "masked": 0}


def test_the_opposite_rows_carry_the_other_phrase():
    batch, _ = distill_batch([ROLLOUTS[0]], phrase_ids, [EOS], LAYOUT, opposite=True)
    assert batch["opposite_tokens"][0, :12].tolist() == [1, 5, 6, 7, 8, 9, *PHRASES[0.0], 7, 8, 9, EOS]
    assert batch["opposite_index"][0, :4].tolist() == [7, 8, 9, 10]


def test_rft_trains_on_distinct_right_finished_responses_only():
    cut = dataclasses.replace(answer("a", [7, 8], 1.0), finish_reason="length")
    samples = [answer("a", [7, EOS], 1.0), answer("a", [7, EOS], 1.0), answer("a", [8, EOS], 0.0), cut]
    samples += [answer("b", [9, EOS], None), answer("b", [7, EOS], 1.0, prompt=(1, 6))]
    sequences, overlong = right_sequences(samples, max_length=8)
    assert overlong == 0 and [s.tokens for s in sequences] == [(1, 5, 7, EOS), (1, 6, 7, EOS)]
    assert sequences[0].weights == (0.0, 0.0, 1.0, 1.0)
    assert right_sequences(samples, max_length=3) == ([], 2)


def trace(init, init_reward, revised, revised_reward=1.0):
    outcome = {1.0: "correct", 0.0: "wrong"}
    return RevisionTrace(
        "q", 0, (1, 5), tuple(init), Verdict.of(outcome[init_reward]), tuple(phrase_ids(init_reward)),
        tuple(revised), Verdict.of(outcome[revised_reward]), "stop",
    )  # fmt: skip


def test_an_answer_that_was_cut_off_is_not_taught_to_end():
    cut = dataclasses.replace(trace([9], 1.0, [8, EOS]), init_finish="length")
    data = SrtData(mode="compact", balance=False, held_out=0.0)
    sequences, _, counts = srt_sequences([cut], SRT_STAGES["compact"][0], data, EOS)
    assert counts["answers"] == 1 and sequences[-1].tokens == (1, 5, 8, EOS)
    joint, _, _ = srt_sequences([cut], SRT_STAGES["joint"][0], data, EOS)  # no end token there, so it stays
    assert joint[0].tokens[2] == 9


def test_compact_srt_trains_revisions_and_every_right_answer():
    traces = [trace([7], 0.0, [8, EOS]), trace([9], 1.0, [8, EOS]), trace([4], 1.0, [6, EOS], 0.0)]
    data = SrtData(mode="compact", balance=False, held_out=0.0)
    sequences, _, counts = srt_sequences(traces, SRT_STAGES["compact"][0], data, EOS)
    targets = [[t for t, w in zip(s.tokens, s.weights) if w] for s in sequences]
    assert targets == [[8, EOS], [8, EOS], [8, EOS], [9, EOS]]  # two revisions, then two answers
    assert [len(s.tokens) for s in sequences] == [2 + 1 + 2 + 2, 2 + 1 + 1 + 2, 4, 4]
    assert counts["answers"] == 2


# -------------------------------------------------------------------------------------------- registry


def test_methods_are_known_by_name_and_their_weights_can_be_changed():
    with pytest.raises(UserError, match=r"unknown method 'gpro'.*grpo"):
        find_method("gpro")
    with pytest.raises(UserError, match="2 terms, but 3 weights"):
        find_method("sdzero_replay", (1.0, 2.0, 3.0))
    changed = find_method("sdzero_replay", (2, 0.5))
    assert [term[0] for term in changed.terms] == [2.0, 0.5]
    for method in METHODS.values():
        terms = loss_terms(method, SelfDistillation(), PolicyGradient(), CrossEntropy())
        assert all(term.batch in ("rollouts", "replay", "sequences") for term in terms)
        assert method.on_policy == all(term.batch != "sequences" for term in terms)


# ---------------------------------------------------------------------------------------------- ledger


def test_the_ledger_adds_what_steps_report():
    fake, own = source(updates=2)
    rows = [{"loss": 1.0} | own.next(None)[1] for _ in range(4)]
    assert fake.drawn == 2
    spent = ledger.of_training(rows)
    assert spent.sampled_tokens == 22 and spent.generations == spent.verifier_calls == 8 and spent.questions == 4
    assert spent.student_tokens == 4 * 19
    sampled = ledger.of_sampling({"questions": 3, "generations": 6, "sampled_tokens": 50})
    assert dataclasses.asdict(spent + sampled)["sampled_tokens"] == 72


def test_flops_are_two_per_weight_and_token():
    params, _ = student_and_teacher()
    matrices = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim >= 2 and "norm" not in path[-1].key and path[-1].key != "embedding"
    )
    assert ledger.matrix_weights(CONFIG) == matrices
    spent = ledger.Ledger(sampled_tokens=1, student_tokens=10, teacher_tokens=100)
    assert spent.flops(CONFIG) == 2 * matrices * (1 + 30 + 100)


def test_t_interval_of_three_values():
    low, high = statistics.t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert all(map(math.isnan, statistics.t_interval([1.0])))
