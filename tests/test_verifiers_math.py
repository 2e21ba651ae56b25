"""The maths verifier: extraction, the table of known grader faults, other graders' cases, real model outputs."""

import gzip
import json
import os
import re
import threading
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from sdzero_jax.verifiers import MathSettings, answers_equal, extraction, verify_math

HERE = Path(__file__).parent / "data" / "verifiers"
SHARED = os.environ.get("SDZERO_DATA")
needs_shared = pytest.mark.skipif(not SHARED, reason="SDZERO_DATA names no folder with the larger test sets")


def jsonl(path):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


# ---- the table: every row where a known grader errs, and its neighbours where it does not

ANSWERS = jsonl(HERE / "answers.jsonl")


@pytest.mark.parametrize("row", ANSWERS, ids=[f"{row['row']}: {row['pred']} | {row['gold']}" for row in ANSWERS])
def test_answers_of_the_table(row):
    wanted = "correct" if row["equal"] else "wrong"
    assert answers_equal(row["pred"], row["gold"]).outcome == wanted
    assert verify_math(f"So the answer is $\\boxed{{{row['pred']}}}$.", row["gold"]).outcome == wanted


@pytest.mark.parametrize(
    "response, gold, outcome",
    [
        (r"\boxed{3}. Wait, actually \boxed{4}", "4", "correct"),
        (r"\boxed{3}. Wait, actually \boxed{4}", "3", "wrong"),
        (r"\boxed{7}. I have boxed the answer", "7", "correct"),
        ("I checked 17 cases", "17", "unparseable"),
        (r"unclosed \boxed{12", "12", "correct"),
        (r"\fbox{8}", "8", "correct"),
        (r"<think>\boxed{6}</think> I give up", "6", "unparseable"),
        (r"<think>\boxed{6}</think> It is \boxed{7}.", "7", "correct"),
        (r"a</think>\boxed{1}</think>\boxed{2}", "2", "correct"),
        (r"\boxed{}", "1", "unparseable"),
        ("", "1", "unparseable"),
    ],
)
def test_responses_of_the_table(response, gold, outcome):
    verdict = verify_math(response, gold)
    assert verdict.outcome == outcome
    assert verdict.reward == (1.0 if outcome == "correct" else 0.0)


@pytest.mark.parametrize(
    "text, content",
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5} and text", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.} end }", r"\left\{ x \right."),  # \{ is no brace of the box
        (r"\boxed{\boxed{4}}", "{4}"),
        (r"{\boxed{3", "3"),
        (r"$\boxed{3$, as {shown}. So", "3"),
        (r"\boxed{3, then \boxed{4}", "4"),
        (r"\\boxed{9}", "9"),
        (r"is $\boxed 5$.", "5"),
        (r"\boxed{1} } \fbox{2}", "2"),
        (r"\boxed{1} \boxed{", "1"),
        (r"\boxedfoo{3}", None),
        ("boxed{3}", None),
    ],
)
def test_last_box(text, content):
    assert extraction.last_box(text) == content


