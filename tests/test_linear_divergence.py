"""The linear-divergence operators against float64 brute force, densely, by tiles and over a mesh."""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle_divergences as oracle
import pytest

from kernels import linear_divergence_chunked
from sdzero_jax import losses, ops
from sdzero_jax.errors import UserError
from sdzero_jax.ops.linear_divergence import default_tile

ROOT = Path(__file__).resolve().parents[1]
N, D, D2, V = 37, 16, 12, 53


def _inputs(seed=0, n=N, vocab=V, dtype=np.float32):
    rng = np.random.default_rng(seed)
    h, w = rng.normal(size=(n, D)), 0.5 * rng.normal(size=(vocab, D))
    ht, wt = rng.normal(size=(n, D2)), 0.5 * rng.normal(size=(vocab, D2))
    ids = rng.integers(0, vocab, size=n)
    weights = rng.uniform(size=n) * (np.arange(n) % 3 > 0)
    h, w, ht, wt = (jnp.asarray(x, jnp.float32).astype(dtype) for x in (h, w, ht, wt))
    return h, w, ht, wt, jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32)


def _oracle(divergence, h, w, ht, wt, ids, weights, temperature=1.0):
    """(value, logp_s, logp_t, entropy), dh, dw of sum weights * value, in float64."""
    h, w, ht, wt = (np.asarray(x.astype(jnp.float32), np.float64) for x in (h, w, ht, wt))
    z, zt = h @ w.T / temperature, ht @ wt.T / temperature
    s, t = oracle.log_softmax(z), oracle.log_softmax(zt)
    rows = np.arange(len(h))
    values = (oracle.VARIANTS[divergence](s, t), s[rows, ids], t[rows, ids], -(np.exp(s) * s).sum(-1))
    dz = oracle.logit_gradient(oracle.VARIANTS[divergence], z, zt) / temperature
    dz = dz * np.asarray(weights, np.float64)[:, None]
    return values, dz @ w, dz.T @ h


def _relative(got, want):
    got = np.asarray(jnp.asarray(got).astype(jnp.float32))
    return np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)


# All inputs are arguments of the jitted function: the compiler folds constants with other roundings.


def _loss_form(inputs, **settings):
    def loss(h, w, ht, wt, ids, weights):
        return ops.linear_divergence_loss(h, w, ht, wt, weights, ids=ids, **settings)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*inputs)


def _token_form(inputs, **settings):
    def loss(h, w, ht, wt, ids, weights):
        out = ops.linear_divergence(h, w, ht, wt, ids=ids, **settings)
        return jnp.sum(weights * out.value), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*inputs)


FORMS = {"loss": _loss_form, "token": functools.partial(_token_form, save_logits_bytes=0)}
SOME = ["forward_kl", "reverse_kl", "mixed_kl(0.5)", "jsd(0.1)", "topk(5, tail=bucket, divergence=jsd(0.3))"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", SOME)
def test_tiles_equal_float64_brute_force(form, divergence):
    inputs = _inputs()
    want, dh, dw = _oracle(divergence, *inputs, temperature=1.3)
    (total, out), gradients = FORMS[form](inputs, divergence=divergence, temperature=1.3, tile=8)
    for got, expected in zip(out, want):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, np.sum(np.asarray(inputs[5]) * want[0]), rtol=1e-5)
    assert _relative(gradients[0], dh) < 1e-5
    assert _relative(gradients[1], dw) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{"tile": 1}, {"tile": 37}, {"tile": 1000}, {}, {"implementation": "reference"}])
def test_every_tile_and_the_reference_give_the_same(form, settings):
    inputs = _inputs()
    want, dh, dw = _oracle("reverse_kl", *inputs)
    (_, out), gradients = FORMS[form](inputs, **settings)
    for got, expected in zip(out, want):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert _relative(gradients[0], dh) < 1e-5 and _relative(gradients[1], dw) < 1e-5


