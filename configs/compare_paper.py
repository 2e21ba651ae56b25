"""The paper's comparison in miniature: every method on the embedded chain task, at equal sampled tokens.

Command:   python run.py compare configs/compare_paper.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  docs/RESULTS.md has a first look, of one seed
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


SRT_AT_BUDGET = ("collect.responses=2",)
SUPERVISED = ("train.batch_size=64", "train.optimizer.warmup_fraction=0.05", "train.optimizer.clip_norm=1.0")
BOLD = ("train.optimizer.clip_norm=1.0", "train.optimizer.learning_rate=5e-4")
LARGE = ("train.batch_size=64", "train.updates=2", *BOLD)
POLICY = (*LARGE, "train.optimizer.warmup_fraction=0.05")
GRPO = ("train.method=grpo", "train.samples=4", *POLICY)
REINFORCE = ("train.method=reinforce", "train.samples=1", *POLICY)
SDZERO = ("train.start=srt", "train.method=sdzero", "train.samples=1")
GUIDED = (
    "srt.data.mode=compact", "train.start=srt", "train.samples=1",
    "train.objective.guidance=1", "train.objective.mask_end=true",
)  # fmt: skip
BEYOND = (*GUIDED, "train.teacher.schedule=sync_every", "train.teacher.sync_steps=16")


def rates(*values: str) -> tuple[tuple[str, ...], ...]:
    """A grid over the learning rate: every method gets the same number of points."""
    return tuple((f"train.optimizer.learning_rate={value}",) for value in values)


SRT_RATES = tuple((f"srt.optimizer.learning_rate={value}",) for value in ("5e-4", "1e-3", "2e-3", "4e-3"))
SLOW, FAST = rates("1e-4", "2e-4", "4e-4", "8e-4"), rates("2.5e-4", "5e-4", "1e-3", "2e-3")
ENTRIES = {
    "base": Entry("base", "base"),
    "sft": Entry("SFT", settings=("train.method=sft", *SUPERVISED, "train.optimizer.learning_rate=1e-3"), grid=FAST),
    "rft": Entry("RFT", settings=("train.method=rft", *SUPERVISED, "train.optimizer.learning_rate=1e-3"), grid=FAST),
    "grpo": Entry("GRPO", settings=GRPO, fill=True, grid=FAST),
    "sdft": Entry(
        "SDFT",
        settings=("train.method=sdft", "train.samples=1", "train.objective.divergence=forward_kl"),
        fill=True,
        grid=SLOW,
    ),
    "srt": Entry("SRT", "srt", grid=SRT_RATES),
    "srt_budget": Entry("SRT at full budget", "srt", SRT_AT_BUDGET, grid=SRT_RATES),
    "phase2": Entry(
        "phase 2 only", settings=("train.method=sdzero", "train.samples=1"), fill=True, grid=SLOW
    ),
    "sdzero": Entry("SD-Zero", settings=SDZERO, fill=True, grid=SLOW),
    "sdzero_sync": Entry(
        "SD-Zero + sync",
        settings=(*SDZERO, "train.teacher.schedule=sync_every", "train.teacher.sync_steps=64"),
        fill=True,
        grid=SLOW,
    ),
    "sdzero_grpo": Entry(
        "SD-Zero, then GRPO", settings=("distill.passes=1", "train.start=distill", *GRPO), fill=True, grid=FAST
    ),
    "reinforce": Entry("REINFORCE, batch baseline", settings=REINFORCE, fill=True, grid=FAST),
    "guided_replay": Entry(
        "guided SD-Zero + replay + sync", settings=("train.method=sdzero_replay", *BEYOND), fill=True, grid=SLOW
    ),
    "hybrid": Entry(
        "the same + policy gradient",
        settings=(
            "train.method=sdzero_hybrid", *BEYOND, *LARGE, "train.teacher.sync_steps=8",
        ),
        fill=True,
        grid=FAST,
    ),
}  # fmt: skip
