"""Judges programs: a response's last fenced program against the tests of its question.

Every program, compiler and checker runs in the sandbox; expected outputs never enter the program's
sandbox. Function-style Python tests run in a second sandbox (remote.py). Leaves out: interactive
problems, languages other than Python and C++. C++ function tests share a process with the program:
a program written to forge the end mark of its own tests is not detected.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Verdict
from sdzero_jax.verifiers import checkers
from sdzero_jax.verifiers.code_tests import BadTests, Case, CodeTests, parse_tests
from sdzero_jax.verifiers.fences import Program, last_program
from sdzero_jax.verifiers.pool import cores
from sdzero_jax.verifiers.sandbox import (
    BOX,
    MIB,
    STARVED,
    Bounds,
    Result,
    Sandbox,
    SandboxError,
    get_sandbox,
    supervise,
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a judged program may use, and how the judge goes about it."""

    time_s: Annotated[float, "CPU seconds per test where the problem names no limit"] = 10.0
    time_scale: Annotated[float, "factor on every time limit, for slower machines or languages"] = 1.0
    wall_factor: Annotated[float, "wall-clock limit as a multiple of the CPU limit, plus one second"] = 2.0
    memory_mb: Annotated[int, "memory in MiB where the problem names no limit"] = 1024
    memory_scale: Annotated[float, "factor on every memory limit"] = 1.0
    processes: Annotated[int, "processes and threads that a program may have at once"] = 64
    open_files: Annotated[int, "files that a program may have open at once"] = 64
    output_bytes: Annotated[int, "bytes that a program may print per test"] = 16 * MIB
    file_bytes: Annotated[int, "bytes that a program may write to files per test"] = 64 * MIB
    compile_s: Annotated[float, "CPU seconds for compiling a program"] = 30.0
    compile_memory_mb: Annotated[int, "memory in MiB for compiling a program"] = 2048
    first_failure_stop: Annotated[bool, "stop at the first test that fails"] = True
    workers: Annotated[int, "programs judged at the same time; 0: one per core"] = 0
    python: Annotated[str, "path of the Python that runs programs; empty: found by trying"] = ""
    unsafe_without_sandbox: Annotated[bool, "where bubblewrap does not work, run with limits only"] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or field.name in ("workers", "python"):
                continue
            if not value > 0:
                raise UserError(f"limits.{field.name} is {value}, not a positive number")
        if self.workers < 0:
            raise UserError(f"limits.workers is {self.workers}, not 0 (one per core) or more")


