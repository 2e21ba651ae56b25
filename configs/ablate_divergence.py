"""Every divergence of `sdzero_jax.losses` in SD-Zero's second phase, all else equal.

Command:   python run.py compare configs/ablate_divergence.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  16 minutes beside other work, seeds 10 to 12; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry

DIVERGENCES = (
    "reverse_kl", "forward_kl", "mixed_kl(0.5)", "jsd(0.5)", "topk(4)", "topk(4, support=student, tail=bucket)",
    "topk(4, tail=zero_outside)", "pointwise_clip(0.05)", "sampled_token",
)  # fmt: skip
# topk(4) of 20 tokens stands for the top 64 of a real vocabulary.
ENTRIES = {
    name: Entry(name, settings=(*compare_paper.SDZERO, f"train.objective.divergence={name}"), fill=True)
    for name in DIVERGENCES
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    named = dataclasses.replace(comparison, name="ablate_divergence", entries=ENTRIES, reference="reverse_kl")
    return dataclasses.replace(named, seeds=(10, 11, 12))
