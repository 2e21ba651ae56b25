"""The fused Pallas kernels, interpreted on the CPU, against float64 brute force and the dense reference."""

import dataclasses
import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_linear_divergence import FORMS, _inputs, _loss_form, _oracle, _relative, _token_form

from kernels import linear_divergence_gpu, linear_divergence_tpu
from sdzero_jax import losses, ops
from sdzero_jax.errors import UserError

operator = importlib.import_module("sdzero_jax.ops.linear_divergence")
ROOT = Path(__file__).resolve().parents[1]
N, D, D2, V = 37, 16, 12, 53
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)  # noqa: E731
BOTH_FORMS = ["loss", slow("token")]
DIVERGENCES = ["reverse_kl", "jsd(0.1)", slow("forward_kl"), slow("mixed_kl(weight=0.2)"), slow("jsd(0.5)")]


def interpret(monkeypatch, blocks=(16, 24)):
    """Makes implementation="pallas" run the TPU kernels on the CPU, in blocks that divide neither N nor V."""
    build = operator._fused_settings

    def settings(*arguments):
        return dataclasses.replace(build(*arguments), interpret=True, blocks=blocks)

    monkeypatch.setattr(operator, "_platform", lambda: "tpu")
    monkeypatch.setattr(operator, "_fused_settings", settings)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    interpret(monkeypatch)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _pallas(form, inputs, **settings):
    return FORMS[form](inputs, implementation="pallas", **settings)


@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_equal_float64_brute_force(form, divergence):
    inputs = _inputs()  # with tokens of weight 0
    want, dh, dw = _oracle(divergence, *inputs, temperature=1.3)
    (total, out), gradients = _pallas(form, inputs, divergence=divergence, temperature=1.3)
    for got, expected in zip(out, want):
        assert got.dtype == jnp.float32 and got.shape == (N,)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, np.sum(np.asarray(inputs[5]) * want[0]), rtol=1e-5)
    assert _relative(gradients[0], dh) < 1e-5
    assert _relative(gradients[1], dw) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(16, 53), (64, 8), (64, 64)])  # one block of columns, of tokens, of both
def test_every_block_gives_the_same(monkeypatch, blocks):
    want, dh, dw = _oracle("mixed_kl(0.5)", *_inputs())
    interpret(monkeypatch, blocks)
    (_, out), gradients = _pallas("loss", _inputs(), divergence="mixed_kl(0.5)")
    for got, expected in zip(out, want):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert _relative(gradients[0], dh) < 1e-5 and _relative(gradients[1], dw) < 1e-5


@pytest.mark.parametrize("form", BOTH_FORMS)
def test_bfloat16_with_float32_master_weights(form):
    h, w, ht, wt, ids, weights = _inputs(dtype=jnp.bfloat16)
    inputs = (h, w.astype(jnp.float32), ht, wt, ids, weights)
    want, dh, dw = _oracle("reverse_kl", *inputs)
    (_, out), gradients = _pallas(form, inputs)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    np.testing.assert_allclose(out.value, want[0], rtol=1e-5, atol=1e-5)
    assert _relative(gradients[0], dh) < 2e-2 and _relative(gradients[1], dw) < 2e-2


@pytest.mark.parametrize("form", BOTH_FORMS)
@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one(form, n):
    inputs = _inputs(n=n)
    (total, out), (dh, dw) = _pallas(form, inputs, divergence="jsd(0.5)")
    assert out.value.shape == (n,) and dh.shape == (n, D) and dw.shape == (V, D)
    if n == 0:
        assert total == 0 and np.all(dw == 0)
        return
    inputs = (*inputs[:5], jnp.ones(1))
    (_, out), (dh, dw) = _pallas(form, inputs, divergence="jsd(0.5)")
    want, want_dh, want_dw = _oracle("jsd(0.5)", *inputs)
    np.testing.assert_allclose(out.value, want[0], rtol=1e-5)
    assert _relative(dh, want_dh) < 1e-5 and _relative(dw, want_dw) < 1e-5


@pytest.mark.parametrize("divergence", ["reverse_kl", "mixed_kl(0.5)"])  # the mixture holds both KLs
@pytest.mark.parametrize("form", BOTH_FORMS)
def test_student_equal_to_teacher_gives_exactly_zero(form, divergence):
    h, w, _, _, ids, weights = _inputs(vocab=101)
    (total, out), gradients = _pallas(form, (h, w, h, w, ids, weights), divergence=divergence, temperature=0.7)
    assert total == 0 and np.all(out.value == 0)
    assert all(np.all(g == 0) for g in gradients)


