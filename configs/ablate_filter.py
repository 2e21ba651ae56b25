"""Which samples and revisions count: correctness filter, wrong or right first attempts, phrases, end tokens.

Command:   python run.py compare configs/ablate_filter.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  an hour beside other work, seeds 10 to 12; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry

VARIANTS = {
    "paper": ("as the paper", ()),
    "unfiltered": ("wrong revisions kept", ("srt.data.only_right=false",)),
    "revise_wrong": ("only wrong attempts revised", ("collect.revise=wrong",)),
    "revise_right": ("only right attempts revised", ("collect.revise=correct",)),
    "unbalanced": ("traces as they come", ("srt.data.balance=false",)),
    "blind": ("one phrase whatever the reward", ("phrases=embedded_blind",)),
    "keep_eos": ("end token of the first copy kept", ("train.layout.keep_first_eos=true",)),
    "mask_end": ("end token not distilled", ("train.objective.mask_end=true",)),
    "wrong_only": ("distilled on wrong samples", ("train.layout.sample_mask=wrong",)),
    "right_only": ("distilled on right samples", ("train.layout.sample_mask=correct",)),
}
ENTRIES = {
    name: Entry(label, settings=(*compare_paper.SDZERO, *settings), fill=True)
    for name, (label, settings) in VARIANTS.items()
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    named = dataclasses.replace(comparison, name="ablate_filter", entries=ENTRIES, reference="paper")
    return dataclasses.replace(named, seeds=(10, 11, 12))
