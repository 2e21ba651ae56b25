"""The command line: bad input is one line and status 2, and nothing is written."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest
from jax.errors import JaxRuntimeError

import run
from sdzero_jax.errors import Fault

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs in an empty folder that sees the configs, so that anything written is noticed."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdzero_jax.signals.install", lambda: None)


@pytest.mark.parametrize(
    "command, words",
    [
        ("colect", "unknown subcommand 'colect'; did you mean 'collect'?"),
        ("configs/smoke", "did you mean the config configs/smoke.py?"),
        ("configs/demo.py --srt.epochs 8", "settings are written without --: srt.epochs=VALUE"),
        ("compare configs/compare_paper.py seed=3", "a comparison has its own, such as 'seeds=[0,1,2]'"),
        ("compare configs/compare_paper.py run_dir=x", "directory="),
        ("compare configs/compare_paper.py only=grpo", "a list is written as 'only=[\"grpo\"]'"),
        ("compare configs/compare_paper.py only=grpo,sdzero", 'a list is written as \'only=["grpo", "sdzero"]\''),
        ("compare configs/compare_paper.py seeds=-1", "a list is written as 'seeds=[-1]'"),
        ("compare configs/compare_paper.py seeds=0,1", "a list is written as 'seeds=[0, 1]'"),
        ("distill configs/demo.py distill.weights=.5", "a list is written as 'distill.weights=[0.5]'"),
        ("configs/dem.py", "did you mean 'configs/demo.py'?"),
        ("srt configs/none.py", "no config file 'configs/none.py'"),
        ("srt README.md", "no config file 'README.md'"),
        ("configs/demo.py sed=1", "did you mean 'seed'?"),
        ("sed=1", "did you mean 'seed'?"),
        ("seed=x", "valid integer"),
        ("configs/demo.py --forkk", "unrecognized arguments: --forkk"),
        ("configs/demo.py mesh.fsdp=3", "does not fit"),
        ("configs/demo.py mesh.data=0", "every axis must be at least 1"),
        ("configs/demo.py model.vocab_size=21", "set model.vocab_size=20"),
        ("configs/demo.py model.num_kv_heads=3", "nearest: 2"),
        ("configs/demo.py task.name=chian", "did you mean 'chain'?"),
        ("configs/demo.py distill.sampling.max_new_tokens=90", "distill.layout.max_response"),
        ("configs/demo.py collect.sampling.top_p=0", "top_p"),
        ("configs/demo.py evaluate.sampling.max_new_tokens=250", "max_new_tokens"),
        ("srt configs/demo.py base.cache_dir=cache", "stage collect has not finished"),
        ("report nowhere", "nowhere"),
        ("base configs/demo.py base.cache_dir=configs/demo.py/x", "set another base.cache_dir="),
        ("base configs/demo.py run_dir=configs/demo.py/x", "set another run_dir="),
        ("compare configs/compare_paper.py base.cache_dir=configs/demo.py/x", "set another base.cache_dir="),
        ("compare configs/compare_paper.py directory=configs/demo.py/x", "set another directory="),
        ("verify configs/demo.py --output configs/demo.py/x", "name another output file"),
        ("data prepare mbpp --from configs --to configs/demo.py/x", "give another folder with --to"),
        ("convert configs configs/demo.py/x", "give another folder"),
        ("convert configs configs/demo.py/x --to orbax", "give another folder"),
        ("configs/countdown.py collect.questions=60000", "collect.questions: "),
        ("doctor configs/demo.py --topology v6e:3x5", "nearest: v6e:4x4"),
        ("verify nowhere.jsonl", "nowhere.jsonl"),
        ("data prepare gsm9k", "did you mean 'gsm8k'?"),
        ("report", "the following arguments are required: RUN"),
        ("doctor configs/demo.py mesh.tensor=7", "does not fit"),
        ("configs/demo.py --fork sed=1", "did you mean 'seed'?"),
        ("--fork configs/demo.py sed=1", "did you mean 'seed'?"),
        ("compare configs/compare_paper.py --tune tuning_seeds=x", "tuning_seeds=x"),
        ("doctor configs/demo.py --topology v5p:2x2x1 sed=1", "did you mean 'seed'?"),
        ("doctor configs/demo.py --topology", "expected one argument"),
        ("configs/demo.py preset=papr", "did you mean 'paper'"),
        ("base configs/demo.py base.optimizer.learning_rate=-1", "learning_rate is -1.0; wanted at least 0"),
        ("base configs/demo.py base.optimizer.schedule=cosin", "'constant', 'cosine' or 'linear'"),
        ("base configs/demo.py base.pretrained=nowhere/at_all", "but not problems.train"),
        ("collect configs/demo.py collect.questions=0", "collect.questions is 0; wanted at least 1"),
        ("collect configs/demo.py collect.sampling.temperature=-1", "temperature is -1.0; wanted at least 0"),
        ("collect configs/demo.py phrases=qwen4", "did you mean 'qwen3'?"),
        ("collect configs/demo.py seed=-1", "seed is -1; wanted a number in [0, 4294967295]"),
        ("srt configs/demo.py srt.optimizer.beta2=nan", "srt.optimizer.beta2 is nan; wanted a number in [0, 1)"),
        ("srt configs/demo.py srt.data.mode=joined", "'joint', 'two_stage'"),
        ('srt configs/demo.py srt.lora.targets=["quary"]', "did you mean 'query'?"),
        ("distill configs/demo.py base.cache_dir=cache", "stage srt has not finished"),
        ("distill configs/demo.py distill.objective.divergence=jsd2(0.5)", "did you mean 'jsd'?"),
        ("distill configs/demo.py distill.objective.divergence=mixed_kl(2)", "wanted a number in [0, 1]"),
        ("distill configs/demo.py distill.teacher.ema_decay=2", "did you mean 'distill.teacher.ema_rate'?"),
        ("distill configs/demo.py health.keep_rate_stop=2", "wanted a number in [0, 1]"),
        ("base configs/demo.py run_dir=ftp://host/run", "wanted a folder or gs://..."),
        ("base configs/demo.py run_dir=s3://bucket/run", "wanted a folder or gs://..."),
        ("base configs/demo.py base.cache_dir=gs://", "wanted a folder or gs://..."),
        ("distill configs/demo.py model.remat=some", "did you mean 'none'?"),
        ("train configs/demo.py train.method=sdzeroo", "did you mean 'sdzero'?"),
        ("train configs/demo.py train.start=nowhere", "'base', 'srt' or 'distill'"),
        ("train configs/demo.py train.lora.rank=-1", "wanted at least 1, or 0 for none"),
        ("train configs/demo.py train.microbatches=5", "train.microbatches=5 does not divide"),
        (
            "train configs/demo.py train.method=sft train.batch_size=16 train.microbatches=32",
            "train.microbatches=32 does not divide train.batch_size = 16",
        ),
        ("evaluate configs/demo.py evaluate.k=0", "evaluate.k is 0; wanted at least 1"),
        ("model.num_heads=0", "num_heads=0; wanted at least 1"),
        ("model.num_kv_heads=0", "num_kv_heads=0; wanted at least 1"),
        ("model.num_layers=0", "num_layers=0; wanted at least 1"),
        ("model.hidden_size=-8", "hidden_size=-8; wanted at least 1"),
        ("model.head_dim=0", "head_dim=0; wanted at least 1"),
        ("model.head_dim=5", "head_dim=5 must be even"),
        ("model.initializer_range=nan", "model.initializer_range is nan; wanted more than 0"),
        ("model.rope_theta=1", "model.rope_theta is 1.0; wanted more than 1"),
        ("base.steps=-1", "base.steps is -1; wanted at least 0"),
        ("base.steps=1000000000000", "base.steps is 1000000000000; wanted less than 2147483648"),
        ("base.optimizer.learning_rate=inf", "learning_rate is inf; wanted less than 2147483648"),
        ("base.optimizer.warmup_fraction=1", "warmup_fraction is 1.0; wanted a number in [0, 1)"),
        ("srt.data.held_out=nan", "srt.data.held_out is nan; wanted a number in [0, 1)"),
        ("srt.data.held_out=2", "srt.data.held_out is 2.0; wanted a number in [0, 1)"),
        ("srt.data.held_out=-1", "srt.data.held_out is -1.0; wanted a number in [0, 1)"),
        ("srt.data.max_length=0", "srt.data.max_length is 0; wanted at least 1"),
        ("distill.objective.temperature=0", "distill.objective.temperature is 0.0; wanted more than 0"),
        ("distill.validation_questions=-3", "distill.validation_questions is -3; wanted at least 1"),
        ("distill.validate_every=-1", "distill.validate_every is -1; wanted at least 0"),
        ("distill.round_scale=nan", "distill.round_scale is nan; wanted more than 0"),
        ("distill.teacher.ema_rate=2", "distill.teacher.ema_rate is 2.0; wanted a number in (0, 1]"),
        ("distill.teacher.schedule=sync_every", "sync_steps is 0; schedule sync_every needs at least 1"),
        ("distill.replay.pairs=0", "distill.replay.pairs is 0; wanted at least 1"),
        ("distill.advantage.decay=2", "distill.advantage.decay is 2.0; wanted a number in [0, 1]"),
        ("distill.policy.clip_low=-1", "distill.policy.clip_low is -1.0; wanted a number in [0, 1]"),
        ("distill.weights=[-1]", "distill.weights is -1.0; wanted at least 0"),
        ("srt.lora.rank=-1", "wanted at least 1, or 0 for none"),
        ("srt.lora.alpha=nan", "srt.lora.alpha is nan; wanted more than 0"),
        ("localisation.questions=0", "localisation.questions is 0; wanted at least 1"),
        ("localisation.examples=-1", "localisation.examples is -1; wanted at least 0"),
        ("problems.graders.pool.deadline=inf", "deadline is inf; wanted a number in (0, 1000000]"),
        ("problems.validation_share=1", "problems.validation_share is 1.0; wanted a number in (0, 1)"),
        ("task.chain.batch_sizes=[0,1,1]", "task.chain.batch_sizes is 0; wanted at least 1"),
        ("hosts.count=-1", "hosts.count is -1; wanted at least 0"),
        ("evaluate configs/demo.py evaluate.split=dev", "'test' or 'validation'"),
        ("localise configs/demo.py base.cache_dir=cache", "stage srt has not finished"),
        ("configs/demo.py sampler.cache_dtype=int4", "'int8' or 'float8_e4m3fn'"),
        ("configs/demo.py hosts.coordinator=localhost:1", "set all three, or none"),
        ("configs/demo.py run_dir=", "run_dir is empty; wanted a directory"),
        ("configs/demo.py seed", "is not of the form a.b=c"),
        ("configs/demo.py model=3", "setting 'model' is a group"),
        ("configs/gsm8k_tiny.py problems.tokenizer=nowhere", "nowhere: no such folder"),
        ("compare configs/demo.py", "has no get_comparison() but get_config()"),
        ("compare configs/compare_paper.py seeds=", "seeds="),
        ("compare configs/compare_paper.py budget=-1", "budget=-1 sampled tokens; wanted at least 1"),
        ("report configs", "not a run directory"),
        ("verify configs/demo.py", "line 1: not a JSON object"),
        ("data prepare gsm8k --from nowhere", "nowhere: no such folder"),
        ("data prepar gsm8k", "choose from 'prepare'"),
        ("convert nowhere out", "nowhere: no such folder"),
        ("convert configs out --dtype float8", "did you mean 'float32'?"),
        ("convert configs configs", "configs is the source itself"),
        ("doctor configs/demo.py --topology v4:2x2", "choose from v5e, v5p, v6e"),
        ("doctor configs/demo.py --gpus 24", "such as 1x24"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, words, capsys, tmp_path):
    status = run.main(command.split())
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("== ")]
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], err
    assert sorted(os.listdir(tmp_path)) == ["configs"], "something was written"


@pytest.mark.parametrize("platform", ["gpuu", "cuda", "tpu"])
def test_a_device_that_is_not_there_is_one_line_and_status_2(platform, tmp_path):
    # A process of its own: jax looks for its devices once.
    environment = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "run.py"), "configs/smoke.py", "base.cache_dir=cache"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if platform != "gpuu" and done.returncode == 0:
        pytest.skip(f"this machine has {platform}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and f"JAX_PLATFORMS={platform}: jax finds no such device here" in lines[0]
    assert "()" not in lines[0]


def test_every_number_of_a_config_has_an_interval(monkeypatch):
    from sdzero_jax import config, settings
    from sdzero_jax.errors import UserError

    demo = config.override(config.load_config("configs/demo.py"), ["distill.weights=[1]", "train.weights=[1]"])
    flat = {name: value[0] if isinstance(value, list) else value for name, value in settings.flatten(demo).items()}
    numbers = [name for name, value in flat.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    assert len(numbers) > 200
    assert [name for name in numbers if config._interval(name) == config._ANY] == []
    for name in numbers:
        for value in (float("nan"), float("inf"), float("-inf"), 10**30):
            with pytest.raises(UserError, match=f"^{name} is "):
                config._check_range(name, value)
    known = {word for name in numbers for word in (name.split(".")[-1], ".".join(name.split(".")[-2:]))}
    named = [word for names in config._INTERVALS.values() for word in names.split()]
    assert set(named) <= known and len(set(named)) == len(named)


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "def get_config():\n    exit('no data')"])
def test_a_config_file_that_exits_is_bad_input(body, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(body)
    assert run.main(["mine.py"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "config mine.py cannot be used: SystemExit" in err


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["distill", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "distill.optimizer.learning_rate=0.0004" in text and "where the teacher comes from" in text


def test_a_run_directory_of_another_config_is_refused_with_the_difference(capsys, tmp_path):
    (tmp_path / "runs" / "demo" / "collect").mkdir(parents=True)
    from sdzero_jax import settings
    from sdzero_jax.config import load_config

    other = settings.flatten(load_config("configs/demo.py"))
    assert other["seed"] == 0
    import dataclasses

    recorded = dataclasses.asdict(settings.override(load_config("configs/demo.py"), ["seed=5"]))
    (tmp_path / "runs" / "demo" / "config.json").write_text(json.dumps(recorded))
    assert run.main([]) == 2
    err = capsys.readouterr().err
    assert "seed: 5 -> 0" in err and "--fork" in err
    (tmp_path / "runs" / "demo" / "collect").rmdir()  # no stage has begun: a setting was mended
    from sdzero_jax.runs import open_run

    assert open_run(load_config("configs/demo.py")).directory == pathlib.Path("runs/demo")


def test_another_process_in_the_run_directory_is_refused(capsys, tmp_path):
    from sdzero_jax.locks import exclusive

    with exclusive(tmp_path / "runs" / "demo"):
        assert run.main(["base"]) == 2
    assert "another process is running" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run.main(["base", "run_dir=file/run"]) == 2
    assert "file/run: cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, line",
    [
        (
            JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
            "another process of this run is",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (Fault("the store is away"), "the store is away"),
    ],
)
def test_what_ends_one_of_several_processes_is_one_line(error, line, monkeypatch, capsys):
    def fails(argv):
        raise RuntimeError("in a library") from error

    def fails_plainly(argv):
        raise error

    left = []
    monkeypatch.setattr("sdzero_jax.hosts._place", lambda: (1, 2))
    monkeypatch.setattr("sdzero_jax.hosts.leave", lambda status: left.append(status) or status)
    monkeypatch.setattr(run, "dispatch", fails_plainly if isinstance(error, Fault) else fails)
    assert run.main([]) == 1 and left == [1]
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("stopped: ") and line in err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_does_not_fit_the_device_is_one_line(processes, monkeypatch, capsys):
    def fails(argv):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.\n\nUsage:\n  ...")

    monkeypatch.setattr("sdzero_jax.hosts._place", lambda: (0, processes))
    monkeypatch.setattr("sdzero_jax.hosts.leave", lambda status: status)
    monkeypatch.setattr(run, "dispatch", fails)
    assert run.main([]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("stopped: out of device memory (RESOURCE_EXHAUSTED"), err
    assert all(word in err for word in ("what was saved stays", "distill.microbatches", "model.remat=full", "doctor"))


def test_other_errors_of_a_device_show_where(monkeypatch):
    def fails(argv):
        raise JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(run, "dispatch", fails)
    with pytest.raises(JaxRuntimeError, match="something else"):
        run.main([])


def test_a_fault_of_ours_on_one_of_several_processes_shows_where_and_does_not_wait(monkeypatch, capsys):
    left = []
    monkeypatch.setattr("sdzero_jax.hosts._place", lambda: (1, 2))
    monkeypatch.setattr("sdzero_jax.hosts.leave", lambda status: left.append(status) or status)
    monkeypatch.setattr(run, "dispatch", lambda argv: {}["nothing"])
    assert run.main([]) == 1 and left == [1]
    assert "KeyError: 'nothing'" in capsys.readouterr().err


def test_the_same_fork_goes_on_and_another_one_is_new(tmp_path):
    from sdzero_jax import runs
    from sdzero_jax.config import load_config, override

    config = override(load_config("configs/demo.py"), [f"run_dir={tmp_path / 'run'}"])
    with runs.open_run(config):
        pass
    for seed, place in ((1, "run-fork1"), (1, "run-fork1"), (2, "run-fork2"), (1, "run-fork1")):
        forked = runs.open_run(override(config, [f"seed={seed}"]), fork=True)
        assert forked.directory == tmp_path / place


def test_what_a_stage_depends_on_changes_its_hash():
    from sdzero_jax import runs
    from sdzero_jax.config import load_config, override

    config = load_config("configs/demo.py")
    keys = lambda *settings: {stage: runs.Run(override(config, settings)).key(stage) for stage in runs.BEFORE}  # noqa: E731
    plain = keys()

    def changed(setting):
        other = keys(setting)
        return {stage for stage in plain if plain[stage] != other[stage]}

    assert changed("distill.objective.divergence=jsd(0.5)") == {"distill", "evaluate", "localise"}
    assert changed("evaluate.sampling.temperature=0.5") == {"distill", "evaluate", "train"}
    assert changed("base.cache_dir=elsewhere") == set()
    assert changed("srt.epochs=3") == {"srt", "distill", "evaluate", "localise"}


def test_doctor_shows_devices_and_memory(capsys):
    assert run.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "jax 0.1" in text and "mesh" in text and "total" in text