def test_tokens_of_weight_zero_add_exactly_nothing():
    h, w, ht, wt, ids, weights = _inputs()
    bad = weights == 0
    clean = (jnp.where(bad[:, None], 0, h), w, jnp.where(bad[:, None], 0, ht), wt, ids, weights)
    dirty = (jnp.where(bad[:, None], jnp.nan, h), w, jnp.where(bad[:, None], jnp.inf, ht), wt, ids, weights)
    want, want_gradients = _pallas("loss", clean)
    got, gradients = _pallas("loss", dirty)
    assert not np.isfinite(got[1].value[bad]).any()  # they were really bad
    assert got[0] == want[0]
    for a, b in zip(gradients, want_gradients):
        np.testing.assert_array_equal(a, b)


def _with_holes(side):
    """Inputs where `side` ("student" or "teacher") has a logit of -inf at entry 3 for every second token."""
    h, w, ht, wt, ids, _ = _inputs()
    hole = (jnp.arange(N) % 2)[:, None].astype(jnp.float32)
    row = lambda w: jnp.where(jnp.arange(V) == 3, -3e38, 0.0)[:, None].astype(w.dtype)  # noqa: E731
    column = lambda w: jnp.zeros((V, 1), w.dtype)  # noqa: E731
    h, ht = (jnp.concatenate([x, 2 * hole], axis=1) for x in (h, ht))
    w, wt = (
        jnp.concatenate([x, (row if side in (name, "both") else column)(x)], axis=1)
        for x, name in ((w, "student"), (wt, "teacher"))
    )
    return (h, w, ht, wt, jnp.where(ids == 3, 4, ids), jnp.ones(N)), hole[:, 0] > 0


@pytest.mark.parametrize(("side", "divergence"), [slow("student", "forward_kl"), ("teacher", "reverse_kl")])
def test_infinite_tokens_are_counted_and_have_no_gradient(side, divergence):
    inputs, holes = _with_holes(side)
    for form in FORMS if divergence == "forward_kl" else ["loss"]:
        (total, out), gradients = _pallas(form, inputs, divergence=divergence)
        assert np.isposinf(total) and np.all(np.isposinf(out.value) == holes)
        kept = (*inputs[:5], jnp.where(holes, 0.0, 1.0))
        _, want = _loss_form(kept, divergence=divergence, implementation="reference")
        assert np.all(gradients[0][holes] == 0)
        assert _relative(gradients[0], want[0]) < 1e-5 and _relative(gradients[1], want[1]) < 1e-5


@pytest.mark.parametrize(
    ("side", "divergence"),
    [
        ("both", "mixed_kl(0.5)"),
        slow("both", "jsd(0.5)"),
        slow("student", "reverse_kl"),
        slow("teacher", "forward_kl"),
        slow("student", "jsd(0.3)"),
        slow("teacher", "jsd(0.3)"),
    ],
)
def test_minus_infinity_where_the_divergence_stays_finite(side, divergence):
    inputs, _ = _with_holes(side)
    for form in FORMS if side != "both" else ["loss"]:
        (total, out), gradients = _pallas(form, inputs, divergence=divergence)
        (want_total, want), want_gradients = FORMS[form](inputs, divergence=divergence, implementation="reference")
        np.testing.assert_allclose(total, want_total, rtol=1e-5)
        for a, b in zip(out, want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients, want_gradients):
            assert _relative(a, np.asarray(b)) < 1e-5


@pytest.mark.parametrize("form", BOTH_FORMS)
def test_padding_of_the_vocabulary_counts_as_minus_infinity(form):
    h, w, ht, wt, ids, weights = _inputs()
    want, dh, dw = _oracle("mixed_kl(0.5)", h, w, ht, wt, ids, weights)
    wide = [jnp.concatenate([x, jnp.full((30, x.shape[1]), jnp.inf)]) for x in (w, wt)]  # past a whole block
    inputs = (h, wide[0], ht, wide[1], ids, weights)
    (_, out), (dh2, dw2) = _pallas(form, inputs, divergence="mixed_kl(0.5)", vocab_size=V)
    for got, expected in zip(out, want):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert _relative(dh2, dh) < 1e-5 and _relative(dw2[:V], dw) < 1e-5
    assert np.all(dw2[V:] == 0)


def test_large_offsets_of_the_logits_cost_no_accuracy():
    """Differences are taken below the running maxima, not between raw logits of very different height."""
    h, w, ht, wt, ids, weights = _inputs()
    one, plus = jnp.ones((N, 1)), jnp.full((V, 1), 512.0)
    inputs = (h, w, jnp.concatenate([ht, one], 1), jnp.concatenate([wt, plus], 1), ids, weights)
    for divergence in ("mixed_kl(0.5)", "jsd(0.5)"):
        want, _, _ = _oracle(divergence, h, w, ht, wt, ids, weights)
        (_, out), _ = _pallas("loss", inputs, divergence=divergence)
        np.testing.assert_allclose(out.value, want[0], rtol=2e-4)  # the logits themselves have ulp 6e-5
        np.testing.assert_allclose(out.entropy, want[3], rtol=1e-5)


