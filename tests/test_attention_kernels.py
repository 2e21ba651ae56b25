"""The fused attention kernels against the reference, and which of them is chosen.

Splash runs in Pallas' interpreter. cuDNN runs nowhere here: a twin takes the arguments that it would get
and does what it does with them, its vices included. Run as a script (in a subprocess with eight CPU
devices) this file compares a mesh with one device.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import oracle

from kernels import attention_chunked, attention_splash
from sdzero_jax.models import DecoderConfig, LanguageModel

# The package exports the function under the module's name.
ops = importlib.import_module("sdzero_jax.ops.attention")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("quick_compiles")


# ---- splash --------------------------------------------------------------------------------------


@pytest.fixture
def on_tpu(monkeypatch):
    """The choices of a TPU, and splash in the interpreter with blocks of 128."""
    interpreted = functools.partial(attention_splash.splash_attention, interpret=True)
    monkeypatch.setattr(ops, "_platform", lambda: "tpu")
    monkeypatch.setattr(ops, "splash_attention", interpreted)
    monkeypatch.setattr(attention_splash, "BLOCK", 128)


def rows(kind, batch=2, length=200, heads=4, kv_heads=1, width=64, seed=7):
    """Rows as the train step has them: `packed` several segments and padding, `padded` one and padding, or `full`."""
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, heads, width), *[(batch, length, kv_heads, width)] * 2)
    qkv = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    positions, segments = np.zeros((2, batch, length), np.int32)
    for row in range(batch):
        # The last row of the padded ones is padding alone.
        cuts = {"full": [length], "padded": [length // (row + 1) - 9] if row + 1 < batch else [0]}
        cuts["packed"] = [31 + row, 70, 20, 64]
        start = 0
        for number, size in enumerate(cuts[kind], start=1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
        if kind == "padded":  # as the batches write them: counted on through the padding
            positions[row] = np.arange(length)
    where = dict(q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments)
    return qkv, where


def value_and_grads(implementation, qkv, where, **more):
    target = np.random.default_rng(5).standard_normal(qkv[0].shape).astype(np.float32)

    def loss(*x):
        out = ops.attention(*x, **where, implementation=implementation, **more)
        return jnp.sum(out * target), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)


def assert_same(got, want, atol=2e-5):
    (_, got_out), got_grads = got
    (_, want_out), want_grads = want
    np.testing.assert_allclose(got_out, want_out, atol=atol)
    assert np.abs(want_out).max() > 0.5
    for one, other in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)
    assert np.abs(want_grads[2]).max() > 0.5  # with a window of 1 those of queries and keys are 0


SPLASH_CASES = [
    ("packed", 33, dict(width=64)),
    pytest.param("packed", None, dict(width=128, kv_heads=4), marks=pytest.mark.slow),
    pytest.param("packed", 1, dict(width=128), marks=pytest.mark.slow),
    pytest.param("padded", None, dict(width=128), marks=pytest.mark.slow),
    pytest.param("padded", 100, dict(width=64, kv_heads=4), marks=pytest.mark.slow),
    pytest.param("full", None, dict(width=128, length=256), marks=pytest.mark.slow),
    pytest.param("full", 1000, dict(width=64, kv_heads=2), marks=pytest.mark.slow),
    pytest.param("full", 129, dict(width=64, length=385, batch=1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, window, shape", SPLASH_CASES)
def test_splash_equals_reference_forward_and_backward(on_tpu, kind, window, shape):
    qkv, where = rows(kind, **shape)
    layout = "packed" if kind == "packed" else "padded"
    got = value_and_grads("splash", qkv, where, window=window, layout=layout)
    assert_same(got, value_and_grads("reference", qkv, where, window=window))
    padding = where["q_segments"] == 0
    assert (np.asarray(got[0][1])[padding] == 0).all()
    for grad in got[1]:
        assert (np.asarray(grad)[padding] == 0).all()


@pytest.mark.slow
def test_splash_in_bfloat16(on_tpu):
    qkv, where = rows("packed", width=128)
    qkv = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv)
    out = ops.attention(*qkv, **where, layout="packed", implementation="splash")
    assert out.dtype == jnp.bfloat16
    want = oracle(*(np.asarray(x, np.float64) for x in qkv), **where)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2)


# ---- cuDNN ---------------------------------------------------------------------------------------


class CudnnTwin:
    """Takes cuDNN's arguments, records them, and does what it does: nan in padding, and the window's vice."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, *, implementation, is_causal, local_window_size, **lengths):
        assert implementation == "cudnn"
        self.calls.append(dict(is_causal=is_causal, local_window_size=local_window_size, **lengths))
        real = jnp.arange(q.shape[1])[None] < lengths["query_seq_lengths"][:, None]
        index = jnp.arange(q.shape[1])
        distance = index[:, None] - index[None]
        mask = (distance >= 0) if is_causal else jnp.ones_like(distance, bool)
        if local_window_size is not None:
            mask &= distance <= local_window_size[0]  # the left bound alone
        mask = mask[None] & real[:, None, :]
        q, k, v = (_poison(x, real) for x in (q, k, v))
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k) / np.sqrt(q.shape[3])
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)
        return jnp.where(real[:, :, None, None], out, jnp.nan)


