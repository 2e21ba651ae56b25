"""Stop a run by whatever stops runs, start it again: the result is bit for bit that of an uninterrupted one.

SDZERO_KILLS sets the number of kills (default 4), SDZERO_KILL_WINDOW the seconds after the start of a
stage in which they fall (default 3), SDZERO_KILL_CONFIG the config (default the smoke one).
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = os.environ.get("SDZERO_KILL_CONFIG", "configs/smoke.py")
WINDOW = float(os.environ.get("SDZERO_KILL_WINDOW", "3"))
KILLS = int(os.environ.get("SDZERO_KILLS", "4"))
STAGES = ("base", "collect", "srt", "distill", "evaluate")

pytestmark = pytest.mark.slow


# Weights that are not numbers make every gradient of a step NaN. The base's batches come from another source.
POISON = """
import sys
import numpy as np
sys.path.insert(0, ".")
import run
from sdzero_jax.sources import SequenceSource
draw, drawn = SequenceSource.next, []
def poisoned(self, params):
    batch, figures = draw(self, params)
    drawn.append(batch)
    if len(drawn) == 5:
        batch["sequences"]["weights"] *= np.nan
    return batch, figures
SequenceSource.next = poisoned
raise SystemExit(run.main(sys.argv[1:]))
"""


def command_of(directory, program=("run.py",)):
    return [
        sys.executable, *program, CONFIG, f"run_dir={directory / 'run'}", f"base.cache_dir={directory / 'cache'}",
    ]  # fmt: skip


def start(directory, program=("run.py",), wrapped=lambda command: command):
    """Starts the run; `program` in the place of run.py, the command line as `wrapped` makes it."""
    command = wrapped(command_of(directory, program))
    # Programs are shared between the runs: an uncompiled and a cached one must give the same bits.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "programs")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    with open(directory / "log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def outcome(directory):
    """Everything that must not depend on interruptions."""
    summary = json.loads((directory / "run" / "summary.json").read_text())
    del summary["seconds"]
    files = {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted((directory / "run").rglob("*.jsonl"))
    }
    fingerprints = [
        json.loads(next((path / "0").rglob("record/metadata")).read_text())["fingerprint"]
        for path in sorted(directory.rglob("params"))
        if (path / "0").is_dir()
    ]
    assert len(fingerprints) >= 3  # base, srt, at least one round
    return summary, files, fingerprints


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    assert start(directory).wait() == 0, log_of(directory)[-3000:]
    return directory, outcome(directory)


def log_of(directory):
    return (directory / "log").read_text()


def inside_a_save(directory):
    """True while Orbax writes a temporary checkpoint folder; one left by an earlier kill does not count."""
    found = {path for path in directory.rglob("*checkpoints/*") if "tmp" in path.name}
    return any(time.time() - path.stat().st_mtime < 1.0 for path in found if path.exists())


def kill_somewhere(directory, number, rng):
    """Starts the run and kills it within WINDOW seconds of work, every second time inside the next save.

    The kills go through the stages: the first fifth waits for the first one, and so on, whatever a machine's speed.
    Returns where the kill fell, None if the run ended before.
    """
    before = len(log_of(directory)) if number else 0
    wanted = number * len(STAGES) // KILLS
    process = start(directory)
    while process.poll() is None:
        begun = re.findall(r"^== (\w+)", log_of(directory)[before:], re.MULTILINE)
        if begun and (begun[-1] not in STAGES or STAGES.index(begun[-1]) >= wanted):
            break
        time.sleep(0.01)
    saving = number % 2 and STAGES[wanted] != "evaluate"  # which saves nothing more
    deadline = time.perf_counter() + (10 * WINDOW if saving else rng.uniform(0.0, WINDOW))
    while time.perf_counter() < deadline and process.poll() is None and not (saving and inside_a_save(directory)):
        time.sleep(0.002)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    stage = re.findall(r"^== (\w+)", log_of(directory), re.MULTILINE)[-1]
    return f"{stage}{' (in a save)' if inside_a_save(directory) else ''}"


def test_killed_runs_end_with_the_same_bits(uninterrupted, tmp_path):
    rng = random.Random(int(os.environ.get("SDZERO_KILL_SEED", "0")))
    moments = [kill_somewhere(tmp_path, number, rng) for number in range(KILLS)]
    moments = [moment for moment in moments if moment]
    print(f"killed in: {', '.join(moments)}")
    assert len(moments) >= KILLS * 3 // 4, "most kills must hit a running process"
    final = start(tmp_path)
    assert final.wait() == 0, log_of(tmp_path)[-3000:]
    assert "damaged" not in log_of(tmp_path)
    assert outcome(tmp_path) == uninterrupted[1]


@pytest.mark.parametrize("mark", ["step/s", "== collect", "== distill", "== evaluate"])
def test_sigterm_saves_and_exits_143(uninterrupted, tmp_path, mark):
    """In a stage that trains, one that samples, one that does both."""
    if mark != "step/s":
        shutil.copytree(uninterrupted[0] / "cache", tmp_path / "cache")
    process = start(tmp_path)
    while mark not in log_of(tmp_path) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert "the same command goes on" in log_of(tmp_path)
    assert start(tmp_path).wait() == 0
    assert outcome(tmp_path) == uninterrupted[1]


def test_a_finished_run_prints_its_table_again(uninterrupted):
    directory = uninterrupted[0]
    before = (directory / "log").stat().st_size
    assert start(directory).wait() == 0
    with open(directory / "log") as log:
        log.seek(before)
        again = log.read()
    assert "sdzero" in again and "step/s" not in again
    assert outcome(directory) == uninterrupted[1]


def test_a_nan_gradient_stops_with_the_last_good_checkpoint(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0] / "cache", tmp_path / "cache")
    assert start(tmp_path, ("-c", POISON)).wait() == 1
    last = log_of(tmp_path).splitlines()[-1]
    assert "is not finite; the last good checkpoint is step" in last and last.startswith("stopped: srt"), last
    assert start(tmp_path).wait() == 0, log_of(tmp_path)[-3000:]
    assert outcome(tmp_path) == uninterrupted[1]


def test_a_reviser_that_keeps_too_little_is_not_distilled(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    process = start(tmp_path, wrapped=lambda command: [*command, "health.keep_rate_stop=0.99", "--fork"])
    assert process.wait() == 1
    last = log_of(tmp_path).splitlines()[-1]
    assert last.startswith("stopped:") and "is below 0.99 (health.keep_rate_stop)" in last, last
    shutil.rmtree(tmp_path / "run-fork1")
    assert outcome(tmp_path) == uninterrupted[1], "the run that was forked has changed"


@pytest.mark.parametrize("kib", [48, 4500])
def test_a_full_disk_is_one_line_and_costs_nothing(uninterrupted, tmp_path, kib):
    """A disk that is full while traces are written, or while a checkpoint is saved; then it is made larger."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("no mounts of one's own here (unshare -rm)")
    shutil.copytree(uninterrupted[0] / "cache", tmp_path / "cache")
    (tmp_path / "run").mkdir()
    script = (
        f'mount -t tmpfs -o size={kib}k none {tmp_path}/run && {{ "$@"; echo $? > {tmp_path}/status; }} ; '
        f'mount -o remount,size=500m {tmp_path}/run && "$@" && cp -r {tmp_path}/run {tmp_path}/kept'
    )
    process = start(tmp_path, wrapped=lambda command: ["unshare", "-rm", "sh", "-c", script, "sh", *command])
    assert process.wait() == 0, log_of(tmp_path)[-3000:]
    assert (tmp_path / "status").read_text() == "1\n"
    # Orbax's threads may complain of their own when one of several writes fails; no error passes through run.py.
    assert "stopped: the disk is full" in log_of(tmp_path) and "run.py" not in log_of(tmp_path)
    (tmp_path / "run").rmdir()
    (tmp_path / "kept").rename(tmp_path / "run")
    assert outcome(tmp_path) == uninterrupted[1]