@pytest.mark.slow
def test_token_form_differentiates_logp_and_entropy_too():
    h, w, ht, wt, ids, weights = _inputs()
    for divergence in ("reverse_kl", "jsd(0.3)"):

        def loss(h, w, implementation, divergence=divergence):
            out = ops.linear_divergence(
                h, w, ht, wt, ids=ids, divergence=divergence, temperature=1.3, implementation=implementation
            )
            return jnp.sum(weights * (out.value + 2 * out.logp_student - 3 * out.entropy))

        got, want = (jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(h, w, i) for i in ("pallas", "reference"))
        assert _relative(got[0], want[0]) < 1e-5 and _relative(got[1], want[1]) < 1e-5


def test_token_transform_is_a_constant_factor():
    inputs = _inputs()
    h, w, ht, wt, ids, weights = inputs
    values, _, _ = _oracle("reverse_kl", *inputs)
    rollout = jnp.asarray(values[1] + np.random.default_rng(5).normal(size=N), jnp.float32)

    def transform(value, logp_student, logp_rollout):
        return losses.token_clip_factor(value, 0.3) * losses.importance_weight(logp_student, logp_rollout, 2.0)

    factor = np.minimum(1, 0.3 / values[0]) * np.minimum(np.exp(values[1] - np.asarray(rollout, np.float64)), 2)
    want, dh, dw = _oracle("reverse_kl", h, w, ht, wt, ids, np.asarray(weights) * factor)
    (total, out), gradients = _pallas("loss", inputs, token_transform=transform, token_inputs=(rollout,))
    np.testing.assert_allclose(total, np.sum(np.asarray(weights) * factor * want[0]), rtol=1e-5)
    np.testing.assert_allclose(out.value, want[0], rtol=1e-5)
    assert _relative(gradients[0], dh) < 1e-5 and _relative(gradients[1], dw) < 1e-5


def test_ids_outside_the_vocabulary_and_no_ids():
    h, w, ht, wt, ids, weights = _inputs()
    got, want = (
        _token_form((h, w, ht, wt, ids.at[0].set(-1), weights), implementation=i)[0][1] for i in ("pallas", "chunked")
    )
    assert got.logp_student[0] == want.logp_student[0] == 0
    out = ops.linear_divergence(h, w, ht, wt, implementation="pallas")
    assert out.logp_student is None and out.logp_teacher is None
    np.testing.assert_allclose(out.value, want.value, rtol=1e-5)
    total, _ = ops.linear_divergence_loss(h, w, ht, wt, weights, implementation="pallas")
    np.testing.assert_allclose(total, jnp.sum(weights * want.value), rtol=1e-5)


# ---- the GPU kernels ---------------------------------------------------------------------------------


def _gpu_inputs(n=70, depth=64, depth_teacher=128, vocab=300):
    """Two blocks of tokens, three of columns, none full; one strip of hidden units and two."""
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    ids = jnp.asarray(rng.integers(0, vocab, size=n), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=n) * (np.arange(n) % 3 > 0), jnp.float32)
    return make(n, depth), make(vocab, depth), make(n, depth_teacher), make(vocab, depth_teacher), ids, weights


@pytest.fixture
def gpu(monkeypatch):
    if jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU's interpreter needs jax 0.11")
    monkeypatch.setattr(operator, "_platform", lambda: "gpu")
    monkeypatch.setattr(linear_divergence_gpu, "BAND", 256)  # two bands, the second overlapping


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "mixed_kl(0.5)", "jsd(0.1)"])
def test_gpu_kernels_equal_the_reference(gpu, form, divergence):
    settings = {"divergence": divergence, "temperature": 1.3, "vocab_size": 290}
    (total, out), gradients = _pallas(form, _gpu_inputs(), **settings)
    (want_total, want), want_gradients = FORMS[form](_gpu_inputs(), **settings, implementation="reference")
    np.testing.assert_allclose(total, want_total, rtol=1e-5)
    for a, b in zip(out, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, want_gradients):
        assert _relative(a, np.asarray(b.astype(jnp.float32))) < 2e-2


@pytest.mark.slow
def test_gpu_kernels_give_exactly_zero_for_equal_models(gpu):
    h, w, _, _, ids, weights = _gpu_inputs()
    (total, out), gradients = _pallas("loss", (h, w, h, w, ids, weights), divergence="mixed_kl(0.5)")
    assert total == 0 and np.all(out.value == 0)
    assert all(np.all(g == 0) for g in gradients)


