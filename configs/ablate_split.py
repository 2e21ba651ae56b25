"""How the budget is shared between collecting revisions and distilling: 512 to 1,536 questions collected.

Command:   python run.py compare configs/ablate_split.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  16 minutes beside other work, seeds 10 to 12; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry

ENTRIES = {
    f"collect_{count}": Entry(
        f"{count} questions collected",
        settings=(*compare_paper.SDZERO, f"collect.questions={count}", f"train.questions={2048 - count}"),
        fill=True,
    )
    for count in (512, 768, 1024, 1280, 1536)
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    named = dataclasses.replace(comparison, name="ablate_split", entries=ENTRIES, reference="collect_1024")
    return dataclasses.replace(named, seeds=(10, 11, 12))
