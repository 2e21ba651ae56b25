"""Worker pools: order, deadlines, deaths, no jax in a worker, nothing left behind; the file grader on top."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time

import pytest

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.verifiers import Failure, MathSettings, PoolSettings, VerifierPool, WorkerPool
from sdzero_jax.verifiers.grade_file import grade_file
from sdzero_jax.verifiers.sandbox import get_sandbox

TWO = PoolSettings(workers=2, deadline=1.0)


def act(item):
    """What a test asks a worker to do."""
    kind, value = item
    if kind == "square":
        return value * value
    if kind == "sleep":
        time.sleep(value)
    elif kind == "length":
        return len(value)
    elif kind == "raise":
        raise ValueError(value)
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "die once":
        try:
            os.close(os.open(value, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "second life"
        os._exit(3)
    elif kind == "stuck":  # as in C code that never looks at signals
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(30)
    elif kind == "swallow":
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(BaseException):
                time.sleep(0.05)
    elif kind == "memory":
        return len(bytearray(value))
    elif kind == "child":
        return subprocess.Popen(["sleep", "60"]).pid
    elif kind == "modules":
        return sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "flax", "numpy"))
    elif kind == "map":
        return len(mmap.mmap(-1, value))
    elif kind == "environment":
        time.sleep(value or 0)
        return os.environ.get("JAX_PLATFORMS"), os.getpid()
    elif kind == "unpicklable":
        return lambda: None
    return "done"


def bad_start():
    raise ImportError("no grader here")


def die_at_start():
    os._exit(7)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(act, TWO) as workers:
        yield workers


def still_works(pool):
    return pool.run([("square", n) for n in range(20)]) == [n * n for n in range(20)]


def test_results_in_order(pool):
    items = [("sleep", 0.2 if n % 7 == 0 else 0.0) if n % 2 else ("square", n) for n in range(40)]
    wanted = ["done" if n % 2 else n * n for n in range(40)]
    assert pool.run(items) == wanted
    assert pool.run([]) == []


def pids(pool):
    """Process ids of both workers, once both have started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        results = pool.run([("environment", 0.02)] * 12)
        assert {backend for backend, _ in results} == {"cpu"}
        if len({pid for _, pid in results}) == 2:
            break
    return {pid for _, pid in results}


def test_work_is_shared(pool):
    assert len(pids(pool)) == 2 and os.getpid() not in pids(pool)


@pytest.mark.parametrize("kind", ["sleep", "stuck", "swallow"])
def test_deadline(pool, kind):
    pids(pool)  # both workers are up
    started = time.monotonic()
    results = pool.run([("square", 2), (kind, 30.0), ("square", 3), ("square", 4), ("square", 5), ("square", 6)])
    assert time.monotonic() - started < 2.5  # deadline 1, grace 0.5
    assert results[1].kind == "timeout"
    assert [results[n] for n in (0, 2, 3, 4, 5)] == [4, 9, 16, 25, 36]
    assert still_works(pool)


def test_large_items_behind_a_stuck_worker_do_not_block(pool):
    """More than a socket holds: sending it to a worker that does not read would stop this process."""
    pids(pool)
    started = time.monotonic()
    results = pool.run([("stuck", None), ("square", 1)] + [("length", "x" * 400_000)] * 8)
    assert time.monotonic() - started < 3.5
    assert results[0].kind == "timeout" and results[1] == 1
    assert results[2:] == [400_000] * 8


def test_a_dead_worker_is_replaced_and_its_item_retried_once(pool, tmp_path):
    results = pool.run([("square", 2), ("die once", str(tmp_path / "mark")), ("die", None), ("square", 3)])
    assert results[0] == 4 and results[3] == 9
    assert results[1] == "second life"
    assert results[2] == Failure("error", "its worker died twice (status -9)")
    assert still_works(pool)


def test_exceptions_memory_and_odd_values_cost_no_worker(pool):
    before = pids(pool)
    results = pool.run([("raise", "boom"), ("memory", 2**40), ("unpicklable", 0), ("square", lambda: 1)])
    assert results[0] == Failure("error", "ValueError: boom")
    assert results[1] == Failure("error", "out of memory")
    assert [result.kind for result in results[2:]] == ["error", "error"]
    assert pids(pool) == before


