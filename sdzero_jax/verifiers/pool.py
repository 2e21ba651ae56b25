"""Worker processes that grade: a deadline and a kill per item, workers replaced, results in order.

`WorkerPool` runs any importable function of one picklable argument; `VerifierPool` runs the maths
grader and gives Verdicts. Workers are fresh interpreters (no fork of a process that holds jax or
threads, no second run of the caller's `__main__`), bound to the CPU and to a memory limit, each in
a process group of its own. Leaves out sharing of workers between hosts and sandboxing: a worker is
as trusted as this process (`sdzero_jax.verifiers.math` never evaluates what it grades).
"""

import collections
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection, reduction
from typing import Annotated, Any, Literal

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.verifiers.math import MathSettings, grade_item

GRACE = 0.5  # seconds that a worker gets to end an item by itself before it is killed
BACKLOG_BYTES = 32_768  # more could block this process while a worker hangs
BACKLOG = 4  # items a worker holds: it never waits for this process between two of them
MAX_FAILED_STARTS = 3


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """Processes that grade."""

    workers: Annotated[int, "grading processes; 0 means one per core"] = 0
    deadline: Annotated[float, "seconds an item may take before its worker is stopped"] = 5.0
    memory_mib: Annotated[int, "memory a worker may map, in MiB; 0 means no limit"] = 4096
    start_timeout: Annotated[float, "seconds a worker may take to start"] = 60.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """What stands in the place of a result: the item ran out of time, or its worker died twice or raised."""

    kind: Literal["timeout", "error"]
    detail: str


