"""The method's core: sequences to the token, and the fused step against an independent computation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from sdzero_jax import objectives, sharding
from sdzero_jax.batches import (
    DistillLayout,
    ScoredSequence,
    SrtTargets,
    distill_batch,
    revision_sequence,
    sequence_batch,
)
from sdzero_jax.examples import Question, RevisionTrace, Rollout, Verdict
from sdzero_jax.models import DecoderConfig, LanguageModel
from sdzero_jax.optimizer import OptimizerConfig, make_optimizer
from sdzero_jax.teacher import TeacherConfig
from sdzero_jax.train_step import init_state, make_train_step, synchronise

EOS = 2
PHRASES = {1.0: [30], 0.0: [31, 32]}
CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40,
    max_position=64, initializer_range=0.3,
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
LAYOUT = DistillLayout(max_prompt=6, max_response=7)


def phrase_ids(reward):
    return PHRASES[reward]


def rollout(prompt, response, reward, finish="stop"):
    outcome = {1.0: "correct", 0.0: "wrong", None: "error"}[reward]
    return Rollout(
        question=Question("q", "", ("1",), "test"),
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        logprobs=(-1.0,) * len(response),
        finish_reason=finish,
        verdict=Verdict.of(outcome),
        sampling_logprobs=(-1.0,) * len(response),
    )


ROLLOUTS = [
    rollout([1, 5, 6], [7, 8, 9, EOS], 1.0),
    rollout([1, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], 0.0, finish="length"),
    rollout([1, 20], [21, EOS], 0.0),
    rollout([1, 3, 4], [5, 6, EOS], None),  # the grader failed: no signal, whatever the tokens
]
# (student context, teacher context, response): the first copy of y loses its EOS, the second keeps it.
ROWS = [
    ([1, 5, 6], [1, 5, 6, 7, 8, 9, 30], [7, 8, 9, EOS]),
    ([1, 5, 6, 7, 8], [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 31, 32], [9, 10, 11, 12, 13, 14, 15]),
    ([1, 20], [1, 20, 21, 31, 32], [21, EOS]),
]


@functools.cache
def student_and_teacher():
    return jax.jit(MODEL.init)(jax.random.key(0)), jax.jit(MODEL.init)(jax.random.key(1))


def batch_of(rollouts=ROLLOUTS, layout=LAYOUT):
    return distill_batch(rollouts, phrase_ids, [EOS], layout)[0]


@functools.cache
def compiled(**settings):
    """(loss, its gradient for the student, its gradient for the teacher), jitted, of (student, teacher, batch)."""
    loss = functools.partial(objectives.self_distillation, objectives.SelfDistillation(**settings), MODEL)
    return jax.jit(loss), *(jax.jit(jax.value_and_grad(loss, argnums=i, has_aux=True)) for i in range(2))


def fused(params, teacher, batch, **settings):
    return compiled(**settings)[0](params, teacher, batch)


def student_gradient(params, teacher, batch):
    return compiled()[1](params, teacher, batch)


@functools.cache
def reader(prefix):
    """Hidden states at the positions that predict the response, as a jitted function of (parameters, batch)."""
    return jax.jit(lambda p, b: objectives.response_hidden(MODEL, p, b, f"{prefix}_", f"{prefix}_index"))


def as_float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


def assert_trees_close(actual, wanted, tolerance):
    """Largest difference of each leaf, relative to that leaf's largest entry."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"


# ---------------------------------------------------------------------------------------- sequences


def test_teacher_and_student_rows_to_the_token():
    batch = batch_of()
    for row, (student, teacher, response) in enumerate(ROWS):
        for prefix, context in (("gen", student), ("rev", teacher)):
            wanted = [*context, *response]
            tokens, segments = batch[f"{prefix}_tokens"][row], batch[f"{prefix}_segment_ids"][row]
            assert tokens[: len(wanted)].tolist() == wanted
            assert segments.tolist() == [1] * len(wanted) + [0] * (len(segments) - len(wanted))
            index = batch[f"{prefix}_index"][row, : len(response)]
            assert tokens[index + 1].tolist() == response
            assert index[0] == len(context) - 1
        assert batch["target_ids"][row, : len(response)].tolist() == response
        assert batch["mask"][row].tolist() == [1.0] * len(response) + [0.0] * (7 - len(response))