@dataclasses.dataclass(frozen=True)
class TestResult:
    """One test: accepted | wrong_answer | time_limit | memory | runtime_error | output_limit."""

    name: str
    outcome: str
    cpu_s: float = 0.0
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdict on a program and on each test that was run; `message` explains the verdict."""

    verdict: Verdict
    tests: tuple[TestResult, ...] = ()
    message: str = ""


DEFAULT_LIMITS = Limits()


def judge_code(response: str, tests: Any, *, limits: Limits = DEFAULT_LIMITS) -> Verdict:
    """Judges the last fenced program of a response.

    `tests`: CodeTests or any form that code_tests.py reads. The detail of a wrong verdict is
    wrong_answer, time_limit, memory, compile_error, runtime_error or output_limit. Tests that cannot
    be used give gold_unparseable, the judge's own failure gives error. Raises UserError without a sandbox.
    """
    return judge_report(response, tests, limits=limits).verdict


def judge_report(response: str, tests: Any, *, limits: Limits = DEFAULT_LIMITS) -> Report:
    """As judge_code, with the verdict on each test."""
    try:
        parsed = parse_tests(tests)
    except BadTests as error:
        return Report(Verdict.of("gold_unparseable", str(error)))
    program = last_program(response, parsed.language)
    if program is None:
        return Report(Verdict.of("unparseable", "no fenced program in Python or C++"))
    return judge_program(program, parsed, limits=limits)


def judge_program(program: Program, tests: Any, *, limits: Limits = DEFAULT_LIMITS) -> Report:
    """Judges a program that needs no extraction. Raises UserError without a sandbox."""
    sandbox = get_sandbox(limits.python, limits.unsafe_without_sandbox)
    try:
        results = tuple(_results(sandbox, program, parse_tests(tests), limits))
    except BadTests as error:
        return Report(Verdict.of("gold_unparseable", str(error)))
    except _DoesNotCompile as error:
        return Report(Verdict.of("wrong", "compile_error"), (), str(error))
    except UserError:
        raise
    except Exception as error:  # the judge's own failure is never held against a program
        return Report(Verdict.of("error", f"{type(error).__name__}: {error}"[:300]))
    failed = next((result for result in results if result.outcome != "accepted"), None)
    if failed:
        return Report(Verdict.of("wrong", failed.outcome), results, f"test {failed.name}: {failed.detail}")
    return Report(Verdict.of("correct", f"{len(results)} tests"), results)


def judge_many(items: Iterable[tuple[str | Program, Any]], *, limits: Limits = DEFAULT_LIMITS) -> Iterator[Report]:
    """Judges (response or program, tests) pairs on all cores; yields their reports in order.

    Raises UserError without a sandbox. No more than a few items per worker are held at once.
    """
    get_sandbox(limits.python, limits.unsafe_without_sandbox)
    workers = limits.workers or cores()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: list[concurrent.futures.Future] = []
        for subject, tests in items:
            judge = judge_program if isinstance(subject, Program) else judge_report
            waiting.append(pool.submit(judge, subject, tests, limits=limits))
            if len(waiting) >= 4 * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


# --- one program ------------------------------------------------------------------------------------


class _DoesNotCompile(Exception):
    pass


def _results(sandbox: Sandbox, program: Program, tests: CodeTests, limits: Limits) -> Iterator[TestResult]:
    wanted = "cpp" if tests.cpp_test else "python" if tests.asserts or tests.calls else None
    if wanted and program.language != wanted:
        raise _DoesNotCompile(f"the tests are in {wanted}, the program is in {program.language}")
    bounds = _bounds(tests, limits)
    if tests.asserts or tests.calls:
        yield from _run_functions(sandbox, program, tests, bounds, limits)
        return
    if tests.cpp_test:
        yield _run_cpp_test(sandbox, program, tests, bounds, limits)
        return
    command, files = _prepare(sandbox, program, tests.headers, limits)
    for case in tests.cases:
        run = sandbox.run(command, bounds, files=files, stdin=case.input.encode())
        outcome, detail = _failure(run) or _compare(sandbox, case, run.stdout, tests, limits)
        if program.language == "python" and _is_syntax_error(run):
            raise _DoesNotCompile(_last_line(run.stderr))
        yield TestResult(case.name, outcome, run.cpu_s, detail)
        if outcome != "accepted" and limits.first_failure_stop:
            return


def _bounds(tests: CodeTests, limits: Limits) -> Bounds:
    seconds = (tests.time_limit or limits.time_s) * limits.time_scale
    return Bounds(
        cpu_s=seconds,
        wall_s=seconds * limits.wall_factor + 1.0,
        memory_mb=max(1, round((tests.memory_limit or limits.memory_mb) * limits.memory_scale)),
        processes=limits.processes,
        open_files=limits.open_files,
        output_bytes=limits.output_bytes,
        file_bytes=limits.file_bytes,
    )


def _prepare(sandbox: Sandbox, program: Program, headers, limits: Limits) -> tuple[list[str], dict[str, bytes]]:
    """Returns the command that runs a program and the files that it needs. Raises _DoesNotCompile."""
    if program.language == "python":
        return _python(sandbox, f"{BOX}/main.py"), {"main.py": _bytes(program.code)}
    return [f"{BOX}/program"], {"program": _compile(sandbox, program, headers, limits)}


def _python(sandbox: Sandbox, path: str, *args: str) -> list[str]:
    return [sandbox.python, "-I", "-B", "-X", "utf8", path, *args]


def _compile(sandbox: Sandbox, program: Program, headers, limits: Limits) -> bytes:
    """Compiles inside the sandbox; the binary comes out through its standard output."""
    if not shutil.which("g++"):
        raise SandboxError("no C++ compiler: install g++")
    bounds = Bounds(
        cpu_s=limits.compile_s,
        wall_s=limits.compile_s * limits.wall_factor + 1.0,
        memory_mb=limits.compile_memory_mb,
        processes=32,
        open_files=256,
        output_bytes=64 * MIB,
        file_bytes=256 * MIB,
    )
    files = {"main.cpp": _bytes(program.code)} | {name: _bytes(text) for name, text in headers.items()}
    flags = f"-x c++ -std=gnu++{program.standard} -O2 -w -fmax-errors=3 -fno-diagnostics-color"
    # The first argument keeps the file's path whole where the sandbox rewrites paths.
    script = f'g++ {flags} -I"${{1%/*}}" -o "$HOME/program" "$1" && exec cat "$HOME/program"'
    run = sandbox.run(["/bin/sh", "-c", script, "compile", f"{BOX}/main.cpp"], bounds, files=files)
    if run.stop:
        raise _DoesNotCompile(f"the compiler passed its limit: {run.stop}")
    if b"Cannot fork" in run.stderr or b"Resource temporarily unavailable" in run.stderr:
        raise SandboxError("no process is left to compile with")  # other programs' doing, not this one's
    if run.returncode or not run.stdout:
        errors = [line for line in run.stderr.decode("utf-8", "replace").splitlines() if "error" in line.lower()]
        raise _DoesNotCompile((errors or [_last_line(run.stderr) or "the compiler failed"])[0][:300])
    return run.stdout


def _failure(run: Result) -> tuple[str, str] | None:
    """Returns (outcome, detail) of a run that did not end by itself with status 0, else None."""
    last = _last_line(run.stderr)
    if run.stop:
        return run.stop, f"after {run.cpu_s:.2f} s of CPU, {run.wall_s:.2f} s"
    if not run.returncode:
        return None
    if re.search(rb"MemoryError|std::bad_alloc|Cannot allocate memory|failed to map segment", run.stderr[-500:]):
        return "memory", last
    return "runtime_error", last or f"exit status {run.returncode}"


def _compare(sandbox: Sandbox, case: Case, output: bytes, tests: CodeTests, limits: Limits) -> tuple[str, str]:
    if tests.checker:
        accepted = _run_checker(sandbox, tests.checker, case, output, limits)
    else:
        accepted = checkers.outputs_equal(case.output, output, tests.comparison)
    return ("accepted", "") if accepted else ("wrong_answer", f"printed {output[:60]!r}")


def _run_checker(sandbox: Sandbox, checker: Program, case: Case, output: bytes, limits: Limits) -> bool:
    """Asks a checker program (checker INPUT REFERENCE SUBMISSION). Raises SandboxError if it is broken."""
    said = _ask_checker(sandbox, checker, case, output, limits)
    if said is None:
        # A checker may stumble over nonsense; one that stumbles over the reference is broken.
        if _ask_checker(sandbox, checker, case, case.output.encode(), limits):
            return False
        raise SandboxError("the checker program fails on the reference output")
    return said


def _ask_checker(sandbox: Sandbox, checker: Program, case: Case, output: bytes, limits: Limits) -> bool | None:
    command, files = _prepare_checker(sandbox, checker, limits)
    texts = {
        "input.txt": case.input.encode(),
        "reference.txt": case.output.encode(),
        "submission.txt": output,
    }
    bounds = dataclasses.replace(_bounds(_NO_LIMITS, limits), output_bytes=MIB)
    run = sandbox.run([*command, *(f"{BOX}/{name}" for name in texts)], bounds, files={**files, **texts})
    return None if run.stop else checkers.checker_says(run.stdout, run.returncode)


@functools.lru_cache(maxsize=64)
def _prepare_checker(sandbox: Sandbox, checker: Program, limits: Limits):
    try:
        return _prepare(sandbox, checker, {}, limits)
    except _DoesNotCompile as error:
        raise SandboxError(f"the checker program does not compile: {error}") from error


_NO_LIMITS = CodeTests(cases=(Case("", ""),))


# --- function style ---------------------------------------------------------------------------------

_REMOTE = Path(__file__).with_name("remote.py")


def _run_functions(sandbox, program: Program, tests: CodeTests, bounds: Bounds, limits: Limits) -> Iterator[TestResult]:
    count = len(tests.asserts) + len(tests.calls)
    source = _REMOTE.read_bytes()
    plan = {
        "setup": tests.setup,
        "entry": tests.entry,
        "reference": tests.reference,
        "tests": tests.asserts,
        "cases": tests.calls,
        "seconds": (1 + STARVED) * bounds.wall_s,
        "stop_at_first": limits.first_failure_stop,
    }
    mark = secrets.token_hex(8)
    served = dataclasses.replace(bounds, cpu_s=bounds.cpu_s * count, wall_s=bounds.wall_s * count + 1.0)
    # The tests mostly wait for the program, so theirs must be the later limit.
    longest = (1 + STARVED) * served.wall_s + 5.0
    driven = dataclasses.replace(served, wall_s=longest, cpu_s=longest, memory_mb=2048, output_bytes=16 * MIB)
    with contextlib.ExitStack() as stack:
        requests, answers = os.pipe(), os.pipe()
        with contextlib.ExitStack() as ours:
            for fd in (*requests, *answers):
                ours.callback(os.close, fd)
            server = stack.enter_context(
                sandbox.start(
                    _python(sandbox, f"{BOX}/remote.py", "serve", f"{BOX}/program.json", str(bounds.cpu_s)),
                    served,
                    files={"remote.py": source, "program.json": json.dumps(_pieces(program, tests)).encode()},
                    stdin=requests[0],
                    stdout=answers[1],
                )
            )
            driver = stack.enter_context(
                sandbox.start(
                    _python(sandbox, f"{BOX}/remote.py", "drive", f"{BOX}/plan.json", mark),
                    driven,
                    files={"remote.py": source, "plan.json": json.dumps(plan).encode()},
                    stdin=answers[0],
                    stdout=requests[1],
                )
            )
        ended, told = supervise([server, driver], leader=driver)
    yield from _read_reports(ended, told, mark, count)


def _pieces(program: Program, tests: CodeTests) -> list[str]:
    """The sources to run in order: the question's own beginning, then the program or the two joined."""
    if not tests.reference:
        return [program.code]
    first = next((line for line in program.code.splitlines() if line.strip()), "")
    if first[:1].isspace():  # the body of the function that the prompt began
        return [tests.reference + program.code]
    return [tests.reference, program.code]


