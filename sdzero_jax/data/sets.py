"""The named problem sets: where each comes from, its files, and how a row becomes a Question.

A split's files are found by name, in a folder given with `--from` (this project's spelling or the hub's
layout) or in a snapshot of the hub's repository. Revisions are the hub's "main" unless a commit is given;
the commit that "main" stood for is recorded with the prepared set, and pins it from then on.
Leaves out fetching and writing (`prepare`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from sdzero_jax.data import code_rows
from sdzero_jax.data.questions import BadRow, FieldMapping, Row, last_boxed, plain_fields, question_of
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.examples import Question

# (row, name of the set, number of the row, split, file) -> Question, or None for a row of another split.
Convert = Callable[[Row, str, int, str, str], Question | None]


@dataclasses.dataclass(frozen=True)
class Source:
    """Files of one split: a repository on the hub, patterns there, and names in a local folder."""

    repo: str
    hub: tuple[str, ...]
    local: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A problem set. `companion` rows lend the fields that a row lacks, joined by id."""

    name: str
    sources: dict[str, Source]
    convert: Convert
    licence: str
    companion: Source | None = None


def _math(row: Row, name: str, number: int, split: str, file: str, **fields: str) -> Question:
    return question_of(row, FieldMapping(**fields), f"{name}-{split}", number)


def _openr1(row: Row, name: str, number: int, split: str, file: str) -> Question:
    """OpenR1-Math: the demonstration is the first generation that math-verify accepted and that is whole."""
    question = question_of(row, FieldMapping(prompt="problem", answer="answer", id="uuid"), name, number)
    right = row.get("correctness_math_verify") or ()
    whole = row.get("is_reasoning_complete") or (True,) * len(right)
    for generation, is_right, is_whole in zip(row.get("generations") or (), right, whole):
        if is_right and is_whole:
            return dataclasses.replace(question, metadata={**question.metadata, "demonstration": generation})
    return question


def _olympiad(row: Row, name: str, number: int, split: str, file: str) -> Question:
    """OlympiadBench, text only: the list in final_answer is one answer (several values joined by commas)."""
    question = _math(row, name, number, split, file, prompt="question", answer="final_answer", id="id")
    context = row.get("context")
    solution = row.get("solution")
    metadata = plain_fields(row, leave_out={"question", "final_answer", "context"})
    if isinstance(solution, list) and solution:
        metadata["solution"] = solution[0]
    prompt = f"{context.strip()}\n\n{question.prompt}" if context else question.prompt
    return dataclasses.replace(question, prompt=prompt, metadata=metadata)


def _countdown(row: Row, name: str, number: int, split: str, file: str) -> Question:
    """Countdown as d1 ("30,100,93" -> "23") and Countdown-Tasks-3to4 (nums, target) spell it."""
    numbers = [int(part) for part in (row["nums"] if "nums" in row else row["input"].split(","))]
    target = int(row["target"] if "target" in row else row["output"])
    prompt = (
        f"Using each of the numbers {', '.join(map(str, numbers))} exactly once, with +, -, *, / and "
        f"parentheses, write an expression that equals {target}."
    )
    metadata = {"numbers": numbers, "target": target}
    return Question(f"{name}-{split}-{number - 1:06d}", prompt, (str(target),), "countdown", metadata)


def _codeforces(row: Row, name: str, number: int, split: str, file: str) -> Question:
    if "problem" in row:  # statement and tests only, as rllm ships them
        return question_of(row, FieldMapping(kind="code"), f"{name}-{split}", number)
    language = row.get("language") or ("python" if "_py" in file else "cpp")
    return code_rows.codeforces(row, name, language)


def _mbpp(row: Row, name: str, number: int, split: str, file: str) -> Question | None:
    """One file may hold all of MBPP; its paper's splits are ranges of task_id (1 to 10 are few-shot)."""
    ranges = {"test": (11, 510), "validation": (511, 600), "train": (601, 974)}
    low, high = ranges[split]
    return code_rows.mbpp(row, name) if low <= int(row["task_id"]) <= high else None


def _code(convert: Callable[[Row, str], Question]) -> Convert:
    return lambda row, name, number, split, file: convert(row, name)


def _amo(row: Row, name: str, number: int, split: str, file: str) -> Question:
    """AMO-Bench; answers that are a description are left to a judge that we do not have."""
    answer = row.get("answer")
    if isinstance(answer, str) and last_boxed(answer) is None and row.get("answer_type") in (None, "description"):
        raise BadRow("answer in words")
    return _math(row, name, number, split, file)


_MIT, _APACHE, _CC_BY = "MIT", "Apache-2.0", "CC-BY-4.0"