class WorkerPool:
    """Runs `function(item)` in worker processes; one caller at a time.

    Args:
      function: a top-level function of an importable module, of one picklable argument.
      settings: number of workers, deadline, memory.
      prepare: a top-level function without arguments that each worker calls once, outside any deadline.
    Raises UserError when workers cannot start. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        settings: PoolSettings = PoolSettings(),
        *,
        prepare: Callable[[], None] | None = None,
    ):
        if settings.deadline <= 0:
            raise UserError(f"pool deadline {settings.deadline!r} must be more than 0 seconds")
        if settings.workers < 0:
            raise UserError(f"pool workers {settings.workers!r} must be 0 (one per core) or more")
        self._settings = settings
        # Pickled here, so that a function that cannot travel fails at once.
        self._startup = bytes(
            reduction.ForkingPickler.dumps((function, prepare, settings.deadline, settings.memory_mib))
        )
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._closed = False
        for _ in range(settings.workers or cores()):
            self._workers.append(self._start())

    def run(self, items: Sequence[Any]) -> list[Any]:
        """`function(item)` of every item, in order; a Failure where there is none."""
        results: list[Any] = [None] * len(items)
        for index, result in self.stream(items):
            results[index] = result
        return results

    def stream(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """(index, result) pairs as they come, in any order. Leaving it early drops the items under way."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("the pool is in use: one caller at a time")
        try:
            yield from self._stream(items)
        finally:
            for position, worker in enumerate(self._workers):
                if worker.pending:
                    worker.kill()
                    self._workers[position] = self._start()
            self._lock.release()

    def _stream(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        source = enumerate(items)
        again: collections.deque[_Job] = collections.deque()  # ready to be sent, and those of replaced workers
        exhausted = False
        while True:
            for worker in self._idlest():
                while worker.ready and (again or not exhausted):
                    if not again:
                        found = next(source, None)
                        if found is None:
                            exhausted = True
                            break
                        job = _pack(*found)
                        if isinstance(job, Failure):
                            yield found[0], job
                            continue
                        again.append(job)
                    if not worker.has_room(again[0]):
                        break
                    worker.send(again.popleft())
            if exhausted and not again and not any(worker.pending for worker in self._workers):
                return
            yield from self._collect(again)

    def _idlest(self) -> list["_Worker"]:
        return sorted(self._workers, key=lambda worker: len(worker.pending))

    def _collect(self, again: "collections.deque[_Job]") -> Iterator[tuple[int, Any]]:
        """Waits for one event: a result, a death or a deadline; replaces workers where needed."""
        wait = min((worker.time_left() for worker in self._workers), default=1.0)
        by_channel = {worker.channel: worker for worker in self._workers}
        for channel in connection.wait(list(by_channel), max(0.0, min(wait, 1.0))):
            worker = by_channel[channel]
            try:
                kind, value = channel.recv()
            except Exception:  # end of file, or a message cut short by a death
                yield from self._replace(worker, again, None)
                continue
            if kind == "ready":
                worker.ready, self._failed_starts = True, 0
            elif kind == "unusable":
                raise UserError(f"grading workers cannot start: {value}")
            else:
                worker.started = time.monotonic()
                yield worker.pending.popleft().index, value
        for worker in list(self._workers):
            if worker.time_left() <= 0:
                failure = Failure("timeout", f"no result in {self._settings.deadline:g} s, worker killed")
                yield from self._replace(worker, again, failure)

    def _replace(self, worker: "_Worker", again: "collections.deque[_Job]", failure: Failure | None):
        """A new worker for a dead or late one; the item it was at is charged, those behind it go elsewhere."""
        was_ready, pending = worker.ready, list(worker.pending)
        status = worker.kill()
        if not was_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise UserError(f"grading workers cannot start: the last one ended with status {status}")
        self._workers[self._workers.index(worker)] = self._start()
        if not pending:
            return
        job = pending.pop(0)
        again.extendleft(reversed(pending))
        if failure is None and not job.retried:
            again.appendleft(dataclasses.replace(job, retried=True))
        else:
            yield job.index, failure or Failure("error", f"its worker died twice (status {status})")

    def _start(self) -> "_Worker":
        return _Worker(self._startup, self._settings)

    def starting(self) -> int:
        """How many workers have not yet said that they are ready (they say so while items are run)."""
        return sum(not worker.ready for worker in self._workers)

    def close(self) -> None:
        """Ends every worker and what it started. May be called twice."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_workers", None):
            self.close()


class VerifierPool:
    """The maths grader in worker processes: `verify_math` for batches, safe against answers that never end."""

    def __init__(self, settings: PoolSettings = PoolSettings(), math_settings: MathSettings = MathSettings()):
        from sdzero_jax.verifiers import symbolic

        # The worker's own limit is a little shorter, so that an answer that Python can stop costs no worker.
        own = min(math_settings.deadline, settings.deadline)
        self._settings = dataclasses.replace(math_settings, deadline=own)
        self._pool = WorkerPool(grade_item, settings, prepare=symbolic.load)

    def verify(self, golds: Sequence[str | Sequence[str] | Question], responses: Sequence[str]) -> list[Verdict]:
        """A Verdict per response, in order.

        Args:
          golds: for each response a reference answer, several of them, or the Question that holds them.
          responses: the model's texts.
        """
        if len(golds) != len(responses):
            raise ValueError(f"{len(golds)} references for {len(responses)} responses")
        return [as_verdict(result) for result in self._pool.run(self._items(golds, responses))]

    def stream(
        self, golds: Iterable[str | Sequence[str] | Question], responses: Iterable[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """(index, Verdict) pairs as they come, in any order."""
        for index, result in self._pool.stream(self._items(golds, responses)):
            yield index, as_verdict(result)

    def starting(self) -> int:
        return self._pool.starting()

    def _items(self, golds, responses) -> list[tuple[str, Any, MathSettings]]:
        plain = (gold.gold if isinstance(gold, Question) else gold for gold in golds)
        return [(response, gold, self._settings) for gold, response in zip(plain, responses)]

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def as_verdict(result: Verdict | Failure) -> Verdict:
    """A Failure of the pool as a Verdict without reward."""
    return Verdict.of(result.kind, result.detail) if isinstance(result, Failure) else result


# ---- this side of a worker


@dataclasses.dataclass(frozen=True)
class _Job:
    index: int
    message: bytes
    retried: bool = False


def _pack(index: int, item: Any) -> _Job | Failure:
    try:
        return _Job(index, bytes(reduction.ForkingPickler.dumps(item)))
    except Exception as error:
        return Failure("error", f"cannot be sent to a worker: {type(error).__name__}")


class _Worker:
    """One process and the jobs it holds; the first of `pending` is the one it is at."""

    def __init__(self, startup: bytes, settings: PoolSettings):
        ours, theirs = socket.socketpair()
        paths = [os.path.abspath(path) if path else os.getcwd() for path in sys.path]
        code = (
            f"import sys; sys.path[:] = {paths!r}; "
            f"from sdzero_jax.verifiers.pool import _serve; _serve({theirs.fileno()})"
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        self.channel = connection.Connection(ours.detach())
        self.pending: collections.deque[_Job] = collections.deque()
        self.ready = False
        self.started = time.monotonic()
        self._limits = settings.deadline + GRACE, settings.start_timeout
        with contextlib.suppress(OSError):  # it died already: the end of file tells
            self.channel.send_bytes(startup)

    def has_room(self, job: _Job) -> bool:
        """An idle worker reads at once; behind a running item only what fits the socket's buffer may wait."""
        waiting = sum(len(held.message) for held in self.pending) + len(job.message)
        return not self.pending or (len(self.pending) < BACKLOG and waiting <= BACKLOG_BYTES)

    def send(self, job: _Job) -> None:
        if not self.pending:
            self.started = time.monotonic()
        self.pending.append(job)
        with contextlib.suppress(OSError):  # it died: the end of file tells
            self.channel.send_bytes(job.message)

    def time_left(self) -> float:
        if self.ready and not self.pending:
            return float("inf")
        limit = self._limits[0] if self.ready else self._limits[1]
        return self.started + limit - time.monotonic()

    def kill(self) -> int:
        """Ends the process and its group; returns its exit status."""
        self.channel.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.pending.clear()
        return self.process.wait()


# ---- the worker's side


class _Late(BaseException):
    """The deadline inside a worker; no Exception, so that handlers in the graded code let it through."""


def _serve(descriptor: int) -> None:
    """A worker's life: takes items and answers each, until the other side closes the channel."""
    channel = connection.Connection(descriptor)
    try:
        function, prepare, deadline, memory_mib = channel.recv()
        _limit_memory(memory_mib)
        if prepare:
            prepare()
    except EOFError:
        return
    except BaseException as error:
        channel.send(("unusable", f"{type(error).__name__}: {error}"))
        return
    channel.send(("ready", None))
    while True:
        try:
            item = channel.recv()
        except (EOFError, OSError):
            return
        result = _one(function, item, deadline)
        try:
            message = reduction.ForkingPickler.dumps(("result", result))
        except Exception as error:
            message = reduction.ForkingPickler.dumps(("result", Failure("error", f"result cannot be sent: {error}")))
        try:
            channel.send_bytes(message)
        except OSError:
            return


def _one(function: Callable[[Any], Any], item: Any, deadline: float) -> Any:
    """The result of one item or the Failure; an alarm ends what Python can end without costing the worker."""

    def late(signum, frame):
        raise _Late

    signal.signal(signal.SIGALRM, late)
    # Its default action ends a worker stuck in C code whose parent is gone; a living parent kills sooner.
    signal.setitimer(signal.ITIMER_PROF, 2 * deadline + 10)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, deadline)
            return function(item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late:
        return Failure("timeout", f"no result in {deadline:g} s")
    except MemoryError:
        return Failure("error", "out of memory")
    except Exception as error:
        return Failure("error", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")


def _limit_memory(memory_mib: int) -> None:
    if memory_mib:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def cores() -> int:
    """Cores that this process may use: a scheduler may have given it only a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
