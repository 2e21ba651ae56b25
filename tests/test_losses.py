"""Losses against brute force in float64, hand constants, and the traps: -inf, huge logits, identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_divergences as oracle
import pytest

from sdzero_jax import losses
from sdzero_jax.errors import UserError

NEG = -np.inf
LN2, LN3 = np.log(2), np.log(3)


def _logits(seed, shape, scale=2.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def _assert_within(got, want, bound):
    with np.errstate(invalid="ignore"):
        excess = np.where(got == want, 0, np.abs(got - want)) - bound
    assert np.all(excess <= 0), f"off by {np.nanmax(excess):.2e} more than the bound"


@functools.cache
def _compiled(text):
    divergence = losses.get_divergence(text)

    @jax.jit
    def run(z, zt):
        t = jax.nn.log_softmax(zt, axis=-1)
        value, pull = jax.vjp(lambda z: divergence(jax.nn.log_softmax(z, axis=-1), t), z)
        return value, pull(jnp.ones_like(value))[0]

    return run


def _both(text, student_logits, teacher_logits):
    """(value [...], gradient with respect to the student's logits [..., V])."""
    return jax.device_get(_compiled(text)(np.float32(student_logits), np.float32(teacher_logits)))


def _value(text, student_logits, teacher_logits):
    return _both(text, student_logits, teacher_logits)[0]


def _gradient(text, student_logits, teacher_logits):
    return _both(text, student_logits, teacher_logits)[1]


SHAPE = (6, 23)  # one shape for most tests: each variant is compiled once
FULL = [name for name in oracle.VARIANTS if "topk" not in name and "clip" not in name]


@pytest.mark.parametrize("text", oracle.VARIANTS)
def test_values_and_gradients_equal_brute_force(text):
    z, zt = _logits(1, SHAPE), _logits(2, SHAPE)
    want = oracle.VARIANTS[text](oracle.log_softmax(z), oracle.log_softmax(zt))
    got = _value(text, z, zt)
    assert got.shape == SHAPE[:1] and got.dtype == np.float32
    _assert_within(got, want, 1e-6 * np.maximum(1, np.abs(want)))
    want = oracle.logit_gradient(oracle.VARIANTS[text], z, zt)
    # 5e-8 is the rounding of a probability, for gradients that nearly cancel.
    _assert_within(_gradient(text, z, zt), want, np.maximum(1e-5 * np.abs(want).max(-1, keepdims=True), 5e-8))


@pytest.mark.parametrize("text", FULL)
@pytest.mark.parametrize("case", ["huge", "near_one_hot", "single", "nearly_equal"])
def test_adversarial_inputs_equal_brute_force(text, case):
    z, zt = _logits(3, SHAPE), _logits(4, SHAPE)
    if case == "huge":
        z, zt = z * 5e3, zt * 5e3
    elif case == "near_one_hot":
        z[:, 3] += 60
        zt[:3, 3] += 60
        zt[3:, 7] += 60
    elif case == "single":
        z, zt = z[:, :1], zt[:, :1]
    elif case == "nearly_equal":
        zt = z + 1e-3 * zt
    s, t = oracle.log_softmax(z), oracle.log_softmax(zt)
    largest = max(np.abs(s).max(), np.abs(t).max())
    want = oracle.VARIANTS[text](s, t)
    scale = np.maximum(1, np.abs(want)) if case != "huge" else np.maximum(1, largest)
    _assert_within(_value(text, z, zt), want, 1e-6 * scale)
    want = oracle.logit_gradient(oracle.VARIANTS[text], z, zt, step=1e-3 if case == "huge" else 1e-5)
    # Log-probs are rounded to 1e-7 of their size: that bounds a gradient that nearly cancels.
    floor = max(1.0, largest) * {"nearly_equal": 2e-7, "huge": 1e-6}.get(case, 1e-9)
    _assert_within(_gradient(text, z, zt), want, np.maximum(1e-5 * np.abs(want).max(-1, keepdims=True), floor))


PARTIAL = [name for name in oracle.VARIANTS if name not in FULL]


@pytest.mark.parametrize("text", PARTIAL)
@pytest.mark.parametrize("case", ["huge", "near_one_hot", "nearly_equal", "half_equal"])
def test_truncated_divergences_of_adversarial_inputs_equal_brute_force(text, case):
    z, zt = _logits(3, SHAPE), _logits(4, SHAPE)
    if case == "huge":
        z, zt = z * 5e3, zt * 5e3
    elif case == "near_one_hot":
        z[:, 3] += 60
        zt[:3, 3] += 60
        zt[3:, 7] += 60
    elif case == "nearly_equal":
        zt = z + 1e-3 * zt
    elif case == "half_equal":
        zt[::2] = z[::2]
    s, t = oracle.log_softmax(z), oracle.log_softmax(zt)
    want = oracle.VARIANTS[text](s, t)
    value, gradient = _both(text, z, zt)
    assert np.isfinite(gradient).all()
    # A support of tiny probabilities, renormalised, shows the rounding of log-probs near -60.
    rounding = 1.2e-7 * max(np.abs(s).max(), np.abs(t).max()) if case == "near_one_hot" else 0.0
    _assert_within(value, want, 1e-6 * np.maximum(1, np.abs(want)) + rounding)
    want = oracle.logit_gradient(oracle.VARIANTS[text], z, zt, step=1e-3 if case == "huge" else 1e-5)
    floor = rounding or {"nearly_equal": 2e-7}.get(case, 5e-8)
    _assert_within(gradient, want, np.maximum(1e-5 * np.abs(want).max(-1, keepdims=True), floor))


@pytest.mark.parametrize("text", oracle.VARIANTS)
def test_padding_on_both_sides_adds_exactly_nothing(text):
    z, zt = _logits(5, SHAPE), _logits(6, SHAPE)
    z[:, 14:], zt[:, 14:] = NEG, NEG
    want = oracle.VARIANTS[text](oracle.log_softmax(z[:, :14]), oracle.log_softmax(zt[:, :14]))
    value, gradient = _both(text, z, zt)
    _assert_within(value, want, 1e-6 * np.maximum(1, np.abs(want)))
    want = oracle.logit_gradient(oracle.VARIANTS[text], z[:, :14], zt[:, :14])
    _assert_within(gradient[:, :14], want, np.maximum(1e-5 * np.abs(want).max(-1, keepdims=True), 5e-8))
    assert np.all(gradient[:, 14:] == 0)


@pytest.mark.parametrize("text", oracle.VARIANTS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_minus_infinity_on_one_side_gives_infinity_or_a_number_and_never_nan(text, side):
    z, zt = _logits(7, SHAPE), _logits(8, SHAPE)
    (z if side == "student" else zt)[1:3, 2] = NEG  # the other rows stay whole
    z[3], zt[3] = NEG, NEG
    z[3, 4], zt[3, 5] = 0.0, 0.0  # disjoint one-hots
    value, gradient = _both(text, z, zt)
    assert not np.isnan(value).any()
    assert np.isfinite(gradient).all()
    assert np.all(gradient[np.isinf(value)] == 0)
    assert np.isfinite(value[[0, 4, 5]]).all()
    if text not in FULL:
        return
    name = text.split("(")[0]
    infinite = {
        "forward_kl": side == "student",
        "reverse_kl": side == "teacher",
        "mixed_kl": True,
        "jsd": False,
    }
    assert np.all(np.isposinf(value[1:3])) == infinite[name]
    assert np.isposinf(value[3]) == (name != "jsd")
    if name == "jsd":
        beta = 0.5 if "0.5" in text else 0.1
        np.testing.assert_allclose(value[3], -beta * np.log(beta) - (1 - beta) * np.log(1 - beta), rtol=1e-6)


# ---- names and directions ------------------------------------------------------------------------

S3 = jnp.log(jnp.array([1 / 2, 1 / 4, 1 / 4]))
T3 = jnp.log(jnp.array([1 / 8, 1 / 8, 3 / 4]))


def test_three_tokens_by_hand():
    np.testing.assert_allclose(losses.forward_kl(S3, T3), 0.75 * LN3 - 0.375 * LN2, rtol=1e-6)  # 0.564029
    np.testing.assert_allclose(losses.reverse_kl(S3, T3), 1.25 * LN2 - 0.25 * LN3, rtol=1e-6)  # 0.591781
    np.testing.assert_allclose(losses.mixed_kl(S3, T3, 0.25), 0.25 * 0.5640290 + 0.75 * 0.5917809, rtol=1e-6)
    # M = (5/16, 3/16, 1/2)
    to_m = 0.5 * np.log(8 / 5) + 0.25 * np.log(4 / 3) + 0.25 * np.log(1 / 2)
    from_t = 1 / 8 * np.log(2 / 5) + 1 / 8 * np.log(2 / 3) + 3 / 4 * np.log(3 / 2)
    np.testing.assert_allclose(losses.jsd(S3, T3, 0.5), 0.5 * to_m + 0.5 * from_t, rtol=1e-6)
    # Top 1 of the teacher is token 2 (S 1/4, T 3/4); with a bucket KL((3/4, 1/4) || (1/4, 3/4)) = ln 3 / 2.
    np.testing.assert_allclose(losses.topk_divergence(S3, T3, 1, tail="bucket"), 0.5 * LN3, rtol=1e-5)
    assert losses.topk_divergence(S3, T3, 1) == 0  # renormalised over one entry: both are 1
    # S true, T = 1 on token 2: 1/4 ln(1/4) + (1/2 ln(1/2) + 1/4 ln(1/4)) + 100 * 3/4 = -1.5 ln 2 + 75
    want = 75 - 1.5 * LN2
    np.testing.assert_allclose(losses.topk_divergence(S3, T3, 1, tail="zero_outside"), want, rtol=1e-6)


def test_gradients_of_the_kls_by_hand():
    forward = jax.grad(lambda z: losses.forward_kl(jax.nn.log_softmax(z), T3))(S3)
    np.testing.assert_allclose(forward, [3 / 8, 1 / 8, -1 / 2], atol=1e-6)  # S - T
    reverse = jax.grad(lambda z: losses.reverse_kl(jax.nn.log_softmax(z), T3))(S3)
    value = 1.25 * LN2 - 0.25 * LN3  # S (ln S - ln T - KL)
    want = [0.5 * (2 * LN2 - value), 0.25 * (LN2 - value), 0.25 * (-LN3 - value)]
    np.testing.assert_allclose(reverse, want, atol=1e-6)


@pytest.mark.parametrize("text", ["forward_kl", "reverse_kl", "jsd(0.1)"])
def test_teacher_gradients_exist_for_callers_that_want_them(text):
    z, zt = _logits(1, (2, 9)), _logits(2, (2, 9))
    s, divergence = jax.nn.log_softmax(z), losses.get_divergence(text)
    got = jax.jit(jax.grad(lambda zt: jnp.sum(divergence(s, jax.nn.log_softmax(zt)))))(zt)
    want = oracle.logit_gradient(lambda t, s: oracle.VARIANTS[text](s, t), zt, z)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("text", oracle.VARIANTS)
def test_identical_distributions_have_no_value_and_no_gradient(text):
    if "zero_outside" in text:
        text = text.replace("topk(5", "topk(23")  # mass outside costs 100 each: only K = V is at rest
    z = _logits(9, SHAPE)
    value, gradient = _both(text, z, z)
    tolerance = 5e-7 if "zero_outside" in text else 1e-7  # there one side alone is renormalised
    assert np.abs(value).max() <= tolerance
    assert np.abs(gradient).max() <= tolerance


@pytest.mark.parametrize("text", FULL)
def test_bit_identical_log_probs_give_exactly_zero(text):
    logp = jax.nn.log_softmax(_logits(9, SHAPE))
    value, gradient = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(losses.get_divergence(text)(s, t))))(logp, logp)
    assert value == 0 and np.all(gradient == 0)


