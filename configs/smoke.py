"""Every stage of the demo in one or two minutes, too short to learn much: does the machinery run?

Command:   python run.py configs/smoke.py
Hardware:  2 CPU cores
Expected:  exit status 0 and a report; accuracies near chance
"""

import dataclasses

from configs import demo
from sdzero_jax.config import Config


def get_config() -> Config:
    config = demo.get_config()
    replace = dataclasses.replace
    return replace(
        config,
        name="smoke",
        run_dir="runs/smoke",
        task=replace(config.task, chain=replace(config.task.chain, batch_sizes=(32, 16, 8))),
        sampler=replace(config.sampler, slots=64),
        base=replace(config.base, steps=120, checkpoint=replace(config.base.checkpoint, every=40)),
        collect=replace(config.collect, questions=128, chunk=64),
        srt=replace(config.srt, epochs=8, batch_size=16),
        distill=replace(
            config.distill,
            questions=64,
            passes=1,
            validate_every=2,
            validation_questions=32,
            checkpoint=replace(config.distill.checkpoint, every=2),
        ),
        evaluate=replace(config.evaluate, questions=32, chunk=16),
        localisation=replace(config.localisation, questions=64),
        # A model this young keeps little; the gates are not what is tried here.
        health=replace(config.health, keep_rate_stop=0.0, min_mean_tokens=0.0, questions=32),
    )
