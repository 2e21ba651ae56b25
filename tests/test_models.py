"""Both families against goldens of transformers, and the model's own promises.

The goldens (tests/make_goldens.py) are random twins in float32: logits, gradients of every
parameter and greedy continuations. Bite checks break one dial at a time and must see them differ.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import TWINS, golden, tiny, tiny_olmo, twin, weights

from sdzero_jax.errors import UserError
from sdzero_jax.models import PRESETS, LanguageModel, convert, decoder, insert

apply = jax.jit(LanguageModel.apply, static_argnums=0, static_argnames="row_layout")


def full_logits(model, params, tokens, **kwargs):
    return model.unembed(params, apply(model, params, tokens, **kwargs)[0])


@pytest.fixture
def optimised():
    """Asked for by tests that look at what the compiler made."""


@pytest.fixture(autouse=True)
def compile_fast(request):
    """The other tests compile more than they compute: unoptimised code halves their time."""
    jax.config.update("jax_disable_most_optimizations", "optimised" not in request.fixturenames)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def ids(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 40, shape))


def mean_nll(model, params, tokens):
    logp = jax.nn.log_softmax(model.unembed(params, model.apply(params, tokens[:, :-1])[0]))
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], 2).mean()


# ----------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("attention", ["reference", "chunked"])
@pytest.mark.parametrize("name", TWINS)
def test_logits(name, attention):
    model, params = twin(name, attention=attention)
    want = golden(name)
    got = full_logits(model, params, want["tokens"])
    np.testing.assert_allclose(got, want["logits"], atol=1e-4)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("name", TWINS)
def test_gradient_of_every_parameter(name):
    model, params = twin(name)
    want = golden(name)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: mean_nll(model, p, want["tokens"])))(params)
    np.testing.assert_allclose(loss, want["loss"][0], rtol=1e-5)
    leaves = dict(convert._leaves(grads))
    table = convert.conversion_table(model)
    assert {f"grad.{entry.name}" for entry in table} == {key for key in want if key.startswith("grad.")}
    for entry in table:
        leaf = leaves[entry.path] if entry.group is None else leaves[entry.path][entry.group]
        theirs = want[f"grad.{entry.name}"]
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(entry.to_hf(np.asarray(leaf)) / scale, theirs / scale, atol=1e-4, err_msg=entry.name)


@pytest.mark.parametrize("name", TWINS)
def test_greedy_decoding_with_the_cache_equals_generate(name):
    model, params = twin(name)
    want = golden(name)
    prompt, generated = want["prompt"], want["generated"]
    new = generated.shape[1]

    @jax.jit
    def generate(params, prompt):
        cache = model.init_cache(prompt.shape[0], prompt.shape[1] + new, tail=prompt.shape[1])
        hidden, cache = apply(model, params, prompt, cache=cache)
        cache = model.commit(cache)

        def step(state, _):
            hidden, cache = state
            token = jnp.argmax(model.unembed(params, hidden[:, -1]), -1)[:, None]
            hidden, cache = apply(model, params, token, cache=cache)
            return (hidden, model.commit(cache)), token[:, 0]

        return jax.lax.scan(step, (hidden[:, -1:], cache), length=new)[1].T

    np.testing.assert_array_equal(generate(params, prompt), generated)


def break_nothing(monkeypatch, config):
    return config


def wrong_theta(monkeypatch, config):
    return dataclasses.replace(config, rope_theta=config.rope_theta * 1.1)


def wrong_sliding_theta(monkeypatch, config):
    return dataclasses.replace(config, rope_theta_sliding=config.rope_theta_sliding * 1.1)


def yarn_on_sliding(monkeypatch, config):
    original = decoder.rope_frequencies
    monkeypatch.setattr(decoder, "rope_frequencies", lambda config, kind: original(config, "full"))
    return config


def no_yarn(monkeypatch, config):
    return dataclasses.replace(config, yarn_factor=1.0, yarn_attention_factor=0.0)


def yarn_length(monkeypatch, config):
    return dataclasses.replace(config, yarn_original_length=2 * config.yarn_original_length)


def yarn_beta_slow(monkeypatch, config):
    return dataclasses.replace(config, yarn_beta_slow=0.3)


def yarn_scale(monkeypatch, config):
    return dataclasses.replace(config, yarn_attention_factor=1.0)


def wider_window(monkeypatch, config):
    return dataclasses.replace(config, sliding_window=config.sliding_window + 1)


def narrower_window(monkeypatch, config):
    return dataclasses.replace(config, sliding_window=config.sliding_window - 1)


def qk_norm_per_head(monkeypatch, config):
    original = decoder._norm
    monkeypatch.setattr(decoder, "_norm", lambda x, scale, eps, axes=(-1,): original(x, scale, eps))
    return config


def qk_norm_over_heads(monkeypatch, config):
    original = decoder._norm
    both = lambda x, scale, eps, axes=(-1,): original(x, scale, eps, (-2, -1) if x.ndim == 4 else axes)  # noqa: E731
    monkeypatch.setattr(decoder, "_norm", both)
    return config


def other_norm_position(monkeypatch, config):
    return dataclasses.replace(config, norm_position="pre" if config.norm_position == "post" else "post")


def all_full(monkeypatch, config):
    return dataclasses.replace(config, sliding_window=10_000)


def epsilon(monkeypatch, config):
    return dataclasses.replace(config, rms_norm_eps=1e-2)


BITES = {
    "olmo3": (
        wrong_theta, wrong_sliding_theta, yarn_on_sliding, no_yarn, yarn_length, yarn_beta_slow, yarn_scale,
        wider_window, narrower_window, qk_norm_per_head, other_norm_position, all_full, epsilon,
    ),
    "qwen3_tied": (wrong_theta, qk_norm_over_heads, other_norm_position, epsilon),
    "qwen3_untied": (wrong_theta, qk_norm_over_heads, other_norm_position, epsilon),
}  # fmt: skip


@pytest.mark.parametrize("name, broken", [(n, b) for n, bs in BITES.items() for b in (break_nothing, *bs)])
def test_a_broken_dial_is_seen(monkeypatch, name, broken):
    model, params = twin(name)
    want = golden(name)
    model = dataclasses.replace(model, config=broken(monkeypatch, model.config))
    # Traced anew: the patched function must not come from jit's cache.
    got = jax.jit(lambda p: model.unembed(p, model.apply(p, want["tokens"])[0]))(params)
    error = np.abs(got - want["logits"]).max()
    assert error < 1e-4 if broken is break_nothing else error > 1e-2, error


# ------------------------------------------------------------------------------------------ rotary


def olmo3_rotary_oracle(position, layer_type):
    """cos and sin, float64 [64], of Olmo-3-7B: written from the YaRN paper, one dimension at a time."""
    cos, sin = [], []
    for i in range(64):
        turn = 500_000.0 ** (-2 * i / 128)
        amplitude = 1.0
        if layer_type == "full":
            # The paper's ramp over turns, with its bounds moved to whole dimensions as released.
            bound = [128 * math.log(8192 / (beta * 2 * math.pi)) / (2 * math.log(500_000.0)) for beta in (32.0, 1.0)]
            low, high = math.floor(bound[0]), math.ceil(bound[1])
            keep = 1.0 if i <= low else 0.0 if i >= high else (high - i) / (high - low)
            turn = keep * turn + (1 - keep) * turn / 8.0
            amplitude = 0.1 * math.log(8.0) + 1.0
        cos.append(amplitude * math.cos(position * turn))
        sin.append(amplitude * math.sin(position * turn))
    return np.array(cos), np.array(sin)


@pytest.mark.parametrize("layer_type", ["full", "sliding"])
def test_olmo3_rotary(layer_type):
    config = PRESETS["olmo3_7b_instruct"]()
    positions = [0, 1, 17, 4095, 8192, 65_535]
    got = decoder.rope_table(config, layer_type, jnp.asarray([positions]))
    for i, position in enumerate(positions):
        # float32 angles: half an ulp of the angle, plus that of the frequency times the position.
        tolerance = 1e-6 + position * 1.2e-7
        for have, want in zip(got, olmo3_rotary_oracle(position, layer_type), strict=True):
            np.testing.assert_allclose(have[0, i, 0], want, atol=tolerance)
    frequencies, scale = decoder.rope_frequencies(config, layer_type)
    frozen = {"full": (1.0, 3.0689259e-7, 1.2079441541679836), "sliding": (1.0, 2.4551407e-6, 1.0)}[layer_type]
    np.testing.assert_allclose([frequencies[0], frequencies[-1], scale], frozen, rtol=1e-6)


def test_rotary_depends_on_distance_only():
    model = tiny()
    params = weights(model)
    tokens = ids(1, 1, 12)
    base = apply(model, params, tokens)[0]
    moved = apply(model, params, tokens, positions=jnp.arange(12)[None] + 300)[0]
    np.testing.assert_allclose(base, moved, atol=1e-4)
    stretched = apply(model, params, tokens, positions=2 * jnp.arange(12)[None])[0]
    assert np.abs(base - stretched).max() > 1e-2


# ----------------------------------------------------------------- cache, packing, padding, causality


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
def test_ragged_cached_decoding_equals_the_full_forward(build):
    model = build()
    params = weights(model)
    tokens = ids(1, 4, 24)
    want = apply(model, params, tokens)[0]  # [B, T, D]
    lengths = jnp.array([9, 1, 0, 6])
    real = (jnp.arange(9) < lengths[:, None]).astype(jnp.int32)
    junk = jnp.where(real == 1, tokens[:, :9], 39)
    hidden, cache = apply(model, params, junk, segment_ids=real, cache=model.init_cache(4, 24, tail=12))
    np.testing.assert_allclose(hidden * real[..., None], want[:, :9] * real[..., None], atol=1e-5)
    at = lengths
    for i in range(14):
        if i % 4 == 3:  # so that tokens are read from the tail and from where they lie in the end
            cache = model.commit(cache)
            np.testing.assert_array_equal(cache.length, at)
        go = (jnp.arange(4) != i % 5).astype(jnp.int32)[:, None]  # each row pauses now and then
        token = jnp.take_along_axis(tokens, at[:, None], 1)
        hidden, cache = apply(model, params, token, segment_ids=go, cache=cache)
        np.testing.assert_allclose(
            hidden[:, 0] * go, jnp.take_along_axis(want, at[:, None, None], 1)[:, 0] * go, atol=1e-5
        )
        at = at + go[:, 0]
    assert int(at.min()) >= 11


@pytest.mark.parametrize(
    "dtype, largest",
    [
        ("int8", 0.05),
        ("float8_e4m3fn", 0.2),
        ("bfloat16", 0.05),
    ],
)
@pytest.mark.slow
def test_narrow_caches_stay_close_to_the_full_forward(dtype, largest):
    model = tiny_olmo()
    params = weights(model)
    tokens = ids(1, 3, 24)
    want = apply(model, params, tokens)[0]
    _, cache = apply(model, params, tokens[:, :20], cache=model.init_cache(3, 24, dtype, tail=20))
    cache = model.commit(cache)
    assert {part.k.dtype.name for part in cache.stored.values()} == {dtype}
    hidden, _ = apply(model, params, tokens[:, 20:21], cache=cache)
    error = np.abs(hidden[:, 0] - want[:, 20]).max()
    assert 1e-5 < error < largest  # narrower, and still the same sequence


def test_rows_of_a_prefilled_block_go_where_they_are_sent():
    model = tiny_olmo()
    params = weights(model)
    tokens = ids(1, 3, 12)
    real = (jnp.arange(12) < jnp.array([12, 5, 9])[:, None]).astype(jnp.int32)
    _, block = apply(
        model, params, tokens, segment_ids=real, cache=model.init_cache(3, 0, tail=12), row_layout="padded"
    )
    _, cache = apply(model, params, ids(2, 4, 12), cache=model.init_cache(4, 24, tail=12))  # rows in use before
    cache = model.commit(cache)
    # One sequence to two rows, one to none (4 is not a row).
    cache = insert(cache, block, model.config, jnp.array([1, 2, 1, 0]), jnp.array([3, 0, 2, 4]))
    np.testing.assert_array_equal(cache.length, [9, 12, 5, 5])
    hidden, _ = apply(model, params, jnp.full((4, 1), 7), cache=cache)
    for row, source, count in ((0, 2, 9), (2, 1, 5), (3, 1, 5)):
        alone = apply(model, params, jnp.append(tokens[source, :count], 7)[None])[0][0, -1]
        np.testing.assert_allclose(hidden[row, 0], alone, atol=1e-5)


@pytest.mark.slow
def test_a_committed_row_may_be_cut_by_its_length():
    model = tiny_olmo()
    params = weights(model)
    tokens = ids(1, 2, 12)
    _, cache = apply(model, params, tokens, cache=model.init_cache(2, 20, tail=12))
    cache = model.commit(cache)
    hidden, _ = apply(model, params, jnp.full((2, 1), 7), cache=cache.with_length(cache.length - 1))
    want = apply(model, params, jnp.concatenate([tokens[:, :11], jnp.full((2, 1), 7)], 1))[0]
    np.testing.assert_allclose(hidden[:, 0], want[:, -1], atol=1e-5)


@pytest.mark.slow
def test_a_row_is_given_to_a_new_sequence_by_clearing_it():
    model = tiny_olmo()
    params = weights(model)
    tokens = ids(1, 2, 10)
    _, cache = apply(model, params, tokens, cache=model.init_cache(2, 14, tail=10))
    cache = model.commit(cache)
    cache = cache.with_length(cache.length * jnp.array([1, 0]))
    fresh = ids(2, 2, 4)
    only_second = jnp.array([[0] * 4, [1] * 4])
    hidden, cache = apply(model, params, fresh, segment_ids=only_second, cache=cache)
    np.testing.assert_allclose(hidden[1], apply(model, params, fresh[1:])[0][0], atol=1e-5)
    np.testing.assert_array_equal(model.commit(cache).length, [10, 4])


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_equals_no_padding(build, cached):
    model = build()
    params = weights(model)
    tokens = ids(1, 1, 9)
    segments = jnp.array([[0, 0, 0] + [1] * 9])
    padded = jnp.pad(tokens, ((0, 0), (3, 0)))
    cache = model.init_cache(1, 12, tail=12) if cached else None
    hidden, _ = apply(model, params, padded, segment_ids=segments, cache=cache)
    np.testing.assert_allclose(hidden[:, 3:], apply(model, params, tokens)[0], atol=1e-5)


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
def test_packed_segments_equal_separate_rows(build):
    model = build()
    params = weights(model)
    lengths = (7, 12, 4)
    rows = [ids(i, 1, n) for i, n in enumerate(lengths)]
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(2, int)])[None]
    packed = jnp.pad(jnp.concatenate(rows, 1), ((0, 0), (0, 2)))
    hidden, cache = apply(model, params, packed, segment_ids=segments)
    assert cache is None
    start = 0
    for row, n in zip(rows, lengths, strict=True):
        np.testing.assert_allclose(hidden[:, start : start + n], apply(model, params, row)[0], atol=1e-5)
        start += n


def test_positions_are_counted_in_every_run_of_segments():
    # RoPE sees distances only, so hidden states cannot show this.
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 3, 3], [5, 5, 5, 5, 5, 5, 0, 0]])
    want = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1]]
    np.testing.assert_array_equal(decoder._positions_in_runs(segments), want)


@pytest.mark.parametrize("attention", ["reference", "chunked"])
@pytest.mark.parametrize("pattern, sees", [(("full",), 16), (("sliding",), 5)])
def test_causality_and_window_by_exactly_zero_gradients(pattern, sees, attention):
    # One layer and distinct tokens: the embedding row of a token is touched by its position alone.
    model = tiny(num_layers=1, layer_pattern=pattern, sliding_window=5, attention=attention)
    params = weights(model)
    tokens = np.random.default_rng(1).permutation(40)[None, :16]
    gradient = jax.jit(jax.grad(lambda p, at: jnp.sum(model.apply(p, tokens)[0][0, at] ** 3)))
    for at in (0, 6, 15):
        grad = gradient(params, at)["embedding"]
        touched = np.abs(grad[tokens[0]]).max(axis=1) > 0
        expected = (np.arange(16) <= at) & (np.arange(16) > at - sees)
        np.testing.assert_array_equal(touched, expected)


def test_decoding_does_not_copy_the_cache(optimised):
    model = tiny(num_layers=6)
    params = weights(model)

    def loop(params, cache, token):
        def body(state):
            cache, token = state
            hidden, cache = apply(model, params, token, cache=cache)
            return cache, jnp.argmax(model.unembed(params, hidden), -1)

        cache, _ = jax.lax.while_loop(lambda s: s[0].tail_used < 4, body, (cache, token))
        return model.commit(cache)

    cache = model.init_cache(5, 53, tail=4)
    compiled = jax.jit(loop, donate_argnums=1).lower(params, cache, jnp.zeros((5, 1), jnp.int32)).compile()
    for shape in ("f32[6,2,5,2,8,32]", "f32[6,2,5,2,32,8]"):  # keys, values
        assert shape in compiled.as_text()
        assert not [line for line in compiled.as_text().splitlines() if shape in line and " copy(" in line]


# -------------------------------------------------------------------------------------------- dials


def test_random_weights_of_a_seed_stay_what_they_are():
    """They depend on the order in which a module declares its matrices; cached base models and results hang on them."""
    from sdzero_jax.config import load_config

    params = LanguageModel(load_config("configs/demo.py").model).init(jax.random.key(0))
    block = params["layers"]["block_0"]
    first_and_last = {
        "embedding": (params["embedding"], 0.00152285, 0.04303252),
        "query": (block["attention"]["query"], -0.00134102, 0.00098482),
        "out": (block["attention"]["out"], 0.00593842, -0.00722323),
        "down": (block["mlp"]["down"], -0.02345516, 0.00555356),
    }
    for name, (leaf, first, last) in first_and_last.items():
        np.testing.assert_allclose([leaf.ravel()[0], leaf.ravel()[-1]], [first, last], atol=1e-6, err_msg=name)


def test_shapes_axes_and_init_agree():
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles fastest
    for model in (tiny(attention_bias=True), tiny_olmo(tie_embeddings=True)):
        params, shapes, axes = model.init(key), model.param_shapes(), model.param_axes()
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
        is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
        ranks = jax.tree.map(len, axes, is_leaf=is_axes)
        assert ranks == jax.tree.map(lambda x: x.ndim, params)
        assert all(type(node) is dict for node in (params, params["layers"], params["layers"]["block_0"]))
        assert model.unembedding(params).shape == (40, 16)
        assert ("unembedding" in params) != model.config.tie_embeddings
        assert hash(model) == hash(LanguageModel(dataclasses.replace(model.config), hf_config="{}"))
    layers = params["layers"]
    query = layers["block_0"]["attention"]["query"]
    assert np.std(query) == pytest.approx(0.3, rel=0.1)
    assert np.abs(query - layers["block_1"]["attention"]["query"]).max() > 0.1
    deep = tiny().init(key)["layers"]["block_0"]["mlp"]["up"]
    assert np.abs(deep[0] - deep[1]).max() > 0.1  # every repetition draws its own weights


@pytest.mark.slow
def test_dtypes():
    model = tiny(param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.param_shapes())} == {jnp.dtype("bfloat16")}
    model = tiny_olmo(compute_dtype="bfloat16")
    params = weights(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = ids(1, 2, 12)
    hidden, cache = apply(model, params, tokens, cache=model.init_cache(2, 12, tail=12))
    assert hidden.dtype == cache.tail_k.dtype == cache.stored["full"].k.dtype == jnp.bfloat16
    assert model.unembed(params, hidden).dtype == jnp.float32
    exact = tiny_olmo().apply(params, tokens)[0]
    assert 1e-4 < np.abs(hidden.astype(jnp.float32) - exact).max() < 0.25
    assert model.init_cache(1, 2, "float32").stored["sliding"].v.dtype == jnp.float32


@pytest.mark.slow
def test_remat_saves_memory_and_changes_nothing(optimised):
    tokens = ids(1, 8, 65)
    memory, grads = {}, {}
    for remat in ("none", "dots", "full"):
        model = tiny(num_layers=6, hidden_size=32, intermediate_size=128, remat=remat)
        params = weights(model)
        compiled = jax.jit(jax.grad(lambda p, m=model: mean_nll(m, p, tokens))).lower(params).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        grads[remat] = compiled(params)
    assert memory["full"] < 0.8 * memory["dots"] and memory["dots"] < 0.5 * memory["none"], memory
    for remat in ("dots", "full"):
        same = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), grads["none"], grads[remat])
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "dials, message",
    [
        (dict(remat="ful"), "remat='ful' is not known; did you mean 'full'"),
        (dict(qk_norm="heads"), "did you mean 'head'"),
        (dict(layer_pattern=("full", "local")), "may hold only full, sliding"),
        (
            dict(num_layers=6, layer_pattern=("sliding",) * 3 + ("full",)),
            "multiple of the layer pattern's length 4",
        ),
        (dict(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4; nearest: 2"),
        (dict(head_dim=7), "even for RoPE; nearest: 8"),
    ],
)
def test_contradictions_are_refused(dials, message):
    with pytest.raises(UserError, match=message):
        tiny(**dials)
