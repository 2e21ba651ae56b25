"""Several processes as one run: two with four devices each against one with eight; a signal to one stops both.

The processes talk through gloo, as they would through a network.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sdzero_jax import hosts
from sdzero_jax.checkpoint import load_params
from sdzero_jax.config import load_config, override
from sdzero_jax.errors import UserError
from sdzero_jax.hosts import HostsConfig
from sdzero_jax.runs import Run

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "base.steps=80", "base.checkpoint.every=40", "collect.questions=64", "collect.chunk=32", "evaluate.questions=16",
    "evaluate.chunk=8", "localisation.questions=16", "srt.checkpoint.every=2",
    "distill.teacher.schedule=sync_every", "distill.teacher.sync_steps=2", "distill.validate_every=2",
)  # fmt: skip


def test_one_process_is_all_of_them():
    assert hosts.count() == 1 and hosts.is_first()
    assert hosts.share([1, 2, 3]) == [1, 2, 3]
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.from_first(lambda: float("inf")) == float("inf")
    hosts.barrier("nothing to wait for")
    hosts.initialize(HostsConfig())
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    "config, message",
    [
        (HostsConfig(coordinator="localhost:1"), "set all three, or none"),
        (HostsConfig(count=2, index=1), "set all three, or none"),
        (HostsConfig("localhost", 1, 0), "hosts.coordinator='localhost'; wanted ADDRESS:PORT .* as localhost:8476"),
        (HostsConfig("host0:", 2, 0), "such as host0:8476"),
        (HostsConfig("host0:http", 2, 0), "such as host0:8476"),
        (HostsConfig("host0:65536", 2, 0), "such as host0:8476"),
        (HostsConfig(":8476", 2, 0), "such as localhost:8476"),
        (HostsConfig("localhost:1", 2, 2), "hosts.index=2 of hosts.count=2; wanted 0 to 1"),
    ],
)
def test_incomplete_settings_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        hosts.initialize(config)


@pytest.mark.parametrize(
    "environ, gpus",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "GPU-5a,GPU-7b"}, [0, 1]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, []),  # one each, as jax does it
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, []),
    ],
)
def test_the_only_process_of_a_host_takes_all_its_gpus(environ, gpus):
    assert hosts._gpus_of_the_only_process(environ) == gpus


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
BY_HAND = HostsConfig("sdzero-0.sdzero:8476", 2, 1)


@pytest.mark.parametrize(
    "environ, package, config, calls",
    [
        (POD, True, HostsConfig(), [{}]),  # jax asks Kubernetes for the rest
        (POD, False, HostsConfig(), []),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True, HostsConfig(), []),  # a pod, but of no indexed Job
        ({"JOB_COMPLETION_INDEX": "1"}, True, HostsConfig(), []),
        (POD, True, BY_HAND, [{"coordinator_address": "sdzero-0.sdzero:8476", "num_processes": 2, "process_id": 1}]),
    ],
)
def test_pods_of_an_indexed_job_find_each_other(environ, package, config, calls, monkeypatch):
    for name in POD:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: (name == "kubernetes" and package) or None)
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **where: made.append(where))
    hosts.initialize(config)
    assert made == calls


def test_a_cluster_that_says_nothing_is_one_line(monkeypatch):
    class ConfigException(Exception):
        """As the package `kubernetes` has it."""

    def fails(**_):
        raise ConfigException("Service host/port is not set.")

    monkeypatch.setattr(hosts, "_in_indexed_job", lambda environ: True)
    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(UserError, match=r"\(Kubernetes\) did not find each other: Service host"):
        hosts.initialize(HostsConfig())


# ---------------------------------------------------------------------------------------- whole runs


def start(directory, processes):
    """The smoke run on eight devices in this many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "run.py", "configs/smoke.py", f"run_dir={directory / 'run'}", *SMALL]
    command += [f"base.cache_dir={directory / 'cache'}"]
    started = []
    for index in range(processes):
        where = [f"hosts.coordinator={address}", f"hosts.count={processes}", f"hosts.index={index}"]
        with open(directory / f"log{index}", "a") as log:
            started.append(
                subprocess.Popen(
                    [*command, *(where if processes > 1 else [])], cwd=ROOT, stdout=log, stderr=log, env=environment
                )
            )
    return started


def finish(directory, processes):
    """Runs to the end; every process has to end well."""
    started = start(directory, processes)
    statuses = [process.wait() for process in started]
    assert statuses == [0] * processes, (directory / "log0").read_text()[-3000:]
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("two"), 2)


def outcome(directory):
    """Traces, recorded responses and the final parameters of every stage."""
    lines = {
        str(path.relative_to(directory)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((directory / "run").rglob("*.jsonl"))
        if path.name != "metrics.jsonl"
    }
    config = override(load_config(str(ROOT / "configs/smoke.py")), SMALL)
    run = Run(override(config, [f"run_dir={directory / 'run'}", f"base.cache_dir={directory / 'cache'}"]))
    folders = [run.folder("base"), run.folder("srt"), *sorted(run.folder("distill").glob("round_*"))]
    params = [load_params(folder / "params", run.abstract_params())[0] for folder in folders]
    return lines, params


@pytest.mark.slow
def test_two_processes_compute_what_one_does(two, tmp_path):
    # The same base: over its steps Adam makes rounding differences of 1e-8 into some of 2e-5.
    shutil.copytree(two / "cache", tmp_path / "cache")
    lines, params = outcome(two)
    wanted_lines, wanted_params = outcome(finish(tmp_path, 1))
    assert lines.keys() == wanted_lines.keys() and "run/collect/traces.jsonl" in lines
    for name, records in lines.items():
        assert records == wanted_lines[name], name
    assert len(params) == len(wanted_params) >= 3
    for one, other in zip(params, wanted_params):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)
    assert "Error" not in (two / "log1").read_text()


def until(text, directory, process, after=0):
    """Waits for the first process to write this behind so many letters of its log, or to end."""
    while text not in (directory / "log0").read_text()[after:] and process.poll() is None:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_or_a_kill_to_one_process_stops_both_and_the_run_goes_on(two, tmp_path):
    shutil.copytree(two / "cache", tmp_path / "cache")  # base and compiled programs: neither is what this is about
    first, second = start(tmp_path, 2)
    until("== srt", tmp_path, first)  # nothing looks at signals between this line and SRT's first step
    second.send_signal(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [143, 143], (tmp_path / "log0").read_text()[-3000:]
    last = [(tmp_path / f"log{index}").read_text().splitlines()[-1] for index in range(2)]
    assert last[0] == last[1] and "saved at step" in last[0], last

    written = len((tmp_path / "log0").read_text())
    first, second = start(tmp_path, 2)
    until("== ", tmp_path, first, written)  # in a stage again
    second.kill()
    assert first.wait() == 1 and second.wait() == -signal.SIGKILL
    log = (tmp_path / "log0").read_text()
    assert log.splitlines()[-1].startswith("stopped: another process of this run is gone"), log[-3000:]
    assert "Traceback" not in log

    lines, params = outcome(finish(tmp_path, 2))
    wanted_lines, wanted_params = outcome(two)
    assert lines == wanted_lines
    for one, other in zip(params, wanted_params):
        jax.tree.map(np.testing.assert_array_equal, one, other)
