"""Presets: what the paper and the authors' code choose, as settings to put on any config with `preset=NAME`.

They hold choices of method, not of size: questions, batch sizes, lengths, learning rates and the control
phrases of a model family stay the config's. Source: arXiv:2604.12002 and the authors' code of May 2026.
Left out of the authors' code: cleaning of collected revisions by patterns (repeated endings, apologetic
openings), and their second stage's layout, with y_init in the user turn, which no later stage reads.
"""

from collections.abc import Sequence

from sdzero_jax.errors import UserError, nearest

_AUTHORS_SRT = (
    "collect.revise=wrong",
    "srt.data.mode=two_stage",
    "srt.epochs=3",
    "srt.optimizer.schedule=cosine",
    "srt.optimizer.warmup_fraction=0.05",
    "srt.optimizer.beta2=0.95",
    "srt.optimizer.weight_decay=1e-4",
)
_PAPER = (
    "collect.responses=1",
    "collect.revisions=3",
    "collect.revise=all",
    "collect.sampling.temperature=0.7",
    "srt.data.mode=joint",
    "srt.epochs=3",
    "distill.method=sdzero",
    "distill.passes=1",
    "distill.samples=1",
    "distill.sampling.temperature=0.7",
    "distill.objective.divergence=reverse_kl",
    "distill.objective.length_mode=seq_mean_token_sum",
    "distill.layout.keep_first_eos=false",
    "distill.teacher.schedule=frozen",
)

PRESETS: dict[str, tuple[str, ...]] = {
    "paper": _PAPER,
    # The paper's own memory: the divergence over the teacher's 64 likeliest tokens.
    "paper_top64": (
        *_PAPER,
        "distill.objective.divergence=topk(64, support=teacher, tail=renormalise, divergence=reverse_kl)",
    ),
    "authors_two_stage": _AUTHORS_SRT,
    "authors_code": (
        *_AUTHORS_SRT,
        "collect.responses=3",
        "collect.revisions=3",
        "collect.sampling.temperature=1.0",
        "collect.sampling.top_p=0.9",
        "distill.method=sdzero",
        "distill.passes=1",
        "distill.samples=1",
        "distill.sampling.temperature=1.0",
        "distill.sampling.top_p=1.0",
        "distill.objective.divergence=topk(64, support=teacher, tail=renormalise, divergence=mixed_kl(0.5))",
        "distill.objective.length_mode=token_mean",
        "distill.layout.keep_first_eos=true",
        "distill.teacher.schedule=frozen",
        "distill.optimizer.schedule=constant",
        "distill.optimizer.warmup_start=0.1",
        "distill.optimizer.warmup_fraction=0.28",  # 20 of the 70 steps that 9,000 questions make, 128 at a time
        "distill.optimizer.beta2=0.999",
        "distill.optimizer.weight_decay=0.01",
        "distill.optimizer.clip_norm=1.0",
    ),
    # A rival: self-distillation fine-tuning as it was published, with a demonstration in the place of a revision.
    "sdft": (
        "train.method=sdft",
        "train.objective.divergence=forward_kl",
        "train.teacher.schedule=ema",
        "train.teacher.ema_rate=0.01",
    ),
}


def expand(assignments: Sequence[str]) -> list[str]:
    """The assignments with every `preset=NAME` replaced by its settings, in its place: later ones win."""
    expanded: list[str] = []
    for assignment in assignments:
        path, _, name = assignment.partition("=")
        if path != "preset":
            expanded.append(assignment)
        elif name in PRESETS:
            expanded += PRESETS[name]
        else:
            raise UserError(f"unknown preset={name!r}{nearest(name, PRESETS)}")
    return expanded
