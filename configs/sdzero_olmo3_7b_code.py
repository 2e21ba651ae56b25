"""SD-Zero on Olmo-3-7B-Instruct with programming contests: the Qwen3 setting with the other family's model.

Command:   python run.py configs/sdzero_olmo3_7b_code.py
Before:    python run.py data prepare codeforces_cots; python run.py data prepare livecodebench;
           python run.py doctor configs/sdzero_olmo3_7b_code.py --topology v5p:2x2x4
Hardware:  16 chips: a v5p:2x2x4 (SRT takes 35.7 of 95 GiB per chip by the compiler). The smallest for these settings
           is a v5p:2x2x2 with mesh.fsdp=8 (71.3). A v6e:4x4 does with model.remat=offload (27.1 of 31.25).
           bubblewrap and g++ on the hosts
Expected:  not run yet. The paper (arXiv:2604.12002) has the figures that this setting is after
"""

from configs import sdzero_olmo3_7b_math
from configs.sdzero_qwen3_4b_code import on_programs
from sdzero_jax.config import Config


def get_config() -> Config:
    return on_programs(sdzero_olmo3_7b_math.get_config(), "sdzero_olmo3_7b_code")
