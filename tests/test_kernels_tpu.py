"""The TPU kernels through libtpu's own compiler, for chips that are not attached."""

import json

import pytest

from sdzero_jax import topology

COMPILE = """
import importlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from sdzero_jax import ops, topology

importlib.import_module("sdzero_jax.ops.linear_divergence")._platform = lambda: "tpu"
chips = topology.devices(topology.parse(sys.argv[1]))


def temporaries(n, depth, vocab, form, divergence, dtype, mesh_shape, **settings):
    mesh = Mesh(np.array(chips[: int(np.prod(mesh_shape))]).reshape(mesh_shape), ("data", "fsdp", "tensor"))
    shape = lambda s, d, spec=P(("data", "fsdp")): jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec))
    tokens, weights = shape((n, depth), dtype), shape((vocab, depth), dtype, P())

    def loss(h, w, ht, wt, ids, token_weights):
        keywords = dict(ids=ids, divergence=divergence, implementation="pallas", **settings)
        if form == "loss":
            return ops.linear_divergence_loss(h, w, ht, wt, token_weights, **keywords)
        out = ops.linear_divergence(h, w, ht, wt, **keywords)
        return jnp.sum(token_weights * (out.value + out.logp_student)), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    with jax.set_mesh(mesh):
        lowered = step.lower(tokens, weights, tokens, weights, shape((n,), jnp.int32), shape((n,), jnp.float32))
        compiled = lowered.compile()
    assert "tpu_custom_call" in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes


print(json.dumps([temporaries(**case) for case in json.loads(sys.argv[2])]))
"""
QWEN3_4B = {"n": 16_384, "depth": 2560, "vocab": 151_936, "dtype": "bfloat16", "mesh_shape": (1, 1, 1)}
OLMO_3_7B = {**QWEN3_4B, "depth": 4096, "vocab": 100_278}
SMALL = {"n": 300, "depth": 64, "vocab": 1000, "dtype": "float32", "mesh_shape": (1, 1, 1)}
CASES = [
    {**QWEN3_4B, "form": "loss", "divergence": "reverse_kl"},
    {**QWEN3_4B, "form": "token", "divergence": "jsd(0.5)", "temperature": 0.7, "vocab_size": 151_669},
    {**OLMO_3_7B, "form": "loss", "divergence": "mixed_kl(0.5)"},
    {**SMALL, "form": "loss", "divergence": "forward_kl"},
    {**SMALL, "n": 1, "form": "token", "divergence": "jsd(0.5)"},
    {**QWEN3_4B, "form": "loss", "divergence": "reverse_kl", "mesh_shape": (2, 2, 1)},
]


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_forward_and_backward_compile_within_3_gib(name):
    if topology.libtpu_path() is None:
        pytest.skip("no libtpu: make tpu-compiler")
    got = topology.run_for(topology.parse(name), ["-c", COMPILE, name, json.dumps(CASES)], timeout=900)
    print(name, [round(size / 2**30, 3) for size in got])
    assert len(got) == len(CASES)
    assert max(got) <= 3 * 2**30
