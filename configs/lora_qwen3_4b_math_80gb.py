"""SD-Zero with adapters: Qwen3-4B-Instruct-2507 on one GPU of 80 GB, responses of up to 16,384 tokens.

Command:   python run.py configs/lora_qwen3_4b_math_80gb.py
Before:    python run.py data prepare openr1_math_220k; python run.py data prepare math500;
           python run.py doctor configs/lora_qwen3_4b_math_80gb.py --gpus 1x80
Hardware:  one GPU of 80 GB, of which jax may take 92%: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92. By the estimate
           sampling takes 54.6 of these 73.6 GiB, SRT 20.3
Expected:  not run yet
"""

import dataclasses

from configs import sdzero_qwen3_4b_math
from configs.lora_qwen3_4b_math import with_adapters
from sdzero_jax.config import Config


def get_config() -> Config:
    long = sdzero_qwen3_4b_math.get_config()
    config = with_adapters(long, "lora_qwen3_4b_math_80gb", sdzero_qwen3_4b_math.RESPONSE)
    return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, slots=16))
