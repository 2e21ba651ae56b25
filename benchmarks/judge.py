"""The code judge on whole data sets: counts of verdicts against what is recorded, and programs per second.

    SDZERO_DATA=DIR python benchmarks/judge.py [SET ...]

Sets: humaneval humaneval_x_python humaneval_x_cpp mbpp livecodebench gcj_kickstart library_checker
kattis code_contests codeforces model_outputs. Prints one line per set: programs, agreements, those that
only the time limit separates, disagreements (listed), skipped (with the reason), programs per second.
"""

import collections
import gzip
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sdzero_jax.verifiers.code import Limits, judge_many
from sdzero_jax.verifiers.code_tests import Case, CodeTests, parse_tests
from sdzero_jax.verifiers.fences import Program

# (name, response or program, tests, wanted): wanted is a verdict detail, "accepted" or "rejected",
# or a tuple of recorded verdicts, one per test.
Item = tuple[str, object, object, object]
RECORDED = {"AC": "accepted", "WA": "wrong_answer", "RE": "runtime_error", "TLE": "time_limit"}
LIBRARIES = {"CPP/22": "needs boost", "CPP/137": "needs boost", "CPP/162": "needs openssl"}


def rows(folder: Path, name: str) -> list[dict]:
    path = folder / name
    with gzip.open(path, "rt") if name.endswith(".gz") else open(path) as file:
        return [json.loads(line) for line in file]


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


def humaneval(folder: Path) -> Iterator[Item]:
    for row in rows(folder, "code/humaneval.jsonl.gz"):
        yield row["task_id"], fenced(row["prompt"] + row["canonical_solution"]), row, "accepted"


def humaneval_x(folder: Path, language: str) -> Iterator[Item]:
    for row in rows(folder, "code/humaneval_x_python_cpp.jsonl.gz"):
        if row["task_id"].startswith(language):
            fence = "python" if language == "Python" else "cpp"
            wanted = LIBRARIES.get(row["task_id"]) or "accepted"
            yield row["task_id"], fenced(row["prompt"] + row["canonical_solution"], fence), row, wanted


def mbpp(folder: Path) -> Iterator[Item]:
    for row in rows(folder, "code/mbpp.jsonl.gz"):
        yield f"MBPP/{row['task_id']}", fenced(row["code"]), row, "accepted"


def livecodebench(folder: Path) -> Iterator[Item]:
    for row in rows(folder, "code/livecodebench_samples.jsonl"):
        tests = parse_tests(row["test"])
        if tests.cases:
            yield from echoes([({"tests": [vars(case) for case in tests.cases]}, row["id"])])
        else:
            table = dict((json.dumps(args), value) for args, value in tests.calls)
            code = f"import json\nT = json.loads({json.dumps(table)!r})\nclass Solution:\n"
            code += f" def {tests.entry}(self, *args): return T[json.dumps(args)]"
            yield f"{row['id']} echoed", fenced(code), tests, "accepted"
            wrong = code.replace("return T[json.dumps(args)]", "return [T[json.dumps(args)]]")
            yield f"{row['id']} changed", fenced(wrong), tests, "rejected"


def gcj_kickstart(folder: Path) -> Iterator[Item]:
    for row in rows(folder, "code/gcj_kickstart_stdio.jsonl.gz"):
        examples = [dict(test, name=f"example{number}") for number, test in enumerate(row["examples"])]
        tests = [*examples, *row["official_tests"]]
        for number, solution in enumerate(row["solutions"]):
            name = f"{row['id']}#{number}"
            program = Program("cpp" if solution["language"] == "cpp" else "python", solution["code"])
            if row["checker"] == "custom":
                yield name, program, None, "needs its own checker"
                continue
            wanted = {test: RECORDED[verdict] for test, verdict in solution["verdicts"].items()}
            known = [test for test in tests if test["name"] in wanted]
            given = {"tests": known, "comparison": "floats", "time_limit": 12.0}
            yield name, program, given, tuple(wanted[test["name"]] for test in known)


def library_checker(folder: Path) -> Iterator[Item]:
    for row in rows(folder, "code/library_checker_cpp.jsonl.gz"):
        params = "".join(f"static const long long {k} = {v};\n" for k, v in row["params"].items())
        for solution in row["solutions"]:
            name, program = f"{row['id']}/{solution['name']}", Program("cpp", solution["code"])
            if row["checker"] != "standard":
                yield name, program, None, "needs its own checker"
                continue
            if "base.hpp" in solution["code"]:
                yield name, program, None, "includes base.hpp, which the data set does not hold"
                continue
            given = {"tests": row["tests"], "time_limit": row["time_limit"], "headers": {"params.h": params}}
            yield name, program, given, tuple(RECORDED[verdict] for verdict in solution["verdicts"])


def kattis(folder: Path) -> Iterator[Item]:
    for row in rows(folder, "code/kattis_examples.jsonl"):
        for submission in row["submissions"]:
            language = {"cpp": "cpp", "python3": "python"}.get(submission["language"])
            name = f"{row['id']}/{submission['name']} ({submission['expected']})"
            if language is None or submission["expected"] == "slow_accepted":
                reason = "accepted only after minutes" if language else "in C"
                yield name, None, None, reason
                continue
            if submission["name"] == "memory_limit.cc":
                yield name, None, None, "with -O2 the compiler removes its allocation, and it prints what it should"
                continue
            wanted = "accepted" if submission["expected"] == "accepted" else "rejected"
            given = {"tests": row["tests"], "time_limit": 2.0, "memory_limit": 512}
            yield name, Program(language, submission["code"]), given, wanted


