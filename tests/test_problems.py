"""Real questions in the stages: splits, overlap, grading by kind, and a whole run on them."""

import contextlib
import dataclasses
import json
import pathlib

import pytest
from model_folders import model_folders

from sdzero_jax import pipeline
from sdzero_jax.config import load_config, override, validate
from sdzero_jax.data import QuestionsConfig, code_rows, load_questions, prepare_set
from sdzero_jax.data.questions import FieldMapping
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.graders import Graders, GradersConfig, grade_countdown
from sdzero_jax.methods import NothingLeft, find_method
from sdzero_jax.problems import ProblemsConfig, RealProblems, TaskProblems, demonstration, open_tokenizer
from sdzero_jax.runs import Run, check_fit
from sdzero_jax.tasks import TaskConfig, make_task
from sdzero_jax.training import on_policy_source
from sdzero_jax.verifiers import PoolSettings
from sdzero_jax.verifiers.sandbox import get_sandbox

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [
    {"id": f"q{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"It is \\boxed{{{2 * i}}}."}
    for i in range(40)
]
ONE_WORKER = GradersConfig(pool=PoolSettings(workers=1))


class Letters:
    """A tokenizer whose ids are characters; what RealProblems needs of one."""

    def encode_prompt(self, prompt):
        return list(prompt.encode())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids(questions):
    return [question.id for question in questions]


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "train.jsonl", ROWS[:30]), write(tmp_path / "test.jsonl", ROWS[30:])


def open_problems(files, **settings):
    train, test = files
    return RealProblems(ProblemsConfig(train=train, test=test, graders=ONE_WORKER, **settings), Letters())


def test_splits_are_disjoint_shuffled_by_the_seed_and_carry_the_instruction_once(files):
    problems = open_problems(files, validation_share=0.3)
    validation = problems.questions("validation", 5)
    train = problems.questions("train", 15)
    assert not set(ids(train)) & set(ids(validation))
    assert ids(problems.questions("train", 4)) == ids(train)[:4]  # a prefix, whatever was asked before
    assert ids(train) == ids(open_problems(files, validation_share=0.3).questions("train", 15))
    assert ids(train) != sorted(ids(train))
    assert ids(train) != ids(open_problems(files, validation_share=0.3, seed=1).questions("train", 15))
    assert all(question.prompt.count("\\boxed{}") == 1 for question in train)


def test_long_prompts_are_left_out_and_too_many_questions_refused_with_the_number_there_is(files):
    shortest = len("What is 1 + 1? ") + len(open_problems(files).questions("test", 1)[0].prompt.split("? ")[1])
    problems = open_problems(files, max_prompt_tokens=shortest)  # one-digit questions only
    with pytest.raises(UserError, match=r"ask for at most ([5-9]|10)$"):
        problems.questions("train", 30)
    assert all(int(question.gold[0]) < 20 for question in problems.questions("train", 5))


def test_too_few_questions_name_the_settings_that_give_more(files):
    def refused(problems, split, count):
        with pytest.raises(UserError) as caught:
            problems.questions(split, count)
        return str(caught.value).partition(", but ")[2]

    train, test = files
    assert refused(open_problems(files, validation_share=0.001), "validation", 4) == (
        f"a share of 0.001 of {train} has 0; raise problems.validation_share, "
        "or set problems.validation to a larger set"
    )
    assert refused(open_problems(files, validation=test, overlap="allow"), "validation", 11) == (
        f"{test} has 10; set problems.validation to a larger set, or ask for at most 10"
    )
    assert refused(open_problems(files, max_prompt_tokens=1), "test", 4) == (
        f"{test} has 0 of 10 within problems.max_prompt_tokens=1; raise problems.max_prompt_tokens, "
        "or set problems.test to a larger set"
    )


