"""SD-Zero on Qwen3-4B-Instruct-2507 with programming contests, graded by running the programs in a sandbox.

Command:   python run.py configs/sdzero_qwen3_4b_code.py
Before:    python run.py data prepare codeforces_cots; python run.py data prepare livecodebench;
           python run.py doctor configs/sdzero_qwen3_4b_code.py --topology v6e:4x4
Hardware:  16 chips: a v6e:4x4 (SRT takes 16.0 of 31.25 GiB per chip by the compiler). The smallest: a v5p:2x2x1 with
           mesh.fsdp=4 (65.2 of 95); a v6e:2x4 with mesh.fsdp=8 srt.microbatches=2 (22.4). bubblewrap and g++ on the
           hosts
Expected:  not run yet. The paper (arXiv:2604.12002) has the figures that this setting is after
"""

import dataclasses

from configs import sdzero_qwen3_4b_math
from sdzero_jax.config import Config

PROMPT = 2048  # tokens: statements with their examples are longer than questions of mathematics


def get_config() -> Config:
    return on_programs(sdzero_qwen3_4b_math.get_config(), "sdzero_qwen3_4b_code")


def on_programs(config: Config, name: str) -> Config:
    """A setting of mathematics with programs instead."""
    replace = dataclasses.replace
    longer = PROMPT - config.distill.layout.max_prompt
    layout = config.distill.layout
    layout = replace(layout, max_prompt=PROMPT, max_teacher_tokens=layout.max_teacher_tokens + longer)
    distill = replace(config.distill, layout=layout)
    return replace(
        config,
        name=name,
        run_dir=f"runs/{name}",
        problems=replace(
            config.problems, train="codeforces_cots:train", test="livecodebench:test", max_prompt_tokens=PROMPT
        ),
        srt=replace(config.srt, data=replace(config.srt.data, max_length=config.srt.data.max_length + longer)),
        distill=distill,
        train=sdzero_qwen3_4b_math.train_as(distill),
    )
