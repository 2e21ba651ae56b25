"""The paper's comparison in miniature: every method on the embedded chain task, at equal sampled tokens.

Command:   python run.py compare configs/compare_paper.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  44 minutes for five seeds; docs/RESULTS.md has the table and the tuning of the learning rates
"""

import dataclasses

from configs import demo
from sdzero_jax.compare import Comparison, Entry

BUDGET = 98_304  # sampled tokens: 4 responses of 24 tokens for each of 1,024 questions


def get_comparison() -> Comparison:
    config = demo.get_config()
    replace = dataclasses.replace
    config = replace(
        config,
        train=replace(config.train, validate_every=0),
        distill=replace(config.distill, rounds=1, validate_every=0),
        # Collapse is a result here, not a reason to stop.
        health=replace(config.health, keep_rate_stop=0.0, min_mean_tokens=0.0),
    )
    return Comparison("compare_paper", config, ENTRIES, seeds=(10, 11, 12, 13, 14), budget=BUDGET, reference="grpo")


def rates(*values: str) -> tuple[tuple[str, ...], ...]:
    """A grid over the learning rate: every method gets the same number of points."""
    return tuple((f"train.optimizer.learning_rate={value}",) for value in values)


DIVERGENCE_RATES = rates("1e-4", "2e-4", "4e-4", "8e-4")
REWARD_RATES = rates("1.25e-4", "2.5e-4", "5e-4", "1e-3")
OTHER_RATES = rates("2.5e-4", "5e-4", "1e-3", "2e-3")
SRT_RATES = tuple((f"srt.optimizer.learning_rate={value}",) for value in ("1e-3", "2e-3", "4e-3", "8e-3"))


def method(label: str, *settings: str, rate: str, grid=DIVERGENCE_RATES, fill: bool = True) -> Entry:
    """A method of the stage `train` with its tuned learning rate, among which `--tune` looked."""
    return Entry(label, settings=(*settings, f"train.optimizer.learning_rate={rate}"), fill=fill, grid=grid)


BOLD = ("train.optimizer.clip_norm=1.0", "train.optimizer.warmup_fraction=0.05")
SUPERVISED = ("train.batch_size=64", *BOLD)
GRPO = ("train.method=grpo", "train.samples=4", "train.batch_size=64", "train.updates=2", *BOLD)
REINFORCE = ("train.method=reinforce", "train.samples=1", "train.batch_size=64", "train.updates=2", *BOLD)
SDFT = (
    "train.method=sdft", "train.samples=1", "train.objective.divergence=forward_kl",
    "train.teacher.schedule=ema", "train.teacher.ema_rate=0.01",
)  # fmt: skip
SDZERO = ("train.start=srt", "train.method=sdzero", "train.samples=1")
GUIDED = (
    "srt.data.mode=compact", "train.start=srt", "train.samples=1",
    "train.objective.guidance=1", "train.objective.mask_end=true",
)  # fmt: skip
BEYOND = (*GUIDED, "train.teacher.schedule=sync_every", "train.teacher.sync_steps=16")
HYBRID = (
    *GUIDED, "train.method=sdzero_hybrid", "train.batch_size=64", "train.updates=2", "train.optimizer.clip_norm=1.0",
    "train.teacher.schedule=sync_every", "train.teacher.sync_steps=8",
)  # fmt: skip

ENTRIES = {
    "base": Entry("base", "base"),
    "sft": method("SFT", "train.method=sft", *SUPERVISED, rate="2e-3", grid=OTHER_RATES, fill=False),
    "rft": method("RFT", "train.method=rft", *SUPERVISED, rate="2e-3", grid=OTHER_RATES, fill=False),
    "grpo": method("GRPO", *GRPO, rate="5e-4", grid=REWARD_RATES),
    "sdft": method("SDFT", *SDFT, rate="4e-4"),
    "srt": Entry("SRT", "srt", ("srt.optimizer.learning_rate=2e-3",), grid=SRT_RATES),
    "srt_budget": Entry(
        "SRT at full budget", "srt", ("collect.responses=2", "srt.optimizer.learning_rate=2e-3"), grid=SRT_RATES
    ),
    "phase2": method("phase 2 only", "train.method=sdzero", "train.samples=1", rate="4e-4"),
    "sdzero": method("SD-Zero", *SDZERO, rate="4e-4"),
    "sdzero_sync": method(
        "SD-Zero + sync", *SDZERO, "train.teacher.schedule=sync_every", "train.teacher.sync_steps=64", rate="4e-4"
    ),
    "sdzero_grpo": method(
        "SD-Zero, then GRPO", "distill.passes=1", "train.start=distill", *GRPO, rate="5e-4", grid=REWARD_RATES
    ),
    "reinforce": method("REINFORCE", *REINFORCE, rate="2.5e-4", grid=REWARD_RATES),
    "guided_replay": method("guided SD-Zero + replay + sync", "train.method=sdzero_replay", *BEYOND, rate="4e-4"),
    "hybrid": method("the same + policy gradient", *HYBRID, rate="1e-3", grid=OTHER_RATES),
}