def test_extraction_is_linear():
    parts = (r"\boxed{", r"\boxed{1}", "{", "\\", r"\boxed ", "$", r"\boxed{}", "</think>", "a", "answer is a ")
    for text in (part * (300_000 // len(part)) for part in parts):
        started = time.perf_counter()
        extraction.last_box(text)
        extraction.stated_answer("answer: " + text[:7900])
        assert time.perf_counter() - started < 2.0, text[:20]


# ---- what the exact rules add


@pytest.mark.parametrize(
    "pred, gold, equal",
    [
        ("0.0000001", "0.0000002", False),
        ("0.0833333333333333", r"\frac{1}{12}", True),
        ("0.0535714285714164", r"\frac{3}{56}", True),
        ("0.333333", "1/3", True),
        ("0.666666", "2/3", False),
        ("0.9999999999", "1", False),
        (r"10\%", "0.1", True),
        (r"10\%", r"0.1\%", False),
        (r"0.1\overline{6}", r"\frac{1}{6}", True),
        (r"2.\overline{3}", "2.33", False),
        (r"6.02\times 10^{23}", "602000000000000000000000", True),
        ("1,234,567", r"1{,}234{,}567", True),
        (r"\$32,\!348", "32348", True),
        ("-3", "3", False),
        ("twenty-one", "21", True),
        ("one hundred and five", "105", True),
        ("one two", "3", False),
        ("1011_2", "1011_{2}", True),
        ("1011", "1011_2", True),  # the question asked for base two
        ("11", "1011_2", False),
        ("1112122_3", "1112112_3", False),
        (r"\text{A2F}_{16}", r"\text{a2f}_{16}", True),
        ("2:4", "1:2", True),
        ("1:2", "1:3", False),
        ("7:32", "S:T=7:32", True),
        ("3-4j", "3+4i", False),
        ("5 m", "5 cm", False),
        (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}", True),
        (r"15\mbox{ cm}^2", r"15\text{ cm}", False),
        (r"60\text{ miles per hour}", r"60\text{ mph}", True),
        (r"17\text{ apples}", "17", True),
        (r"3\text{ p.m.}", r"3\text{ a.m.}", False),
        (r"90^\circ", "90", True),
        (r"90^\circ", r"90\text{ degrees}", True),
        (r"\text{Evelyn}", "evelyn", True),
        ("listen", "silent", False),
        (r"\text{no}", r"\text{on}", False),
        (r"\text{(C)}", "C", True),
        ("D", "C", False),
        (r"\{3,1,2\}", r"\{1,2,3\}", True),
        (r"(3,\infty)", "x>3", True),
        (r"(3,\infty)", r"x\ge 3", False),
        ("x=5", "5", True),
        ("5", "x=5", True),
        ("2x+y=3", "3", True),  # an equation is read for its right side where a value is asked
        ("3", "2x+y=3", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
        (r"\sqrt{x^2}", "x", False),
        (r"(x+1)^2", "x^2+2x+1", True),
        (r"\text{is not }7", "7", False),
        ("１２", "12", True),
        ("√2", r"\sqrt{2}", True),
        ("5 5", "10", False),
    ],
)
def test_answers_equal(pred, gold, equal):
    assert (answers_equal(pred, gold).outcome == "correct") is equal


@pytest.mark.parametrize(
    "pred, gold, equal",
    [
        ("p=5,q=2;p=7,q=3", r"p = 5, q = 2 \quad \text{and} \quad p = 7, q = 3", True),
        ("q=3,p=7;q=2,p=5", "p=5,q=2 or p=7,q=3", True),
        ("p=5,q=3;p=7,q=2", "p=5,q=2;p=7,q=3", False),  # the same four equations, other pairs
        ("p=5,q=3,p=7,q=2", "p=5,q=2,p=7,q=3", False),
        ("p=5,q=2", "p=5,q=2;p=7,q=3", False),
        ("y=3,x=1,x=2", "x=1,x=2,y=3", True),  # no pairs: a plain list
        ("p=5,q=2;p=7,q=3;p=7,q=3", "p=5,q=2;p=7,q=3", False),
        ("p=5,q=2;p=7,q=9^{9^{9^{9}}}", "p=5,q=2;p=7,q=3", None),
        ("f(t)=t^2+1", "f(x)=x^2+1", True),
        ("f(t)=x^2+1", "f(x)=x^2+1", False),
        ("f(t)=t+x", "f(x)=x+x", False),
        ("g(t)=t^2+1", "f(x)=x^2+1", False),
        (r"f(t)=\exp(t)", r"f(x)=\exp(x)", True),
    ],
)
def test_solutions_and_functions(pred, gold, equal):
    outcome = {True: "correct", False: "wrong", None: "timeout"}[equal]
    assert answers_equal(pred, gold).outcome == outcome


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 4", "4"),
        ("Final Answer: The largest $n$ is 34. I hope it is correct.", "34"),
        ("Final answer: Jane started 3 hours ago.", r"3\text{ hours ago}"),
        ("first the answer is 5, then the answer is $\\frac12$", r"\frac12"),
        ("answer: -3.5", "-3.5"),
        ("answer is 1,000.99", "1,000.99"),
        ("The answer is 5 cm", r"5\text{ cm}"),
        ("answer is 2x+3", None),
        ("answer is 3 + 4i", None),
        ("answer is x = 3", None),
        ("answer is 3 or 4", None),
        ("The answer is not 5", None),
        ("I checked 17 cases", None),
    ],
)
def test_stated_answer(text, answer):
    assert extraction.stated_answer(text) == answer


def test_a_stated_answer_counts_for_answers_only():
    assert answers_equal("So the answer is 4.", "4").outcome == "correct"
    assert answers_equal("The answer is 5 cm.", r"5\text{ m}").outcome == "wrong"
    assert verify_math("So the answer is 4.", "4").outcome == "unparseable"
    assert verify_math(r"\boxed{5}", "no: the answer is 5").outcome != "correct"  # never read from a reference


def test_units_can_be_relaxed():
    relaxed = MathSettings(strict_units=False)
    assert answers_equal("5 cm", r"5 \text{ m}").outcome == "wrong"
    assert answers_equal("5 cm", r"5 \text{ m}", relaxed).outcome == "correct"
    assert answers_equal("6 cm", r"5 \text{ m}", relaxed).outcome == "wrong"


def test_float_digits_and_length_are_read():
    assert answers_equal("0.3333", "1/3", MathSettings(float_digits=4)).outcome == "correct"
    assert answers_equal("0.3333", "1/3").outcome == "wrong"
    sum_of_ones = "+".join("1" * 40)
    assert answers_equal(sum_of_ones, "40").outcome == "correct"
    assert answers_equal(sum_of_ones, "40", MathSettings(max_chars=50)).outcome == "unparseable"


def test_several_golds_and_bad_golds():
    assert verify_math(r"\boxed{2}", ["1", "2"]).outcome == "correct"
    assert verify_math(r"\boxed{3}", ["1", "2"]).outcome == "wrong"
    assert verify_math(r"\boxed{3}", [r"\frac{", "3"]).outcome == "correct"
    assert verify_math(r"\boxed{3}", [r"\frac{", "4"]).outcome == "wrong"
    for gold in ("", [], " $ $ ", r"\frac{"):
        verdict = verify_math(r"\boxed{3}", gold)
        assert (verdict.outcome, verdict.reward) == ("gold_unparseable", None)
    assert verify_math(r"\boxed{\frac{}", "3").outcome == "unparseable"


def test_a_list_of_boxes_is_a_list_only_when_given_as_an_answer():
    text = r"$\boxed{1}$ and $\boxed{2}$"
    assert answers_equal(text, "1,2").outcome == "correct"
    assert verify_math(text, "2").outcome == "correct"
    assert verify_math(text, "1,2").outcome == "wrong"
    assert answers_equal(r"\boxed{1} no no no \boxed{2}", "1,2").outcome == "wrong"


# ---- attacks

ATTACKS = [
    'open("PWNED.txt","w").write("x")',
    '__import__("os").system("touch PWNED.txt")',
    r"\text{__import__('os').system('touch PWNED.txt')}",
    "9^{9^{9^{9}}}",
    "(10^9)!",
    r"\sum_{k=1}^{100000}1/k^k",
    r"\prod_{k=1}^{10^{9}} k",
    r"\binom{10^9}{10^8}",
    r"2^{2^{100}}",
    r"10^{-10^{10}}",
    r"\lim_{x\to 0} x^{x^{x^{x^x}}}",
    "(" * 400 + "1" + ")" * 400,
    "{" * 450 + "1" + "}" * 450,
    "1+" * 450 + "1",
    "x^" * 200 + "x",
    r"\sqrt{" * 150 + "2" + "}" * 150,
    r"\frac{1}{0}",
    r"0^{0^{-1}}",
    "\x00\ud800",
]


@pytest.mark.parametrize("attack", ATTACKS, ids=[repr(attack)[:40] for attack in ATTACKS])
def test_attacks_end_and_execute_nothing(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = MathSettings(deadline=2.0)
    for pred, gold in ((attack, "5"), ("5", attack)):
        started = time.monotonic()
        verdict = verify_math(rf"\boxed{{{pred}}}", gold, settings)
        assert time.monotonic() - started < 3.0
        assert verdict.outcome != "correct"
    assert not list(tmp_path.iterdir())


def test_an_outer_alarm_survives_and_threads_are_refused():
    import signal

    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0)
        verify_math(r"\boxed{x+1}", "1+x")
        assert 90 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 100
    finally:
        signal.signal(signal.SIGALRM, previous)
    caught = []

    def call():
        try:
            verify_math(r"\boxed{1}", "1")
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


# ---- other graders' own cases

_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+(?:\{[^{}]*\})?", re.DOTALL)


def excluded(row):
    """Why a grader's case is none of ours, by rule, or None."""
    pred, config = row["pred"], row["config"]
    if config.get("verifier") == "PuzzleMatcherVerifier":
        return "string puzzle"
    if config.get("reward_fn") == "geometry3k_reward_fn" and re.search(r"\[[^\]]*\]", pred):
        return "answer in square brackets"
    if "<answer>" in pred:
        return "answer tags"
    if config.get("precision", 6) < 4:
        return "rounding to fewer than 4 digits"
    if config.get("strict") is False:
        return "variables renamed"
    prose = len(re.findall(r"[A-Za-z]{2,}", _FORMULA.sub("", pred))) >= 2
    if not extraction.boxes(pred) and prose and not _FORMULA.search(pred):
        return "prose without a box or a formula"
    return None


# Cases on which we differ on purpose or by choice, with the reason.
DISAGREEMENTS = {
    "g0136": "a long solution without a box that never says which number is its answer",
    "g0157": "as g0136: the last formula is an inequality, the answer stands in the prose behind it",
    "g0166": "the last box is an intermediate 255: the policy takes boxes only",
    "g0247": "prose around a currency sign, no box",
    "g0371": "2.33 is not 2.333...: a rounded number is not the exact one",
    "g0372": "2.3 is not 2.333...",
    "g0422": "2.6667 is not 8/3",
}


def check_graders(rows):
    kept = [row for row in rows if excluded(row) is None]
    wrong = {
        row["id"]
        for row in kept
        if (answers_equal(row["pred"], row["gold"]).outcome == "correct") is not row["expected"]
    }
    assert wrong <= set(DISAGREEMENTS), wrong - set(DISAGREEMENTS)
    return len(kept), len(kept) - len(wrong)


def test_graders_sample():
    kept, agreed = check_graders(jsonl(HERE / "graders.jsonl"))
    assert kept > 200
    assert agreed / kept >= 0.95


@needs_shared
def test_graders_all():
    kept, agreed = check_graders(jsonl(Path(SHARED) / "graders" / "math_grader_triples.jsonl"))
    print(f"graders: {agreed} of {kept} cases agree")
    assert kept == 246
    assert agreed / kept >= 0.97


# ---- real model outputs


def agreement(rows):
    right = sum((verify_math(row["response"], row["gold"]).outcome == "correct") is row["correct"] for row in rows)
    return right / len(rows)


def test_outputs_sample():
    assert agreement(jsonl(HERE / "outputs.jsonl.gz")) >= 0.98


@needs_shared
@pytest.mark.slow
def test_outputs_labelled():
    rows = jsonl(Path(SHARED) / "outputs" / "math_model_outputs.jsonl.gz")
    labelled = [r for r in rows if r["dataset"].startswith("MATH") and r["correct"] is not None and r["has_boxed"]]
    assert len(labelled) == 1365
    rate = agreement(labelled)
    print(f"labelled MATH outputs with a box: {100 * rate:.2f} % agree")
    assert rate >= 0.99


# ---- fuzz

PIECES = r"""
\boxed{ \fbox{ \boxed } { $ \frac{ \sqrt \text{ \left( \right) \{ \} ( ) [ ] , ; : = < > + - * / ^ _ ! % \% \pi
\infty \cup \in \pm \sum_{k=1}^{n} \int \log \sin x y i j e E cm \circ 0 1 2 10 0.5 .3 1,000 \overline{3} ∞ ² ½ １ 。
\begin{pmatrix} \end{pmatrix} & \\ </think> <think> and or five ...
"""
_SEQUENCES = st.lists(st.sampled_from(PIECES.split()), max_size=14)
FUZZ = st.one_of(_SEQUENCES.map("".join), _SEQUENCES.map(" ".join), st.text(max_size=40))
FUZZ_EXAMPLES = int(os.environ.get("SDZERO_FUZZ", "2000"))


@pytest.mark.slow
def test_fuzz():
    slowest = (0.0, "", "")

    @hypothesis.settings(max_examples=FUZZ_EXAMPLES, deadline=None, derandomize=True, database=None)
    @hypothesis.given(body=FUZZ, gold=FUZZ)
    def check(body, gold):
        nonlocal slowest
        settings = MathSettings(deadline=2.0)
        for text, call in ((body, answers_equal), (rf"\boxed{{{body}}}", verify_math)):
            started = time.monotonic()
            verdict = call(text, gold, settings)
            seconds = time.monotonic() - started
            slowest = max(slowest, (seconds, text, gold))
            assert seconds < 3.0, (text, gold)
            assert (verdict.reward is None) == (verdict.outcome in ("timeout", "error", "gold_unparseable"))

    check()
    print(f"fuzz: {FUZZ_EXAMPLES} examples, the slowest verdict took {slowest[0]:.2f} s: {slowest[1:]}")