def test_jsd_ends_are_the_kls_and_the_scale_jumps():
    s, t = (jax.nn.log_softmax(_logits(seed, (4, 9))) for seed in (1, 2))
    np.testing.assert_array_equal(losses.jsd(s, t, 0.0), losses.forward_kl(s, t))
    np.testing.assert_array_equal(losses.jsd(s, t, 1.0), losses.reverse_kl(s, t))
    assert np.all(losses.jsd(s, t, 1e-3) < 0.1 * losses.forward_kl(s, t))
    np.testing.assert_allclose(losses.jsd(s, t, 1e-3) / 1e-3, losses.forward_kl(s, t), rtol=0.03)


def test_inputs_of_bfloat16_have_float32_statistics():
    s, t = (jax.nn.log_softmax(_logits(seed, (4, 3000))).astype(jnp.bfloat16) for seed in (1, 2))
    for text in ("forward_kl", "jsd(0.5)", "topk(5, tail=bucket)", "pointwise_clip(0.05)"):
        function = losses.get_divergence(text)
        got = function(s, t)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, function(s.astype(jnp.float32), t.astype(jnp.float32)))


# ---- top-k ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "zero_outside"])
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("inner", ["mixed_kl(0.5)", "jsd(0.5)"])
def test_topk_of_everything_is_the_full_divergence(tail, support, inner):
    z, zt = _logits(1, SHAPE), _logits(2, SHAPE)
    text = f"topk(64, support={support}, tail={tail}, divergence={inner})"  # k > V: all entries
    np.testing.assert_allclose(_value(text, z, zt), _value(inner, z, zt), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(_gradient(text, z, zt), _gradient(inner, z, zt), atol=1e-6)


def test_renormalised_topk_is_blind_to_mass_outside_and_the_bucket_is_not():
    teacher = np.log([[0.6, 0.3, 0.05, 0.05]])
    near, far = np.log([[0.5, 0.4, 0.05, 0.05]]), np.log([[0.05, 0.04, 0.01, 0.9]])  # same odds on the top 2
    blind = [float(_value("topk(2)", z, teacher)[0]) for z in (near, far)]
    seeing = [float(_value("topk(2, tail=bucket)", z, teacher)[0]) for z in (near, far)]
    assert abs(blind[0] - blind[1]) < 1e-6
    assert np.abs(_gradient("topk(2)", far, teacher)[0, 2:]).max() < 1e-7
    assert seeing[1] > 1.0 > 0.1 > seeing[0]
    assert _gradient("topk(2, tail=bucket)", far, teacher)[0, 3] > 0.01


def test_topk_support_takes_the_named_side():
    student, teacher = np.log([[0.7, 0.2, 0.1]]), np.log([[0.1, 0.2, 0.7]])
    for support, kept in (("teacher", [1, 2]), ("student", [0, 1])):
        got = _value(f"topk(2, support={support})", student, teacher)
        want = oracle.reverse_kl(oracle.log_softmax(student[:, kept]), oracle.log_softmax(teacher[:, kept]))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_pointwise_clip_bounds_terms_and_can_turn_negative():
    z, zt = np.log([[0.01, 0.495, 0.495]]), np.log([[0.9, 0.05, 0.05]])
    full, clipped = _value("forward_kl", z, zt), _value("pointwise_clip(0.01)", z, zt)
    assert full > 1 and clipped < 0
    np.testing.assert_allclose(_value("pointwise_clip(1e9)", z, zt), full, rtol=1e-6)


# ---- per-token losses ----------------------------------------------------------------------------


def test_sampled_token_gradient_is_unbiased_for_reverse_kl():
    z, zt = jnp.asarray(_logits(1, (7,))), jnp.asarray(_logits(2, (7,)))
    t = jax.nn.log_softmax(zt)
    by_token = jax.jacobian(lambda z: losses.sampled_token_loss(jax.nn.log_softmax(z), t))(z)  # [y, V]
    expected = jax.nn.softmax(z) @ by_token
    np.testing.assert_allclose(expected, _gradient("reverse_kl", z, zt), atol=1e-6)
    np.testing.assert_allclose(losses.sampled_token_loss(jnp.log(0.5), jnp.log(0.25)), -LN2 * LN2, rtol=1e-6)


def test_token_clip_by_hand():
    loss = jnp.array([0.5, 2.0, 8.0, -1e-8, 0.0, jnp.inf])
    np.testing.assert_allclose(losses.token_clip(loss, 2.0), [0.5, 2.0, 2.0, -1e-8, 0.0, 2.0])
    gradient = jax.grad(lambda x: jnp.sum(losses.token_clip(x, 2.0)))(loss[:5])
    np.testing.assert_allclose(gradient, [1, 1, 0.25, 1, 1])  # direction kept, not cut to 0


def test_importance_weight_by_hand():
    weight = losses.importance_weight(jnp.log(jnp.array([0.2, 0.9, 1.0])), jnp.log(jnp.array([0.4, 0.1, 1.0])), 2.0)
    np.testing.assert_allclose(weight, [0.5, 2.0, 1.0], rtol=1e-6)
    assert losses.importance_weight(jnp.float32(-1e4), jnp.float32(0.0)) == np.exp(np.float32(-20))
    assert jnp.isfinite(losses.importance_weight(jnp.float32(0.0), jnp.float32(-1e4), jnp.inf))
    assert jax.grad(lambda x: losses.importance_weight(x, jnp.float32(-1.0)))(jnp.float32(-1.0)) == 0


def test_clipped_policy_gradient_by_hand():
    ratio = np.array([0.5, 0.9, 1.2, 2.0, 0.5, 2.0])
    advantage = np.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    # positive: min(r, 1.28); negative: -max(r, 0.8)
    want = [-0.5, -0.9, -1.2, -1.28, 0.8, 2.0]
    logp_rollout = jnp.full(6, -1.0)
    logp = logp_rollout + jnp.log(ratio)

    def loss(logp, old):
        return losses.clipped_policy_gradient(logp, old, jnp.asarray(advantage), 0.2, 0.28)

    np.testing.assert_allclose(loss(logp, logp_rollout), want, rtol=1e-6)
    gradient = jax.grad(lambda a, b: jnp.sum(loss(a, b)), argnums=(0, 1))(logp, logp_rollout)
    np.testing.assert_allclose(gradient[0], [-0.5, -0.9, -1.2, 0, 0, 2.0], rtol=1e-6)
    assert np.all(gradient[1] == 0)
    assert jnp.isfinite(losses.clipped_policy_gradient(jnp.float32(0), jnp.float32(-1e4), -1.0))


def test_temper_by_hand():
    got = losses.temper(jnp.log(jnp.array([0.8, 0.2])), 0.5)  # p^2 renormalised: 16/17, 1/17
    np.testing.assert_allclose(jnp.exp(got), [16 / 17, 1 / 17], rtol=1e-6)


def test_kl_estimates_by_hand():
    k1, k2, k3 = losses.kl_estimates(jnp.log(jnp.array([0.25, 0.5])), jnp.log(jnp.array([0.5, 0.5])))
    np.testing.assert_allclose(k1, [-LN2, 0], rtol=1e-6)
    np.testing.assert_allclose(k2, [LN2**2 / 2, 0], rtol=1e-6)
    np.testing.assert_allclose(k3, [1 - LN2, 0], rtol=1e-6)


def test_sample_masks_by_hand():
    reward, finished = np.array([1.0, 0.0, np.nan, 0.0]), np.array([1, 1, 1, 0])
    want = {
        "all": [1, 1, 0, 1],
        "only_wrong": [0, 1, 0, 1],
        "only_correct": [1, 0, 0, 0],
        "only_finished": [1, 1, 0, 0],
    }
    assert set(want) == set(losses.SAMPLE_MASKS)
    for name, mask in want.items():
        np.testing.assert_array_equal(losses.sample_mask(name, reward, finished), mask)


# ---- the registry --------------------------------------------------------------------------------


def test_registry_gives_the_same_object_and_the_named_settings():
    assert losses.get_divergence("jsd(0.3)") is losses.get_divergence("jsd(0.3)")
    s, t = (jax.nn.log_softmax(_logits(seed, (4, 9))) for seed in (1, 2))
    for text, want in {
        "mixed_kl(0.2)": losses.mixed_kl(s, t, 0.2),
        " mixed_kl( weight = 0.2 ) ": losses.mixed_kl(s, t, 0.2),
        "mixed_kl": losses.mixed_kl(s, t, 0.5),
        "jsd(beta=0.2)": losses.jsd(s, t, 0.2),
        "topk(3, support='student', tail=bucket, divergence=mixed_kl(0.2))": losses.topk_divergence(
            s, t, 3, support="student", tail="bucket", divergence="mixed_kl(0.2)"
        ),
        "topk": losses.topk_divergence(s, t, 64),
    }.items():
        np.testing.assert_array_equal(losses.get_divergence(text)(s, t), want)


@pytest.mark.parametrize(
    "text, words",
    [
        ("revers_kl", "did you mean 'reverse_kl'"),
        ("", "cannot read"),
        ("jsd(0.5", "cannot read"),
        ("mixed_kl(**x)", "cannot read"),
        ("losses.jsd(0.5)", "cannot read"),
        ("jsd(1 + 1)", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("mixed_kl(0.5, 0.5)", "it takes weight"),
        ("reverse_kl(0.5)", "it takes nothing"),
        ("mixed_kl(wieght=0.5)", "did you mean 'weight'"),
        ("mixed_kl(0.5, weight=0.5)", "twice"),
        ("mixed_kl(1.5)", "[0, 1]"),
        ("jsd(-0.1)", "[0, 1]"),
        ("jsd(half)", "wanted a number"),
        ("topk(0)", "whole number"),
        ("topk(2.5)", "whole number"),
        ("topk(8, tail=buckets)", "did you mean 'bucket'"),
        ("topk(8, support=teachr)", "did you mean 'teacher'"),
        ("topk(8, divergence=revers_kl)", "did you mean 'reverse_kl'"),
        ("topk(8, divergence=topk(3))", "unknown divergence 'topk'"),
        ("pointwise_clip(0)", "(0, inf]"),
    ],
)
def test_registry_errors_are_one_line_and_name_the_nearest(text, words):
    with pytest.raises(UserError) as error:
        losses.get_divergence(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_sample_mask_is_a_user_error():
    with pytest.raises(UserError, match="did you mean 'only_wrong'"):
        losses.sample_mask("only_wron", np.zeros(2), np.ones(2))