@jax.custom_vjp
def _poison(x, real):
    """x, with a gradient of nan where a row is padding."""
    return x


_poison.defvjp(lambda x, real: (x, real), lambda real, g: (jnp.where(real[:, :, None, None], g, jnp.nan), None))


@pytest.fixture
def on_gpu(monkeypatch):
    twin = CudnnTwin()
    monkeypatch.setattr(ops, "_platform", lambda: "gpu")
    monkeypatch.setattr(ops, "_compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", twin)
    return twin


@pytest.mark.parametrize("window", [None, 1, 50, 1000])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cudnns_arguments_give_the_references_result(on_gpu, monkeypatch, kv_heads, window):
    monkeypatch.setattr(ops, "_unfit", lambda *_: None)  # float32, to compare tightly
    qkv, where = rows("padded", batch=3, length=70, kv_heads=kv_heads, width=16)
    got = value_and_grads("cudnn", qkv, where, window=window, layout="padded")
    assert_same(got, value_and_grads("reference", qkv, where, window=window))
    (call,) = on_gpu.calls
    assert call["is_causal"] is True  # also with a window, or cuDNN lets a query see the future
    assert call["local_window_size"] == (None if window is None else (window - 1, 0))


def test_cudnn_is_told_the_lengths(on_gpu):
    (q, k, v), where = rows("padded", batch=3, length=70)
    ops.attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), **where, layout="padded")
    (call,) = on_gpu.calls
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        np.testing.assert_array_equal(call[name], [61, 26, 1])  # the last row is all padding
        assert call[name].dtype == jnp.int32


def test_jax_takes_the_arguments_that_cudnn_is_given(monkeypatch):
    """The same call with jax's own XLA path in cuDNN's place: names and meanings of the arguments are jax's."""
    xla = jax.nn.dot_product_attention
    replaced = lambda *x, implementation, **arguments: xla(*x, **arguments, implementation="xla")  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", replaced)
    monkeypatch.setattr(ops, "_unfit", lambda *_: None)
    qkv, where = rows("padded", batch=2, length=40, width=16)
    where = {name: x[:1] for name, x in where.items()}
    qkv = tuple(x[:1] for x in qkv)
    got = value_and_grads("cudnn", qkv, where, window=7, layout="padded")
    assert_same(got, value_and_grads("reference", qkv, where, window=7))


# ---- the choice ----------------------------------------------------------------------------------


