"""Presets: they fit every config, later settings win, and they say what the paper and the authors' code say."""

import dataclasses
import pathlib

import pytest

from sdzero_jax.config import load_config, override, validate
from sdzero_jax.errors import UserError
from sdzero_jax.presets import PRESETS
from sdzero_jax.runs import Run
from sdzero_jax.settings import differences

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_every_config(name, path):
    config = load_config(str(path))
    changed = override(config, [f"preset={name}"])
    validate(changed)
    for own in ("model", "task", "problems", "mesh", "phrases", "base", "evaluate"):
        assert getattr(changed, own) == getattr(config, own)
    sizes = lambda c: (c.collect.questions, c.srt.batch_size, c.distill.batch_size, c.distill.questions)  # noqa: E731
    assert sizes(changed) == sizes(config)


def test_the_paper_and_the_authors_code_as_they_are_written():
    demo = load_config(str(ROOT / "configs/demo.py"))
    paper, code = (override(demo, [f"preset={name}"]) for name in ("paper", "authors_code"))
    assert (paper.collect.revisions, paper.collect.revise, paper.collect.sampling.temperature) == (3, "all", 0.7)
    assert (paper.srt.data.mode, paper.srt.epochs, paper.distill.objective.divergence) == ("joint", 3, "reverse_kl")
    assert not paper.distill.layout.keep_first_eos and paper.distill.teacher.schedule == "frozen"
    top = override(demo, ["preset=paper_top64"])
    assert [line.split(":")[0] for line in differences(*map(dataclasses.asdict, (paper, top)))] == [
        "distill.objective.divergence"
    ]
    assert (code.collect.responses, code.collect.revisions, code.collect.revise) == (3, 3, "wrong")
    assert (code.collect.sampling.top_p, code.distill.sampling.top_p) == (0.9, 1.0)
    assert code.srt.data.mode == "two_stage" and code.distill.layout.keep_first_eos
    adam = code.distill.optimizer
    assert (adam.beta1, adam.beta2, adam.weight_decay, adam.clip_norm) == (0.9, 0.999, 0.01, 1.0)
    sdft = override(demo, ["preset=sdft"]).train
    assert (sdft.method, sdft.objective.divergence) == ("sdft", "forward_kl")
    assert (sdft.teacher.schedule, sdft.teacher.ema_rate) == ("ema", 0.01)
    two_stage = override(demo, ["preset=authors_two_stage"])
    assert two_stage.distill == demo.distill and two_stage.srt == code.srt


def test_the_distillation_of_a_preset_does_not_touch_what_comes_before():
    demo = load_config(str(ROOT / "configs/demo.py"))
    run, top = (Run(override(demo, [f"preset={name}"])) for name in ("paper", "paper_top64"))
    assert run.key("srt") == top.key("srt") and run.key("distill") != top.key("distill")


def test_later_settings_win_and_unknown_names_are_refused():
    demo = load_config(str(ROOT / "configs/demo.py"))
    assert override(demo, ["preset=paper", "srt.epochs=7"]).srt.epochs == 7
    assert override(demo, ["srt.epochs=7", "preset=paper"]).srt.epochs == 3
    with pytest.raises(UserError, match="unknown preset='authors'; did you mean"):
        override(demo, ["preset=authors"])
