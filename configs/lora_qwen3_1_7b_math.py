"""SD-Zero with adapters: Qwen3-1.7B, asked not to think aloud, on one GPU of 24 GB.

Command:   python run.py configs/lora_qwen3_1_7b_math.py
Before:    python run.py data prepare openr1_math_220k; python run.py data prepare math500;
           python run.py doctor configs/lora_qwen3_1_7b_math.py --gpus 1x24
Hardware:  one GPU of 24 GB, of which jax may take 92%: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92. By the estimate
           sampling takes 19.1 of these 22.1 GiB, SRT 7.4
Expected:  not run yet
"""

import dataclasses

from configs.lora_qwen3_4b_math import with_adapters
from configs.sdzero_qwen3_4b_math import get_config as many_accelerators
from sdzero_jax.config import Config
from sdzero_jax.models import PRESETS


def get_config() -> Config:
    config = with_adapters(many_accelerators(), "lora_qwen3_1_7b_math")
    return dataclasses.replace(
        config,
        model=PRESETS["qwen3_1_7b"](compute_dtype="bfloat16", param_dtype="bfloat16", remat="full"),
        base=dataclasses.replace(config.base, pretrained="Qwen/Qwen3-1.7B"),
        sampler=dataclasses.replace(config.sampler, slots=12, cache_dtype=""),
    )
