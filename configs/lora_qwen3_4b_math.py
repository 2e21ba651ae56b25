"""SD-Zero with adapters: Qwen3-4B-Instruct-2507 on one GPU of 24 GB, responses of up to 4,096 tokens.

The model's parameters are frozen in two bytes each; generator and reviser are adapters of rank 32 on them.

Command:   python run.py configs/lora_qwen3_4b_math.py
Before:    python run.py data prepare openr1_math_220k; python run.py data prepare math500;
           python run.py doctor configs/lora_qwen3_4b_math.py --gpus 1x24
Hardware:  one GPU of 24 GB, of which jax may take 92%: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92. By the estimate
           sampling takes 20.2 of these 22.1 GiB, SRT 16.7
Expected:  not run yet
"""

import dataclasses

from configs import sdzero_qwen3_4b_math
from sdzero_jax.batches import DistillLayout
from sdzero_jax.config import Config
from sdzero_jax.models.lora import LoraConfig
from sdzero_jax.sharding import MeshConfig

PROMPT, RESPONSE = 1024, 4096  # tokens; the longest question of MATH-500 has 814
ROWS = 8  # responses per update, one at a time


def get_config() -> Config:
    return with_adapters(sdzero_qwen3_4b_math.get_config(), "lora_qwen3_4b_math")


def with_adapters(config: Config, name: str, response: int = RESPONSE) -> Config:
    """A setting for many accelerators on a single one, with responses of up to `response` tokens."""
    replace = dataclasses.replace
    adapters = LoraConfig(rank=32, alpha=64.0)
    sampling = replace(config.collect.sampling, max_new_tokens=response)
    teacher = PROMPT + 2 * response + 64  # x | y_init | d P_r d | y_rev
    distill = replace(
        config.distill,
        lora=adapters,
        questions=3000,
        batch_size=ROWS,
        microbatches=ROWS,
        sampling=sampling,
        layout=DistillLayout(max_prompt=PROMPT, max_response=response, max_teacher_tokens=teacher),
        optimizer=replace(config.distill.optimizer, learning_rate=5e-5),
    )
    return replace(
        config,
        name=name,
        run_dir=f"runs/{name}",
        model=replace(config.model, param_dtype="bfloat16"),
        mesh=MeshConfig(),
        problems=replace(config.problems, max_prompt_tokens=PROMPT),
        sampler=replace(config.sampler, slots=6, cache_dtype="int8"),
        collect=replace(config.collect, questions=2000, sampling=sampling),
        srt=replace(
            config.srt,
            lora=adapters,
            batch_size=1,
            data=replace(config.srt.data, max_length=teacher),
            optimizer=replace(config.srt.optimizer, learning_rate=5e-5),
        ),
        distill=distill,
        train=sdzero_qwen3_4b_math.train_as(distill),
        evaluate=replace(config.evaluate, sampling=sampling),
    )
