"""The demo's train step on eight devices equals one device."""

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
        (-2.0,) * len(response), "stop", Verdict.of("correct" if i % 2 else "wrong"),
    ))
batch, _ = distill_batch(rollouts, run.domain.phrase_ids, run.domain.tokenizer.stop_ids, config.distill.layout)
loss_fn = functools.partial(objectives.self_distillation, config.distill.objective, run.model)
student, teacher = (jax.device_get(run.model.init(jax.random.key(i))) for i in range(2))

def steps(mesh_config, devices):
    mesh = sharding.make_mesh(mesh_config, devices)
    optimizer = make_optimizer(config.distill.optimizer, 3)
    schedule = config.distill.teacher
    state = init_state(run.model, student, optimizer, mesh, teacher_config=schedule, reviser_params=teacher)
    step = make_train_step(loss_fn, run.model, optimizer, mesh, teacher_config=schedule)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
    shards = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(state.params)}
    return losses, jax.device_get(state.params), max(shards)

def largest(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

one, params_one, _ = steps(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
out = {"moved": largest(params_one, student)}
for data, fsdp, tensor in ((2, 4, 1), (2, 2, 2)):
    many, params_many, sharded = steps(sharding.MeshConfig(data, fsdp, tensor), jax.devices())
    out[f"{data}x{fsdp}x{tensor}"] = {
        "loss": max(abs(a - b) / abs(a) for a, b in zip(one, many)),
        "params": largest(params_one, params_many),
        "sharded": sharded,
        "first_loss": one[0],
    }
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def compared():
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=300"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["2x4x1", "2x2x2"])
def test_eight_devices_equal_one(compared, mesh):
    case = compared[mesh]
    assert case["sharded"], "the mesh must cut some parameter"
    assert case["first_loss"] > 0.1 and compared["moved"] > 1e-4
    assert case["loss"] < 1e-5
    assert case["params"] < 1e-5