SETS: dict[str, NamedSet] = {
    named.name: named
    for named in (
        NamedSet(
            "gsm8k",
            {
                "train": Source("openai/gsm8k", ("main/train-*.parquet",), ("gsm8k_train.jsonl*",)),
                "test": Source("openai/gsm8k", ("main/test-*.parquet",), ("gsm8k_test.jsonl*",)),
            },
            functools.partial(_math, prompt="question", answer="answer"),
            _MIT,
        ),
        NamedSet(
            "math500",
            {"test": Source("HuggingFaceH4/MATH-500", ("test.jsonl",), ("math500_test.jsonl*",))},
            functools.partial(_math, prompt="problem", answer="answer", id="unique_id"),
            _MIT,
        ),
        NamedSet(
            "math",
            {
                "train": Source(
                    "DigitalLearningGmbH/MATH-lighteval", ("data/train-*.parquet",), ("math_train*.jsonl*",)
                ),
                "test": Source("DigitalLearningGmbH/MATH-lighteval", ("data/test-*.parquet",), ("math_test*.jsonl*",)),
            },
            functools.partial(_math, prompt="problem"),
            _MIT,
        ),
        NamedSet(
            "aime24",
            {"test": Source("HuggingFaceH4/aime_2024", ("data/train-*.parquet",), ("aime24*.jsonl*",))},
            functools.partial(_math, prompt="problem", answer="answer", id="id"),
            "problems (c) MAA",
        ),
        NamedSet(
            "aime25",
            {"test": Source("MathArena/aime_2025", ("data/train-*.parquet",), ("aime25*.jsonl*",))},
            functools.partial(_math, prompt="problem", answer="answer"),
            "CC-BY-NC-SA-4.0; problems (c) MAA",
        ),
        NamedSet(
            "hmmt25",
            {"test": Source("MathArena/hmmt_feb_2025", ("data/train-*.parquet",), ("hmmt25*.jsonl*",))},
            functools.partial(_math, prompt="problem", answer="answer"),
            "CC-BY-NC-SA-4.0",
        ),
        NamedSet(
            "amc23",
            {"test": Source("math-ai/amc23", ("data/test-*.parquet", "test-*.parquet"), ("amc23*.jsonl*",))},
            functools.partial(_math, answer="answer", id="id"),
            "problems (c) MAA",
        ),
        NamedSet(
            "olympiadbench",
            {"test": Source("Hothan/OlympiadBench", ("OE_TO_maths_en_COMP/*.parquet",), ("olympiadbench*.jsonl*",))},
            _olympiad,
            _APACHE,
        ),
        NamedSet(
            "amo_bench",
            {
                "test": Source(
                    "meituan-longcat/AMO-Bench",
                    ("data/test*.parquet", "test*.parquet", "test*.jsonl"),
                    ("amo_bench*.jsonl*",),
                )
            },
            _amo,
            _MIT,
        ),
        NamedSet(
            "openr1_math_220k",
            {"train": Source("open-r1/OpenR1-Math-220k", ("data/train-*.parquet",), ("openr1_math_220k*.json*",))},
            _openr1,
            _APACHE,
        ),
        NamedSet(
            "deepscaler",
            {"train": Source("agentica-org/DeepScaleR-Preview-Dataset", ("deepscaler.json",), ("deepscaler*.json*",))},
            functools.partial(_math, prompt="problem", answer="answer"),
            "MIT; AIME problems (c) MAA",
        ),
        NamedSet(
            "codeforces_cots",
            {
                "train": Source(
                    "open-r1/codeforces-cots",
                    ("solutions_decontaminated/*.parquet", "solutions_py_decontaminated/*.parquet"),
                ),
                "test": Source(
                    "open-r1/codeforces", ("verifiable-prompts/test-*.parquet",), ("codeforces*stdio.jsonl*",)
                ),
            },
            _codeforces,
            "CC-BY-4.0; statements (c) Codeforces and their authors",
            companion=Source("open-r1/codeforces", ("verifiable/*.parquet",)),
        ),
        NamedSet(
            "livecodebench",
            {"test": Source("livecodebench/code_generation_lite", ("test*.jsonl",), ("livecodebench_samples.jsonl*",))},
            _code(code_rows.live_code_bench),
            "CC",
        ),
        NamedSet(
            "humaneval",
            {"test": Source("openai/openai_humaneval", ("openai_humaneval/test-*.parquet",), ("humaneval.jsonl*",))},
            _code(code_rows.human_eval),
            _MIT,
        ),
        NamedSet(
            "humaneval_x",
            {
                "test": Source(
                    "zai-org/humaneval-x",
                    ("data/python/data/humaneval.jsonl", "data/cpp/data/humaneval.jsonl"),
                    ("humaneval_x*.jsonl*",),
                )
            },
            _code(code_rows.human_eval),
            _APACHE,
        ),
        NamedSet(
            "mbpp",
            {
                split: Source("google-research-datasets/mbpp", (f"full/{split}-*.parquet",), ("mbpp.jsonl*",))
                for split in ("train", "validation", "test")
            },
            _mbpp,
            _CC_BY,
        ),
        NamedSet(
            "countdown",
            {
                "train": Source(
                    "Jiayi-Pan/Countdown-Tasks-3to4", ("data/train-*.parquet",), ("countdown*train.jsonl*",)
                ),
                "test": Source("Jiayi-Pan/Countdown-Tasks-3to4", (), ("countdown*test.jsonl*",)),
            },
            _countdown,
            _APACHE,
        ),
    )
}


def named_set(name: str) -> NamedSet:
    """Looks a set up; an unknown name is refused with the nearest one."""
    if name not in SETS:
        raise UserError(f"unknown problem set {name!r}{nearest(name, SETS)}")
    return SETS[name]


def convert(named: NamedSet, row: dict[str, Any], number: int, split: str, file: str) -> Question | None:
    """One row as a Question, None for a row of another split. Raises: BadRow, also for a missing field."""
    try:
        return named.convert(row, named.name, number, split, file)
    except BadRow:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise BadRow(f"not a row of {named.name} ({type(error).__name__}: {error})") from None
