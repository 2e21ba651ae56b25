"""SD-Zero on Olmo-3-7B-Instruct with competition mathematics: the Qwen3 setting with the other family's model.

Command:   python run.py configs/sdzero_olmo3_7b_math.py
Before:    python run.py data prepare openr1_math_220k; python run.py data prepare math500;
           python run.py doctor configs/sdzero_olmo3_7b_math.py --topology v5p:2x2x4
Hardware:  16 chips: a v5p:2x2x4 (SRT takes 34.9 of 95 GiB per chip by the compiler). The smallest for these settings
           is a v5p:2x2x2 with mesh.fsdp=8 (69.7). A v6e:4x4 does with model.remat=offload, which keeps the layers'
           inputs on the hosts (26.6 of 31.25; the compiler counts 27.7)
Expected:  not run yet. The paper (arXiv:2604.12002) has the figures that this setting is after
"""

import dataclasses

from configs import sdzero_qwen3_4b_math
from sdzero_jax.config import Config
from sdzero_jax.models import PRESETS


def get_config() -> Config:
    config = sdzero_qwen3_4b_math.get_config()
    return dataclasses.replace(
        config,
        name="sdzero_olmo3_7b_math",
        run_dir="runs/sdzero_olmo3_7b_math",
        phrases="olmo3",
        model=PRESETS["olmo3_7b_instruct"](compute_dtype="bfloat16", remat="full"),
        base=dataclasses.replace(config.base, pretrained="allenai/Olmo-3-7B-Instruct"),
    )