def test_first_copy_keeps_its_eos_only_on_request():
    kept = batch_of(layout=dataclasses.replace(LAYOUT, keep_first_eos=True))
    assert kept["rev_tokens"][0, :12].tolist() == [1, 5, 6, 7, 8, 9, EOS, 30, 7, 8, 9, EOS]
    assert batch_of()["rev_tokens"][0, :11].tolist() == [1, 5, 6, 7, 8, 9, 30, 7, 8, 9, EOS]


def test_failed_grader_overlong_and_sample_masks_are_counted_and_carry_no_mask():
    batch, counts = distill_batch(ROLLOUTS, phrase_ids, [EOS], LAYOUT)
    assert counts == {"overlong": 0, "no_verdict": 1, "no_context": 0, "masked": 0}
    assert batch["mask"][3].sum() == 0
    batch, counts = distill_batch(ROLLOUTS, phrase_ids, [EOS], dataclasses.replace(LAYOUT, max_teacher_tokens=20))
    assert counts["overlong"] == 1 and batch["mask"].sum(axis=1).tolist() == [4, 0, 2, 0]
    for mask, rows in {"wrong": [0, 7, 2, 0], "correct": [4, 0, 0, 0], "finished": [4, 0, 2, 0]}.items():
        batch, _ = distill_batch(ROLLOUTS, phrase_ids, [EOS], dataclasses.replace(LAYOUT, sample_mask=mask))
        assert batch["mask"].sum(axis=1).tolist() == rows, mask


def trace(init, reward, revised):
    return RevisionTrace(
        question_id="q", sample_index=0, prompt_ids=(1, 5), init_ids=tuple(init),
        init_verdict=Verdict.of("correct" if reward else "wrong"), phrase_ids=tuple(PHRASES[reward]),
        revised_ids=tuple(revised), revised_verdict=Verdict.of("correct"), revised_finish="stop",
    )  # fmt: skip


def test_srt_weights_generation_on_everything_and_revision_on_the_second_piece():
    sequence = revision_sequence(trace([7, 8], 0.0, [9, EOS]), SrtTargets())
    assert sequence.tokens == (1, 5, 7, 8, 31, 32, 9, EOS)
    assert sequence.weights == (0, 0, 1, 1, 1, 1, 2, 2)
    only_revision = revision_sequence(trace([7, 8], 0.0, [9, EOS]), SrtTargets(generation=0.0))
    assert only_revision.weights == (0, 0, 0, 0, 0, 0, 1, 1)


def test_a_sequence_whose_first_token_is_a_target_is_refused():
    with pytest.raises(ValueError, match="first token"):
        sequence_batch([ScoredSequence((1, 2), (1.0, 1.0))], 4)


# ----------------------------------------------------------------------------- against the reference


def test_distillation_equals_the_unfused_unpadded_float64_computation():
    student, teacher = student_and_teacher()
    (loss, _), grads = student_gradient(student, teacher, batch_of())
    with jax.enable_x64(True):
        oracle = jax.jit(jax.value_and_grad(lambda s, t: reference.distillation_loss(s, t, CONFIG, ROWS)))
        wanted, wanted_grads = oracle(as_float64(student), as_float64(teacher))
        wanted, wanted_grads = float(wanted), jax.tree.map(np.asarray, wanted_grads)
    assert wanted > 0.1, "the case must have something to distil"
    assert abs(float(loss) - wanted) < 1e-5 * wanted
    assert_trees_close(grads, wanted_grads, 1e-5)


def test_srt_equals_the_unfused_float64_computation():
    student, _ = student_and_teacher()
    traces = [trace([7, 8], 0.0, [9, 10, EOS]), trace([7], 1.0, [9, EOS])]
    sequences = [revision_sequence(item, SrtTargets()) for item in traces]
    batch = sequence_batch(sequences, 12)
    objective = functools.partial(objectives.cross_entropy, objectives.CrossEntropy(), MODEL)
    (loss, _), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(student, None, batch)
    with jax.enable_x64(True):
        rows = [(s.tokens, s.weights) for s in sequences]
        oracle = jax.jit(jax.value_and_grad(lambda s: reference.weighted_nll(s, CONFIG, rows)))
        wanted, wanted_grads = oracle(as_float64(student))
        wanted, wanted_grads = float(wanted), jax.tree.map(np.asarray, wanted_grads)
    assert abs(float(loss) - wanted) < 1e-5 * wanted
    assert_trees_close(grads, wanted_grads, 1e-5)


