"""Overrides, type checks, differences and help of the configuration."""

import dataclasses
import pathlib
import re

import pytest

from sdzero_jax import runs, settings
from sdzero_jax.config import Config, load_config, validate
from sdzero_jax.errors import UserError


@pytest.fixture(scope="module")
def demo() -> Config:
    return load_config("configs/demo.py")


def test_overrides_reach_nested_fields_and_leave_the_rest(demo):
    changed = settings.override(
        demo,
        [
            "seed=3",
            "srt.optimizer.learning_rate=1e-4",
            "srt.data.balance=false",
            "distill.objective.divergence=jsd(0.5)",
        ],
    )
    assert changed.seed == 3
    assert changed.srt.optimizer.learning_rate == 1e-4
    assert changed.srt.data.balance is False
    assert changed.distill.objective.divergence == "jsd(0.5)"
    assert settings.differences(demo, changed) == [
        "distill.objective.divergence: reverse_kl -> jsd(0.5)",
        "seed: 0 -> 3",
        "srt.data.balance: True -> False",
        "srt.optimizer.learning_rate: 0.001 -> 0.0001",
    ]
    assert demo.seed == 0


def test_a_list_is_spelled_as_json(demo):
    changed = settings.override(demo, ['model.layer_pattern=["full","full"]'])
    assert changed.model.layer_pattern == ("full", "full")


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("sed=1", "unknown setting 'sed'; did you mean 'seed'?"),
        ("srt.optimiser.beta1=0.9", "did you mean 'srt.optimizer'?"),
        ("srt.optimizer.learning_rat=1", "did you mean 'srt.optimizer.learning_rate'?"),
        ("seed=one", "seed=one: input should be a valid integer"),
        ("seed=1.5", "seed=1.5: input should be a valid integer"),
        ("srt.data.mode=both", "'joint', 'two_stage', 'compact'"),
        ("srt.data.balance=perhaps", "valid boolean"),
        ("srt=1", "'srt' is a group; set one of srt.epochs"),
        ("seed.x=1", "seed is a single value"),
        ("seed", "not of the form a.b=c"),
    ],
)
def test_bad_overrides_name_what_came_and_what_was_wanted(demo, assignment, words):
    with pytest.raises(UserError) as error:
        settings.override(demo, [assignment])
    assert words in str(error.value)


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("distill.rounds=0", "distill.rounds is 0; wanted at least 1"),
        ("phrases=paper2", "did you mean 'paper'?"),
        ("distill.objective.divergence=reverse_kk", "did you mean 'reverse_kl'"),
        ("distill.sampling.max_new_tokens=31", "exceeds distill.layout.max_response=30"),
        ("distill.teacher.schedule=sync_every", "sync_steps"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(demo, assignment, words):
    with pytest.raises(UserError) as error:
        validate(settings.override(demo, [assignment]))
    assert words in str(error.value)


def test_a_config_file_with_a_wrong_type_is_refused(demo):
    with pytest.raises(UserError, match=r"setting srt.epochs='4'"):
        validate(dataclasses.replace(demo, srt=dataclasses.replace(demo.srt, epochs="4")))
    with pytest.raises(UserError, match=r"setting srt.optimizer.learning_rate=None"):
        optimizer = dataclasses.replace(demo.srt.optimizer, learning_rate=None)
        validate(dataclasses.replace(demo, srt=dataclasses.replace(demo.srt, optimizer=optimizer)))


def test_config_files_that_do_not_exist_or_fail_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config file 'configs/dem.py'; did you mean 'configs/demo.py'"):
        load_config("configs/dem.py")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return Confi()\n")
    with pytest.raises(UserError, match="NameError"):
        load_config(str(broken))
    broken.write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match="returned int, wanted Config"):
        load_config(str(broken))


def test_help_lists_every_field_with_default_and_meaning(demo):
    lines = settings.describe(demo)
    assert len(lines) == len(settings.flatten(demo))
    text = "\n".join(lines)
    assert "srt.epochs=4\n        passes over the (balanced) traces" in text
    assert "[frozen | ema | sync_every | sync_on_plateau | live]" in text
    assert not [line for line in lines if line.endswith("        ")], "a field without a meaning"


def test_hashes_follow_values_only(demo):
    same = load_config("configs/demo.py")
    assert settings.digest(demo) == settings.digest(same)
    assert settings.digest(demo) != settings.digest(settings.override(demo, ["seed=1"]))


