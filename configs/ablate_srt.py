"""Which loss phase 1 trains: both terms, either one, two stages, the compact form; SRT and SD-Zero after each.

Command:   python run.py compare configs/ablate_srt.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  not run at full size yet
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry

MODES = ("joint", "generation", "revision", "two_stage", "compact")
ENTRIES = {f"srt_{mode}": Entry(f"SRT {mode}", "srt", (f"srt.data.mode={mode}",)) for mode in MODES} | {
    f"sdzero_{mode}": Entry(
        f"SD-Zero after {mode}", settings=(*compare_paper.SDZERO, f"srt.data.mode={mode}"), fill=True
    )
    for mode in MODES
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    named = dataclasses.replace(comparison, name="ablate_srt", entries=ENTRIES, reference="sdzero_joint")
    return dataclasses.replace(named, seeds=(10, 11, 12))