# ---------------------------------------------------------------------------------------- properties


def test_no_gradient_reaches_the_teacher():
    student, teacher = student_and_teacher()
    _, grads = compiled()[2](student, teacher, batch_of())
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    _, grads = student_gradient(student, teacher, batch_of())
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_live_teacher_gets_no_gradient_either():
    """With T = S the gradient must be that of a teacher frozen at the same values."""
    student, _ = student_and_teacher()
    live = jax.jit(jax.grad(lambda s: fused(s, s, batch_of())[0]))(student)
    _, frozen = student_gradient(student, student, batch_of())
    assert_trees_close(live, frozen, 1e-5)


def test_the_control_phrase_changes_the_teacher_and_only_the_teacher():
    _, teacher = student_and_teacher()
    flipped = {1.0: PHRASES[0.0], 0.0: PHRASES[1.0]}
    batch, other = batch_of(), distill_batch(ROLLOUTS, lambda r: flipped[r], [EOS], LAYOUT)[0]
    for name in ("gen_tokens", "gen_index", "target_ids", "mask"):
        np.testing.assert_array_equal(batch[name], other[name])
    difference = np.abs(np.asarray(reader("rev")(teacher, batch) - reader("rev")(teacher, other))).max(axis=-1)
    assert (difference[batch["mask"] > 0] > 1e-3).all()


def test_later_tokens_of_y_never_change_earlier_positions():
    """Second copy only: a change of token t of the student's row leaves every position up to t alone."""
    student, _ = student_and_teacher()
    batch = batch_of()
    changed = {name: value.copy() for name, value in batch.items()}
    changed["gen_tokens"][1, 5 + 3] = 29  # token 3 of the response, predicted at position 3 of the index
    before, after = (np.asarray(reader("gen")(student, b))[1] for b in (batch, changed))
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.abs(before[4:] - after[4:]).max() > 1e-3


def test_hiding_the_first_copy_and_the_phrase_makes_the_loss_zero_for_equal_parameters():
    """With x and the second copy as one segment the reviser reads what the generator reads."""
    student, _ = student_and_teacher()
    batch = batch_of()
    for row, (student_context, teacher_context, response) in enumerate(ROWS):
        hidden = slice(len(student_context), len(teacher_context))
        batch["rev_segment_ids"][row, hidden] = 2
        second = slice(len(teacher_context), len(teacher_context) + len(response))
        batch["rev_positions"][row, second] = np.arange(len(response)) + len(student_context)
        batch["rev_index"][row, 0] = len(student_context) - 1  # not from the hidden phrase
    loss, _ = fused(student, student, batch)
    assert abs(float(loss)) < 1e-7
    shown = fused(student, student, batch_of())[0]
    assert float(shown) > 1e-3, "without hiding, the context must matter"


def test_token_clip_and_importance_weight_change_the_loss():
    student, teacher = student_and_teacher()
    plain = float(fused(student, teacher, batch_of())[0])
    assert float(fused(student, teacher, batch_of(), token_clip=0.1)[0]) < plain
    assert float(fused(student, teacher, batch_of(), importance_cap=2.0)[0]) != plain


# ------------------------------------------------------------------------------------- the train step


def one_device_mesh():
    return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def stepper(teacher_config, learning_rate=1e-2):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.0), 10)
    loss_fn = functools.partial(objectives.self_distillation, objectives.SelfDistillation(), MODEL)
    student, reviser = student_and_teacher()
    mesh = one_device_mesh()
    state = init_state(MODEL, student, optimizer, mesh, teacher_config=teacher_config, reviser_params=reviser)
    return state, make_train_step(loss_fn, MODEL, optimizer, mesh, teacher_config=teacher_config)


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.slow
def test_repeated_steps_lower_the_divergence_and_a_frozen_teacher_does_not_move():
    state, step = stepper(TeacherConfig("frozen"))
    teacher = host(state.teacher)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch_of())
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, host(state.teacher), teacher)


@pytest.mark.slow
def test_ema_teacher_moves_by_its_rate():
    state, step = stepper(TeacherConfig("ema", ema_rate=0.25))
    teacher = host(state.teacher)
    state, _ = step(state, batch_of())
    wanted = jax.tree.map(lambda t, s: 0.75 * t + 0.25 * np.array(s), teacher, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), host(state.teacher), wanted)