def test_memory_limit_is_a_setting():
    with WorkerPool(act, PoolSettings(workers=1, deadline=5.0, memory_mib=600)) as small:
        assert small.run([("memory", 2**20), ("memory", 2**30)])[1] == Failure("error", "out of memory")
        assert small.run([("map", 2**33)])[0].kind == "error"
    with WorkerPool(act, PoolSettings(workers=1, deadline=5.0, memory_mib=0)) as free:
        assert free.run([("map", 2**33)]) == [2**33]


def test_streaming_and_leaving_early(pool):
    seen = dict(pool.stream(("square", n) for n in range(10)))
    assert seen == {n: n * n for n in range(10)}
    stream = pool.stream([("sleep", 0.3)] * 8)
    next(stream)
    with pytest.raises(RuntimeError, match="in use"):
        pool.run([("square", 1)])
    stream.close()
    assert still_works(pool)


def test_close_ends_workers_and_their_children():
    workers = WorkerPool(act, TWO)
    results = workers.run([("child", None), ("environment", None), ("environment", None), ("environment", None)])
    pids = {results[0], *(result[1] for result in results[1:])}
    assert all(_alive(pid) for pid in pids)
    workers.close()
    workers.close()
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        workers.run([("square", 1)])


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_workers_end_with_their_parent(tmp_path):
    program = (
        "import sys, time; from sdzero_jax.verifiers import PoolSettings, WorkerPool; import test_pool\n"
        "pool = WorkerPool(test_pool.act, PoolSettings(workers=1))\n"
        "print(pool.run([('environment', None)])[0][1], flush=True); time.sleep(60)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env, text=True)
    pid = int(parent.stdout.readline())
    assert _alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)


def test_workers_that_cannot_start_are_reported():
    with pytest.raises(UserError, match="no grader here"):
        WorkerPool(act, TWO, prepare=bad_start).run([("square", 1)])
    with pytest.raises(UserError, match="status 7"):
        WorkerPool(act, TWO, prepare=die_at_start).run([("square", 1)])
    for wrong in (PoolSettings(workers=-1), PoolSettings(deadline=0)):
        with pytest.raises(UserError):
            WorkerPool(act, wrong)
    with pytest.raises(Exception, match="pickle"):
        WorkerPool(lambda item: item, TWO)


# ---- the maths pool


def loaded(item):
    """Grades once, then tells which forbidden modules the worker holds."""
    from sdzero_jax.verifiers.math import grade_item

    return grade_item(item).outcome, act(("modules", None))


def test_a_grading_worker_never_loads_jax():
    with WorkerPool(loaded, PoolSettings(workers=1, deadline=60.0)) as workers:
        assert workers.run([(r"\boxed{x+1}", "1+x", MathSettings())]) == [("correct", [])]
        # The bite: this process has jax, so the probe can see it.
    assert "jax" in sys.modules


@pytest.fixture(scope="module")
def graders():
    with VerifierPool(PoolSettings(workers=2, deadline=2.0)) as workers:
        yield workers


def test_verdicts_in_order_with_attacks_between(graders):
    responses = [r"\boxed{1}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{x+1}", "no box", r"\boxed{2}", r"\boxed{3}"]
    golds = ["1", "5", ["2", "1+x"], "1", "1", Question("q", "?", ("4", "3"), "math")]
    wanted = ["correct", "timeout", "correct", "unparseable", "wrong", "correct"]
    for _ in range(2):
        assert [verdict.outcome for verdict in graders.verify(golds, responses)] == wanted
    assert graders.verify([], []) == []
    with pytest.raises(ValueError, match="1 references for 2 responses"):
        graders.verify(["1"], ["a", "b"])