def chosen(monkeypatch, platform, layout, *, dtype="bfloat16", width=128, length=64, kv_len=None, capability=9.0):
    monkeypatch.setattr(ops, "_platform", lambda: platform)
    monkeypatch.setattr(ops, "_compute_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, length, 4, width), dtype)
    k = jax.ShapeDtypeStruct((1, kv_len or length, 2, width), dtype)
    return ops._choose("auto", q, k, layout)


@pytest.mark.parametrize(
    "want, platform, layout, settings",
    [
        ("reference", "cpu", "padded", {}),
        ("chunked", "cpu", "padded", dict(length=2048)),
        ("splash", "tpu", "padded", {}),
        ("splash", "tpu", "packed", dict(length=2048)),
        ("splash", "tpu", "packed", dict(width=64, dtype="float32")),
        ("reference", "tpu", "any", {}),
        ("chunked", "tpu", "any", dict(length=2048)),
        ("reference", "tpu", "packed", dict(width=16)),
        ("reference", "tpu", "padded", dict(dtype="float16")),
        ("reference", "tpu", "padded", dict(kv_len=65)),
        ("cudnn", "gpu", "padded", {}),
        ("cudnn", "gpu", "padded", dict(dtype="float16", width=72)),
        ("cudnn", "gpu", "padded", dict(width=256)),
        ("reference", "gpu", "packed", {}),
        ("chunked", "gpu", "packed", dict(length=2048)),
        ("reference", "gpu", "any", {}),
        ("reference", "gpu", "padded", dict(dtype="float32")),
        ("reference", "gpu", "padded", dict(width=36)),
        ("reference", "gpu", "padded", dict(width=256, capability=8.9)),
        ("reference", "gpu", "padded", dict(capability=7.5)),
        ("reference", "gpu", "padded", dict(capability=0.0)),
    ],
)
def test_auto_takes_what_can_do_the_job(monkeypatch, want, platform, layout, settings):
    assert chosen(monkeypatch, platform, layout, **settings) == want


@pytest.mark.parametrize(
    "kernel, platform, layout, reason",
    [
        ("splash", "cpu", "padded", "needs a TPU, and this is a cpu"),
        ("splash", "tpu", "any", "needs rows of layout packed or padded"),
        ("cudnn", "cpu", "padded", "needs an NVIDIA GPU, and this is a cpu"),
        ("cudnn", "gpu", "any", "needs rows of layout packed or padded"),
        ("cudnn", "gpu", "packed", "sees across segments"),
        ("cudnn", "gpu", "padded", "needs float16 or bfloat16, not float32"),
    ],
)
def test_a_kernel_by_name_that_cannot_do_the_job_says_why(monkeypatch, kernel, platform, layout, reason):
    monkeypatch.setattr(ops, "_platform", lambda: platform)
    qkv, where = rows("padded")
    with pytest.raises(NotImplementedError, match=reason):
        ops.attention(*qkv, **where, layout=layout, implementation=kernel)


def test_the_platform_is_that_of_the_mesh():
    assert ops._platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert ops._platform() == "tpu"


# ---- in the decoder ------------------------------------------------------------------------------


def tiny(attention, **settings):
    return LanguageModel(
        DecoderConfig(40, 32, 2, 4, 2, 64, 48, layer_pattern=("sliding", "full"), sliding_window=20,
                      attention=attention, initializer_range=0.2, **settings)
    )  # fmt: skip


def test_parameters_do_not_depend_on_the_kernels_device():
    assert tiny("splash").param_shapes() == tiny("auto").param_shapes()


def layouts_seen(monkeypatch, run):
    seen = []

    def record(*args, layout, implementation, **more):
        seen.append((layout, implementation, args[1].shape[1]))
        return ops.attention(*args, layout=layout, implementation="reference", **more)

    monkeypatch.setattr("sdzero_jax.models.decoder.attention", record)
    run()
    return set(seen)


def test_what_the_decoder_promises(monkeypatch):
    model = tiny("splash")
    shapes, tokens = model.param_shapes(), jnp.ones((1, 6), jnp.int32)

    def seen(**more):
        run = functools.partial(model.apply, **more)
        return layouts_seen(monkeypatch, lambda: jax.eval_shape(run, shapes, tokens))

    assert seen() == {("padded", "splash", 6)}  # nothing given: positions 0 to 5 of one segment
    assert seen(segment_ids=tokens) == {("any", "splash", 6)}
    assert seen(positions=tokens) == {("any", "splash", 6)}
    assert seen(segment_ids=tokens, row_layout="packed") == {("packed", "splash", 6)}
    # A cache is read by an operator of its own; one that is promised to be empty is not read.
    assert seen(cache=model.init_cache(1, 9, tail=6)) == set()
    assert seen(cache=model.init_cache(1, 9, tail=6), row_layout="padded") == {("padded", "splash", 6)}


def test_prefill_of_an_empty_cache_equals_reading_it_back():
    model = tiny("auto")
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 33), 0, 40)
    segments = (jnp.arange(33)[None] < jnp.array([[33], [12], [0]])).astype(jnp.int32)
    cache = model.init_cache(3, 40, tail=33)

    @jax.jit
    def both(params):
        run = functools.partial(model.apply, params, tokens, segment_ids=segments, cache=cache)
        return run(), run(row_layout="padded")

    (want, want_cache), (got, got_cache) = both(params)
    np.testing.assert_allclose(got[segments == 1], want[segments == 1], atol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got_cache, want_cache)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_decoder_with_splash_equals_one_without(on_tpu, remat):
    _, where = rows("packed")
    tokens = jax.random.randint(jax.random.key(1), where["q_segments"].shape, 0, 40)
    params = tiny("auto").init(jax.random.key(0))
    real = (where["q_segments"] != 0)[..., None]

    def grads(attention):
        def loss(params):
            hidden, _ = tiny(attention, remat=remat).apply(
                params, tokens, positions=where["q_positions"], segment_ids=where["q_segments"], row_layout="packed"
            )
            return jnp.sum(jnp.where(real, hidden, 0.0) ** 3)

        return jax.jit(jax.value_and_grad(loss))(params)

    (got, got_grads), (want, want_grads) = grads("splash"), grads("reference")
    np.testing.assert_allclose(got, want, rtol=1e-4)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want_grads))
    assert scale > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), got_grads, want_grads)