def _read_reports(ended: Result, told: Result, mark: str, count: int) -> Iterator[TestResult]:
    lines = told.stderr.decode("utf-8", "replace").splitlines()
    reports = [json.loads(line.removeprefix(mark)) for line in lines if line.startswith(mark)]
    for report in reports:
        if "bad_tests" in report:
            raise BadTests(report["bad_tests"])
    if not (reports and "done" in reports[-1]):
        if not ended.stop or ended.stop == "ended":
            raise SandboxError(f"the tests did not end: {told.stop or _last_line(told.stderr)}")
        yield TestResult("0", ended.stop, ended.cpu_s)
        return
    for report in reports[:-1]:
        outcome, detail = report["outcome"], report["detail"]
        if detail == "the program ended":  # why, only its own sandbox knows
            if _is_syntax_error(ended):
                raise _DoesNotCompile(_last_line(ended.stderr))
            outcome, detail = _failure(ended) or ("runtime_error", "it ended before its tests")
            outcome = "runtime_error" if outcome == "ended" else outcome
        yield TestResult(str(report["test"]), outcome, ended.cpu_s / count, detail)


# What HumanEval-X puts before every C++ program.
_CPP_HEADERS = (
    "stdlib.h",
    "algorithm",
    "math.h",
    "stdio.h",
    "vector",
    "string",
    "climits",
    "cstring",
    "iostream",
    "map",
)