def test_attacks_leave_the_pool_working(graders, tmp_path, monkeypatch):
    from test_verifiers_math import ATTACKS

    graders.verify(["1"] * 8, [r"\boxed{1}"] * 8)
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    verdicts = graders.verify(["5"] * len(ATTACKS), [rf"\boxed{{{attack}}}" for attack in ATTACKS])
    assert time.monotonic() - started < 3.0 * len(ATTACKS)
    assert all(verdict.outcome != "correct" for verdict in verdicts)
    assert not list(tmp_path.iterdir())
    assert graders.verify(["5"] * 4, [r"\boxed{5}"] * 4) == [Verdict.of("correct", "5: same text")] * 4


# ---- the file grader


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_grade_file(tmp_path):
    rows = [{"id": f"r{n}", "response": rf"\boxed{{{n % 3}}}", "gold": [1, "1.0"]} for n in range(9)]
    rows.append({"id": "none", "response": "nothing", "gold": "1"})
    rows.append({"id": "bad", "response": r"\boxed{1}", "gold": None})
    out = tmp_path / "out.jsonl"
    summary = grade_file(write(tmp_path / "in.jsonl", rows), output=out, pool=TWO, progress=False)
    assert summary.rows == 11 and summary.failed == 0
    assert summary.outcomes == {"correct": 3, "wrong": 6, "unparseable": 1, "gold_unparseable": 1}
    assert summary.accuracy == pytest.approx(0.3)
    assert any("correct" in line and "3" in line for line in summary.lines())
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["line"] for row in written] == list(range(1, 12))
    assert written[1]["outcome"] == "correct" and written[1]["reward"] == 1.0
    with pytest.raises(UserError, match="exists"):
        grade_file(tmp_path / "in.jsonl", output=out, pool=TWO, progress=False)


def test_lines_with_tests_are_programs(tmp_path):
    try:
        get_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    program = "```python\ndef double(x):\n    return {} * x\n```"
    tests = {"test_list": ["assert double(4) == 8"]}
    rows = [
        {"response": program.format(2), "tests": tests},
        {"response": "\\boxed{8}", "gold": "8"},
        {"response": program.format(3), "tests": tests},
        {"response": "no program", "tests": tests},
    ]
    out = tmp_path / "out.jsonl"
    summary = grade_file(write(tmp_path / "in.jsonl", rows), output=out, pool=TWO, progress=False)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["outcome"] for row in written] == ["correct", "correct", "wrong", "unparseable"]
    assert [row["line"] for row in written] == [1, 2, 3, 4]
    assert summary.accuracy == 0.5


def test_grade_file_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    def broken(self, golds, responses):
        yield 0, Verdict.of("correct")
        raise KeyboardInterrupt

    monkeypatch.setattr(VerifierPool, "stream", broken)
    path = write(tmp_path / "in.jsonl", [{"response": r"\boxed{1}", "gold": "1"}] * 600)
    with pytest.raises(KeyboardInterrupt):
        grade_file(path, output=tmp_path / "out.jsonl", pool=TWO, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_grade_file_field_names(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"text": r"\boxed{2}", "answer": "2", "truth": "3"}])
    named = grade_file(path, response_field="text", gold_field="truth", pool=TWO, progress=False)
    assert named.outcomes == {"wrong": 1}
    with pytest.raises(UserError, match="no response field"):
        grade_file(path, pool=TWO, progress=False)
    with pytest.raises(UserError, match="did you mean 'text'"):
        grade_file(path, response_field="texts", pool=TWO, progress=False)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no JSON lines"),
        ('{"response": "a", "gold": "1"}\n[1]\n{"response": "a", "gold": "1"}\n', "line 2"),
        ('{"response": "a", "gold": "1"}\n{"response": ', "last line"),
        ('{"response": "a", "gold": "1"}\n{"response": 5, "gold": "1"}\n', "line 2: 'response' is int"),
        ('{"response": "a", "gold": {"x": 1}}\n', "line 1: 'gold' is an object"),
    ],
)
def test_grade_file_refuses_bad_input(tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        grade_file(tmp_path / "in.jsonl", pool=TWO, progress=False)
    with pytest.raises(UserError, match="no such file"):
        grade_file(tmp_path / "absent.jsonl", pool=TWO, progress=False)