@pytest.mark.parametrize(
    "section, changes, parts, nearest",
    [
        ("srt", ["srt.batch_size=16", "srt.microbatches=2"], 16, 1),  # a row a device already
        ("srt", ["srt.batch_size=24", "srt.microbatches=8"], 2, 6),
        ("distill", ["distill.batch_size=8", "distill.samples=2", "distill.microbatches=16"], 8, 2),
        ("train", ["train.method=sft", "train.batch_size=8", "train.samples=2", "train.microbatches=4"], 4, 2),
        (
            "distill",
            [
                "distill.method=sdzero_replay",
                "distill.batch_size=16",
                "distill.microbatches=4",
                "distill.replay.pairs=8",
            ],
            4,
            2,
        ),
    ],
)
def test_parts_of_a_batch_that_leave_devices_without_a_row_are_refused(demo, section, changes, parts, nearest):
    own = getattr(settings.override(demo, changes), section)
    with pytest.raises(UserError, match=f"do not divide over {parts} devices .*; nearest: {nearest}$"):
        runs._check_microbatches(section, own, parts)
    runs._check_microbatches(section, dataclasses.replace(own, microbatches=nearest), parts)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["train.method=grpo", "train.samples=1"], r"train.samples=1 makes every advantage .*advantage.baseline=batch"),
        (["train.method=reinforce", "train.samples=1", "train.advantage.baseline=group"], "every advantage"),
        (
            ["train.method=reinforce", "train.samples=1", "train.advantage.drop_uniform=true"],
            "leaves out every question",
        ),
        (["train.method=sdzero", "train.advantage.drop_uniform=true"], "changes nothing with train.method=sdzero"),
        (["train.method=grpo", "train.sampling.temperature=0"], "wanted more than 0"),
        (["train.method=grpo", "train.sampling.top_p=0.9"], "set train.sampling.top_p=1$"),
        (["distill.method=sdzero_hybrid", "distill.sampling.top_k=5"], "set distill.sampling.top_k=0$"),
        (["train.method=grpo", "train.policy.kl_weight=0.1", "train.teacher.schedule=live"], "which is 0"),
        (
            ["train.method=grpo", "train.policy.kl_weight=0.1", "train.teacher.schedule=sync_every",
             "train.teacher.sync_steps=8"],
            "sync_every moves nothing with train.method=grpo",
        ),
        (
            ["train.method=reinforce", "train.policy.kl_weight=0.1", "train.teacher.schedule=sync_on_plateau"],
            "sync_on_plateau moves nothing",
        ),
        (["train.method=sdft", "train.objective.guidance=1"], "guidance=1.0 changes nothing"),
        (["distill.method=sdft_answer", "distill.objective.guidance=1"], "distill.objective.guidance=1.0"),
    ],
)  # fmt: skip
def test_settings_that_train_nothing_are_refused(demo, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        validate(settings.override(demo, changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes, one_more",
    [
        (["train.method=grpo", "train.samples=1", "train.advantage.baseline=batch"], "train.advantage.baseline=group"),
        (
            ["train.method=sft", "train.samples=1", "train.advantage.drop_uniform=true", "train.microbatches=2"],
            "train.method=sdzero",
        ),
        (
            ["train.method=grpo", "train.policy.kl_weight=0.1", "train.teacher.schedule=ema"],
            "train.teacher.schedule=live",
        ),
        (
            ["train.method=sdzero_hybrid", "train.policy.kl_weight=0.1", "train.teacher.schedule=sync_every",
             "train.teacher.sync_steps=8"],
            "train.method=grpo",
        ),
        (
            ["train.method=sdzero", "train.samples=1", "train.objective.guidance=1", "train.teacher.schedule=live"],
            "train.method=sdft",
        ),
    ],
)  # fmt: skip
def test_their_neighbours_are_accepted_and_one_change_away_from_refusal(demo, changes, one_more):
    accepted = settings.override(demo, changes)
    validate(accepted)
    with pytest.raises(UserError):
        validate(settings.override(accepted, [one_more]))


CONFIGS = sorted(p for p in pathlib.Path("configs").glob("*.py") if "\ndef get_config" in p.read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_its_header_says_how_to_run_it(path):
    config = load_config(str(path))
    validate(config)
    assert (config.name, config.run_dir) == (path.stem, f"runs/{path.stem}")
    header = path.read_text().split('"""')[1]
    assert f"python run.py {path}" in re.search(r"^Command:.*", header, re.MULTILINE)[0]
    assert all(f"\n{word}:" in header for word in ("Hardware", "Expected"))
