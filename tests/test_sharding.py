"""The rules table, mesh errors, and eight fake devices that compute what one computes.

Run as a script (in a subprocess with eight CPU devices) this file does the last part itself.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdzero_jax import sharding
from sdzero_jax.errors import UserError
from sdzero_jax.models import DecoderConfig, LanguageModel, load_pretrained, save_pretrained
from sdzero_jax.sharding import MeshConfig, make_mesh, mesh_shape, shard_batch, shardings_for, spec_for

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def test_specs_by_hand():
    assert spec_for(("vocab", "embed"), SIZES) == P("tensor", "fsdp")
    assert spec_for(("layers", "embed", "heads", "head_dim"), SIZES) == P(None, "fsdp", "tensor", None)
    assert spec_for(("batch", "length", "act_heads", None), SIZES) == P(("data", "fsdp"), None, "tensor", None)
    # 3 rows of a toy vocabulary do not divide by 2: that dimension alone stays whole.
    assert spec_for(("vocab", "embed"), SIZES, (3, 8)) == P(None, "fsdp")
    assert spec_for(("batch",), SIZES, (6,)) == P(None)
    # Axes that the mesh lacks (or that shard_map holds) are left out.
    assert spec_for(("batch", "act_heads"), {"tensor": 2}) == P(None, "tensor")


def test_collisions_and_unknown_axes_raise():
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        spec_for(("heads", "mlp"), SIZES)
    with pytest.raises(UserError, match="'head'; did you mean 'heads'"):
        spec_for(("head",), SIZES)


def test_every_parameter_has_a_place():
    model = LanguageModel(DecoderConfig(40, 16, 2, 4, 2, 8, 24, attention_bias=True))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    tree = shardings_for(mesh, model.param_axes())
    assert jax.tree.structure(tree) == jax.tree.structure(model.param_shapes())
    assert tree["layers"]["block_0"]["mlp"]["down"].spec == P(None, "tensor", "fsdp")


@pytest.mark.parametrize(
    "config, devices, want",
    [
        (MeshConfig(), 8, (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(2, 2, -1), 8, (2, 2, 2)),
        (MeshConfig(1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_mesh_shapes(config, devices, want):
    assert mesh_shape(config, devices) == want


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (
            MeshConfig(3, 1, 1),
            8,
            "data 3 x fsdp 1 x tensor 1 does not fit 8 devices; .*: data=4, fsdp=1, tensor=2",
        ),
        (
            MeshConfig(1, 4, 2),
            4,
            "does not fit 4 devices; the nearest that fits: data=1, fsdp=[24], tensor=[12]",
        ),
        (MeshConfig(1, -1, 3), 8, "nearest that fits: data=1, fsdp="),
        (MeshConfig(-1, -1, 1), 8, "at most one may be -1"),
        (MeshConfig(1, 0, 1), 8, "at least 1"),
    ],
)
def test_impossible_meshes_name_the_nearest(config, devices, message):
    with pytest.raises(UserError, match=message) as caught:
        mesh_shape(config, devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "devices, want",
    [(1, (1, 1, 1)), (2, (1, 2, 1)), (4, (1, 4, 1)), (8, (1, 8, 1)), (16, (1, 16, 1)), (24, (1, 24, 1)),
     (32, (2, 16, 1)), (64, (4, 16, 1)), (17, (1, 17, 1))],
)  # fmt: skip
def test_presets_share_the_state_over_16_devices_and_replicate_beyond(devices, want):
    preset = sharding.mesh_preset(devices)
    assert mesh_shape(preset, devices) == want


def test_a_mesh_is_refitted_only_where_it_does_not_fit():
    assert sharding.refit(MeshConfig(2, 2, 2), 8) == MeshConfig(2, 2, 2)
    assert sharding.refit(MeshConfig(data=1, fsdp=-1, tensor=2), 8) == MeshConfig(1, 4, 2)
    assert sharding.refit(MeshConfig(1, 16, 1), 4) == MeshConfig(1, 4, 1)


@pytest.mark.parametrize(
    "shape, kv_heads, want",
    [
        ((1, 1, 1), 8, (1, 1, 1)),
        ((2, 4, 1), 8, (2, 1, 4)),
        ((1, 16, 1), 8, (2, 1, 8)),  # more devices than KV heads: replicas with rows of their own
        ((4, 16, 1), 32, (4, 1, 16)),
        ((1, 6, 1), 4, (3, 1, 2)),
        ((1, 4, 2), 1, (8, 1, 1)),
    ],
)
def test_rollout_shapes_by_hand(shape, kv_heads, want):
    assert sharding.rollout_shape(shape, kv_heads) == want


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", "act_mlp") is x


@pytest.mark.slow
def test_eight_devices_equal_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=300"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["2x2x2", "2x4x1", "1x2x4", "one", "folder", "batch", "manual", "lookup"]


# ------------------------------------------------------------------------ in the subprocess, 8 devices


def _models():
    common = dict(num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24, remat="full")
    yield LanguageModel(DecoderConfig(vocab_size=41, hidden_size=16, num_layers=2, tie_embeddings=True, **common))
    pattern = ("sliding", "sliding", "sliding", "full")
    olmo = dict(norm_position="post", qk_norm="projection", layer_pattern=pattern, sliding_window=4, yarn_factor=8.0)
    yield LanguageModel(DecoderConfig(vocab_size=40, hidden_size=16, num_layers=4, **olmo, **common))
    # Query heads that four devices cannot share stay whole on each.
    yield LanguageModel(DecoderConfig(vocab_size=40, hidden_size=16, num_layers=2, **(common | {"num_heads": 6})))


def _weights(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), model.param_shapes())


def _loss(model, params, batch):
    hidden, _ = model.apply(params, batch["tokens"], segment_ids=batch["segments"])
    logp = jax.nn.log_softmax(model.unembed(params, hidden))
    mask = batch["segments"][:, 1:] > 0
    return -jnp.sum(jnp.take_along_axis(logp[:, :-1], batch["tokens"][:, 1:, None], 2)[..., 0] * mask) / mask.sum()


def _check_step():
    rng = np.random.default_rng(1)
    segments = np.where(np.arange(11) < rng.integers(3, 12, (8, 1)), 1, 0).astype(np.int32)
    batch = {"tokens": rng.integers(0, 40, (8, 11)).astype(np.int32), "segments": segments}
    wanted = {}
    for shape in ((2, 2, 2), (2, 4, 1), (1, 2, 4)):  # four devices along tensor, two key heads
        mesh = make_mesh(MeshConfig(*shape))
        for model in _models():
            params = _weights(model)
            if model not in wanted:
                wanted[model] = jax.jit(jax.value_and_grad(_loss, 1), static_argnums=0)(model, params, batch)
            places = shardings_for(mesh, model.param_axes(), params)
            step = jax.jit(jax.value_and_grad(_loss, 1), static_argnums=0, out_shardings=(None, places))
            with jax.set_mesh(mesh):
                loss, grads = step(model, jax.device_put(params, places), shard_batch(mesh, batch))
            np.testing.assert_allclose(loss, wanted[model][0], rtol=1e-5)
            for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted[model][1]), strict=True):
                np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max()))
            up = grads["layers"]["block_0"]["mlp"]["up"]  # [G, D, F] over (fsdp, tensor)
            groups = model.config.num_groups
            assert up.addressable_shards[0].data.shape == (groups, 16 // shape[1], 24 // shape[2])
            attention = grads["layers"]["block_0"]["attention"]
            for name, heads in (("query", model.config.num_heads), ("key", 2)):
                share = heads // shape[2] if heads % shape[2] == 0 else heads
                assert attention[name].addressable_shards[0].data.shape[2] == share
        print("x".join(map(str, shape)))


def _check_lookup():
    """The embedding is looked up where its columns lie: no device holds the table, or its gradient, whole."""
    mesh = make_mesh(MeshConfig(1, 8, 1))
    model = LanguageModel(DecoderConfig(5003, 64, 1, 4, 2, 16, 24, tie_embeddings=True))
    places = shardings_for(mesh, model.param_axes(), model.param_shapes())
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), model.param_shapes(), places
    )
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def total(params, tokens):
        return jnp.sum(jnp.square(model.apply(params, tokens)[0]))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(total), out_shardings=places).lower(shapes, tokens).compile().as_text()
    assert "[5003,8]" in text and "[5003,64]" not in text
    print("lookup")


def _check_single():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[3:4])
    assert shard_batch(mesh, {"a": np.ones((3, 2))})["a"].devices() == {jax.devices()[3]}
    print("one")


def _check_folder():
    """A folder loads straight into shards, and saves from them."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    source = ROOT / "tests" / "data" / "goldens" / "olmo3"
    model, whole = load_pretrained(source)
    _, cut = load_pretrained(source, mesh=mesh)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    query = cut["layers"]["block_2"]["attention"]["query"]  # [2, 32, 2, 16]
    assert query.addressable_shards[0].data.shape == (2, 16, 1, 16)
    assert cut["embedding"].addressable_shards[0].data.shape == (61, 16)  # 61 rows do not divide
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder) / "out", model, cut)
        written = (Path(folder) / "out" / "model.safetensors").read_bytes()
        save_pretrained(Path(folder) / "again", model, whole)
        assert written == (Path(folder) / "again" / "model.safetensors").read_bytes()
    print("folder")


def _check_batch():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    out = shard_batch(mesh, {"tokens": np.arange(24).reshape(8, 3), "step": np.int32(3)})
    assert out["tokens"].addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(out["tokens"], np.arange(24).reshape(8, 3))
    assert out["step"].sharding.is_fully_replicated
    assert sharding.replicated(mesh) == NamedSharding(mesh, P())
    try:
        shard_batch(mesh, {"tokens": np.ones((6, 3))})
    except UserError as error:
        assert "6 rows does not divide over data x fsdp = 4; nearest: 8" in str(error)
    else:
        raise AssertionError("a batch of 6 rows over 4 devices was accepted")
    print("batch")


def _check_manual():
    """Inside a shard_map over (data, fsdp) only the tensor axis is still constrained."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    seen = []

    def body(x):
        y = sharding.constrain(x, "batch", "act_mlp")
        seen.append(y is x)
        return 2 * y

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")),
                           axis_names={"data", "fsdp"})  # fmt: skip
    np.testing.assert_array_equal(jax.jit(mapped)(jnp.ones((8, 4))), 2 * np.ones((8, 4)))
    assert seen == [False]
    print("manual")


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    _check_step()
    _check_single()
    _check_folder()
    _check_batch()
    _check_manual()
    _check_lookup()
