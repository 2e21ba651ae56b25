"""The strongest methods of the paper's comparison with half of the sampled tokens.

Those that begin with SRT collect revisions of half of the questions.

Command:   python run.py compare configs/compare_half_budget.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  about 15 minutes; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison

NAMES = ("grpo", "sdzero", "reinforce", "guided_replay", "hybrid")


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    config = comparison.config
    return dataclasses.replace(
        comparison,
        name="compare_half_budget",
        config=dataclasses.replace(config, collect=dataclasses.replace(config.collect, questions=512)),
        entries={name: comparison.entries[name] for name in NAMES},
        budget=compare_paper.BUDGET // 2,
        seeds=(10, 11, 12),
    )