def test_a_task_says_itself_what_its_answers_are():
    class Spoken(type(make_task(TaskConfig()))):
        """An own task whose answers stand after no mark."""

        def answer(self, question):
            return f"It is {question.gold[0]}."

        def stated(self, response):
            return response.partition("It is ")[2].rstrip(".") or None

    problems = TaskProblems(Spoken(0))
    question = problems.questions("test", 1)[0]
    assert problems.answer(question) == f"It is {question.gold[0]}."
    assert problems.stated(question, "It is 3.") == "3" and problems.stated(question, "#3") is None


@pytest.mark.parametrize("name", ["gsm8k_tiny", "mbpp_tiny"])
def test_the_rehearsals_train_with_their_own_lengths(name, tmp_path):
    """The stage `train` takes their prompts without a setting."""
    prepare_set("mbpp", data_dir=tmp_path, source_dir=ROOT / "tests/data/questions")
    settings = (
        f"problems.tokenizer={model_folders(tmp_path)}/qwen3", f"problems.data_dir={tmp_path}",
        f"base.cache_dir={tmp_path}/cache", "problems.graders.code.unsafe_without_sandbox=true",
    )  # fmt: skip
    config = override(load_config(f"configs/{name}.py"), settings)
    validate(config)
    run = Run(config)
    with contextlib.closing(run.problems):
        check_fit(run, "train")
    assert config.train.sampling == config.distill.sampling and config.train.questions == config.distill.questions


@pytest.mark.parametrize("overlap, kept", [("allow", 30), ("drop", 28)])
def test_overlap_with_evaluation_is_refused_unless_the_setting_says_otherwise(tmp_path, overlap, kept):
    spelled = [dict(ROWS[0], problem="what is  $0 + 0$ ?"), dict(ROWS[1], id="other")]
    files = write(tmp_path / "train.jsonl", ROWS[:30]), write(tmp_path / "test.jsonl", [*spelled, *ROWS[30:]])
    validation = write(tmp_path / "validation.jsonl", [dict(ROWS[39], problem="Why?")])
    with pytest.raises(UserError, match="overlap with evaluation: 2 with"):
        open_problems(files, validation=validation).questions("train", 1)
    assert len(open_problems(files, validation=validation, overlap=overlap).questions("train", kept)) == kept


def run_on(problems, *changes):
    real = "problems.train=x.jsonl" if isinstance(problems, RealProblems) else "seed=0"
    run = Run(override(load_config("configs/demo.py"), [real, "collect.questions=8", *changes]))
    run.__dict__["problems"] = problems  # instead of what the settings say
    return run


def test_real_questions_that_were_collected_are_not_distilled_where_there_are_others(files):
    problems = open_problems(files, validation="", validation_share=0.2)

    def taken(count, *changes):
        run = run_on(problems, f"distill.questions={count}", f"train.questions={count}", *changes)
        return run.training_questions

    first = ids(problems.questions("train", 20))
    assert (ids(taken(12)("distill")[0]), taken(12)("distill")[1]) == (first[8:20], 0)
    few, shared = taken(18)("distill")  # 8 + 18 are more than there are
    assert (ids(few), shared) == (ids(problems.questions("train", 18)), 8)
    assert ids(taken(12, "distill.collected=reuse")("distill")[0]) == first[:12]
    with pytest.raises(UserError, match="26 train questions are asked for"):
        taken(18, "distill.collected=skip")("distill")
    assert ids(taken(12)("train")[0]) == first[:12]  # from the base: nothing was collected
    assert ids(taken(12, "train.start=srt")("train")[0]) == first[8:20]


def test_an_embedded_task_collects_and_distils_on_the_same_questions_unless_told(files):
    run = run_on(TaskProblems(make_task(TaskConfig())), "distill.questions=12")
    assert run.training_questions("distill") == (run.problems.questions("train", 12), 8)
    skipping = run_on(run.problems, "distill.questions=12", "distill.collected=skip")
    assert skipping.training_questions("distill") == (run.problems.questions("train", 20)[8:], 0)