def echoes(questions) -> Iterator[Item]:
    """Per question: its expected outputs as a program, the same with CR LF, and with one token changed."""
    for raw, name in questions:
        tests = parse_tests(raw)
        answers = {case.input: case.output for case in tests.cases}
        program = "import sys\nANSWERS = {!r}\nsys.stdout.write(ANSWERS[sys.stdin.read()])"
        yield f"{name} echoed", fenced(program.format(answers)), tests, "accepted"
        lines = {k: v.replace("\r\n", "\n").replace("\n", "\r\n") for k, v in answers.items()}
        yield f"{name} with CR LF", fenced(program.format(lines)), tests, "accepted"
        changed = {k: change_one_token(v) for k, v in answers.items()}
        if changed != answers:
            yield f"{name} changed", fenced(program.format(changed)), tests, "rejected"
        else:
            yield f"{name} changed", None, None, "no token in the expected outputs"


def change_one_token(text: str) -> str:
    """The middle token replaced by another one of its kind."""
    words = text.split()
    if not words:
        return text
    word = words[len(words) // 2]
    other = str(int(word) + 1) if word.lstrip("-").isdigit() and word.isascii() else word + "x"
    at = 0
    for before in words[: len(words) // 2]:
        at = text.index(before, at) + len(before)
    at = text.index(word, at)
    return text[:at] + other + text[at + len(word) :]


def distinct(tests: CodeTests) -> CodeTests:
    """Each input once: a table of answers can give only one."""
    cases: dict[str, Case] = {}
    for case in tests.cases:
        cases.setdefault(case.input, case)
    return CodeTests(cases=tuple(cases.values()))


def stdio(folder: Path, name: str) -> Iterator[Item]:
    for number, row in enumerate(rows(folder, f"code/{name}_stdio.jsonl.gz")):
        yield from echoes([(distinct(parse_tests(row["tests"])), f"{name}/{number}")])


def model_outputs(folder: Path) -> Iterator[Item]:
    questions = {row["task_id"]: row for row in rows(folder, "code/humaneval.jsonl.gz")}
    for number, row in enumerate(rows(folder, "outputs/humaneval_model_outputs.jsonl.gz")):
        if row["task_id"] in questions:
            program = Program("python", row["completion"])
            wanted = "accepted" if row["passed"] else "time_limit" if row["status"] == "timeout" else "rejected"
            yield f"{row['task_id']}#{number}", program, questions[row["task_id"]], wanted


SETS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "humaneval": humaneval,
    "humaneval_x_python": lambda folder: humaneval_x(folder, "Python"),
    "humaneval_x_cpp": lambda folder: humaneval_x(folder, "CPP"),
    "mbpp": mbpp,
    "livecodebench": livecodebench,
    "gcj_kickstart": gcj_kickstart,
    "library_checker": library_checker,
    "kattis": kattis,
    "code_contests": lambda folder: stdio(folder, "code_contests"),
    "codeforces": lambda folder: stdio(folder, "codeforces"),
    "model_outputs": model_outputs,
}


def agrees(report, wanted) -> str:
    """Returns "same", "time" (only the time limit separates them) or "other"."""
    outcome = report.verdict.outcome
    if isinstance(wanted, tuple):
        got = tuple(test.outcome for test in report.tests)
        if got == wanted:
            return "same"
        apart = {pair for pair in zip(got, wanted) if pair[0] != pair[1]}
        timed = len(got) == len(wanted) and all("time_limit" in pair for pair in apart)
        return "time" if timed else "other"
    if wanted == "accepted":
        same = outcome == "correct"
    elif wanted == "rejected":
        same = outcome == "wrong"
    else:
        same = report.verdict.detail == wanted
    return "same" if same else "time" if report.verdict.detail == "time_limit" else "other"


def sweep(folder: Path, name: str, limits: Limits) -> dict:
    """Judges one set and returns its counts, its disagreements and its rate."""
    items = list(SETS[name](folder))
    skipped = [(item[0], item[3]) for item in items if item[2] is None or item[3] in LIBRARIES.values()]
    left_out = {item[0] for item in items if (item[0], item[3]) in skipped}
    items = [item for item in items if item[0] not in left_out]
    counts: collections.Counter = collections.Counter()
    other = []
    started = time.monotonic()
    for item, report in zip(items, judge_many(((item[1], item[2]) for item in items), limits=limits)):
        kind = agrees(report, item[3])
        counts[kind] += 1
        if kind != "same":
            other.append((kind, item[0], item[3], report.verdict.detail, report.message))
    seconds = time.monotonic() - started
    return {
        "set": name,
        "programs": len(items),
        "same": counts["same"],
        "time": counts["time"],
        "other": counts["other"],
        "skipped": skipped,
        "differences": other,
        "per_second": len(items) / seconds,
    }


def main() -> None:
    if not os.environ.get("SDZERO_DATA"):
        sys.exit("set SDZERO_DATA to the folder of the test data")
    folder = Path(os.environ["SDZERO_DATA"])
    print(f"{'set':20} {'programs':>8} {'same':>6} {'time':>5} {'other':>5} {'skipped':>7} {'per second':>10}")
    for name in sys.argv[1:] or SETS:
        done = sweep(folder, name, Limits(first_failure_stop=False))
        print(
            f"{name:20} {done['programs']:8} {done['same']:6} {done['time']:5} {done['other']:5} "
            f"{len(done['skipped']):7} {done['per_second']:10.1f}",
            flush=True,
        )
        for line in done["differences"][:20]:
            print("    differs:", *line)
        for reason, count in collections.Counter(reason for _, reason in done["skipped"]).items():
            print(f"    skipped {count}: {reason}")


if __name__ == "__main__":
    main()
