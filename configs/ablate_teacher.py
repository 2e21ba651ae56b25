"""Where the teacher comes from: frozen, moving average, synchronised every n steps or on a plateau, live.

Command:   python run.py compare configs/ablate_teacher.py
Hardware:  2 CPU cores, 2 GB of memory
Expected:  8 minutes after compare_paper, whose base models it takes, seeds 10 to 12; the table is in docs/RESULTS.md
"""

import dataclasses

from configs import compare_paper
from sdzero_jax.compare import Comparison, Entry

SCHEDULES = {
    "frozen": (),
    "ema": ("ema_rate=0.01",),
    "ema_fast": ("ema_rate=0.05",),
    "sync_every": ("sync_steps=64",),
    "sync_often": ("sync_steps=16",),
    "sync_on_plateau": ("patience=2",),
    "live": (),
}
KINDS = {"ema_fast": "ema", "sync_often": "sync_every"}
PLATEAU = ("train.validate_every=8",)


def _entry(name: str, settings: tuple[str, ...]) -> Entry:
    kind = KINDS.get(name, name)
    teacher = (f"train.teacher.schedule={kind}", *(f"train.teacher.{setting}" for setting in settings))
    extra = PLATEAU if kind == "sync_on_plateau" else ()
    return Entry(" ".join((kind, *settings)), settings=(*compare_paper.SDZERO, *teacher, *extra), fill=True)


ENTRIES = {name: _entry(name, settings) for name, settings in SCHEDULES.items()} | {
    f"{name}_replay": dataclasses.replace(
        _entry(name, SCHEDULES[name]),
        label=f"{name} with replay",
        settings=(*_entry(name, SCHEDULES[name]).settings, "train.method=sdzero_replay"),
    )
    for name in ("frozen", "sync_often")
}


def get_comparison() -> Comparison:
    comparison = compare_paper.get_comparison()
    named = dataclasses.replace(comparison, name="ablate_teacher", entries=ENTRIES, reference="frozen")
    return dataclasses.replace(named, seeds=(10, 11, 12))
