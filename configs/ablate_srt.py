"""Which loss phase 1 trains: both terms, either one, two stages, the compact form; SRT and SD-Zero after each.

SRT itself is run at a learning rate tuned for each form; SD-Zero after it keeps the rates of the comparison.

Command:   python run.py compare configs/ablate_srt.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  29 minutes beside other work; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry


def grid(*values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((f"srt.optimizer.learning_rate={value}",) for value in values)


# The best rate of every form, and the grid that `--tune` looks in, moved so that the best lies inside.
TUNED = {
    "joint": ("2e-3", compare_paper.SRT_RATES),
    "generation": ("2e-3", compare_paper.SRT_RATES),
    "revision": ("2.5e-4", grid("1.25e-4", "2.5e-4", "5e-4", "1e-3")),
    "two_stage": ("5e-4", grid("2.5e-4", "5e-4", "1e-3", "2e-3")),
    "compact": ("4e-3", compare_paper.SRT_RATES),
}
ENTRIES = {
    f"srt_{mode}": Entry(
        f"SRT {mode}", "srt", (f"srt.data.mode={mode}", f"srt.optimizer.learning_rate={rate}"), grid=points
    )
    for mode, (rate, points) in TUNED.items()
} | {
    f"sdzero_{mode}": Entry(
        f"SD-Zero after {mode}", settings=(*compare_paper.SDZERO, f"srt.data.mode={mode}"), fill=True
    )
    for mode in TUNED
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    return dataclasses.replace(comparison, name="ablate_srt", entries=ENTRIES, reference="sdzero_joint")