def _run_cpp_test(sandbox, program: Program, tests: CodeTests, bounds: Bounds, limits: Limits) -> TestResult:
    mark = secrets.token_hex(16)
    joined = Program("cpp", _join_cpp(program.code, tests.reference, tests.cpp_test), program.standard)
    command, files = _prepare(sandbox, joined, tests.headers, limits)
    run = sandbox.run(command, bounds, files=files, stdin=mark.encode())
    failed = _failure(run)
    if failed and failed[0] == "runtime_error" and b"Assertion" in run.stderr:
        failed = ("wrong_answer", failed[1])
    if not failed and not run.stdout.endswith(mark.encode()):  # left before its tests were done
        failed = ("runtime_error", "it ended before its tests")
    return TestResult("0", *(("accepted", run.cpu_s, "") if not failed else (failed[0], run.cpu_s, failed[1])))


def _join_cpp(code: str, prompt: str, test: str) -> str:
    """One source: headers, prompt, program, tests, and a main that prints the mark after the tests."""
    headers = "".join(f"#include<{name}>\n" for name in _CPP_HEADERS)
    start = re.sub(r"/\*.*?\*/", "", prompt, flags=re.DOTALL)
    name, before = _open_function(start)
    if name and re.search(rf"\b{re.escape(name)}\s*\([^;{{}}]*\)\s*\{{", code):
        # A whole function: of the prompt only its beginning, without what the program defines itself.
        helpers = re.findall(r"(\w+)\s*\([^;{}()]*\)\s*\{", before)
        repeated = any(re.search(rf"\b{re.escape(helper)}\s*\([^;{{}}]*\)\s*\{{", code) for helper in helpers)
        lines = before.splitlines()
        kept = [line for line in lines if line.startswith(("#include", "using "))] if repeated else lines
        body = "\n".join(kept) + "\n" + code
    else:
        body = prompt + code
    body = headers + body
    test = re.sub(r"\bint\s+main\s*\(\s*(?:void)?\s*\)", "static int judge_tests()", test)
    head, _, tail = test.rpartition("}")
    return (
        f"{body}\n#undef main\n#undef assert\n#undef static\n{head}\nreturn 0;\n}}{tail}\n"
        "int main() { judge_tests(); char mark[64] = {0}; "
        "if (!fgets(mark, sizeof mark, stdin)) return 1; fputs(mark, stdout); return 0; }\n"
    )


def _open_function(prompt: str) -> tuple[str, str]:
    """Returns the name of the function that a C++ prompt leaves open, and the text before it."""
    found = None
    for match in re.finditer(r"^[\w:<>,&* \t]+?\b(\w+)\s*\([^;{}]*\)\s*\{", prompt, flags=re.MULTILINE):
        if match[1] not in ("if", "for", "while", "switch", "main"):
            found = match
    return (found[1], prompt[: found.start()]) if found else ("", prompt)


# --- small parts ------------------------------------------------------------------------------------


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


def _is_syntax_error(run: Result) -> bool:
    """Python names a program that it cannot read without calling it a traceback."""
    if run.returncode != 1 or not _last_line(run.stderr).startswith(("SyntaxError", "IndentationError", "TabError")):
        return False
    return b'File "<solution>"' in run.stderr or not run.stderr.startswith(b"Traceback")
