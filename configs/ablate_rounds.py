"""One, two and three rounds, the teacher becoming the student between two of them: plain, and guided with replay.

Every round samples each question once more, at half the learning rate of the round before.

Command:   python run.py compare configs/ablate_rounds.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  20 minutes after compare_paper, whose base models it takes, 35 without; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry

ENTRIES = {
    f"{name}_{count}": Entry(f"{label}, {count} of 3 rounds", settings=(*settings, f"train.rounds={count}"))
    for name, label, settings in (
        ("plain", "SD-Zero", compare_paper.SDZERO),
        ("guided", "guided SD-Zero + replay", (*compare_paper.GUIDED, "train.method=sdzero_replay")),
    )
    for count in (1, 2, 3)
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    config = dataclasses.replace(comparison.config, train=dataclasses.replace(comparison.config.train, passes=1))
    named = dataclasses.replace(comparison, name="ablate_rounds", config=config, entries=ENTRIES)
    return dataclasses.replace(named, reference="plain_1")