def test_sdft_is_refused_where_no_question_has_what_its_teacher_reads(files):
    bare = [{name: row[name] for name in ("id", "problem", "answer")} for row in ROWS[:30]]
    problems = open_problems((write(pathlib.Path(files[0]).with_name("bare.jsonl"), bare), files[1]))
    run = run_on(problems, "train.method=sdft", "train.samples=1", "train.questions=4")
    questions, _ = run.training_questions("train")
    method = find_method("sdft")
    with pytest.raises(NothingLeft, match="none of 4 training questions has the demonstration"):
        on_policy_source(run, "train", run.config.train, method, questions, 1)


def test_replayed_sequences_may_be_as_long_as_the_teachers():
    run = run_on(TaskProblems(make_task(TaskConfig())), "train.method=sdzero_replay", "train.replay.max_length=0")
    questions, _ = run.training_questions("train")
    source = on_policy_source(run, "train", run.config.train, find_method("sdzero_replay"), questions, 1)
    longest = [answered(questions[0], [5] * 29 + [run.domain.tokenizer.end_id], reward) for reward in (0.0, 1.0)]
    source._memory.remember(longest)
    batch = source._memory.batch(0)
    assert batch["tokens"].shape[1] == run.config.train.layout.rev_length(1) and batch["weights"].any()


def answered(question, ids, reward):
    verdict = Verdict.of("correct" if reward else "wrong")
    return Rollout(question, (1, 5), tuple(ids), (0.0,) * len(ids), "stop", verdict)


def test_localisation_looks_at_wrong_answers_whatever_is_distilled(monkeypatch, tmp_path):
    asked = {}

    def scored(*args, divergence, **_):
        asked.update(layout=args[5], divergence=divergence)
        return []

    monkeypatch.setattr(pipeline, "sample_responses", lambda *_, **__: [])
    monkeypatch.setattr(pipeline, "localisation_records", scored)
    monkeypatch.setattr(pipeline, "top_alternatives", lambda *_, **__: [])
    monkeypatch.setattr(Run, "params", lambda *_: ({}, {}))
    run = run_on(
        TaskProblems(make_task(TaskConfig())),
        "distill.layout.sample_mask=correct", "distill.objective.divergence=sampled_token",
    )  # fmt: skip
    pipeline.localise(run, tmp_path)
    assert asked["layout"].sample_mask == "all" and asked["divergence"] == "reverse_kl"


def test_bad_settings_are_refused(files, tmp_path):
    with pytest.raises(UserError, match=r"problems\.test is not"):
        RealProblems(ProblemsConfig(train=files[0]), Letters())
    with pytest.raises(UserError, match="no such file"):
        open_problems((str(tmp_path / "none.jsonl"), files[1])).questions("train", 1)
    with pytest.raises(UserError, match=r"problems\.tokenizer or base\.pretrained"):
        open_tokenizer(ProblemsConfig(train=files[0]), "")
    poem = Question("p", "Write a poem", ("?",), "poem")
    with pytest.raises(UserError, match="no verifier for questions of kind 'poem'"):
        Graders(GradersConfig()).check([poem])


def test_code_is_refused_where_there_is_no_sandbox(monkeypatch):
    monkeypatch.setattr("sdzero_jax.verifiers.sandbox.find_sandbox", lambda python="": None)
    with pytest.raises(UserError, match="bubblewrap"):
        Graders(GradersConfig()).check([Question("c", "Sort", (), "code", {"tests": {}})])


def test_c_plus_plus_needs_a_compiler(monkeypatch):
    import shutil

    from sdzero_jax import graders

    found = shutil.which
    monkeypatch.setattr(graders, "get_sandbox", lambda *_: None)
    question = Question("c", "Sort", (), "code", {"tests": {}, "language": "cpp"})
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else found(name))
    Graders(GradersConfig()).check([question])
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "g++" else found(name))
    with pytest.raises(UserError, match=r"install g\+\+"):
        Graders(GradersConfig()).check([question])
    Graders(GradersConfig()).check([Question("p", "Sort", (), "code", {"tests": {}, "language": "python"})])