@pytest.mark.parametrize("divergence", ["topk(5, tail=zero_outside)", "pointwise_clip(0.05)", "sampled_token"])
def test_the_rest_of_the_registry_equals_the_reference(divergence):
    inputs = _inputs()
    want = _loss_form(inputs, divergence=divergence, implementation="reference")
    got = _loss_form(inputs, divergence=divergence, tile=8)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert _relative(a, b) < 1e-5


def test_sampled_token_by_tiles_is_the_formula():
    h, w, _, _, ids, weights = _inputs()
    (total, out), (dh, _) = _loss_form(_inputs(), divergence="sampled_token", tile=8)
    a = out.logp_teacher - out.logp_student
    np.testing.assert_allclose(total, jnp.sum(-weights * a * out.logp_student), rtol=1e-5)
    want = jax.grad(lambda h: -jnp.sum(weights * a * ops.linear_logprob(h, w, ids)))(h)
    assert _relative(dh, want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_hidden_states_with_float32_master_weights(form):
    h, w, ht, wt, ids, weights = _inputs(dtype=jnp.bfloat16)
    inputs = (h, w.astype(jnp.float32), ht, wt, ids, weights)
    want, dh, dw = _oracle("reverse_kl", *inputs)
    (_, out), gradients = FORMS[form](inputs, tile=8)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    np.testing.assert_allclose(out.value, want[0], rtol=1e-5, atol=1e-5)  # products accumulate in float32
    assert _relative(gradients[0], dh) < 2e-2 and _relative(gradients[1], dw) < 2e-2


def test_gradient_of_a_bfloat16_unembedding_is_accumulated_in_float32():
    inputs = _inputs(n=2048, dtype=jnp.bfloat16)
    _, (_, few) = _loss_form(inputs, tile=2048)
    _, (_, many) = _loss_form(inputs, tile=4)  # 512 additions; in bfloat16 they would stall
    assert many.dtype == jnp.bfloat16
    assert _relative(many, np.asarray(few.astype(jnp.float32))) < 2**-7


def test_strips_of_the_unembedding_gradient_change_nothing(monkeypatch):
    inputs = _inputs()
    _, _, dw = _oracle("reverse_kl", *inputs)
    for size in (V * D * 4 // 3, 1):  # 4 strips of 4 columns; 16 of one
        monkeypatch.setattr(linear_divergence_chunked, "MAX_PRODUCT_BYTES", size)
        assert _relative(_loss_form(inputs, tile=8)[1][1], dw) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [0, 1, 9])
def test_sizes_that_do_not_fill_a_tile(form, n):
    inputs = _inputs(n=n)
    (total, out), (dh, dw) = FORMS[form](inputs, tile=8)
    assert out.value.shape == (n,) and dh.shape == (n, D) and dw.shape == (V, D)
    if n == 0:
        assert total == 0 and np.all(dw == 0)
        return
    want, want_dh, want_dw = _oracle("reverse_kl", *inputs)
    np.testing.assert_allclose(out.value, want[0], rtol=1e-5)
    np.testing.assert_allclose(dh, want_dh, atol=1e-5)
    np.testing.assert_allclose(dw, want_dw, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [None, 8])
@pytest.mark.parametrize("divergence", ["forward_kl", "mixed_kl(0.5)"])  # the mixture holds both KLs
def test_student_equal_to_teacher_gives_exactly_zero(form, divergence, tile):
    h, w, _, _, ids, weights = _inputs(vocab=301)
    (total, out), gradients = FORMS[form]((h, w, h, w, ids, weights), divergence=divergence, tile=tile)
    assert total == 0 and np.all(out.value == 0)
    assert all(np.all(g == 0) for g in gradients)


@pytest.mark.parametrize("tile", [None, 8])
def test_tokens_of_weight_zero_add_exactly_nothing(tile):
    h, w, ht, wt, ids, weights = _inputs()
    bad = weights == 0
    clean = (jnp.where(bad[:, None], 0, h), w, jnp.where(bad[:, None], 0, ht), wt, ids, weights)
    dirty = (jnp.where(bad[:, None], jnp.nan, h), w, jnp.where(bad[:, None], jnp.inf, ht), wt, ids, weights)
    (want, _), want_gradients = _loss_form(clean, tile=tile)
    (got, out), gradients = _loss_form(dirty, tile=tile, token_transform=_constant_factor)
    assert not np.isfinite(out.value[bad]).any()  # they were really bad
    assert got == want
    for a, b in zip(gradients, want_gradients):
        np.testing.assert_array_equal(a, b)


def _constant_factor(value, logp_student):
    return jnp.where(jnp.isnan(value), jnp.nan, 1.0)


def test_an_infinite_token_is_counted_and_has_no_gradient():
    h, w, ht, wt, ids, weights = _inputs()

    def hole(s, t):  # the bare formula, its gradient NaN where the teacher rules out entry 3
        some = (jnp.argmax(s, -1) % 4 == 0)[:, None]
        return jnp.sum(jnp.exp(s) * (s - jnp.where(some & (jnp.arange(V) == 3), -jnp.inf, t)), axis=-1)

    weights = jnp.ones(N)
    (total, out), gradients = _loss_form((h, w, ht, wt, ids, weights), divergence=hole, tile=8)
    infinite = np.isinf(out.value)
    assert 0 < infinite.sum() < N and np.isposinf(total)
    kept = (h, w, ht, wt, ids, jnp.where(infinite, 0.0, 1.0))
    _, want = _loss_form(kept, tile=8)
    assert np.all(gradients[0][infinite] == 0)
    assert _relative(gradients[0], want[0]) < 1e-6 and _relative(gradients[1], want[1]) < 1e-6


def test_only_the_student_gets_gradients_and_per_token_carries_none():
    h, w, ht, wt, ids, weights = _inputs()
    for implementation in ("chunked", "reference"):

        def loss(h, w, ht, wt, weights, implementation=implementation):
            total, out = ops.linear_divergence_loss(
                h, w, ht, wt, weights, ids=ids, tile=8, implementation=implementation
            )
            return total + sum(jnp.sum(x) for x in out)

        gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(h, w, ht, wt, weights)
        _, dh, dw = _oracle("reverse_kl", h, w, ht, wt, ids, weights)
        assert _relative(gradients[0], dh) < 1e-5 and _relative(gradients[1], dw) < 1e-5
        assert np.all(gradients[2] == 0) and np.all(gradients[3] == 0)


def test_token_form_differentiates_logp_and_entropy_too():
    h, w, ht, wt, ids, weights = _inputs()

    def loss(h, w, implementation):
        out = ops.linear_divergence(h, w, ht, wt, ids=ids, tile=8, implementation=implementation)
        return jnp.sum(weights * (out.value + 2 * out.logp_student - 3 * out.entropy))

    got, want = (jax.grad(loss, argnums=(0, 1))(h, w, i) for i in ("chunked", "reference"))
    assert _relative(got[0], want[0]) < 1e-5 and _relative(got[1], want[1]) < 1e-5


def test_token_transform_is_a_constant_factor_and_gets_its_inputs_by_tile():
    inputs = _inputs()
    h, w, ht, wt, ids, weights = inputs
    values, _, _ = _oracle("reverse_kl", *inputs)
    rollout = jnp.asarray(values[1] + np.random.default_rng(5).normal(size=N), jnp.float32)

    def transform(value, logp_student, logp_rollout):
        return losses.token_clip_factor(value, 0.3) * losses.importance_weight(logp_student, logp_rollout, 2.0)

    factor = np.minimum(1, 0.3 / values[0]) * np.minimum(np.exp(values[1] - np.asarray(rollout, np.float64)), 2)
    assert factor.std() > 0.05
    want, dh, dw = _oracle("reverse_kl", h, w, ht, wt, ids, np.asarray(weights) * factor)
    for settings in ({"tile": 8}, {}, {"implementation": "reference"}):
        (total, out), gradients = _loss_form(inputs, token_transform=transform, token_inputs=(rollout,), **settings)
        np.testing.assert_allclose(total, np.sum(np.asarray(weights) * factor * want[0]), rtol=1e-5)
        np.testing.assert_allclose(out.value, want[0], rtol=1e-5)  # PerToken is before the transform
        assert _relative(gradients[0], dh) < 1e-5 and _relative(gradients[1], dw) < 1e-5


def test_token_transform_that_closes_over_tokens_is_refused_at_any_size():
    rollout = jnp.zeros(N)
    with pytest.raises(ValueError, match="token_inputs"):
        _loss_form(_inputs(), token_transform=lambda value, logp: logp - rollout)


def test_the_cotangent_of_the_sum_scales_the_gradients():
    h, w, ht, wt, _, weights = _inputs()

    def loss(h, scale):
        return scale * ops.linear_divergence_loss(h, w, ht, wt, weights, tile=8)[0]

    np.testing.assert_allclose(jax.grad(loss)(h, -3.0), -3 * jax.grad(loss)(h, 1.0), rtol=1e-6)


def test_padding_of_the_vocabulary_counts_as_minus_infinity():
    h, w, ht, wt, ids, weights = _inputs()
    pad = lambda x: jnp.concatenate([x, jnp.ones((11, x.shape[1]))])  # noqa: E731
    for form in FORMS.values():
        (want, out), (dh, dw) = form((h, w, ht, wt, ids, weights), tile=8)
        (got, wide), (dh2, dw2) = form((h, pad(w), ht, pad(wt), ids, weights), tile=8, vocab_size=V)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        for a, b in zip(wide, out):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert _relative(dh2, dh) < 1e-5 and _relative(dw2[:V], dw) < 1e-5
        assert np.all(dw2[V:] == 0)


def test_without_ids_there_are_no_log_probs():
    h, w, ht, wt, _, weights = _inputs()
    out = ops.linear_divergence(h, w, ht, wt, tile=8)
    assert out.logp_student is None and out.logp_teacher is None and out.entropy.shape == (N,)
    total, out = ops.linear_divergence_loss(h, w, ht, wt, weights, tile=8)
    assert out.logp_student is None and total.shape == ()


def test_a_trust_region_teacher_is_a_concatenation():
    h, w, ht, wt, ids, _ = _inputs()
    u = 0.3
    joint_h, joint_w = jnp.concatenate([(1 - u) * ht, u * h], 1), jnp.concatenate([wt, w], 1)
    out = ops.linear_divergence(h, w, joint_h, joint_w, ids=ids, tile=8)
    zt = (1 - u) * np.asarray(ht) @ np.asarray(wt).T + u * np.asarray(h) @ np.asarray(w).T
    want = oracle.reverse_kl(oracle.log_softmax(np.asarray(h) @ np.asarray(w).T), oracle.log_softmax(zt))
    np.testing.assert_allclose(out.value, want, rtol=1e-5, atol=1e-6)


# ---- log-probs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"tile": 5}, {"implementation": "reference"}])
def test_linear_logprob_and_its_loss_equal_brute_force(settings):
    h, w, _, _, ids, weights = _inputs()
    z = np.asarray(h, np.float64) @ np.asarray(w, np.float64).T / 0.7
    s = oracle.log_softmax(z)
    logp, entropy = s[np.arange(N), ids], -(np.exp(s) * s).sum(-1)
    dz = (np.exp(s) - np.eye(V)[np.asarray(ids)]) * np.asarray(weights, np.float64)[:, None] / 0.7  # of -w logp
    got = ops.linear_logprob(h, w, ids, temperature=0.7, **settings)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, logp, rtol=1e-6, atol=1e-6)

    def by_tokens(h, w):
        return -jnp.sum(weights * ops.linear_logprob(h, w, ids, temperature=0.7, **settings))

    def in_forward(h, w):
        return ops.linear_logprob_loss(h, w, ids, weights, temperature=0.7, **settings)

    (total, out), gradients = jax.value_and_grad(in_forward, argnums=(0, 1), has_aux=True)(h, w)
    np.testing.assert_allclose(total, -np.sum(np.asarray(weights) * logp), rtol=1e-6)
    np.testing.assert_allclose(out.value, -logp, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(out.logp_student, logp, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(out.entropy, entropy, rtol=1e-6, atol=1e-6)
    assert out.logp_teacher is None
    for dh, dw in (gradients, jax.grad(by_tokens, argnums=(0, 1))(h, w)):
        assert _relative(dh, dz @ np.asarray(w)) < 1e-5 and _relative(dw, dz.T @ np.asarray(h)) < 1e-5


def test_policy_gradient_through_linear_logprob_equals_the_dense_one():
    h, w, _, _, ids, weights = _inputs()
    rollout = ops.linear_logprob(h, w, ids) + 0.3 * jnp.sin(jnp.arange(N))
    advantage = jnp.where(jnp.arange(N) % 2 == 0, 1.0, -1.0)

    def loss(h, implementation):
        logp = ops.linear_logprob(h, w, ids, tile=8, implementation=implementation)
        return jnp.sum(weights * losses.clipped_policy_gradient(logp, rollout, advantage, 0.2, 0.28))

    assert _relative(jax.grad(loss)(h, "chunked"), np.asarray(jax.grad(loss)(h, "reference"))) < 1e-5


# ---- inputs that do not fit ----------------------------------------------------------------------


def test_unknown_names_and_unfit_settings_are_user_errors():
    h, w, ht, wt, ids, weights = _inputs()
    for settings, words in (
        ({"implementation": "chunkd"}, "did you mean 'chunked'"),
        ({"divergence": "revers_kl"}, "did you mean 'reverse_kl'"),
        ({"divergence": "sampled_token"}, "needs ids"),
        ({"temperature": 0.0}, "above 0"),
        ({"tile": 0}, "at least 1"),
        ({"vocab_size": V + 1}, "rows of the unembedding"),
    ):
        with pytest.raises(UserError) as error:
            ops.linear_divergence(h, w, ht, wt, **settings)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="needs ids"):
        ops.linear_divergence_loss(h, w, ht, wt, weights, token_transform=_constant_factor)
    with pytest.raises(NotImplementedError, match="Pallas"):
        ops.linear_logprob(h, w, ids, implementation="pallas")
    for wrong in ((h, w[:, :3], ht, wt), (h, w, ht[:3], wt), (h, w, ht, wt[:9])):
        with pytest.raises(ValueError, match="want h"):
            ops.linear_divergence(*wrong)
    with pytest.raises(ValueError, match="token_weights"):
        ops.linear_divergence_loss(h, w, ht, wt, weights[:3])


def test_default_tile():
    assert default_tile(0, 20) == 1
    assert default_tile(10_000, 20) == 10_000  # a toy vocabulary: one tile, no loop
    assert default_tile(1024, 8192) == 512
    assert default_tile(16_384, 151_936) == 256
    assert default_tile(300, 151_936) == 256 and default_tile(1000, 151_936) == 256
    assert default_tile(100, 10**7) == 8
    for n, vocab in ((1000, 50_000), (16_384, 100_000), (4097, 32_000)):
        assert default_tile(n, vocab) * vocab * 4 <= 160 * 2**20


# ---- memory and the mesh -------------------------------------------------------------------------


def test_no_logits_of_all_tokens_exist():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs(n=1024, vocab=4096)]

    def temporaries(form, **settings):
        def run(h, w, ht, wt, ids, weights):
            return FORMS[form]((h, w, ht, wt, ids, weights), **settings)

        return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 1024 * 4096 * 4
    assert temporaries("loss", implementation="reference") > logits
    assert temporaries("loss", tile=64) < logits / 2
    assert temporaries("token", tile=64, save_logits_bytes=0) < logits / 2
    # The per-token form keeps both sides' log-probs exactly where the setting has room for them.
    assert temporaries("token", tile=64, save_logits_bytes=2 * logits - 1) < logits / 2
    assert temporaries("token", tile=64, save_logits_bytes=2 * logits) > 2 * logits


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd(0.5)", "topk(8)"])
def test_kept_log_probs_give_the_gradients_of_recomputed_ones(divergence):
    inputs = _inputs(n=37, vocab=101)
    kept, recomputed = (
        _token_form(inputs, divergence=divergence, tile=8, save_logits_bytes=size) for size in (2**30, 0)
    )
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_products_with_the_unembedding_are_four_or_six():
    def products(form, **settings):
        def run(*inputs):
            return form(inputs, tile=8, **settings)

        jaxpr = str(jax.make_jaxpr(run)(*_inputs()))
        return jaxpr.count("dot_general")

    assert products(_loss_form) == 4
    assert products(_token_form) == 4  # kept by default at this size
    assert products(_token_form, save_logits_bytes=0) == 6


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "mixed_kl(0.5)", "jsd(0.5)", "topk(64)"])
def test_memory_at_the_size_of_qwen3_4b_is_at_most_3_gib(form, divergence):
    n, depth, vocab = 16_384, 2560, 151_936
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(n, depth), (vocab, depth)] * 2]
    shapes += [jax.ShapeDtypeStruct((n,), jnp.int32), jax.ShapeDtypeStruct((n,), jnp.float32)]

    def run(*inputs):
        return FORMS[form](inputs, divergence=divergence)

    memory = jax.jit(run).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 3 * 2**30