@pytest.mark.parametrize("divergence", ["mixed_kl(0.5)", slow("jsd(0.5)")])
def test_gpu_kernels_lower_at_the_size_of_qwen3_4b(gpu, monkeypatch, divergence):
    """No compiler for GPUs is asked, only that Mosaic GPU has a rule and a layout for everything."""
    build = operator._fused_settings
    settings = lambda *arguments: dataclasses.replace(build(*arguments), interpret=False)  # noqa: E731
    monkeypatch.setattr(operator, "_fused_settings", settings)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)  # noqa: E731
    n, depth, vocab = 16_384, 2560, 151_936
    inputs = [shape(n, depth), shape(vocab, depth)] * 2 + [jax.ShapeDtypeStruct((n,), d) for d in ("int32", "float32")]

    def run(*inputs):
        return _pallas("token", inputs, divergence=divergence)

    lowered = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") > 10


def test_gpu_kernels_say_what_they_need(monkeypatch):
    monkeypatch.setattr(operator, "_platform", lambda: "gpu")
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        _pallas("loss", _inputs())
    with pytest.raises(NotImplementedError, match="divides by 64" if jax.__version_info__ >= (0, 11) else "jax 0.11"):
        _pallas("loss", _inputs(dtype=jnp.bfloat16))


# ---- what the kernels refuse ------------------------------------------------------------------------


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    h, w, ht, wt, ids, weights = _inputs()
    for divergence in ("topk(5)", "sampled_token", "pointwise_clip(0.05)", lambda s, t: jnp.sum(s - t, -1)):
        with pytest.raises(NotImplementedError, match="forward_kl, reverse_kl, mixed_kl, jsd"):
            ops.linear_divergence(h, w, ht, wt, ids=ids, divergence=divergence, implementation="pallas")
    with pytest.raises(NotImplementedError, match="not float16"):
        half = (x.astype(jnp.float16) for x in (h, w, ht, wt))
        ops.linear_divergence(*half, implementation="pallas")
    with pytest.raises(NotImplementedError):
        ops.linear_logprob_loss(h, w, ids, weights, implementation="pallas")
    with pytest.raises(UserError, match="did you mean 'reverse_kl'"):
        ops.linear_divergence(h, w, ht, wt, divergence="revers_kl", implementation="pallas")
    monkeypatch.setattr(operator, "_platform", lambda: "cpu")
    with pytest.raises(NotImplementedError, match="not cpu"):
        ops.linear_divergence(h, w, ht, wt, implementation="pallas")
    ops.linear_divergence(h, w, ht, wt, implementation="auto")  # chunked


def test_blocks_fit_the_smallest_chip_and_hidden_states_that_fit_none_are_refused():
    settings = operator.fused.Settings(None, 1.0, 0)
    shape = lambda depth, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((16384, depth), dtype)  # noqa: E731
    blocks = lambda *args: linear_divergence_tpu._blocks(*args, 151_936, settings, True)  # noqa: E731
    assert blocks(shape(2560), shape(2560))[0] >= 512 and blocks(shape(4096), shape(4096))[0] >= 512
    assert blocks(shape(64), shape(64)) == (1024, 512)
    with pytest.raises(NotImplementedError, match="16384"):
        blocks(shape(16384, jnp.float32), shape(16384, jnp.float32))


# ---- tokens over a mesh ------------------------------------------------------------------------------

SHARDED = """
    import jax, numpy as np, pytest
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sdzero_jax import ops
    from test_kernels import interpret
    from test_linear_divergence import _inputs

    patch = pytest.MonkeyPatch()
    interpret(patch)


    def loss(h, w, ht, wt, ids, weights):
        return ops.linear_divergence_loss(h, w, ht, wt, weights, ids=ids, implementation="pallas")


    def token(h, w, ht, wt, ids, weights):
        out = ops.linear_divergence(h, w, ht, wt, ids=ids, divergence="jsd(0.5)", implementation="pallas")
        return (out.value * weights + 0.1 * out.logp_student).sum(), out


    def mesh_of(*shape):
        devices = jax.devices()[: int(np.prod(shape))]
        return jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)


    for n, form in ((36, loss), (35, token)):
        inputs = _inputs(n=n)
        step = lambda: jax.jit(jax.value_and_grad(form, argnums=(0, 1), has_aux=True))
        want = jax.device_get(step()(*inputs))
        mesh = mesh_of(2, 2, 1)
        rows = P(("data", "fsdp")) if n % 4 == 0 else P()
        with jax.set_mesh(mesh):
            specs = (rows, P(), rows, P(), rows, rows)
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs)]
            got = jax.device_get(step()(*placed))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), (form, np.abs(a - b).max())
    with jax.set_mesh(mesh_of(1, 2, 2)), pytest.raises(NotImplementedError, match="tensor"):
        step()(*inputs)
    print("sharded ok")
"""


@pytest.mark.slow
def test_tokens_split_over_a_mesh():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    program = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded ok" in done.stdout