# ---- on a mesh -----------------------------------------------------------------------------------


def test_key_heads_are_repeated_no_more_than_needed():
    assert ops._key_repeats(32, 8, 4) == 1
    assert ops._key_repeats(32, 8, 16) == 2
    assert ops._key_repeats(8, 2, 8) == 4
    assert ops._key_repeats(12, 2, 3) == 3  # 6 key heads over 3 parts, 2 queries each
    assert ops._key_repeats(18, 6, 9) == 3


def on_eight_devices():
    """Largest differences between a mesh and one device, by (mesh shape, implementation)."""
    from sdzero_jax import sharding

    jax.config.update("jax_default_matmul_precision", "highest")
    ops._platform = lambda: "tpu"
    ops.splash_attention = functools.partial(attention_splash.splash_attention, interpret=True)
    attention_splash.BLOCK = 128
    attention_chunked.QUERY_BLOCK, attention_chunked.KV_BLOCK = 64, 128
    out = {}
    # The second has fewer key heads than parts, in the third neither rows nor heads divide.
    cases = [((2, 2, 2), (4, 4, 2)), ((1, 2, 4), (2, 8, 2)), ((2, 2, 2), (3, 3, 1))]
    for shape, (batch, heads, kv_heads) in cases:
        mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
        qkv, where = rows("packed", batch=batch, heads=heads, kv_heads=kv_heads)
        want = value_and_grads("reference", qkv, where, window=60)
        for implementation in ("splash", "chunked"):
            with sharding.use(mesh):
                got = value_and_grads(implementation, qkv, where, window=60, layout="packed")
            pairs = zip(jax.tree.leaves(got)[1:], jax.tree.leaves(want)[1:], strict=True)  # without the sums
            difference = max(float(np.abs(a - b).max()) for a, b in pairs)
            out[f"{shape} {batch} {heads} {kv_heads} {implementation}"] = difference
    print(json.dumps(out))


@pytest.mark.slow
def test_a_mesh_of_eight_computes_what_one_device_computes():
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    child = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    differences = json.loads(child.stdout.splitlines()[-1])
    assert len(differences) == 6
    assert max(differences.values()) < 3e-5, differences


if __name__ == "__main__":
    on_eight_devices()