@pytest.fixture
def judge():
    """Skips where programs cannot be judged."""
    try:
        get_sandbox("", False)
    except UserError as error:
        pytest.skip(str(error))


def test_each_kind_goes_to_its_verifier_and_verdicts_come_back_in_order(judge):
    row = {"task_id": 11, "text": "Double it", "code": "", "test_list": ["assert double(4) == 8"]}
    code = code_rows.mbpp(row, "mbpp")
    math = Question("m", "Half of 1?", ("\\frac{1}{2}",), "math")
    countdown = Question("d", "Reach 23", ("23",), "countdown", {"numbers": [30, 100, 93], "target": 23})
    program = "```python\ndef double(x):\n    return {} * x\n```"
    asked = [code, math, countdown, code, math, countdown]
    responses = [
        program.format(2), "\\boxed{0.5}", "\\boxed{30+93-100}", program.format(3), "\\boxed{0.6}", "\\boxed{23}",
    ]  # fmt: skip
    graders = Graders(ONE_WORKER)
    try:
        assert [verdict.reward for verdict in graders.verify(asked, responses)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    finally:
        graders.close()


@pytest.mark.parametrize(
    "response, outcome",
    [
        ("so \\boxed{(93 - 100) + 30 = 23}", "correct"),
        ("\\boxed{30 + 93 - 100}", "correct"),
        ("\\boxed{93 \\times 1}", "wrong"),  # other numbers
        ("\\boxed{30 + 93 - 100 + 0}", "wrong"),
        ("\\boxed{__import__('os')}", "wrong"),
        ("\\boxed{30/(93-93)}", "wrong"),
        ("\\boxed{30 + 100 - 93}", "wrong"),  # 37
        ("30 + 93 - 100", "unparseable"),
    ],
)
def test_countdown(response, outcome):
    question = Question("d", "", ("23",), "countdown", {"numbers": [30, 100, 93], "target": 23})
    assert grade_countdown(question, response).outcome == outcome


def test_a_demonstration_ends_with_the_gold_answer_in_a_box():
    solution = "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 in all.\n#### 72"
    gsm8k = Question("g", "?", ("72",), "math", {"solution": solution})
    assert demonstration(gsm8k) == "48/2 = 24 clips.\n48+24 = 72 in all.\nThe answer is \\boxed{72}."
    math = Question("m", "?", ("5",), "math", {"solution": "Clearly $\\boxed{5}$."})
    assert demonstration(math) == "Clearly $\\boxed{5}$."
    assert demonstration(Question("n", "?", ("5",), "math")) is None
    whole = Question("w", "?", ("5",), "math", {"solution": "Clearly $\\boxed{5}$.", "demonstration": "By and by, 5."})
    assert demonstration(whole) == "By and by, 5."


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_a_demonstration_of_a_programming_problem_passes_its_tests(name, tmp_path, judge):
    prepare_set(name, data_dir=tmp_path, source_dir=ROOT / "tests/data/questions")
    questions = list(load_questions(QuestionsConfig(f"{name}:test", str(tmp_path))))[:10]
    graders = Graders(ONE_WORKER)
    assert {v.outcome for v in graders.verify(questions, [demonstration(q) for q in questions])} == {"correct"}
    graders.close()


def tiny_tokenizer(folder, texts):
    """A Hugging Face tokenizer folder of a few hundred pieces, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|model|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|model|>{% endif %}"
    )
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    return str(folder), tokenizer.get_vocab_size()


@pytest.mark.slow
def test_a_whole_run_on_real_questions(tmp_path, monkeypatch, capsys):
    """Every stage of the GSM8K rehearsal with a small tokenizer; what was written can be graded again."""
    from sdzero_jax import pipeline, runs
    from sdzero_jax.config import load_config, validate
    from sdzero_jax.verifiers.grade_file import grade_file

    config = load_config("configs/gsm8k_tiny.py")
    questions = RealProblems(
        dataclasses.replace(config.problems, tokenizer=""), Letters(),
    )  # fmt: skip
    questions.max_prompt_tokens = 10_000
    texts = [part for q in questions.questions("train", 50) for part in (q.prompt, demonstration(q))]
    tokenizer, size = tiny_tokenizer(tmp_path / "tokenizer", texts)
    config = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        model=dataclasses.replace(config.model, vocab_size=size),
        problems=dataclasses.replace(
            config.problems, tokenizer=tokenizer, graders=ONE_WORKER, fields=FieldMapping(kind="math")
        ),
        base=dataclasses.replace(config.base, cache_dir=str(tmp_path / "cache")),
    )
    validate(config)
    with runs.open_run(config) as run:
        summary = pipeline.run_all(run)
    models = [name for name, value in summary.items() if isinstance(value, dict) and "avg@2" in value]
    assert models == ["base", "srt", "sdzero"]
    assert summary["base"]["avg@2"] > 0  # it recites, and the grader agrees
    traces = [json.loads(line) for line in (tmp_path / "run/collect/traces.jsonl").read_text().splitlines()]
    traces = [trace for trace in traces if "question_id" in trace]
    assert len(traces) == 8 and all(trace["init_verdict"]["outcome"] != "error" for trace in traces)
    report = (tmp_path / "run/report/report.html").read_text()
    assert "gsm8k_tiny" in report
    # Responses lie in the run as text with their gold answers: another grader finds the same rewards.
    records = [json.loads(line) for line in (tmp_path / "run/evaluate/base.jsonl").read_text().splitlines()]
    records = [record for record in records if "response" in record]
    again = write(tmp_path / "again.jsonl", [{k: r[k] for k in ("response", "gold")} for r in records])
    counts = grade_file(again).outcomes
    assert counts.get("correct", 0) == sum(record["reward"] == 1.0 for record in records) > 0


@pytest.mark.slow
def test_a_whole_run_on_programs(tmp_path):
    """MBPP through every stage with the real tokenizer, HumanEval evaluated; the judge repeats its verdicts."""
    from sdzero_jax import pipeline, runs
    from sdzero_jax.config import load_config, override, validate

    for name in ("mbpp", "humaneval"):
        prepare_set(name, data_dir=tmp_path / "data", source_dir=ROOT / "tests/data/questions")
    tokenizer = model_folders(tmp_path) / "qwen3"
    config = override(
        load_config("configs/mbpp_tiny.py"),
        [f"run_dir={tmp_path}/run", f"base.cache_dir={tmp_path}/cache", f"problems.data_dir={tmp_path}/data",
         f"problems.tokenizer={tokenizer}", "problems.test=humaneval:test", "base.steps=60", "distill.questions=2"],
    )  # fmt: skip
    validate(config)
    with runs.open_run(config) as run:
        pipeline.run_all(run)
        traces = [json.loads(line) for line in (run.folder("collect") / "traces.jsonl").read_text().splitlines()]
        questions = {question.id: question for question in run.problems.questions("train", config.collect.questions)}
        traces = [trace for trace in traces if "question_id" in trace]
        asked = [questions[trace["question_id"]] for trace in traces]
        texts = [run.domain.tokenizer.decode(trace["init_ids"]) for trace in traces]
        again = [verdict.outcome for verdict in run.problems.verify(asked, texts)]
    assert again == [trace["init_verdict"]["outcome"] for trace in traces] and "correct" in again
    metrics = (tmp_path / "run/distill/round_1/metrics.jsonl").read_text()
    assert metrics.count('"divergence"') == 2
    for model in ("base", "srt", "sdzero"):
        records = (tmp_path / f"run/evaluate/{model}.jsonl").read_text().splitlines()
        assert any("humaneval-" in record for record in records)
    assert "mbpp_tiny" in (tmp_path / "run/report/report.html").read_text()
