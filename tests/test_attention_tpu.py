"""Splash attention compiled for TPUs that are not attached: shapes of Qwen3-4B and Olmo-3-7B, long and ragged.

Compiling proves that blocks fit the chip's vector memory and gives the temporaries per chip; it proves no
number. Run as a script in a process of `topology.run_for` this file compiles and prints.
"""

import json
import sys

import pytest

from sdzero_jax import topology

SHAPES = {  # query heads, key heads, head_dim, window
    "qwen3-4b": (32, 8, 128, None),
    "olmo-3-7b": (32, 32, 128, 4096),
    "head-64": (16, 8, 64, None),
}
LENGTHS = (16_384, 33_013)
SCRIPT = ("-m", "tests.test_attention_tpu")


def needs_libtpu():
    if topology.libtpu_path() is None:
        pytest.skip("no libtpu: make tpu-compiler")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_forward_and_gradient_compile_in_memory_that_grows_with_length(name):
    needs_libtpu()
    temporaries = topology.run_for(topology.parse(name), [*SCRIPT, name, "attention"], timeout=900)
    for shape, (heads, _, width, _) in SHAPES.items():
        for length in LENGTHS:
            # Copies padded to whole blocks, and a softmax statistic per lane. Scores in bfloat16 would be
            # length / 128 times q: 128 or more.
            q_bytes = 2 * heads * length * max(width, 128)
            assert 0 < temporaries[f"{shape} {length}"] < 16 * q_bytes, (shape, length, temporaries)


@pytest.mark.oracle
def test_a_decoder_with_splash_compiles_on_four_chips():
    needs_libtpu()
    slice_ = topology.parse("v6e:2x2")
    kernels, bytes_used = topology.run_for(slice_, [*SCRIPT, slice_.name, "decoder"], timeout=600)
    # A full and a sliding layer, each with its forward kernel, that again in the backward pass, and two more.
    assert kernels == 2 * 4
    assert bytes_used < slice_.memory


def compile_attention(chips) -> dict[str, int]:
    """Bytes of temporaries of forward + gradient of one row in bfloat16, by shape and length."""
    import jax
    import jax.numpy as jnp

    from sdzero_jax import ops, sharding

    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), chips[:1])

    def temporaries(heads, kv_heads, width, window, length):
        struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(  # noqa: E731
            shape, dtype, sharding=sharding.replicated(mesh)
        )
        q, k = struct(1, length, heads, width), struct(1, length, kv_heads, width)
        where = struct(1, length, dtype=jnp.int32)

        def loss(q, k, v, positions, segments):
            places = dict(q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments)
            out = ops.attention(q, k, v, **places, window=window, layout="packed", implementation="splash")
            return jnp.sum(out.astype(jnp.float32) ** 2)

        with sharding.use(mesh):
            program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, k, where, where).compile()
        return program.memory_analysis().temp_size_in_bytes

    return {f"{name} {length}": temporaries(*shape, length) for name, shape in SHAPES.items() for length in LENGTHS}


def compile_decoder(chips) -> tuple[int, int]:
    """Kernels in the compiled forward + backward of four layers, and bytes per chip."""
    import jax
    import jax.numpy as jnp

    from sdzero_jax import sharding
    from sdzero_jax.models import DecoderConfig, LanguageModel

    config = DecoderConfig(
        1024, 2560, 4, 32, 8, 128, 9728, layer_pattern=("sliding", "full"), sliding_window=4096,
        compute_dtype="bfloat16", remat="full", attention="splash",
    )  # fmt: skip
    model = LanguageModel(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=2), chips)
    places = sharding.shardings_for(mesh, model.param_axes(), model.param_shapes())
    struct = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    params = jax.tree.map(struct, model.param_shapes(), places)
    tokens = struct(jnp.zeros((4, 8192), jnp.int32), sharding.batch_sharding(mesh))

    def loss(params, tokens, segments):
        hidden, _ = model.apply(params, tokens, positions=tokens, segment_ids=segments, row_layout="packed")
        return jnp.sum(hidden.astype(jnp.float32) ** 2)

    with sharding.use(mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        program = step.lower(params, tokens, tokens).compile()
    stats = program.memory_analysis()
    bytes_used = stats.temp_size_in_bytes + stats.argument_size_in_bytes + stats.output_size_in_bytes
    return program.as_text().count('custom_call_target="tpu_custom_call"'), bytes_used


if __name__ == "__main__":
    compile_it = {"attention": compile_attention, "decoder": compile_decoder}[sys.argv[2]]
    print(json.dumps(compile_it(topology.devices(topology.parse(sys.argv[1])))))
