"""Adapters against float64 numpy, their gradients, counts and shards."""

import functools
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_method import MODEL, batch_of, student_and_teacher
from twins import tiny, tiny_olmo, weights

from sdzero_jax import objectives
from sdzero_jax.errors import UserError
from sdzero_jax.models import LanguageModel, load_pretrained, lora, save_pretrained
from sdzero_jax.models.lora import LoraConfig
from sdzero_jax.optimizer import OptimizerConfig, make_optimizer
from sdzero_jax.sharding import MeshConfig, make_mesh, shardings_for
from sdzero_jax.teacher import TeacherConfig
from sdzero_jax.train_step import init_state, make_train_step, synchronise

CONFIG = LoraConfig(rank=3, alpha=7.0)


@pytest.fixture(autouse=True)
def compile_fast():
    """The tests compile more than they compute."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def trained(model, config=CONFIG, seed=0):
    """Adapters whose B is not zero any more."""
    rng = np.random.default_rng(seed)
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), model.param_shapes(), config))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), adapters)


def fresh(params, config):
    return jax.jit(lora.init, static_argnums=2)(jax.random.key(1, impl="unsafe_rbg"), params, config)


def leaves(tree):
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
def test_fresh_adapters_change_nothing(build):
    model = build()
    params = weights(model)
    adapters = fresh(params, CONFIG)
    merged = jax.jit(lora.merge, static_argnums=2)(params, adapters, CONFIG)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for name, leaf in leaves(merged).items():
        np.testing.assert_array_equal(leaf, leaves(params)[name])
    a = leaves(adapters)["layers/block_0/attention/out/a"]
    assert a.shape == (model.config.num_groups, 4, 8, 3)
    assert np.std(a) == pytest.approx(32**-0.5, rel=0.35)  # 1 / sqrt(4 x 8)
    first, second = (leaves(adapters)[f"layers/block_0/mlp/{name}/a"] for name in ("gate", "up"))
    assert np.abs(first - second).max() > 0.01  # every adapter draws its own
    with_biases = tiny(attention_bias=True)
    assert {path.split("/")[-2] for path in leaves(trained(with_biases))} == set(lora.TARGETS)


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
def test_merge_is_base_plus_scaled_product(build):
    """Group by group and matrix by matrix, in float64."""
    model = build()
    params, adapters = weights(model), trained(model)
    merged, before = leaves(lora.merge(params, adapters, CONFIG)), leaves(params)
    flat = leaves(adapters)
    inputs = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
    changed = 0
    for name, base in before.items():
        if f"{name}/a" not in flat:
            assert merged[name] is base
            continue
        changed += 1
        a, b = (np.asarray(flat[f"{name}/{side}"], np.float64) for side in "ab")
        width = math.prod(base.shape[1 : 1 + inputs[name.split("/")[-1]]])
        for group in range(base.shape[0]):
            product = a[group].reshape(width, 3) @ b[group].reshape(3, -1)
            want = np.asarray(base[group], np.float64) + 7.0 / 3 * product.reshape(base.shape[1:])
            np.testing.assert_allclose(merged[name][group], want, rtol=1e-5, atol=1e-5)
    assert changed == 7 * len(model.config.layer_pattern)


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once():
    model = tiny()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights(model))
    adapters = trained(model)
    merged = lora.merge(params, adapters, CONFIG)
    wide = lora.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), adapters, CONFIG)
    for name, leaf in leaves(merged).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, leaves(wide)[name].astype(jnp.bfloat16))


def test_gradients_reach_the_adapters_only_and_training_moves_the_model():
    model, config = tiny(), LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))
    params = weights(model)
    adapters = fresh(params, config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)))

    def loss(adapters):
        logits = model.unembed(merged := lora.merge(params, adapters, config), model.apply(merged, tokens)[0])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    first, grads = step(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    paths = {path.removeprefix("layers/block_0/") for path in leaves(grads)}
    assert paths == {"attention/query/a", "attention/query/b", "mlp/down/a", "mlp/down/b"}
    for path, grad in leaves(grads).items():  # with B = 0 the loss does not depend on A
        assert (np.abs(grad).max() > 1e-6) == path.endswith("/b"), path
    for _ in range(20):
        value, grads = step(adapters)
        adapters = jax.tree.map(lambda x, g: x - 0.5 * g, adapters, grads)
    assert value < first - 0.05


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
def test_parameter_count(build):
    c = build().config
    config = LoraConfig(rank=2, targets=("query", "out", "up"))
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), build().param_shapes(), config))
    q_width = c.num_heads * c.head_dim
    per_layer = 2 * (c.hidden_size + q_width) * 2 + 2 * (c.hidden_size + c.intermediate_size)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters)) == c.num_layers * per_layer


def test_published_shape_counts_what_it_should():
    """Rank 16 on all seven matrices of Qwen3-4B: 36 x 16 x (sum of widths)."""
    from sdzero_jax.models import PRESETS

    shapes = LanguageModel(PRESETS["qwen3_4b"]()).param_shapes()
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, LoraConfig(rank=16)))
    widths = (2560 + 4096) * 2 + (2560 + 1024) * 2 + (2560 + 9728) * 3
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters)) == 36 * 16 * widths == 33_030_144


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(targets=("querry",)), "LoRA target 'querry' is not known; did you mean 'query'"),
        (dict(targets=("q_proj",)), "choose from|did you mean"),
        (dict(targets=()), "at least one target; choose from down, gate"),
        (dict(rank=-1), "rank=-1; wanted at least 1, or 0 for none"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize("build", [tiny, tiny_olmo])
def test_attached_adapters_are_the_merged_model(build):
    """x W + s x A B beside x (W + s A B): hidden states, and the gradients of the adapters."""
    model = build()
    params, adapters = weights(model), jax.tree.map(lambda leaf: 0.1 * leaf, trained(model))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)))
    probe = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, model.config.hidden_size)), jnp.float32)

    def read(join, adapters):
        hidden = model.apply(join(params, adapters, CONFIG), tokens)[0]
        return jnp.sum(hidden * probe), hidden

    both = [
        jax.jit(jax.value_and_grad(lambda adapters, join=join: read(join, adapters), has_aux=True))(adapters)
        for join in (lora.attach, lora.merge)
    ]
    (_, attached), attached_gradient = both[0]
    (_, merged), merged_gradient = both[1]
    np.testing.assert_allclose(attached, merged, atol=2e-5)
    assert np.abs(attached - model.apply(params, tokens)[0]).max() > 0.01
    for (path, a), b in zip(leaves(attached_gradient).items(), jax.tree.leaves(merged_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-6, err_msg=path)
        assert np.abs(a).max() > 1e-4, path


def step_with_adapters(schedule):
    """A distillation step of adapters that are not zero any more: (step, state, batch)."""
    params, _ = student_and_teacher()
    adapters, reviser = (jax.tree.map(lambda leaf: 0.1 * leaf, trained(MODEL, seed=seed)) for seed in (0, 1))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, epsilon=1e-3), 10)
    loss_fn = functools.partial(objectives.self_distillation, objectives.SelfDistillation(), MODEL)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    step = make_train_step(
        loss_fn, MODEL, optimizer, mesh, teacher_config=schedule, adapters=CONFIG, frozen=params
    )  # fmt: skip
    state = init_state(
        MODEL, adapters, optimizer, mesh, teacher_config=schedule, reviser_params=reviser, adapters=CONFIG
    )  # fmt: skip
    return step, state, batch_of()


def test_a_step_trains_adapters_as_if_the_model_were_merged():
    """Loss, update and teacher against the loss of merged models, differentiated by hand and stepped by AdamW."""
    step, state, batch = step_with_adapters(TeacherConfig("frozen"))
    frozen, adapters, teacher = step.frozen, *jax.tree.map(np.array, (state.params, state.teacher))
    taught = lora.merge(frozen, teacher, CONFIG)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, epsilon=1e-3), 10)
    moments, losses = optimizer.init(adapters), []

    @jax.jit
    @jax.value_and_grad
    def loss_of(adapters):
        whole = lora.merge(frozen, adapters, CONFIG)
        return objectives.self_distillation(objectives.SelfDistillation(), MODEL, whole, taught, batch)[0]

    for _ in range(2):
        want, gradient = loss_of(adapters)
        updates, moments = optimizer.update(gradient, moments, adapters)
        adapters = optax.apply_updates(adapters, updates)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
        assert losses[-1] == pytest.approx(float(want), rel=1e-4)
        for (path, a), b in zip(leaves(state.params).items(), jax.tree.leaves(adapters), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=path)
    assert losses[0] > losses[1] > 0.01
    jax.tree.map(np.testing.assert_array_equal, state.teacher, teacher)
    state = synchronise(state)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, state.params)
    merged = step.parameters(state.params)
    for name, leaf in leaves(lora.merge(frozen, adapters, CONFIG)).items():
        np.testing.assert_allclose(leaves(merged)[name], leaf, atol=1e-4)


def test_what_is_held_beside_the_model_is_as_small_as_the_adapters():
    step, state, _ = step_with_adapters(TeacherConfig("frozen"))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.teacher) == size(state.params) < size(step.frozen) / 2
    assert size(state.opt_state) < 2.1 * size(state.params)
    assert jax.tree.structure(step.state) == jax.tree.structure(state)


def test_scale_and_rank_are_read():
    model = tiny()
    params, adapters = weights(model), trained(model)
    query = lambda config: lora.merge(params, adapters, config)["layers"]["block_0"]["attention"]["query"]  # noqa: E731
    base = params["layers"]["block_0"]["attention"]["query"]
    once, twice = query(CONFIG) - base, query(LoraConfig(rank=3, alpha=14.0)) - base
    np.testing.assert_allclose(twice, 2 * once, atol=1e-4)
    np.testing.assert_allclose(query(LoraConfig(rank=6, alpha=7.0)) - base, once / 2, atol=1e-4)


def test_an_export_is_the_merged_model(tmp_path):
    model = tiny()
    merged = lora.merge(weights(model), trained(model), CONFIG)
    save_pretrained(tmp_path / "out", model, merged)
    again, params = load_pretrained(tmp_path / "out")
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(again.apply(params, tokens)[0], model.apply(merged, tokens)[0])


@pytest.mark.slow
def test_adapters_are_cut_like_their_base():
    """Eight fake devices: shards of A and B, and a merge that keeps the base's shards and moves nothing."""
    root = str(pathlib.Path(__file__).parents[1])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": root}
    out = subprocess.run(
        [sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0 and out.stdout.strip() == "cut", out.stderr[-2000:]


def _check_cut():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    model = tiny_olmo()
    places = shardings_for(mesh, model.param_axes(), model.param_shapes())
    params = jax.device_put(weights(model), places)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), model.param_shapes(), CONFIG))
    lora_places = shardings_for(mesh, lora.axes(model.param_axes(), CONFIG), shapes)
    adapters = jax.jit(
        lambda key: lora.init(key, model.param_shapes(), CONFIG), out_shardings=lora_places
    )(jax.random.key(0))  # fmt: skip
    whole = jax.jit(lambda key: lora.init(key, model.param_shapes(), CONFIG))(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    query = adapters["layers"]["block_0"]["attention"]["query"]
    assert query["a"].addressable_shards[0].data.shape == (1, 8, 3)  # [G, D, R] over fsdp
    assert query["b"].addressable_shards[0].data.shape == (1, 3, 2, 8)  # [G, R, N, H] over tensor
    adapters = jax.tree.map(lambda leaf, place: jax.device_put(leaf + 0.1, place), adapters, lora_places)
    merge = jax.jit(lambda p, l: lora.merge(p, l, CONFIG)).lower(params, adapters).compile()  # noqa: E741
    merged = merge(params, adapters)
    want = lora.merge(jax.device_get(params), jax.device_get(adapters), CONFIG)
    for (path, a), b, place in zip(
        jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(want), jax.tree.leaves(places), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=str(path))
        assert a.sharding.is_equivalent_to(place, a.ndim), path
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in merge.as_text(), collective
    print("cut")


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    _check_cut()