def test_synchronisation_copies_the_student():
    state, step = stepper(TeacherConfig("sync_every", sync_steps=2))
    state, _ = step(state, batch_of())
    state = synchronise(state)
    jax.tree.map(np.testing.assert_array_equal, host(state.teacher), host(state.params))
    state, _ = step(state, batch_of())  # the copies must not share donated buffers
    assert any(np.any(np.array(a) != np.array(b)) for a, b in zip(*map(jax.tree.leaves, (state.teacher, state.params))))


def test_a_nan_gradient_changes_nothing_and_is_counted():
    state, step = stepper(TeacherConfig("frozen"))
    state = state.replace(teacher=jax.tree.map(lambda leaf: leaf * jnp.nan, state.teacher))
    before = host(state.params)
    state, metrics = step(state, batch_of())
    assert float(metrics["nonfinite"][0]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, host(state.params), before)


@pytest.mark.slow
def test_srt_lowers_the_loss_on_held_out_traces():
    from sdzero_jax.methods import SRT_STAGES, SrtData, srt_sequences
    from sdzero_jax.sources import SequenceSource
    from sdzero_jax.tasks import TaskConfig, make_task

    task = make_task(TaskConfig())
    encode = task.tokenizer.encode
    traces = []
    for number, question in enumerate(task.questions("train", 60)):
        solution = encode(task.demonstration(question))
        wrong = number % 3 > 0
        traces.append(
            RevisionTrace(
                question_id=question.id, sample_index=0,
                prompt_ids=tuple(task.tokenizer.encode_prompt(question.prompt)),
                init_ids=tuple(solution[:-1] + encode("0") if wrong else solution),
                init_verdict=Verdict.of("wrong" if wrong else "correct"),
                phrase_ids=tuple(encode("<wrong>" if wrong else "<ok>")),
                revised_ids=(*solution, task.tokenizer.end_id), revised_verdict=Verdict.of("correct"),
                revised_finish="stop",
            )
        )  # fmt: skip
    data = SrtData(held_out=0.2, max_length=80)
    training, held_out, counts = srt_sequences(traces, SRT_STAGES["joint"][0], data, EOS)
    assert counts == {"traces": 48, "held_out": 12, "overlong": 0}
    assert not {s.tokens for s in training} & {s.tokens for s in held_out}
    model = LanguageModel(dataclasses.replace(CONFIG, vocab_size=task.tokenizer.vocab_size, initializer_range=0.02))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=5e-3, warmup_fraction=0.0), 20)
    terms = (objectives.Term(1.0, "sequences", objectives.cross_entropy, objectives.CrossEntropy()),)
    loss_fn = functools.partial(objectives.combined, terms, model)
    mesh = one_device_mesh()
    state = init_state(model, jax.jit(model.init)(jax.random.key(0)), optimizer, mesh)
    step = make_train_step(loss_fn, model, optimizer, mesh)
    evaluate = jax.jit(lambda params: loss_fn(params, None, {"sequences": sequence_batch(held_out, 80)})[0])
    before = float(evaluate(state.params))
    source = SequenceSource(training, 16, 80, seed=0)
    for _ in range(20):
        state, _ = step(state, source.next(None)[0])
    assert float(evaluate(state.params)) < 0.8 * before


def test_traces_are_balanced_and_two_stage_reads_wrong_ones_first():
    from sdzero_jax.methods import SRT_STAGES, SrtData, srt_sequences

    traces = [trace([7 + i], 1.0, [9, EOS]) for i in range(6)] + [trace([20 + i], 0.0, [9, EOS]) for i in range(2)]
    data = SrtData(held_out=0.0, max_length=20)
    joint, _, counts = srt_sequences(traces, SRT_STAGES["joint"][0], data, EOS)
    assert counts["traces"] == 8 and len(joint) == 12
    assert sum(31 in sequence.tokens for sequence in joint) == 6  # P_0, as often as P_1
    generation, revision = SRT_STAGES["two_stage"]
    first, _, _ = srt_sequences(traces, generation, data, EOS)
    assert all(31 in sequence.tokens and set(sequence.weights) == {0.0, 1.0} for sequence in first)
    second, _, _ = srt_sequences(traces, revision, data, EOS)
    assert second[0].weights[-3:] == (0.0, 1.0, 1.0)
