"""The demo's train step and the sampler on eight devices equal one device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

SCRIPT = """
import dataclasses, functools, json, sys
import jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from sdzero_jax import objectives, sharding
from sdzero_jax.batches import distill_batch
from sdzero_jax.config import load_config
from sdzero_jax.examples import Rollout, Verdict
from sdzero_jax.models import lora
from sdzero_jax.optimizer import make_optimizer
from sdzero_jax.runs import Run
from sdzero_jax.train_step import init_state, make_train_step

config = load_config("configs/demo.py")
# Weights of the size that training leaves behind: fresh ones give a divergence near 0.
config = dataclasses.replace(config, model=dataclasses.replace(config.model, initializer_range=0.2))
run = Run(config)
rng = np.random.default_rng(0)
rollouts = []
for i, question in enumerate(run.task.questions("train", 16)):
    response = rng.integers(0, 15, size=rng.integers(8, 30)).tolist() + [run.domain.tokenizer.end_id]
    rollouts.append(Rollout(
        question, tuple(run.domain.tokenizer.encode_prompt(question.prompt)), tuple(response),
        (-2.0,) * len(response), "stop", Verdict.of("correct" if i % 2 else "wrong"), 0, (-2.0,) * len(response),
    ))
batch, _ = distill_batch(rollouts, run.domain.phrase_ids, run.domain.tokenizer.stop_ids, config.distill.layout)
loss_fn = functools.partial(objectives.self_distillation, config.distill.objective, run.model)
student, teacher = (jax.device_get(run.model.init(jax.random.key(i))) for i in range(2))
# The adapters' product is as large as the weights: with one ten times larger some gradients are no more than
# rounding, and Adam's division makes whole steps of them.
ADAPTERS = {"": lora.LoraConfig(rank=0), "adapters ": lora.LoraConfig(rank=3, alpha=3.0)}

def trained(adapters, number):
    # The model itself, or adapters of it that are not zero.
    if not adapters.rank:
        return (student, teacher)[number]
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), student, adapters))
    draw = np.random.default_rng(number)
    return jax.tree.map(lambda leaf: 0.3 * draw.standard_normal(leaf.shape).astype(leaf.dtype), shapes)

def largest(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

def steps(mesh_config, devices, adapters):
    mesh = sharding.make_mesh(mesh_config, devices)
    optimizer = make_optimizer(config.distill.optimizer, 3)
    schedule = config.distill.teacher
    state = init_state(
        run.model, trained(adapters, 0), optimizer, mesh,
        teacher_config=schedule, reviser_params=trained(adapters, 1), adapters=adapters,
    )
    places = sharding.shardings_for(mesh, run.model.param_axes(), run.model.param_shapes())
    frozen = jax.device_put(student, places) if adapters.rank else None
    step = make_train_step(
        loss_fn, run.model, optimizer, mesh, teacher_config=schedule, adapters=adapters, frozen=frozen
    )
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
    shards = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(state.params)}
    start, end = (jax.device_get(step.parameters(tree)) for tree in (trained(adapters, 0), state.params))
    return losses, end, largest(start, end), max(shards)

out = {}
for name, adapters in ADAPTERS.items():
    one, params_one, moved, _ = steps(sharding.MeshConfig(1, 1, 1), jax.devices()[:1], adapters)
    for data, fsdp, tensor in ((2, 4, 1), (2, 2, 2)):
        many, params_many, _, sharded = steps(sharding.MeshConfig(data, fsdp, tensor), jax.devices(), adapters)
        out[f"{name}{data}x{fsdp}x{tensor}"] = {
            "loss": max(abs(a - b) / abs(a) for a, b in zip(one, many)),
            "params": largest(params_one, params_many),
            "moved": moved,
            "sharded": sharded,
            "first_loss": one[0],
        }
print(json.dumps(out))
"""


SAMPLER = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
from twins import tiny_olmo, weights
from sdzero_jax import sharding
from sdzero_jax.sampler import Request, Sampler

model = tiny_olmo(max_position=256)
params = weights(model)
rng = np.random.default_rng(0)
requests = [
    Request(str(i), rng.integers(0, 40, rng.integers(1, 30)).tolist(), int(rng.integers(20, 60)), top_p=top_p)
    for i, top_p in enumerate([0.9, 1.0] * 12)
]
training = sharding.make_mesh(sharding.MeshConfig(2, 4, 1))
placed = jax.device_put(params, sharding.shardings_for(training, model.param_axes(), model.param_shapes()))

def sample(mesh, params):
    sampler = Sampler(model, slots=8, max_len=128, stop_ids=(3,), block=8, prefill_tokens=64, mesh=mesh)
    return {c.request_id: c for c in sampler.generate(params, requests, seed=0)}

one, out = sample(None, params), {}
for name, mesh in (("gathered", training), ("tensor", sharding.rollout_mesh(training, model.config.num_kv_heads))):
    pairs, splits = [], 0
    for key, completion in sample(mesh, placed).items():
        for a, b, x, y in zip(completion.ids, one[key].ids, completion.logprobs, one[key].logprobs):
            if a != b:
                splits += 1
                break
            pairs.append(abs(x - y))
    out[name] = {"tokens": len(pairs), "splits": splits, "worst": max(pairs), "mesh": list(mesh.devices.shape)}
print(json.dumps(out))
"""


def on_eight_devices(script):
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=300"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compared():
    return on_eight_devices(SCRIPT)


@pytest.fixture(scope="module")
def sampled():
    return on_eight_devices(SAMPLER)


@pytest.mark.slow
@pytest.mark.parametrize("weights, mesh", [("gathered", [2, 4, 1]), ("tensor", [4, 1, 2])])
def test_sampling_on_eight_devices_equals_one(sampled, weights, mesh):
    case = sampled[weights]
    assert case["mesh"] == mesh
    assert case["tokens"] > 500
    assert case["worst"] < 1e-5
    assert case["splits"] == 0


@pytest.mark.parametrize("mesh", ["2x4x1", "2x2x2", "adapters 2x4x1", "adapters 2x2x2"])
def test_eight_devices_equal_one(compared, mesh):
    case = compared[mesh]
    assert case["sharded"], "the mesh must cut some parameter"
    assert case["first_loss"] > 0.1 and case["moved"] > 1e-4
    assert case["loss"] < 1e-5
    assert case["params"] < 1e-5
