"""The demo's method on the second embedded task: reach a number with three others (Countdown).

Command:   python run.py configs/countdown.py
Hardware:  2 CPU cores
Expected:  not measured yet; the settings are the chain task's, not tuned for this one
"""

import dataclasses

from configs import demo
from sdzero_jax.batches import DistillLayout
from sdzero_jax.config import Config
from sdzero_jax.rollouts import SamplingConfig
from sdzero_jax.tasks import CountdownConfig, TaskConfig


def get_config() -> Config:
    config = demo.get_config()
    replace = dataclasses.replace
    two_solutions = SamplingConfig(temperature=1.0, max_new_tokens=76)
    return replace(
        config,
        name="countdown",
        run_dir="runs/countdown",
        task=TaskConfig(name="countdown", countdown=CountdownConfig(batch_sizes=(128, 64, 40))),
        model=replace(config.model, vocab_size=26),
        collect=replace(config.collect, sampling=two_solutions),
        srt=replace(config.srt, data=replace(config.srt.data, max_length=120)),
        distill=replace(
            config.distill,
            sampling=SamplingConfig(temperature=1.0, max_new_tokens=36),
            layout=DistillLayout(max_prompt=13, max_response=36),
        ),
        evaluate=replace(config.evaluate, sampling=two_solutions),
        # Nothing is known of this task's revisers: report, do not stop.
        health=replace(config.health, keep_rate_stop=0.0, min_mean_tokens=4.0),
    )
