"""The demo with the authors' two-stage SRT: generation loss on wrong first attempts, then revision loss.

Both stages keep the layout that distillation queries; the authors' second stage puts y_init and the control
phrase into the user turn, which no later stage ever reads.

Command:   python run.py configs/demo_two_stage.py
Hardware:  2 CPU cores
Expected:  not measured yet
"""

import dataclasses

from configs import demo
from sdzero_jax.config import Config


def get_config() -> Config:
    config = demo.get_config()
    srt = dataclasses.replace(config.srt, data=dataclasses.replace(config.srt.data, mode="two_stage"))
    return dataclasses.replace(config, name="demo_two_stage", run_dir="runs/demo_two_stage", srt=srt)