SHARDED = """
    import re
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sdzero_jax import ops
    from test_linear_divergence import _inputs

    TILE, D = 8, 16
    KINDS = r"(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"


    def largest_in_loop(text):
        # Elements of the largest collective outside of the entry computation: in a loop's body.
        largest, entry = 0, False
        for line in text.splitlines():
            if line.startswith(("ENTRY", "%")) and line.endswith("{"):
                entry = line.startswith("ENTRY")
            found = re.search(r" = (.*?) " + KINDS + r"(-start)?\\(", line)
            if found and not entry:
                for dims in re.findall(r"\\[([0-9,]*)\\]", found[1]):
                    largest = max(largest, int(np.prod([int(d) for d in dims.split(",") if d] or [1])))
        return largest


    def loss(h, w, ht, wt, ids, weights):
        return ops.linear_divergence_loss(h, w, ht, wt, weights, ids=ids, tile=TILE)


    def token(h, w, ht, wt, ids, weights, kept=0):
        out = ops.linear_divergence(h, w, ht, wt, ids=ids, tile=TILE, save_logits_bytes=kept)
        return (out.value * weights + 0.1 * out.logp_student).sum(), out


    def keeping(*inputs):
        return token(*inputs, kept=8 * 144 * 64 // 8)  # what one of the eight devices needs


    for n, form, shape in (
        (144, loss, (2, 4, 1)), (144, token, (2, 4, 1)), (141, loss, (2, 4, 1)),
        (144, loss, (1, 1, 4)), (144, loss, (1, 2, 4)), (144, token, (1, 2, 4)),
        (144, keeping, (2, 4, 1)), (141, keeping, (2, 4, 1)), (144, keeping, (1, 2, 4)), (144, token, (1, 1, 4)),
    ):
        inputs = _inputs(n=n, vocab=64)
        step = lambda: jax.jit(jax.value_and_grad(form, argnums=(0, 1), has_aux=True))
        want = jax.device_get(step()(*inputs))
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)
        rows = P(("data", "fsdp")) if n % (shape[0] * shape[1]) == 0 else P()
        specs = (rows, P("tensor", "fsdp"), rows, P("tensor", "fsdp"), rows, rows)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs)]
            compiled = step().lower(*placed).compile()
            got = jax.device_get(compiled(*placed))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), (form, shape, np.abs(a - b).max())
        size = largest_in_loop(compiled.as_text())
        assert size <= TILE * D, (form, shape, size)
        assert (size > 0) == (shape[2] > 1), "the vocabulary's reductions are the loop's only collectives"
    print("sharded ok")
"""


@pytest.mark.slow
def test_sharded_equals_unsharded_and_moves_no_more_than_a_tile_in_the_loop():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    program = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded ok" in done.stdout
