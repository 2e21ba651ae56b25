"""Programs instead of answers: the rehearsal of `gsm8k_tiny` on MBPP, graded by running what was written.

A Qwen3-shaped model of random weights learns to recite a few solutions, is sampled, and its programs are
judged in the sandbox; then every stage runs as it would with a pretrained model.

Command:   python run.py configs/mbpp_tiny.py
Before:    python run.py data prepare mbpp --from tests/data/questions
Hardware:  2 CPU cores, 4 GB of memory, bubblewrap; the hub for the tokenizer, or problems.tokenizer=FOLDER
Expected:  about 5 minutes; the figures mean nothing but that everything works together
"""

import dataclasses

from configs import gsm8k_tiny
from configs.sdzero_qwen3_4b_math import train_as
from sdzero_jax.config import Config

PROMPT, RESPONSE = 96, 64  # tokens; MBPP's shortest questions and solutions


def get_config() -> Config:
    config = gsm8k_tiny.get_config()
    replace = dataclasses.replace
    sampling = replace(config.collect.sampling, max_new_tokens=RESPONSE)
    layout = replace(config.distill.layout, max_prompt=PROMPT, max_response=RESPONSE)
    distill = replace(config.distill, sampling=sampling, layout=layout)
    return replace(
        config,
        name="mbpp_tiny",
        run_dir="runs/mbpp_tiny",
        problems=replace(
            config.problems,
            train="mbpp:train",
            validation="mbpp:train",
            test="mbpp:train",
            max_prompt_tokens=PROMPT,
        ),
        sampler=replace(config.sampler, prompt_multiple=PROMPT),
        base=replace(config.base, max_length=PROMPT + RESPONSE),
        collect=replace(config.collect, sampling=sampling),
        srt=replace(
            config.srt,
            # Who recites programs makes mistakes in a second copy: none of its revisions may pass the tests.
            data=replace(config.srt.data, max_length=PROMPT + 2 * RESPONSE + 16, only_right=False),
        ),
        distill=distill,
        train=train_as(distill),
        evaluate=replace(config.evaluate, sampling=sampling),
    )
